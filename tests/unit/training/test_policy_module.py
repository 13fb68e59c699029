"""Model making, the policy's forward, the optimizers, and the pieces of the manual step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.models import tiny_model
from helpers.training import make_module, weights_of
from helpers.training_rollouts import TRAINING_CODEC, TRAINING_PROTOCOL, TRAINING_TOKENIZER, TRAINING_WORDS
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.policy.head import Chunk, Reading
from sdsearch_lightning.policy.loading import ScratchModel
from sdsearch_lightning.policy.packing import LAYOUTS, PackedSequences
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.supervised import SupervisedModule
from sdsearch_lightning.training.options import Compute, OptimizerSpec

SEQUENCES = [(3, 4, 5, 6, 7, 8, 9, 10, 11), (14, 0, 1, 2, 18), (19, 20, 3, 5, 1, 9)]
HEADS = {"head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": HEADS,
    "mistral": HEADS | {"sliding_window": 4},
    "gemma2": HEADS | {"sliding_window": 4, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 3.0},
    "gemma3_text": HEADS | {"sliding_window": 4},
    "olmo2": {},
    "phi3": {},
    "gpt2": {},
}
ROUNDING = {"gemma2": 2e-6}
"""Of families that compute in float32 in between, whatever their weights are: 7e-7 was seen. Elsewhere 1e-12."""


# The forward


@pytest.mark.parametrize("family", FAMILIES)
def test_the_policy_gives_the_logits_of_the_plain_model(family: str) -> None:
    model = tiny_model(family, **FAMILIES[family]).eval()  # gpt2 has dropout
    packed = PackedSequences.pack(SEQUENCES)
    targets = (packed.position_ids > 0).nonzero()[:, 0]
    readings = [Reading(targets, keep), Reading(targets[[5, 0, 9]], keep, torch.zeros(3, 16).double())]
    (first,), (second,) = Policy(model)(packed, readings).kept
    assert not model.training, "finding out what it can leaves its mode alone"
    plain = torch.cat([model(input_ids=torch.tensor([sequence])).logits[0, :-1] for sequence in SEQUENCES])
    rounding = ROUNDING.get(family, 1e-12)
    torch.testing.assert_close(first.logits, plain, rtol=0, atol=rounding)
    torch.testing.assert_close(second.logits, plain[[5, 0, 9]], rtol=0, atol=rounding)
    assert [tuple(chunk.hidden.shape) for chunk in (first, second)] == [(len(targets), 16), (3, 16)]
    assert first.paired is None and second.paired is not None and second.paired.shape == (3, len(TRAINING_TOKENIZER))
    assert plain.std() > 0.3, "the comparison would see a difference"


def keep(chunk: Chunk) -> tuple[Tensor, Chunk]:
    return chunk.logits.new_zeros(0), chunk


def test_a_softcapped_head_is_capped() -> None:
    model = tiny_model("gemma2", **FAMILIES["gemma2"])
    reading = Reading(torch.tensor([1]), keep, torch.ones(1, 16).double())
    (((_, logits, hidden, paired),),) = Policy(model)(PackedSequences.pack(SEQUENCES), [reading]).kept
    uncapped = model.lm_head(hidden)
    assert paired is not None and paired.abs().max() < 3
    torch.testing.assert_close(logits, 3 * torch.tanh(uncapped / 3))
    assert (logits - uncapped).abs().max() > 0.01


def test_no_target_is_no_row_and_still_a_graph() -> None:
    policy = Policy(tiny_model())
    logits = policy.logits(PackedSequences.pack(SEQUENCES), torch.zeros(0, dtype=torch.long))
    assert logits.shape == (0, len(TRAINING_TOKENIZER))
    logits.sum().backward()
    assert all(w.grad is None or not w.grad.any() for w in policy.parameters())


@pytest.mark.parametrize(("dtype", "kept"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")])
def test_losses_are_kept_in_float32_or_better(dtype: str, kept: str) -> None:
    assert Policy(tiny_model(dtype=getattr(torch, dtype))).dtype == getattr(torch, kept)


# The layout


def checkpoints(module: Any) -> bool:
    return any(getattr(part, "gradient_checkpointing", False) for part in module.policy.modules())


@pytest.mark.parametrize("kind", [SDSearchModule, SupervisedModule])
def test_the_layout_is_that_of_compute(kind: type) -> None:
    for layout, expected in LAYOUTS.items():
        module = kind(scratch=ScratchModel(), protocol=TRAINING_PROTOCOL, compute=Compute(layout=layout))
        module.attach(tiny_model(), TRAINING_TOKENIZER)
        assert module.policy.layout is expected
    default = kind(scratch=ScratchModel(), protocol=TRAINING_PROTOCOL)
    default.attach(tiny_model(), TRAINING_TOKENIZER)
    assert default.policy.layout is LAYOUTS["shared_prefix"]
    assert not checkpoints(default)


def test_a_model_that_cannot_pack_is_padded_and_says_so() -> None:
    with pytest.warns(
        UserWarning, match=r"model.compute.layout is 'packed', but models of type bloom cannot: a layer .* are padded"
    ):
        module = make_module(tiny_model("bloom", n_head=2, n_layer=2), compute=Compute(layout="packed"))
    assert module.policy.layout is LAYOUTS["padded"]
    make_module(tiny_model("bloom", n_head=2, n_layer=2), compute=Compute(layout="padded"))  # asked for: no warning


@pytest.mark.parametrize(("options", "dtype"), [({}, torch.float32), ({"wide_head": False}, torch.bfloat16)])
def test_the_precision_of_the_output_layer_can_be_chosen(options: dict[str, bool], dtype: torch.dtype) -> None:
    module = make_module(tiny_model(dtype=torch.float32), compute=Compute(**options))
    with torch.autocast("cpu", torch.bfloat16):
        assert module.policy.logits(PackedSequences.pack(SEQUENCES), torch.tensor([2])).dtype == dtype


def test_gradient_checkpointing_is_that_of_compute() -> None:
    module = make_module(compute=Compute(gradient_checkpointing=True))
    assert checkpoints(module)


# Where models come from


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float32])
def test_a_folder_loads_as_float32_whatever_it_was_saved_in(tmp_path: Path, saved: torch.dtype) -> None:
    model = tiny_model(dtype=saved)
    model.save_pretrained(tmp_path)
    TRAINING_TOKENIZER.save_pretrained(tmp_path)
    module = SDSearchModule(str(tmp_path), protocol=TRAINING_PROTOCOL)
    module.configure_model()
    assert {weight.dtype for weight in module.policy.parameters()} == {torch.float32}
    assert torch.equal(weights_of(module), torch.cat([w.float().flatten() for w in model.parameters()]))
    assert module.codec.encode("Rome </search>") == TRAINING_CODEC.encode("Rome </search>")
    before = module.policy
    module.configure_model()
    assert module.policy is before, "made once"


# What a module is asked for


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "found neither"),
        ({"model_name_or_path": "x", "scratch": ScratchModel()}, "found both"),
        ({"scratch": ScratchModel(), "max_micro_batch_tokens": 0}, "max_micro_batch_tokens: expected at least 1"),
        ({"scratch": ScratchModel(), "protocol": "search_r2"}, "model.protocol: .*search_r1, autorefine.*'search_r2'"),
    ],
)
@pytest.mark.parametrize("kind", [SDSearchModule, SupervisedModule])
def test_what_cannot_work_is_refused(kind: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**options)


def test_a_new_model_needs_a_vocabulary() -> None:
    module = SupervisedModule(scratch=ScratchModel(), protocol=TRAINING_PROTOCOL)
    with pytest.raises(ConfigError, match="needs a datamodule with a vocabulary"):
        module.configure_model()
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(vocabulary=lambda: tuple(TRAINING_WORDS)))  # type: ignore[assignment]
    assert module._vocabulary() == tuple(TRAINING_WORDS)


# Optimizers


def sgd(rate: float) -> Callable[..., torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, lr=rate)


def shares(module: SupervisedModule) -> list[set[str]]:
    names = {id(parameter): name for name, parameter in module.policy.named_parameters()}
    optimizers, schedules = module.configure_optimizers()
    assert len(schedules) == len(optimizers)
    return [{names[id(p)] for group in optimizer.param_groups for p in group["params"]} for optimizer in optimizers]


def supervised(*specs: OptimizerSpec) -> SupervisedModule:
    module = SupervisedModule(scratch=ScratchModel(), protocol=TRAINING_PROTOCOL, optimizers=list(specs))
    module.attach(tiny_model(), TRAINING_TOKENIZER)
    return module


def test_the_first_optimizer_that_matches_takes_the_parameter() -> None:
    module = supervised(
        OptimizerSpec(sgd(1), r"layers.*proj\.weight"), OptimizerSpec(sgd(2), "proj"), OptimizerSpec(sgd(3))
    )
    projections, rest = shares(module)  # the second one is left with nothing, so it is not made
    names = {name for name, _ in module.policy.named_parameters()}
    assert projections == {name for name in names if "proj" in name} and len(projections) == 14
    assert rest == names - projections
    assert [optimizer.param_groups[0]["lr"] for optimizer in module.configure_optimizers()[0]] == [1, 3]


def test_a_parameter_that_no_optimizer_takes_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no entry takes the parameter 'model.model.embed_tokens.weight'.*'\.\*'"):
        supervised(OptimizerSpec(sgd(1), "layers")).configure_optimizers()


def test_frozen_parameters_are_left_out() -> None:
    module = make_module(kl_coef=0.1)
    module.policy.model.lm_head.requires_grad_(False)
    optimizers, _ = module.configure_optimizers()
    trained = {id(p) for group in optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for n, p in module.policy.named_parameters() if "lm_head" not in n}, "nor the reference"


# The manual step


class TwoRanks:
    """A trainer that says there is another rank, with `most` micro-batches."""

    world_size = 2

    def __init__(self, most: int) -> None:
        self.strategy = SimpleNamespace(reduce=lambda count, reduce_op: torch.maximum(count, torch.tensor(most)))


@pytest.mark.parametrize(("mine", "most", "expected"), [("ab", 3, "abf"), ("", 2, "ff"), ("abc", 1, "abc")])
def test_every_rank_makes_as_many_passes(mine: str, most: int, expected: str) -> None:
    module = make_module()
    module._trainer = TwoRanks(most)  # type: ignore[assignment]
    assert module.equalize(list(mine), "f") == list(expected)


def test_a_rank_without_anything_makes_one_pass() -> None:
    module = make_module()
    module._trainer = SimpleNamespace(world_size=1)  # type: ignore[assignment]
    assert module.equalize([], "f") == ["f"]
    assert module.equalize(["a"], "f") == ["a"]


def test_gradients_add_up_over_micro_batches_and_undo_the_average_over_ranks() -> None:
    module = make_module()
    module._trainer = TwoRanks(0)  # type: ignore[assignment]
    weight = next(module.policy.parameters())
    module.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign]

    def loss(factor: float) -> Tensor:
        return factor * weight.sum()

    module.backward_all([1.0, 2.0, 4.0], loss)
    assert weight.grad is not None and torch.equal(weight.grad, torch.full_like(weight, 2 * 7.0))
