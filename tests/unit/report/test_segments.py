"""Segments: the same lines as one file, whatever was killed, and the same segments after any resume."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.power_cut import Disk
from helpers.reports import city_rollout, write_records
from sdsearch_lightning.errors import DataError
from sdsearch_lightning.report import segments
from sdsearch_lightning.report.segments import close_segment, segments_of
from sdsearch_lightning.report.trajectories import cut_after, rank_file, read_trajectories

STEPS = 7


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trajectories.jsonl"


def write(path: Path, first: int, last: int) -> None:
    """Steps, each with a validation; the file is closed after the training of steps 2 and 5 and the validation of 3."""
    for step in range(first, last + 1):
        for phase, closing in (("train", (2, 5)), ("val", (3,))):
            write_records(path, [city_rollout(), city_rollout(index=1)], phase, step)
            if step in closing:
                close_segment(path)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def rows(last: int) -> list[int]:
    """The step of each line after `last` steps."""
    return [step for step in range(1, last + 1) for _ in range(4)]


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_trajectories(path)]


def test_all_lines_are_read_in_order_and_by_standard_tools(path: Path) -> None:
    write(path, 1, STEPS)
    assert sorted(contents(path.parent)) == [f"trajectories.0000{n}.jsonl.gz" for n in (1, 2, 3)] + [path.name]
    assert steps(path) == rows(STEPS)
    done = subprocess.run(["gzip", "-dc", *map(str, segments_of(path))], capture_output=True, check=True)
    assert (done.stdout + path.read_bytes()).count(b"\n") == 4 * STEPS


def test_other_ranks_have_their_own(path: Path) -> None:
    for rank in (0, 1):
        write(rank_file(path, rank), 1, 3)
    assert len(segments_of(path)) == len(segments_of(rank_file(path, 1))) == 2
    cut_after(path, 0)
    assert contents(path.parent) == {path.name: b"", "trajectories.rank1.jsonl": b""}


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("reached", [2, 3, 5, STEPS])
def test_a_resumed_run_has_the_files_of_the_uninterrupted_one(path: Path, step: int, reached: int) -> None:
    write(path, 1, reached)
    with path.open("ab") as file:
        file.write(b'{"schema": 1, "ste')
    cut_after(path, step)
    assert steps(path) == rows(min(step, reached))
    write(path, min(step, reached) + 1, STEPS)
    found = contents(path.parent)
    whole = path.parent / "whole" / path.name
    whole.parent.mkdir()
    write(whole, 1, STEPS)
    assert found == contents(whole.parent)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("module", "call"), [(os, "replace"), (os, "truncate")])
def test_killed_while_closing_nothing_is_lost_or_doubled(
    path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, call: str
) -> None:
    def killed(*_: Any) -> None:
        raise Killed

    write(path, 1, 2)
    before = contents(path.parent)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, call, killed)
        close_segment(path)
    assert steps(path) == [1] * 4 + [2] * 4
    cut_after(path, 2)
    assert contents(path.parent) == before


def test_killed_while_reopening_it_is_done_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise Killed

    write(path, 1, 3)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(segments, "remove", killed)
        cut_after(path, 1)
    cut_after(path, 1)
    assert steps(path) == [1] * 4 and segments_of(path) == []


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"x" * 50, lambda data: data[:30] + b"zzzz"])
def test_a_damaged_segment_is_named_in_one_line(path: Path, damage: Any) -> None:
    write(path, 1, 2)
    (segment,) = segments_of(path)
    segment.write_bytes(damage(segment.read_bytes()))
    with pytest.raises(DataError, match=r"00001.jsonl.gz: expected a whole gzip file, found damage") as raised:
        list(read_trajectories(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: bytes(len(data)), lambda data: b""])
def test_a_run_sets_a_damaged_segment_aside_and_says_so(path: Path, damage: Any) -> None:
    write(path, 1, 4)
    first, second = segments_of(path)
    second.write_bytes(damage(second.read_bytes()))
    (told,) = cut_after(path, 4, 1)
    assert told.startswith(f"{second} is damaged and set aside as {second.name}.damaged: its rollouts are lost (")
    assert steps(path) == [1] * 4 + [2] * 2 + [3] * 0 + [4] * 4 and segments_of(path) == [first]


def test_a_run_that_goes_on_right_after_a_closing_misses_nothing(path: Path) -> None:
    write(path, 1, 2)
    os.truncate(path, 0)
    assert cut_after(path, 2, 1) == []
    assert cut_after(path, 4, 1) == [
        f"{path} ends with step 2, the run goes on after step 4: rows between are lost "
        "(0 lines were no records and are cut; a power cut?)."
    ]


def test_a_segment_may_end_in_lines_that_are_no_records(path: Path) -> None:
    write_records(path, [city_rollout()], "train", 1)
    with path.open("ab") as file:
        file.write(b"\0\0\n[1]\n")
    close_segment(path)
    assert cut_after(path, 1, 1) == [] and len(segments_of(path)) == 1
    cut_after(path, 0)
    assert contents(path.parent) == {path.name: b""}


@pytest.mark.parametrize("seed", range(3))
def test_the_power_may_be_cut_at_any_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Of closing, and of opening again: no row of a step before is lost, and none stands there twice."""
    path = tmp_path / "run" / "trajectories.jsonl"
    path.parent.mkdir()
    disk, flush, dice = Disk(path.parent, tmp_path / "store"), os.fsync, random.Random(seed)
    done, cuts = 0, 0

    def cut() -> None:
        nonlocal cuts
        cuts += 1
        after = tmp_path / f"after{cuts}" / path.name
        disk.rebuild(after.parent, dice, mixed=dice.random() < 0.7)
        assert cut_after(after, done, 1 if done else None) == []
        assert after.exists() or not done
        if after.exists():
            assert [json.loads(line)["step"] for line, _ in segments.numbered_lines(after)] == rows(done)
        write(after, done + 1, STEPS)
        assert {name: data for name, data in contents(after.parent).items() if name[0] != "."} == whole

    def flushed(number: int) -> None:
        touched = Path(os.readlink(f"/proc/self/fd/{number}"))
        if not touched.is_relative_to(path.parent):
            return
        cut()  # just before, and just after
        flush(number)
        disk.flushed(touched)
        cut()

    write(tmp_path / "whole.jsonl", 1, STEPS)
    whole = {p.name.replace("whole", "trajectories"): p.read_bytes() for p in tmp_path.glob("whole*")}
    monkeypatch.setattr(os, "fsync", flushed)
    for step in range(1, STEPS + 1):
        write(path, step, step)
        done = step
    for step in (5, 2, 0):
        done = step
        cut_after(path, step)
    assert cuts > 60
    shutil.rmtree(tmp_path / "store")


def test_names_and_times_do_not_make_a_difference(path: Path) -> None:
    write(path, 1, 2)
    (segment,) = segments_of(path)
    assert segment.read_bytes()[4:8] == bytes(4) and gzip.decompress(segment.read_bytes()).endswith(b"}\n")
