"""Several workers do a study together: each run once, and what a dead one held goes to another. No run is real here."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.processes import ROOT, Outcome
from benchmarks.runner import Record, Runner, StudyError, claimed, code_version


@dataclass(frozen=True, slots=True)
class Task:
    number: int

    @property
    def name(self) -> str:
        return f"task/{self.number}"

    @property
    def is_cold_start(self) -> bool:
        return self.number == 0


class Plan:
    def arguments(self, run: Task, root: str) -> list[str]:
        return ["fit", f"--number={run.number}"]

    def measure(self, run: Task, folder: Path) -> Record:
        return {"square": run.number**2}


class Slow:
    """Takes a moment, and counts what it does; the cold start leaves a model."""

    def __init__(self, folder: Path, exit_code: int = 0) -> None:
        self.folder, self.exit_code = folder, exit_code
        self.done: list[str] = []

    def __call__(self, arguments: Sequence[str], log: Path) -> Outcome:
        self.done.append(arguments[1])
        time.sleep(0.02)
        log.write_text("the last line\n")
        if arguments[1] == "--number=0":
            (self.folder / "task/0/model").mkdir(parents=True, exist_ok=True)
        return Outcome(self.exit_code, 1.0, 1.0)

    def stop(self) -> None: ...


TASKS = [Task(number) for number in range(1, 13)]


def make(folder: Path, execute: Slow, **options: bool | int) -> Runner[Task]:
    return Runner(Plan(), Task, str(folder), execute, **options)  # type: ignore[arg-type]


def lines(folder: Path) -> list[Record]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_workers_that_share_a_folder_do_each_run_once(tmp_path: Path) -> None:
    execute = Slow(tmp_path)
    runners = [make(tmp_path, execute, workers=2) for _ in range(3)]
    threads = [threading.Thread(target=runner.work, args=(lambda: TASKS,)) for runner in runners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(execute.done) == sorted(f"--number={task.number}" for task in TASKS)
    assert {line["number"]: line["square"] for line in lines(tmp_path)} == {
        task.number: task.number**2 for task in TASKS
    }
    assert all(set(runner.records) == set(TASKS) for runner in runners), "each knows what the others did"


def test_results_lead_to_new_runs(tmp_path: Path) -> None:
    execute = Slow(tmp_path)
    runner = make(tmp_path, execute, workers=3)
    runner.work(lambda: TASKS[: len(runner.records) + 1][:4])
    assert execute.done == [f"--number={number}" for number in (1, 2, 3, 4)]


def test_the_claim_of_a_killed_process_is_free_again(tmp_path: Path) -> None:
    claims = make(tmp_path, Slow(tmp_path)).folder / "claims"
    code = (
        "import sys, time; from pathlib import Path; from benchmarks.runner import claimed\n"
        "with claimed(Path(sys.argv[1])) as is_mine: print(is_mine, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(claims / "task-1")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "True\n"
        with claimed(claims / "task-1") as is_mine:
            assert not is_mine
        execute = Slow(tmp_path)
        thread = threading.Thread(target=make(tmp_path, execute).work, args=(lambda: TASKS[:2],))
        thread.start()
        time.sleep(0.3)
        assert execute.done == ["--number=2"], "what another does is left to it"
        other.kill()
    thread.join(20)
    assert execute.done == ["--number=2", "--number=1"]


def test_a_failed_run_is_done_again_once_where_that_is_asked(tmp_path: Path) -> None:
    failing = Slow(tmp_path, exit_code=1)
    make(tmp_path, failing).work(lambda: TASKS[:1])
    make(tmp_path, failing).work(lambda: TASKS[:1])
    assert len(failing.done) == 1 and lines(tmp_path)[0]["last_lines"] == ["the last line"]
    make(tmp_path, failing, retry_failed=True).work(lambda: TASKS[:1])
    assert [line["status"] for line in lines(tmp_path)] == ["failed", "failed"]
    again = make(tmp_path, Slow(tmp_path), retry_failed=True)
    again.work(lambda: TASKS[:1])
    assert again.has_succeeded(TASKS[0]) and len(lines(tmp_path)) == 3


def test_a_cold_start_whose_model_is_not_here_is_done_again(tmp_path: Path) -> None:
    execute = Slow(tmp_path)
    runner = make(tmp_path, execute)
    assert not runner.has_succeeded(Task(0))
    runner.work(lambda: [Task(0)])
    assert runner.has_succeeded(Task(0))
    (tmp_path / "task/0/model").rmdir()
    assert not runner.has_succeeded(Task(0))
    runner.work(lambda: [Task(0)])
    assert len(execute.done) == 2


def test_a_line_of_another_command_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, Slow(tmp_path)).work(lambda: TASKS[:1])
    monkeypatch.setattr(Plan, "arguments", lambda self, run, root: ["fit", "--number=7"])
    with pytest.raises(StudyError, match=r"holds task/1 by another command:\n.*--number=1\n.*\n.*--number=7"):
        make(tmp_path, Slow(tmp_path)).work(lambda: TASKS[:1])


def test_the_commit_is_that_of_the_code() -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert code_version().removesuffix("-dirty") == (head[:12] or "unknown")
