"""Segments: the same lines as one file, whatever was killed, and the same segments after any resume."""

from __future__ import annotations

import gzip
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

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


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_trajectories(path)]


def test_all_lines_are_read_in_order_and_by_standard_tools(path: Path) -> None:
    write(path, 1, STEPS)
    assert sorted(contents(path.parent)) == [f"trajectories.0000{n}.jsonl.gz" for n in (1, 2, 3)] + [path.name]
    assert steps(path) == [step for step in range(1, STEPS + 1) for _ in range(4)]
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
    assert steps(path) == [n for n in range(1, min(step, reached) + 1) for _ in range(4)]
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


def test_names_and_times_do_not_make_a_difference(path: Path) -> None:
    write(path, 1, 2)
    (segment,) = segments_of(path)
    assert segment.read_bytes()[4:8] == bytes(4) and gzip.decompress(segment.read_bytes()).endswith(b"}\n")
