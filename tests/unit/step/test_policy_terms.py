"""The policy's terms: truncated importance sampling, entropy by span kind, coefficients."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from helpers.closed_form import closed_form
from helpers.training import drifted, gradient, make_module, micro_batches, step, taught_batch
from helpers.training_rollouts import blocks_of, three_groups
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.losses.divergences import JensenShannon
from sdsearch_lightning.losses.terms import Terms, total_loss
from sdsearch_lightning.losses.weights import EntropyCoefs
from sdsearch_lightning.step.collate import SPAN_KINDS
from sdsearch_lightning.step.policy_terms import PolicyTerms
from sdsearch_lightning.types import SpanKind


def policy_terms(**options) -> PolicyTerms:
    defaults = dict(clip_low=0.2, clip_high=0.2, policy_coef=1.0, kl_coef=0.0, entropy_coef=EntropyCoefs())
    return PolicyTerms(**defaults | dict(tis_cap=None, temperature=1.0) | options)


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
    alone, _ = module.policy_terms.read(logits, None, batch, rows)
    assert alone.policy_loss.requires_grad
    assert not alone.entropy_loss.requires_grad and alone.entropy_loss.item() == 0
    result = sums(module, batch)
    assert result.entropy_loss.item() == 0 and not gradient(module, result.entropy_loss).any()
    assert asked == []
    assert sums(make_module(entropy_coef=EntropyCoefs(query=1.0)), batch).entropy_loss.item() != 0 and asked


def test_truncated_importance_sampling_by_hand():
    """min(pi_old / pi_engine, cap) * surrogate(pi / pi_old): the trainer's own old policy is in both."""
    groups = three_groups()
    plain, capped, wide = (make_module(tis_cap=cap) for cap in (None, 0.5, 1e9))
    (batch,) = micro_batches(plain, groups)
    rows = (batch.policy_weight != 0).nonzero()[:, 0]
    logits = plain.policy.logits(batch.sequences, rows)
    now = logits.log_softmax(-1).gather(1, batch.token_ids[rows][:, None])[:, 0]
    old = torch.zeros_like(batch.sampled_logprobs)
    old[rows] = now.detach() - 0.1 * torch.sin(torch.arange(len(rows)))
    engine, adv, weight = batch.sampled_logprobs[rows], batch.advantages[rows], batch.policy_weight[rows]
    later, first = replace(batch, old_logprobs=old), replace(batch, on_policy=True)
    for update, reference in ((later, old[rows]), (first, now.detach())):
        ratio = (now - reference).exp()
        value = -torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv) * weight
        for module, cap in ((plain, None), (capped, 0.5), (wide, 1e9)):
            factor = 1.0 if cap is None else (reference - engine).exp().clamp(max=cap)
            assert sums(module, update).policy_loss.item() == pytest.approx((value * factor).sum().item(), abs=1e-12)
        assert sums(capped, update).policy_loss.item() != pytest.approx(sums(wide, update).policy_loss.item())
    exact = replace(batch, sampled_logprobs=old, old_logprobs=old)
    assert sums(wide, exact).policy_loss.item() == pytest.approx(sums(plain, exact).policy_loss.item(), abs=1e-14)
    assert sums(wide, batch).policy_loss.item() == sums(plain, batch).policy_loss.item(), "nothing known: no correction"


def total(terms, jsd_weight=0.0, **options):
    return total_loss(terms, policy_terms(**options).coefficients(jsd_weight)).item()


def test_the_total_has_every_coefficient():
    terms = Terms(*(torch.tensor(x, dtype=torch.float64) for x in (2.0, 3.0, 5.0, 7.0)))
    assert total(terms) == 2.0
    assert total(terms, policy_coef=0.0) == 0.0
    assert total(terms, kl_coef=0.1) == pytest.approx(2.3)
    assert total(terms, entropy_coef=EntropyCoefs(query=1.0)) == 7.0
    assert total(terms, jsd_weight=0.5) == 5.5
    nan = torch.tensor(math.nan, dtype=torch.float64)
    assert total(terms._replace(kl=nan, entropy_loss=nan, jsd_loss=nan)) == 2.0, "what is off is left out"
    with pytest.raises(AssertionError):
        assert total(terms._replace(kl=terms.jsd_loss, jsd_loss=terms.kl), kl_coef=0.1) == pytest.approx(2.3)


def swapped(one, other):
    """`stack_terms` as it would be if two terms changed places."""

    def stacked(terms):
        mine = terms._replace(**{one: getattr(terms, other), other: getattr(terms, one)})
        return torch.stack(tuple(mine))

    return stacked


@pytest.mark.parametrize(("one", "other"), list(combinations(Terms._fields, 2)))
def test_a_term_reaches_the_loss_under_its_own_name(one, other, monkeypatch):
    """Each against its closed form, or against its own definition; a swap of any two is seen."""
    groups = three_groups()

    def difference():
        module = drifted(entropy_coef=EntropyCoefs(query=0.3), divergence=JensenShannon(top_k=None))
        batch = taught_batch(module, groups)
        found = sums(module, batch)
        policy, jsd, kl = closed_form(module, groups, [1.0] * len(groups), [b.text for b in blocks_of(groups)])
        rows = (batch.policy_weight != 0).nonzero()[:, 0]
        logprobs = module.policy.logits(batch.sequences, rows).log_softmax(-1)
        is_query = batch.span_kind[rows] == SPAN_KINDS.index(SpanKind.QUERY)
        entropy = -(logprobs.exp() * logprobs).sum(-1) * is_query * 0.3 * batch.policy_weight[rows]
        expected = Terms(policy_loss=policy, kl=kl, entropy_loss=-entropy.sum(), jsd_loss=jsd)
        return max(abs(getattr(found, name) - getattr(expected, name)).item() for name in Terms._fields)

    assert difference() < 1e-10
    monkeypatch.setattr("sdsearch_lightning.step.student.stack_terms", swapped(one, other))
    assert difference() > 1e-6


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
        policy_terms(**options)


def test_an_entropy_coefficient_has_to_be_finite():
    with pytest.raises(ConfigError, match=r"model\.entropy_coef: expected finite numbers"):
        EntropyCoefs(query=math.inf)
