"""Threads by the cores that are free."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.runs import threads
from sdsearch_lightning.runs.folder import RunOptions


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(threads, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(threads, "STAT", tmp_path / "stat")


def watch(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """What /proc/stat says before and after the wait."""
    told = iter(lines)
    monkeypatch.setattr(threads.time, "sleep", lambda seconds: threads.STAT.write_text(next(told)))
    threads.STAT.write_text(next(told))


@pytest.mark.parametrize(
    ("user", "idle", "waiting", "free"), [(0, 400, 0, 4), (200, 190, 10, 2), (300, 100, 0, 1), (400, 0, 0, 1)]
)
def test_free_cores_are_the_idle_share(
    monkeypatch: pytest.MonkeyPatch, user: int, idle: int, waiting: int, free: int
) -> None:
    after = f"cpu {50 + user} 0 0 {1000 + idle} {7 + waiting} 0 0 0 0 0\ncpu0 1\n"
    watch(monkeypatch, "cpu 50 0 0 1000 7 0 0 0 0 0\ncpu0 1\n", after)
    assert threads.free_cores() == free


def test_where_nobody_counts_all_usable_cores_are_free() -> None:
    assert threads.free_cores() == 4


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 4), ("150000 100000", 2), ("10000 100000", 1), ("?", 4)])
def test_a_containers_quota_counts(quota: str, cores: int) -> None:
    threads.QUOTA.write_text(quota)
    assert threads.usable_cores() == cores


def test_auto_asks_for_the_free_ones_and_null_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(threads, "free_cores", lambda: 3)
    for given in (RunOptions(num_threads="auto"), RunOptions(num_threads=2), RunOptions()):
        threads.use_threads(given.num_threads)
    assert asked == [3, 2]
    with pytest.raises(ConfigError, match="expected 1 or more, or auto, got 0"):
        RunOptions(num_threads=0)
