"""The reference engine: lock-step batched decoding on stock Hugging Face models, KV cache kept across turns.

All rollouts of a batch decode together. One that wants a search or has to read a message waits, as a hole in the
attention mask, until the last of the others does too; then all their queries go out in one retrieval call and all
observations are fed in one right-padded chunk. Rollouts that ended leave the batch at that moment. Prompts shared by
the rollouts of a group are run once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from sdsearch_lightning.protocol.conversation import Continue, Conversation, Search
from sdsearch_lightning.rollout.engine import Engine, check_context, check_finite
from sdsearch_lightning.rollout.sampling import Draws, sample
from sdsearch_lightning.types import RolloutRequest, Trajectory


class _Row:
    """One rollout in the batch: its conversation, its random numbers, and the tokens the model has not read yet."""

    def __init__(self, request: RolloutRequest, conversation: Conversation) -> None:
        self.request, self.conversation = request, conversation
        self.draws = Draws(request.seed)
        self.unread: list[int] = list(request.prompt_ids)
        self.length = 0  # tokens the model has read
        self.query: str | None = None  # waits for this search
        self.waiting = False  # out of the decoding until the turn of all others ends

    @property
    def ended(self) -> bool:
        return self.conversation.stop_reason is not None

    def accept(self, token_id: int, logprob: float) -> None:
        event = self.conversation.accept(token_id, logprob)
        self.unread = [token_id]
        if isinstance(event, Search):
            self.query, self.waiting = event.query, True
        elif isinstance(event, Continue):
            self.unread += event.forced
            self.waiting = bool(event.forced)
        else:
            self.waiting = True


class GenerateEngine(Engine):
    """Lock-step engine; other engines are compared with it.

    Where a model cannot decode with holes (windows count cells, recurrent layers eat the padding), each rollout runs by
    itself; where it cannot go on from a cache by several tokens either, they are fed one at a time.

    Args:
        max_batch_size: rollouts decoded together; more are run in several batches.
    """

    def __init__(self, max_batch_size: int = 256) -> None:
        self.max_batch_size = max_batch_size
        self.one_token = False
        """Whether tokens behind the prompt are fed one at a time."""

    @property
    def exact_way(self) -> str | None:
        """How rollouts run since `step_back`, in words; None where nothing was given up."""
        if self.one_token:
            return "one rollout, one token at a time"
        return "one rollout at a time" if self.max_batch_size == 1 else None

    def step_back(self) -> bool:
        """One rollout at a time, then one token at a time."""
        if self.max_batch_size > 1:
            self.max_batch_size = 1
            return True
        was, self.one_token = self.one_token, True
        return not was

    @torch.no_grad()
    def run(self, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
        """See `Engine.run`. Gradients are off; the caller sets eval mode."""
        check_context(self.policy, map(self.start, requests[:1]))
        done: list[Trajectory] = []
        for start in range(0, len(requests), self.max_batch_size):
            done += self._run_batch(requests[start : start + self.max_batch_size])
        return done

    def _run_batch(self, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
        rows = [_Row(request, self.start(request)) for request in requests]
        alive = [row for row in rows if not row.ended]
        if alive:
            batch = _Batch(self, alive)
            while batch.rows:
                batch.decode_turn()
                for row, forced in self.answer_searches(batch.rows):
                    row.unread += forced
                self.report(batch.drop_ended(), 0, 0)
        return [row.conversation.finish() for row in rows]


class _Batch:
    """Rows that decode together, with their KV cache and the mask of its holes."""

    def __init__(self, engine: GenerateEngine, rows: list[_Row]) -> None:
        self._policy, self._report, self._counts = engine.policy, engine.report, engine.counts
        self._device = next(engine.policy.parameters()).device
        # With holes a window would have to count tokens, not cells: caches of a model's own kind are for single rows.
        config = engine.policy.model.config if engine.max_batch_size == 1 else None
        self._cache, self._one_token = DynamicCache(config=config), engine.one_token
        prompts = list(dict.fromkeys(row.request.prompt_ids for row in rows))
        self.rows = rows
        self._mask = torch.zeros(len(prompts), 0, dtype=torch.bool, device=self._device)  # [A, L] True = a real token
        logits = self._feed([list(prompt) for prompt in prompts], [0] * len(prompts))
        self._select([prompts.index(row.request.prompt_ids) for row in rows])
        self._logits = logits[[prompts.index(row.request.prompt_ids) for row in rows]]
        for row in rows:
            row.length, row.unread = len(row.unread), []

    def decode_turn(self) -> None:
        """Feed what each row has to read, then sample until every row waits or has ended."""
        for row in self.rows:
            row.waiting = False
        while True:
            if any(row.unread for row in self.rows):
                feeding = [[] if row.waiting else row.unread for row in self.rows]
                self._logits = self._feed(feeding, [row.length for row in self.rows])
                for row, fed in zip(self.rows, feeding, strict=True):
                    row.length += len(fed)
            active = [i for i, row in enumerate(self.rows) if not row.waiting]
            tokens, logprobs = sample(
                self._logits[active],
                [self.rows[i].request.sampling for i in active],
                [self.rows[i].draws for i in active],
            )
            drawn = list(zip(active, tokens.tolist(), logprobs.tolist(), strict=True))
            check_finite((self.rows[i].request, logprob) for i, _, logprob in drawn)
            for i, token_id, logprob in drawn:
                self.rows[i].accept(token_id, logprob)
            self._report(0, 0, len(active))
            if all(row.waiting for row in self.rows):
                return

    def drop_ended(self) -> int:
        """Take ended rows out of the batch; how many there were."""
        keep = [i for i, row in enumerate(self.rows) if not row.ended]
        ended = len(self.rows) - len(keep)
        if keep and ended:
            self._select(keep)
        self.rows = [self.rows[i] for i in keep]
        return ended

    def _select(self, index: list[int]) -> None:
        if index == list(range(len(self._mask))):
            return  # not all kinds of cache can select rows, and a single row never needs it
        rows = torch.tensor(index, device=self._device)
        self._cache.batch_select_indices(rows)
        self._mask = self._mask[rows]

    def _feed(self, chunks: list[list[int]], lengths: list[int]) -> Tensor:
        """[A, V] logits after each row's chunk; rows without one get a hole, and logits that nobody reads."""
        if self._one_token and lengths[0] and len(chunks[0]) > 1:  # a single row
            for i, token in enumerate(chunks[0]):
                logits = self._feed([[token]], [lengths[0] + i])
            return logits
        width = max(map(len, chunks))
        if width > 1:
            self._counts.prefill_tokens += width * len(chunks)
        else:
            self._counts.steps += 1
            self._counts.decode_rows += len(chunks)
        padded = torch.tensor([chunk + [0] * (width - len(chunk)) for chunk in chunks], device=self._device)
        filled = torch.tensor([len(chunk) for chunk in chunks], device=self._device)
        column = torch.arange(width, device=self._device)
        self._mask = torch.cat([self._mask, column < filled[:, None]], dim=1)
        positions = torch.tensor(lengths, device=self._device)[:, None] + column
        return self._policy.decode(padded, self._mask, positions, self._cache, (filled - 1).clamp(min=0))
