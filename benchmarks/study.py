"""`make study`: does credit for searches help against a tuned GRPO? The protocol is docs/study.md.

Resumable, and any number of these may work on one folder at once. Results are lines of benchmarks/study/results.jsonl;
`python -m benchmarks.study_report` makes docs/results_study.md of them.

    python -m benchmarks.study [--families sparse dense] [--arms grpo sd] [--workers 1] [--smoke] [--retry-failed]
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.processes import ROOT, Executor, Processes
from benchmarks.runner import Runner, StudyError, interrupt, say
from benchmarks.study_protocol import FULL, SMOKE, Protocol, Run

RESULTS = ROOT / "benchmarks" / "study" / "results.jsonl"


def main(argv: Sequence[str] | None = None, execute: Executor | None = None) -> int:
    """Runs the study; returns 0, or 1 where a run failed, or 130 where it was stopped."""
    options = _parsed(argv)
    root = options.root or ("runs/study_smoke" if options.smoke else "runs/study")
    results = options.results or (ROOT / root / "results.jsonl" if options.smoke else RESULTS)
    protocol = _chosen(SMOKE if options.smoke else FULL, options.families, options.arms)
    try:
        runner = Runner(
            protocol,
            Run,
            root,
            execute or Processes(),
            results=results,
            workers=options.workers,
            retry_failed=options.retry_failed,
        )
        runner.work(lambda: protocol.wanted(runner.records, runner.has_succeeded))
    except StudyError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        return 130
    done = [runner.records[run] for run in dict.fromkeys(protocol.wanted(runner.records, runner.has_succeeded))]
    failed = [record["command"] for record in done if record["status"] != "ok"]
    say("\n  $ ".join([f"{len(done)} runs are done, {len(failed)} of them failed", *failed]))
    return int(bool(failed))


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__.splitlines()[0])
    families, arms = ([part.name for part in parts] for parts in (FULL.families, FULL.arms))
    parser.add_argument("--families", nargs="+", choices=families, default=families, help="those to run")
    parser.add_argument("--arms", nargs="+", choices=arms, default=arms, help="those to run; GRPO always is")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time in this process, one core each")
    parser.add_argument("--smoke", action="store_true", help="two steps per run: shows that the study runs")
    parser.add_argument("--root", help="folder of the runs (default: runs/study, or runs/study_smoke)")
    parser.add_argument("--results", type=Path, help="file of results (default: benchmarks/study/results.jsonl)")
    parser.add_argument("--retry-failed", action="store_true", help="do runs again that failed before")
    return parser.parse_args(argv)


def _chosen(protocol: Protocol, families: Sequence[str], arms: Sequence[str]) -> Protocol:
    return replace(
        protocol,
        families=tuple(family for family in protocol.families if family.name in families),
        arms=tuple(arm for arm in protocol.arms if arm is protocol.control or arm.name in arms),
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    sys.exit(main())
