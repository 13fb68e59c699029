"""The switches of the method in a real fit: the guard, the refill, the teachers, the diagnostics."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from helpers.fits import DrawnScripts, Record, ToyData, fit
from helpers.models import tiny_model
from helpers.training import weights_of
from helpers.training_rollouts import DIRECT, ONE, TRAINING_PROTOCOL, TRAINING_QUESTION, TRAINING_TOKENIZER, TWO
from helpers.trajectories import query_mask
from sdsearch_lightning import SDSearchModule
from sdsearch_lightning.callbacks import (
    HindsightConstruction,
    JSDWeightScheduler,
    RolloutGrouping,
    TeacherDiagnostics,
    TrajectoryLog,
)
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.losses.divergences import LogitMSE
from sdsearch_lightning.policy.loading import ScratchModel
from sdsearch_lightning.policy.teachers import BatchStartTeacher, EMATeacher, FrozenTeacher, LiveTeacher
from sdsearch_lightning.report import read_trajectories
from sdsearch_lightning.rollout.groups import GroupSampler
from sdsearch_lightning.scoring.rewards import ExactMatchReward, F1LabelRule, Reward
from sdsearch_lightning.scoring.scoring import Scoring

SCORING = Scoring(ExactMatchReward(), F1LabelRule())


def module(**options):
    made = SDSearchModule(
        scratch=ScratchModel(),
        protocol=TRAINING_PROTOCOL,
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.05),
        **{"kl_coef": 0.0} | options,
    )
    made.attach(tiny_model(), TRAINING_TOKENIZER)
    return made


def grouping(*scripts, **options):
    defaults = {"group_size": 3, "top_k": 2, "max_tokens": 160, "reward": ExactMatchReward()}
    return RolloutGrouping(**defaults | {"engine": DrawnScripts(*scripts)} | options)


def method(weight=0.3, **options):
    return HindsightConstruction(**options), JSDWeightScheduler(weight, 0)


class BeyondNumbers(Reward):
    """At one step so large that the gradient's norm is not finite; NaN itself would be refused."""

    def __init__(self):
        self.calls = 0

    def score(self, trajectory):
        self.calls += 1  # the first four are a trial
        is_right = trajectory.answer == "Rome"
        return 1e200 * (1 + is_right) if 13 < self.calls <= 22 else float(is_right)


def test_an_update_that_is_not_finite_is_skipped_and_written_down(tmp_path):
    record, made = Record(), module()
    seen = []

    class Weights(Record):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append(weights_of(pl_module).clone())

    log = TrajectoryLog(str(tmp_path / "t.jsonl"), max_per_step=0)
    with pytest.warns(UserWarning, match=r"Step 2: the gradient was not finite, so 1 update\(s\) were skipped"):
        trainer = fit(
            made,
            grouping(reward=BeyondNumbers(), advantage_scale="none"),
            *method(),
            record,
            Weights(),
            log,
            max_steps=3,
        )
    assert trainer.global_step == 3, "a skipped step is a step"
    assert [batch.skipped_updates for batch in record.batches] == [0, 1, 0]
    assert [m["train/skipped_updates"] for m in record.metrics] == [0, 1, 0]
    assert torch.equal(seen[1], seen[0]) and not torch.equal(seen[2], seen[1])
    assert all(weights.isfinite().all() for weights in seen)
    written = list(read_trajectories(tmp_path / "t.jsonl"))
    assert {(row["phase"], row["step"]) for row in written} == {("skipped", 2)} and len(written) == 9


def test_groups_without_signal_are_refilled_from_other_questions():
    plain, refilled = Record(), Record()
    fit(module(), grouping(DIRECT, DIRECT, DIRECT, ONE), plain, max_steps=2)
    fit(module(), grouping(DIRECT, DIRECT, DIRECT, ONE, refill_attempts=8), refilled, max_steps=2)
    signal = [[[g.has_signal for g in b.groups] for b in record.batches] for record in (plain, refilled)]
    assert sum(map(sum, signal[0])) < 6 and sum(map(sum, signal[1])) == 6
    for before, after in zip(plain.batches[0].groups, refilled.batches[0].groups, strict=True):
        assert (before == after) is before.has_signal, "a group with signal stays as it is"
    ids = [g.instance_id for b in refilled.batches for g in b.groups]
    assert len(set(ids)) == len(ids), "no two groups share a key"
    again = Record()
    fit(module(), grouping(DIRECT, DIRECT, DIRECT, ONE, refill_attempts=8), again, max_steps=2)
    assert [b.groups for b in again.batches] == [b.groups for b in refilled.batches]


def test_a_rank_without_empty_groups_meets_the_others_in_their_refills(monkeypatch):
    record = Record()
    fit(module(), grouping(DIRECT, ONE, refill_attempts=8), record)
    (batch,) = record.batches
    full = tuple(group for group in batch.groups if group.has_signal)
    calls = []
    nothing = SimpleNamespace(trajectories=[])
    monkeypatch.setattr(GroupSampler, "run", lambda self, requests: calls.append(requests) or nothing)
    for empty_elsewhere, expected in ((1, [[]] * 3), (0, [])):
        sampler = GroupSampler(None, TRAINING_PROTOCOL, None, None, None, SCORING)  # type: ignore[arg-type]
        sampler.sum_over_ranks = lambda mine, more=empty_elsewhere: mine + more
        calls.clear()
        assert sampler.refill(full, [TRAINING_QUESTION], 1, attempts=3, rank=1) == full
        assert calls == expected


def test_refill_gives_up():
    record = Record()
    fit(module(), grouping(DIRECT, refill_attempts=2), record)
    assert [len(g.trajectories) for g in record.batches[0].groups] == [3, 3, 3]
    with pytest.raises(ConfigError, match=r"rollout\.refill_attempts: expected 0 or more, found -1"):
        grouping(refill_attempts=-1)


@pytest.mark.parametrize("teacher", [LiveTeacher(), BatchStartTeacher(), EMATeacher(0.05), FrozenTeacher()])
def test_each_teacher_has_the_weights_it_says(teacher):
    start = weights_of(module())
    made = module(teacher=teacher)
    fit(made, grouping(), *method(), max_steps=1)
    now = weights_of(made)
    assert not torch.equal(start, now)
    mine = torch.cat([w.flatten() for w in made.teacher.policy(made.policy).parameters()])
    expected = {
        LiveTeacher: now,
        BatchStartTeacher: start,
        EMATeacher: 0.95 * start + 0.05 * now,
        FrozenTeacher: start,
    }[type(teacher)]
    assert torch.allclose(mine, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"positions": "policy"}, {"divergence": LogitMSE(top_k=None)}, {"policy_coef": 0.0}, {"tis_cap": 0.1}],
)
def test_each_option_changes_what_is_learned(options):
    plain, changed = module(), module(**options)
    for made in (plain, changed):
        fit(made, grouping(), *method(5.0))
    assert not torch.allclose(weights_of(plain), weights_of(changed), rtol=0, atol=1e-6)


def test_diagnostics_tell_of_the_teacher_and_change_nothing():
    record, silent = Record(), Record()
    measured, plain = module(), module()
    fit(measured, grouping(), *method(), TeacherDiagnostics(every_n_steps=2), record, max_steps=3)
    fit(plain, grouping(), *method(), silent, max_steps=3)
    assert torch.equal(weights_of(measured), weights_of(plain))
    found = record.metrics[0]
    for name in ("logprob_with_own", "logprob_without_own", "grad_norm_policy", "grad_norm_jsd"):
        assert math.isfinite(found[f"teacher/{name}"])
    assert found["teacher/grad_norm_policy"] > 0 and found["teacher/grad_norm_jsd"] > 0
    assert found["teacher/logprob_with_own"] != found["teacher/logprob_without_own"]
    assert any(name.startswith("teacher/teacher_em_") for name in found)
    assert not any(name.startswith("teacher/") for name in silent.metrics[-1])


class KnowsBest(ToyData):
    def best_query(self, question):
        return "capital of Italy"


def test_the_probability_of_the_best_first_query_by_hand():
    record, made = Record(), module()
    fit(made, grouping(ONE, TWO), *method(), TeacherDiagnostics(sample=False), record, data=KnowsBest())
    group = record.batches[0].groups
    codec, total = made.codec, []
    words = codec.encode("capital of Italy")
    for g in group:
        values = []
        for t in g.trajectories:
            start = query_mask(t).index(True)
            ids = [*t.token_ids[:start], *words]
            rows = made.policy.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            values.append(math.exp(sum(rows[start + i - 1, word].item() for i, word in enumerate(words))))
        total.append(sum(values) / len(values))
    expected = sum(total) / len(total)
    assert record.metrics[0]["teacher/best_query_student"] == pytest.approx(expected, rel=1e-9)
    assert record.metrics[0]["teacher/best_query_teacher"] != pytest.approx(expected, rel=1e-6)
