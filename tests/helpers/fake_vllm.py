"""A fake that speaks vLLM's interface, and is stricter than vLLM where vLLM is quietly wrong.

It refuses unknown arguments, generating while asleep, weights that are not the policy's, and prefixes that were cached
under older weights; it samples from a script, or from a tiny model of its own. Its weights take the way that was seen
in vLLM 0.32 on a CPU: layers compute with copies, loaders exist during `reload_weights` only, a reload that breaks off
leaves layers without weights, and a layer that shares its weight with an earlier one keeps the copy it has.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from helpers.models import TalkativePolicy
from helpers.players import position_eighths
from sdsearch_lightning.protocol.tokenization import TokenCodec


@dataclass(kw_only=True)
class FakeSamplingParams:
    """Those of vLLM's arguments that are used, with vLLM's defaults; anything else is a TypeError."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    stop: list[str] = field(default_factory=list)
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        assert self.n == 1 and self.temperature >= 0 and 0 < self.top_p <= 1
        assert self.seed is None or -(2**63) <= self.seed < 2**63
        assert self.max_tokens is None or self.max_tokens >= 1
        assert self.detokenize or not self.stop, "stop strings need text"


class Packing:
    """What vLLM calls the `quant_method` of a layer, without any quantization."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        layer.packed = layer.weight.detach().clone()


class FakeModel(torch.nn.Module):
    """The model inside vLLM: it takes the names of a checkpoint, and calls its parameters otherwise."""

    def __init__(self, codec: TokenCodec, **options: Any) -> None:
        super().__init__()
        self.policy = TalkativePolicy(codec, seed=99, **options)  # other weights than any policy here
        self.loaded: list[str] = []
        self.has_loaders = False
        for layer in self.layers.values():
            layer.quant_method = Packing()
            layer.quant_method.process_weights_after_loading(layer)

    @property
    def layers(self) -> dict[str, Any]:
        """Those with a weight, by the weight's name."""
        layers = self.policy.model.named_modules()
        return {f"{name}.weight": layer for name, layer in layers if hasattr(layer, "weight")}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        if not self.has_loaders:
            raise AttributeError("'Parameter' object has no attribute 'weight_loader'")
        own, self.loaded = dict(self.policy.model.named_parameters()), []
        for name, weight in weights:
            assert not weight.requires_grad and own[name].shape == weight.shape
            own[name].copy_(weight)
            self.loaded.append(name)
        return {f"policy.model.{name}" for name in self.loaded}


class FakeWorker:
    """The part of vLLM that holds the model."""

    def __init__(self, llm: FakeLLM) -> None:
        self.llm = llm

    def get_model(self) -> FakeModel:
        return self.llm.model

    def reload_weights(self, *, weights_iterator: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Does not tell which weights it missed; vLLM logs them."""
        assert "weights" not in self.llm.asleep, "unmapped memory"
        self.llm.world.log.append("load")
        self.llm.clean, model = False, self.llm.model
        assert not model.has_loaders, "an earlier reload broke off, and layers have no weights"
        model.has_loaders = True
        model.load_weights(weights_iterator)
        model.has_loaders = False
        for name in model.loaded:
            model.layers[name].quant_method.process_weights_after_loading(model.layers[name])


NextTurn = Callable[[list[int], FakeSamplingParams], Iterator[tuple[int, float]]]


class FakeVLLM:
    """What the fake is told, and all that it saw."""

    def __init__(self, codec: TokenCodec, tied: bool = False) -> None:
        self.codec, self.options = codec, {"tie_word_embeddings": tied}
        self.policy = TalkativePolicy(codec, seed=1, **self.options)
        self.talk: NextTurn = self.from_model
        self.overshoot = 0  # tokens after a stop
        self.log: list[str] = []
        self.arguments: list[dict[str, Any]] = []
        self.requests: list[tuple[list[int], FakeSamplingParams]] = []
        self.num_sampled = 0
        self.llm: FakeLLM | None = None
        self.resets, self.on_cpu = True, False
        self.module, self.platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
        self.platforms.current_platform = SimpleNamespace(
            is_sleep_mode_available=lambda: not self.on_cpu, is_cpu=lambda: self.on_cpu
        )
        self.module.LLM, self.module.SamplingParams = self.make_llm, FakeSamplingParams

    def make_llm(self, **arguments: Any) -> FakeLLM:
        assert self.llm is None, "one engine, one vLLM"
        self.arguments.append(arguments)
        self.llm = FakeLLM(self, **arguments)
        return self.llm

    def play_turns(self, scripts: dict[tuple[int, ...], Sequence[Sequence[int]]]) -> None:
        """Let the i-th request of a prompt play its i-th turn, then end-of-sequence; log-probs tell positions."""
        turns = {prompt: iter(turns) for prompt, turns in scripts.items()}

        def talk(ids: list[int], params: FakeSamplingParams) -> Iterator[tuple[int, float]]:
            prompt = next(p for p in turns if tuple(ids[: len(p)]) == p)
            for i, token_id in enumerate(next(turns[prompt], (self.codec.eos_id,))):
                yield token_id, position_eighths(len(ids) + i)

        self.talk = talk

    def from_model(self, ids: list[int], params: FakeSamplingParams) -> Iterator[tuple[int, float]]:
        ids, generator = list(ids), random.Random(params.seed)
        while True:
            row = forward_row(self.llm.model.policy, ids)
            row = (row / (params.temperature or 1.0)).log_softmax(-1)
            greedy = params.temperature == 0
            ids.append(int(row.argmax()) if greedy else generator.choices(range(len(row)), row.exp().tolist())[0])
            yield ids[-1], float(row[ids[-1]])

    def complete(self, ids: list[int], params: FakeSamplingParams) -> SimpleNamespace:
        """One output, up to a stop string, end-of-sequence or max_tokens, and `overshoot` more where stopped."""
        tokens, logprobs, left = [], [], math.inf
        for token_id, logprob in self.talk(ids, params):
            tokens.append(token_id)
            logprobs.append(logprob)
            self.num_sampled += 1
            left -= 1
            shown = [t for t in tokens if not (params.skip_special_tokens and t in self.codec.special_ids)]
            text = self.codec.decode(shown)
            if left == math.inf and (token_id == self.codec.eos_id or any(stop in text for stop in params.stop)):
                left = self.overshoot
            if len(tokens) == params.max_tokens or left <= 0:
                break
        found = [{t: SimpleNamespace(logprob=value)} for t, value in zip(tokens, logprobs, strict=True)]
        output = SimpleNamespace(index=0, token_ids=tokens, logprobs=None if params.logprobs is None else found)
        return SimpleNamespace(prompt_token_ids=ids, outputs=[output], finished=True)


class FakeLLM:
    """`vllm.LLM` with the arguments that are used."""

    def __init__(
        self,
        world: FakeVLLM,
        *,
        model: str,
        enable_sleep_mode: bool = False,
        gpu_memory_utilization: float = 0.9,
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        dtype: str = "auto",
        logprobs_mode: str = "raw_logprobs",
        enable_prefix_caching: bool = False,
        generation_config: str = "auto",
        trust_remote_code: bool = True,
        seed: int = 0,
        enforce_eager: bool = False,
        distributed_executor_backend: str | None = None,
        enable_chunked_prefill: bool = True,
        max_num_batched_tokens: int = 2048,
    ) -> None:
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0", "collective_rpc could not see the trainer's tensors"
        assert not trust_remote_code, "code of the model's folder would run"
        assert generation_config == "vllm" and model == "folder" and not (world.on_cpu and enable_sleep_mode)
        assert not (world.on_cpu and enable_chunked_prefill), "CPU Generator does not use offset"
        assert enable_chunked_prefill or max_num_batched_tokens >= max_model_len
        self.world, self.max_model_len, self.can_sleep = world, max_model_len, enable_sleep_mode
        self.model = FakeModel(world.codec, **world.options)
        self.asleep: dict[str, Any] = {}
        self.clean = True  # no prefix of older weights in the cache
        assert not torch.is_autocast_enabled("cpu")
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        torch.set_num_threads = lambda number: None  # as on a CPU
        world.log.append("build")

    def sleep(self, level: int = 1) -> None:
        assert self.can_sleep and not self.asleep
        self.asleep = {
            "weights": [p.clone() for p in self.model.parameters()] if level == 1 else None,
            "kv_cache": None,
        }
        for parameter in self.model.parameters():
            torch.nn.init.constant_(parameter, math.nan)
        self.world.log.append(f"sleep {level}")

    def wake_up(self, tags: list[str] | None = None) -> None:
        for tag in tags or ["weights", "kv_cache"]:
            saved = self.asleep.pop(tag)
            for parameter, value in zip(self.model.parameters(), saved or [], strict=False):
                parameter.data.copy_(value)
            self.world.log.append(f"wake {tag}")

    def collective_rpc(self, method: Callable[[FakeWorker], Any]) -> list[Any]:
        return [method(FakeWorker(self))]

    def reset_prefix_cache(self) -> bool:
        self.world.log.append("reset")
        self.clean = self.world.resets
        return self.clean

    def generate(
        self, prompts: list[dict[str, list[int]]], sampling_params: list[FakeSamplingParams], *, use_tqdm: bool = True
    ) -> list[SimpleNamespace]:
        assert not self.asleep and self.clean and not use_tqdm and not torch.is_autocast_enabled("cpu")
        wanted = dict(self.world.policy.model.named_parameters(remove_duplicate=False))
        assert all(torch.equal(layer.packed, wanted[name]) for name, layer in self.model.layers.items()), (
            "stale weights"
        )
        self.world.log.append(f"generate {len(prompts)}")
        answers = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            ids = prompt.pop("prompt_token_ids")
            assert not prompt and len(ids) + params.max_tokens <= self.max_model_len
            self.world.requests.append((ids, params))
            answers.append(self.world.complete(ids, params))
        return answers


def forward_row(policy: TalkativePolicy, ids: Sequence[int]) -> torch.Tensor:
    """Logits of the token after `ids`."""
    return policy._head(policy.model.get_decoder()(torch.tensor([ids])).last_hidden_state[0, -1])
