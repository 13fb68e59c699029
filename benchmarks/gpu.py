"""Everything that is measured on a CUDA device, in order of worth, each stage in a process and a time box of its own.

What a stage found is written at once, so a run that is cut off keeps what it has; a stage that fails does not stop the
next. A second run into the same file keeps the stages that it does not run again. On a CPU, `--tiny` runs the same code
on sizes that say nothing.

    python -m benchmarks.gpu [--stages rollouts_3b scan] [--out benchmarks/out/gpu.json]

The stage real_facts needs the files of `make real`; gpu_carry.py takes them to a machine without a network.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import OUT, ROOT, environment
from sdsearch_lightning.files import write_text

BOXES = {
    "tests": 170,
    "real_facts": 300,
    "rollouts_0.5b": 110,
    "rollouts_3b": 100,
    "train_step_3b": 70,
    "scan": 70,
    "loss_head": 110,
    "rollouts_static": 150,
    "world_20m": 200,
}
"""Seconds of each stage at most, 1 280 together: name some. Of a card lent for a quarter of an hour, first `real_facts
rollouts_0.5b scan` (480), then what is left: `tests loss_head rollouts_static` (430) or `loss_head world_20m` (310)."""
MARK = "figures: "


def measure(stage: str, tiny: bool) -> None:
    """Prints what a stage finds, as it finds it; run in a process of its own."""
    from benchmarks import gpu_end_to_end as whole, gpu_stages as stages

    few: dict[str, Any] = {"shape": stages.LONG.divided(4), "questions": 1} if tiny else {}
    size = "micro" if tiny else stage.partition("_")[2]
    small = whole.tiny(whole.world_20m())
    measured: dict[str, Callable[[], Iterator[dict[str, float]]]] = {
        "rollouts_0.5b": lambda: stages.rollouts(size, stages.OTHERS, **few),
        "rollouts_3b": lambda: stages.rollouts(size, {} if tiny else stages.OTHERS, **few),
        "rollouts_static": lambda: stages.rollouts_static("micro" if tiny else "0.5b", **few),
        "train_step_3b": lambda: stages.train_step(*(("tiny", 1) if tiny else ("3b",))),
        "real_facts": lambda: whole.end_to_end_aside(small if tiny else whole.real_facts()),
        "world_20m": lambda: whole.end_to_end_aside(small if tiny else whole.world_20m()),
        "scan": lambda: stages.scan(*((4096, 16) if tiny else ())),
    }
    for found in measured[stage]():
        print(MARK + json.dumps(found), flush=True)


def command(stage: str, tiny: bool) -> list[str]:
    """The process of a stage."""
    if stage == "tests":
        return [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-x" if tiny else "--maxfail=50", "tests/gpu"]
    if stage == "loss_head":
        options = ["--hidden", "64" if tiny else "2048", "--device", "cpu" if tiny else "cuda", "--repetitions", "5"]
        return [sys.executable, "-m", "benchmarks.bench_loss_head", *options]
    return [sys.executable, "-m", "benchmarks.gpu", "--measure", stage, *(["--tiny"] if tiny else [])]


def run_stage(stage: str, tiny: bool) -> dict[str, object]:
    """Run it within its box; what came of it."""
    start = time.monotonic()
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(
        command(stage, tiny), cwd=ROOT, **streams, text=True, errors="replace", start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=BOXES[stage])
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the commands that it runs
        output, _ = process.communicate()
    except BaseException:  # Ctrl-C reaches this process alone
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    figures: dict[str, float] = {}
    for line in output.splitlines():
        if line.startswith(MARK):
            figures |= json.loads(line.removeprefix(MARK))
    return {
        "stage": stage,
        "exit": process.returncode,
        "seconds": round(time.monotonic() - start, 1),
        "figures": figures,
        "output": output[-20_000:],
    }


def kept(out: Path, stages: Sequence[str]) -> list[dict[str, object]]:
    """What an earlier run left in the file, but for the stages that run again."""
    if not out.exists() or not out.stat().st_size:
        return []
    return [found for found in json.loads(out.read_text(encoding="utf-8"))["stages"] if found["stage"] not in stages]


def write(out: Path, results: Sequence[dict[str, object]]) -> None:
    """All stages so far; whole at any moment."""
    write_text(out, json.dumps({"stages": results}, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages; 1 where one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=list(BOXES), default=list(BOXES))
    parser.add_argument("--out", type=Path, default=OUT / "gpu.json")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU, to see that it runs")
    parser.add_argument("--measure", choices=list(BOXES), help=argparse.SUPPRESS)  # what a stage's process does
    options = parser.parse_args(argv)
    if options.measure:
        measure(options.measure, options.tiny)
        return 0
    results = kept(options.out, options.stages)
    write(options.out, results)  # before time is spent
    exits = []
    for stage in options.stages:
        done = run_stage(stage, options.tiny)
        results.append(done | {"tiny": options.tiny, "environment": environment()})
        write(options.out, results)
        exits.append(done["exit"])
        print(f"== {stage}: exit {done['exit']}, {done['seconds']} s", flush=True)
        for name, value in (done["figures"] or {}).items():  # type: ignore[attr-defined]
            print(f"   {name:60} {value:.4g}", flush=True)
        if done["exit"]:
            print(str(done["output"])[-2500:], flush=True)
    return int(any(exits))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: a stage does not outlive this
    sys.exit(main())
