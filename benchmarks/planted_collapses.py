"""Collapses that are planted on purpose: does TrainingHealth see them before sampled exact match has halved?

    python -m benchmarks.planted_collapses [--seeds 0 1 2] [--root runs/planted]

    lr_x100       the quick start; from step 15 on with a hundred times its learning rate
    closing_tag   the closing tag of a search inside the JSD positions, where it must not be, at JSD weight 4, after a
                  cold start that was allowed to write documents itself (without both the loop does not start here)
    tags          a teacher that gives the policy's tags ten times the odds that it gives them inside queries, at JSD
                  weight 1 on questions of three hops
    tags_left_out the same with the default, which leaves tags out of the divergence: nothing should happen

Each runs with TrainingHealth set to stop, and once more with it only warning: what would have come. A row says when a
rule first spoke, sampled exact match then and at its best before, what it fell to, and whether the best checkpoint
survived. Exact match is that of a step's training rollouts, which its own update comes after.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdsearch_lightning import module
from sdsearch_lightning.__main__ import main
from sdsearch_lightning.report.metrics import read_metrics
from sdsearch_lightning.schedules import Schedule
from sdsearch_lightning.step import taught_spans
from sdsearch_lightning.step.control_tokens import ControlTokens
from sdsearch_lightning.types import SpanKind, Trajectory

CONFIGS = Path(__file__).parent.parent / "configs"
EM = "rollout/exact_match"
WARMUP, JUMP, TIMES = 4, 15, 100
ODDS = 10.0
SURE_OF_TAGS = (
    *("--data.hop_mix", "[0,0,1]", "--model.optimizer.init_args.lr", "0.001"),
    *("--jsd.weight", "1.0", "--jsd.warmup_steps", "2", "--trainer.max_steps", "30"),
)
SCENARIOS = {
    "lr_x100": ("--model.lr_schedule", "benchmarks.planted_collapses.Jump"),
    "closing_tag": (
        *("--jsd.weight", "4.0", "--jsd.warmup_steps", "2", "--hindsight.groups", "all"),
        *("--model.optimizer.init_args.lr", "0.001"),
        *("--trainer.max_steps", "60", "--model.lr_schedule.init_args.hold_until", "60"),
        *("--model.lr_schedule.init_args.total_steps", "60", "--model.exclude_tags", "false"),
    ),
    "tags": (*SURE_OF_TAGS, "--model.exclude_tags", "false"),
    "tags_left_out": SURE_OF_TAGS,
}
COLD_STARTS = {"closing_tag": ("--model.loss_weights.observation", "0.3")}
QUIET = ("--trainer.enable_progress_bar", "false")


class Jump(Schedule):
    """The quick start's learning rate, and a hundred times as much from one step to the next."""

    def factor(self, step: int) -> float:
        """1, but for the warm-up and from the jump on."""
        return TIMES if step >= JUMP else min(1.0, (step + 1) / WARMUP)


class Outcome(NamedTuple):
    """How one run went."""

    alarm: int | None
    """Step of the first alarm."""
    best_before: float
    """Highest mean exact match of three steps until then."""
    at_alarm: float
    last: float
    """Mean of the last three steps."""
    kept: bool
    """Whether best.ckpt is there."""


@contextmanager
def closing_tag_inside() -> Iterator[None]:
    """JSD positions take in the tag that closes a search."""
    original = taught_spans.distilled_spans

    def planted(trajectory: Trajectory, positions: taught_spans.Positions) -> tuple[int, ...]:
        inside, spans = original(trajectory, positions), trajectory.spans
        after = [i + 1 for i in inside if spans[i].kind is SpanKind.QUERY]
        return tuple(sorted({*inside, *(i for i in after if i < len(spans) and spans[i].sampled)}))

    taught_spans.distilled_spans = planted
    try:
        yield
    finally:
        taught_spans.distilled_spans = original


@contextmanager
def teacher_sure_of_tags() -> Iterator[None]:
    """The teacher's logits of the policy's tags inside queries, `ODDS` times as likely."""
    original = module.summarize_teacher  # type: ignore[attr-defined]

    def planted(logits: Tensor, hidden: Tensor, tokens: Tensor, top_k: int | None, controls: ControlTokens) -> Any:
        more = torch.full_like(logits[:, controls.policy], math.log(ODDS))
        return original(logits.index_add(-1, controls.policy, more), hidden, tokens, top_k, controls)

    module.summarize_teacher = planted  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.summarize_teacher = original  # type: ignore[attr-defined]


def run(scenario: str, seed: int, action: str, model: str, root: Path) -> Outcome:
    """One fit, and what its metrics say."""
    name = f"{scenario}_{seed}_{action}"
    arguments = (
        *("fit", "--config", str(CONFIGS / "quickstart.yaml"), "--run.root", str(root), "--run.name", name),
        *("--run.overwrite", "true", "--run.checkpoint_every", "1", "--model.model_name_or_path", model, *QUIET),
        *("--seed_everything", str(seed), "--trainer.callbacks+=TrainingHealth", "--trainer.callbacks.action", action),
        *SCENARIOS[scenario],
    )
    with PLANTS.get(scenario, nullcontext)():
        code = main(arguments)
    if code != 0:
        raise SystemExit(f"{name} ended with exit code {code}")
    metrics = read_metrics(root / name)
    scores = {point.step: point.value for point in metrics[EM]}
    alarm = min((point.step for point in metrics["health/alerts"] if point.value > 0), default=None)
    before = [value for step, value in scores.items() if alarm is None or step <= alarm]
    triples = [sum(before[i : i + 3]) / len(before[i : i + 3]) for i in range(max(1, len(before) - 2))]
    last = [*scores.values()][-3:]
    at_alarm = float("nan") if alarm is None else scores[alarm]
    return Outcome(
        alarm, max(triples), at_alarm, sum(last) / len(last), (root / name / "checkpoints/best.ckpt").exists()
    )


PLANTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "closing_tag": closing_tag_inside,
    "tags": teacher_sure_of_tags,
    "tags_left_out": teacher_sure_of_tags,
}


def verdict(stopped: Outcome, warned: Outcome) -> str:
    """Whether there was a collapse, and whether it was caught in time."""
    if warned.last >= warned.best_before / 2:
        return "no collapse"
    in_time = stopped.alarm is not None and stopped.at_alarm >= stopped.best_before / 2
    return "caught" if in_time and stopped.kept else "MISSED"


def cold_start(scenario: str, root: Path) -> str:
    """The model that a scenario starts from; a finished one is not made again."""
    options = COLD_STARTS.get(scenario, ())
    config, name = str(CONFIGS / "quickstart_cold_start.yaml"), "cold_start" + (f"_{scenario}" if options else "")
    main(("supervise", "--config", config, "--run.root", str(root), "--run.name", name, *QUIET, *options))
    model = root / name / "model"
    if not model.is_dir():
        raise SystemExit(f"{config} left no model in {model}")
    return str(model)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--root", type=Path, default=Path("runs/planted"))
    parser.add_argument("--scenarios", choices=[*SCENARIOS], nargs="+", default=[*SCENARIOS])
    return parser.parse_args()


if __name__ == "__main__":
    options = _parse()
    rows = []
    for scenario in options.scenarios:
        start = cold_start(scenario, options.root)
        for seed in options.seeds:
            rows.append((scenario, seed, *(run(scenario, seed, a, start, options.root) for a in ("stop", "warn"))))
    print(f"{'scenario':13} seed  alarm  best EM before  EM at alarm  EM without a stop  best.ckpt  verdict")
    for scenario, seed, stopped, warned in rows:
        print(
            f"{scenario:13} {seed:4}  {stopped.alarm!s:>5}  {stopped.best_before:14.3f}  {stopped.at_alarm:11.3f}  "
            f"{warned.last:17.3f}  {'kept' if stopped.kept else '-':9}  {verdict(stopped, warned)}"
        )
    sys.exit(any(verdict(stopped, warned) == "MISSED" for *_, stopped, warned in rows))
