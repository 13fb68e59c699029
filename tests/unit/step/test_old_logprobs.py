"""What the ratio of later updates is taken against: the engine's log-probs, or those of the trainer's own pass."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.fits import DrawnScripts, Record, fit, grouping
from helpers.models import tiny_model
from helpers.training import make_module, micro_batches, weights_of
from helpers.training_rollouts import TRAINING_PROTOCOL, TRAINING_TOKENIZER, three_groups
from sdsearch_lightning import SDSearchModule
from sdsearch_lightning.losses.logprobs import at_tokens, log_softmax
from sdsearch_lightning.policy.loading import ScratchModel
from sdsearch_lightning.step.old_logprobs import with_old_logprobs


class Biased(DrawnScripts):
    """An engine that says other log-probs than the policy's: all `shift` nats off."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def _policy_logprobs(self, *args: Any) -> list[float]:
        return [value + self.shift for value in super()._policy_logprobs(*args)]


def trained(shift: float = 0.0, rate: float = 0.5, **options: Any) -> tuple[Tensor, dict[str, float]]:
    """Weights after one step of a fit, and what it logged."""
    module = SDSearchModule(
        scratch=ScratchModel(),
        protocol=TRAINING_PROTOCOL,
        optimizer=lambda params: torch.optim.SGD(params, lr=rate),
        **{"kl_coef": 0.0, "num_updates": 3, "gradient_clip_val": None} | options,
    )
    module.attach(tiny_model(), TRAINING_TOKENIZER)
    record = Record()
    fit(module, grouping(Biased(shift)), record)
    return weights_of(module), record.metrics[0]


def same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=1e-10)


def test_where_the_engine_is_the_policy_both_are_one() -> None:
    (engine, logged), (trainer, other) = (trained(old_logprobs=kind) for kind in ("engine", "trainer"))
    assert same(engine, trainer) and logged["train/logprob_gap"] == pytest.approx(other["train/logprob_gap"])
    start = weights_of(make_module())
    assert not same(engine, start), "something was learned"


def test_the_trainers_own_do_not_care_what_the_engine_says() -> None:
    exact, _ = trained(old_logprobs="trainer")
    assert same(trained(0.1, old_logprobs="trainer")[0], exact)
    assert not same(trained(0.1, old_logprobs="engine")[0], exact), "the ratio of later updates is against the engine"


def test_the_first_update_needs_none() -> None:
    exact, _ = trained(num_updates=1)
    for kind in ("engine", "trainer"):
        assert same(trained(0.1, num_updates=1, old_logprobs=kind)[0], exact)


@pytest.mark.parametrize("num_updates", [1, 3])
def test_truncated_importance_sampling_changes_nothing_where_the_engine_is_the_policy(num_updates: int) -> None:
    plain, _ = trained(num_updates=num_updates)
    assert same(trained(num_updates=num_updates, tis_cap=2.0)[0], plain)


@pytest.mark.parametrize("kind", ["engine", "trainer"])
def test_truncated_importance_sampling_counts_the_engine_once(kind: str) -> None:
    """Everywhere e^-0.1 of the loss, in every update: small steps get shorter by it."""
    weighed, _ = trained(0.1, 1e-6, old_logprobs=kind, tis_cap=2.0)
    exact, start = trained(0.0, 1e-6, old_logprobs="trainer")[0], weights_of(make_module())
    torch.testing.assert_close(weighed - start, math.exp(-0.1) * (exact - start), rtol=1e-3, atol=1e-11)
    assert (exact - start).abs().max() > 1e-7


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("max_tokens", [100_000, 60])
def test_the_pass_reads_each_rollouts_own_tokens(temperature: float, max_tokens: int) -> None:
    """Whatever the micro-batches are, and at the temperature of the rollouts; 0 where nothing was sampled."""
    module = make_module(temperature=temperature, max_micro_batch_tokens=max_tokens)
    module._trainer = type("Alone", (), {"world_size": 1})()
    groups = three_groups()
    known = module.policy_logprobs(groups)
    rollouts = [t for group in groups for t in group.trajectories if t.label]  # one whose search failed has no loss
    assert set(known) == {(t.instance_id, t.rollout_index) for t in rollouts}
    for t in rollouts:
        logits = module.policy.model(input_ids=torch.tensor([t.token_ids])).logits[0, :-1]
        expected = at_tokens(log_softmax(logits, temperature), torch.tensor(t.token_ids[1:]))
        mask = torch.tensor(t.policy_mask[1:])
        found = known[t.instance_id, t.rollout_index]
        assert found.shape == (len(t.token_ids),) and not found.requires_grad and found[0] == 0
        torch.testing.assert_close(found[1:], torch.where(mask, expected, 0.0), rtol=0, atol=1e-10)


def test_rollouts_without_one_are_an_error() -> None:
    module = make_module()
    module._trainer = type("Alone", (), {"world_size": 1})()
    groups = three_groups()
    known = dict(module.policy_logprobs(groups[:1]))
    (batch,) = micro_batches(module, groups[:1])
    assert batch.old_logprobs is None, "the engine's stand for them"
    with pytest.raises(KeyError):
        module.micro_batches(groups, [None] * len(groups), False, known)
    assert with_old_logprobs([], known) == []
