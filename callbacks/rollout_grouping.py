"""RolloutGrouping: from a batch of questions to groups of scored rollouts.

Before each training step the current policy runs G rollouts per question; each gets its reward, its label and its
advantage relative to its group. Evaluation runs one greedy rollout per question, and sampled ones on request.

Next: rollout/ (the engine), then hindsight_construction.py.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from sdsearch_lightning.errors import ConfigError, RolloutError, SDSearchError
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.protocol.conversation import Conversation
from sdsearch_lightning.retrieval import check_retriever
from sdsearch_lightning.rollout import Engine, SearchPool, SlotEngine
from sdsearch_lightning.rollout.engine import run_awake
from sdsearch_lightning.rollout.metrics import rollout_metrics, window_metrics, window_totals
from sdsearch_lightning.rollout.progress import RolloutProgress
from sdsearch_lightning.rollout.sampling import derive_seed
from sdsearch_lightning.scoring.advantages import AdvantageScale, group_relative
from sdsearch_lightning.scoring.rewards import AutoRefineReward, F1LabelRule, LabelRule, Reward
from sdsearch_lightning.training.fsdp2 import gathered
from sdsearch_lightning.types import (
    Limits,
    RolloutGroup,
    RolloutRequest,
    Sampling,
    StepBatch,
    Trajectory,
)

GREEDY = Sampling(temperature=0.0)


class RolloutGrouping(pl.Callback):
    """Fills `StepBatch.groups`.

    Args:
        group_size: rollouts per question, G of the paper (5 there).
        temperature: of training rollouts.
        top_p: nucleus of training rollouts; log-probs are recorded before the cut.
        top_k: passages per search.
        max_searches: see `types.Limits`; the same in training and evaluation.
        max_invalid_actions: see there.
        max_turn_tokens: see there.
        max_observation_tokens: see there.
        max_tokens: see there.
        eval_samples: sampled rollouts per question in evaluation, beside the greedy one.
        reward: scores a trajectory.
        label: CORRECT or INCORRECT for the hindsight block, independent of the reward.
        advantage_scale: `std` (GRPO) or `none` (Dr. GRPO).
        engine: runs the rollouts.
        refill_attempts: how often groups whose rewards do not differ are replaced by groups of other training questions
            (dynamic sampling of DAPO, arXiv:2503.14476); what still has no signal after the last attempt stays.
        max_error_fraction: share of a step's rollouts that may end in a retrieval error before the run stops.
        seed: of all rollouts; linked to seed_everything.
    """

    def __init__(
        self,
        group_size: int = 5,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 3,
        max_searches: int = 5,
        max_invalid_actions: int = 2,
        max_turn_tokens: int = 512,
        max_observation_tokens: int = 512,
        max_tokens: int = 6656,
        eval_samples: int = 0,
        reward: Reward = AutoRefineReward(),  # noqa: B008  (stateless)
        label: LabelRule = F1LabelRule(),  # noqa: B008  (stateless)
        advantage_scale: AdvantageScale = "std",
        engine: Engine = SlotEngine(),  # noqa: B008  (attached anew by each run)
        refill_attempts: int = 0,
        max_error_fraction: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if group_size < 1 or top_k < 1:
            raise ConfigError(f"rollout: group_size and top_k have to be at least 1, found {group_size} and {top_k}.")
        if temperature <= 0:
            raise ConfigError(f"rollout.temperature: training samples, so it has to be above 0, found {temperature}.")
        if not 0 < top_p <= 1:
            raise ConfigError(f"rollout.top_p: expected above 0 and at most 1, found {top_p}.")
        self.group_size, self.eval_samples, self.seed = group_size, eval_samples, seed
        self.sampling, self.top_k = Sampling(temperature, top_p), top_k
        self.limits = Limits(max_searches, max_invalid_actions, max_turn_tokens, max_observation_tokens, max_tokens)
        self.reward, self.label, self.advantage_scale = reward, label, advantage_scale
        self.engine, self.max_error_fraction = engine, max_error_fraction
        if refill_attempts < 0:
            raise ConfigError(f"rollout.refill_attempts: expected 0 or more, found {refill_attempts}.")
        self.refill_attempts = refill_attempts
        self._searches: SearchPool | None = None
        self._too_long: set[str] = set()
        self._last_error = ""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Warn of settings that cannot learn, and probe the retriever."""
        if stage == "fit" and self.group_size == 1:
            rank_zero_warn(
                "rollout.group_size is 1: a group of one has no advantage, so the policy gradient is zero and only "
                "KL and JSD train. Use 2 or more."
            )
        retriever = getattr(getattr(trainer, "datamodule", None), "retriever", None)
        if retriever is None:
            raise ConfigError("data.retriever is empty: rollouts need something to search. Set it, or use a world.")
        check_retriever(retriever, self.top_k)
        if self._searches is None:
            self._searches = SearchPool(retriever, self.top_k)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop the search worker."""
        if self._searches is not None:
            self._searches.close()
            self._searches = None

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: SDSearchModule,  # type: ignore[override]
        batch: StepBatch,
        batch_idx: int,
    ) -> None:
        """Run, score and group the rollouts of a training batch."""
        requests = self._requests(pl_module, batch, self.group_size, self.sampling, "train", trainer.global_step)
        trajectories = self.run(trainer, pl_module, requests, log=True)
        batch.groups = self._refill(trainer, pl_module, batch, self._groups(trajectories, self.group_size))
        group_metrics = rollout_metrics(batch.groups)
        pl_module.log_dict(group_metrics, batch_size=len(batch), sync_dist=trainer.world_size > 1)
        self._stop_if_broken(pl_module, trajectories)

    def _refill(
        self, trainer: pl.Trainer, module: SDSearchModule, batch: StepBatch, groups: tuple[RolloutGroup, ...]
    ) -> tuple[RolloutGroup, ...]:
        """Replace groups without signal by groups of other training questions, drawn by a seed of this step.

        Their instance ids continue behind the positions of the epoch, so they meet no other.
        """
        filled = list(groups)
        for attempt in range(1, self.refill_attempts + 1):
            empty = [i for i, group in enumerate(filled) if not group.has_signal]
            if not int(module.sum_over_ranks(torch.tensor(len(empty)))):
                break  # on all ranks: rollouts are where they meet
            pool = trainer.datamodule.training_questions  # type: ignore[attr-defined]
            seed = derive_seed(self.seed, "refill", trainer.global_step, attempt, trainer.global_rank)
            drawn = random.Random(seed).sample(range(len(pool)), min(len(empty), len(pool)))
            length = getattr(pool, "rows_per_epoch", len(pool))  # files may have weights
            ids = [(epoch, position + attempt * length) for epoch, position in (batch.instance_ids[i] for i in empty)]
            more = StepBatch([pool[i] for i in drawn], ids[: len(drawn)])
            requests = self._requests(module, more, self.group_size, self.sampling, "train", trainer.global_step)
            for i, group in zip(
                empty, self._groups(self.run(trainer, module, requests), self.group_size), strict=False
            ):
                filled[i] = group
        return tuple(filled)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: SDSearchModule,  # type: ignore[override]
        batch: StepBatch,
        batch_idx: int,
        *_: object,
    ) -> None:
        """Run greedy rollouts, and `eval_samples` sampled ones, with the same seeds in every evaluation."""
        greedy = self._requests(pl_module, batch, 1, GREEDY, "eval")
        drawn = self._requests(pl_module, batch, self.eval_samples, self.sampling, "eval")
        trajectories = self.run(trainer, pl_module, [*greedy, *drawn])
        batch.groups = self._groups(trajectories[: len(greedy)], 1)
        if self.eval_samples:
            batch.sampled_groups = self._groups(trajectories[len(greedy) :], self.eval_samples)

    on_test_batch_start = on_validation_batch_start  # type: ignore[assignment]
    on_predict_batch_start = on_validation_batch_start  # type: ignore[assignment]

    def _requests(
        self, module: SDSearchModule, batch: StepBatch, count: int, sampling: Sampling, phase: str, step: int = 0
    ) -> list[RolloutRequest]:
        """`count` requests per question; each draws from a seed of its own, whatever it is batched with."""
        requests = []
        for question, instance_id in zip(batch.questions, batch.instance_ids, strict=True):
            prompt_ids = module.protocol.prompt_ids(module.codec, question.text)
            if len(prompt_ids) >= self.limits.max_tokens and question.id not in self._too_long:
                self._too_long.add(question.id)
                rank_zero_warn(
                    f"Question {question.id}: its prompt has {len(prompt_ids)} tokens, rollout.max_tokens allows "
                    f"{self.limits.max_tokens} for a whole rollout. Its rollouts end as MAX_TOKENS without a token."
                )
            seeds = (derive_seed(self.seed, phase, step, instance_id, index) for index in range(count))
            requests += [
                RolloutRequest(question, instance_id, index, prompt_ids, seed, sampling)
                for index, seed in enumerate(seeds)
            ]
        return requests

    def run(
        self, trainer: pl.Trainer, module: SDSearchModule, requests: Sequence[RolloutRequest], log: bool = False
    ) -> list[Trajectory]:
        """Run requests with the current policy; `log` adds the window's cost to the metrics."""
        assert self._searches is not None, "setup has run"
        progress = RolloutProgress(len(requests), trainer.is_global_zero and trainer.progress_bar_callback is not None)
        self.engine.attach(
            module.policy,
            lambda request: Conversation(request, module.protocol, module.codec, self.limits),
            self._searches,
            progress.report,
        )
        with (
            _rollout_window(module),
            gathered(module.policy),
            trainer.precision_plugin.forward_context(),
            closing(progress),
        ):
            trajectories = self._run_on_every_rank(module, requests)
        counts = self._searches.take_counts()
        if counts.errors:
            self._last_error = counts.last_error
            rank_zero_info(f"{counts.errors} of {counts.queries} searches failed; the last one: {counts.last_error}")
        if log:
            several, size = trainer.world_size > 1, len(requests)
            module.log_dict(window_metrics(progress, counts), batch_size=size, sync_dist=several)
            totals = window_totals(progress, counts)
            module.log_dict(totals, batch_size=size, sync_dist=several, reduce_fx="sum" if several else "mean")
        return trajectories

    def _run_on_every_rank(self, module: SDSearchModule, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
        """Run the engine; where it fails on one rank, stop on all, or the others would wait for it in the next step."""
        trajectories: list[Trajectory] = []
        failure: SDSearchError | None = None
        try:
            trajectories = run_awake(self.engine, module.policy, requests)
        except SDSearchError as error:
            failure = error
        failures = int(module.sum_over_ranks(torch.tensor(int(failure is not None))))
        if failure is not None:
            raise failure
        if failures:
            raise RolloutError(f"The rollouts failed on {failures} other ranks; their messages say why.")
        return trajectories

    def _groups(self, trajectories: Sequence[Trajectory], size: int) -> tuple[RolloutGroup, ...]:
        """Score rollouts and group them, `size` at a time as they were asked for."""
        chunks = [trajectories[start : start + size] for start in range(0, len(trajectories), size)]
        return tuple(self._group(chunk) for chunk in chunks)

    def _group(self, rollouts: Sequence[Trajectory]) -> RolloutGroup:
        """Rewards, labels and group-relative advantages of one question's rollouts.

        A rollout that ended in a retrieval error has no label and no part in the baseline: its advantage is 0.
        """
        rewards = [float(self.reward.score(rollout)) for rollout in rollouts]
        judged = [i for i, rollout in enumerate(rollouts) if not rollout.stop_reason.is_error]
        values = torch.tensor([[rewards[i] for i in judged]], dtype=torch.float64)
        advantages = dict(zip(judged, group_relative(values, self.advantage_scale)[0].tolist(), strict=True))
        scored = [
            replace(
                rollout,
                reward=rewards[i],
                advantage=advantages.get(i, 0.0),
                label=self.label.label(rollout) if i in advantages else None,
            )
            for i, rollout in enumerate(rollouts)
        ]
        return RolloutGroup(rollouts[0].question, rollouts[0].instance_id, tuple(scored))

    def _stop_if_broken(self, module: SDSearchModule, trajectories: Sequence[Trajectory]) -> None:
        """Stop every rank together where too many searches failed on all of them."""
        failed = sum(t.stop_reason.is_error for t in trajectories)
        failed, total = module.sum_over_ranks(torch.tensor([failed, len(trajectories)])).tolist()
        if failed > self.max_error_fraction * total:
            raise RolloutError(
                f"{failed} of {total} rollouts ended in a retrieval error; rollout.max_error_fraction allows "
                f"{self.max_error_fraction:.0%}. Last error: {self._last_error}. Check data.retriever, then run the "
                "same command again: it resumes from the last checkpoint."
            )


@contextmanager
def _rollout_window(module: SDSearchModule) -> Iterator[None]:
    """Eval mode without gradients for the rollouts, and back."""
    training = module.policy.training
    module.policy.eval()
    try:
        # Not inference_mode: its tensors cannot enter autograd later.
        with torch.no_grad():
            yield
    finally:
        module.policy.train(training)
