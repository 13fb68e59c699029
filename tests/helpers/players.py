"""Who speaks instead of a policy: given turns of a rollout, or given tokens for an engine.

Tokens go through the real `Conversation`, queries through the real `SearchPool`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from helpers.passages import PASSAGES, PROTOCOL, QUESTION
from sdsearch_lightning.errors import RetrievalError
from sdsearch_lightning.policy.packing import PackedSequences
from sdsearch_lightning.protocol.conversation import Continue, Conversation, Search
from sdsearch_lightning.protocol.templates import Protocol
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.rollout import Engine
from sdsearch_lightning.types import InstanceId, Limits, Passage, Question, RolloutRequest, Sampling, Trajectory

Turns = Sequence[str]
FindPassages = Callable[[str], Sequence[Passage] | RetrievalError]
Logprobs = Callable[[int], float]
DEFAULT_LIMITS, SAMPLED, GREEDY = Limits(), Sampling(), Sampling(temperature=0.0)


def position_eighths(position: int) -> float:
    """A log-prob that tells its position, so that a shifted one shows."""
    return -(position + 1) / 8


def start(
    codec: TokenCodec, protocol: Protocol = PROTOCOL, limits: Limits = DEFAULT_LIMITS, question: Question = QUESTION
) -> Conversation:
    """A conversation that waits for its first token."""
    return Conversation(make_request(codec, question, protocol=protocol), protocol, codec, limits)


def make_request(
    codec: TokenCodec,
    question: Question = QUESTION,
    instance_id: InstanceId = (0, 0),
    index: int = 0,
    sampling: Sampling = SAMPLED,
    protocol: Protocol = PROTOCOL,
) -> RolloutRequest:
    """A request with a seed of its own."""
    prompt_ids = protocol.prompt_ids(codec, question.text)
    seed = 1000 * instance_id[1] + index
    return RolloutRequest(question, instance_id, index, prompt_ids, seed, sampling)


def play(
    conversation: Conversation,
    codec: TokenCodec,
    turns: Turns | str,
    search: FindPassages = lambda query: PASSAGES[:1],
    logprobs: Logprobs = position_eighths,
) -> Trajectory:
    """Speak the turns, each as far as the conversation lets it, and then end-of-sequence until it stops.

    A text instead of turns is spoken to its end: what follows a search is said once it is answered.

    Args:
        conversation: waits for its first token.
        codec: its.
        turns: of the policy.
        search: what a query finds.
        logprobs: of the i-th sampled token.
    """
    said, is_stream = 0, isinstance(turns, str)
    for turn in (*map(codec.encode, [turns] if isinstance(turns, str) else turns), *((codec.eos_id,),) * 99):
        for token_id in turn:
            if conversation.stop_reason is not None:
                return conversation.finish()
            event = conversation.accept(token_id, logprobs(said))
            said += 1
            if isinstance(event, Search):
                conversation.observe(search(event.query))
            if not is_stream and (not isinstance(event, Continue) or event.forced):
                break
    return conversation.finish()


class ScriptedEngine(Engine):
    """Plays what is written for each request; searches go through the pool, so failures are those of a real run.

    Args:
        script: turns, or a text, of a request.
        logprobs: of the i-th sampled token; None for those of the policy at the request's temperature.
    """

    draws = False

    def __init__(
        self, script: Callable[[RolloutRequest], Turns | str], logprobs: Logprobs | None = position_eighths
    ) -> None:
        self.script, self.logprobs = script, logprobs
        self.requests: list[RolloutRequest] = []

    def run(self, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
        self.requests = list(requests)
        return [self._play(request) for request in requests]

    def _play(self, request: RolloutRequest) -> Trajectory:
        turns, found = self.script(request), list[Sequence[Passage] | RetrievalError]()

        def search(query: str) -> Sequence[Passage] | RetrievalError:
            found.append(self.searches.submit([query]).result()[0])
            return found[-1]

        conversation = self.start(request)
        draft = play(conversation, conversation._codec, turns, search, self.logprobs or position_eighths)
        if self.logprobs is not None:
            return draft
        answers, logprobs = iter(found), self._policy_logprobs(draft, request.sampling)
        return play(self.start(request), conversation._codec, turns, lambda _: next(answers), logprobs.__getitem__)

    def _policy_logprobs(self, draft: Trajectory, sampling: Sampling) -> list[float]:
        sampled = torch.tensor(draft.policy_mask).nonzero()[:, 0]
        logits = self.policy.logits(PackedSequences.pack([draft.token_ids]), sampled)
        tokens = torch.tensor(draft.token_ids)[sampled]
        logprobs = (logits / (sampling.temperature or 1.0)).log_softmax(-1)
        return logprobs.gather(1, tokens[:, None])[:, 0].tolist()


class ScriptedPolicy(nn.Module):
    """Plays a flat list of tokens per prompt with probability 1, for engines that decode with a KV cache.

    The cache holds the tokens themselves, so `contexts` are what a real model would have attended to.

    Args:
        scripts: tokens to sample, by prompt; then the last one again and again.
        num_tokens: size of the vocabulary.
    """

    def __init__(self, scripts: Mapping[tuple[int, ...], Sequence[int]], num_tokens: int) -> None:
        super().__init__()
        self.max_context = None
        self.device_holder = nn.Parameter(torch.zeros(()))
        self.scripts, self.num_tokens = scripts, num_tokens
        self.contexts: dict[tuple[int, ...], list[int]] = {}

    def decode(
        self, token_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any, last: Tensor
    ) -> Tensor:
        cells = token_ids[:, None, :, None].double()
        # The engine feeds a sampled token together with what it forces: a chunk's first cell counts sampled tokens.
        firsts = torch.zeros_like(cells)
        firsts[:, :, :1] = 1.0
        tokens, firsts = (t[:, 0, :, 0].long() for t in cache.update(cells, firsts, 0))
        logits = torch.full((len(tokens), self.num_tokens), -1e9, dtype=torch.float64)
        for row, (context, first, mask) in enumerate(zip(tokens, firsts, attention_mask, strict=True)):
            seen = context[mask].tolist()
            assert position_ids[row, last[row]] == len(seen) - 1 or not mask[-token_ids.shape[1]], "positions are dense"
            prompt = next(p for p in self.scripts if tuple(seen[: len(p)]) == p)
            self.contexts[prompt] = seen
            script = self.scripts[prompt]
            logits[row, script[min(int(first[mask].sum()) - 1, len(script) - 1)]] = 0.0
        return logits
