"""Collapses that are planted on purpose: does TrainingHealth see them before sampled exact match has halved?

    python -m benchmarks.planted_collapses [--seeds 0 1 2] [--root runs/planted]

    lr_x100       the quick start with a hundred times its learning rate
    closing_tag   the closing tag of a search inside the JSD positions, where it must not be, at JSD weight 1

Each runs from the quick start's cold start, with TrainingHealth set to stop, and once more with it only warning: what
would have come. A row says when which rule spoke, sampled exact match then and at its best before, and what it fell to.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from sdsearch_lightning import lessons
from sdsearch_lightning.__main__ import main
from sdsearch_lightning.report.metrics import read_metrics
from sdsearch_lightning.types import SpanKind

ROOT = Path(__file__).parent.parent
SCENARIOS = {
    "lr_x100": ("--model.optimizer.init_args.lr", "0.07"),
    "closing_tag": (
        *("--jsd.weight", "1.0", "--hindsight.groups", "all", "--model.optimizer.init_args.lr", "0.001"),
        *("--trainer.max_steps", "70", "--model.lr_schedule.init_args.hold_until", "70"),
        *("--model.lr_schedule.init_args.total_steps", "70"),
    ),
}
EM = "rollout/exact_match"


class Outcome(NamedTuple):
    """How one run went; exact match is that of the training rollouts, before the update of their step."""

    alarm: int | None
    """Step of the first alarm."""
    best_before: float
    """Highest mean of three steps until then."""
    at_alarm: float
    last: float
    """Mean of the last three steps."""
    kept: bool
    """Whether best.ckpt is there."""


@contextmanager
def closing_tag_inside() -> Iterator[None]:
    """JSD positions take in the tag that closes a search."""
    original = lessons.distilled_spans

    def planted(trajectory: lessons.Trajectory, positions: lessons.Positions) -> tuple[int, ...]:
        spans = original(trajectory, positions)
        after = {index + 1 for index in spans if trajectory.spans[index].kind is SpanKind.QUERY}
        return tuple(sorted({*spans, *(i for i in after if i < len(trajectory.spans) and trajectory.spans[i].sampled)}))

    lessons.distilled_spans = planted
    try:
        yield
    finally:
        lessons.distilled_spans = original


def run(scenario: str, seed: int, action: str, model: str, root: Path) -> Outcome:
    """One fit, and what its metrics say."""
    name = f"{scenario}_{seed}_{action}"
    arguments = (
        *("fit", "--config", str(ROOT / "configs/quickstart.yaml"), "--run.root", str(root), "--run.name", name),
        *("--run.overwrite", "true", "--run.checkpoint_every", "1", "--model.model_name_or_path", model),
        *("--seed_everything", str(seed), "--trainer.enable_progress_bar", "false"),
        *("--trainer.callbacks+=TrainingHealth", "--trainer.callbacks.action", action, *SCENARIOS[scenario]),
    )
    if scenario == "closing_tag":
        with closing_tag_inside():
            code = main(arguments)
    else:
        code = main(arguments)
    assert code == 0, f"{name} ended with exit code {code}"
    metrics = read_metrics(root / name)
    scores = {point.step: point.value for point in metrics[EM]}
    alarms = [point.step for point in metrics.get("health/alerts", []) if point.value > 0]
    alarm = min(alarms) if alarms else None
    before = [value for step, value in scores.items() if alarm is None or step <= alarm]
    triples = [sum(before[i : i + 3]) / len(before[i : i + 3]) for i in range(max(1, len(before) - 2))]
    last = [*scores.values()][-3:]
    at_alarm = scores[alarm] if alarm is not None else float("nan")
    best = root / name / "checkpoints/best.ckpt"
    return Outcome(alarm, max(triples), at_alarm, sum(last) / len(last), best.exists())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--root", type=Path, default=Path("runs/planted"))
    parser.add_argument("--model", help="of a cold start; made where it is left out")
    parser.add_argument("--scenario", choices=[*SCENARIOS], nargs="+", default=[*SCENARIOS])
    return parser.parse_args()


def _cold_start(root: Path) -> str:
    config = str(ROOT / "configs/quickstart_cold_start.yaml")
    folder = root / "cold_start"
    assert main(("supervise", "--config", config, "--run.root", str(root), "--run.name", folder.name)) == 0
    return str(folder / "model")


if __name__ == "__main__":
    options = _parse()
    start = options.model or _cold_start(options.root)
    rows = []
    for scenario in options.scenario:
        for seed in options.seeds:
            stopped, warned = (run(scenario, seed, action, start, options.root) for action in ("stop", "warn"))
            collapses = warned.last < warned.best_before / 2
            caught = stopped.alarm is not None and stopped.at_alarm >= stopped.best_before / 2 and stopped.kept
            verdict = "no collapse" if not collapses else "caught" if caught else "MISSED"
            rows.append((scenario, seed, stopped, warned, verdict))
    print(f"{'scenario':12} seed  alarm  best EM before  EM at alarm  EM without a stop  best.ckpt  verdict")
    for scenario, seed, stopped, warned, verdict in rows:
        print(
            f"{scenario:12} {seed:4}  {stopped.alarm!s:>5}  {stopped.best_before:14.3f}  {stopped.at_alarm:11.3f}  "
            f"{warned.last:17.3f}  {'kept' if stopped.kept else '-':9}  {verdict}"
        )
    sys.exit(any(verdict == "MISSED" for *_, verdict in rows))
