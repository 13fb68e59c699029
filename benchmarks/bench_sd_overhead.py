"""What self-distillation costs: the teacher's pass, and a whole step with it against one without.

A naive teacher reads the hindsight block and the whole of every rollout, left-padded under a mask, and computes all
logits. Ours reads each prompt and block once, ends at a rollout's last query token, leaves out rollouts without a query
and computes the logits of query tokens alone. Both give the same rows first.

The teacher is compared with the policy's forward and backward pass in two forms: the left-padded one of
bench_train_step, as cost shares are usually given, and our own, which costs less and so makes the same teacher more.

    python -m benchmarks.bench_sd_overhead [--device cuda] [--parts teacher step]
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

from benchmarks.harness import Bar, Report, Timing, compare, pin_threads

pin_threads()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.bench_train_step import (  # noqa: E402
    CASES,
    Case,
    LeftPadded,
    backward,
    left_pad,
    make_batch,
    make_group,
    make_model,
    make_module,
    student_loss,
)
from benchmarks.workload import Workload, make_workload, run  # noqa: E402
from sdsearch_lightning.losses.terms import total_loss  # noqa: E402
from sdsearch_lightning.module import SDSearchModule  # noqa: E402
from sdsearch_lightning.policy.packing import PackedSequences  # noqa: E402
from sdsearch_lightning.rollout import SlotEngine  # noqa: E402
from sdsearch_lightning.step.collate import SearchBatch, TeacherPrompt, collate, split_groups, weigh  # noqa: E402
from sdsearch_lightning.step.teacher_rows import TeacherRows, summarize_teacher  # noqa: E402
from sdsearch_lightning.types import HindsightBlock, RolloutGroup, Trajectory  # noqa: E402

GROUPS = {8: CASES["tiny"], 5: replace(CASES["tiny"], lengths=(174, 420, 480, 675, 875))}
"""By their size."""
SHARE_BAR, NAIVE_BAR, STEP_BAR = 0.15, 3.0, 1.10
"""Teacher over the policy's pass and naive teacher over ours; step with the teacher over step without."""
TOLERANCE = 1e-5
JSD_WEIGHT = 0.1
MAX_TOKENS = 32_768


def block_prompt(group_size: int, vocabulary: int) -> TeacherPrompt:
    """A prompt and a block of as many tokens as the queries and outcomes of a group take: 60, and 32 per rollout."""
    block = tuple(random.Random(group_size).choices(range(1, vocabulary), k=60 + 32 * group_size))

    def prompt(trajectory: Trajectory, block_text: str) -> Sequence[int]:
        return trajectory.spans[0].token_ids + block

    return prompt


class NaiveTeacher:
    """Whole rollouts behind the block, left-padded, all logits.

    Args:
        module: gives the model and what is kept of its rows.
        batch: with uncut teacher's sequences.
    """

    def __init__(self, module: SDSearchModule, batch: SearchBatch) -> None:
        self.module = module
        sequences, query = batch.teacher, batch.teacher_query_row
        assert isinstance(sequences, PackedSequences) and query is not None
        self.inputs, column = left_pad(sequences)
        self.row, self.column, self.tokens = sequences.sequence_index[query], column[query], sequences.token_ids[query]

    @torch.no_grad()
    def __call__(self) -> TeacherRows:
        """The rows at query tokens."""
        logits = self.module.policy.model(**self.inputs, use_cache=False).logits[self.row, self.column - 1]
        return summarize_teacher(
            logits, logits, self.tokens, self.module.divergence.teacher_top_k, self.module.controls
        )


def distilled_loss(module: SDSearchModule, batch: SearchBatch, teacher: TeacherRows | None = None) -> Tensor:
    """Loss of a micro-batch with its JSD.

    Args:
        module: with its weight of the JSD.
        batch: with the teacher's side.
        teacher: its rows; None lets it read.
    """
    sums = module.student_step(batch, teacher or module.teacher_step(batch))
    return total_loss(sums.terms, module.policy_terms.coefficients(module.jsd_weight))


def compare_teachers(report: Report, options: argparse.Namespace, group_size: int, case: Case) -> None:
    """The teacher's pass of one group against the naive one, and as a share of the policy's pass."""
    model = make_model("tiny", options.device)
    module, vocabulary = make_module(model, "shared_prefix"), model.config.vocab_size
    module.to(options.device).jsd_weight = JSD_WEIGHT
    group, prompt = make_group(case, vocabulary), block_prompt(group_size, vocabulary)
    batch, whole = (
        make_batch([group], case.dtype, prompt, cut_teacher=cut).to(options.device) for cut in (True, False)
    )
    naive, ours = NaiveTeacher(module, whole), partial(module.teacher_step, batch)
    rows, expected = ours(), naive()
    assert rows.logits is not None and expected.logits is not None
    pairs = ((rows.logits, expected.logits), (rows.logprob, expected.logprob), (rows.entropy, expected.entropy))
    error = max(float((mine - other).norm() / other.norm()) for mine, other in pairs)
    name = f"teacher, G = {group_size}"
    report.add(name, Bar.counted("error of rows", error, at_most=TOLERANCE), "equality with the naive teacher")

    alone = replace(batch, query_row=batch.query_row[:0], query_weight=batch.query_weight[:0])
    variants: dict[str, Callable[[], object]] = {
        "naive": naive,
        "ours": ours,
        "left-padded step": partial(backward, model, LeftPadded(model, alone, all_logits=False).loss),
        "our step": partial(backward, model, partial(student_loss, module, alone)),
        "our step with JSD": partial(backward, model, partial(distilled_loss, module, batch, rows)),
    }

    def measure() -> list[Bar]:
        timings = compare(variants, options.repetitions, warmup=1, device=options.device)
        say(name, timings)
        step, padded, teacher = timings["our step"], timings["left-padded step"], timings["ours"]
        return [
            Bar.of("naive / ours", timings["naive"], teacher, at_least=NAIVE_BAR),
            Bar.of("ours / left-padded step", teacher, padded, at_most=SHARE_BAR),
            Bar.of("naive / left-padded step", timings["naive"], padded),
            Bar.of("ours / our step", teacher, step),
            Bar.of("our step with JSD / without", timings["our step with JSD"], step),
        ]

    add(report, name, measure)


class Step:
    """Rollouts of a workload and the gradients of one update on them, by the library; no update, so all are equal.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.model = make_model("tiny", options.device)
        self.module = make_module(self.model, "shared_prefix").to(options.device)
        self.engine, self.device = SlotEngine(), options.device
        vocabulary = self.model.config.vocab_size
        self.workload: Workload = make_workload(options.questions, options.group_size, vocabulary)
        self.prompt = block_prompt(options.group_size, vocabulary)

    def run(self, jsd_weight: float) -> None:
        """One step; weight 0 leaves the teacher out."""
        self.module.jsd_weight = jsd_weight
        self.model.zero_grad(set_to_none=True)
        groups = self._sample()
        blocks = [HindsightBlock(group.instance_id, (), "block") if jsd_weight else None for group in groups]
        weighed = weigh(groups, blocks, self.module.aggregation)
        for rollouts in split_groups(weighed, MAX_TOKENS, self.module.policy.layout.size):
            batch = collate(rollouts, self.prompt if jsd_weight else None)
            batch = replace(batch, on_policy=True).to(self.device)
            loss = distilled_loss if batch.teacher is not None else student_loss
            loss(self.module, batch).backward()

    def _sample(self) -> list[RolloutGroup]:
        trajectories = run(self.engine, self.module.policy, self.workload)
        rewarded = [replace(t, advantage=(-1.0) ** t.rollout_index) for t in trajectories]
        rewarded.sort(key=lambda trajectory: (trajectory.instance_id, trajectory.rollout_index))
        groups = groupby(rewarded, key=lambda trajectory: (trajectory.question, trajectory.instance_id))
        return [RolloutGroup(*key, tuple(members)) for key, members in groups]


def compare_steps(report: Report, options: argparse.Namespace) -> None:
    """A step with the JSD over one without."""
    step = Step(options)
    variants = {"without": partial(step.run, 0.0), "with": partial(step.run, JSD_WEIGHT)}

    def measure() -> list[Bar]:
        timings = compare(variants, options.repetitions, warmup=1, device=options.device)
        say("step", timings)
        return [Bar.of("with JSD / without", timings["with"], timings["without"], at_most=STEP_BAR)]

    add(report, "step", measure)


def add(report: Report, name: str, measure: Callable[[], list[Bar]]) -> None:
    """Adds what was measured; a second measurement where a bar was missed."""
    bars = measure()
    if not all(bar.is_met for bar in bars):
        bars = measure()
    for bar in bars:
        report.add(name, bar)


def say(name: str, timings: dict[str, Timing]) -> None:
    """Prints the samples: for a reader of the log, never a result."""
    for variant, timing in timings.items():
        print(f"{name:16} {variant:20} s: {' '.join(f'{sample:.3f}' for sample in timing.samples)}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts asked for; the exit code is 1 where a bar was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_sd_overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--questions", type=int, default=2, help="of a step")
    parser.add_argument("--group-size", type=int, default=8, help="of a step")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=("teacher", "step"), default=["teacher", "step"])
    options = parser.parse_args(argv)
    report = Report("bench_sd_overhead", vars(options))
    if "teacher" in options.parts:
        for group_size, case in GROUPS.items():
            compare_teachers(report, options, group_size, case)
    if "step" in options.parts:
        compare_steps(report, options)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
