"""Runs of the vLLM adapter on the fake: scripts, requests, and what the conversation alone makes of the same turns."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

import pytest

from helpers.fake_vllm import FakeVLLM
from helpers.passages import PROTOCOL, ToyRetriever
from helpers.players import GREEDY, make_request, play, position_eighths
from helpers.tokenizers import EOS
from sdsearch_lightning.protocol.conversation import Conversation
from sdsearch_lightning.rollout import Engine, SearchPool, vllm as adapter
from sdsearch_lightning.rollout.engine import run_awake
from sdsearch_lightning.rollout.vllm import VLLMEngine
from sdsearch_lightning.types import Limits, Question, RolloutRequest, Sampling, Trajectory

VLLM_LIMITS = Limits(
    max_searches=2, max_invalid_actions=1, max_turn_tokens=90, max_observation_tokens=70, max_tokens=900
)
VLLM_SCRIPTS = {
    "where is Paris ?": ["hm <search> capital of France </search>", "<search> Rome </search>", "<answer> b </answer>"],
    "who": [f"a {EOS}", "<search> capital of Italy </search>", "<answer> b </answer>"],
    "capital of France": ["<answer> a b </answer>"],
    "the city of Rome is where ?": ["<search> the city </search>", "a </search>", "<answer> Italy </answer>"],
    "Paris is where ?": ["a </search>", "b </answer>"],  # one invalid action too many
    "is Rome the city ?": ["a <search> Rome", "</search>", "<answer> a </answer>"],  # a turn in two outputs
    "of the city ?": ["<search> a </search>", "<search> b </search>", "<search> a b </search>"],  # one too many
}
VLLM_QUESTIONS = [Question(f"q{i}", text, ("Paris",)) for i, text in enumerate(VLLM_SCRIPTS)]


def install_vllm(world: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> FakeVLLM:
    monkeypatch.setitem(sys.modules, "vllm", world.module)
    monkeypatch.setitem(sys.modules, "vllm.platforms", world.platforms)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # the engine sets it; this puts it back
    pretend_version(monkeypatch, "0.30.1")
    return world


def pretend_version(monkeypatch: pytest.MonkeyPatch, found: str | None, distribution: str = "vllm") -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name not in adapter.DISTRIBUTIONS:
            return real(name)
        if found is None or name != distribution:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(adapter.metadata, "version", version)


def attach_vllm(
    engine: Engine,
    world: FakeVLLM,
    retriever: ToyRetriever | None = None,
    limits: Limits = VLLM_LIMITS,
    **report: Any,
) -> SearchPool:
    pool = SearchPool(retriever or ToyRetriever(), top_k=2)
    engine.attach(world.policy, lambda request: Conversation(request, PROTOCOL, world.codec, limits), pool, **report)
    return pool


def run_vllm(
    world: FakeVLLM,
    requests: Sequence[RolloutRequest],
    retriever: ToyRetriever | None = None,
    limits: Limits = VLLM_LIMITS,
    engine: Engine | None = None,
) -> list[Trajectory]:
    """As in a step: wake, sync, run, sleep."""
    engine = engine or VLLMEngine("folder")
    pool = attach_vllm(engine, world, retriever, limits)
    trajectories = run_awake(engine, world.policy, requests)
    pool.close()
    return trajectories


def vllm_requests(world: FakeVLLM, sampling: Sampling = GREEDY, tail: str = "") -> list[RolloutRequest]:
    """A rollout per script, which the fake now plays; `tail` is what the model would say after the end of a turn."""
    requests = [make_request(world.codec, q, (0, i), 7, sampling) for i, q in enumerate(VLLM_QUESTIONS)]

    def turns(text: str) -> list[tuple[int, ...]]:
        ends = [turn.endswith(("</search>", "</answer>", EOS)) for turn in VLLM_SCRIPTS[text]]
        said = [turn + tail * end for turn, end in zip(VLLM_SCRIPTS[text], ends, strict=True)]
        return list(map(world.codec.encode, said))

    world.play_turns({request.prompt_ids: turns(request.question.text) for request in requests})
    return requests


def by_conversation(world: FakeVLLM, request: RolloutRequest, limits: Limits, **options: Any) -> Trajectory:
    """What the conversation alone makes of the same turns."""
    conversation = Conversation(request, PROTOCOL, world.codec, limits)
    if conversation.stop_reason is not None:
        return conversation.finish()
    search = options.get("search", lambda query: ToyRetriever().search([query], 2)[0])
    return play(conversation, world.codec, VLLM_SCRIPTS[request.question.text], search)


def without_logprobs(trajectory: Trajectory) -> Trajectory:
    spans = [replace(s, logprobs=(0.0,) * len(s.token_ids)) if s.sampled else s for s in trajectory.spans]
    return replace(trajectory, spans=tuple(spans))


def assert_played(world: FakeVLLM, trajectories: Sequence[Trajectory], expected: Sequence[Trajectory]) -> None:
    """Token for token, every log-prob is that of its position, and each request held the rollout so far."""
    assert list(map(without_logprobs, trajectories)) == list(map(without_logprobs, expected))
    for trajectory in trajectories:
        told = [position_eighths(i) if sampled else 0.0 for i, sampled in enumerate(trajectory.policy_mask)]
        assert trajectory.sampled_logprobs == tuple(told)
    wholes = [t.token_ids for t in trajectories]
    assert all(any(whole[: len(ids)] == tuple(ids) for whole in wholes) for ids, _ in world.requests)
