"""A tiny Llama in a folder, for a vLLM that runs: the policy in float32, its requests, and what it was recorded as."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from helpers.models import tiny_model
from helpers.passages import PROTOCOL, ToyRetriever
from helpers.players import SAMPLED, make_request
from helpers.tokenizers import word_tokenizer
from helpers.vllm_runs import VLLM_QUESTIONS
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.policy.lora import LoRA
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.protocol.conversation import Conversation
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.rollout import Engine, SearchPool
from sdsearch_lightning.rollout.engine import run_awake
from sdsearch_lightning.rollout.vllm import VLLMEngine
from sdsearch_lightning.types import Limits, Question, RolloutRequest, Sampling, Trajectory

MAX_TOKENS = 480
REAL_LIMITS = Limits(
    max_searches=3, max_invalid_actions=4, max_turn_tokens=24, max_observation_tokens=40, max_tokens=MAX_TOKENS
)
WORD_CODEC = TokenCodec(word_tokenizer(), PROTOCOL.tags)
TEXT_IDS = tuple(range(3, 24))
LONG_QUESTION = [Question("long", "who where is Paris Rome France Italy capital of the city . a b " * 24, ("Paris",))]
"""Longer than a block of vLLM's prefix cache, which keeps whole blocks."""


def llama(tied: bool = True, seed: int = 0) -> Any:
    """Heads of 32, the smallest that vLLM has for a CPU; the output layer is the embedding where tied."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "max_position_embeddings": 1024}
    return tiny_model("llama", torch.float32, seed, WORD_CODEC.tokenizer, tie_word_embeddings=tied, **sizes)


def write_llama(folder: Path, tied: bool = True) -> Path:
    """The folder that vLLM starts from: as every run does, with the weights that the policy begins with."""
    llama(tied).save_pretrained(folder)
    WORD_CODEC.tokenizer.save_pretrained(folder)
    return folder


def real_engine(folder: Path, dtype: str = "float32", sleep_level: Any = 0, **options: Any) -> VLLMEngine:
    """A vLLM that takes little memory and compiles nothing."""
    return VLLMEngine(
        str(folder),
        0.1,
        512,
        16,
        dtype,
        sleep_level=sleep_level,
        options={"enforce_eager": True, "kv_cache_memory_bytes": 2**26} | options,
    )


def adapted_llama() -> Any:
    """A module whose policy has an adapter on the queries and values; its adapter has learned nothing yet."""
    module = SDSearchModule("x", protocol=PROTOCOL, lora=LoRA(r=4), kl_coef=0.0)
    module.attach(llama(), WORD_CODEC.tokenizer)
    module.policy.eval()
    return module


def policy_of(model: Any) -> Policy:
    return Policy(model).eval()


@torch.no_grad()
def move_weights(policy: Policy, seed: int) -> None:
    """Every weight by a tenth of its size, as no update of a training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        parameter.add_(0.1 * parameter.std().nan_to_num(1.0) * torch.randn(parameter.shape, generator=generator))


def word_requests(
    sampling: Sampling, copies: int = 4, questions: Sequence[Question] = VLLM_QUESTIONS
) -> list[RolloutRequest]:
    return [
        make_request(WORD_CODEC, question, (0, i), index, sampling)
        for i, question in enumerate(questions)
        for index in range(copies)
    ]


@torch.no_grad()
def play_words(engine: Engine, policy: Policy, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
    """As in a step: wake, sync, run, sleep."""
    pool = SearchPool(ToyRetriever(), top_k=2)
    engine.attach(policy, lambda request: Conversation(request, PROTOCOL, WORD_CODEC, REAL_LIMITS), pool)
    try:
        return run_awake(engine, policy, requests)
    finally:
        pool.close()


@torch.no_grad()
def recorded_gap(
    policy: Policy, played: Sequence[Trajectory], sampling: Sampling = SAMPLED
) -> tuple[float, float, int]:
    """Recorded log-probs against the stock model's forward pass over each rollout alone: mean, most, and how many."""
    gaps = []
    for trajectory in played:
        ids = trajectory.token_ids
        logits = policy.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
        logprobs = (logits / (sampling.temperature or 1.0)).log_softmax(-1)
        for i, is_sampled in enumerate(trajectory.policy_mask):
            if is_sampled:
                gaps.append(abs(float(logprobs[i - 1, ids[i]]) - trajectory.sampled_logprobs[i]))
    return sum(gaps) / len(gaps), max(gaps), len(gaps)


@torch.no_grad()
def margin(policy: Policy, token_ids: Sequence[int]) -> float:
    """Between the logits of the likeliest next token and the one after it."""
    best = policy.model(input_ids=torch.tensor([list(token_ids)])).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def first_difference(one: Trajectory, other: Trajectory) -> int:
    pairs = enumerate(zip(one.token_ids, other.token_ids, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one.token_ids), len(other.token_ids)))
