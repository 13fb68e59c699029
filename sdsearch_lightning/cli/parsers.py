"""The options of `export`, `plan`, `report`, `browse`, apart from what these commands import: no torch for a `--help`.

Those of `index` and `serve` are in retrieval.py, which needs none either.
"""

from __future__ import annotations

import argparse
from typing import NoReturn

from sdsearch_lightning.cli.errors import ShortErrorParser, fail

PLAN = """Prints memory per GPU by part, for the settings that `fit` would use; exit code 2 where it cannot fit.

Takes every key of fit beside its own: --config FILE (several, later ones win) and --key value; `sdsearch fit --help`
lists them.
"""


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
