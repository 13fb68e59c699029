"""SDSearchModule: the policy as student and as its own teacher, and one training step on a batch of rollout groups.

    L = L_GRPO + weight * L_SD + kl_coef * KL to the initial policy                          (arXiv:2605.18299)

The callbacks have filled the batch by now (rollouts, blocks) and set `jsd_weight`. What is left: weigh every token from
global counts, split into micro-batches, let the teacher read (no gradient), let the student learn, step.

Next: losses/terms.py, the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.losses.divergences import Divergence, JensenShannon
from sdsearch_lightning.losses.teacher_use import Distillation, TeacherUse
from sdsearch_lightning.losses.terms import total_loss
from sdsearch_lightning.losses.weights import AggregationMode, EntropyCoefs, token_weights
from sdsearch_lightning.policy.head import Chunk, Outcome, Reading
from sdsearch_lightning.policy.loading import disable_dropout
from sdsearch_lightning.policy.lora import Reference
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.policy.teachers import LiveTeacher, Teacher
from sdsearch_lightning.rollout.groups import GroupSampler
from sdsearch_lightning.step.collate import (
    SearchBatch,
    WeightedRollout,
    collate,
    filler,
    split_groups,
    weigh,
    with_idle_teacher,
)
from sdsearch_lightning.step.control_tokens import ControlTokens
from sdsearch_lightning.step.credit import Credits, credit_rollouts, credit_table
from sdsearch_lightning.step.metrics import StepTally
from sdsearch_lightning.step.old_logprobs import OldLogprobs, read_logprobs, with_old_logprobs
from sdsearch_lightning.step.policy_terms import PolicyTerms
from sdsearch_lightning.step.student import StepSums as StepSums, Student
from sdsearch_lightning.step.taught_spans import Positions
from sdsearch_lightning.step.teacher_rows import TeacherRows, join, summarize_teacher, with_contrast
from sdsearch_lightning.step.token_advantages import CreditPlacement
from sdsearch_lightning.training.evaluation_steps import EvaluationSteps
from sdsearch_lightning.training.options import OptimizerSpec, adamw
from sdsearch_lightning.training.policy_module import PolicyModule
from sdsearch_lightning.types import HindsightBlock, InstanceId, RolloutGroup, StepBatch, Trajectory


@dataclass(frozen=True, slots=True)
class _MicroBatch:
    rollouts: Sequence[WeightedRollout]
    batch: SearchBatch


class SDSearchModule(EvaluationSteps, PolicyModule):
    """SD-Search: GRPO on whole rollouts plus hindsight self-distillation at query tokens.

    Args:
        optimizer: of all parameters: a class of torch.optim without the parameters.
        divergence: distance of student and teacher at query tokens: the self-distillation loss.
        teacher: whose weights the teacher has: the policy's own at that moment (LiveTeacher, the paper), or a copy's.
        teacher_use: what its verdict on a taught token is used for: the divergence alone (Distillation, the paper), the
            size of the token's advantage (RLSD, CAST, RLCSD), or a gate on the divergence (SDAR).
        positions: tokens where student and teacher are compared: queries (the paper), or policy, all that it wrote.
        exclude_tags: leave tokens that begin a tag, end a turn or are special out of the divergence at queries, where
            none may be written, and renormalise both sides. false: the paper's letter, with which runs collapsed.
        policy_coef: weight of the policy-gradient loss; 0 distils only.
        entropy_coef: weight of the entropy at each kind of token; a bonus above 0, a penalty below.
        tis_cap: cap of truncated importance sampling, on the ratio of the policy's probability of a token to the
            engine's; null leaves it out.
        clip_low: the policy ratio is clipped below 1 - clip_low.
        clip_high: the policy ratio is clipped above 1 + clip_high.
        kl_coef: weight of the k3 estimate of the KL to the initial policy. Above 0 a frozen copy is kept, unless
            model.lora is used; 0 keeps none.
        aggregation: how the policy loss is a mean over tokens: token-mean over all tokens of the step,
            seq-mean-token-mean over each rollout's tokens and then over rollouts, seq-mean-token-sum-norm the rollout's
            sum divided by aggregation_norm.
        aggregation_norm: tokens that a rollout's sum is divided by in seq-mean-token-sum-norm, which requires it; null
            for the other two.
        temperature: of the rollouts; log-probs in the loss are taken at it. Linked to rollout.temperature.
        num_updates: optimizer steps per rollout batch, each on its own share of the groups.
        old_logprobs: what the ratio of later updates is taken against: the engine's own log-probs (`engine`), or those
            of a pass of the trainer before the first update (`trainer`, as verl does). With tis_cap always the latter.
        args: model_name_or_path, where it is not given by name.
        options: those of `PolicyModule`.
    """

    environment_ids: Tensor
    policy_tag_ids: Tensor

    def __init__(
        self,
        *args: Any,
        optimizer: OptimizerCallable = adamw,
        divergence: Divergence = JensenShannon(),  # noqa: B008  (stateless)
        teacher: Teacher = LiveTeacher(),  # noqa: B008  (attached anew by each run)
        teacher_use: TeacherUse = Distillation(),  # noqa: B008  (stateless)
        positions: Positions = "queries",
        exclude_tags: bool = True,
        policy_coef: float = 1.0,
        entropy_coef: EntropyCoefs = EntropyCoefs(),  # noqa: B008  (frozen)
        tis_cap: float | None = None,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        kl_coef: float = 1e-3,
        aggregation: AggregationMode = "token-mean",
        aggregation_norm: float | None = None,
        temperature: float = 1.0,
        num_updates: int = 1,
        old_logprobs: Literal["engine", "trainer"] = "engine",
        **options: Any,
    ) -> None:
        super().__init__(*args, optimizers=[OptimizerSpec(optimizer)], **options)
        if num_updates < 1:
            raise ConfigError(f"model.num_updates: expected at least 1, found {num_updates}.")
        # An impossible aggregation is refused here, not in the first step.
        token_weights(torch.zeros(1, 1, dtype=torch.bool), aggregation, aggregation_norm)
        self.divergence, self.teacher = Divergence.adopt(divergence), Teacher.adopt(teacher)
        self.teacher_use, self.positions, self.exclude_tags = TeacherUse.adopt(teacher_use), positions, exclude_tags
        self.policy_terms = PolicyTerms(clip_low, clip_high, policy_coef, kl_coef, entropy_coef, tis_cap, temperature)
        self.aggregation, self.aggregation_norm, self.num_updates = aggregation, aggregation_norm, num_updates
        self._needs_old_logprobs = num_updates > 1 and (old_logprobs == "trainer" or tis_cap is not None)
        self.jsd_weight = 0.0
        """Weight of the JSD loss; JSDWeightScheduler sets it before each step. At 0 there is no teacher at all."""
        self.credit = CreditPlacement()
        """How the credit of a search reaches its tokens; CreditWeightScheduler sets it before each step."""
        self.reference: Policy | Reference | None = None  # both copies are made in `attach`
        self.teacher_policy: Policy | None = None
        self.sampler: GroupSampler | None = None
        """What runs rollouts with the present weights; RolloutGrouping sets it, see `rollout.groups`."""
        self._remade = ("reference.",) if self.teacher.in_checkpoint else ("reference.", "teacher_policy.")

    def is_saved(self, name: str) -> bool:
        """See `PolicyModule.is_saved`; copies of the initial model are made again."""
        return super().is_saved(name) and not name.startswith(self._remade)

    def attach(self, model: Any, tokenizer: Any) -> None:
        """See `PolicyModule.attach`; also turns dropout off and freezes the reference where there is one."""
        disable_dropout(model)
        super().attach(model, tokenizer)
        steering = self.codec.steering_ids(self.protocol.tags, self.protocol.documents_tag)
        for name, ids in zip(("environment_ids", "policy_tag_ids"), steering, strict=True):
            self.register_buffer(name, torch.tensor(ids, dtype=torch.long), persistent=False)
        if self.policy_terms.kl_coef > 0:
            # Adapters switched off are the initial policy: it takes no copy.
            self.reference = (
                Reference(self.policy, self.lora) if self.lora else deepcopy(self.policy).requires_grad_(False)
            )
        self.teacher_policy = self.teacher.attach(self.policy)
        self.divergence.check(len(tokenizer))

    @property
    def controls(self) -> ControlTokens:
        """Tokens that steer a rollout, on the module's device."""
        if self.positions == "queries":
            return ControlTokens(self.environment_ids, self.policy_tag_ids, self.exclude_tags)
        return ControlTokens(self.environment_ids, self.policy_tag_ids[:0], False)  # tags are learnt there

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """All updates of one rollout batch; logs, and writes `batch.credit`."""
        groups: tuple[RolloutGroup, ...] = batch.require("groups", by="SDSearchModule.training_step")
        blocks: Sequence[HindsightBlock | None] = [None] * len(groups)
        if self.jsd_weight > 0:
            blocks = batch.require("hindsight", by="SDSearchModule.training_step")
        if len(groups) < self.num_updates:
            raise ConfigError(
                f"model.num_updates is {self.num_updates}, but the batch holds {len(groups)} questions: each update "
                "needs one. Raise data.batch_size or lower model.num_updates."
            )
        tally, credits = StepTally(), Credits()
        learning_rate = self.learning_rate  # of this step: the schedule moves on with its last update
        self.teacher.begin_batch(self.policy)
        known = self.policy_logprobs(groups) if self._needs_old_logprobs else None
        for update in range(self.num_updates):
            share = slice(*(len(groups) * i // self.num_updates for i in (update, update + 1)))
            micro_batches = self.micro_batches(groups[share], blocks[share], update == 0, known)
            self.backward_all(micro_batches, lambda micro: self._loss(micro, tally, credits))
            done = self.clock.timed("optimizer", self.apply_gradients, update == self.num_updates - 1)
            if tally.count(done.norm, done.ratio):
                self.teacher.after_update(self.policy)
        for copy in (self.reference, self.teacher_policy):
            if isinstance(copy, Policy):
                copy.reshard()
        batch.skipped_updates = tally.skipped
        batch.credit = credit_table(groups, credits)
        self._log_step(tally, blocks, learning_rate)

    def micro_batches(
        self,
        groups: Sequence[RolloutGroup],
        blocks: Sequence[HindsightBlock | None],
        on_policy: bool,
        old_logprobs: OldLogprobs | None = None,
    ) -> list[_MicroBatch]:
        """One update's micro-batches, as many on every rank: weights first, from global counts, then the split.

        Args:
            groups: of the update.
            blocks: one per group; None = not taught.
            on_policy: whether the policy is still the one that sampled.
            old_logprobs: from `policy_logprobs`, where the update needs them.
        """
        several, dtype = self.trainer.world_size > 1, self.policy.dtype
        weighed = weigh(
            groups,
            blocks,
            self.aggregation,
            self.aggregation_norm,
            self.sum_over_ranks if several else None,
            self.positions,
            dtype,
        )
        if old_logprobs is not None:
            weighed = with_old_logprobs(weighed, old_logprobs)
        parts = split_groups(weighed, self.max_micro_batch_tokens, self.policy.layout.size)
        batches = [_MicroBatch(part, replace(self.collate(part), on_policy=on_policy)) for part in parts]
        batches = self.equalize(batches, _MicroBatch((), filler(dtype)))
        if self.policy.is_sharded and self.jsd_weight > 0:
            batches = [_MicroBatch(micro.rollouts, with_idle_teacher(micro.batch)) for micro in batches]
        return [_MicroBatch(micro.rollouts, micro.batch.to(self.device)) for micro in batches]

    def policy_logprobs(self, groups: Sequence[RolloutGroup]) -> OldLogprobs:
        """Log-probs of the rollouts' tokens under the present policy, at the temperature of the rollouts."""
        micro_batches = self.micro_batches(groups, [None] * len(groups), on_policy=True)
        found: dict[tuple[InstanceId, int], Tensor] = {}
        for micro in micro_batches:
            found |= read_logprobs(self.policy, micro.batch, micro.rollouts, self.policy_terms.temperature)
        return found

    def collate(self, rollouts: Sequence[WeightedRollout]) -> SearchBatch:
        """One micro-batch; the teacher's side is left out while the JSD weighs nothing."""
        prompt = self.teacher_prompt if self.jsd_weight > 0 else None
        cut, dtype = self.policy.layout.cuts_teacher, self.policy.dtype
        return collate(rollouts, prompt, self.positions, dtype, cut, self.credit)

    def teacher_prompt(self, trajectory: Trajectory, block_text: str) -> Sequence[int]:
        """Token ids of the trajectory's prompt with a hindsight block."""
        return self.protocol.prompt_ids(self.codec, trajectory.question.text, block_text)

    def _loss(self, micro: _MicroBatch, tally: StepTally, credits: Credits) -> Tensor:
        """The micro-batch's share of the loss; adds its sums to `tally` and its verdicts to `credits`."""
        batch = micro.batch
        teacher = None if batch.teacher is None else self.clock.timed("teacher", self.teacher_step, batch)
        sums = self.student_step(batch, teacher)
        loss = total_loss(sums.terms, self.policy_terms.coefficients(self.jsd_weight))
        tally.add({"loss": loss, **sums.terms._asdict(), **sums.metrics})
        if sums.credit is not None:
            tally.jsd.append(sums.credit.jsd)
            credits |= credit_rollouts(micro.rollouts, batch.taught, sums.credit)
        return loss

    @torch.no_grad()
    def teacher_step(self, batch: SearchBatch) -> TeacherRows:
        """The teacher reading the hindsight block, at the JSD positions of `batch`; no gradient.

        Args:
            batch: with its teacher's side.
        """
        assert batch.teacher is not None, "the batch has no teacher's side"
        tokens = batch.teacher.token_ids[batch.teacher_rows]
        top_k, controls = self.divergence.teacher_top_k, self.controls

        def read(chunk: Chunk) -> tuple[Tensor, TeacherRows]:
            rows = summarize_teacher(chunk.logits, chunk.hidden, tokens[chunk.rows], top_k, controls)
            return chunk.logits.new_zeros(0), rows

        outcome: Outcome = self.teacher.policy(self.policy)(batch.teacher, [Reading(batch.teacher_rows, read)])
        return with_contrast(join(outcome.kept[0]), len(batch.query_row))

    def student_step(self, batch: SearchBatch, teacher: TeacherRows | None = None) -> StepSums:
        """All terms of one micro-batch from one forward pass.

        Args:
            batch: with `query_row` aligned to `teacher`.
            teacher: from `teacher_step`; None leaves the JSD out.

        Returns:
            Sums with all weights applied; each term is to be minimised.
        """
        source = self.teacher.policy(self.policy)
        project = None if source is self.policy else source.project
        student = Student(batch, self.policy_terms, self.divergence, self.teacher_use, teacher, self.controls, project)
        return student.step(self.policy, self.jsd_weight, self.reference)

    def _log_step(self, tally: StepTally, blocks: Sequence[HindsightBlock | None], learning_rate: float) -> None:
        means = tally.means(self.num_updates, self.controls.measured, self.sum_over_ranks) | {
            "train/lr": learning_rate,
            "distill/weight": self.jsd_weight,
            "distill/groups": float(sum(block is not None for block in blocks)),
            "distill/effective_weight": self.jsd_weight * sum(b.weight for b in blocks if b) / len(blocks),
        }
        self.log_dict(means | self.clock.take(), batch_size=len(blocks))
