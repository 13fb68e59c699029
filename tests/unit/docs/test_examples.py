"""Every code block and command of docs/ and README.md is read by what would run it; links lead somewhere.

YAML by the parser of `fit`, commands by the parser of their command, Python by Python: its classes are then those that
the YAML blocks name as `my_package.X`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from helpers.code_blocks import PAGES, Block, Command, all_commands, blocks, blocks_of, commands_of, link_targets
from helpers.paths import ROOT
from sdsearch_lightning.cli.names import COMMANDS
from sdsearch_lightning.cli.parsers import ask_parser, demonstrate_parser, export_parser, report_parser, split_keys
from sdsearch_lightning.cli.retrieval import _index_parser, _serve_parser
from sdsearch_lightning.cli.training import METHOD
from sdsearch_lightning.datamodules import SearchDataModule
from sdsearch_lightning.hindsight import QueriesAndLabels
from sdsearch_lightning.losses.divergences import SupportedDivergence
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.policy.teachers import CopiedTeacher
from sdsearch_lightning.runs.folder import RunOptions
from sdsearch_lightning.training.options import ADAMW

GROUPS = ("run", "model", "data", "rollout", "hindsight", "jsd", "credit", "trainer")
SMALL = {
    "index": _index_parser,
    "serve": _serve_parser,
    "export": export_parser,
    "report": report_parser,
    "ask": ask_parser,
}
OTHERS = "cat gunzip hf pip python make torchrun srun scontrol show head exit code=$? [ git cd".split()
"""Programs of others that pages may call."""
RUN = [c for c in all_commands() if c.ours and c.ours[0] in ("fit", "validate", "test", "predict", "demonstrate")]
BY_NAME = {"QueriesAndLabels": QueriesAndLabels, "SupportedDivergence": SupportedDivergence} | {
    "CopiedTeacher": CopiedTeacher,
    "replace": replace,
}
"""What a class in a text about it does not import."""


@pytest.fixture(scope="module", autouse=True)
def my_package() -> Iterator[ModuleType]:
    """The classes of the Python blocks, importable as the YAML blocks name them."""
    module = ModuleType("my_package")
    module.__dict__.update(BY_NAME)
    for block in blocks("python"):
        tree = ast.parse(block.text)
        tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef) or _is_ours(node)]
        exec(compile(tree, str(block), "exec"), module.__dict__)
    sys.modules["my_package"] = module
    yield module
    del sys.modules["my_package"]


def _is_ours(node: ast.stmt) -> bool:
    """Imports of this library and the standard one: what a block imports from here must be there."""
    if not isinstance(node, ast.ImportFrom | ast.Import):
        return False
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    return all(name.split(".")[0] in {"sdsearch_lightning", *sys.stdlib_module_names} for name in names)


@cache
def parser() -> LightningArgumentParser:
    """One of all keys; the real one of `fit` is made of the same classes."""
    made = LightningArgumentParser(exit_on_error=False)
    made.add_argument("--config", action="config")
    made.add_argument("--seed_everything", type=int)
    made.add_argument("--ckpt_path", type=str)
    made.add_class_arguments(RunOptions, "run")
    made.add_lightning_class_args(SDSearchModule, "model")
    made.add_lightning_class_args(SearchDataModule, "data", subclass_mode=True)
    made.add_lightning_class_args(pl.Trainer, "trainer")
    for name, callback in zip(("rollout", "hindsight", "jsd", "credit"), METHOD, strict=True):
        made.add_lightning_class_args(callback, name)
    made.set_defaults({"model.optimizer": ADAMW})
    return made


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of README.md, for `--config mine.yaml` of any page."""
    (text,) = (block.text for block in blocks("yaml") if block.text.startswith("# mine.yaml"))
    path = tmp_path_factory.mktemp("examples") / "mine.yaml"
    path.write_text(text)
    return path


def read(words: Sequence[str], mine: Path, tmp_path: Path) -> Any:
    """A command of `fit` as the parser understands it."""
    out: list[str] = []
    for word in (part for given in words for part in (given.split("=", 1) if given.startswith("--") else [given])):
        if out and out[-1] == "--config" and not (ROOT / word).is_file():
            written = [block for block in blocks("yaml") if block.text.startswith(f"# {word}\n")]
            (tmp_path / word).write_text(written[0].text if written else mine.read_text())
            word = str(tmp_path / word)
        elif out and out[-1] == "--config":
            word = str(ROOT / word)
        out.append(word)
    return parser().parse_args(out)


@pytest.mark.parametrize("command", RUN, ids=str)
def test_a_command_with_a_trainer_is_understood(command: Command, mine: Path, tmp_path: Path) -> None:
    name, *words = command.ours
    if name == "demonstrate":
        _, words = demonstrate_parser().parse_known_args(words)
    if "--help" not in words:
        read(words, mine, tmp_path)


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_a_configuration_is_understood(block: Block, mine: Path, tmp_path: Path) -> None:
    found = yaml.safe_load(block.text)
    if block.text.startswith("token: "):  # of any retriever
        return
    assert set(found) <= set(GROUPS), "name a file of another kind in its first line, and treat it here"
    (tmp_path / "block.yaml").write_text(block.text)
    parser().parse_args([f"--config={mine}", f"--config={tmp_path / 'block.yaml'}"])


@pytest.mark.parametrize("command", all_commands(), ids=str)
def test_a_command_is_there(command: Command) -> None:
    head, *rest = command.words
    if command.ours:
        name, *flags = command.ours
        assert name in (*COMMANDS, "--help", "--version")
        if name == "ask":
            flags, _ = split_keys(flags)
        if name in SMALL and "--help" not in flags:
            SMALL[name]().parse_args([flag for flag in flags if flag != "&"])
        return
    assert head in OTHERS, f"{head} is no program that these pages call"
    if head == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [word for word in rest if "=" not in word][0] in targets
    if head == "python" and rest[:1] == ["-m"] and rest[1].startswith("benchmarks"):
        assert (ROOT / f"{rest[1].replace('.', '/')}.py").is_file()
    if head == "pip":
        extras = re.findall(r'^        "([\w-]+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE)
        asked = re.findall(r"\[([\w,-]+)\]", " ".join(rest))
        assert all(extra in extras for group in asked for extra in group.split(","))


@pytest.mark.parametrize("command", [c for c in all_commands() if c.words[0] == "torchrun"], ids=str)
def test_torchrun_is_told_where_processes_meet(command: Command) -> None:
    text = " ".join(command.words)
    assert "--standalone" in text or ("--rdzv_backend" in text and "--rdzv_endpoint" in text)


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_is_python(block: Block) -> None:
    compile(block.text, str(block), "exec")


def test_classes_that_pages_define_are_what_they_name(my_package: ModuleType) -> None:
    named = set(re.findall(r"my_package\.(\w+)", "".join(path.read_text() for path in PAGES)))
    defined = {name for name in vars(my_package) if not name.startswith("_")}
    assert {"FirstQueries", "Hellinger", "MyRetriever", "NewPassages"} <= named & defined
    assert named - defined <= {"found"}, "a function that the reader writes"


def test_a_retriever_of_the_page_searches(my_package: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "facts.txt").write_text("rome is in italy\nparis is in france\n")
    ((first, *_), nothing) = my_package.MyRetriever(tmp_path / "facts.txt").search(["where is rome", "x"], 3)
    assert first.contents == "rome is in italy" and nothing == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    for target in link_targets(path):
        name = target.partition("#")[0]
        assert "://" in target or not name or (path.parent / name).exists(), f"{path.name} links to {target}"


def test_these_tests_can_fail(mine: Path, tmp_path: Path) -> None:
    (block,) = blocks_of("```bash\nA=1 sdsearch fit --config mine.yaml --jsd.wieght 1 # x\n```\n", "p.md")
    (command,) = commands_of(block)
    assert command.ours == ("fit", "--config", "mine.yaml", "--jsd.wieght", "1")
    with pytest.raises(Exception, match="wieght"):
        read(command.ours[1:], mine, tmp_path)
    (tmp_path / "p.md").write_text("[a](b.md) `[c](d.md)`\n```\n[e](f.md)\n```\n")
    assert list(link_targets(tmp_path / "p.md")) == ["b.md"]
    assert len(RUN) > 15 and len(blocks("yaml")) > 20 and len(blocks("python")) > 7
