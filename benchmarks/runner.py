"""Does the runs of a study, each once, and gives each its line of results.jsonl; the studies differ in their plans.

Any number of workers, in one process or in several on machines that share the folder, may do one study at once. A run
that fails is a line too. Invariants: every run is a plain command, printed before it starts; a run that has its line
is not done again; a run is done by one worker at a time, whose claim ends with its processes.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from benchmarks.processes import ROOT, STOPPED, THREADS, Executor, Outcome
from sdsearch_lightning.errors import SDSearchError
from sdsearch_lightning.report.summary import installed_versions
from sdsearch_lightning.report.trajectories import append_records, cut_torn_line

LAST_LINES = 15
POLL_SECONDS = 1.0
"""How often a worker with nothing to do looks for what others have done."""

Record = dict[str, Any]
"""A line of results.jsonl: the fields of a run, and what came of it."""


class StudyError(SDSearchError):
    """The study cannot go on."""


class Run(Protocol):
    """One run of a study: a frozen dataclass, by which its record is found."""

    @property
    def name(self) -> str:
        """Its folder below the study's."""

    @property
    def is_cold_start(self) -> bool:
        """Whether other runs start from the model in its folder."""


R = TypeVar("R", bound=Run)
R_contra = TypeVar("R_contra", bound=Run, contravariant=True)


class Plan(Protocol[R_contra]):
    """What the runs of a study are."""

    def arguments(self, run: R_contra, root: str) -> list[str]:
        """Those of `python -m sdsearch_lightning`."""

    def measure(self, run: R_contra, folder: Path) -> Record:
        """What its line tells of a run that ended well; raises an SDSearchError where the folder lacks something."""


@contextmanager
def claimed(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether `path` is held by nobody else until this block ends; with `wait` it always is, in the end.

    The system gives up the claim of a process that dies, once the run that it started has ended too.
    """
    with path.open("a") as file:
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # a run that others of this process started may hold the file open


class Runner(Generic[R]):
    """The results of a study so far, and the means to get the others.

    Args:
        plan: the command of each run, and what is measured of it.
        run_type: the dataclass of its runs.
        root: folder of the runs, relative to the root of the repository.
        results: the file of lines; default results.jsonl in `root`.
        execute: runs a command.
        workers: runs at a time, in this process.
        retry_failed: do runs again that failed before.
    """

    def __init__(
        self,
        plan: Plan[R],
        run_type: type[R],
        root: str,
        execute: Executor,
        *,
        results: Path | None = None,
        workers: int = 1,
        retry_failed: bool = False,
    ) -> None:
        self.plan, self.run_type, self.root, self.execute, self.workers = plan, run_type, root, execute, workers
        self.folder = ROOT / root
        self.results = results or self.folder / "results.jsonl"
        self.records: dict[R, Record] = {}
        for name in ("logs", "claims"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.results.parent.mkdir(parents=True, exist_ok=True)
        self._commit, self._lock = code_version(), threading.Condition()
        self._is_stopped = False
        self._refresh()
        failed = {run: record for run, record in self.records.items() if record["status"] != "ok"}
        self._to_retry = failed if retry_failed else {}

    def work(self, wanted: Callable[[], Iterable[R]]) -> None:
        """Does the runs that are wanted, in their order, until each has its line.

        Args:
            wanted: tells them all; it is asked again whenever there are new results, which may lead to new runs.

        Raises:
            StudyError: a line is of another command than the run's.
        """
        with ThreadPoolExecutor(self.workers) as pool:
            futures = [pool.submit(self._work, wanted) for _ in range(self.workers)]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self._is_stopped = True
                self.execute.stop()
                raise

    def shown(self, run: R) -> str:
        """The command of a run, as one would type it."""
        settings = " ".join(f"{name}={value}" for name, value in THREADS.items())
        return f"{settings} python -m sdsearch_lightning {shlex.join(self.plan.arguments(run, self.root))}"

    def has_succeeded(self, run: R) -> bool:
        """Whether `run` has ended well and, a cold start, left its model on this machine."""
        return self._is_done(run) and self.records[run]["status"] == "ok"

    def _work(self, wanted: Callable[[], Iterable[R]]) -> None:
        while not self._is_stopped:
            with self._lock:
                missing = [run for run in wanted() if not self._is_done(run)]
            if not missing:
                return
            if not any(map(self._was_free, missing)):
                with self._lock:  # what is left is in the hands of others
                    self._lock.wait(POLL_SECONDS)
                    self._refresh()

    def _was_free(self, run: R) -> bool:
        """Does `run` unless another worker is at it."""
        with claimed(self._claim(run.name)) as is_mine:
            if is_mine:
                with self._lock:
                    self._refresh()
                    is_done = self._is_done(run)
                if not is_done and not self._is_stopped:
                    self._do(run)
            return is_mine

    def _claim(self, name: str) -> Path:
        return self.folder / "claims" / name.replace("/", "-")

    def _is_done(self, run: R) -> bool:
        record = self.records.get(run)
        if record is None or record == self._to_retry.get(run):
            return False
        if record["command"] != self.shown(run):
            raise StudyError(
                f"{self.results} holds {run.name} by another command:\n  {record['command']}\nnow it would be\n"
                f"  {self.shown(run)}\nChoose another folder with --root, or remove this one."
            )
        return not run.is_cold_start or record["status"] != "ok" or (self.folder / run.name / "model").is_dir()

    def _do(self, run: R) -> None:
        say(f"{run.name}\n  $ {self.shown(run)}")
        record: Record = asdict(run) | {  # type: ignore[call-overload]
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": self.shown(run),
            "commit": self._commit,
            "versions": installed_versions(),
        }
        log = self.folder / "logs" / f"{run.name.replace('/', '-')}.log"
        outcome = self.execute(self.plan.arguments(run, self.root), log)
        if outcome.exit_code in STOPPED:
            raise KeyboardInterrupt
        record |= asdict(outcome) | self._verdict(run, outcome, log)
        with self._lock:
            self._append(record)
            self.records[run] = record
            self._to_retry.pop(run, None)
            self._lock.notify_all()
        seconds = f"{record['wall_seconds']:.0f} s, of CPU {record['cpu_seconds']:.0f} s"
        say("\n    ".join([f"{run.name}: {record['status']}, {seconds}", *record.get("last_lines", [])]))

    def _verdict(self, run: R, outcome: Outcome, log: Path) -> Record:
        if outcome.exit_code != 0:
            return {"status": "failed", "last_lines": last_lines(log)}
        try:
            return {"status": "ok"} | self.plan.measure(run, self.folder / run.name)
        except SDSearchError as error:
            return {"status": "failed", "last_lines": [*last_lines(log), f"measures: {error}"]}

    def _append(self, record: Record) -> None:
        with claimed(self._claim("results"), wait=True):
            append_records(self.results, [record])

    def _refresh(self) -> None:
        """Reads what all workers wrote."""
        if not self.results.exists():
            return
        with claimed(self._claim("results"), wait=True):
            cut_torn_line(self.results)
            self.records = read_records(self.results, self.run_type)


def read_records(path: Path, run_type: type[R]) -> dict[R, Record]:
    """The record of each run; of a run done again, the last line counts."""
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    fields = run_type.__slots__  # type: ignore[attr-defined]
    return {run_type(*(record[name] for name in fields)): record for record in records}


def last_lines(log: Path) -> list[str]:
    """How the output of a run ends."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return [line.rstrip() for line in text.splitlines() if line.strip()][-LAST_LINES:]


def code_version() -> str:
    """The commit of the repository, marked where files other than results differ from it; unknown without git."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return f"{commit}-dirty" if _git("status", "--porcelain", "--", ":!*/results.jsonl") else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def say(text: str) -> None:
    """Prints in one piece: two workers print."""
    print(f"{text}\n", end="", flush=True)


def interrupt(number: int, frame: object) -> None:
    """A signal handler: ends the study as Ctrl-C does."""
    raise KeyboardInterrupt
