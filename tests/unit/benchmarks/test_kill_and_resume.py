"""The comparison that benchmarks/kill_and_resume.py makes can fail, and its moments are reproducible."""

import random

import pytest

from benchmarks.kill_and_resume import TARGETS, Kill, contents, differences


@pytest.fixture
def run(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step_00000002.ckpt").write_bytes(b"")
    (tmp_path / "metrics.csv").write_text("step,train/loss,train/step_seconds\n1,0.5,3.2\n")
    for name in ("trajectories.jsonl", "trajectories.rank1.jsonl", "model/model.safetensors"):
        (tmp_path / name).write_text("x\n")
    return tmp_path


@pytest.mark.parametrize(
    "name, text, found",
    [
        ("metrics.csv", "step,train/loss,train/step_seconds\n1,0.5,9.9\n", []),
        ("metrics.csv", "step,train/loss,train/step_seconds\n1,0.50000001,3.2\n", ["metrics.csv"]),
        ("trajectories.rank1.jsonl", "y\n", ["trajectories.rank1.jsonl"]),
        ("model/model.safetensors", "y\n", ["model.safetensors"]),
        ("checkpoints/.step_00000004.ckpt.draft", "", ["file names"]),
    ],
)
def test_a_difference_is_found(run, name, text, found):
    whole = contents(run)
    (run / name).write_text(text)
    assert differences(contents(run), whole) == found


def test_kills_cover_every_moment_and_can_be_drawn_again():
    kills = [[Kill.draw(dice, 12.0, 2, False) for _ in range(200)] for dice in (random.Random(1), random.Random(1))]
    assert kills[0] == kills[1]
    assert {kill.target for kill in kills[0]} == {"time", *TARGETS}
    assert {kill.whole_group for kill in kills[0]} == {True, False}
    assert all(Kill.draw(random.Random(i), 12.0, 1, True).whole_group for i in range(50))
