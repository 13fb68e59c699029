"""What is installed is what works: wheel, editable install and bare checkout, from the checkout and from elsewhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from helpers.paths import ROOT
from sdsearch_lightning.report.html import SCRIPTS

SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
SOURCES = {
    "sdsearch_lightning": "sdsearch_lightning",
    "callbacks": "sdsearch_lightning/callbacks",
    "datamodules": "sdsearch_lightning/datamodules",
}
"""Folders of the checkout, and where they are in the wheel."""

PROBE = """
import json, multiprocessing, pickle, sys
from sdsearch_lightning import SDSearchModule
from sdsearch_lightning.callbacks import GracefulStop
from sdsearch_lightning.datamodules import SearchDataModule

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        child = pool.apply(pickle.dumps, [GracefulStop])  # a child that was spawned finds the class by its name
    modules = [SDSearchModule.__module__, GracefulStop.__module__, SearchDataModule.__module__]
    files = [sys.modules[name].__file__ for name in modules]
    print(json.dumps({"modules": modules, "files": files, "same": pickle.loads(child) is GracefulStop}))
"""

pytestmark = pytest.mark.slow


def call(*command: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that builds leave nothing in this one."""
    copy = tmp_path_factory.mktemp("clone") / "checkout"
    copy.mkdir()
    for path in (*ROOT.glob("*.*"), *(ROOT / name for name in ("Makefile", "LICENSE"))):
        if path.is_file():
            shutil.copy(path, copy)
    for folder in (*SOURCES, "configs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def distributions(checkout: Path) -> Path:
    """A folder with the wheel and the sdist, built without an index."""
    build = "import setuptools.build_meta as b; b.build_sdist('../dist'); b.build_wheel('../dist')"
    call(sys.executable, "-c", build, cwd=checkout)
    return checkout.parent / "dist"


def environment(folder: Path) -> Path:
    """The Python of a new environment that sees setuptools and, after `open_to_libraries`, what is installed here."""
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    tools = folder / "tools"
    tools.mkdir()
    for name in ("setuptools", "_distutils_hack", "setuptools-*.dist-info"):
        for path in SITE_PACKAGES.glob(name):
            (tools / path.name).symlink_to(path)
    see(folder, tools)
    return folder / "bin/python"


def see(folder: Path, path: Path) -> None:
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(f"{path}\n")


def install(python: Path, *what: str | Path) -> None:
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--disable-pip-version-check")
    call(sys.executable, "-m", "pip", "--python", python, "install", *options, *what, cwd=python.parent)
    see(python.parent.parent, SITE_PACKAGES)  # only now: pip shall not meet an installation that is there


@pytest.fixture(scope="module")
def wheel_python(distributions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = environment(tmp_path_factory.mktemp("environments") / "wheel")
    install(python, *distributions.glob("*.whl"))
    return python


@pytest.fixture(scope="module")
def editable_python(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = environment(tmp_path_factory.mktemp("environments") / "editable")
    install(python, "-e", checkout)
    return python


def test_the_wheel_holds_every_module_once_and_no_generic_name_at_its_top(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"sdsearch_lightning"}
    expected = {
        f"{target}/{path.relative_to(ROOT / folder)}"
        for folder, target in SOURCES.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert expected == {name for name in names if name.endswith(".py")}
    assert "sdsearch_lightning/py.typed" in names
    assert {f"sdsearch_lightning/report/{name}" for name in ("page.html", "page.css", *SCRIPTS)} <= set(names)


def test_the_metadata_name_all_extras_and_keep_faiss_out_of_the_core(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (path,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    metadata = message_from_bytes(archive.read(path))
    extras = "cpu gpu serve bm25 data milvus real browse completion loggers lora vllm vllm-cpu parity dev docs".split()
    assert sorted(metadata.get_all("Provides-Extra")) == sorted(extras)
    core = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert not any(line.startswith(("faiss", "scipy", "vllm")) for line in core)
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for line in core:
        name = line.split(">")[0].split("[")[0].split("<")[0].strip().lower()
        assert name in pinned, f"{name} is not pinned in constraints.txt"


def test_the_sdist_can_be_worked_with(distributions: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    assert {"setup.py", "constraints.txt", "Makefile", "callbacks/__init__.py", "datamodules/__init__.py"} <= names
    assert {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")} <= names


@pytest.mark.parametrize("kind", ["wheel", "editable"])
@pytest.mark.parametrize("place", ["checkout", "elsewhere"])
def test_an_installation_works_from_the_checkout_and_from_elsewhere(
    kind: str, place: str, checkout: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    python = request.getfixturevalue(f"{kind}_python")
    cwd = checkout if place == "checkout" else tmp_path
    assert "commands:" in call(python, "-m", "sdsearch_lightning", "--help", cwd=cwd).stdout
    assert call(python.with_name("sdsearch"), "--version", cwd=cwd).stdout.startswith("sdsearch 0.")
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    # As a script, the probe's folder is on the path; as a module of the checkout, the checkout is.
    found = json.loads(call(python, *_script(probe, cwd), cwd=cwd).stdout)
    assert found["modules"] == [
        "sdsearch_lightning.module",
        "sdsearch_lightning.callbacks.graceful_stop",
        "sdsearch_lightning.datamodules.questions",
    ]
    assert found["same"] is True
    installed = python.parent.parent if kind == "wheel" and place == "elsewhere" else checkout
    assert all(Path(file).is_relative_to(installed) for file in found["files"]), found


def _script(probe: Path, cwd: Path) -> tuple[str, ...]:
    if cwd == probe.parent:
        return (str(probe),)
    shutil.copy(probe, cwd / "probe.py")
    return ("-m", "probe")


def test_a_bare_checkout_works(checkout: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "bare")
    see(tmp_path / "bare", SITE_PACKAGES)
    (checkout / "probe.py").write_text(PROBE)
    assert json.loads(call(python, "-m", "probe", cwd=checkout).stdout)["same"] is True


@pytest.mark.parametrize("folder", ["callbacks", "datamodules"])
def test_a_folder_imported_by_its_bare_name_says_how_to_import_it(checkout: Path, folder: str) -> None:
    done = call(sys.executable, "-c", f"import {folder}", cwd=checkout, code=1)
    assert done.stderr.splitlines()[-1] == f"ImportError: import this package as sdsearch_lightning.{folder}"


def test_the_checkout_lends_its_name_to_nothing_else(checkout: Path) -> None:
    """`__path__.append(root)` would make `sdsearch_lightning.setup` and `.tests` importable."""
    for name in ("setup", "configs", "sdsearch_lightning"):
        call(sys.executable, "-c", f"import sdsearch_lightning.{name}", cwd=checkout, code=1)


def test_no_weights_and_no_data_set_are_tracked() -> None:
    """What `make real` and runs write stays out of the repository: a wide `git add` once took 630 MB of weights in."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    tracked = [ROOT / name for name in listed.stdout.split("\0") if name]
    large = {str(path.relative_to(ROOT)) for path in tracked if path.is_file() and path.stat().st_size > 5_000_000}
    assert len(tracked) > 400 and not large
    assert not [path for path in tracked if path.suffix in (".safetensors", ".gguf", ".index", ".bin")]
    assert not [path for path in tracked if path.is_relative_to(ROOT / "data")]
