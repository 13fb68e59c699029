"""Figures of a folder whose size is known."""

import pytest

from benchmarks.disk_growth import measure
from helpers.reports import city_rollout, write_records
from sdsearch_lightning.report.segments import close_segment


def test_all_of_a_run_is_counted(tmp_path):
    path = tmp_path / "trajectories.jsonl"
    for step in (1, 2):
        write_records(path, [city_rollout(), city_rollout(index=1)], "train", step)
    size = path.stat().st_size
    close_segment(path)
    write_records(path, [city_rollout()], "val", 2)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step_00000002.ckpt").write_bytes(bytes(500))
    found = measure(tmp_path)
    assert found["training steps"] == found["rollouts per step"] == 2
    assert found["bytes per step"] == size / 2 and found["bytes per checkpoint"] == 500
    assert found["bytes per token"] * found["tokens per rollout"] * 4 == pytest.approx(size)
    assert 0 < found["packed / bytes"] < 1


def test_a_folder_without_rollouts(tmp_path):
    with pytest.raises(SystemExit, match="expected training rollouts, found none"):
        measure(tmp_path)
