"""A scripted rollout workload: lengths come from a script, tokens are the model's own greedy choices.

Every engine therefore does the same rollouts on a real model, token by token, and equal tokens show that it fed the
model what it had to. Turns end after a scripted number of tokens; searches go through the real `SearchPool` to a
retriever whose passages are documents of token ids. Equal arguments, equal workload.

Next: rollout_peers.py.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sdsearch_lightning.errors import RetrievalError
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.protocol.conversation import Continue, Search, Stop
from sdsearch_lightning.retrieval.base import Retriever
from sdsearch_lightning.rollout import Engine, SearchPool
from sdsearch_lightning.types import (
    Passage,
    Question,
    RolloutRequest,
    Sampling,
    Span,
    SpanKind,
    StopReason,
    Trajectory,
)

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MODELS = {
    name: dict(zip((*_SIZES, "num_key_value_heads"), sizes, strict=True))
    for name, sizes in {
        "micro": (128, 16, 16, 1, 1, 1),
        "tiny": (2048, 256, 768, 4, 4, 2),
        "small": (32000, 896, 4864, 8, 14, 2),
        "0.5b": (151936, 896, 4864, 24, 14, 2),
        "3b": (151936, 2048, 11008, 36, 16, 2),
    }.items()
}
"""Qwen2 with random weights. `micro` counts work, `tiny` times it, `small` has the widths of Qwen2.5-0.5B; the last two
have all of their shapes, and are for GPUs."""


def make_policy(size: str, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Policy:
    """A policy with random weights, in eval mode. No token of it ends a sequence.

    Weights are larger than usual: attention is then sharp enough that greedy choices depend on far tokens.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    ids = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    fixed = {"max_position_embeddings": 4096, "use_sliding_window": False, "initializer_range": 0.05}
    config = Qwen2Config(**MODELS[size], **ids, **fixed, tie_word_embeddings=size.endswith("b"))  # type: ignore[arg-type]
    with torch.random.fork_rng(), torch.device(device):  # made where it stays: on a CPU, 3b would take a minute
        torch.manual_seed(seed)
        return Policy(Qwen2ForCausalLM(config).to(device, dtype).eval()).eval()


@dataclass(frozen=True, slots=True)
class Shape:
    """How long things are; pairs are inclusive ranges."""

    turns: tuple[int, int] = (1, 4)
    """Turns of a rollout; each but the last ends in a search."""
    prompt: tuple[int, int] = (120, 220)
    segment: tuple[int, int] = (12, 160)
    """Tokens sampled in a turn: lognormal, clipped."""
    segment_log_mean: float = 3.9
    segment_log_deviation: float = 0.55
    document: tuple[int, int] = (150, 350)
    query: tuple[int, int] = (4, 10)
    """Query tokens of a search; they stand before the last token of its turn."""

    def divided(self, by: int) -> Shape:
        """The same with prompts, segments and documents `by` times shorter."""
        prompt, segment, document = (
            (low // by, high // by) for low, high in (self.prompt, self.segment, self.document)
        )
        log_mean = self.segment_log_mean - math.log(by)
        return Shape(self.turns, prompt, segment, log_mean, self.segment_log_deviation, document, (1, 2))

    @property
    def max_tokens(self) -> int:
        """The longest rollout there can be."""
        turns = self.turns[1]
        return self.prompt[1] + turns * self.segment[1] + (turns - 1) * self.document[1]


@dataclass(frozen=True, slots=True)
class Script:
    """What one rollout does: tokens sampled in each turn, and the query and its length after each but the last."""

    segments: tuple[int, ...]
    queries: tuple[str, ...]
    query_lengths: tuple[int, ...]


class ScriptedConversation:
    """Looks like `protocol.Conversation` to an engine, and ends its turns by a script.

    Args:
        request: of the rollout.
        script: its turns.
        shape: gives the budgets that an engine may plan with, which tell nothing of the script.
    """

    def __init__(self, request: RolloutRequest, script: Script, shape: Shape) -> None:
        self.request, self._script, self._shape = request, script, shape
        self.stop_reason: StopReason | None = None
        self._spans = [Span(SpanKind.PROMPT, request.prompt_ids)]
        self._turn: list[tuple[int, float]] = []
        self._passages: list[tuple[Passage, ...]] = []
        self._num_turns = 0

    @property
    def max_tokens(self) -> int:
        """Budget of the whole rollout."""
        return self._shape.max_tokens

    @property
    def turn_budget(self) -> int:
        """Most tokens that this turn may still take."""
        return self._shape.segment[1] - len(self._turn)

    @property
    def scripted_tokens(self) -> int:
        """Tokens that this turn will still take: what no engine knows, told to peers that cannot stop at a text."""
        return self._script.segments[self._num_turns] - len(self._turn)

    def accept(self, token_id: int, logprob: float) -> Continue | Search | Stop:
        """See `Conversation.accept`."""
        assert self.stop_reason is None, "the rollout has ended"
        self._turn.append((token_id, logprob))
        if self.scripted_tokens > 0:
            return Continue()
        turn = self._num_turns
        is_last = turn + 1 == len(self._script.segments)
        self._end_turn(0 if is_last else self._script.query_lengths[turn])
        if is_last:
            self.stop_reason = StopReason.ANSWERED
            return Stop(self.stop_reason)
        return Search(self._script.queries[turn])

    def observe(self, result: Sequence[Passage] | RetrievalError) -> tuple[int, ...]:
        """See `Conversation.observe`; the token ids stand in the passage."""
        if isinstance(result, RetrievalError):
            raise result
        assert result[0].id == self._script.queries[len(self._passages)], "the passages of another query"
        self._passages.append(tuple(result))
        token_ids = tuple(map(int, result[0].contents.split()))
        self._spans.append(Span(SpanKind.OBSERVATION, token_ids))
        return token_ids

    def finish(self) -> Trajectory:
        """See `Conversation.finish`."""
        assert self.stop_reason is not None, "the rollout goes on"
        request, queries = self.request, self._script.queries
        identity = (request.question, request.instance_id, request.rollout_index)
        return Trajectory(*identity, tuple(self._spans), self.stop_reason, queries, tuple(self._passages), answer="")

    def _end_turn(self, query_length: int) -> None:
        """Sort the turn into spans: reasoning, query, and one token for the closing tag."""
        end = len(self._turn) - 1
        edges = ((SpanKind.REASONING, 0, end - query_length), (SpanKind.QUERY, end - query_length, end))
        for kind, start, stop in (*edges, (SpanKind.SCAFFOLD, end, end + 1)):
            if start < stop:
                token_ids, logprobs = zip(*self._turn[start:stop], strict=True)
                self._spans.append(Span(kind, token_ids, logprobs, sampled=True))
        self._turn, self._num_turns = [], self._num_turns + 1


class ScriptedRetriever(Retriever):
    """One passage per query, a document of token ids; every call takes `latency` seconds."""

    def __init__(self, documents: dict[str, tuple[int, ...]], latency: float = 0.0) -> None:
        self._documents, self._latency = documents, latency
        self.num_calls = self.num_queries = 0

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        self.num_calls, self.num_queries = self.num_calls + 1, self.num_queries + len(queries)
        if self._latency:
            time.sleep(self._latency)
        return [[Passage(query, " ".join(map(str, self._documents[query])))] for query in queries]


@dataclass(frozen=True)
class Workload:
    """Requests, and what will happen in each."""

    requests: tuple[RolloutRequest, ...]
    scripts: dict[tuple[int, int], Script]
    """By question and rollout."""
    documents: dict[str, tuple[int, ...]]
    """By query."""
    shape: Shape

    def start(self, request: RolloutRequest) -> ScriptedConversation:
        """The conversation of a request."""
        return ScriptedConversation(request, self.scripts[request.instance_id[1], request.rollout_index], self.shape)

    def opening(self, num_tokens: int) -> Workload:
        """The same rollouts, cut off in their first turn: what warms up an engine in a short time."""
        cut = {key: Script((min(num_tokens, script.segments[0]),), (), ()) for key, script in self.scripts.items()}
        return replace(self, scripts=cut)

    @property
    def num_policy_tokens(self) -> int:
        return sum(sum(script.segments) for script in self.scripts.values())

    @property
    def longest_policy_tokens(self) -> int:
        """Policy tokens of the rollout that has most: no engine samples them in fewer steps."""
        return max(sum(script.segments) for script in self.scripts.values())

    @property
    def num_searches(self) -> int:
        return sum(len(script.queries) for script in self.scripts.values())

    @property
    def num_document_tokens(self) -> int:
        return sum(len(self.documents[query]) for script in self.scripts.values() for query in script.queries)

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens; rollouts with one prompt count it once."""
        return sum(map(len, {request.prompt_ids for request in self.requests}))

    @property
    def ideal_prefill(self) -> int:
        """Each distinct prompt once, each document once, and the last token of a turn together with its document."""
        return self.num_prompt_tokens + self.num_document_tokens + self.num_searches


def make_workload(
    num_questions: int = 4,
    group_size: int = 8,
    vocab_size: int = 2048,
    seed: int = 0,
    shape: Shape = Shape(),  # noqa: B008 - frozen
    shared_prompts: bool = True,
    shared_queries: float = 0.25,
) -> Workload:
    """A workload; the same scripts whether prompts are shared or not.

    Args:
        num_questions: groups of rollouts.
        group_size: rollouts of each.
        vocab_size: of the model that will run it.
        seed: of all lengths, prompts and documents.
        shape: the lengths.
        shared_prompts: False gives every rollout a prompt of its own, as long as its group's.
        shared_queries: share of first searches whose query is that of other siblings too.
    """
    lengths, tokens = random.Random(seed), random.Random(seed + 1)
    requests, scripts, documents = [], {}, {}

    def draw(count: int) -> tuple[int, ...]:
        return tuple(tokens.choices(range(1, vocab_size), k=count))

    for position in range(num_questions):
        prompt_length = lengths.randint(*shape.prompt)
        prompt_ids = draw(prompt_length)
        question = Question(f"q{position}", f"question {position}", ("",), "scripted")
        for index in range(group_size):
            segments = tuple(_segment(lengths, shape) for _ in range(lengths.randint(*shape.turns)))
            names = [f"q{position} r{index} s{turn}" for turn in range(len(segments) - 1)]
            if names and lengths.random() < shared_queries:
                names[0] = f"q{position} shared"
            for name in names:
                length = lengths.randint(*shape.document)
                documents.setdefault(name, draw(length))
            query_lengths = tuple(lengths.randint(*shape.query) for _ in names)
            scripts[position, index] = Script(segments, tuple(names), query_lengths)
            own_ids = prompt_ids if shared_prompts else draw(prompt_length)
            seed_of_row = position * group_size + index
            requests.append(RolloutRequest(question, (0, position), index, own_ids, seed_of_row, Sampling(0.0)))
    return Workload(tuple(requests), scripts, documents, shape)


def _segment(lengths: random.Random, shape: Shape) -> int:
    low, high = shape.segment
    return min(high, max(low, round(lengths.lognormvariate(shape.segment_log_mean, shape.segment_log_deviation))))


def run(engine: Engine, policy: Policy, workload: Workload, pool: SearchPool | None = None) -> list[Trajectory]:
    """All rollouts of the workload by `engine`; by default searches take no time."""
    pool = pool or SearchPool(ScriptedRetriever(workload.documents), top_k=1)
    try:
        engine.attach(policy, workload.start, pool)  # type: ignore[arg-type]  # looks like a Conversation
        return engine.run(workload.requests)
    finally:
        pool.close()
