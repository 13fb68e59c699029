"""`make study-core`: does hindsight self-distillation help, at the quick start's size? A smoke test of the evidence.

One cold start; a learning rate chosen for GRPO and then a weight for each other arm, on seeds of their own, by the area
under the sampled-EM curve; then four arms on paired seeds. Each finished run is one line of results.jsonl, and a run
that has its line is not done again, so the study may be stopped and started at any time. A run that fails is a line
too. Invariant: every run is a plain command, printed before it starts.

    python -m benchmarks.study_core [--smoke] [--root runs/study_core] [--workers 2] [--retry-failed]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from benchmarks.measures import mean, measure
from benchmarks.study_plan import COLD_START, FULL, SMOKE, Plan, Record, Run
from benchmarks.study_table import render
from sdsearch_lightning.errors import SDSearchError
from sdsearch_lightning.files import write_text
from sdsearch_lightning.report.summary import installed_versions
from sdsearch_lightning.report.trajectories import append_records, cut_torn_line

ROOT = Path(__file__).resolve().parent.parent
THREADS = {"OMP_NUM_THREADS": "1"}
"""All that is set in the environment of a run: one core per worker."""
LAST_LINES = 15
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)
"""Exit codes of a run that somebody stopped: it has not failed, and will be done again."""


class StudyError(SDSearchError):
    """The study cannot go on."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a process ended."""

    exit_code: int
    cpu_seconds: float
    wall_seconds: float


class Executor(Protocol):
    """Runs a command to its end, with its output in `log`; `stop` ends all that are running."""

    def __call__(self, arguments: Sequence[str], log: Path) -> Outcome: ...

    def stop(self) -> None: ...


class Processes:
    """Runs `python -m sdsearch_lightning` as child processes, from the root of the repository."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._is_stopped = False

    def __call__(self, arguments: Sequence[str], log: Path) -> Outcome:
        command = [sys.executable, "-m", "sdsearch_lightning", *arguments]
        start = time.monotonic()
        with log.open("wb") as file, self._lock:
            if self._is_stopped:
                return Outcome(-signal.SIGTERM, 0.0, 0.0)
            process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=os.environ | THREADS)
            self._running.add(process)
        # Not process.wait(): the kernel tells what this child used only to the one who waits like this.
        _, status, usage = os.wait4(process.pid, 0)
        with self._lock:
            process.returncode = os.waitstatus_to_exitcode(status)
            self._running.discard(process)
        return Outcome(process.returncode, usage.ru_utime + usage.ru_stime, time.monotonic() - start)

    def stop(self) -> None:
        with self._lock:
            self._is_stopped = True
            for process in self._running:
                process.terminate()


class Study:
    """A plan, its results so far, and the means to get the others.

    Args:
        plan: what to run.
        root: folder of the study, relative to the root of the repository.
        execute: runs a command.
        workers: runs at a time.
        retry_failed: do runs again that failed before.
    """

    def __init__(self, plan: Plan, root: str, execute: Executor, workers: int = 2, retry_failed: bool = False) -> None:
        self.plan, self.root, self.execute, self.workers = plan, root, execute, workers
        self.retry_failed = retry_failed
        self.folder = ROOT / root
        self.results = self.folder / "results.jsonl"
        self.records: dict[tuple[object, ...], Record] = {}
        self.asked: list[Run] = []
        """Every run that the plan came to, in its order."""
        self._code, self._lock = code_version(), threading.Lock()
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        if self.results.exists():
            cut_torn_line(self.results)
            lines = self.results.read_text(encoding="utf-8").splitlines()
            for record in map(json.loads, lines):  # of a run done again, the last line counts
                self.records[Run(*(record[name] for name in Run.__slots__)).key] = record

    def go(self) -> None:
        """Does all stages, as far as they are not done.

        Raises:
            StudyError: the cold start, or every setting of a grid, failed.
        """
        self.run_all([COLD_START])
        if self.records[COLD_START.key]["status"] != "ok":
            raise StudyError("the cold start failed, so there is nothing to start from. See table.md, --retry-failed.")
        lr, weight = self.best(self.plan.rate_runs())
        tuning = self.plan.weight_runs(lr)
        self.run_all(tuning)
        weights = [self.best([run for run in tuning if run.arm == arm.name])[1] for arm in self.plan.arms[1:]]
        self.run_all(self.plan.comparison_runs(lr, [weight, *weights]))

    def best(self, runs: Sequence[Run]) -> tuple[float, float]:
        """The (learning rate, weight) of the largest mean area under sampled EM, once its runs are done."""
        self.run_all(runs)
        areas: dict[tuple[float, float], list[float | None]] = {}
        for run in runs:
            area = self.records[run.key].get("measures", {}).get("sampled_area")
            areas.setdefault((run.lr, run.weight), []).append(area)  # type: ignore[arg-type]
        # A setting that failed on a seed has no mean: it would be compared on other seeds than the others.
        means = {setting: value for setting, values in areas.items() if (value := mean(values)) is not None}
        if not means:
            raise StudyError(f"tuning {runs[0].arm}: a run of every setting failed. See table.md, --retry-failed.")
        return max(means, key=means.__getitem__)

    def run_all(self, runs: Sequence[Run]) -> None:
        """Does the runs that have no line yet, and gives each its line as it ends."""
        self.asked += [run for run in runs if run not in self.asked]
        missing = [run for run in runs if not self._is_done(run)]
        with ThreadPoolExecutor(self.workers) as pool:
            futures = [pool.submit(self._do, run) for run in missing]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.execute.stop()
                raise

    def shown(self, run: Run) -> str:
        """The command of a run, as one would type it."""
        settings = " ".join(f"{name}={value}" for name, value in THREADS.items())
        return f"{settings} python -m sdsearch_lightning {shlex.join(self.plan.arguments(run, self.root))}"

    def _is_done(self, run: Run) -> bool:
        record = self.records.get(run.key)
        if record is None or (record["status"] != "ok" and self.retry_failed):
            return False
        if record["command"] != self.shown(run):
            raise StudyError(
                f"{self.results} holds {run.name} by another command:\n  {record['command']}\nnow it would be\n"
                f"  {self.shown(run)}\nChoose another folder with --root, or remove this one."
            )
        return run != COLD_START or record["status"] != "ok" or (self.folder / run.name / "model").is_dir()

    def _do(self, run: Run) -> None:
        say(f"{run.name}\n  $ {self.shown(run)}")
        record: Record = asdict(run) | {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": self.shown(run),
            "code": self._code,
            "versions": installed_versions(),
        }
        log = self.folder / "logs" / f"{run.name.replace('/', '-')}.log"
        outcome = self.execute(self.plan.arguments(run, self.root), log)
        if outcome.exit_code in STOPPED:
            raise KeyboardInterrupt
        with self._lock:
            self._keep(run, record | asdict(outcome) | self._verdict(run, outcome, log))

    def _verdict(self, run: Run, outcome: Outcome, log: Path) -> Record:
        if outcome.exit_code != 0:
            return {"status": "failed", "last_lines": last_lines(log)}
        try:
            is_cold = run == COLD_START
            measures = {} if is_cold else measure(self.folder / run.name, self.plan.max_steps)
        except SDSearchError as error:
            return {"status": "failed", "last_lines": [*last_lines(log), f"measures: {error}"]}
        return {"status": "ok", "measures": measures}

    def _keep(self, run: Run, record: Record) -> None:
        append_records(self.results, [record])
        self.records[run.key] = record
        done = f"[{len(self.records)}/{self.plan.num_runs}] {run.name}: {record['status']}"
        area = record.get("measures", {}).get("sampled_area")
        told = "" if area is None else f", area under sampled EM {area:.3f}"
        seconds = f"{record['wall_seconds']:.0f} s, of CPU {record['cpu_seconds']:.0f} s"
        say("\n    ".join([f"{done}, {seconds}{told}", *record.get("last_lines", [])]))


def last_lines(log: Path) -> list[str]:
    """How the output of a run ends."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return [line.rstrip() for line in text.splitlines() if line.strip()][-LAST_LINES:]


def code_version() -> str:
    """The commit of the repository, marked where files differ from it; unknown without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def say(text: str) -> None:
    """Prints in one piece: two workers print."""
    print(f"{text}\n", end="", flush=True)


def main(argv: Sequence[str] | None = None, execute: Executor | None = None) -> int:
    """Runs the study and prints its table; returns 0, or 1 where a run failed, or 130 where it was stopped."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study_core", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two steps per run: shows that the study runs")
    parser.add_argument("--root", help="folder of the study (default: runs/study_core, or runs/study_core_smoke)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--retry-failed", action="store_true", help="do runs again that failed before")
    options = parser.parse_args(argv)
    plan = SMOKE if options.smoke else FULL
    root = options.root or ("runs/study_core_smoke" if options.smoke else "runs/study_core")
    code = 0
    try:
        study = Study(plan, root, execute or Processes(), options.workers, options.retry_failed)
        try:
            study.go()
        finally:
            table = render(study.records, study.asked, plan)
            write_text(study.folder / "table.md", table)
    except StudyError as error:
        say(f"error: {error}")
        code = 1
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        return 130
    say(table)
    say(f"written to {root}/table.md")
    return code or int(any(study.records[run.key]["status"] != "ok" for run in study.asked if run.key in study.records))


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main())
