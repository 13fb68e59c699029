"""The command line: `python -m sdsearch_lightning` and `sdsearch`.

`--help`, `--version` and a misspelt command are answered here, before torch and lightning are imported (seconds).
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import NoReturn

from sdsearch_lightning import __version__
from sdsearch_lightning.cli.names import COMMANDS

HELP = f"""\
usage: sdsearch COMMAND [--config FILE ...] [--key value ...]

SD-Search (arXiv 2605.18299): train a language model to search while it reasons.

commands:
{chr(10).join(f"  {name:<11} {text}" for name, text in COMMANDS.items())}

options:
  --help     this text; `sdsearch COMMAND --help` lists every key of a command
  --version  the version

examples:
  sdsearch supervise --config configs/quickstart_cold_start.yaml
  sdsearch fit --config configs/quickstart.yaml --seed_everything 1 --run.name second
  sdsearch fit --config configs/base.yaml --config mine.yaml --data.batch_size 64
  sdsearch ask "question e243 the rel8 the rel5 ?" --run runs/quickstart
  sdsearch demonstrate --script my_script.py --questions train.jsonl --output demonstrations.jsonl --config mine.yaml
  sdsearch plan --config configs/base.yaml --config mine.yaml --gpu_memory_gib 80
  sdsearch validate --config configs/quickstart.yaml --ckpt_path last
  sdsearch index --corpus_path corpus.jsonl --index_path index --encoder intfloat/e5-base-v2
  sdsearch serve --corpus_path corpus.jsonl --index_path index --port 8000
  sdsearch report runs/quickstart runs/second
  sdsearch browse runs/quickstart
  sdsearch export --ckpt_path runs/quickstart/checkpoints/last.ckpt --output my_model

`sdsearch` and `python -m sdsearch_lightning` are the same. SDSEARCH_TRACEBACK=1 shows where an error came from.
"""
MEANT = {"train": "fit", "sft": "supervise", "eval": "test", "evaluate": "test", "generate": "predict"}
"""What others call a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code (2: usage error, 1: the run failed, 128 + n: stopped by signal n)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command in ("--help", "-h", "help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if command == "--version":
        print(f"sdsearch {__version__}")
        return 0
    if command not in COMMANDS:
        close = [MEANT[command]] if command in MEANT else get_close_matches(command, COMMANDS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        print(f"error: expected a command first ({', '.join(COMMANDS)}), got {command!r}.{hint}", file=sys.stderr)
        return 2
    # A thread that waits for another sleeps soon: by default it keeps its core busy for milliseconds, and on a shared
    # machine that is the core the other one waits for. torch's OpenMP reads this once, when torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from sdsearch_lightning.cli.commands import run

    return run(arguments)


def command() -> NoReturn:
    """Runs the command of this process, and ends the process with its exit code."""
    end_process(main())


def end_process(code: int) -> NoReturn:
    """Ends this process with an exit code.

    Where gloo's threads run, the interpreter is not taken down first: one of them that drops a tensor meanwhile aborts
    the process, and a run that has succeeded would end with code -6. What `atexit` holds is done all the same.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        if "gloo" in torch.distributed.get_backend():
            atexit._run_exitfuncs()
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):  # a pipe that nobody reads
                    stream.flush()
            os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    command()
