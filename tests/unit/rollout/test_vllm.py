"""The vLLM adapter: turns, searches and sampling, against a fake; tests/vllm runs a real one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from helpers.fake_vllm import FakeVLLM, forward_row
from helpers.passages import PASSAGES, PROTOCOL, ToyRetriever
from helpers.players import GREEDY, ScriptedPolicy, make_request
from helpers.tokenizers import TOKENIZERS, word_tokenizer
from helpers.vllm_runs import (
    VLLM_LIMITS,
    VLLM_QUESTIONS,
    VLLM_SCRIPTS,
    assert_played,
    attach_vllm,
    by_conversation,
    install_vllm,
    run_vllm,
    vllm_requests,
    without_logprobs,
)
from sdsearch_lightning.errors import ConfigError, RetrievalError
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.rollout import GenerateEngine
from sdsearch_lightning.rollout.vllm import VLLMEngine
from sdsearch_lightning.types import Limits, Sampling, StopReason, Trajectory


@pytest.fixture
def world(byte_codec: TokenCodec, monkeypatch: pytest.MonkeyPatch) -> FakeVLLM:
    return install_vllm(FakeVLLM(byte_codec), monkeypatch)


@pytest.fixture
def talkative(word_codec: TokenCodec, monkeypatch: pytest.MonkeyPatch) -> FakeVLLM:
    return install_vllm(FakeVLLM(word_codec), monkeypatch)


# Turns


@pytest.mark.parametrize("overshoot", [0, 3])
@pytest.mark.parametrize(
    "limits",
    [
        VLLM_LIMITS,
        replace(VLLM_LIMITS, max_turn_tokens=20),
        replace(VLLM_LIMITS, max_invalid_actions=9, max_searches=1),
        replace(VLLM_LIMITS, max_tokens=90),
        replace(VLLM_LIMITS, max_tokens=44),
        replace(VLLM_LIMITS, max_tokens=30),  # less than some prompts
    ],
)
def test_scripted_turns_become_what_the_conversation_makes_of_them(
    world: FakeVLLM, limits: Limits, overshoot: int
) -> None:
    requests = vllm_requests(world, tail=" and more")
    world.overshoot = overshoot
    trajectories = run_vllm(world, requests, limits=limits)
    assert_played(world, trajectories, [by_conversation(world, request, limits) for request in requests])
    taken = sum(sum(t.policy_mask) for t in trajectories)
    assert world.num_sampled > taken if overshoot else world.num_sampled == taken


def test_the_scripts_do_all_that_a_rollout_can_do(world: FakeVLLM) -> None:
    """Or the comparisons here would compare less than they seem to."""
    trajectories = run_vllm(world, vllm_requests(world))
    truncated = run_again(world, replace(VLLM_LIMITS, max_tokens=90))
    reasons = [t.stop_reason for t in trajectories]
    assert set(reasons) == {StopReason.ANSWERED, StopReason.MALFORMED, StopReason.MAX_SEARCHES}
    assert {t.stop_reason for t in truncated} >= {StopReason.MAX_TOKENS, StopReason.ANSWERED}
    assert [len(t.queries) for t in trajectories] == [2, 1, 0, 1, 0, 1, 2]
    assert [t.num_invalid_actions for t in trajectories] == [0, 1, 0, 1, 2, 0, 0]


def run_again(world: FakeVLLM, limits: Limits) -> list[Trajectory]:
    world.llm = None
    return run_vllm(world, vllm_requests(world), limits=limits)


@pytest.mark.parametrize("name", ["byte", "bpe", "bpe, pad = eos", "metaspace"])
def test_the_lockstep_engine_plays_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = install_vllm(FakeVLLM(TokenCodec(TOKENIZERS[name](), PROTOCOL.tags)), monkeypatch)
    requests, ours, theirs = vllm_requests(world), ToyRetriever(), ToyRetriever()
    trajectories = run_vllm(world, requests, ours)
    flat = {r.prompt_ids: sum(map(world.codec.encode, VLLM_SCRIPTS[r.question.text]), ()) for r in requests}
    reference = GenerateEngine()
    pool = attach_vllm(reference, world, theirs)
    reference.policy = ScriptedPolicy(flat, len(world.codec.tokenizer))
    expected = reference.run(requests)
    pool.close()
    assert list(map(without_logprobs, trajectories)) == list(map(without_logprobs, expected))
    assert {query for call in ours.calls for query in call} == {query for call in theirs.calls for query in call}


def test_a_round_is_one_generate_call_and_one_retrieval_call(world: FakeVLLM) -> None:
    retriever = ToyRetriever()
    run_vllm(world, vllm_requests(world), retriever)
    assert [entry for entry in world.log if entry.startswith("generate")] == ["generate 7", "generate 6", "generate 5"]
    assert retriever.calls == [["capital of France", "the city", "a"], ["Rome", "capital of Italy", "b"]]


def test_turns_ask_for_no_more_than_their_budget(world: FakeVLLM) -> None:
    limits = replace(VLLM_LIMITS, max_turn_tokens=41, max_tokens=130)
    run_vllm(world, vllm_requests(world), limits=limits)
    lengths = [len(ids) for ids, _ in world.requests]
    budgets = [params.max_tokens for _, params in world.requests]
    assert budgets[:7] == [min(41, 130 - length) for length in lengths[:7]]
    second = world.requests.index(
        next(r for r in world.requests[7:] if VLLM_QUESTIONS[5].text in world.codec.decode(r[0]))
    )
    assert budgets[second] == 41 - len("a <search> Rome")  # the same turn goes on


def test_stop_strings_are_those_that_end_a_turn(world: FakeVLLM) -> None:
    run_vllm(world, vllm_requests(world))
    assert all(p.stop == ["</search>", "</answer>"] and p.include_stop_str_in_output for _, p in world.requests)


def test_tags_that_are_special_tokens_stop_too(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": list(PROTOCOL.tags)})
    world = install_vllm(FakeVLLM(TokenCodec(tokenizer, PROTOCOL.tags)), monkeypatch)
    assert world.codec.special_ids >= {world.codec.encode(tag)[0] for tag in ("</search>", "</answer>")}
    request = make_request(world.codec, sampling=GREEDY)
    said = [world.codec.encode(turn) for turn in ("<search> Rome </search> a b", "<answer> b </answer> a b a b")]
    world.play_turns({request.prompt_ids: said})
    (trajectory,) = run_vllm(world, [request])
    assert trajectory.queries == ("Rome",) and trajectory.answer == "b"
    assert world.num_sampled == sum(trajectory.policy_mask)


# Searches


def test_no_passages_found(world: FakeVLLM) -> None:
    requests = vllm_requests(world)
    trajectories = run_vllm(world, requests, ToyRetriever(()))
    assert_played(
        world, trajectories, [by_conversation(world, r, VLLM_LIMITS, search=lambda query: ()) for r in requests]
    )
    assert trajectories[0].passages == ((), ()) and trajectories[0].answer == "b"


def test_a_failed_search_ends_its_own_rollout_only(world: FakeVLLM) -> None:
    def fail(queries: Sequence[str]) -> None:
        if "the city" in queries:
            raise ConnectionError("down")

    requests = vllm_requests(world)
    trajectories = run_vllm(world, requests, ToyRetriever(fail=fail))
    expected = [by_conversation(world, request, VLLM_LIMITS) for request in requests]
    expected[3] = by_conversation(world, requests[3], VLLM_LIMITS, search=lambda query: RetrievalError("down"))
    assert_played(world, trajectories, expected)
    assert [t.stop_reason is StopReason.RETRIEVAL_ERROR for t in trajectories] == [i == 3 for i in range(7)]


def test_passages_reach_the_model(talkative: FakeVLLM) -> None:
    requests = [make_request(talkative.codec, question, (0, i)) for i, question in enumerate(VLLM_QUESTIONS)]
    one = run_vllm(talkative, requests)
    talkative.llm = None
    other = run_vllm(talkative, requests, ToyRetriever(PASSAGES[4:]))
    differ = [t.token_ids != u.token_ids for t, u in zip(one, other, strict=True)]
    assert any(differ) and all(bool(t.queries) or not d for t, d in zip(one, differ, strict=True))


# Sampling


def test_greedy_rollouts_are_those_of_the_lockstep_engine(talkative: FakeVLLM) -> None:
    """The fake decodes with the weights that were pushed; after an update, with the new ones."""
    requests = [make_request(talkative.codec, question, (0, i), 0, GREEDY) for i, question in enumerate(VLLM_QUESTIONS)]
    engine, seen = VLLMEngine("folder"), []
    for _ in range(3):
        found = run_vllm(talkative, requests, engine=engine)
        reference = GenerateEngine()
        pool = attach_vllm(reference, talkative)
        expected = reference.run(requests)
        pool.close()
        assert list(map(without_logprobs, found)) == list(map(without_logprobs, expected))
        for one, other in zip(found, expected, strict=True):
            assert one.sampled_logprobs == pytest.approx(other.sampled_logprobs, abs=1e-10)
        seen.append([t.token_ids for t in found])
        with torch.no_grad():
            for parameter in talkative.policy.parameters():
                parameter.mul_(0.7)
    assert seen[0] != seen[1] != seen[2]


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_logprobs_are_those_of_the_policy_at_the_temperature(talkative: FakeVLLM, temperature: float) -> None:
    requests = [
        make_request(talkative.codec, q, (0, i), 0, Sampling(temperature)) for i, q in enumerate(VLLM_QUESTIONS)
    ]
    for trajectory in run_vllm(talkative, requests):
        ids = trajectory.token_ids
        for i, sampled in enumerate(trajectory.policy_mask):
            if sampled:
                with torch.no_grad():
                    row = (forward_row(talkative.policy, ids[:i]) / temperature).log_softmax(-1)
                assert trajectory.sampled_logprobs[i] == pytest.approx(float(row[ids[i]]), abs=1e-10)


def test_every_turn_of_every_rollout_has_its_own_seed(world: FakeVLLM) -> None:
    run_vllm(world, vllm_requests(world, Sampling(0.7)))
    seeds = {tuple(ids): params.seed for ids, params in world.requests}
    assert len(set(seeds.values())) == len(world.requests) == 18
    assert {params.temperature for _, params in world.requests} == {0.7}
    world.llm, world.requests = None, []
    run_vllm(world, vllm_requests(world, Sampling(0.7))[::-1])
    assert {tuple(ids): params.seed for ids, params in world.requests} == seeds  # whatever they are batched with


def test_a_rollout_depends_on_its_seed_alone(talkative: FakeVLLM) -> None:
    engine, request = VLLMEngine("folder"), make_request(talkative.codec)
    requests = [replace(request, seed=seed, rollout_index=seed) for seed in range(6)]
    found = run_vllm(talkative, requests, engine=engine)
    assert [t.rollout_index for t in found] == list(range(6))
    assert len({t.token_ids for t in found}) == 6
    assert run_vllm(talkative, requests[::-1], engine=engine) == found[::-1]
    assert [run_vllm(talkative, [r], engine=engine)[0] for r in requests] == found


@pytest.mark.parametrize(
    ("mode", "sampling", "fine"),
    [
        ("processed_logprobs", Sampling(1.0, 1.0), True),
        ("processed_logprobs", Sampling(0.7, 1.0), True),
        ("processed_logprobs", Sampling(1.0, 0.9), False),
        ("processed_logprobs", Sampling(0.0, 0.9), True),
        ("raw_logprobs", Sampling(1.0, 1.0), True),
        ("raw_logprobs", Sampling(1.0, 0.9), True),
        ("raw_logprobs", Sampling(0.7, 1.0), False),
        ("raw_logprobs", Sampling(0.0, 1.0), True),
    ],
)
def test_sampling_whose_logprobs_would_be_wrong_is_refused(
    world: FakeVLLM, mode: str, sampling: Sampling, fine: bool
) -> None:
    requests, engine = vllm_requests(world, sampling), VLLMEngine("folder", logprobs_mode=mode)
    if not fine:
        with pytest.raises(ConfigError, match=rf"temperature {sampling.temperature} .*top_p {sampling.top_p}.*{mode}"):
            run_vllm(world, requests, engine=engine)
        return
    run_vllm(world, requests, engine=engine)
    assert world.arguments[0]["logprobs_mode"] == mode
    top_p = sampling.top_p if sampling.temperature else 1.0
    assert {(p.temperature, p.top_p) for _, p in world.requests} == {(sampling.temperature, top_p)}
