"""The slot engine gives what the reference engine gives, token for token, whatever its slots, order and schedule.

Scripts play through tokenizers that split tags and straddle their edges, with a policy that reads its context from the
KV rows themselves. A random model in float64 makes "the same" exact; in float32 the first difference is a tie.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import (
    EOS,
    PROTOCOL,
    QUESTION,
    TOKENIZERS,
    ScriptedPolicy,
    TalkativePolicy,
    ToyRetriever,
    make_request,
)

from sdsearch_lightning.policy.attention import AttentionLayout
from sdsearch_lightning.policy.packing import PackedSequences
from sdsearch_lightning.protocol.conversation import Conversation
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.rollout import Engine, GenerateEngine, SearchPool, SlotEngine
from sdsearch_lightning.rollout.kv_rows import RowsAttention
from sdsearch_lightning.types import Limits, Passage, Question, RolloutRequest, Sampling, StopReason, Trajectory

LIMITS = Limits(max_searches=2, max_invalid_actions=2, max_turn_tokens=40, max_observation_tokens=70, max_tokens=300)


class RowsPolicy(ScriptedPolicy):
    """A scripted policy that decodes in KV rows too; what it sees is what a model would attend to."""

    unpackable = None

    def advance(self, token_ids: Tensor, position_ids: Tensor, attention: AttentionLayout, last: Tensor) -> Tensor:
        cells = token_ids[None, None, :, None].double()
        # Marks count sampled tokens: one opens every feed but a prompt's, or is all that its row reads.
        marks = torch.zeros_like(cells)
        if isinstance(attention, RowsAttention):
            fed, at = {part.row for part in attention._new}, 0
            for part in attention._new:
                marks[0, 0, at, 0] = float(part.start > 0)
                at += part.length
            for row in range(len(last)):
                marks[0, 0, at + row, 0] = float(row not in fed)
        attention.attend(0, torch.zeros_like(cells), cells, marks, None)
        logits = torch.full((len(last), self.num_tokens), -1e9, dtype=torch.float64)
        for row in range(len(last) if isinstance(attention, RowsAttention) else 0):
            length = int(position_ids[last[row]]) + 1
            tokens, marked = attention._all[0, :, row, 0, :length, 0]  # type: ignore[attr-defined]
            context = [int(token) for token in tokens]
            prompt = next(p for p in self.scripts if tuple(context[: len(p)]) == p)
            self.contexts[prompt] = context
            script = self.scripts[prompt]
            logits[row, script[min(int(marked.sum()) - 1, len(script) - 1)]] = 0.0
        return logits


def run(
    engine: Engine,
    policy: Any,
    codec: TokenCodec,
    requests: Sequence[RolloutRequest],
    limits: Limits = LIMITS,
    retriever: Any = None,
) -> list[Trajectory]:
    pool = SearchPool(retriever or ToyRetriever(), top_k=2)
    engine.attach(policy, lambda request: Conversation(request, PROTOCOL, codec, limits), pool)
    trajectories = engine.run(requests)
    pool.close()
    return trajectories


def essence(trajectory: Trajectory) -> tuple[object, ...]:
    """Everything but the last bits of the log-probs."""
    spans = [(span.kind, span.token_ids, span.sampled) for span in trajectory.spans]
    t = trajectory
    outcome = (t.stop_reason, t.queries, t.passages, t.answer, t.num_invalid_actions, t.num_tagged_queries)
    return (t.instance_id, t.rollout_index, spans, outcome)


def essences(trajectories: Sequence[Trajectory]) -> list[tuple[object, ...]]:
    return [essence(trajectory) for trajectory in trajectories]


# Scripts


def random_script(rng: random.Random, codec: TokenCodec) -> list[int]:
    """One rollout's words: searches, empty and tagged queries, stray tags, broken turns, answers, or none."""
    turns = []
    for _ in range(rng.randint(1, 5)):
        words = " ".join(rng.choices("who is Paris ? Rome > < the 日 a".split(), k=rng.randint(0, 6)))
        query = rng.choice(["capital of France", "Rome ?", "?", "the city", "nothing", "poison"])
        turns.append(
            rng.choice(
                [
                    f"{words}<search>{query}</search>",
                    f"{words} <search> {query} </search>\n",
                    f"{words}<search> </search>",
                    f"<search>{query}<answer>x</search>",
                    f"{words}</search>",
                    f"{words}{EOS}",
                    words * 9,
                    f"<search>{query}</search>{words}",
                ]
            )
        )
    return [token for turn in [*turns, rng.choice(["<answer> Paris</answer>", ""])] for token in codec.encode(turn)]


class Moody(ToyRetriever):
    """Finds nothing for one query, and fails for another."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        if "poison" in queries:
            raise ConnectionError("no such host")
        return [[] if q == "nothing" else found for q, found in zip(queries, super().search(queries, k), strict=True)]


def scripted(name: str, seed: int, count: int) -> tuple[TokenCodec, list[RolloutRequest], RowsPolicy]:
    rng = random.Random(f"{name}{seed}")
    codec = TokenCodec(TOKENIZERS[name](), PROTOCOL.tags)
    questions = [replace(QUESTION, text=f"{'who is ' * rng.randint(0, 5)}{i} ?") for i in range(count)]
    requests = [make_request(codec, question, (0, i)) for i, question in enumerate(questions)]
    scripts = {request.prompt_ids: random_script(rng, codec) or [codec.eos_id or 0] for request in requests}
    return codec, requests, RowsPolicy(scripts, len(codec.tokenizer))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["byte", "bpe", "bpe, pad = eos", "metaspace"])
def test_scripts_are_played_as_by_the_reference(name: str, seed: int) -> None:
    """16 times 16 scripts; then the same ones in another order, with other slots."""
    codec, requests, policy = scripted(name, seed, count=16)
    reference = run(GenerateEngine(), policy, codec, requests, retriever=Moody())
    assert {"ANSWERED", "MALFORMED"} <= {t.stop_reason for t in reference}
    rng = random.Random(seed)
    for slots in (16, 1, rng.randint(2, 15)):
        order = rng.sample(range(len(requests)), len(requests))
        policy.contexts.clear()
        engine = SlotEngine(max_slots=slots, overlap_steps=rng.choice([0, 1, 4, None]))
        played = run(engine, policy, codec, [requests[i] for i in order], retriever=Moody())
        assert essences(played) == [essence(reference[i]) for i in order]
        for t in played:
            assert t.token_ids[:-1] == tuple(policy.contexts[t.spans[0].token_ids]), "the rows hold the rollout"


def test_all_endings_occur_in_the_scripts() -> None:
    """Or the test above would compare less than it says."""
    reasons, empty, split = set(), 0, 0
    for name in ("byte", "bpe", "metaspace"):
        for seed in range(4):
            codec, requests, policy = scripted(name, seed, count=16)
            split += len(codec.split_tags)
            for limits in (LIMITS, replace(LIMITS, max_tokens=110, max_searches=1)):
                for t in run(SlotEngine(), policy, codec, requests, limits, Moody()):
                    reasons.add(t.stop_reason)
                    empty += () in t.passages and not t.stop_reason.is_error
    assert reasons == set(StopReason) and empty and split


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_tokens", [40, 110, 200])
def test_budgets_cut_alike(seed: int, max_tokens: int) -> None:
    codec, requests, policy = scripted("bpe", seed, count=12)
    limits = replace(LIMITS, max_tokens=max_tokens, max_turn_tokens=25, max_observation_tokens=30, max_searches=1)
    reference = run(GenerateEngine(), policy, codec, requests, limits)
    assert essences(run(SlotEngine(max_slots=5), policy, codec, requests, limits)) == essences(reference)
    assert any(t.stop_reason.is_truncated for t in reference)


# A model

TALK = Limits(max_searches=2, max_invalid_actions=9, max_turn_tokens=12, max_observation_tokens=20, max_tokens=90)
QUESTIONS = [
    Question(f"q{i}", text, ("Paris",))
    for i, text in enumerate(("where is Paris ?", "who", "capital of France", "the city of Rome is where ?"))
]


def ask(codec: TokenCodec, count: int, seed: int = 0, sampling: Sampling = Sampling()) -> list[RolloutRequest]:  # noqa: B008
    requests = [
        make_request(codec, question, (0, position), index, sampling)
        for position, question in enumerate(QUESTIONS)
        for index in range(count)
    ]
    return [replace(request, seed=request.seed + 10_000 * seed) for request in requests]


@pytest.mark.parametrize("seed", range(10))
def test_a_model_in_float64_rolls_out_token_for_token(seed: int, word_codec: TokenCodec) -> None:
    policy, rng = TalkativePolicy(word_codec, seed), random.Random(seed)
    requests = ask(word_codec, 6, seed, rng.choice([Sampling(), Sampling(1.3, 0.9), Sampling(temperature=0.0)]))
    reference = run(GenerateEngine(), policy, word_codec, requests, TALK)
    for slots in (1, rng.randint(2, 20), 24):
        order = rng.sample(range(len(requests)), len(requests)) if seed % 2 else range(len(requests))
        engine = SlotEngine(8.0, slots, rng.choice([0, 2, None]), max_prefill_tokens=rng.randint(1, 99))
        played = run(engine, policy, word_codec, [requests[i] for i in order], TALK)
        for i, trajectory in zip(order, played, strict=True):
            assert essence(trajectory) == essence(reference[i])
            recorded, known = (torch.tensor(t.sampled_logprobs) for t in (trajectory, reference[i]))
            torch.testing.assert_close(recorded, known, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_in_float32_the_first_difference_is_a_tie(seed: int, word_codec: TokenCodec) -> None:
    policy = TalkativePolicy(word_codec, seed).float()
    exact = TalkativePolicy(word_codec, seed)
    requests = ask(word_codec, 8, seed)
    reference = run(GenerateEngine(), policy, word_codec, requests, TALK)
    for slots in (3, 32):
        for request, one, other in zip(
            requests, reference, run(SlotEngine(max_slots=slots), policy, word_codec, requests, TALK), strict=True
        ):
            assert essence(one) == essence(other) or distance_to_a_tie(exact, request, one, other) < 1e-4


def distance_to_a_tie(policy: Any, request: RolloutRequest, one: Trajectory, other: Trajectory) -> float:
    """How far the rollout's random number is from the edge between the two tokens drawn, where they first differ."""
    at = next(i for i, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=False)) if a != b)
    assert one.policy_mask[at] and other.policy_mask[at], "what is forced does not differ first"
    rng = random.Random(request.seed)
    uniform = [rng.random() for _ in range(sum(one.policy_mask[: at + 1]))][-1]
    with torch.no_grad():
        logits = policy.logits(PackedSequences.pack([one.token_ids[: at + 1]]), torch.tensor([at]))
    edges = (logits[0] / request.sampling.temperature).softmax(-1).cumsum(-1)
    return float((edges - uniform).abs().min())


def test_a_tie_is_told_from_a_difference(word_codec: TokenCodec) -> None:
    policy = TalkativePolicy(word_codec)
    requests = ask(word_codec, 8)
    one = run(SlotEngine(), policy, word_codec, requests, TALK)
    other = run(SlotEngine(), policy, word_codec, [replace(r, seed=r.seed + 1) for r in requests], TALK)
    apart = [distance_to_a_tie(policy, r, a, b) for r, a, b in zip(requests, one, other, strict=True) if a != b]
    assert len(apart) > 20 and sorted(apart)[len(apart) // 2] > 1e-3
