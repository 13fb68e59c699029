"""The vLLM adapter with a vLLM that runs, on the CPU: `make test-vllm`. A tiny Llama in float32, nothing is downloaded.

Every bound has a partner that it refuses: the same run with one thing left out, as a wrong adapter would.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from helpers.lora import move_adapter
from helpers.players import GREEDY, SAMPLED
from helpers.vllm_real import (
    LONG_QUESTION,
    MAX_TOKENS,
    TEXT_IDS,
    adapted_llama,
    first_difference,
    llama,
    margin,
    move_weights,
    play_words,
    policy_of,
    real_engine,
    recorded_gap,
    word_requests,
    write_llama,
)
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.rollout import SlotEngine, vllm as adapter, vllm_weights
from sdsearch_lightning.rollout.probe import EXACT, HALF, find_exact, measure_gap
from sdsearch_lightning.rollout.vllm import VLLMEngine
from sdsearch_lightning.types import Sampling

if not any(adapter._version(name) for name in adapter.DISTRIBUTIONS):
    pytest.skip("needs vLLM for the CPU: make test-vllm", allow_module_level=True)
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]  # of vLLM's own

MakeEngine = Callable[..., VLLMEngine]
BOUND = 1e-5
"""Mean difference of log-probs in nats; measured: 1.2e-6 to 1.7e-6."""


@pytest.fixture(scope="module", autouse=True)
def _surroundings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield


@pytest.fixture(scope="module")
def make_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeEngine]:
    """All live as long as the last one: a vLLM that ends takes down what the others in its process need."""
    engines = []

    def make(tied: bool = True, **options: Any) -> VLLMEngine:
        engines.append(real_engine(write_llama(tmp_path_factory.mktemp("llama"), tied), **options))
        return engines[-1]

    yield make
    engines.clear()


@pytest.fixture(scope="module")
def tied(make_engine: MakeEngine) -> VLLMEngine:
    return make_engine()


@pytest.fixture(scope="module")
def untied(make_engine: MakeEngine) -> VLLMEngine:
    return make_engine(False)


@pytest.fixture(params=["tied", "untied"])
def pair(request: pytest.FixtureRequest) -> tuple[VLLMEngine, Policy]:
    """The engine, which lives on, and a policy with the weights of its folder."""
    return request.getfixturevalue(request.param), policy_of(llama(request.param == "tied"))


def played_gaps(engine: VLLMEngine, policy: Policy, updates: int, sampling: Sampling = SAMPLED) -> list[float]:
    """The mean gap before the first update, and after each."""
    gaps, num_searches = [], 0
    for seed in range(updates + 1):
        if seed:
            move_weights(policy, seed)
        played = play_words(engine, policy, word_requests(sampling))
        num_searches += sum(len(rollout.queries) for rollout in played)
        mean, _, number = recorded_gap(policy, played, sampling)
        assert number > 200
        gaps.append(mean)
    assert num_searches or updates < 5
    print("gaps:", *(f"{gap:.2g}" for gap in gaps), "searches:", num_searches)
    return gaps


# Weights


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_the_trainers_after_five_updates(pair: tuple[VLLMEngine, Policy], temperature: float) -> None:
    assert max(played_gaps(*pair, 5, Sampling(temperature))) <= BOUND


def test_an_update_that_nobody_pushes_is_seen(tied: VLLMEngine) -> None:
    policy = policy_of(llama())
    play_words(tied, policy, word_requests(SAMPLED))
    older = policy_of(llama())
    move_weights(policy, 1)
    assert recorded_gap(policy, play_words(tied, older, word_requests(SAMPLED)))[0] > 1e3 * BOUND


def test_a_tied_output_layer_would_be_stale(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM's `reload_weights` alone makes of it: right until the first update, since the folder is the policy."""
    monkeypatch.setattr(vllm_weights, "_repack_shared", lambda model: None)
    first, *later = played_gaps(make_engine(), policy_of(llama()), 2)
    assert first <= BOUND and min(later) > 1e3 * BOUND


def test_loaders_are_gone_outside_of_a_reload(untied: VLLMEngine) -> None:
    """The fake says the same."""
    policy = policy_of(llama(False))
    untied.sync(policy)
    with pytest.raises(AttributeError, match="no attribute 'weight_loader'"):
        untied._llm.apply_model(lambda model: model.load_weights(policy.model.named_parameters()))
    assert played_gaps(untied, policy, 0)[0] <= BOUND


@pytest.mark.parametrize("given", [0, 3])
def test_a_push_that_failed_is_done_again(untied: VLLMEngine, monkeypatch: pytest.MonkeyPatch, given: int) -> None:
    """After the embedding, queries and keys, which vLLM keeps in one layer with the values: it must start anew."""
    policy = policy_of(llama(False))

    def some(model: Any, weights: Any) -> Iterator[Any]:
        yield from list(weights.items())[:given]
        raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(vllm_weights, "plain_weights", some)
        untied.sync(policy)
    move_weights(policy, 3)
    assert played_gaps(untied, policy, 1)[0] <= BOUND


def test_weights_that_nobody_pushes_are_an_error(untied: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = vllm_weights.plain_weights
    monkeypatch.setattr(vllm_weights, "plain_weights", lambda model, weights: list(whole(model, weights))[1:])
    with pytest.raises(ConfigError, match=r"1 weights of vLLM's model .* model\.embed_tokens\.weight"):
        untied.sync(policy_of(llama(False)))


def test_adapters_are_merged(tied: VLLMEngine) -> None:
    module, plain = adapted_llama(), policy_of(llama())
    for _ in range(3):
        move_adapter(module)
        played = play_words(tied, module.policy, word_requests(SAMPLED))
        assert recorded_gap(module.policy, played)[0] <= BOUND
        assert recorded_gap(plain, played)[0] > 1e3 * BOUND, "the adapter changes nothing"


# What it samples


def test_greedy_answers_are_the_slot_engines_up_to_ties(pair: tuple[VLLMEngine, Policy]) -> None:
    engine, policy = pair
    same = []
    for seed in range(4):
        ours = play_words(SlotEngine(kv_cache_gib=0.05, max_slots=8), policy, word_requests(GREEDY))
        theirs = play_words(engine, policy, word_requests(GREEDY))
        for one, other in zip(ours, theirs, strict=True):
            same.append(one.token_ids == other.token_ids)
            if not same[-1]:
                assert margin(policy, one.token_ids[: first_difference(one, other)]) < 1e-4
        move_weights(policy, seed)
    stale = play_words(SlotEngine(kv_cache_gib=0.05, max_slots=8), policy, word_requests(GREEDY))
    print("greedy rollouts alike:", sum(same), "of", len(same))
    assert sum(same) >= 0.9 * len(same)
    assert sum(one.token_ids == other.token_ids for one, other in zip(stale, theirs, strict=True)) < 0.9 * len(stale)


@pytest.mark.parametrize("forgets", [True, False])
def test_prefixes_of_older_weights_are_forgotten(
    tied: VLLMEngine, monkeypatch: pytest.MonkeyPatch, forgets: bool
) -> None:
    policy, requests = policy_of(llama()), word_requests(SAMPLED, 1, LONG_QUESTION)
    play_words(tied, policy, requests)
    move_weights(policy, 1)
    if not forgets:
        monkeypatch.setattr(tied._llm, "reset_prefix_cache", lambda: True)
    gap = recorded_gap(policy, play_words(tied, policy, requests))[0]
    assert gap <= BOUND if forgets else gap > 1e3 * BOUND


@pytest.mark.parametrize("whole", [True, False])
def test_more_prompts_than_one_pass_reads(make_engine: MakeEngine, whole: bool) -> None:
    """Left alone, vLLM cuts the prompt at the end of a pass, and cannot rewind the rollout's generator on a CPU."""
    policy, requests = policy_of(llama()), word_requests(SAMPLED, 4, LONG_QUESTION)
    assert 512 / 2 < len(requests[0].prompt_ids) < 512
    engine = make_engine(max_num_batched_tokens=512, **{} if whole else {"enable_chunked_prefill": True})
    with nullcontext() if whole else pytest.raises(RuntimeError, match="does not use offset"):
        assert recorded_gap(policy, play_words(engine, policy, requests))[0] <= BOUND


# What a run asks of an engine


def test_the_probe_takes_it(pair: tuple[VLLMEngine, Policy]) -> None:
    engine, policy = pair
    for seed in range(2):
        move_weights(policy, seed)
        gap, reasons = find_exact(engine, policy, TEXT_IDS, MAX_TOKENS)
        assert engine.is_exact and gap.mean <= BOUND and not reasons


def test_the_probe_refuses_it_with_stale_weights(tied: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(llama())
    tied.sync(policy)
    move_weights(policy, 1)
    monkeypatch.setattr(tied, "sync", lambda policy: None)
    with pytest.raises(ConfigError, match="VLLMEngine does not sample from the policy"):
        find_exact(tied, policy, TEXT_IDS, MAX_TOKENS)


def test_half_precision_is_told_apart(make_engine: MakeEngine) -> None:
    engine, policy = make_engine(dtype="bfloat16"), policy_of(llama())
    move_weights(policy, 1)
    gap = measure_gap(engine, policy, TEXT_IDS, MAX_TOKENS)
    assert not engine.is_exact and EXACT < gap.mean <= HALF
    find_exact(engine, policy, TEXT_IDS, MAX_TOKENS)
    engine.is_exact = True
    with pytest.raises(ConfigError, match="does not sample from the policy"):
        find_exact(engine, policy, TEXT_IDS, MAX_TOKENS)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_cpu_does_not_sleep(make_engine: MakeEngine, level: int) -> None:
    engine = make_engine(sleep_level=level)
    with pytest.raises(ConfigError, match=f"sleep_level is {level}") if level else nullcontext():
        assert played_gaps(engine, policy_of(llama()), 1)[-1] <= BOUND


@pytest.mark.parametrize("kept", [True, False])
def test_the_trainers_process_stays_as_it_was(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    def draw(engine: VLLMEngine | None) -> tuple[Any, ...]:
        random.seed(5), torch.manual_seed(5)
        if engine is not None:
            engine.sync(policy_of(llama()))
        return random.random(), float(torch.rand(()))

    def settings() -> tuple[Any, ...]:
        return torch.set_num_threads, torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()

    before = settings()
    monkeypatch.setattr(torch, "set_num_threads", torch.set_num_threads)  # put back
    if not kept:
        monkeypatch.setattr(adapter, "_process_state_kept", lambda device: nullcontext())
    assert (draw(make_engine()) == draw(None)) == kept
    assert (settings() == before) == kept
