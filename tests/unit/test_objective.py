"""The policy's terms: truncated importance sampling, entropy by span kind, coefficients."""

from __future__ import annotations

import math

import pytest
import torch
from training_data import blocks_of, drifted, gradient, make_module, micro_batches, step, three_groups

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.step.collate import SPAN_KINDS
from sdsearch_lightning.step.policy_terms import EntropyCoefs, PolicyObjective
from sdsearch_lightning.types import SpanKind


def objective(**options) -> PolicyObjective:
    defaults = dict(clip_low=0.2, clip_high=0.2, policy_coef=1.0, kl_coef=0.0, entropy_coef=EntropyCoefs())
    return PolicyObjective(**defaults | dict(tis_cap=None, temperature=1.0) | options)


def sums(module, batch):
    return step(module, batch)


@pytest.mark.parametrize("kind", ["query", "reasoning", "answer", "scaffold"])
def test_entropy_counts_at_its_own_kind_of_token(kind):
    groups = three_groups()
    module = make_module(entropy_coef=EntropyCoefs(**{kind: -0.05}))
    (batch,) = micro_batches(module, groups)
    expected = 0.0
    logits = module.policy.logits(batch.sequences, (batch.policy_weight != 0).nonzero()[:, 0])
    rows = (batch.policy_weight != 0).nonzero()[:, 0].tolist()
    for row, line in zip(rows, logits.tolist(), strict=True):
        if SPAN_KINDS[batch.span_kind[row]] is SpanKind(kind):
            norm = math.log(math.fsum(math.exp(x) for x in line))
            entropy = -math.fsum(math.exp(x - norm) * (x - norm) for x in line)
            expected += 0.05 * entropy * batch.policy_weight[row].item()
    loss = sums(module, batch).entropy_loss
    assert expected > 0 and loss.item() == pytest.approx(expected, abs=1e-12)
    assert loss.item() != pytest.approx(expected * 1.001, abs=1e-12)
    assert gradient(module, loss).abs().max() > 0


def test_without_coefficients_there_is_no_entropy_term(monkeypatch):
    module = make_module()
    (batch,) = micro_batches(module, three_groups())
    rows = (batch.policy_weight != 0).nonzero()[:, 0]
    logits = module.policy.logits(batch.sequences, rows)
    asked = []
    monkeypatch.setattr(
        "sdsearch_lightning.step.policy_terms.entropy", lambda logprobs: asked.append(1) or logprobs.sum(-1)
    )
    alone = module.objective.sums(logits, None, batch, rows)
    assert alone.policy_loss.requires_grad
    assert not alone.entropy_loss.requires_grad and alone.entropy_loss.item() == 0
    result = sums(module, batch)
    assert result.entropy_loss.item() == 0 and not gradient(module, result.entropy_loss).any()
    assert asked == []
    assert sums(make_module(entropy_coef=EntropyCoefs(query=1.0)), batch).entropy_loss.item() != 0 and asked


def test_truncated_importance_sampling_by_hand():
    groups = three_groups()
    plain, capped, wide = (make_module(tis_cap=cap) for cap in (None, 0.5, 1e9))
    (batch,) = micro_batches(plain, groups)
    rows = (batch.policy_weight != 0).nonzero()[:, 0]
    logits = plain.policy.logits(batch.sequences, rows)
    now = logits.log_softmax(-1).gather(1, batch.token_ids[rows][:, None])[:, 0]
    ratio = (now - batch.sampled_logprobs[rows]).exp()
    adv, weight = batch.advantages[rows], batch.policy_weight[rows]
    value = -torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv) * weight
    for module, cap in ((plain, None), (capped, 0.5), (wide, 1e9)):
        factor = 1.0 if cap is None else ratio.clamp(max=cap)
        assert sums(module, batch).policy_loss.item() == pytest.approx((value * factor).sum().item(), abs=1e-12)
    assert sums(capped, batch).policy_loss.item() != pytest.approx(sums(wide, batch).policy_loss.item())


def test_the_total_has_every_coefficient():
    a, b, c = (torch.tensor(x, dtype=torch.float64) for x in (2.0, 3.0, 5.0))
    assert objective().total(a, b, c) is a
    assert objective(policy_coef=0.0).total(a, b, c).item() == 0.0
    assert objective(kl_coef=0.1).total(a, b, c).item() == pytest.approx(2.3)
    assert objective(entropy_coef=EntropyCoefs(query=1.0)).total(a, b, c).item() == 7.0


@pytest.mark.parametrize("micro", [60, 100_000])
def test_entropy_and_tis_do_not_depend_on_micro_batches(micro):
    groups = three_groups()
    module = drifted(entropy_coef=EntropyCoefs(query=0.1, answer=-0.2), tis_cap=2.0)
    parts = [sums(module, batch) for batch in micro_batches(module, groups, blocks_of(groups), micro)]
    (whole,) = (sums(module, batch) for batch in micro_batches(module, groups, blocks_of(groups)))
    for term in ("policy_loss", "entropy_loss", "kl", "jsd_loss"):
        assert sum(getattr(p, term).item() for p in parts) == pytest.approx(getattr(whole, term).item(), abs=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy_coef": -1.0}, "model.policy_coef: expected a finite number of at least 0, found -1"),
        ({"kl_coef": math.nan}, "model.kl_coef: expected a finite number"),
        ({"tis_cap": 0.0}, "model.tis_cap: expected a number above 0, found 0"),
    ],
)
def test_coefficients_without_meaning(options, message):
    with pytest.raises(ConfigError, match=message):
        objective(**options)


def test_an_entropy_coefficient_has_to_be_finite():
    with pytest.raises(ConfigError, match=r"model\.entropy_coef: expected finite numbers"):
        EntropyCoefs(query=math.inf)
