"""LoRA on a policy: what learns, what does not, the reference without a copy, and what a folder has to be."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_data import (
    make_module,
    step,
    taught_batch,
    tiny_model,
)

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.policy.lora import LoRA, is_learned, plain_weights, without_layers
from sdsearch_lightning.policy.lora_folder import CONFIG, ORIGIN, WEIGHTS, fingerprint
from sdsearch_lightning.policy.packing import LAYOUTS, PackedSequences
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.policy.teachers import BatchStartTeacher, EMATeacher, FrozenTeacher, Teacher
from sdsearch_lightning.training.options import Compute

pytest.importorskip("peft")

SEQUENCES = [(3, 4, 5, 6, 7, 8, 9, 10, 11), (14, 0, 1, 2, 18), (19, 20, 3, 5, 1, 9)]
PACKED = PackedSequences.pack(SEQUENCES)
TARGETS = (PACKED.position_ids > 0).nonzero()[:, 0]


def adapted(model: Any = None, lora: LoRA | None = None, **options: Any) -> SDSearchModule:
    return make_module(model, lora=lora or LoRA(r=4), **options)


def learn(module: Any, size: float = 0.05) -> Any:
    """Move the adapter as training would, far enough to see."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in module.policy.named_parameters():
            if is_learned(name):
                weight.add_(size * torch.randn(weight.shape, generator=generator).to(weight.dtype))
    return module


def logits(policy: Any) -> Tensor:
    with torch.no_grad():
        return policy.logits(PACKED, TARGETS)  # type: ignore[no-any-return]


def gradient(module: Any, loss: Tensor) -> dict[str, Tensor]:
    """Of `loss` in all that learns, by name."""
    weights = {name: weight for name, weight in module.policy.named_parameters() if weight.requires_grad}
    found = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
    return dict(zip(weights, found, strict=True))


def base_of(module: Any) -> dict[str, Tensor]:
    return {n: w.detach().clone() for n, w in module.policy.named_parameters() if "lora_" not in n}


# What learns


@pytest.mark.parametrize(("base", "wide"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")])
def test_only_the_adapter_learns_and_it_is_wide(base: str, wide: str) -> None:
    module = adapted(tiny_model(dtype=getattr(torch, base)))
    learning = {name: weight for name, weight in module.policy.named_parameters() if weight.requires_grad}
    assert len(learning) == 2 * 7 * 2 and all(map(is_learned, learning))
    assert {weight.dtype for weight in learning.values()} == {getattr(torch, wide)}
    assert {weight.dtype for weight in base_of(module).values()} == {getattr(torch, base)}
    (optimizer,), _ = module.configure_optimizers()
    taken = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    assert taken == {id(weight) for weight in learning.values()}


def test_a_new_adapter_changes_nothing_depends_on_its_seed_alone_and_draws_nothing() -> None:
    torch.manual_seed(3)
    module = adapted()
    after = torch.rand(())
    torch.manual_seed(3)
    assert torch.equal(torch.rand(()), after)
    assert torch.equal(logits(module.policy), logits(make_module().policy))
    same, other = adapted(), adapted(seed=1)
    names = [name for name, _ in module.policy.named_parameters() if "lora_A" in name]
    mine, theirs, others = (dict(m.policy.named_parameters()) for m in (module, same, other))
    assert all(torch.equal(mine[name], theirs[name]) and not torch.equal(mine[name], others[name]) for name in names)


def test_there_is_no_dropout() -> None:
    module = learn(adapted())
    module.policy.train()
    assert torch.equal(logits(module.policy), logits(module.policy))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral"])
def test_a_policy_with_adapters_is_checked_packed_and_padded_as_one_without(family: str) -> None:
    """Gemma2 and Mistral cannot be packed here, with adapters or without."""
    options = {"head_dim": 8, "sliding_window": 4} if family in ("gemma2", "mistral") else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Sequences are padded")
        module = learn(adapted(tiny_model(family, **options)))
    module.policy.check()
    assert (module.policy.unpackable is None) == (Policy(tiny_model(family, **options)).unpackable is None)
    plain = [module.policy.model(input_ids=torch.tensor([s])).logits[0, :-1] for s in SEQUENCES]
    torch.testing.assert_close(logits(module.policy), torch.cat(plain), rtol=0, atol=1e-12)


def smooth() -> Any:
    """A model in float64 throughout; Llama's norm passes through float32."""
    return tiny_model("gpt2", tie_word_embeddings=False)


def gradient_of_a_step(module: SDSearchModule) -> dict[str, Tensor]:
    module.jsd_weight = 0.5
    sums = step(module, taught_batch(module))
    return gradient(module, sums.policy_loss + 0.1 * sums.kl + 0.5 * sums.jsd_loss)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_one_gradient(layout: Any) -> None:
    def grad(of: Any) -> dict[str, Tensor]:
        return gradient_of_a_step(learn(adapted(smooth(), compute=Compute(layout=of), kl_coef=0.1)))

    reference = grad("padded")
    torch.testing.assert_close(grad(layout), reference, rtol=1e-9, atol=1e-12)
    assert min(float(g.abs().max()) for g in reference.values()) > 1e-6


def test_gradient_checkpointing_reaches_the_adapter() -> None:
    """The embeddings are frozen, so no input of a layer asks for a gradient."""

    def grad(checkpointing: bool) -> dict[str, Tensor]:
        module = learn(adapted(compute=Compute(gradient_checkpointing=checkpointing), kl_coef=0.1))
        module.policy.train()
        return gradient_of_a_step(module)

    kept, again = grad(False), grad(True)
    torch.testing.assert_close(again, kept, rtol=1e-9, atol=1e-14)
    assert min(float(g.abs().max()) for g in kept.values()) > 1e-6


@pytest.mark.parametrize("targets", [["c_attn", "lm_head"], ["wte", "c_proj"], r".*h\.0\.mlp\.c_.*"])
def test_any_linear_layer_or_embedding_can_be_a_target_the_output_layer_too(targets: Any) -> None:
    """The fused head takes the output layer's gradient at once: it has to know what learns there."""
    module = learn(adapted(smooth(), LoRA(r=3, target_modules=targets), kl_coef=0.1))
    batch = replace(taught_batch(module), on_policy=False)  # on policy, the value of the ratio is 1

    def loss() -> Tensor:
        sums = module.student_step(batch)
        return sums.policy_loss + 0.1 * sums.kl

    for name, found in gradient(module, loss()).items():
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


# The reference


def test_the_reference_is_the_initial_policy_without_a_copy() -> None:
    module, initial = adapted(kl_coef=0.1), make_module()
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in module.policy.parameters())
    batch = taught_batch(module)
    assert step(module, batch).kl.item() == 0.0, "at the start, exactly"
    learn(module)
    assert step(module, batch).kl.item() > 1e-3
    assert module.reference is not None

    def through(call: Any) -> list[Tensor]:
        from sdsearch_lightning.policy.head import Reading, keep_logits

        with torch.no_grad():
            return call(PACKED, [Reading(TARGETS, keep_logits)]).kept[0]  # type: ignore[no-any-return]

    assert torch.equal(torch.cat(through(module.reference)), logits(initial.policy)), "after steps, still exactly"
    assert not torch.equal(logits(module.policy), logits(initial.policy))
    assert all(w.requires_grad == is_learned(n) for n, w in module.policy.named_parameters())


def test_the_kl_and_its_gradient_are_those_of_a_frozen_copy() -> None:
    module = learn(adapted(kl_coef=0.1))
    batch = taught_batch(module)
    mine = step(module, batch)
    found = gradient(module, mine.kl)
    module.reference = make_module().policy
    theirs = step(module, batch)
    assert torch.equal(mine.kl, theirs.kl)
    again = gradient(module, theirs.kl)
    assert all(torch.equal(found[name], again[name]) and found[name].abs().max() > 1e-8 for name in found)


def test_what_fails_in_the_reference_leaves_the_policy_as_it_was() -> None:
    module = learn(adapted(kl_coef=0.1))
    before = logits(module.policy)
    assert module.reference is not None
    with pytest.raises(ConfigError):
        module.reference(PackedSequences.pack([[3] * 300]), [])
    assert torch.equal(logits(module.policy), before)


def test_going_on_from_an_adapter_the_reference_has_that_one(tmp_path: Path) -> None:
    first = learn(adapted())
    first.save_adapter(tmp_path / "adapter")
    second = adapted(lora=LoRA(adapter=str(tmp_path / "adapter")), kl_coef=0.1)
    assert torch.equal(logits(second.policy), logits(first.policy))
    batch = taught_batch(second)
    assert step(second, batch).kl.item() == 0.0
    learn(second, 0.02)
    assert step(second, batch).kl.item() > 1e-4
    second.reference = first.policy
    kl = step(second, batch).kl
    third = learn(adapted(lora=LoRA(adapter=str(tmp_path / "adapter")), kl_coef=0.1), 0.02)
    assert torch.equal(step(third, batch).kl, kl)
    assert {n for n, w in third.policy.named_parameters() if w.requires_grad} == {
        n for n, _ in third.policy.named_parameters() if is_learned(n)
    }
    third.save_adapter(tmp_path / "again")
    names = [json.loads((tmp_path / n / CONFIG).read_text())["r"] for n in ("adapter", "again")]
    assert names == [4, 4]


@pytest.mark.parametrize("kind", [BatchStartTeacher, EMATeacher, FrozenTeacher])
def test_teachers_with_a_copy_work_on_adapters(kind: type[Teacher]) -> None:
    module = learn(adapted(teacher=kind(), kl_coef=0.1))
    base = base_of(module)
    before = logits(module.teacher_policy)
    module.teacher.begin_batch(module.policy)
    module.teacher.after_update(module.policy)
    sums = step(module, taught_batch(module))
    assert torch.isfinite(sums.jsd_loss) and sums.jsd_loss > 0
    moved = not torch.equal(logits(module.teacher_policy), before)
    assert moved == (kind is not FrozenTeacher)
    copied = {n: w for n, w in module.teacher_policy.named_parameters() if "lora_" not in n}  # type: ignore[union-attr]
    assert all(torch.equal(copied[name], base[name]) for name in base), "a copy's base never moves"
    saved = {name for name in module.state_dict() if module.is_saved(name)}
    assert any(name.startswith("teacher_policy.") for name in saved) == (kind is EMATeacher)
    assert all(map(is_learned, saved))


# Weights without adapters


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("targets", ["all-linear", ["lm_head", "embed_tokens", "wte"]])
def test_merged_weights_are_pefts_own(family: str, targets: Any) -> None:
    module = learn(adapted(tiny_model(family, tie_word_embeddings=False), LoRA(r=4, target_modules=targets)))
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
    torch.testing.assert_close(logits(Policy(plain)), logits(module.policy), rtol=0, atol=1e-12)
    assert not torch.allclose(logits(Policy(tiny_model(family))), logits(module.policy), atol=1e-2)


def test_layers_are_back_after_a_save_and_after_one_that_failed() -> None:
    module = learn(adapted())
    before, names = logits(module.policy), [name for name, _ in module.policy.named_modules()]
    with pytest.raises(KeyboardInterrupt), without_layers(module.policy.model):
        assert torch.equal(logits(module.policy), logits(make_module().policy))
        raise KeyboardInterrupt
    assert torch.equal(logits(module.policy), before)
    assert [name for name, _ in module.policy.named_modules()] == names


def test_vllm_is_given_merged_weights_by_plain_names() -> None:
    from sdsearch_lightning.rollout.vllm import _load_weights

    module, given = learn(adapted()), {}

    class LLM:
        def apply_model(self, function: Any) -> list[Any]:
            return [function(self)]

        def named_parameters(self) -> Any:
            return tiny_model().named_parameters()

        def load_weights(self, weights: Any) -> list[str]:
            given.update(weights)
            return list(given)

    _load_weights(LLM(), module.policy)
    plain = tiny_model()
    plain.load_state_dict(given)
    torch.testing.assert_close(logits(Policy(plain)), logits(module.policy), rtol=0, atol=1e-12)
    assert not any(weight.requires_grad for weight in given.values())


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


def test_without_peft_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdsearch_lightning.policy.lora_folder.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^model.lora needs peft.*pip install 'sdsearch-lightning\[lora\]'$"):
        adapted()


# Folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    learn(adapted()).save_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def going_on(folder: Path, model: Any = None, **options: Any) -> SDSearchModule:
    return adapted(model, LoRA(adapter=str(folder), **options))


def test_an_adapter_of_another_base_is_refused(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)was trained on another base, scratch llama \(fingerprint \w{16}\)"
    ) as e:
        going_on(folder, tiny_model(seed=1))
    assert len(str(e.value).splitlines()) == 2


def test_without_a_fingerprint_another_name_is_doubted(folder: Path) -> None:
    (folder / ORIGIN).unlink()
    going_on(folder)  # neither name nor fingerprint: it fits, and that is all that can be known
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "Qwen/Qwen3-4B"}))
    with pytest.warns(UserWarning, match="was trained on Qwen/Qwen3-4B, and the model here is scratch llama"):
        going_on(folder)


@pytest.mark.parametrize("lacking", [CONFIG, WEIGHTS])
def test_an_unfinished_folder_is_refused(folder: Path, lacking: str) -> None:
    (folder / lacking).unlink()
    with pytest.raises(ConfigError, match=f"expected a folder of a peft adapter, found no {lacking} in"):
        going_on(folder)


def test_torn_and_foreign_weights_are_refused(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / ORIGIN).unlink()
    (folder / WEIGHTS).write_bytes(whole[:500])
    with pytest.raises(ConfigError, match="the weights in .* do not fit the model"):
        going_on(folder)
    (folder / WEIGHTS).write_bytes(whole)
    with pytest.raises(ConfigError, match=r"do not fit the model: size mismatch for .*lora_A"):
        going_on(folder, tiny_model(hidden_size=32))
    with pytest.raises(ConfigError, match=r"has, beyond the model's, .*layers\.1.*Is it an adapter of another model\?"):
        going_on(folder, tiny_model(num_hidden_layers=1))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"use_dora": True}, "found one with use_dora True"),
        ({"bias": "all"}, "found one with bias all"),
        ({"peft_type": "IA3"}, "found one with peft_type"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(folder: Path, change: dict[str, Any], told: str) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=told), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unexpected keyword arguments")
        going_on(folder)


def test_an_adapters_own_numbers_hold_and_others_are_refused(folder: Path) -> None:
    assert going_on(folder).policy.model.peft_config["default"].r == 4
    assert going_on(folder, r=4).policy.model.peft_config["default"].r == 4
    with pytest.raises(ConfigError, match=r"model.lora.r: the adapter in .* has 4, found 8. Leave it out"):
        going_on(folder, r=8)


# Fingerprints


def test_a_fingerprint_tells_models_apart_and_not_their_dtype(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    mine = fingerprint(model)
    assert mine == fingerprint(model.float()) == fingerprint(model.double())
    assert mine != fingerprint(tiny_model(dtype=torch.bfloat16, seed=1))
    assert mine != fingerprint(
        tiny_model(dtype=torch.bfloat16, num_attention_heads=4, num_key_value_heads=1, head_dim=8)
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.01)
    assert mine != fingerprint(model)


def test_the_slot_engine_plays_with_adapters() -> None:
    from toys import PROTOCOL, QUESTION, ToyRetriever, make_request, word_tokenizer
    from toys import tiny_model as toy_model

    from sdsearch_lightning.protocol.conversation import Conversation
    from sdsearch_lightning.protocol.tokenization import TokenCodec
    from sdsearch_lightning.rollout import GenerateEngine, SlotEngine
    from sdsearch_lightning.rollout.search_pool import SearchPool
    from sdsearch_lightning.types import Limits, RolloutRequest

    codec = TokenCodec(word_tokenizer(), PROTOCOL.tags)
    module = SDSearchModule("x", protocol=PROTOCOL, lora=LoRA(r=4), kl_coef=0.0)
    module.attach(toy_model(codec.tokenizer), codec.tokenizer)
    learn(module, 0.3)
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
