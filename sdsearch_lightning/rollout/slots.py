"""The slot engine: what a window of slots gets to work with, and what happens where it cannot work."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from sdsearch_lightning.errors import ConfigError, RolloutError
from sdsearch_lightning.policy.placing import plainly, through_pinned_memory
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.rollout.decode_graphs import Capture, DecodeGraphs, capture_graph
from sdsearch_lightning.rollout.drawing import Slot
from sdsearch_lightning.rollout.engine import Engine, ReportProgress, StartConversation, check_context
from sdsearch_lightning.rollout.generate import GenerateEngine
from sdsearch_lightning.rollout.kv_rows import KVRows, KVShape
from sdsearch_lightning.rollout.search_pool import SearchPool
from sdsearch_lightning.rollout.window import Schedule, Window
from sdsearch_lightning.types import RolloutRequest, Trajectory

GIB = 2**30


class SlotEngine(Engine):
    """The default engine. Weights are the policy's own, so there is nothing to bring up to date.

    Args:
        kv_cache_gib: memory for keys and values; the longest rollout that is allowed makes the number of slots of it.
        max_slots: rollouts that decode together, at most, however much memory there is.
        overlap_steps: passes between sending queries and taking their answers. More hides a slower retriever,
            and lets a rollout wait longer for a fast one. null takes answers as they come: best with a slow
            retriever, at the price that two runs may differ in the rounding of float32.
        max_prefill_tokens: tokens read in one pass, where one rollout alone does not need more.
        cuda_graphs: record decode steps on CUDA and replay them, which spares the host their launches. Rollouts stay
            the same. Not done where weights are sharded.
        async_scheduling: draw the next token of each rollout before the host has seen the last one, so that a GPU does
            not wait for the host between decode steps. Rollouts stay the same; each turn costs one row of a step more.
            Off, as no GPU has measured it yet; on a CPU it gains nothing.
    """

    def __init__(
        self,
        kv_cache_gib: float = 8.0,
        max_slots: int = 256,
        overlap_steps: int | None = 4,
        max_prefill_tokens: int = 16384,
        cuda_graphs: bool = True,
        async_scheduling: bool = False,
    ) -> None:
        if not kv_cache_gib > 0 or max_slots < 1 or max_prefill_tokens < 1:
            raise ConfigError(
                "rollout.engine: kv_cache_gib has to be above 0, max_slots and max_prefill_tokens at least 1, found "
                f"{kv_cache_gib}, {max_slots} and {max_prefill_tokens}."
            )
        if overlap_steps is not None and overlap_steps < 0:
            raise ConfigError(f"rollout.engine.overlap_steps: expected 0 or more, or null, found {overlap_steps}.")
        self.kv_cache_gib, self.max_slots = kv_cache_gib, max_slots
        self.schedule = Schedule(overlap_steps, max_prefill_tokens, async_scheduling)
        self._capture: Capture | None = capture_graph if cuda_graphs else None
        self._reference: GenerateEngine | None = None

    def attach(
        self, policy: Policy, start: StartConversation, searches: SearchPool, report: ReportProgress = lambda *_: None
    ) -> None:
        """See `Engine.attach`. A model that cannot run in slots is handed to the reference engine."""
        super().attach(policy, start, searches, report)
        if policy.unpackable is not None and self._reference is None:
            self.step_back()
            warnings.warn(
                "The slot engine needs a model whose sequences can lie back to back, but "
                f"{policy.unpackable}. Rollouts run on the slower reference engine.",
                stacklevel=2,
            )
        if self._reference is not None:
            self._reference.attach(policy, start, searches, report)
            self._reference.counts = self.counts

    @property
    def exact_way(self) -> str | None:
        """How rollouts run where they cannot in slots, in words; None where they can."""
        if self._reference is None:
            return None
        return self._reference.exact_way or "reference engine"

    def step_back(self) -> bool:
        """The reference engine, and then what that one does."""
        if self._reference is not None:
            return self._reference.step_back()
        self._reference = GenerateEngine(self.max_slots)
        return True

    @torch.no_grad()
    def run(self, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
        """See `Engine.run`. Gradients are off; the caller sets eval mode.

        Raises:
            ConfigError: the memory holds not even one rollout.
            RolloutError: the policy's logits are not finite, or memory ran out with a single slot.
        """
        if self._reference is not None:
            return self._reference.run(requests)
        check_context(self.policy, map(self.start, requests[:1]))
        done: dict[int, Trajectory] = {}
        while len(done) < len(requests):
            slots = [Slot(i, request, self.start(request)) for i, request in enumerate(requests) if i not in done]
            # A rollout that is cut off here starts again, from the same seed, and comes out the same.
            if (exhausted := self._try(slots, done)) is not None:
                self._halve(exhausted)
        return [done[index] for index in range(len(requests))]

    def _try(self, slots: list[Slot], done: dict[int, Trajectory]) -> int | None:
        """Run slots to their end; where memory runs out before, the number of rows that it ran out with."""
        capacity = max(slot.conversation.max_tokens for slot in slots)
        shape = KVShape.of(self.policy)
        num_rows = min(self._num_rows(shape, capacity), len(slots))
        try:
            place = through_pinned_memory if self.schedule.looks_late else plainly
            rows = KVRows(shape, num_rows, capacity, place)
            graphs = self._graphs(rows)
            Window(self.policy, slots, rows, self.searches, self.schedule, done, self.counts, self.report, graphs).run()
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            return num_rows
        return None

    def _graphs(self, rows: KVRows) -> DecodeGraphs | None:
        """For the steps over these rows; None where nothing can be recorded."""
        can_record = rows.device.type == "cuda" or self._capture is not capture_graph
        if self._capture is None or not can_record or self.policy.is_sharded:
            return None
        return DecodeGraphs(self.policy, rows, self._capture)

    def _num_rows(self, shape: KVShape, capacity: int) -> int:
        """Rows of `capacity` tokens that the memory holds."""
        needed = shape.bytes_per_token * capacity / GIB
        if needed > self.kv_cache_gib:
            raise ConfigError(
                f"rollout.engine.kv_cache_gib is {self.kv_cache_gib:g}, but one rollout of up to {capacity} tokens "
                f"takes {needed:.3g} GiB ({shape.bytes_per_token} bytes per token). Raise it, or lower "
                "rollout.max_tokens."
            )
        return min(self.max_slots, int(self.kv_cache_gib / needed))

    def _halve(self, num_rows: int) -> None:
        """Go on with half the slots, in this window and all that follow."""
        if num_rows == 1:
            raise RolloutError(
                "Memory ran out in the rollouts with a single slot. Lower rollout.max_tokens or "
                "rollout.engine.max_prefill_tokens, or give the model more memory."
            )
        self.max_slots = num_rows // 2
        warnings.warn(
            f"Memory ran out in the rollouts with {num_rows} slots: going on with {self.max_slots}. Lower "
            "rollout.engine.kv_cache_gib to begin with fewer.",
            stacklevel=2,
        )
