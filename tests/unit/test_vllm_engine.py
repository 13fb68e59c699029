"""The vLLM adapter against a fake that speaks vLLM's interface, and is stricter than vLLM where vLLM is quietly wrong.

No vLLM release is run here. The fake refuses unknown arguments, generating while asleep, weights that are not the
policy's, and prefixes that were cached under older weights; it samples from a script, or from a tiny model of its own.
"""

from __future__ import annotations

import importlib.util
import math
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from toys import (
    EOS,
    PASSAGES,
    PROTOCOL,
    TOKENIZERS,
    ScriptedPolicy,
    TalkativePolicy,
    ToyRetriever,
    make_request,
    play,
    word_tokenizer,
)

from sdsearch_lightning.errors import ConfigError, RetrievalError, RolloutError
from sdsearch_lightning.protocol import Conversation
from sdsearch_lightning.rollout import Engine, GenerateEngine, SearchPool
from sdsearch_lightning.rollout import vllm as adapter
from sdsearch_lightning.rollout.engine import run_awake
from sdsearch_lightning.rollout.vllm import CLOSING_TAGS, VLLMEngine
from sdsearch_lightning.tokenization import TokenCodec
from sdsearch_lightning.types import Limits, Question, RolloutRequest, Sampling, StopReason, Trajectory

ROOT = Path(__file__).parent.parent.parent
LIMITS = Limits(max_searches=2, max_invalid_actions=1, max_turn_tokens=90, max_observation_tokens=70, max_tokens=900)
GREEDY = Sampling(temperature=0.0)
SCRIPTS = {
    "where is Paris ?": ["hm <search> capital of France </search>", "<search> Rome </search>", "<answer> b </answer>"],
    "who": [f"a {EOS}", "<search> capital of Italy </search>", "<answer> b </answer>"],
    "capital of France": ["<answer> a b </answer>"],
    "the city of Rome is where ?": ["<search> the city </search>", "a </search>", "<answer> Italy </answer>"],
    "Paris is where ?": ["a </search>", "b </answer>"],  # one invalid action too many
    "is Rome the city ?": ["a <search> Rome", "</search>", "<answer> a </answer>"],  # a turn in two outputs
    "of the city ?": ["<search> a </search>", "<search> b </search>", "<search> a b </search>"],  # one too many
}
QUESTIONS = [Question(f"q{i}", text, ("Paris",)) for i, text in enumerate(SCRIPTS)]

# The fake


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


class FakeModel(torch.nn.Module):
    """The model inside vLLM: it takes the names of a checkpoint, and calls its parameters otherwise."""

    def __init__(self, codec: TokenCodec) -> None:
        super().__init__()
        self.policy = TalkativePolicy(codec, seed=99)  # other weights than any policy here
        self.loaded: list[str] = []

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        own, self.loaded = dict(self.policy.model.named_parameters()), []
        for name, weight in weights:
            assert not weight.requires_grad and own[name].shape == weight.shape
            own[name].copy_(weight)
            self.loaded.append(name)
        return {f"policy.model.{name}" for name in self.loaded}


NextTurn = Callable[[list[int], FakeSamplingParams], Iterator[tuple[int, float]]]


class FakeVLLM:
    """What the fake is told, and all that it saw."""

    def __init__(self, codec: TokenCodec) -> None:
        self.codec, self.policy = codec, TalkativePolicy(codec, seed=1)
        self.talk: NextTurn = self.from_model
        self.overshoot = 0  # tokens after a stop
        self.log: list[str] = []
        self.arguments: list[dict[str, Any]] = []
        self.requests: list[tuple[list[int], FakeSamplingParams]] = []
        self.num_sampled = 0
        self.llm: FakeLLM | None = None
        self.resets = True
        self.module = ModuleType("vllm")
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
                yield token_id, position_logprob(len(ids) + i)

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
        seed: int = 0,
        enforce_eager: bool = False,
        distributed_executor_backend: str | None = None,
    ) -> None:
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0", "apply_model could not see the trainer's tensors"
        assert generation_config == "vllm" and model == "folder"
        self.world, self.max_model_len, self.can_sleep = world, max_model_len, enable_sleep_mode
        self.model = FakeModel(world.codec)
        self.asleep: dict[str, Any] = {}
        self.clean = True  # no prefix of older weights in the cache
        assert not torch.is_autocast_enabled("cpu")
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
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

    def apply_model(self, function: Callable[[FakeModel], Any]) -> list[Any]:
        assert "weights" not in self.asleep, "unmapped memory"
        self.world.log.append("load")
        self.clean = False
        return [function(self.model)]

    def reset_prefix_cache(self) -> bool:
        self.world.log.append("reset")
        self.clean = self.world.resets
        return self.clean

    def generate(
        self, prompts: list[dict[str, list[int]]], sampling_params: list[FakeSamplingParams], *, use_tqdm: bool = True
    ) -> list[SimpleNamespace]:
        assert not self.asleep and self.clean and not use_tqdm and not torch.is_autocast_enabled("cpu")
        wanted = dict(self.world.policy.model.named_parameters())
        assert all(torch.equal(p, wanted[n]) for n, p in self.model.policy.model.named_parameters()), "stale weights"
        self.world.log.append(f"generate {len(prompts)}")
        answers = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            ids = prompt.pop("prompt_token_ids")
            assert not prompt and len(ids) + params.max_tokens <= self.max_model_len
            self.world.requests.append((ids, params))
            answers.append(self.world.complete(ids, params))
        return answers


def position_logprob(position: int) -> float:
    return -(position + 1) / 8


def forward_row(policy: TalkativePolicy, ids: Sequence[int]) -> torch.Tensor:
    """Logits of the token after `ids`."""
    return policy._head(policy.model.get_decoder()(torch.tensor([ids])).last_hidden_state[0, -1])


@pytest.fixture
def world(byte_codec: TokenCodec, monkeypatch: pytest.MonkeyPatch) -> FakeVLLM:
    return install(FakeVLLM(byte_codec), monkeypatch)


@pytest.fixture
def talkative(word_codec: TokenCodec, monkeypatch: pytest.MonkeyPatch) -> FakeVLLM:
    return install(FakeVLLM(word_codec), monkeypatch)


def install(world: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> FakeVLLM:
    monkeypatch.setitem(sys.modules, "vllm", world.module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # the engine sets it; this puts it back
    pretend_version(monkeypatch, "0.30.1")
    return world


def pretend_version(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name != "vllm":
            return real(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(adapter.metadata, "version", version)


def attach(
    engine: Engine,
    world: FakeVLLM,
    retriever: ToyRetriever | None = None,
    limits: Limits = LIMITS,
    **report: Any,
) -> SearchPool:
    pool = SearchPool(retriever or ToyRetriever(), top_k=2)
    engine.attach(world.policy, lambda request: Conversation(request, PROTOCOL, world.codec, limits), pool, **report)
    return pool


def run(
    world: FakeVLLM,
    requests: Sequence[RolloutRequest],
    retriever: ToyRetriever | None = None,
    limits: Limits = LIMITS,
    engine: Engine | None = None,
) -> list[Trajectory]:
    """As in a step: wake, sync, run, sleep."""
    engine = engine or VLLMEngine("folder")
    pool = attach(engine, world, retriever, limits)
    trajectories = run_awake(engine, world.policy, requests)
    pool.close()
    return trajectories


def scripted(world: FakeVLLM, sampling: Sampling = GREEDY, tail: str = "") -> list[RolloutRequest]:
    """A rollout per script, which the fake now plays; `tail` is what the model would say after the end of a turn."""
    requests = [make_request(world.codec, q, (0, i), 7, sampling) for i, q in enumerate(QUESTIONS)]

    def turns(text: str) -> list[tuple[int, ...]]:
        ends = [turn.endswith((*CLOSING_TAGS, EOS)) for turn in SCRIPTS[text]]
        said = [turn + tail * end for turn, end in zip(SCRIPTS[text], ends, strict=True)]
        return list(map(world.codec.encode, said))

    world.play_turns({request.prompt_ids: turns(request.question.text) for request in requests})
    return requests


def by_conversation(world: FakeVLLM, request: RolloutRequest, limits: Limits, **options: Any) -> Trajectory:
    """What the conversation alone makes of the same turns."""
    conversation = Conversation(request, PROTOCOL, world.codec, limits)
    if conversation.stop_reason is not None:
        return conversation.finish()
    search = options.get("search", lambda query: ToyRetriever().search([query], 2)[0])
    return play(conversation, world.codec, SCRIPTS[request.question.text], search)


def without_logprobs(trajectory: Trajectory) -> Trajectory:
    spans = [replace(s, logprobs=(0.0,) * len(s.token_ids)) if s.sampled else s for s in trajectory.spans]
    return replace(trajectory, spans=tuple(spans))


def assert_played(world: FakeVLLM, trajectories: Sequence[Trajectory], expected: Sequence[Trajectory]) -> None:
    """Token for token, every log-prob is that of its position, and each request held the rollout so far."""
    assert list(map(without_logprobs, trajectories)) == list(map(without_logprobs, expected))
    for trajectory in trajectories:
        told = [position_logprob(i) if sampled else 0.0 for i, sampled in enumerate(trajectory.policy_mask)]
        assert trajectory.sampled_logprobs == tuple(told)
    wholes = [t.token_ids for t in trajectories]
    assert all(any(whole[: len(ids)] == tuple(ids) for whole in wholes) for ids, _ in world.requests)


# Turns


@pytest.mark.parametrize("overshoot", [0, 3])
@pytest.mark.parametrize(
    "limits",
    [
        LIMITS,
        replace(LIMITS, max_turn_tokens=20),
        replace(LIMITS, max_invalid_actions=9, max_searches=1),
        replace(LIMITS, max_tokens=90),
        replace(LIMITS, max_tokens=44),
        replace(LIMITS, max_tokens=30),  # less than some prompts
    ],
)
def test_scripted_turns_become_what_the_conversation_makes_of_them(
    world: FakeVLLM, limits: Limits, overshoot: int
) -> None:
    requests = scripted(world, tail=" and more")
    world.overshoot = overshoot
    trajectories = run(world, requests, limits=limits)
    assert_played(world, trajectories, [by_conversation(world, request, limits) for request in requests])
    taken = sum(sum(t.policy_mask) for t in trajectories)
    assert world.num_sampled > taken if overshoot else world.num_sampled == taken


def test_the_scripts_do_all_that_a_rollout_can_do(world: FakeVLLM) -> None:
    """Or the comparisons here would compare less than they seem to."""
    trajectories = run(world, scripted(world))
    truncated = run_again(world, replace(LIMITS, max_tokens=90))
    reasons = [t.stop_reason for t in trajectories]
    assert set(reasons) == {StopReason.ANSWERED, StopReason.MALFORMED, StopReason.MAX_SEARCHES}
    assert {t.stop_reason for t in truncated} >= {StopReason.MAX_TOKENS, StopReason.ANSWERED}
    assert [len(t.queries) for t in trajectories] == [2, 1, 0, 1, 0, 1, 2]
    assert [t.num_invalid_actions for t in trajectories] == [0, 1, 0, 1, 2, 0, 0]


def run_again(world: FakeVLLM, limits: Limits) -> list[Trajectory]:
    world.llm = None
    return run(world, scripted(world), limits=limits)


@pytest.mark.parametrize("name", ["byte", "bpe", "bpe, pad = eos", "metaspace"])
def test_the_lockstep_engine_plays_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = install(FakeVLLM(TokenCodec(TOKENIZERS[name](), PROTOCOL.tags)), monkeypatch)
    requests, ours, theirs = scripted(world), ToyRetriever(), ToyRetriever()
    trajectories = run(world, requests, ours)
    flat = {r.prompt_ids: sum(map(world.codec.encode, SCRIPTS[r.question.text]), ()) for r in requests}
    reference = GenerateEngine()
    pool = attach(reference, world, theirs)
    reference.policy = ScriptedPolicy(flat, len(world.codec.tokenizer))
    expected = reference.run(requests)
    pool.close()
    assert list(map(without_logprobs, trajectories)) == list(map(without_logprobs, expected))
    assert {query for call in ours.calls for query in call} == {query for call in theirs.calls for query in call}


def test_a_round_is_one_generate_call_and_one_retrieval_call(world: FakeVLLM) -> None:
    retriever = ToyRetriever()
    run(world, scripted(world), retriever)
    assert [entry for entry in world.log if entry.startswith("generate")] == ["generate 7", "generate 6", "generate 5"]
    assert retriever.calls == [["capital of France", "the city", "a"], ["Rome", "capital of Italy", "b"]]


def test_turns_ask_for_no_more_than_their_budget(world: FakeVLLM) -> None:
    limits = replace(LIMITS, max_turn_tokens=41, max_tokens=130)
    run(world, scripted(world), limits=limits)
    lengths = [len(ids) for ids, _ in world.requests]
    budgets = [params.max_tokens for _, params in world.requests]
    assert budgets[:7] == [min(41, 130 - length) for length in lengths[:7]]
    second = world.requests.index(next(r for r in world.requests[7:] if QUESTIONS[5].text in world.codec.decode(r[0])))
    assert budgets[second] == 41 - len("a <search> Rome")  # the same turn goes on


def test_stop_strings_are_those_that_end_a_turn(world: FakeVLLM) -> None:
    assert set(CLOSING_TAGS) == {f"</{name}>" for _, name in Conversation._ACTIONS}
    run(world, scripted(world))
    assert all(p.stop == list(CLOSING_TAGS) and p.include_stop_str_in_output for _, p in world.requests)


def test_tags_that_are_special_tokens_stop_too(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": list(PROTOCOL.tags)})
    world = install(FakeVLLM(TokenCodec(tokenizer, PROTOCOL.tags)), monkeypatch)
    assert world.codec.special_ids >= {world.codec.encode(tag)[0] for tag in CLOSING_TAGS}
    request = make_request(world.codec, sampling=GREEDY)
    said = [world.codec.encode(turn) for turn in ("<search> Rome </search> a b", "<answer> b </answer> a b a b")]
    world.play_turns({request.prompt_ids: said})
    (trajectory,) = run(world, [request])
    assert trajectory.queries == ("Rome",) and trajectory.answer == "b"
    assert world.num_sampled == sum(trajectory.policy_mask)


# Searches


def test_no_passages_found(world: FakeVLLM) -> None:
    requests = scripted(world)
    trajectories = run(world, requests, ToyRetriever(()))
    assert_played(world, trajectories, [by_conversation(world, r, LIMITS, search=lambda query: ()) for r in requests])
    assert trajectories[0].passages == ((), ()) and trajectories[0].answer == "b"


def test_a_failed_search_ends_its_own_rollout_only(world: FakeVLLM) -> None:
    def fail(queries: Sequence[str]) -> None:
        if "the city" in queries:
            raise ConnectionError("down")

    requests = scripted(world)
    trajectories = run(world, requests, ToyRetriever(fail=fail))
    expected = [by_conversation(world, request, LIMITS) for request in requests]
    expected[3] = by_conversation(world, requests[3], LIMITS, search=lambda query: RetrievalError("down"))
    assert_played(world, trajectories, expected)
    assert [t.stop_reason is StopReason.RETRIEVAL_ERROR for t in trajectories] == [i == 3 for i in range(7)]


def test_passages_reach_the_model(talkative: FakeVLLM) -> None:
    requests = [make_request(talkative.codec, question, (0, i)) for i, question in enumerate(QUESTIONS)]
    one = run(talkative, requests)
    talkative.llm = None
    other = run(talkative, requests, ToyRetriever(PASSAGES[4:]))
    differ = [t.token_ids != u.token_ids for t, u in zip(one, other, strict=True)]
    assert any(differ) and all(bool(t.queries) or not d for t, d in zip(one, differ, strict=True))


# Sampling


def test_greedy_rollouts_are_those_of_the_lockstep_engine(talkative: FakeVLLM) -> None:
    """The fake decodes with the weights that were pushed; after an update, with the new ones."""
    requests = [make_request(talkative.codec, question, (0, i), 0, GREEDY) for i, question in enumerate(QUESTIONS)]
    engine, seen = VLLMEngine("folder"), []
    for _ in range(3):
        found = run(talkative, requests, engine=engine)
        reference = GenerateEngine()
        pool = attach(reference, talkative)
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
    requests = [make_request(talkative.codec, q, (0, i), 0, Sampling(temperature)) for i, q in enumerate(QUESTIONS)]
    for trajectory in run(talkative, requests):
        ids = trajectory.token_ids
        for i, sampled in enumerate(trajectory.policy_mask):
            if sampled:
                with torch.no_grad():
                    row = (forward_row(talkative.policy, ids[:i]) / temperature).log_softmax(-1)
                assert trajectory.sampled_logprobs[i] == pytest.approx(float(row[ids[i]]), abs=1e-10)


def test_every_turn_of_every_rollout_has_its_own_seed(world: FakeVLLM) -> None:
    run(world, scripted(world, Sampling(0.7)))
    seeds = {tuple(ids): params.seed for ids, params in world.requests}
    assert len(set(seeds.values())) == len(world.requests) == 18
    assert {params.temperature for _, params in world.requests} == {0.7}
    world.llm, world.requests = None, []
    run(world, scripted(world, Sampling(0.7))[::-1])
    assert {tuple(ids): params.seed for ids, params in world.requests} == seeds  # whatever they are batched with


def test_a_rollout_depends_on_its_seed_alone(talkative: FakeVLLM) -> None:
    engine, request = VLLMEngine("folder"), make_request(talkative.codec)
    requests = [replace(request, seed=seed, rollout_index=seed) for seed in range(6)]
    found = run(talkative, requests, engine=engine)
    assert [t.rollout_index for t in found] == list(range(6))
    assert len({t.token_ids for t in found}) == 6
    assert run(talkative, requests[::-1], engine=engine) == found[::-1]
    assert [run(talkative, [r], engine=engine)[0] for r in requests] == found


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
    requests, engine = scripted(world, sampling), VLLMEngine("folder", logprobs_mode=mode)
    if not fine:
        with pytest.raises(ConfigError, match=rf"temperature {sampling.temperature} .*top_p {sampling.top_p}.*{mode}"):
            run(world, requests, engine=engine)
        return
    run(world, requests, engine=engine)
    assert world.arguments[0]["logprobs_mode"] == mode
    top_p = sampling.top_p if sampling.temperature else 1.0
    assert {(p.temperature, p.top_p) for _, p in world.requests} == {(sampling.temperature, top_p)}


# Weights and memory


def test_a_step_wakes_pushes_runs_and_sleeps(world: FakeVLLM) -> None:
    engine = VLLMEngine("folder")
    push = ["load", "reset", "generate 7", "generate 6", "generate 5", "sleep 2"]
    awake = ["wake weights", "load", "wake kv_cache", *push[1:]]
    for step in range(3):
        run(world, scripted(world), engine=engine)
        assert world.log == ["build", *push, *awake * step]
        assert sorted(world.llm.model.loaded) == sorted(name for name, _ in world.policy.model.named_parameters())


@pytest.mark.parametrize("level", [0, 1, 2])
def test_sleep_levels(world: FakeVLLM, level: int) -> None:
    engine = VLLMEngine("folder", sleep_level=level)
    engine.sleep()  # nothing to put to sleep yet
    for _ in range(2):
        run(world, scripted(world), engine=engine)
        engine.sleep()  # already asleep
    assert world.arguments[0]["enable_sleep_mode"] == (level > 0)
    assert [entry for entry in world.log if entry.startswith("sleep")] == [f"sleep {level}"] * 2 * (level > 0)


def test_run_pushes_weights_by_itself_where_it_has_none(world: FakeVLLM) -> None:
    engine = VLLMEngine("folder")
    pool = attach(engine, world)
    for _ in range(2):
        assert len(engine.run(scripted(world))) == 7  # the fake would not have it without
        engine.sleep()
    assert world.log.count("load") == 2
    pool.close()


def test_sync_wakes_what_sleeps(world: FakeVLLM) -> None:
    engine = VLLMEngine("folder")
    run(world, scripted(world), engine=engine)
    world.log.clear()
    engine.sync(world.policy)
    assert world.log == ["wake weights", "load", "wake kv_cache", "reset"]
    engine.wake()
    assert len(world.log) == 4


@pytest.mark.parametrize("level", [0, 2])
def test_a_push_that_failed_is_done_again(world: FakeVLLM, monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    engine = VLLMEngine("folder", sleep_level=level)
    run(world, scripted(world), engine=engine)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(FakeModel, "load_weights", lambda self, weights: 1 / 0)
        engine.sync(world.policy)
    engine.sleep()  # of someone's finally; half awake is left as it is
    pool = attach(engine, world)
    assert engine.run(scripted(world))[0].answer == "b"  # the fake would not have it with half the weights
    pool.close()


def test_weights_that_nobody_pushes_are_an_error(world: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    load = FakeModel.load_weights
    monkeypatch.setattr(FakeModel, "load_weights", lambda self, weights: load(self, list(weights)[1:]))
    with pytest.raises(ConfigError, match=r"1 weights of vLLM's model .* policy\.model\.model\.embed_tokens\.weight"):
        run(world, scripted(world))


def test_shards_are_pushed_whole(world: FakeVLLM) -> None:
    def shard(parameter: torch.Tensor) -> SimpleNamespace:
        half = SimpleNamespace(full_tensor=parameter.detach, shape=(1,), requires_grad=False)
        return SimpleNamespace(detach=lambda: half)

    names = [(name, shard(p)) for name, p in world.policy.model.named_parameters()]
    model = SimpleNamespace(named_parameters=lambda: names)
    engine = VLLMEngine("folder")
    pool = attach(engine, world)
    engine.sync(SimpleNamespace(model=model, parameters=world.policy.parameters))
    assert len(engine.run(scripted(world))) == 7  # the fake compares with the whole weights
    pool.close()


def test_a_prefix_cache_that_stays_is_an_error(world: FakeVLLM) -> None:
    world.resets = False
    with pytest.raises(RolloutError, match="kept its prefix cache"):
        run(world, scripted(world))


def test_the_trainers_random_numbers_stay(world: FakeVLLM) -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    drawn = []
    for engine in (None, VLLMEngine("folder", seed=3)):
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        if engine:
            engine.sync(world.policy)
        drawn.append(draw())
    assert drawn[0] == drawn[1]
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    assert draw() != drawn[0]  # what the fake sets


def test_several_ranks_share_the_trainers_group(world: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    VLLMEngine("folder").sync(world.policy)
    assert world.arguments[0]["distributed_executor_backend"] == "external_launcher"
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["1", "2", "0"]


def test_one_process_needs_no_launcher(world: FakeVLLM) -> None:
    VLLMEngine("folder", 0.3, 1000, 12, "float32", seed=4, options={"enforce_eager": True}).sync(world.policy)
    assert world.arguments == [
        {
            "model": "folder",
            "gpu_memory_utilization": 0.3,
            "max_model_len": 1000,
            "max_num_seqs": 12,
            "dtype": "float32",
            "logprobs_mode": "processed_logprobs",
            "enable_sleep_mode": True,
            "enable_prefix_caching": True,
            "generation_config": "vllm",
            "seed": 4,
            "enforce_eager": True,
        }
    ]


# Failures


def test_broken_logprobs_stop_the_run_and_name_the_rollouts(world: FakeVLLM) -> None:
    requests = scripted(world)
    talk, broken = world.talk, {requests[2].prompt_ids, requests[4].prompt_ids}

    def talk_nonsense(ids: list[int], params: FakeSamplingParams) -> Iterator[tuple[int, float]]:
        for i, (token_id, logprob) in enumerate(talk(ids, params)):
            yield token_id, math.nan if i == 3 and tuple(ids) in broken else logprob

    world.talk = talk_nonsense
    with pytest.raises(RolloutError, match=r": \(0, 2\)/7, \(0, 4\)/7\)"):
        run(world, requests)


def test_an_output_without_tokens_does_not_run_for_ever(world: FakeVLLM) -> None:
    world.talk = lambda ids, params: iter(())
    with pytest.raises(RolloutError, match=r"no token for rollout \(0, 6\)/0"):
        run(world, [make_request(world.codec, instance_id=(0, 6))])


def test_a_context_that_is_too_short_is_refused(world: FakeVLLM) -> None:
    run(world, scripted(world), engine=VLLMEngine("folder", max_model_len=900))
    world.llm = None
    with pytest.raises(ConfigError, match="max_model_len is 899, but rollout.max_tokens is 900"):
        run(world, scripted(world), engine=VLLMEngine("folder", max_model_len=899))


def test_mixed_precision_of_the_trainer_stays_outside(world: FakeVLLM) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the fake refuses to run in it
        run(world, scripted(world))
        assert torch.is_autocast_enabled("cpu")


def test_options_cannot_undo_what_the_engine_needs(world: FakeVLLM) -> None:
    with pytest.raises(ConfigError, match="generation_config.*logprobs_mode"):
        VLLMEngine("folder", options={"logprobs_mode": "raw_logits", "generation_config": "auto"})


@pytest.mark.parametrize("found", ["0.21.9", "0.33.0", "1.0", "0.8.5.post1", "0.9.2", "dev"])
def test_other_releases_are_refused(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    pretend_version(monkeypatch, found)
    with pytest.raises(ConfigError, match=rf"{found}.*pip install 'vllm>=0\.22,<0\.33'"):
        VLLMEngine("folder")


@pytest.mark.parametrize("found", ["0.22.0", "0.32.0", "0.32.5rc1+cu129", "0.29.1.dev3+g12ab"])
def test_known_releases_are_taken(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    pretend_version(monkeypatch, found)
    VLLMEngine("folder")


def test_vllm_may_be_missing_until_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it raises
    spec = importlib.util.spec_from_file_location("another_copy", adapter.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    pretend_version(monkeypatch, None)
    with pytest.raises(ConfigError, match=r"expected vLLM to be installed, found none\. Run pip install"):
        copy.VLLMEngine("folder")


def test_progress_adds_up(world: FakeVLLM) -> None:
    engine, told = VLLMEngine("folder"), []
    world.overshoot = 2
    pool = attach(engine, world, report=lambda *counts: told.append(counts))
    trajectories = engine.run(scripted(world, tail=" and more"))
    sampled, searches = sum(sum(t.policy_mask) for t in trajectories), sum(len(t.queries) for t in trajectories)
    assert tuple(map(sum, zip(*told, strict=True))) == (7, searches, sampled)
    assert sampled < world.num_sampled
    assert pool.take_counts().queries == searches > 0
    pool.close()


def test_the_documented_configuration_selects_it(world: FakeVLLM) -> None:
    _, _, rest = (ROOT / "docs/vllm.md").read_text().partition("```yaml\n")
    engine = yaml.safe_load(rest.partition("```")[0])["rollout"]["engine"]
    parser = ArgumentParser()
    parser.add_argument("--engine", type=Engine)
    made = parser.instantiate(parser.parse_object({"engine": engine})).engine
    assert isinstance(made, VLLMEngine) and made.sleep_level == 2
