"""The house stays a house: who may import whom, which rooms may be heavy, and how long things may get."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "sdsearch_lightning"

LAYERS = """
errors pluggable kinds
types
tokenization rewards advantages losses schedules lessons attention head master_weights sharded_checkpoints
packing stored_checkpoint
policy adapter_folder
adapters block_templates divergences evaluation retrieval teachers strategies
templates
protocol hindsight collate distillation models
rollout credit step_metrics evaluation_steps
objective manual_step
student policy_checkpoints
policy_module
module supervised
checkpoints
report run_folder hub
model_card
callbacks datamodules
run_record cli* retrieval_commands export_command plan commands __main__ __init__
"""
"""From the bottom up: a room may import the rooms above its own line here, and itself, never its neighbours."""

NEIGHBOURS = {
    "cli*": ["run_record"],
    "retrieval_commands": ["cli*"],
    "export_command": ["cli*"],
    "plan": ["cli*"],
    "commands": ["cli*", "retrieval_commands", "export_command", "plan"],
    "__main__": ["commands"],
}
"""The top floor has an order of its own, too short for lines."""

LIBRARIES = {
    "lightning": "master_weights sharded_checkpoints strategies manual_step evaluation_steps policy_checkpoints "
    "policy_module module callbacks datamodules checkpoints run_folder run_record cli* export_command commands",
    "transformers": "attention models rollout plan commands",
    "tokenizers": "models retrieval datamodules",
    "sentence_transformers": "retrieval datamodules",
    "faiss": "retrieval",
    "peft": "adapter_folder adapters",
    "vllm": "rollout",
    "fastapi": "retrieval",
    "uvicorn": "retrieval",
    "pymilvus": "retrieval",
    "bm25s": "retrieval",
    "pyarrow": "retrieval",
    "httpx": "retrieval hub",
    "huggingface_hub": "models retrieval datamodules hub model_card",
    "torchmetrics": "evaluation",
    "rich": "report retrieval plan",
}
"""The only rooms that may import a heavy library; type annotations do not count."""

MAX_FILE, MAX_FUNCTION = 300, 80


@dataclass(frozen=True)
class Source:
    """One file of the library."""

    path: Path
    """Relative to the repository."""
    module: str
    """Below the package: `rollout.engine`."""

    @property
    def room(self) -> str:
        """The pattern in LAYERS that holds it."""
        name = self.module.split(".")[0]
        rooms = [room for room in LAYERS.split() if fnmatch(name, room)]
        assert rooms, f"{self.path} has no place: give {name!r} one in LAYERS of {Path(__file__).name}"
        return rooms[0]

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


def allowed(room: str) -> set[str]:
    """Rooms that `room` may import."""
    below: set[str] = {room}
    for line in LAYERS.strip().splitlines():
        if room in line.split():
            return below | set(NEIGHBOURS.get(room, []))
        below |= set(line.split())
    raise AssertionError(room)


def by_path(source: Source) -> str:
    return str(source.path)


@pytest.mark.parametrize("source", sources(), ids=by_path)
def test_imports_point_down(source: Source) -> None:
    rooms = {imported: next(s.room for s in sources() if s.module == imported) for imported in source.ours()}
    wrong = {imported for imported, room in rooms.items() if room not in allowed(source.room)}
    assert not wrong, f"{source.path} ({source.room}) may import {sorted(allowed(source.room))} only"


@pytest.mark.parametrize("source", sources(), ids=by_path)
def test_heavy_libraries_stay_in_their_rooms(source: Source) -> None:
    roots = {name.split(".")[0] for name in source.imports()}
    wrong = {library for library in roots & set(LIBRARIES) if source.room not in LIBRARIES[library].split()}
    assert not wrong, f"{source.path} imports {wrong}"


def test_callbacks_and_datamodules_meet_in_the_trainer_only() -> None:
    rooms = {source.module: source.room for source in sources()}
    for source in sources():
        imported = {rooms[name] for name in source.ours()} & {"callbacks", "datamodules"}
        assert imported <= {source.room} or source.room in ("cli*", "export_command"), (
            f"{source.path} imports {imported}"
        )


def test_there_is_no_circle() -> None:
    """Also within a room."""
    waiting = {source.module: source.ours() for source in sources()}
    # A package's __init__ gathers its own files: what imports the package gets them, what is inside does not count.
    waiting = {name: {i for i in imports if not name.startswith(f"{i}.")} for name, imports in waiting.items()}
    while waiting:
        ready = [name for name, imports in waiting.items() if not imports & set(waiting)]
        assert ready, f"a circle among {sorted(waiting)}"
        for name in ready:
            del waiting[name]


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
        ("packing", "attention", True),
        ("head", "attention", False),  # neighbours
        ("policy", "head", True),
        ("head", "policy", False),
        ("student", "objective", True),
        ("objective", "student", False),
        ("collate", "hindsight", False),  # neighbours
        ("callbacks", "datamodules", False),
        ("module", "callbacks", False),
        ("cli*", "callbacks", True),
    ],
)
def test_the_order_of_the_rooms(room: str, imported: str, fine: bool) -> None:
    assert (imported in allowed(room)) == fine


def test_imports_are_found_wherever_they_hide() -> None:
    text = "import a.b\nif TYPE_CHECKING:\n    import c\ndef f():\n    with x:\n        from d.e import g\n"
    assert set(_imports(ast.parse(text), typing=False)) == {"a.b", "d.e.g"}
    assert set(_imports(ast.parse(text), typing=True)) == {"a.b", "c", "d.e.g"}
    assert {"callbacks.rollout_grouping", "datamodules", "rollout", "__init__"} <= {s.module for s in sources()}
    engine = next(source for source in sources() if source.module == "rollout.engine")
    assert engine.ours() == {"errors", "policy", "protocol", "rollout.search_pool", "types"}
