"""The teacher's verdict in a whole step: whose tokens it weighs, in which loss, and that nothing else moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor

from helpers.closed_form import logprob_rows
from helpers.fits import Record, ToyData, fit, taught
from helpers.training import drifted, gradient, make_module, micro_batches, step, taught_batch
from helpers.training_rollouts import TRAINING_CODEC, TRAINING_PROTOCOL, blocks_of, three_groups
from helpers.trajectories import query_mask
from sdsearch_lightning.hindsight import BlockBuilder, ContrastedSiblings
from sdsearch_lightning.losses import CAST, RLCSD, RLSD, SDAR, Distillation, JensenShannon
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.policy.loading import ScratchModel
from sdsearch_lightning.step.collate import SearchBatch, filler, with_idle_teacher
from sdsearch_lightning.types import HindsightBlock, RolloutGroup

WHOLE = JensenShannon(top_k=None)
TERMS = ("policy_loss", "jsd_loss", "kl")
USES = [RLSD(), SDAR(), CAST(0.2, 0.5, 0.3), RLCSD()]


def labels_by_hand(groups: Sequence[RolloutGroup]) -> list[float]:
    """Of each query token of a micro-batch of all groups, longest groups first."""
    order = [t for g in (groups[0], groups[2], groups[1]) for t in g.trajectories if t.label]
    return [1.0 if t.label == "CORRECT" else -1.0 for t in order for is_query in query_mask(t) if is_query]


def weighed_by_hand(use: Any, batch: SearchBatch, log_ratio: Tensor, fault: float = 0.0) -> SearchBatch:
    """The batch with what `use` makes of its query tokens written into it: the default is then the same."""
    shaped, gate = use.weigh(log_ratio, batch.advantages[batch.query_row], batch.query_label)
    advantages = batch.advantages.index_copy(0, batch.query_row, shaped + fault)
    return replace(batch, advantages=advantages, query_weight=batch.query_weight * (gate + fault))


@pytest.mark.parametrize("use", USES, ids=lambda use: type(use).__name__)
@pytest.mark.parametrize("top_k", [None, 6])
def test_what_a_use_makes_of_query_tokens_is_what_the_losses_see(use: Any, top_k: int | None) -> None:
    divergence = JensenShannon(top_k=top_k)
    module, plain = drifted(divergence=divergence, teacher_use=use), drifted(divergence=divergence)
    batch = taught_batch(module)
    assert batch.query_label.tolist() == labels_by_hand(three_groups()) and set(batch.query_label.tolist()) == {-1, 1}
    ours, before = step(module, batch), step(plain, batch)
    assert ours.credit is not None and before.credit is not None
    assert torch.equal(ours.credit.jsd, before.credit.jsd), "the report's verdicts stay"
    log_ratio = before.credit.teacher_logprob - before.credit.student_logprob
    wanted, wrong = (step(plain, weighed_by_hand(use, batch, log_ratio, fault)) for fault in (0.0, 1e-6))
    for term in TERMS:
        value, expected = getattr(ours, term), getattr(wanted, term)
        assert value.item() == pytest.approx(expected.item(), abs=1e-12)
        pull, right = gradient(module, value), gradient(plain, expected)
        torch.testing.assert_close(pull, right, rtol=0, atol=1e-12)
        if term != "kl":
            assert value.item() != pytest.approx(getattr(wrong, term).item(), abs=1e-12)
            assert not torch.allclose(pull, gradient(plain, getattr(wrong, term)), rtol=0, atol=1e-12)
    shaped, gate = use.weigh(log_ratio, batch.advantages[batch.query_row], batch.query_label)
    counted = {name: ours.metrics[name].item() for name in ("abs_log_ratio", "changed_advantages", "gate")}
    changed = (shaped != batch.advantages[batch.query_row]).sum()
    expected_counts = (log_ratio.abs().sum(), changed, gate.sum())
    assert counted == pytest.approx(dict(zip(counted, map(float, expected_counts), strict=True)), abs=1e-12)
    assert counted["abs_log_ratio"] > 0.1 and (counted["changed_advantages"] > 0) is not isinstance(use, SDAR)


def test_the_default_is_the_path_without_any_use_bit_for_bit() -> None:
    class Nothing:
        def weigh(self, log_ratio, advantages, labels):
            return advantages, torch.ones_like(advantages)

    module, other = drifted(divergence=WHOLE), drifted(divergence=WHOLE, teacher_use=Nothing())
    assert isinstance(module.teacher_use, Distillation)
    batch = taught_batch(module)
    ours, theirs = step(module, batch), step(other, batch)
    assert ours.credit is not None
    assert torch.equal(ours.jsd_loss, (ours.credit.jsd * batch.query_weight).sum())
    for term in TERMS:
        assert torch.equal(getattr(ours, term), getattr(theirs, term))
        assert torch.equal(gradient(module, getattr(ours, term)), gradient(other, getattr(theirs, term)))


@pytest.mark.parametrize("use", USES, ids=lambda use: type(use).__name__)
def test_no_split_changes_a_loss(use: Any) -> None:
    module, groups = drifted(divergence=WHOLE, teacher_use=use), three_groups()
    blocks = blocks_of(groups)

    def losses(max_tokens: int) -> list[float]:
        batches = micro_batches(module, groups, blocks, max_tokens)
        assert len(batches) == (3 if max_tokens == 1 else 1)
        sums = [step(module, batch) for batch in batches]
        return [sum(getattr(s, term).item() for s in sums) for term in TERMS]

    assert losses(1) == pytest.approx(losses(100_000), rel=0, abs=1e-12)


def test_a_group_without_a_teacher_keeps_its_advantages() -> None:
    module, groups = drifted(teacher_use=CAST(base=9.0)), three_groups()
    blocks: list[HindsightBlock | None] = [None, None, *blocks_of(groups)[2:]]
    (batch,) = micro_batches(module, groups[:2], blocks[:2])
    (alone,) = micro_batches(module, groups[:2])
    assert step(module, batch).policy_loss.item() == step(module, alone).policy_loss.item()


def test_an_idle_teacher_has_no_verdict() -> None:
    module = drifted(teacher_use=RLSD())
    sums = step(module, with_idle_teacher(filler(torch.float64)))
    assert all(getattr(sums, term).item() == 0 for term in TERMS) and sums.metrics["query_tokens"].item() == 0


# Two blocks


def contrasts_of(groups: Sequence[RolloutGroup]) -> list[HindsightBlock | None]:
    builder: BlockBuilder = ContrastedSiblings()
    return builder.build(groups, "all", TRAINING_PROTOCOL, TRAINING_CODEC)


@pytest.mark.parametrize("top_k", [None, 6])
def test_a_contrast_is_the_verdict_of_one_text_less_that_of_the_other(top_k: int | None) -> None:
    divergence, groups = JensenShannon(top_k=top_k), three_groups()
    module, plain = drifted(divergence=divergence, teacher_use=RLCSD()), drifted(divergence=divergence)
    blocks = contrasts_of(groups)
    (batch,) = micro_batches(module, groups, blocks)
    expected: list[float] = []
    rows = iter(batch.query_row.tolist())
    for g, block in ((groups[i], blocks[i]) for i in (0, 2, 1)):
        for t in g.trajectories:
            views = block.views_of(t.rollout_index) if block else ()
            for i in (i for i, is_query in enumerate(query_mask(t)) if is_query and views):
                assert batch.token_ids[next(rows)].item() == t.token_ids[i]
                read = []
                for text in (views[0].text, views[0].contrast):
                    prompt = TRAINING_CODEC.encode(f"{t.question.text}{text}")
                    logprobs = logprob_rows(module.policy.model, prompt + t.token_ids[t.prompt_length :])
                    read.append(logprobs[i + len(prompt) - t.prompt_length, t.token_ids[i]].item())
                expected.append(read[0] - read[1])
    assert len(expected) == len(batch.query_row) >= 6 and next(rows, None) is None
    ours = step(module, batch)
    log_ratio = torch.tensor(expected, dtype=torch.float64)
    wanted, wrong = (step(plain, weighed_by_hand(RLCSD(), batch, log_ratio * factor)) for factor in (1, 1 + 1e-6))
    assert ours.policy_loss.item() == pytest.approx(wanted.policy_loss.item(), abs=1e-12)
    assert ours.policy_loss.item() != pytest.approx(wrong.policy_loss.item(), abs=1e-12)
    assert ours.metrics["abs_log_ratio"].item() == pytest.approx(log_ratio.abs().sum().item(), abs=1e-10)
    assert ours.credit is not None and len(ours.credit.jsd) == len(expected)


def test_views_with_and_without_a_contrast_do_not_mix() -> None:
    module, groups = make_module(), three_groups()
    with pytest.raises(AssertionError, match="either all views of a step have a contrast, or none has"):
        micro_batches(module, groups, [*contrasts_of(groups)[:1], *blocks_of(groups)[1:]])


# A user's own

LOUDER = """
import torch

class Louder:
    def __init__(self, factor=3.0):
        self.factor = factor

    def weigh(self, log_ratio, advantages, labels):
        return torch.where(log_ratio > 0, self.factor * advantages, advantages), torch.ones_like(log_ratio)
"""


@pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode")
def test_a_users_own_class_of_a_few_lines_by_class_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_uses.py").write_text(LOUDER)
    monkeypatch.syspath_prepend(tmp_path)
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(SDSearchModule, "model")

    def parsed(*arguments: str) -> Any:
        options = parser.parse_args([f"--model.scratch.model_type={ScratchModel().model_type}", *arguments])
        return parser.instantiate(options).model.teacher_use

    use = parsed("--model.teacher_use=my_uses.Louder", "--model.teacher_use.factor=2.0")
    assert type(use).__name__ == "Louder" and use.factor == 2.0 and type(use).__mro__[1] is object
    assert isinstance(parsed("--model.teacher_use=RLSD", "--model.teacher_use.clip=0.3"), RLSD), "ours by short name"
    module, record = make_module(teacher_use=use), Record()
    fit(module, *taught(), record, data=ToyData(batch_size=6))
    assert 0 < record.metrics[0]["distill/changed_advantages"] < 1 == record.metrics[0]["distill/gate"]
