"""The help of every command: each key has a text of its own, ours come first, and no small command imports torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import docstring_parser
import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer

from sdsearch_lightning.__main__ import main
from sdsearch_lightning.cli.errors import ShortErrorParser
from sdsearch_lightning.cli.help import plain, shown
from sdsearch_lightning.cli.names import COMMANDS
from sdsearch_lightning.datamodules import SearchDataModule
from sdsearch_lightning.hindsight import BlockBuilder
from sdsearch_lightning.losses.divergences import Divergence
from sdsearch_lightning.losses.teacher_use import TeacherUse
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.policy.teachers import Teacher
from sdsearch_lightning.protocol import Protocol
from sdsearch_lightning.retrieval import Retriever
from sdsearch_lightning.rollout import Engine
from sdsearch_lightning.schedules import Schedule
from sdsearch_lightning.scoring.query_credit import QueryCredit
from sdsearch_lightning.scoring.rewards import LabelRule, Reward
from sdsearch_lightning.training.options import ADAMW, adamw

LARGE = ("fit", "validate", "test", "predict", "supervise")
SMALL = tuple(command for command in COMMANDS if command not in LARGE)
OWN = {
    "fit": ["run", "model", "data", "rollout", "hindsight", "jsd", "credit"],
    "supervise": ["run", "model", "data"],
}
FORBIDDEN = ("see there", "see `", "<function", "<class", "lambda", "known subclasses", " at 0x", ":paramref:", ".py")
OPTION = re.compile(r"^  (?:-\w[^-]*, )?--([\w.]+)(?:\[\+\])?(?: (\S.*?))??(?:  +(\S.*))?$")
HEAVY = ("torch", "lightning", "transformers")
IMPORTED = f"""
import sys
from sdsearch_lightning.__main__ import main
main(sys.argv[1:])
print("imported:", [name for name in {HEAVY} if name in sys.modules])
"""


def described(text: str) -> dict[str, str]:
    """Options in the order of a help text, each with its description without type and default."""
    found: dict[str, str] = {}
    last = None
    for line in text.splitlines():
        if option := OPTION.match(line):
            last = option[1]
            found[last] = option[3] or ""
        elif last and line.startswith(" " * 10):
            found[last] += f" {line.strip()}"
        else:
            last = None
    return {key: re.sub(r"\((?:required|type: |default: ).*", "", words).strip() for key, words in found.items()}


def faults(text: str, width: int, groups: tuple[str, ...] = ("",)) -> list[str]:
    """What is wrong with a help text; `groups` are those whose keys need a description."""
    told = [f"{words!r} in {line.strip()!r}" for words in FORBIDDEN for line in text.splitlines() if words in line]
    told += [f"wider than {width}: {line}" for line in text.splitlines() if len(line) > width]
    for key, words in described(text).items():
        if (key.split(".")[0] in groups or "" in groups) and len(words.split()) < 3:
            told.append(f"--{key} says {words!r}")
    keys = list(described(text))
    if any(key.startswith("trainer.") for key in keys):
        first = next(index for index, key in enumerate(keys) if key.startswith("trainer"))
        told += [f"--{key} comes after the trainer's" for key in keys[first:] if key.split(".")[0] in OWN["fit"]]
    return told


@pytest.fixture
def help_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def get(*argv: str, width: int = 80) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        assert main([*argv]) == 0
        return capsys.readouterr().out

    return get


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_key_has_a_text_and_ours_come_first(help_of, command: str, width: int) -> None:
    text = help_of(command, "--help", width=width)
    assert faults(text, width) == []
    assert text.startswith(f"usage: sdsearch {command} ") and "\n\n" in text[:120]  # a usage of one line


@pytest.mark.parametrize(
    "text, told",
    [
        ("  --a.b B   see there. (type: int, default: 2)\n", "'see there'"),
        ("  --a.b B   one two three (type: <function <lambda> at 0x7f3>)\n", "'<function'"),
        ("  --a.b B   (type: int, default: 2)\n", "--a.b says ''"),
        ("  --a.b B\n            of it. (type: int, default: 2)\n", "--a.b says 'of it.'"),
        ("  --a.b B   one two three\n  --a.c {x,y}\n            (default: x)\n", "--a.c says ''"),
        (f"  --a.b B   one two three {'x' * 60}\n", "wider than 80"),
        ("  --trainer.devices D   one two three\n  --run.name NAME   one two three\n", "--run.name comes after"),
    ],
)
def test_the_check_finds_a_bad_text(text: str, told: str) -> None:
    good = "  --z.b B   one two three (type: int)\n  --z.c[+] C\n            four five six (default: 3)\n"
    assert faults(good, 80) == [] and list(described(good)) == ["z.b", "z.c"]
    assert any(told in fault for fault in faults(good + text, 80))


@pytest.mark.parametrize("command", OWN)
def test_groups_stand_in_their_order(help_of, command: str) -> None:
    keys = [key.split(".")[0] for key in described(help_of(command, "--help")) if "." in key]
    assert list(dict.fromkeys(keys)) == [*OWN[command], "trainer"]


def test_keys_of_nested_classes_are_listed(help_of) -> None:
    keys = described(help_of("fit", "--help"))
    for key in ("model.compute.layout", "model.entropy_coef.query", "model.lora.adapter", "model.scratch.model_type"):
        assert key in keys
    assert {"data.train_files", "data.retriever", "data.batch_size"} <= set(keys) and "data.seed" not in keys
    assert "model.temperature" not in keys and "rollout.seed" not in keys  # set by other keys
    assert "--data.help SyntheticWorldDataModule" in " ".join(help_of("fit", "-h").split())
    assert {"model.optimizers.parameters", "model.loss_weights.query"} <= set(described(help_of("supervise", "--help")))


def offered_classes(text: str) -> dict[str, list[str]]:
    """The classes that a help text offers, by key."""
    classes = re.findall(r"Classes: ([^.]*)\. Keys of one: --([\w.]+)\.help", " ".join(text.split()))
    return {key: names.split(", ") for names, key in classes}


def kinds_of(base: type) -> list[type]:
    """A class and what derives from it."""
    return [base, *(kind for child in base.__subclasses__() for kind in kinds_of(child))]


def test_each_class_of_ours_shows_its_keys(help_of, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = offered_classes(help_of("fit", "--help"))
    bases = (SearchDataModule, Retriever, Reward, LabelRule, Engine, BlockBuilder, Schedule, Divergence, Teacher)
    more = (QueryCredit, TeacherUse, Protocol, Callback)
    known = {kind.__name__: kind for base in (*bases, *more) for kind in kinds_of(base)}
    monkeypatch.setenv("COLUMNS", "120")
    del classes["model.optimizer"]  # torch's own
    assert len(classes) >= 10 and "SyntheticWorldDataModule" in classes["data"]
    for name in {name for names in classes.values() for name in names}:
        parser = ShortErrorParser(prog="sdsearch", usage="sdsearch", add_help=False)
        parser.add_class_arguments(known[name], "key")
        assert (name, faults(parser.format_help(), 120)) == (name, [])


def test_the_help_of_a_class_shows_its_keys_alone(help_of) -> None:
    text = help_of("fit", "--model.divergence.help", "LogitMSE")
    assert text.startswith("Help for")
    assert list(described(text)) == [f"model.divergence.{name}" for name in ("top_k", "support", "centered")]


def test_the_trainers_keys_keep_lightnings_own_text(help_of) -> None:
    text = " ".join(help_of("fit", "--help").split())
    texts = {each.arg_name: each.description for each in docstring_parser.parse(str(Trainer.__init__.__doc__)).params}
    assert len(texts) > 35
    missing = [name for name, own in texts.items() if " ".join(plain(str(own)).split()) not in text]
    assert missing == []


def test_only_classes_that_users_choose_are_listed(help_of) -> None:
    listed = offered_classes(help_of("fit", "--help"))
    assert "TrainingHealth" in listed["trainer.callbacks"]
    for hidden in ("RunStart", "QuestionsFirst", "StepBoundary", "RolloutGrouping"):
        assert hidden not in listed["trainer.callbacks"]
    assert "AdamW" in listed["model.optimizer"] and "Optimizer" not in listed["model.optimizer"]
    assert not any("Accelerated" in name for name in listed["model.optimizer"])


def test_the_default_optimizer_is_named_and_its_options_can_be_set(help_of, tmp_path: Path) -> None:
    assert SDSearchModule.__init__.__kwdefaults__["optimizer"] is adamw and "adamw" in repr(adamw)
    made = adamw([torch.nn.Parameter(torch.zeros(1))])
    assert ADAMW["class_path"] == f"torch.optim.{type(made).__name__}"
    assert ADAMW["init_args"] == {name: made.defaults[name] for name in ADAMW["init_args"]}
    arguments = ("fit", "--data", "SearchDataModule", "--print_config")
    printed = help_of(*arguments)
    optimizer = yaml.safe_load(printed)["model"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.AdamW" and optimizer["init_args"]["weight_decay"] == 0.01
    file = tmp_path / "printed.yaml"
    file.write_text(printed)
    assert help_of(*arguments, "--config", str(file)) == printed
    changed = yaml.safe_load(help_of(*arguments, "--model.optimizer.lr", "0.5"))["model"]["optimizer"]
    assert changed["init_args"] == optimizer["init_args"] | {"lr": 0.5}
    file.write_text("model: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.25}}}")
    other = yaml.safe_load(help_of(*arguments, "--config", str(file)))["model"]["optimizer"]
    assert other["class_path"] == "torch.optim.SGD" and other["init_args"]["lr"] == 0.25


def test_defaults_are_shown_as_one_would_type_them() -> None:
    assert [shown(value) for value in (None, True, False, 1, 2.5, "std")] == [
        "null",
        "true",
        "false",
        "1",
        "2.5",
        "std",
    ]
    assert shown(ADAMW) == "AdamW(lr=1e-06, weight_decay=0.01)"
    assert shown({"class_path": "a.b.C"}) == "C"
    assert plain(":func:`~a.b.c` and ``d``, `words <http://x>`_") == "c and `d`, words"


def imported(cwd: Path, code: str, *argv: str) -> str:
    """The heavy packages that are there after `code` ran, as it prints them."""
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("command", SMALL)
def test_no_small_command_imports_torch_for_its_help(tmp_path: Path, command: str) -> None:
    assert imported(tmp_path, IMPORTED, command, "--help") == "imported: []"


def test_report_imports_no_torch_nor_does_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss\n1,0.5\n2,0.25\n")
    assert imported(tmp_path, IMPORTED, "report", ".") == "imported: []"
    assert (tmp_path / "report.html").is_file()
    assert imported(tmp_path, IMPORTED, "export", "--ckpt_pth", "x") == "imported: []"


def test_the_check_of_imports_finds_torch(tmp_path: Path) -> None:
    assert imported(tmp_path, "import torch" + IMPORTED, "report", "--help") == "imported: ['torch']"
