"""The options of small commands, apart from what these commands import: no torch for a `--help`.

Those of `index` and `serve` are in retrieval.py, which needs none either.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from sdsearch_lightning.cli.errors import ShortErrorParser, fail

PLAN = """Prints memory per GPU by part, for the settings that `fit` would use; exit code 2 where it cannot fit.

Takes every key of fit beside its own: --config FILE (several, later ones win) and --key value; `sdsearch fit --help`
lists them.
"""

DEMONSTRATE = """Writes demonstrations for `supervise` with a script of yours: a generator function that searches and
answers, see docs/data.md. Takes every key of fit beside its own: data.retriever is what is searched,
rollout.top_k how many passages come back, rollout.label what tells whether a sibling was right.
"""

KEYS = ("model", "data", "rollout", "seed_everything")
"""Groups of `fit` whose keys `ask` takes too."""


def ask_parser() -> ShortErrorParser:
    """The parser of what `ask` takes beside keys of `fit`."""
    parser = ShortErrorParser(
        prog="sdsearch ask",
        usage="sdsearch ask [QUESTION] (--run RUN | --model FOLDER) [--key value ...]",
        description="Answers a question by searching, and shows how; without QUESTION it reads them line by line. "
        "Keys of fit that begin with model., data. or rollout. are taken too, such as --rollout.max_searches 2.",
    )
    add = parser.add_argument
    add("question", type=str | None, nargs="?", help="the question; left out: those of standard input")
    add("--run", type=str | None, help="run folder, or its name below runs/: its model, protocol and retriever")
    add("--model", type=str | None, help="model folder, adapter folder or hub name, in place of a run")
    add("--config", type=str, action="append", help="a YAML file of keys; may be given several times, later ones win")
    add("--ckpt_path", type=str | None, help="checkpoint of the run, or last; null: its model, or its last checkpoint")
    add("--json", action="store_true", help="print one JSON object for each question and nothing else")
    add("--temperature", type=float, default=0.0, help="temperature of sampling; 0 is greedy")
    add("--seed", type=int, default=0, help="seed of sampling, where it is not greedy")
    add("--device", type=str | None, help="where the model runs, such as cpu; null: a GPU where there is one")
    return parser


def split_keys(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments of `ask` itself, and the keys of `fit` among them as `--key=value`."""
    own: list[str] = []
    keys: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        name, is_whole, _ = argument.removeprefix("--").partition("=")
        is_key = argument.startswith("--") and ("." in name or name in ("data", "seed_everything"))
        if not is_key or name.split(".")[0] not in KEYS:
            own.append(argument)
        elif is_whole:
            keys.append(argument)
        elif (value := next(arguments, None)) is None:
            fail(f"--{name}: expected one argument")
        else:
            keys.append(f"{argument}={value}")
    return own, keys


def report_parser() -> ShortErrorParser:
    """The parser of `report`, which takes one run folder or several."""
    parser = ShortErrorParser(
        prog="sdsearch report",
        usage="sdsearch report RUN [RUN ...] [--output FILE]",
        description="Prints the report of a run and writes its report.html anew. Of several runs: a table of all, and "
        "a page with their curves in the same axes.",
    )
    parser.add_argument("run", type=str, nargs="+", help="run folders, such as runs/quickstart")
    parser.add_argument(
        "--output", type=str | None, help="the page; default: report.html in the run, comparison.html here for several"
    )
    return parser


def browse_parser() -> ShortErrorParser:
    """The parser of `browse`, which takes a run folder."""
    parser = ShortErrorParser(
        prog="sdsearch browse",
        description="Shows the rollouts of a run, and what each query was worth, in the terminal (extra `browse`).",
    )
    parser.add_argument("run", type=str, help="the run folder, such as runs/quickstart")
    return parser


def completion_parser() -> ShortErrorParser:
    """The parser of `completion`, which takes a shell."""
    parser = ShortErrorParser(
        prog="sdsearch completion",
        description="Prints a script that completes commands and keys; source it in the shell's start file.",
    )
    parser.add_argument("shell", type=str, help="bash, zsh or tcsh")
    return parser


def export_parser() -> ShortErrorParser:
    """The parser of `export`: a checkpoint, and where its model goes."""
    parser = ShortErrorParser(
        prog="sdsearch export",
        usage="sdsearch export --ckpt_path PATH --output FOLDER [--key value ...]",
        description="Writes the weights of a checkpoint as a Hugging Face folder. The run's config.yaml tells "
        "what they belong to.",
    )
    add = parser.add_argument
    add("--ckpt_path", type=str, required=True, help="checkpoint in runs/<name>/checkpoints: a file, or a folder")
    add("--output", type=str, required=True, help="folder to write; it must not exist yet")
    add("--adapter", type=bool, default=False, help="write the LoRA adapter alone, as peft loads it")
    add("--push_to_hub", type=str | None, help="OWNER/NAME: upload the folder, privately where it is new; null: do not")
    return parser


class _OwnOptions(argparse.ArgumentParser):
    """Options that `fit` does not have."""

    def error(self, message: str) -> NoReturn:
        """One line, as for the keys of `fit`."""
        fail(message)


def plan_parser() -> argparse.ArgumentParser:
    """The parser of what `plan` takes beside the keys that it shares with `fit`."""
    parser = _OwnOptions(
        "sdsearch plan",
        usage="sdsearch plan [--config FILE ...] [--key value ...]",
        description=PLAN,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gpu_memory_gib", type=float, metavar="GIB", help="memory of one GPU; default: that of the GPU here, else 80"
    )
    parser.add_argument(
        "--model_config", metavar="FILE", help="a config.json, or its folder, in place of the model's own"
    )
    return parser


def demonstrate_parser() -> argparse.ArgumentParser:
    """The parser of what `demonstrate` takes beside the keys that it shares with `fit`."""
    parser = _OwnOptions(
        "sdsearch demonstrate",
        usage="sdsearch demonstrate --script S --questions F --output F [--key ...]",
        description=DEMONSTRATE,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--script", required=True, metavar="S", help="Python file or module, and :NAME behind it where not `script`")
    add("--questions", required=True, metavar="FILE", help="questions to demonstrate: .jsonl, .jsonl.gz or .parquet")
    add("--output", required=True, metavar="FILE", help="a .jsonl or .jsonl.gz to write; replaced if it is there")
    add("--block_share", type=float, default=0.0, metavar="X", help="share of questions with siblings in their prompt")
    add("--num_siblings", type=int, nargs=2, default=(2, 4), metavar="N", help="least and most of them; default 2 4")
    add("--max_searches", type=int, default=8, metavar="N", help="searches of a script before it is stopped; default 8")
    add("--limit", type=int, metavar="N", help="demonstrate the first N questions only; default: all")
    add("--seed", type=int, default=0, metavar="N", help="what the numbers of every script come from; default 0")
    add("--without_observations", action="store_true", help="leave passages out: `supervise` searches them again")
    return parser
