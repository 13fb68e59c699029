"""TeacherDiagnostics: is the teacher better than the student, where, and how hard does each term pull?

Each figure costs rollouts or passes of its own, so nothing is measured unless this callback is in `trainer.callbacks`.
It runs after the step, on the step's groups, and changes neither weights nor random numbers of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
import torch

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.hindsight import LeaveOneOut, QueriesAndLabels
from sdsearch_lightning.losses.logprobs import at_tokens, log_softmax
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.policy.packing import PackedSequences
from sdsearch_lightning.rollout.sampling import derive_seed
from sdsearch_lightning.scoring.rewards import exact_match
from sdsearch_lightning.step.collate import collate, split_groups, weigh
from sdsearch_lightning.training.fsdp2 import gathered
from sdsearch_lightning.types import (
    HindsightBlock,
    Label,
    RolloutGroup,
    RolloutRequest,
    SpanKind,
    StepBatch,
)

METRICS = (
    "teacher/student_em_mixed",
    "teacher/teacher_em_mixed",
    "teacher/student_em_no_correct",
    "teacher/teacher_em_no_correct",
    "teacher/logprob_with_own",
    "teacher/logprob_without_own",
    "teacher/best_query_student",
    "teacher/best_query_teacher",
    "teacher/grad_norm_policy",
    "teacher/grad_norm_jsd",
)


class TeacherDiagnostics(pl.Callback):
    """Logs `teacher/*` every few steps.

    Args:
        every_n_steps: of the training steps, the first one included.
        sample: let the teacher itself answer, one sampled rollout per group with the block in its prompt, and the
            student with the same seed without it; apart for mixed groups and for groups without a CORRECT rollout,
            where a better teacher would mean a leak.
        own_rollout: the teacher's log-prob of the sampled query tokens with and without the taught rollout's own entry
            in the block: how much of it is copying.
        best_query: probability of the best first query, where the datamodule knows it, for student and teacher.
        gradient_norms: norm of each loss term's own gradient; two more forward and backward passes.
    """

    def __init__(
        self,
        every_n_steps: int = 10,
        sample: bool = True,
        own_rollout: bool = True,
        best_query: bool = True,
        gradient_norms: bool = True,
    ) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ConfigError(f"TeacherDiagnostics.every_n_steps: expected at least 1, found {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self._measures = [
            measure
            for wanted, measure in (
                (sample, self._sampled),
                (own_rollout, self._own_rollout),
                (best_query, self._best_query),
                (gradient_norms, self._gradient_norms),
            )
            if wanted
        ]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: SDSearchModule,  # type: ignore[override]
        outputs: Any,
        batch: StepBatch,
        batch_idx: int,
    ) -> None:
        """Measure on the groups of the step that just ended."""
        if (trainer.global_step - 1) % self.every_n_steps or batch.groups is None:
            return
        blocks = QueriesAndLabels().build(batch.groups, "all", pl_module.protocol, pl_module.codec)
        metrics: dict[str, float] = {}
        for measure in self._measures:
            metrics |= measure(trainer, pl_module, batch, blocks)
        if trainer.world_size > 1:
            metrics = _means_over_ranks(metrics, pl_module)
        pl_module.log_dict(metrics, batch_size=len(batch))

    def _sampled(
        self, trainer: pl.Trainer, module: SDSearchModule, batch: StepBatch, blocks: Sequence[HindsightBlock | None]
    ) -> Mapping[str, float]:
        sampler = module.sampler
        assert sampler is not None, "RolloutGrouping has run the step's rollouts"
        pairs = [(group, block) for group, block in zip(batch.groups or (), blocks, strict=True) if block is not None]
        requests = [
            RolloutRequest(
                group.question,
                group.instance_id,
                0,
                module.protocol.prompt_ids(module.codec, group.question.text, text),
                derive_seed(sampler.seed, "teacher", trainer.global_step, group.instance_id),
                sampler.sampling,
            )
            for group, block in pairs
            for text in ("", block.text)
        ]
        rollouts = sampler.run(requests).trajectories
        metrics = {}
        for name, chosen in (("mixed", _is_mixed), ("no_correct", _has_no_correct)):
            index = [i for i, (group, _) in enumerate(pairs) if chosen(group)]
            for who, offset in (("student", 0), ("teacher", 1)):
                if index:
                    metrics[f"teacher/{who}_em_{name}"] = fmean(
                        exact_match(t.answer, t.question.answers, t.question.normalization)
                        for t in (rollouts[2 * i + offset] for i in index)
                    )
        return metrics

    def _own_rollout(
        self, trainer: pl.Trainer, module: SDSearchModule, batch: StepBatch, blocks: Sequence[HindsightBlock | None]
    ) -> Mapping[str, float]:
        assert batch.groups is not None
        without = LeaveOneOut().build(batch.groups, "all", module.protocol, module.codec)
        with gathered(module.teacher.policy(module.policy)):
            found = {
                "teacher/logprob_with_own": _teacher_logprob(module, batch.groups, blocks),
                "teacher/logprob_without_own": _teacher_logprob(module, batch.groups, without),
            }
        return {name: value for name, value in found.items() if value is not None}

    def _best_query(
        self, trainer: pl.Trainer, module: SDSearchModule, batch: StepBatch, blocks: Sequence[HindsightBlock | None]
    ) -> Mapping[str, float]:
        best_query = trainer.datamodule.best_query  # type: ignore[attr-defined]
        masses: dict[str, list[float]] = {"teacher/best_query_student": [], "teacher/best_query_teacher": []}
        with gathered(module.policy):
            for group, block in zip(batch.groups or (), blocks, strict=True):
                if block is not None and (query := best_query(group.question)) is not None:
                    for mass, text in zip(masses.values(), ("", block.text), strict=True):
                        mass.append(first_query_probability(module, group, text, query))
        return {name: sum(mass) / len(mass) for name, mass in masses.items() if mass}

    def _gradient_norms(
        self, trainer: pl.Trainer, module: SDSearchModule, batch: StepBatch, blocks: Sequence[HindsightBlock | None]
    ) -> Mapping[str, float]:
        taught = batch.hindsight if batch.hindsight is not None and module.jsd_weight > 0 else [None] * len(batch)
        assert batch.groups is not None
        if module.policy.is_sharded:
            raise ConfigError(
                "TeacherDiagnostics.gradient_norms: under fsdp2 gradients exist as shards of their sum only. Set it "
                "false, or measure with ddp."
            )
        norms = gradient_norms(module, batch.groups, taught)
        return {"teacher/grad_norm_policy": norms["policy"], "teacher/grad_norm_jsd": norms["jsd"]}


def _means_over_ranks(metrics: Mapping[str, float], module: SDSearchModule) -> dict[str, float]:
    """Means over the ranks that measured something; all ranks call it, whatever they have."""
    rows = torch.tensor([[metrics.get(name, 0.0), float(name in metrics)] for name in METRICS], dtype=torch.float64)
    totals = module.sum_over_ranks(rows).tolist()
    return {name: total / count for name, (total, count) in zip(METRICS, totals, strict=True) if count}


def _is_mixed(group: RolloutGroup) -> bool:
    return group.is_mixed


def _has_no_correct(group: RolloutGroup) -> bool:
    return all(t.label is not Label.CORRECT for t in group.trajectories)


@torch.no_grad()
def _teacher_logprob(
    module: SDSearchModule, groups: Sequence[RolloutGroup], blocks: Sequence[HindsightBlock | None]
) -> float | None:
    """Mean log-prob that the teacher gives the sampled query tokens; None where no rollout searched."""
    weighed = weigh(groups, blocks, module.aggregation, module.aggregation_norm)
    values = []
    for rollouts in split_groups(weighed, module.max_micro_batch_tokens, module.policy.layout.size):
        micro = collate(rollouts, module.teacher_prompt, dtype=module.policy.dtype).to(module.device)
        if micro.teacher is not None:
            values.append(module.teacher_step(micro).logprob)
    return float(torch.cat(values).mean()) if values else None


@torch.no_grad()
def first_query_probability(module: SDSearchModule, group: RolloutGroup, block_text: str, query: str) -> float:
    """Mean probability, over the group's rollouts, of writing `query` where each began its first search.

    Args:
        module: student weights are used on both sides; the block makes the teacher.
        group: its rollouts.
        block_text: "" for the student.
        query: the best one; its tokens stand between the tags as the rollouts write them.
    """
    tokens = module.codec.encode_data(f" {query} ")
    prompt = module.protocol.prompt_ids(module.codec, group.question.text, block_text)
    rows = []
    for trajectory in group.trajectories:
        before: list[int] = []
        for span in trajectory.spans[1:]:
            if span.kind is SpanKind.QUERY:
                rows.append([*prompt, *before, *tokens])
                break
            before += span.token_ids
    if not rows:
        return 0.0
    packed = PackedSequences.pack(rows, module.device, prompt_lengths=[len(prompt)] * len(rows))
    ends = torch.tensor([len(row) for row in rows], device=module.device).cumsum(0)
    targets = torch.cat([torch.arange(int(end) - len(tokens), int(end), device=module.device) for end in ends])
    logprobs = at_tokens(log_softmax(module.policy.logits(packed, targets)), packed.token_ids[targets])
    return float(logprobs.view(len(rows), len(tokens)).sum(1).exp().mean())


def gradient_norms(
    module: SDSearchModule, groups: Sequence[RolloutGroup], blocks: Sequence[HindsightBlock | None]
) -> dict[str, float]:
    """Norm of each loss term's own gradient, coefficient and JSD weight applied; `.grad` is left alone.

    All ranks call it together; each reports the norm of its own share.
    """
    parameters = [p for p in module.policy.parameters() if p.requires_grad]
    norms = {}
    coefficients = module.policy_terms.coefficients(module.jsd_weight)
    for name, term in (("policy", "policy_loss"), ("jsd", "jsd_loss")):
        weight = getattr(coefficients, term)
        total = [torch.zeros_like(p) for p in parameters]
        for micro in module.micro_batches(groups, blocks, on_policy=True):
            teacher = module.teacher_step(micro.batch) if micro.batch.teacher is not None else None
            loss = getattr(module.student_step(micro.batch, teacher).terms, term)
            if loss.requires_grad:
                gradient = torch.autograd.grad(weight * loss, parameters, allow_unused=True)
                for mine, more in zip(total, gradient, strict=True):
                    mine.add_(more if more is not None else 0)
        norms[name] = float(torch.nn.utils.get_total_norm(total))
    return norms
