"""What the slot engine is compared on: random scripts, a policy that reads its KV rows, and questions for a model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from helpers.passages import PROTOCOL, QUESTION, ToyRetriever
from helpers.players import SAMPLED, ScriptedPolicy, make_request
from helpers.tokenizers import EOS, TOKENIZERS
from sdsearch_lightning.policy.attention import AttentionLayout, Call
from sdsearch_lightning.protocol.conversation import Conversation
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.rollout import Engine, SearchPool
from sdsearch_lightning.rollout.kv_rows import RowsAttention
from sdsearch_lightning.types import Limits, Passage, Question, RolloutRequest, Sampling, Trajectory

SLOT_LIMITS = Limits(
    max_searches=2, max_invalid_actions=2, max_turn_tokens=40, max_observation_tokens=70, max_tokens=300
)


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
        attention.attend(Call(0, torch.zeros_like(cells), cells, marks))
        logits = torch.full((len(last), self.num_tokens), -1e9, dtype=torch.float64)
        for row in range(len(last) if isinstance(attention, RowsAttention) else 0):
            length = int(position_ids[last[row]]) + 1
            keys, values = attention._rows.layer(0)  # type: ignore[attr-defined]
            tokens, marked = keys[row, 0, :length, 0], values[row, 0, :length, 0]
            context = [int(token) for token in tokens]
            prompt = next(p for p in self.scripts if tuple(context[: len(p)]) == p)
            self.contexts[prompt] = context
            script = self.scripts[prompt]
            logits[row, script[min(int(marked.sum()) - 1, len(script) - 1)]] = 0.0
        return logits


def run_engine(
    engine: Engine,
    policy: Any,
    codec: TokenCodec,
    requests: Sequence[RolloutRequest],
    limits: Limits = SLOT_LIMITS,
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


def slot_requests(name: str, seed: int, count: int) -> tuple[TokenCodec, list[RolloutRequest], RowsPolicy]:
    rng = random.Random(f"{name}{seed}")
    codec = TokenCodec(TOKENIZERS[name](), PROTOCOL.tags)
    questions = [replace(QUESTION, text=f"{'who is ' * rng.randint(0, 5)}{i} ?") for i in range(count)]
    requests = [make_request(codec, question, (0, i)) for i, question in enumerate(questions)]
    scripts = {request.prompt_ids: random_script(rng, codec) or [codec.eos_id or 0] for request in requests}
    return codec, requests, RowsPolicy(scripts, len(codec.tokenizer))


# A model

TALK_LIMITS = Limits(
    max_searches=2, max_invalid_actions=9, max_turn_tokens=12, max_observation_tokens=20, max_tokens=90
)
TALK_QUESTIONS = [
    Question(f"q{i}", text, ("Paris",))
    for i, text in enumerate(("where is Paris ?", "who", "capital of France", "the city of Rome is where ?"))
]


def talk_requests(
    codec: TokenCodec, count: int = 6, seed: int = 0, sampling: Sampling = SAMPLED
) -> list[RolloutRequest]:
    requests = [
        make_request(codec, question, (0, position), index, sampling)
        for position, question in enumerate(TALK_QUESTIONS)
        for index in range(count)
    ]
    return [replace(request, seed=request.seed + 10_000 * seed) for request in requests]
