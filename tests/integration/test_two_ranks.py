"""Two processes and one compute the same, also where one of them has no query token at all, and neither waits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.workplace import PROCESSES

SCRIPT = PROCESSES / "two_ranks.py"


def run(strategy: str, variant: str, folder: Path, name: str = "", *checkpoint: Path) -> dict[str, list]:
    output = folder / f"{name or strategy}.json"
    command = [sys.executable, str(SCRIPT), strategy, variant, str(output), *map(str, checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(output.read_text())


def assert_equal(mine: dict[str, list], theirs: dict[str, list]) -> None:
    for ours, other in zip(mine["steps"], theirs["steps"], strict=True):
        assert other == pytest.approx(ours, rel=1e-10, abs=1e-12)
        assert other != pytest.approx([value * 1.000001 for value in ours], rel=1e-10, abs=1e-12)
    assert theirs["weights"] == pytest.approx(mine["weights"], rel=0, abs=1e-9)
    assert theirs["weights"] != pytest.approx([w + 1e-8 for w in mine["weights"]], rel=0, abs=1e-9)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("variant", "strategies"),
    [
        ("plain", ("ddp", "fsdp2")),
        ("credit", ("ddp", "fsdp2")),
        ("rlsd", ("ddp", "fsdp2")),
        ("contrast", ("fsdp2",)),
        ("batch_start", ("fsdp2",)),
        ("going_on", ("ddp", "fsdp2")),
    ],
    ids=["plain", "credit", "rlsd", "contrast", "batch_start", "going_on"],
)
def test_two_processes_equal_one_with_a_rank_that_never_searches(
    variant: str, strategies: tuple[str, ...], tmp_path: Path
) -> None:
    one = run("one", variant, tmp_path)
    assert all(step[-1] > 0 for step in one["steps"]), "somebody is taught in every step"
    for strategy in strategies:
        assert_equal(one, run(strategy, variant, tmp_path))


@pytest.mark.distributed
@pytest.mark.parametrize("variant", ["all", "lora"])
def test_a_checkpoint_goes_on_under_another_strategy(variant: str, tmp_path: Path) -> None:
    one, two = run("one", variant, tmp_path), run("fsdp2", variant, tmp_path)
    assert_equal(one, two)
    assert (tmp_path / "one.ckpt").is_file() and (tmp_path / "fsdp2.ckpt").is_dir()
    second = {**one, "steps": one["steps"][1:]}
    assert_equal(second, run("one", variant, tmp_path, "one_from_fsdp2", tmp_path / "fsdp2.ckpt"))
    assert_equal(second, run("fsdp2", variant, tmp_path, "fsdp2_from_one", tmp_path / "one.ckpt"))
