"""The house stays a house: who may import whom, which files may be heavy, how long things may get, and its map."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "sdsearch_lightning"

FLOORS = """
errors enums files
pluggable checkpoints trust
types
losses protocol scoring schedules retrieval
hindsight policy report datamodules
rollout step training runs
module supervised plan
callbacks
inference
cli
__main__ __init__
"""
"""From the bottom up: a room may import the rooms of lower floors and itself, never its neighbours."""

LIBRARIES = {
    "lightning": "module supervised checkpoints.* training.* runs.folder runs.metrics_logger callbacks* datamodules* "
    "inference.* cli.*",
    "transformers": "policy.attention policy.loading policy.rope rollout.* plan.* cli.*",
    "tokenizers": "policy.loading retrieval.* datamodules.*",
    "sentence_transformers": "retrieval.encoder retrieval.static_encoder datamodules.*",
    "faiss": "retrieval.faiss_library retrieval.backends",
    "peft": "policy.lora policy.lora_folder",
    "vllm": "rollout.vllm",
    "fastapi": "retrieval.server.*",
    "uvicorn": "retrieval.server.*",
    "pymilvus": "retrieval.milvus",
    "bm25s": "retrieval.bm25",
    "pyarrow": "retrieval.*",
    "httpx": "retrieval.* runs.hub",
    "huggingface_hub": "policy.loading retrieval.* datamodules.* runs.hub runs.model_card runs.eval_results",
    "torchmetrics": "scoring.scores",
    "rich": "report.* retrieval.* cli.* callbacks.run_progress",
    "jinja2": "report.html",
    "textual": "report.browse",
}
"""The only files that may import a heavy library; type annotations do not count."""

APART = {
    "policy.head": "policy.attention policy.packing",
    "policy.attention": "policy.head",
    "losses.terms": "losses.weights",
}
"""Files of one room that know nothing of each other."""

MAX_FLAT, MAX_FILE, MAX_FUNCTION = 10, 300, 80


@dataclass(frozen=True)
class Source:
    """One file of the library."""

    path: Path
    """Relative to the repository."""
    module: str
    """Below the package: `rollout.engine`."""

    @property
    def room(self) -> str:
        """A package of the library, or a flat file."""
        return self.module.split(".")[0]

    @property
    def tree(self) -> ast.Module:
        return _parse(ROOT / self.path)

    def imports(self, typing: bool = False) -> set[str]:
        """Full names of everything imported anywhere in the file, names of modules behind `from x import` included."""
        return set(_imports(self.tree, typing))

    def ours(self) -> set[str]:
        """Modules of this package that the file imports."""
        names = {name.removeprefix(f"{PACKAGE}.") for name in self.imports(typing=True) if name.startswith(PACKAGE)}
        modules = {source.module for source in sources()}
        found = {name if name in modules else name.rpartition(".")[0] for name in names}
        return {name for name in found if name in modules} - {self.module}


@cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _imports(node: ast.AST, typing: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING" and not typing:
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        else:
            yield from _imports(child, typing)


@cache
def sources() -> tuple[Source, ...]:
    """All files of the library."""
    found = []
    for folder, prefix in ((PACKAGE, ()), ("callbacks", ("callbacks",)), ("datamodules", ("datamodules",))):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = (*prefix, *path.relative_to(ROOT / folder).with_suffix("").parts)
            name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
            found.append(Source(path.relative_to(ROOT), name))
    return tuple(found)


@cache
def arrows() -> dict[str, set[str]]:
    """By room: the other rooms that its files import."""
    found: dict[str, set[str]] = {source.room: set() for source in sources()}
    for source in sources():
        found[source.room] |= {name.split(".")[0] for name in source.ours()} - {source.room}
    return found


def below(room: str) -> set[str]:
    """Rooms that `room` may import."""
    lower: set[str] = set()
    for floor in FLOORS.strip().splitlines():
        if room in floor.split():
            return lower
        lower |= set(floor.split())
    raise AssertionError(f"{room} has no place: give it one in FLOORS of {Path(__file__).name}")


def by_path(source: Source) -> str:
    return str(source.path)


@pytest.mark.parametrize("room", sorted(arrows()))
def test_imports_point_down(room: str) -> None:
    assert arrows()[room] <= below(room), f"{room} may import {sorted(below(room))} only"


def test_callbacks_and_datamodules_meet_in_the_trainer_only() -> None:
    users = {room for room, imported in arrows().items() if "datamodules" in imported}
    assert users == {"cli", "inference"}


def test_the_map_is_that_of_the_code() -> None:
    """docs/architecture.md names every room, and every arrow between two."""
    text = (ROOT / "docs/architecture.md").read_text()
    drawn = dict(re.findall(r"^    (\w+) +-> ?(.*)$", text, re.MULTILINE))
    assert {room: set(names.split()) for room, names in drawn.items()} == arrows()
    assert f"{len(arrows())} rooms" in text and f"{sum(map(len, arrows().values()))} arrows" in text
    assert f"{len(FLOORS.split(chr(10))) - 2} floors" in text


@pytest.mark.parametrize("source", sources(), ids=by_path)
def test_heavy_libraries_stay_in_their_files(source: Source) -> None:
    roots = {name.split(".")[0] for name in source.imports()}
    wrong = {
        library
        for library in roots & set(LIBRARIES)
        if not any(fnmatch(source.module, pattern) for pattern in LIBRARIES[library].split())
    }
    assert not wrong, f"{source.path} imports {wrong}"


@pytest.mark.parametrize("name", APART)
def test_files_that_are_kept_apart(name: str) -> None:
    source = next(source for source in sources() if source.module == name)
    assert not source.ours() & set(APART[name].split())


def test_there_is_no_circle_of_files() -> None:
    waiting = {source.module: source.ours() for source in sources()}
    # A package's __init__ gathers its own files: what imports the package gets them, what is inside does not count.
    waiting = {name: {i for i in imports if not name.startswith(f"{i}.")} for name, imports in waiting.items()}
    while waiting:
        ready = [name for name, imports in waiting.items() if not imports & set(waiting)]
        assert ready, f"a circle among {sorted(waiting)}"
        for name in ready:
            del waiting[name]


def test_the_front_door_is_narrow() -> None:
    flat = sorted(path.name for path in (ROOT / PACKAGE).glob("*.py"))
    assert len(flat) <= MAX_FLAT, flat
    assert not (_parse(ROOT / PACKAGE / "cli/__init__.py").body[1:]), "`--help` must not pay for what cli imports"


@pytest.mark.parametrize("source", sources(), ids=by_path)
def test_files_and_functions_are_short(source: Source) -> None:
    lines = len((ROOT / source.path).read_text().splitlines())
    assert lines <= MAX_FILE, f"{source.path} has {lines} lines"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{source.path}: {node.name} has {length} lines"


# The test itself can fail


@pytest.mark.parametrize(
    ("room", "imported", "fine"),
    [
        ("rollout", "policy", True),
        ("policy", "rollout", False),
        ("losses", "hindsight", False),
        ("step", "rollout", False),  # neighbours
        ("step", "hindsight", True),
        ("callbacks", "datamodules", True),  # by its floor; refused by name
        ("module", "callbacks", False),
        ("cli", "callbacks", True),
    ],
)
def test_the_order_of_the_rooms(room: str, imported: str, fine: bool) -> None:
    assert (imported in below(room)) == fine


def test_imports_are_found_wherever_they_hide() -> None:
    text = "import a.b\nif TYPE_CHECKING:\n    import c\ndef f():\n    with x:\n        from d.e import g\n"
    assert set(_imports(ast.parse(text), typing=False)) == {"a.b", "d.e.g"}
    assert set(_imports(ast.parse(text), typing=True)) == {"a.b", "c", "d.e.g"}
    assert {"callbacks.rollout_grouping", "datamodules", "rollout", "__init__"} <= {s.module for s in sources()}
    engine = next(source for source in sources() if source.module == "rollout.engine")
    assert {"errors", "policy.policy", "protocol.conversation", "rollout.search_pool", "types"} == engine.ours()
