"""Teacher and student: identity, bounds, which token may carry which gradient, dropout, and the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.models import tiny_model
from helpers.training import drifted, gradient, make_module, micro_batches, step, taught_batch, weights_of
from helpers.training_rollouts import three_groups
from helpers.trajectories import query_mask
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.losses.divergences import JensenShannon
from sdsearch_lightning.losses.terms import jensen_shannon
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.policy.loading import ScratchModel
from sdsearch_lightning.policy.packing import LAYOUTS
from sdsearch_lightning.step.collate import SearchBatch
from sdsearch_lightning.training.options import Compute
from sdsearch_lightning.types import HindsightBlock

WHOLE = JensenShannon(top_k=None)


# Identity and bounds


def with_block(module: SDSearchModule, text: str) -> SearchBatch:
    groups = three_groups()
    blocks: list[HindsightBlock | None] = [HindsightBlock(g.instance_id, (), text) for g in groups]
    (batch,) = micro_batches(module, groups, blocks)
    return batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_a_teacher_with_an_empty_block_is_the_student(dtype: torch.dtype, top_k: int | None, family: str) -> None:
    """Padded, both run in equal shapes."""
    divergence = JensenShannon(top_k=top_k)
    module = make_module(tiny_model(family, dtype), divergence=divergence, compute=Compute(layout="padded"))
    batch = with_block(module, "")
    assert batch.teacher is not None and torch.equal(batch.teacher.token_ids, batch.token_ids)
    sums = step(module, batch)
    assert sums.credit is not None and len(sums.credit.jsd) == 15
    assert sums.credit.jsd.eq(0).all(), "exactly, not nearly"
    assert sums.jsd_loss.item() == 0
    assert sums.jsd_loss.dtype == dtype
    assert torch.equal(sums.credit.student_logprob, sums.credit.teacher_logprob)
    assert gradient(module, sums.jsd_loss).abs().max() < 1e-6, "at its minimum"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_a_teacher_that_is_cut_is_the_student_but_for_the_last_bits(
    dtype: torch.dtype, tolerance: float, top_k: int | None, family: str, layout: Any
) -> None:
    divergence = JensenShannon(top_k=top_k)
    module = make_module(tiny_model(family, dtype), divergence=divergence, compute=Compute(layout=layout))
    batch = with_block(module, "")
    assert batch.teacher is not None and batch.teacher.num_sequences == 5 < batch.sequences.num_sequences
    sums = step(module, batch)
    assert sums.credit is not None and len(sums.credit.jsd) == 15
    assert sums.credit.jsd.abs().max() <= 1e-10 and abs(sums.jsd_loss.item()) <= 1e-10
    assert sums.jsd_loss.dtype == dtype
    gap = sums.credit.student_logprob - sums.credit.teacher_logprob
    assert gap.abs().max() <= tolerance
    assert gradient(module, sums.jsd_loss).abs().max() < 1e-6, "at its minimum"
    other = step(module, with_block(module, " Rome"))
    assert other.credit is not None and other.credit.jsd.min() > 1e-6, "one more token would show"
    assert (other.credit.student_logprob - other.credit.teacher_logprob).abs().min() > 10 * tolerance


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_the_divergence_is_bounded_by_ln_2(seed: int, scale: float) -> None:
    module = make_module(tiny_model(seed=seed, initializer_range=scale), divergence=WHOLE)
    credit = step(module, taught_batch(module)).credit
    assert credit is not None
    assert (credit.jsd > 0).all() and (credit.jsd <= math.log(2)).all()
    assert credit.jsd.max() > 1e-3


def test_a_support_as_large_as_the_vocabulary_is_the_vocabulary() -> None:
    model, vocabulary = tiny_model(), tiny_model().config.vocab_size
    jsd = {}
    for top_k in (None, vocabulary, vocabulary - 1, 6):
        module = make_module(model, divergence=JensenShannon(top_k=top_k))
        sums = step(module, taught_batch(module))
        assert sums.credit is not None
        jsd[top_k] = sums.credit.jsd
    assert torch.equal(jsd[vocabulary], jsd[None])
    torch.testing.assert_close(jsd[vocabulary - 1], jsd[None], rtol=0.2, atol=1e-3)
    assert not torch.allclose(jsd[6], jsd[None], rtol=1e-3)


@pytest.mark.parametrize("top_k", [1, 6, 27])
def test_a_truncated_teacher_gives_the_truncated_divergence(top_k: int) -> None:
    module = make_module(divergence=JensenShannon(top_k=top_k))
    batch = taught_batch(module)
    assert batch.teacher is not None and batch.teacher_query_row is not None
    teacher = module.policy.logits(batch.teacher, batch.teacher_query_row)
    student = module.policy.logits(batch.sequences, batch.query_row)
    said = module.controls.compared
    loss = (
        jensen_shannon(said(student), said(teacher), top_k=min(top_k, said(student).shape[1])) * batch.query_weight
    ).sum()
    sums = step(module, batch)
    torch.testing.assert_close(sums.jsd_loss, loss, rtol=0, atol=1e-15)
    torch.testing.assert_close(gradient(module, sums.jsd_loss), gradient(module, loss), rtol=0, atol=1e-14)


# The teacher learns nothing


def test_the_teacher_has_no_graph() -> None:
    for divergence in (WHOLE, JensenShannon(top_k=6)):
        module = make_module(divergence=divergence)
        rows = module.teacher_step(taught_batch(module))
        tensors = [value for name in rows.__slots__ if isinstance(value := getattr(rows, name), Tensor)]
        assert len(tensors) >= 6
        assert not any(tensor.requires_grad for tensor in tensors)


@pytest.mark.parametrize("top_k", [6, None])
def test_the_gradient_is_that_of_the_student_alone(top_k: int | None) -> None:
    """Finite differences in random directions of the body, the teacher held fast."""
    model = tiny_model("gpt2", tie_word_embeddings=False)  # float64 throughout; a llama computes its norms in float32
    module = make_module(model, divergence=JensenShannon(top_k=top_k))
    batch = taught_batch(module)
    teacher = module.teacher_step(batch)
    body = list(model.transformer.parameters())
    whole = gradient(module, module.student_step(batch, teacher).jsd_loss)[: sum(w.numel() for w in body)]
    start, generator = torch.nn.utils.parameters_to_vector(body), torch.Generator().manual_seed(0)

    @torch.no_grad()
    def loss(at: Tensor, moving: bool = False) -> float:
        torch.nn.utils.vector_to_parameters(at, body)
        return module.student_step(batch, module.teacher_step(batch) if moving else teacher).jsd_loss.item()

    for _ in range(3):
        way = torch.randn(len(start), dtype=torch.float64, generator=generator)
        slope, both = (
            (loss(start + 1e-6 * way, moving) - loss(start - 1e-6 * way, moving)) / 2e-6 for moving in (False, True)
        )
        assert slope == pytest.approx((whole @ way).item(), abs=1e-7)
        assert abs(both - slope) > 1e-4, "a teacher that moved along would show"


# Which token carries a gradient


def rows_with_gradient(module: SDSearchModule, batch: SearchBatch, term: str) -> set[int]:
    """Indices of the student's hidden states, as the body gives them, that `term` pulls at; pads included."""
    seen: list[Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        if output.last_hidden_state.requires_grad:  # the teacher's do not
            output.last_hidden_state.retain_grad()
            seen.append(output.last_hidden_state)

    handle = module.policy.model.model.register_forward_hook(keep)
    getattr(step(module, batch), term).backward()
    handle.remove()
    (states,) = seen
    assert states.grad is not None
    assert states.shape[:2] == module.policy.layout.arrange(batch.sequences).token_ids.shape
    return set(states.grad.flatten(0, 1).abs().sum(-1).nonzero()[:, 0].tolist())


def rows_of(module: SDSearchModule, batch: SearchBatch, tokens: set[tuple[int, int]]) -> set[int]:
    """Where the body has these (sequence, position)."""
    place = module.policy.layout.arrange(batch.sequences).place.tolist()
    where = zip(batch.sequence_index.tolist(), batch.position_ids.tolist(), place, strict=True)
    found = {row for n, t, row in where if (n, t) in tokens}
    assert len(found) == len(tokens) or module.compute.layout == "shared_prefix"
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("top_k", [None, 6])
def test_only_query_tokens_are_distilled(top_k: int | None, layout: Any) -> None:
    module = make_module(divergence=JensenShannon(top_k=top_k), compute=Compute(layout=layout))
    groups = three_groups()
    order = [t for g in (groups[0], groups[2], groups[1]) for t in g.trajectories if t.label]  # longest groups first
    taught = {(n, i - 1) for n, t in enumerate(order) for i, is_query in enumerate(query_mask(t)) if is_query}
    batch = taught_batch(module)
    assert rows_with_gradient(module, batch, "jsd_loss") == rows_of(module, batch, taught)
    untaught = {n for n, t in enumerate(order) if t.instance_id == groups[1].instance_id}
    mixed = taught_batch(module, rule="mixed")
    fewer = {(n, i) for n, i in taught if n not in untaught}
    assert (
        rows_with_gradient(module, mixed, "jsd_loss") == rows_of(module, mixed, fewer) != rows_of(module, mixed, taught)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("term", ["policy_loss", "kl"])
def test_only_what_the_policy_wrote_is_rewarded(term: str, layout: Any) -> None:
    module = drifted(clip_low=9.0, clip_high=1e9, compute=Compute(layout=layout))  # too wide for a token to be clipped
    groups = three_groups()
    order = [t for g in (groups[0], groups[2], groups[1]) for t in g.trajectories if t.label]
    counted = {(n, i - 1) for n, t in enumerate(order) for i, sampled in enumerate(t.policy_mask) if sampled}
    if term == "policy_loss":
        counted = {(n, i) for n, i in counted if order[n].advantage}
    batch = taught_batch(module)
    assert rows_with_gradient(module, batch, term) == rows_of(module, batch, counted)


# Dropout, the reference, and what is refused


@pytest.mark.parametrize(
    ("family", "rates"),
    [
        ("gpt2", {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}),
        ("llama", {"attention_dropout": 0.5}),
        ("phi", {"attention_dropout": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5}),
        ("opt", {"dropout": 0.5, "attention_dropout": 0.5, "ffn_dim": 32, "word_embed_proj_dim": 16}),
    ],
)
def test_dropout_is_off_in_training(family: str, rates: dict[str, Any]) -> None:
    plain, model = (tiny_model(family, **rates).train() for _ in range(2))
    tokens = torch.tensor([[3, 4, 5, 6, 7]])
    assert not torch.equal(plain(input_ids=tokens).logits, plain(input_ids=tokens).logits), "it would be on"
    module = make_module(model, kl_coef=0.1).train()
    assert module.reference is not None
    for policy in (module.policy, module.reference.train()):
        assert torch.equal(policy.model(input_ids=tokens).logits, policy.model(input_ids=tokens).logits)


def test_the_reference_is_a_frozen_copy_where_it_is_needed() -> None:
    assert make_module(kl_coef=0.0).reference is None
    module = make_module(kl_coef=0.1)
    assert module.reference is not None
    assert not any(weight.requires_grad for weight in module.reference.parameters())
    pairs = list(zip(module.policy.parameters(), module.reference.parameters(), strict=True))
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)
    sums = step(module, taught_batch(module))
    assert sums.kl.item() == 0, "they start as one"
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert set(checkpoint["state_dict"]) == {f"policy.{name}" for name in module.policy.state_dict()}
    other = make_module(tiny_model(seed=1), kl_coef=0.1)
    assert other.reference is not None
    made = [weight.clone() for weight in other.reference.parameters()]
    other.on_load_checkpoint(checkpoint)
    other.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(weights_of(other), weights_of(module))
    assert all(torch.equal(a, b) for a, b in zip(made, other.reference.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_updates": 0}, "model.num_updates: expected at least 1"),
        ({"kl_coef": -0.1}, "model.kl_coef: expected a finite number of at least 0"),
        ({"aggregation": "mean"}, "Unknown aggregation mode 'mean': expected one of token-mean"),
        ({"aggregation": "seq-mean-token-sum-norm", "aggregation_norm": 0.0}, "Expected norm above 0"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_rollout(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SDSearchModule(scratch=ScratchModel(), **options)
