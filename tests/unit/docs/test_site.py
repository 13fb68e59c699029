"""`make docs`: every page has its place, links are turned, the reference holds the public names."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from helpers.paths import ROOT

PUBLIC = """
sdsearch_lightning: SDSearchModule SupervisedModule
sdsearch_lightning.datamodules: SearchDataModule SyntheticWorldDataModule
sdsearch_lightning.callbacks: RolloutGrouping HindsightConstruction JSDWeightScheduler TrajectoryLog TrainingHealth \
GracefulStop
sdsearch_lightning.retrieval: Retriever DenseRetriever BM25Retriever RemoteRetriever CachedRetriever
sdsearch_lightning.scoring.rewards: normalize_answer exact_match substring_match f1
sdsearch_lightning.scoring.advantages: group_relative
sdsearch_lightning.losses: jensen_shannon clipped_surrogate kl_k3 token_weights aggregate
"""
API = re.findall(r"^::: (\S+)", (ROOT / "docs/api.md").read_text(), re.MULTILINE)


def site_pages() -> Any:
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs/site_pages.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def named(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for child in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from named(child)


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    inside = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert set(named(config["nav"])) == inside | set(site_pages().PAGES.values()), "give it a line in mkdocs.yml"


@pytest.mark.parametrize(
    ("path", "written", "turned"),
    [
        ("docs/data.md", "[a](running.md#stopping)", "[a](running.md#stopping)"),
        ("docs/retrieval.md", "[a](../examples/custom_retriever.py)", "[a](examples/custom_retriever.md)"),
        ("docs/performance.md", "[a](../benchmarks/RESULTS.md)", "[a](benchmarks.md)"),
        (
            "README.md",
            "![p](docs/pictures/credit_map.png) [a](docs/data.md)",
            "![p](pictures/credit_map.png) [a](data.md)",
        ),
        ("README.md", "[a](CHANGELOG.md) `[b](docs/data.md)`", "[a](changelog.md) `[b](docs/data.md)`"),
        ("README.md", "[a](https://x.org/docs/y.md) [b](#here)", "[a](https://x.org/docs/y.md) [b](#here)"),
        ("README.md", "[a](setup.py)", "[a](setup.py)"),  # no page: mkdocs tells
    ],
)
def test_links_are_turned(path: str, written: str, turned: str) -> None:
    assert site_pages().turned(written, path) == turned


@pytest.mark.parametrize("name", API)
def test_a_name_of_the_reference_is_there(name: str) -> None:
    module, _, last = name.rpartition(".")
    if not hasattr(importlib.import_module(module), last):
        importlib.import_module(name)


def test_the_reference_holds_the_public_names() -> None:
    modules = [name for name in API if not name.rpartition(".")[2][0].isupper()]
    for line in PUBLIC.strip().splitlines():
        home, _, names = line.partition(": ")
        for name in names.split():
            found = getattr(importlib.import_module(home), name)
            assert f"{found.__module__}.{name}" in API or found.__module__ in modules, name


def test_the_environment_of_the_site_is_the_extra_and_pinned() -> None:
    (packages,) = re.findall(r"^DOCS_PACKAGES := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    (extra,) = re.findall(r'"docs": \[(.*)\]', (ROOT / "setup.py").read_text())
    assert packages.replace("'", "").split() == re.findall(r'"([^"]+)"', extra)
    pinned = (ROOT / "constraints.txt").read_text()
    assert all(f"\n{name}==" in pinned for name in ("mkdocs", "mkdocs-material", "mkdocstrings", "mkdocstrings-python"))


def test_extras_of_the_page_are_those_of_the_package() -> None:
    page = (ROOT / "docs/install.md").read_text()
    extras = re.findall(r'^        "([\w-]+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)) == sorted(extras)
