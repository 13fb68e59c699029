"""A process of a distributed run ends with its code, and not by an abort of a thread that outlived the interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ENDING = """
import atexit, sys
import torch
from sdsearch_lightning.__main__ import end_process

class Last:
    def __del__(self, write=print):
        write("taken down")

last = Last()
atexit.register(print, "at exit")
if sys.argv[1] != "alone":
    torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=0, world_size=1)
    for _ in range(100):  # the last of these may still be let go of by a thread
        torch.distributed.all_reduce(torch.ones(1000))
print("done")
end_process(3)
"""


@pytest.mark.parametrize(
    ("kind", "told"), [("alone", ["done", "at exit", "taken down"]), ("gloo", ["done", "at exit"])]
)
def test_where_gloo_runs_the_interpreter_is_not_taken_down(kind: str, told: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", ENDING, kind, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.splitlines()) == (3, told), done.stderr
