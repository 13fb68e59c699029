"""The attention that stock models call: who looks at whom, which models it is enough for, and that nothing stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError
from transformers import AttentionInterface

from helpers.models import tiny_model
from helpers.training import drifted, gradient, step, taught_batch
from sdsearch_lightning.losses.divergences import JensenShannon
from sdsearch_lightning.losses.terms import total_loss
from sdsearch_lightning.policy.attention import (
    NAME,
    AttentionLayout,
    Call,
    CausalSegments,
    Segment,
    UnknownAttentionError,
    attention_layout,
    causal_mask,
    masked_attention,
)
from sdsearch_lightning.policy.packing import LAYOUTS, PackedSequences
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.training.options import Compute

HEADS = {"head_dim": 8}


# Segments

PARTS = {
    "one": [Segment(5)],
    "several": [Segment(3), Segment(1), Segment(4)],
    "tree": [Segment(3), Segment(2, 0), Segment(4, 0), Segment(1, 0)],
    "forest": [Segment(2), Segment(3, 0), Segment(3, 0), Segment(4), Segment(1), Segment(2, 4), Segment(3, 4)],
}


def visible(segments: Sequence[Segment]) -> list[list[int]]:
    """Of each token, those it looks at; written out from the definition."""
    starts = [sum(segment.length for segment in segments[:i]) for i in range(len(segments))]
    found = []
    for start, segment in zip(starts, segments, strict=True):
        prefix = segment.prefix
        before = [] if prefix is None else [starts[prefix] + i for i in range(segments[prefix].length)]
        found += [[*before, *range(start, start + i + 1)] for i in range(segment.length)]
    return found


def by_hand(query: Tensor, key: Tensor, value: Tensor, seen: Sequence[Sequence[int]], scale: float) -> Tensor:
    """[1, Hq, T, D], one token and one head at a time."""
    result = torch.zeros_like(query)
    group = query.shape[1] // key.shape[1]
    for head in range(query.shape[1]):
        for token, others in enumerate(seen):
            scores = torch.stack([query[0, head, token] @ key[0, head // group, other] * scale for other in others])
            weights = scores.exp() / scores.exp().sum()
            result[0, head, token] = sum(
                w * value[0, head // group, other] for w, other in zip(weights, others, strict=True)
            )
    return result


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_segments_are_a_softmax_over_what_each_token_may_see(
    parts: str, heads: tuple[int, int], scale: float | None
) -> None:
    segments, width = PARTS[parts], 6
    length = sum(segment.length for segment in segments)
    query = randn(1, heads[0], length, width, seed=0).requires_grad_()
    key, value = (randn(1, heads[1], length, width, seed=seed).requires_grad_() for seed in (1, 2))
    found = CausalSegments(segments).attend(Call(0, query, key, value, scale))
    expected = by_hand(query, key, value, visible(segments), scale or width**-0.5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    weights = randn(*found.shape, seed=3)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), [query, key, value]) for x in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    alone = [Segment(segment.length) for segment in segments]  # no prefixes
    whole = [Segment(length)]  # no borders
    for others in (alone, whole):
        wrong = by_hand(query, key, value, visible(others), scale or width**-0.5)
        assert torch.allclose(found, wrong, rtol=0, atol=1e-6) == (visible(others) == visible(segments))


def test_a_layout_may_attend_for_every_layer_and_batch() -> None:
    """Masks are kept by shape; one of another shape is made anew."""
    segments = CausalSegments(PARTS["forest"])
    for layer in range(3):
        query, key, value = (randn(1, 2, 18, 4, seed=10 * layer + i) for i in range(3))
        expected = by_hand(query, key, value, visible(PARTS["forest"]), 0.5)
        torch.testing.assert_close(segments.attend(Call(layer, query, key, value, 0.5)), expected, rtol=0, atol=1e-13)


def test_masked_and_causal_attention_agree() -> None:
    query, key, value = randn(2, 4, 5, 6, seed=0), randn(2, 2, 5, 6, seed=1), randn(2, 2, 5, 6, seed=2)
    mask = causal_mask(5, 5, device=query.device)
    assert mask.tolist() == [[j <= i for j in range(5)] for i in range(5)]
    assert causal_mask(2, 5, device=query.device).tolist() == [[True] * 4 + [False], [True] * 5]
    assert causal_mask(3, 5, 2, device=query.device).tolist() == [
        [j in (i + 1, i + 2) for j in range(5)] for i in range(3)
    ]
    call = Call(0, query, key, value, 0.5)
    causal = CausalSegments([Segment(5)]).attend(call)
    torch.testing.assert_close(masked_attention(call, mask), causal, rtol=0, atol=1e-13)
    assert not torch.allclose(masked_attention(call, mask | True), causal, atol=1e-3)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("window", [1, 2, 3, 50])
@pytest.mark.parametrize("more", [{}, {"softcap": 0.7}, {"sinks": torch.tensor([0.3, -1.0, 2.0, 0.0])}])
def test_windows_caps_sinks_and_wider_values_by_hand(parts: str, window: int, more: dict[str, Any]) -> None:
    segments = PARTS[parts]
    length = sum(segment.length for segment in segments)
    query, key, value = randn(1, 4, length, 6, seed=0), randn(1, 2, length, 6, seed=1), randn(1, 2, length, 5, seed=2)
    found = CausalSegments(segments).attend(Call(0, query, key, value, 0.4, window=window, **more))
    for head in range(4):
        for token, others in enumerate(visible(segments)):
            near = others[-window:]  # they stand in the order of their positions, the token itself last
            scores = torch.stack([query[0, head, token] @ key[0, head // 2, other] * 0.4 for other in near])
            if "softcap" in more:
                scores = 0.7 * torch.tanh(scores / 0.7)
            total = scores.exp().sum() + (more["sinks"][head].double().exp() if "sinks" in more else 0)
            expected = sum(w * value[0, head // 2, o] for w, o in zip(scores.exp() / total, near, strict=True))
            torch.testing.assert_close(found[0, head, token], expected, rtol=0, atol=1e-12)
    other = CausalSegments(segments).attend(Call(0, query, key, value, 0.39, window, **more))
    assert torch.allclose(found, other) == (window == 1 and "sinks" not in more), "one token has all the weight"


# Which models it is enough for

PACKABLE: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": HEADS,
    "gpt2": {},
    "phi": {},
    "gpt_neox": {},
    "olmo2": {},
    "mistral": HEADS | {"sliding_window": None},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", PACKABLE)
def test_families_that_can_lie_back_to_back(family: str, dtype: torch.dtype) -> None:
    policy = Policy(tiny_model(family, dtype, **PACKABLE[family]))
    assert policy.unpackable is None
    assert policy.layout is LAYOUTS["shared_prefix"]


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "a layer does more across tokens than attend"),
        ("bloom", {"n_head": 2, "n_layer": 2}, "a layer does more across tokens than attend"),
    ],
)
def test_families_that_cannot_say_why_and_are_padded(family: str, options: dict[str, Any], reason: str) -> None:
    model = tiny_model(family, **options)
    before = model.config._attn_implementation
    policy = Policy(model)
    assert policy.unpackable is not None
    assert policy.unpackable.startswith(f"models of type {family} cannot: ") and policy.unpackable.endswith(reason)
    assert policy.layout is LAYOUTS["padded"]
    assert model.config._attn_implementation == before != NAME
    asked = Policy(tiny_model("llama"), "padded")
    assert asked.unpackable is None and asked.layout is LAYOUTS["padded"], "a choice is no inability"


def test_a_model_that_ignores_the_layout_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the number of layers that asked; without one, all tokens would look at all before them."""
    policy = Policy(tiny_model())

    def own(model: Any, layout: AttentionLayout | None) -> Any:
        return attention_layout(model, None)

    monkeypatch.setattr("sdsearch_lightning.policy.policy.attention_layout", own)
    assert policy.unpackable == "models of type llama cannot: a layer does more across tokens than attend"


# Nothing stays in the model


class Failing(AttentionLayout):
    def attend(self, call: Call) -> Tensor:
        raise RuntimeError(f"layer {call.layer}")


def test_a_model_has_its_own_attention_back_also_after_a_failure() -> None:
    model, tokens = tiny_model(), torch.tensor([[3, 4, 5, 6, 7]])
    before, plain = model.config._attn_implementation, model(input_ids=tokens).logits
    with attention_layout(model, CausalSegments([Segment(2), Segment(3)])) as options:
        assert model.config._attn_implementation == NAME
        packed = model(input_ids=tokens, **options).logits
    assert model.config._attn_implementation == before
    assert torch.equal(model(input_ids=tokens).logits, plain) and not torch.allclose(packed, plain, atol=1e-3)
    with pytest.raises(RuntimeError, match="layer 0"), attention_layout(model, Failing()) as options:
        model(input_ids=tokens, **options)
    assert model.config._attn_implementation == before
    assert torch.equal(model(input_ids=tokens).logits, plain)
    with attention_layout(model, None) as options:
        assert options == {} and model.config._attn_implementation == before


def test_what_a_layout_would_leave_out_is_an_error() -> None:
    module, call = tiny_model().model.layers[0].self_attn, randn(1, 2, 3, 4, seed=0)
    with pytest.raises(UnknownAttentionError, match="its attention uses position_bias"):
        attend = AttentionInterface()[NAME]
        attend(module, call, call, call, None, attention_layout=CausalSegments([Segment(3)]), position_bias=call)


# Gradient checkpointing


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_checkpointed_gradients_are_the_same(family: str, layout: Any) -> None:
    """The layers run again in the backward pass, when the model has its own attention back: they need the layout's."""
    pulls: list[Tensor] = []
    passes: list[int] = []
    for enabled in (False, True):
        compute = Compute(layout=layout, gradient_checkpointing=enabled)
        module = drifted(tiny_model(family), divergence=JensenShannon(top_k=9), compute=compute)
        batch = taught_batch(module)
        sums = step(module, batch)
        count = []
        first = next(part for part in module.policy.modules() if part.__class__.__name__.endswith("Attention"))
        first.register_forward_hook(lambda *_, count=count: count.append(1))
        loss = total_loss(sums.terms, module.policy_terms.coefficients(1.0))
        pulls.append(gradient(module, loss))
        passes.append(len(count))
        assert module.policy.model.config._attn_implementation != NAME
    assert passes == [0, 1], "it ran again, and only where it was asked to"
    torch.testing.assert_close(pulls[1], pulls[0], rtol=0, atol=1e-12)
    assert pulls[0].abs().max() > 1e-3 and not torch.allclose(pulls[1] * (1 + 1e-6), pulls[0], rtol=0, atol=1e-12)


def test_checkpointing_without_the_layout_would_show() -> None:
    policy = Policy(tiny_model("gpt_neox")).train()
    assert policy.unpackable is None
    packed, targets = PackedSequences.pack([[3, 4, 5], [6, 7, 8, 9]]), torch.tensor([1, 2, 4, 5, 6])

    def pull() -> Tensor:
        loss = policy.logits(packed, targets).log_softmax(-1).square().sum()
        return torch.autograd.grad(loss, policy.model.get_input_embeddings().weight)[0]

    plain = pull()
    policy.checkpoint_gradients()
    torch.testing.assert_close(pull(), plain, rtol=0, atol=1e-10)
    enable = getattr(policy.model, "activation_checkpointing_enable", policy.model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    with pytest.raises(CheckpointError):
        pull()
