"""RolloutGrouping: from a batch of questions to groups of scored rollouts.

Before each training step the current policy runs G rollouts per question; each gets its reward, its label and its
advantage relative to its group. Evaluation runs one greedy rollout per question, and sampled ones on request.

Next: rollout/window.py, the engine; then callbacks/hindsight_construction.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from sdsearch_lightning.errors import ConfigError, RolloutError
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.retrieval import check_retriever
from sdsearch_lightning.rollout import Engine, SearchPool, SlotEngine
from sdsearch_lightning.rollout.groups import GroupSampler, WindowResult
from sdsearch_lightning.rollout.metrics import rollout_metrics, window_metrics, window_totals
from sdsearch_lightning.scoring import policy_credit  # noqa: F401  (short names in YAML)
from sdsearch_lightning.scoring.advantages import AdvantageScale
from sdsearch_lightning.scoring.query_credit import CreditScale, QueryCredit
from sdsearch_lightning.scoring.rewards import AutoRefineReward, F1LabelRule, LabelRule, Reward
from sdsearch_lightning.scoring.scoring import Scoring
from sdsearch_lightning.training.fsdp2 import gathered
from sdsearch_lightning.types import Limits, RolloutRequest, Sampling, StepBatch, StopReason, Trajectory

GREEDY = Sampling(temperature=0.0)
FEW = 32
"""Rollouts without an action, before the policy is said to make none."""


class RolloutGrouping(pl.Callback):
    """Runs rollouts of each question and scores them: fills `StepBatch.groups`.

    Args:
        group_size: rollouts per question, G of the paper (5 there).
        temperature: sampling temperature of training rollouts, above 0; the losses use it too.
        top_p: nucleus of training rollouts; log-probs are recorded before the cut.
        top_k: passages that a search returns.
        max_searches: searches that a rollout may make, in training and evaluation; one more ends it.
        max_invalid_actions: invalid actions of a rollout that are answered with a message; one more ends it.
        max_turn_tokens: tokens that the policy may write in one turn; without a closed action by then the turn is an
            invalid action.
        max_observation_tokens: tokens that the passages of one search may take; the longest are cut to one length.
        max_tokens: tokens of a whole rollout: prompt, what the policy writes, and observations.
        eval_samples: sampled rollouts per question in evaluation, beside the greedy one.
        reward: scores a rollout; advantages are made of it.
        credit: gives each search a number of its own, which is added to the advantage of its tokens, see credit.weight;
            null: all tokens of a rollout have its advantage (GRPO).
        credit_scale: credit is standardised over the searches of the whole step, or of its group; none leaves it as it
            is.
        label: tells the hindsight block whether a rollout was CORRECT or INCORRECT, independent of the reward.
        advantage_scale: what advantages are divided by: std, the group's standard deviation (GRPO), or none (Dr. GRPO).
        engine: runs the rollouts. One with vLLM: sdsearch_lightning.rollout.vllm.VLLMEngine.
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
        credit: QueryCredit | None = None,
        credit_scale: CreditScale = "step",
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
        if refill_attempts < 0:
            raise ConfigError(f"rollout.refill_attempts: expected 0 or more, found {refill_attempts}.")
        self.group_size, self.eval_samples, self.seed = group_size, eval_samples, seed
        self.sampling, self.top_k = Sampling(temperature, top_p), top_k
        self.limits = Limits(max_searches, max_invalid_actions, max_turn_tokens, max_observation_tokens, max_tokens)
        self.scoring, self.engine = Scoring(reward, label, advantage_scale), Engine.adopt(engine)
        self.credit, self.credit_scale = credit and QueryCredit.adopt(credit), credit_scale
        self.refill_attempts, self.max_error_fraction = refill_attempts, max_error_fraction
        self._searches: SearchPool | None = None
        self._too_long: set[str] = set()
        self._last_error = ""
        self._is_proven = False  # that the engine samples from the policy
        self._is_told = False  # how a rollout begins
        self._is_advised = False  # whether the policy acts is known
        self._first_rollouts: list[Trajectory] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Warn of settings that cannot learn, refuse questions that earn no credit, and probe the retriever."""
        if stage == "fit" and self.group_size == 1:
            rank_zero_warn(
                "rollout.group_size is 1: a group of one has no advantage, so the policy gradient is zero and only "
                "KL and JSD train. Use 2 or more."
            )
        if (datamodule := getattr(trainer, "datamodule", None)) is None:
            raise ConfigError(
                "trainer: expected datamodule=SearchDataModule(...), which brings questions and the retriever, "
                "found a loader or nothing."
            )
        retriever = getattr(datamodule, "retriever", None)
        if retriever is None:
            raise ConfigError("data.retriever is empty: rollouts need something to search. Set it, or use a world.")
        if stage == "fit" and self.credit is not None and (asked := getattr(datamodule, "training_questions", None)):
            self.credit.check_questions(asked)
        check_retriever(retriever, self.top_k)
        if self._searches is None:
            self._searches = SearchPool(retriever, self.top_k)

    def teardown(self, trainer: pl.Trainer, pl_module: SDSearchModule, stage: str) -> None:  # type: ignore[override]
        """Stop the search worker, and forget the sampler that used it."""
        pl_module.sampler = None
        if self._searches is not None:
            self._searches.close()
            self._searches = None

    def sampler(self, trainer: pl.Trainer, module: SDSearchModule) -> GroupSampler:
        """What runs the rollouts of this trainer's module; the module keeps it, for whoever else wants to sample."""
        if module.sampler is None:
            assert self._searches is not None, "setup has run"

            @contextmanager
            def opened() -> Iterator[None]:
                with gathered(module.policy), trainer.precision_plugin.forward_context():
                    yield

            module.sampler = GroupSampler(
                module.policy,
                module.protocol,
                module.codec,
                self.engine,
                self._searches,
                self.scoring,
                self.limits,
                self.sampling,
                self.seed,
                opened,
                module.sum_over_ranks,
                self.credit,
                self.credit_scale,
            )
            if self.engine.draws and not self._is_proven:
                self._prove(module.sampler)
        return module.sampler

    def _tell_beginning(self, sampler: GroupSampler, request: RolloutRequest) -> None:
        """Show once what the model reads first, and what ends its turns: chat templates add more than one thinks."""
        ends = ", ".join(f"{sampler.codec.decode([token])} ({token})" for token in sampler.codec.eos_ids)
        prompt = sampler.codec.decode(request.prompt_ids)
        say = rank_zero_only(print)
        say(f"the first prompt, as the model reads it ({len(request.prompt_ids)} tokens):\n{prompt}", flush=True)
        say(f"a turn ends with a closing tag, or with {ends or 'its budget only'}", flush=True)
        self._is_told = True

    def _prove(self, sampler: GroupSampler) -> None:
        gap, reasons = sampler.prove_engine()
        self._is_proven = True
        if reasons:
            rank_zero_warn(
                f"rollout.engine: rollouts run in a slower way, for models of type "
                f"{sampler.policy.model.config.model_type!r}, since the faster one does not do: {reasons[0]}."
            )

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: SDSearchModule,  # type: ignore[override]
        batch: StepBatch,
        batch_idx: int,
    ) -> None:
        """Run, score and group the rollouts of a training batch."""
        sampler, step = self.sampler(trainer, pl_module), trainer.global_step
        requests = sampler.requests(batch.questions, batch.instance_ids, self.group_size, "train", step)
        window = self._run(trainer, sampler, requests)
        self._log_window(trainer, pl_module, window, len(requests))
        groups = self.scoring.groups(window.trajectories, self.group_size)
        if self.refill_attempts:
            pool, rank = trainer.datamodule.training_questions, trainer.global_rank  # type: ignore[attr-defined]
            groups = sampler.refill(groups, pool, pool.rows_per_epoch, self.refill_attempts, step, rank)
        batch.groups = sampler.credited(groups)
        group_metrics = rollout_metrics(batch.groups)
        pl_module.log_dict(group_metrics, batch_size=len(batch), sync_dist=trainer.world_size > 1)
        self._stop_if_broken(pl_module, window.trajectories)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: SDSearchModule,  # type: ignore[override]
        batch: StepBatch,
        batch_idx: int,
        *_: object,
    ) -> None:
        """Run greedy rollouts, and `eval_samples` sampled ones, with the same seeds in every evaluation."""
        self._evaluate(trainer, pl_module, batch)

    on_test_batch_start = on_validation_batch_start  # type: ignore[assignment]

    def on_predict_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: SDSearchModule,  # type: ignore[override]
        batch: StepBatch,
        batch_idx: int,
        *_: object,
    ) -> None:
        """As in evaluation; rollouts of a question without gold answers stay unscored."""
        self._evaluate(trainer, pl_module, batch, need_answers=False)

    def _evaluate(
        self, trainer: pl.Trainer, module: SDSearchModule, batch: StepBatch, need_answers: bool = True
    ) -> None:
        sampler, asked = self.sampler(trainer, module), (batch.questions, batch.instance_ids)
        greedy = sampler.requests(*asked, 1, "eval", sampling=GREEDY)
        drawn = sampler.requests(*asked, self.eval_samples, "eval")
        trajectories = self._run(trainer, sampler, [*greedy, *drawn], need_answers).trajectories
        batch.groups = self.scoring.groups(trajectories[: len(greedy)], 1, need_answers)
        if self.eval_samples:
            batch.sampled_groups = self.scoring.groups(trajectories[len(greedy) :], self.eval_samples, need_answers)

    def _run(
        self, trainer: pl.Trainer, sampler: GroupSampler, requests: Sequence[RolloutRequest], need_answers: bool = True
    ) -> WindowResult:
        """Run requests; tell of prompts that leave no room, and of searches that failed."""
        if requests and not self._is_told:
            if need_answers or requests[0].question.answers:
                self.scoring.probe(requests[0].question)
            self._tell_beginning(sampler, requests[0])
        self._warn_of_long_prompts(requests)
        window = sampler.run(requests, getattr(trainer.progress_bar_callback, "show_rollouts", None))
        if trainer.global_step == 0 and not (self._is_advised or trainer.testing or trainer.predicting):
            self._advise(window.trajectories)
        if window.searches.errors:
            counts, self._last_error = window.searches, window.searches.last_error
            rank_zero_info(f"{counts.errors} of {counts.queries} searches failed; the last one: {counts.last_error}")
        return window

    def _advise(self, rollouts: Sequence[Trajectory]) -> None:
        """Say what to do where the untrained policy never acts: all rewards will be equal, and nothing is learnt."""
        self._first_rollouts += [t for t in rollouts if any(t.policy_mask)]
        acts = StopReason.ANSWERED, StopReason.MAX_SEARCHES
        acted = [t for t in self._first_rollouts if t.queries or t.stop_reason in acts]
        if acted or len(self._first_rollouts) >= FEW:
            self._is_advised = True
        if not acted and self._is_advised:
            rank_zero_warn(
                f"None of the first {len(self._first_rollouts)} rollouts holds a search or an answer, so rewards will "
                "not differ and nothing is learnt. Teach the protocol first: `sdsearch supervise`, the cold start."
            )
        if self._is_advised:
            self._first_rollouts = []

    def _warn_of_long_prompts(self, requests: Sequence[RolloutRequest]) -> None:
        for request in requests:
            name, length = request.question.id, len(request.prompt_ids)
            if length >= self.limits.max_tokens and name not in self._too_long:
                self._too_long.add(name)
                rank_zero_warn(
                    f"Question {name}: its prompt has {length} tokens, rollout.max_tokens allows "
                    f"{self.limits.max_tokens} for a whole rollout. Its rollouts end as MAX_TOKENS without a token."
                )

    @staticmethod
    def _log_window(trainer: pl.Trainer, module: SDSearchModule, window: WindowResult, size: int) -> None:
        several = trainer.world_size > 1
        module.log_dict(window_metrics(window.progress, window.searches), batch_size=size, sync_dist=several)
        totals = window_totals(window.progress, window.searches)
        module.log_dict(totals, batch_size=size, sync_dist=several, reduce_fx="sum" if several else "mean")

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
