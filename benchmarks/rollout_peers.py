"""Other ways to run the same rollouts, as engines: what a fair user of Hugging Face would write.

Peers record no log-probs where their library does not give them (NaN), and are not charged for that. They work with any
conversation, but for `ContinuousBatching`, which cannot stop at a text and is told the length of each turn.

TRL's GRPO trainer with tools generates like `GeneratePerTurn`, which stands in for it.

Next: bench_rollout.py.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    StoppingCriteria,
)

from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.protocol.conversation import Continue, Conversation, Search
from sdsearch_lightning.rollout import Engine
from sdsearch_lightning.rollout.search_pool import SearchResult
from sdsearch_lightning.types import RolloutRequest, Trajectory

PAD = 0


class _Row:
    """One rollout: its tokens, how many of them a cache holds, whether its turn goes on and how long that is."""

    def __init__(self, request: RolloutRequest, conversation: Conversation) -> None:
        self.conversation = conversation
        self.token_ids = list(request.prompt_ids)
        self.num_cached = 0
        self.query: str | None = None
        self.is_sampling, self.num_sampled = False, 0

    @property
    def has_ended(self) -> bool:
        return self.conversation.stop_reason is not None

    def begin_turn(self) -> None:
        self.is_sampling, self.num_sampled = True, 0

    def accept(self, token_id: int, logprob: float = math.nan) -> None:
        self.num_sampled += 1
        event = self.conversation.accept(token_id, logprob)
        self.token_ids.append(token_id)
        if isinstance(event, Search):
            self.query = event.query
        elif isinstance(event, Continue):
            self.token_ids += event.forced
        self.is_sampling = isinstance(event, Continue) and not event.forced

    def observe(self, result: SearchResult) -> None:
        self.token_ids += self.conversation.observe(result)
        self.query = None


class _TurnEnds(StoppingCriteria):
    """Ends each row of a batch where its conversation says so."""

    def __init__(self, rows: Sequence[_Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        for row, token_id in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if row.is_sampling:
                row.accept(token_id)
        return torch.tensor([not row.is_sampling for row in self.rows], device=input_ids.device)


class _LockStep(Engine):
    """All rollouts take a turn together, then all their searches go out in one call."""

    def run(self, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
        """See `Engine.run`."""
        rows = [_Row(request, self.start(request)) for request in requests]
        self.begin(rows)
        while playing := [row for row in rows if not row.has_ended]:
            for row in playing:
                row.begin_turn()
            self.take_turn(playing)
            asking = [row for row in playing if row.query is not None]
            results = self.searches.submit([row.query or "" for row in asking]).result()
            for row, result in zip(asking, results, strict=True):
                row.observe(result)
        return [row.conversation.finish() for row in rows]

    def begin(self, rows: Sequence[_Row]) -> None:  # noqa: B027 - optional
        """Called before the first turn."""

    @abstractmethod
    def take_turn(self, rows: Sequence[_Row]) -> None:
        """Sample until the turn of each row ends."""

    def generate(self, rows: Sequence[_Row], unread: Sequence[list[int]], held: Tensor, **options: object) -> Tensor:
        """[A, W + S] the left-padded `unread` tokens of each row, W, and the sampled ones.

        Args:
            rows: that take the turn.
            unread: tokens of each that the model has not read.
            held: [A, L] mask of what a cache holds.
            options: of `generate`.
        """
        width = max(map(len, unread))
        device = self.policy.model.device
        padded = torch.tensor([[PAD] * (width - len(ids)) + ids for ids in unread], device=device)
        lengths = torch.tensor([len(ids) for ids in unread], device=device)
        mask = torch.arange(width, device=device) >= width - lengths[:, None]
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max(row.conversation.turn_budget for row in rows if row.is_sampling),
            pad_token_id=PAD,
        )
        sampled: Tensor = self.policy.model.generate(
            padded,
            attention_mask=torch.cat([held, mask], dim=1).long(),
            generation_config=config,
            stopping_criteria=[_TurnEnds(rows)],
            **options,
        )
        return sampled


class GeneratePerTurn(_LockStep):
    """`model.generate` once per turn on everything so far, left-padded: what most trainers with tools do."""

    def take_turn(self, rows: Sequence[_Row]) -> None:
        nothing = torch.zeros(len(rows), 0, dtype=torch.bool, device=self.policy.model.device)
        self.generate(rows, [row.token_ids for row in rows], nothing)


class GenerateKeptCache(_LockStep):
    """`model.generate` once per turn, with the KV cache of earlier turns; pads in it are masked holes."""

    def begin(self, rows: Sequence[_Row]) -> None:
        """See `_LockStep.begin`."""
        self._rows, self._cache = list(rows), self.make_cache(rows)
        self._held = torch.zeros(len(rows), 0, dtype=torch.bool, device=self.policy.model.device)

    def make_cache(self, rows: Sequence[_Row]) -> Cache:
        """An empty cache for these rows."""
        return DynamicCache()

    def make_room(self, rows: Sequence[_Row]) -> None:
        """Before the turn that `rows` take: those that have ended go."""
        if len(rows) < len(self._rows):
            kept = torch.tensor([i for i, row in enumerate(self._rows) if not row.has_ended], device=self._held.device)
            self._cache.batch_select_indices(kept)
            self._rows, self._held = list(rows), self._held[kept]

    def take_turn(self, rows: Sequence[_Row]) -> None:
        """See `_LockStep.take_turn`."""
        self.make_room(rows)
        rows = self._rows
        unread = [row.token_ids[row.num_cached :] for row in rows]
        sampled = self.generate(rows, unread, self._held, past_key_values=self._cache)
        steps = sampled.shape[1] - max(map(len, unread))
        # The cache holds what was fed: the chunk, and of the sampled tokens all but those of the last step.
        width = int(self._cache.get_seq_length()) - self._held.shape[1]
        cells = torch.arange(width, device=self._held.device)
        fed = torch.tensor([min(row.num_sampled, steps - 1) for row in rows], device=self._held.device)
        chunk = width - (steps - 1)
        filled = torch.tensor([len(ids) for ids in unread], device=self._held.device)
        held = (cells >= chunk - filled[:, None]) & (cells < chunk + fed[:, None])
        self._held = torch.cat([self._held, held], dim=1)
        for row, ids, count in zip(rows, unread, fed.tolist(), strict=True):
            row.num_cached += len(ids) + count


class GenerateStaticCache(GenerateKeptCache):
    """The same with a static cache, of a fixed length: on CUDA, transformers then compiles decode steps, not prefills.

    Rows that have ended stay, as dummies, and the cache stays from run to run: for as many rows with the same budget it
    compiles once. Where holes have filled the cache, everything is read again without them.
    """

    _kept: StaticCache | None = None

    def make_cache(self, rows: Sequence[_Row]) -> Cache:
        """See `GenerateKeptCache.make_cache`."""
        # A turn may begin at the end of the longest row and last as long as that of another.
        length = max(row.conversation.max_tokens + row.conversation.turn_budget for row in rows)
        size, model = (len(rows), length), self.policy.model
        if self._kept is None or self._size != size or self._model is not model:
            self._kept, self._size, self._model = StaticCache(config=model.config, max_cache_len=length), size, model
        self._kept.reset()
        return self._kept

    def make_room(self, rows: Sequence[_Row]) -> None:
        """See `GenerateKeptCache.make_room`."""
        chunk = max(len(row.token_ids) - row.num_cached for row in self._rows)
        if self._held.shape[1] + chunk + max(row.conversation.turn_budget for row in rows) > self._size[1]:
            self._cache.reset()
            self._held = self._held[:, :0]
            for row in self._rows:
                row.num_cached = 0


class ContinuousBatching(Engine):
    """transformers' continuous batching: one request per turn, prefix pages shared, log-probs on.

    Searches wait for the one under way, then go out together; everything else goes on meanwhile. The manager lives for
    one `run`, since its pages are not keyed by weights.

    Args:
        page_size: tokens per page; a turn finds its prefix again in whole pages only.
        max_batch_tokens: fed in one step; None: 4096 on CUDA, 1024 elsewhere.
        max_requests: in one step. The mask without flash-attn is dense over all of them, so that few are faster on a
            CPU; on CUDA a step of few is bound by its launches. None: 64 on CUDA, 8 elsewhere.
    """

    def __init__(
        self, page_size: int = 32, max_batch_tokens: int | None = None, max_requests: int | None = None
    ) -> None:
        self.page_size, self.max_batch_tokens, self.max_requests = page_size, max_batch_tokens, max_requests
        self._source: Policy | None = None

    def attach(self, policy: Policy, *arguments: object, **options: object) -> None:  # type: ignore[override]
        """See `Engine.attach`. Works on a copy of the weights: the manager changes the model's attention for good."""
        if self._source is not policy:
            self._source, self._model = policy, copy.deepcopy(policy.model)
        super().attach(policy, *arguments, **options)  # type: ignore[arg-type]

    def run(self, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
        """See `Engine.run`."""
        rows = [_Row(request, self.start(request)) for request in requests]
        self._ready: list[_Row] = []
        self._searching: tuple[list[_Row], Future[list[SearchResult]]] | None = None
        max_tokens = max(row.conversation.max_tokens for row in rows)
        is_cuda = self._model.device.type == "cuda"
        config = ContinuousBatchingConfig(  # whether to record graphs it decides itself: not where there is a mask
            page_size=self.page_size,
            num_blocks=len(rows) * math.ceil(max_tokens / self.page_size),
            max_batch_tokens=self.max_batch_tokens or (4096 if is_cuda else 1024),
            max_requests_per_batch=self.max_requests or (64 if is_cuda else 8),
            return_logprobs=True,
            auto_switch_to_flash=False,
        )
        generation = GenerationConfig(do_sample=False, max_new_tokens=1, eos_token_id=-1, pad_token_id=PAD)
        with self._model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=config
        ) as manager:
            for number, row in enumerate(rows):
                self._request(manager, number, row)
            while any(not row.has_ended for row in rows):
                self._take_results(manager, rows)
                self._search(manager, rows)
        return [row.conversation.finish() for row in rows]

    def _request(self, manager: Any, number: int, row: _Row) -> None:
        """Ask for the next turn of a row."""
        row.begin_turn()
        told: Any = row.conversation
        manager.add_request(row.token_ids, str(number), max_new_tokens=told.scripted_tokens)

    def _take_results(self, manager: Any, rows: Sequence[_Row]) -> None:
        """Take the turns that have ended; waits a moment where none has."""
        output = manager.get_result(timeout=0.005)
        while output is not None:
            if output.error is not None:
                raise RuntimeError(f"continuous batching failed on request {output.request_id}: {output.error}")
            row = rows[int(output.request_id)]
            for token_id, logprob in zip(output.generated_tokens, output.logprobs, strict=True):
                row.accept(token_id, logprob)
            if row.query is not None:
                self._ready.append(row)
            output = manager.get_result(timeout=0)

    def _search(self, manager: Any, rows: Sequence[_Row]) -> None:
        """Send what waits, unless a search is under way; go on where one has come back."""
        if self._searching is not None and self._searching[1].done():
            asking, future = self._searching
            self._searching = None
            for row, result in zip(asking, future.result(), strict=True):
                row.observe(result)
                self._request(manager, rows.index(row), row)
        if self._searching is None and self._ready:
            future = self.searches.submit([row.query or "" for row in self._ready])
            self._searching, self._ready = (self._ready, future), []
