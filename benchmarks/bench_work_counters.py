"""Work that a training step does over work it has to do: pure counting, so a figure is the same on every machine.

    python -m benchmarks.bench_work_counters

A part of the library that has a figure adds its function to COUNTERS and its bounds to BARS.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.harness import Bar, Report, pin_threads

pin_threads()

import torch  # noqa: E402

from benchmarks.workload import ScriptedRetriever, Shape, make_policy, make_workload, run  # noqa: E402
from sdsearch_lightning.policy.policy import Policy  # noqa: E402
from sdsearch_lightning.rollout import Engine, SearchPool, SlotEngine  # noqa: E402

Bounds = tuple[float | None, float | None]
BARS: dict[str, Bounds] = {
    "prefill tokens / ideal": (None, 1.15),
    "decode rows / policy token": (None, 1.02),
    "steps / longest rollout": (None, 1.1),
    "queries sent / unique queries": (1.0, 1.0),
    "tokens fed / tokens counted": (1.0, 1.001),
}
"""At least, at most."""
BARS |= {
    f"{name}, G = {size}": bounds
    for size in (8, 5)
    for name, bounds in {
        "teacher tokens / tokens of the rollouts": (None, 0.5),
        "teacher tokens / tokens the student reads": (None, None),  # it shares prompts: its own saving raises this
        "head rows of the student / policy tokens": (1.0, 1.0),
        "head rows of the teacher / query tokens": (1.0, 1.0),
    }.items()
}


class TokensFed:
    """Counts the tokens that a policy's body really gets: a check of what the engine says of itself."""

    def __init__(self, policy: Policy) -> None:
        self.count = 0
        policy.model.get_decoder().register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, module: object, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.count += options["input_ids"].numel()


def count_rollouts(
    num_questions: int = 64, group_size: int = 8, engine: Engine | None = None, divide_by: int = 4
) -> dict[str, float]:
    """Work ratios of one window of rollouts.

    Args:
        num_questions: groups of rollouts.
        group_size: rollouts of each.
        engine: default: the slot engine with a slot for every rollout.
        divide_by: prompts, turns and documents are this many times shorter than those that are timed.
    """
    policy = make_policy("micro")
    workload = make_workload(
        num_questions, group_size, policy.model.config.vocab_size, shape=Shape().divided(divide_by)
    )
    retriever, fed = ScriptedRetriever(workload.documents), TokensFed(policy)
    engine = engine or SlotEngine(max_slots=len(workload.requests))
    trajectories = run(engine, policy, workload, SearchPool(retriever, top_k=1))
    counts = engine.take_counts()
    queries = {query for trajectory in trajectories for query in trajectory.queries}
    return {
        "prefill tokens / ideal": counts.prefill_tokens / workload.ideal_prefill,
        "decode rows / policy token": counts.decode_rows / workload.num_policy_tokens,
        "steps / longest rollout": counts.steps / workload.longest_policy_tokens,
        "queries sent / unique queries": retriever.num_queries / len(queries),
        "tokens fed / tokens counted": fed.count / (counts.prefill_tokens + counts.decode_rows),
    }


def count_training(group_size: int = 8) -> dict[str, float]:
    """Work ratios of one taught group's training step, after performance.md's shapes: tokens and rows.

    Args:
        group_size: 8, or 5 as in the paper.
    """
    from benchmarks.bench_sd_overhead import GROUPS, block_prompt
    from benchmarks.bench_train_step import make_batch, make_group, make_module

    model = make_policy("micro").model
    module, vocabulary = make_module(model, "shared_prefix"), model.config.vocab_size
    group = make_group(GROUPS[group_size], vocabulary)
    batch = make_batch([group], torch.float32, block_prompt(group_size, vocabulary))
    read: dict[str, list[int]] = {"tokens": [], "rows": []}
    body, head = model.get_decoder(), model.get_output_embeddings()
    hooks = [
        body.register_forward_pre_hook(
            lambda _, __, kw: read["tokens"].append(kw["input_ids"].numel()), with_kwargs=True
        ),
        head.register_forward_pre_hook(lambda _, inputs: read["rows"].append(len(inputs[0]))),
    ]
    module.jsd_weight = 1.0
    teacher = module.teacher_step(batch)
    (teacher_tokens,), teacher_rows = read["tokens"], sum(read["rows"])
    read["tokens"], read["rows"] = [], []
    module.student_step(batch, teacher)
    for hook in hooks:
        hook.remove()
    (student_tokens,), policy_rows = read["tokens"], int((batch.policy_weight != 0).sum())
    return {
        f"teacher tokens / tokens of the rollouts, G = {group_size}": teacher_tokens / len(batch.token_ids),
        f"teacher tokens / tokens the student reads, G = {group_size}": teacher_tokens / student_tokens,
        f"head rows of the student / policy tokens, G = {group_size}": sum(read["rows"]) / policy_rows,
        f"head rows of the teacher / query tokens, G = {group_size}": teacher_rows / len(batch.query_row),
    }


COUNTERS: tuple[Callable[[], dict[str, float]], ...] = (count_rollouts, count_training, partial(count_training, 5))


def main() -> int:
    """Counts everything; the exit code is 1 where a bar was missed."""
    report = Report("bench_work_counters")
    for count in COUNTERS:
        for name, ratio in count().items():
            report.add("rollouts" if count is count_rollouts else "training", Bar.counted(name, ratio, *BARS[name]))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
