"""The disk that benchmarks/power_cut.py keeps forgets what was not flushed, and only that."""

import os
import random
import threading

import pytest

from benchmarks.power_cut import Disk
from sdsearch_lightning.files import append_lines, write_text


@pytest.fixture
def disk(tmp_path, monkeypatch):
    root = tmp_path / "run"
    root.mkdir()
    disk, flush = Disk(root, tmp_path / "store"), os.fsync

    def kept(number):
        flush(number)
        disk.flushed(root.__class__(os.readlink(f"/proc/self/fd/{number}")))

    monkeypatch.setattr(os, "fsync", kept)
    return disk


def left(disk, seed=0, mixed=False):
    target = disk.root.with_name(f"after{seed}{mixed}")
    disk.rebuild(target, random.Random(seed), mixed)
    return {
        str(path.relative_to(target)): os.readlink(path) if path.is_symlink() else path.read_text()
        for path in target.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def test_what_is_written_with_care_is_there_and_what_is_not_is_lost(disk):
    append_lines(disk.root / "rows", ["1\n"])
    write_text(disk.root / "summary", "old")
    with (disk.root / "rows").open("a") as file:
        file.write("2\n")
    (disk.root / "summary").write_text("new")
    (disk.root / "careless").write_text("x")
    assert left(disk) == {"rows": "1\n", "summary": "old"}
    (disk.root / "rows").unlink()
    assert left(disk, 1)["rows"] == "1\n", "so is a removal"


def test_a_file_flushed_under_a_folder_that_was_not_is_lost(disk):
    (disk.root / "new").mkdir()
    write_text(disk.root / "new" / "file", "x")
    assert left(disk) == {}
    write_text(disk.root / "other", "y")
    assert left(disk, 1) == {"new/file": "x", "other": "y"}


def test_a_part_may_survive_or_be_zeros(disk):
    append_lines(disk.root / "rows", ["1\n"])
    with (disk.root / "rows").open("a") as file:
        file.write("2\n")
    found = {left(disk, seed, mixed=True)["rows"] for seed in range(40)}
    assert found == {"1\n", "1\n2\n", "1\n\0\0"}


def test_all_processes_share_a_disk_and_flush_one_at_a_time(disk):
    append_lines(disk.root / "rows", ["1\n"])
    other = Disk(disk.root, disk.store)
    assert left(other) == {"rows": "1\n"}
    order = []

    def flushes():
        with other.alone() as number:
            order.append(number)

    with disk.alone() as number:
        waiting = threading.Thread(target=flushes)
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()
        order.append(number)
    waiting.join(5)
    assert order == [1, 2]
