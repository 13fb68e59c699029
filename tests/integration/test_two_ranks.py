"""Two processes and one compute the same, also where one of them has no query token at all, and neither waits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("two_ranks.py")


def run(strategy: str, variant: str, folder: Path) -> dict[str, list]:
    output = folder / f"{strategy}_{variant}.json"
    command = [sys.executable, str(SCRIPT), strategy, variant, str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(output.read_text())


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("variant", "strategies"), [("plain", ("ddp", "fsdp2")), ("all", ("fsdp2",)), ("batch_start", ("fsdp2",))]
)
def test_two_processes_equal_one_with_a_rank_that_never_searches(
    variant: str, strategies: tuple[str, ...], tmp_path: Path
) -> None:
    one = run("one", variant, tmp_path)
    assert all(step[-1] > 0 for step in one["steps"]), "somebody is taught in every step"
    for strategy in strategies:
        two = run(strategy, variant, tmp_path)
        for mine, theirs in zip(one["steps"], two["steps"], strict=True):
            assert theirs == pytest.approx(mine, rel=1e-10, abs=1e-12)
            assert theirs != pytest.approx([value * 1.000001 for value in mine], rel=1e-10, abs=1e-12)
        assert two["weights"] == pytest.approx(one["weights"], rel=0, abs=1e-9)
        assert two["weights"] != pytest.approx([w + 1e-8 for w in one["weights"]], rel=0, abs=1e-9)
