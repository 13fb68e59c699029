"""LoRA on a policy: what learns, what does not, the weights without adapters, and what is refused."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.lora import (
    RAGGED_SEQUENCES,
    adapted,
    base_weights,
    move_adapter,
    named_gradients,
    ragged_logits,
)
from helpers.models import tiny_model
from helpers.passages import PROTOCOL, QUESTION, ToyRetriever
from helpers.players import make_request
from helpers.tokenizers import word_tokenizer
from helpers.training import make_module, step, taught_batch
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.policy.lora import LoRA, is_learned, plain_weights, without_layers
from sdsearch_lightning.policy.packing import LAYOUTS
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.protocol.conversation import Conversation
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.rollout import GenerateEngine, SearchPool, SlotEngine
from sdsearch_lightning.training.options import Compute
from sdsearch_lightning.types import Limits, RolloutRequest

pytest.importorskip("peft")


# What learns


@pytest.mark.parametrize(("base", "wide"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")])
def test_only_the_adapter_learns_and_it_is_wide(base: str, wide: str) -> None:
    module = adapted(tiny_model(dtype=getattr(torch, base)))
    learning = {name: weight for name, weight in module.policy.named_parameters() if weight.requires_grad}
    assert len(learning) == 2 * 7 * 2 and all(map(is_learned, learning))
    assert {weight.dtype for weight in learning.values()} == {getattr(torch, wide)}
    assert {weight.dtype for weight in base_weights(module).values()} == {getattr(torch, base)}
    (optimizer,), _ = module.configure_optimizers()
    taken = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    assert taken == {id(weight) for weight in learning.values()}


def test_a_new_adapter_changes_nothing_depends_on_its_seed_alone_and_draws_nothing() -> None:
    torch.manual_seed(3)
    module = adapted()
    after = torch.rand(())
    torch.manual_seed(3)
    assert torch.equal(torch.rand(()), after)
    assert torch.equal(ragged_logits(module.policy), ragged_logits(make_module().policy))
    same, other = adapted(), adapted(seed=1)
    names = [name for name, _ in module.policy.named_parameters() if "lora_A" in name]
    mine, theirs, others = (dict(m.policy.named_parameters()) for m in (module, same, other))
    assert all(torch.equal(mine[name], theirs[name]) and not torch.equal(mine[name], others[name]) for name in names)


def test_there_is_no_dropout() -> None:
    module = move_adapter(adapted())
    module.policy.train()
    assert torch.equal(ragged_logits(module.policy), ragged_logits(module.policy))


@pytest.mark.parametrize(
    ("family", "rounding"), [("llama", 1e-12), ("gpt2", 1e-12), ("gemma2", 2e-6), ("mistral", 1e-12), ("bloom", 1e-12)]
)
def test_a_policy_with_adapters_is_checked_packed_and_padded_as_one_without(family: str, rounding: float) -> None:
    """Bloom cannot be packed, with adapters or without; Gemma 2 computes in float32 in between."""
    options = {"head_dim": 8, "sliding_window": 4} if family in ("gemma2", "mistral") else {}
    options |= {"n_head": 2, "n_layer": 2} if family == "bloom" else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Sequences are padded")
        module = move_adapter(adapted(tiny_model(family, **options)))
    module.policy.check(torch.device("cpu"))
    assert (module.policy.unpackable is None) == (Policy(tiny_model(family, **options)).unpackable is None)
    plain = [module.policy.model(input_ids=torch.tensor([s])).logits[0, :-1] for s in RAGGED_SEQUENCES]
    torch.testing.assert_close(ragged_logits(module.policy), torch.cat(plain), rtol=0, atol=rounding)


def smooth() -> Any:
    """A model in float64 throughout; Llama's norm passes through float32."""
    return tiny_model("gpt2", tie_word_embeddings=False)


def gradient_of_a_step(module: SDSearchModule) -> dict[str, Tensor]:
    module.jsd_weight = 0.5
    sums = step(module, taught_batch(module))
    return named_gradients(module, sums.policy_loss + 0.1 * sums.kl + 0.5 * sums.jsd_loss)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_one_gradient(layout: Any) -> None:
    def grad(of: Any) -> dict[str, Tensor]:
        return gradient_of_a_step(move_adapter(adapted(smooth(), compute=Compute(layout=of), kl_coef=0.1)))

    reference = grad("padded")
    torch.testing.assert_close(grad(layout), reference, rtol=1e-9, atol=1e-12)
    assert min(float(g.abs().max()) for g in reference.values()) > 1e-6


def test_gradient_checkpointing_reaches_the_adapter() -> None:
    """The embeddings are frozen, so no input of a layer asks for a gradient."""

    def grad(checkpointing: bool) -> dict[str, Tensor]:
        module = move_adapter(adapted(compute=Compute(gradient_checkpointing=checkpointing), kl_coef=0.1))
        module.policy.train()
        return gradient_of_a_step(module)

    kept, again = grad(False), grad(True)
    torch.testing.assert_close(again, kept, rtol=1e-9, atol=1e-14)
    assert min(float(g.abs().max()) for g in kept.values()) > 1e-6


@pytest.mark.parametrize("targets", [["c_attn", "lm_head"], ["wte", "c_proj"], r".*h\.0\.mlp\.c_.*"])
def test_any_linear_layer_or_embedding_can_be_a_target_the_output_layer_too(targets: Any) -> None:
    """The fused head takes the output layer's gradient at once: it has to know what learns there."""
    module = move_adapter(adapted(smooth(), LoRA(r=3, target_modules=targets), kl_coef=0.1))
    batch = replace(taught_batch(module), on_policy=False)  # on policy, the value of the ratio is 1

    def loss() -> Tensor:
        sums = module.student_step(batch)
        return sums.policy_loss + 0.1 * sums.kl

    for name, found in named_gradients(module, loss()).items():
        weight = dict(module.policy.named_parameters())[name]
        place = tuple(int(i) for i in (found == found.abs().max()).nonzero()[:1].flatten()) or (0, 0)
        values = []
        for shift in (1e-6, -2e-6):
            with torch.no_grad():
                weight[place] += shift
                values.append(float(loss()))
        with torch.no_grad():
            weight[place] += 1e-6
        expected = (values[0] - values[1]) / 2e-6
        assert found[place].item() == pytest.approx(expected, rel=1e-3, abs=1e-8), name
        assert found.abs().max() > 1e-7, name


# Weights without adapters


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("targets", ["all-linear", ["lm_head", "embed_tokens", "wte"]])
def test_merged_weights_are_pefts_own(family: str, targets: Any) -> None:
    module = move_adapter(adapted(tiny_model(family, tie_word_embeddings=False), LoRA(r=4, target_modules=targets)))
    model = module.policy.model
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    merged = dict(plain_weights(model, model.state_dict()))
    plain = tiny_model(family, tie_word_embeddings=False)
    assert merged.keys() == plain.state_dict().keys()
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            assert torch.equal(merged[f"{name}.weight"], layer.base_layer.weight + layer.get_delta_weight("default"))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items()), "none was written"
    plain.eval().load_state_dict(merged)  # gpt2 has dropout
    torch.testing.assert_close(ragged_logits(Policy(plain)), ragged_logits(module.policy), rtol=0, atol=1e-12)
    assert not torch.allclose(ragged_logits(Policy(tiny_model(family))), ragged_logits(module.policy), atol=1e-2)


def test_layers_are_back_after_a_save_and_after_one_that_failed() -> None:
    module = move_adapter(adapted())
    before, names = ragged_logits(module.policy), [name for name, _ in module.policy.named_modules()]
    with pytest.raises(KeyboardInterrupt), without_layers(module.policy.model):
        assert torch.equal(ragged_logits(module.policy), ragged_logits(make_module().policy))
        raise KeyboardInterrupt
    assert torch.equal(ragged_logits(module.policy), before)
    assert [name for name, _ in module.policy.named_modules()] == names


def test_vllm_is_given_merged_weights_by_plain_names() -> None:
    from sdsearch_lightning.rollout.vllm_weights import load_weights

    module, given = move_adapter(adapted()), {}

    class LLM:
        def collective_rpc(self, method: Any) -> list[Any]:
            return [method(self)]

        def get_model(self) -> Any:
            return self

        def reload_weights(self, weights_iterator: Any) -> None:
            self.load_weights(weights_iterator)

        def modules(self) -> Any:
            return iter(())

        def named_parameters(self) -> Any:
            return tiny_model().named_parameters()

        def load_weights(self, weights: Any) -> list[str]:
            given.update(weights)
            return list(given)

    load_weights(LLM(), module.policy)
    plain = tiny_model()
    plain.load_state_dict(given)
    torch.testing.assert_close(ragged_logits(Policy(plain)), ragged_logits(module.policy), rtol=0, atol=1e-12)
    assert not any(weight.requires_grad for weight in given.values())


def test_the_slot_engine_plays_with_adapters() -> None:
    codec = TokenCodec(word_tokenizer(), PROTOCOL.tags)
    module = SDSearchModule("x", protocol=PROTOCOL, lora=LoRA(r=4), kl_coef=0.0)
    module.attach(tiny_model(tokenizer=codec.tokenizer).eval(), codec.tokenizer)
    move_adapter(module, 0.3)
    module.policy.eval()
    limits = Limits(max_searches=2, max_turn_tokens=12, max_observation_tokens=12, max_tokens=80)

    def start(request: RolloutRequest) -> Conversation:
        return Conversation(request, PROTOCOL, codec, limits)

    requests = [make_request(codec, QUESTION, index=index) for index in range(6)]
    played = []
    for engine in (SlotEngine(kv_cache_gib=0.1, max_slots=4), GenerateEngine()):
        pool = SearchPool(ToyRetriever(), 2)
        engine.attach(module.policy, start, pool)
        played.append([rollout.token_ids for rollout in engine.run(requests)])
        pool.close()
    assert played[0] == played[1] and len(set(played[0])) > 1


# What is refused


@pytest.mark.parametrize("options", [{"r": 0}, {"lora_alpha": 0}, {"lora_alpha": -1.0}])
def test_impossible_numbers_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="model.lora: expected r of at least 1 and lora_alpha above 0"):
        LoRA(**options)


def test_unknown_layers_are_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"(?s)target_modules: .*query.*\nLayers of this model: .*o_proj, q_proj"):
        adapted(lora=LoRA(target_modules=["query"]))


def test_tied_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="lm_head shares its weight with another layer"):
        adapted(tiny_model(tie_word_embeddings=True), LoRA(target_modules=["lm_head"]))
    adapted(tiny_model(tie_word_embeddings=True))  # all-linear leaves it alone
