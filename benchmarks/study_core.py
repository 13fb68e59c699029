"""`make study-core`: does hindsight self-distillation help, at the quick start's size? A smoke test of the evidence.

One cold start; a learning rate chosen for GRPO and then a weight for each other arm, on seeds of their own, by the area
under the sampled-EM curve; then four arms on paired seeds. It may be stopped and started at any time; see runner.py.

    python -m benchmarks.study_core [--smoke] [--root runs/study_core] [--workers 2] [--retry-failed]
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from benchmarks.measures import mean
from benchmarks.processes import Executor, Processes
from benchmarks.runner import Runner, StudyError, interrupt, say
from benchmarks.study_plan import COLD_START, FULL, SMOKE, Plan, Run
from benchmarks.study_table import render
from sdsearch_lightning.files import write_text


class Study:
    """The stages of a plan.

    Args:
        plan: what to run.
        root: folder of the study, relative to the root of the repository.
        execute: runs a command.
        workers: runs at a time.
        retry_failed: do runs again that failed before.
    """

    def __init__(self, plan: Plan, root: str, execute: Executor, workers: int = 2, retry_failed: bool = False) -> None:
        self.plan = plan
        self.runner = Runner(plan, Run, root, execute, workers=workers, retry_failed=retry_failed)
        self.asked: list[Run] = []
        """Every run that the plan came to, in its order."""

    def go(self) -> None:
        """Does all stages, as far as they are not done.

        Raises:
            StudyError: the cold start, or every setting of a grid, failed.
        """
        self.run_all([COLD_START])
        if self.runner.records[COLD_START]["status"] != "ok":
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
            area = self.runner.records[run].get("measures", {}).get("sampled_area")
            areas.setdefault((run.lr, run.weight), []).append(area)  # type: ignore[arg-type]
        # A setting that failed on a seed has no mean: it would be compared on other seeds than the others.
        means = {setting: value for setting, values in areas.items() if (value := mean(values)) is not None}
        if not means:
            raise StudyError(f"tuning {runs[0].arm}: a run of every setting failed. See table.md, --retry-failed.")
        return max(means, key=means.__getitem__)

    def run_all(self, runs: Sequence[Run]) -> None:
        """Does the runs that have no line yet."""
        self.asked += [run for run in runs if run not in self.asked]
        self.runner.work(lambda: runs)


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
            records = study.runner.records
            table = render(records, study.asked, plan)
            write_text(study.runner.folder / "table.md", table)
    except StudyError as error:
        say(f"error: {error}")
        code = 1
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        return 130
    say(table)
    say(f"written to {root}/table.md")
    return code or int(any(records[run]["status"] != "ok" for run in study.asked if run in records))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    sys.exit(main())
