"""The life of a slot: rollouts come and go row by row, and a decode step computes only rows that want a token.

Every running rollout has a slot, and with it a KV row. The first rows decode; behind them stand those that wait for a
search; behind those, free ones. Two rows change places where a slot changes sides, so decoding always runs on a view of
the first rows.

               admit            all is fed,             query
    todo ---------------> READING ----------> DECODING --------> ASKING
                           ^  ^                |    |              | send
                           |  +----------------+    |              v
                           |    forced message      |           WAITING
                           |                        |              |
                           +------------------------|--------------+
                                  documents         v              | search failed,
                                                  ended <----------+ or no room for documents

READING is a slot with more than one unread token: prompt, documents, or a message. All that read are fed together, back
to back, without padding; rollouts with one prompt read it once. Queries are sent while others decode, one batch at a
time, and their answers are taken `overlap_steps` decode steps later. Counting steps, not seconds, keeps the schedule
the same in every run; and since each rollout draws from its own seed, a schedule changes no result anyway, but for the
rounding of float32.

Invariant: a slot has read `length` tokens, the cells of its row; `unread` is what its conversation holds beyond them.

Next: kv_rows.py.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from sdsearch_lightning.policy import Policy
from sdsearch_lightning.protocol import Continue, Conversation, Search
from sdsearch_lightning.rollout.engine import ReportProgress, WorkCounts, check_finite
from sdsearch_lightning.rollout.kv_rows import DecodeRows, Feed, KVRows, PrefillRows
from sdsearch_lightning.rollout.sampling import sample
from sdsearch_lightning.rollout.search_pool import SearchPool, SearchResult
from sdsearch_lightning.types import RolloutRequest, Trajectory


class Slot:
    """One rollout."""

    def __init__(self, index: int, request: RolloutRequest, conversation: Conversation) -> None:
        self.index, self.request, self.conversation = index, request, conversation
        self.generator = random.Random(request.seed)
        self.unread: list[int] = list(request.prompt_ids)
        self.length = 0
        self.row = -1
        self.query = ""

    @property
    def is_reading(self) -> bool:
        """Whether there is more to feed than the token that was just sampled."""
        return self.length == 0 or len(self.unread) > 1


@dataclass(frozen=True, slots=True)
class Schedule:
    """What an engine's options say of a window."""

    overlap_steps: int | None
    max_prefill_tokens: int


class Window:
    """Runs slots to their end.

    Args:
        policy: whose tokens are drawn.
        todo: in the order in which they are admitted; rollouts with one prompt stand together.
        rows: memory; as many rows as slots can run at once.
        searches: where queries go.
        schedule: see `SlotEngine`.
        done: gets each finished rollout, by its slot's index.
        counts: gets the work.
        report: told of progress.
    """

    def __init__(
        self,
        policy: Policy,
        todo: Sequence[Slot],
        rows: KVRows,
        searches: SearchPool,
        schedule: Schedule,
        done: dict[int, Trajectory],
        counts: WorkCounts,
        report: ReportProgress,
    ) -> None:
        self._policy, self._rows, self._searches, self._schedule = policy, rows, searches, schedule
        self._done, self._counts, self._report = done, counts, report
        self._todo = deque(todo)
        self._slots: list[Slot] = []  # by row: the first `_num_decoding` decode or read, the others ask or wait
        self._num_decoding = 0
        self._asking: list[Slot] = []
        self._waiting: list[Slot] = []  # for `_answers`
        self._answers: Future[list[SearchResult]] | None = None
        self._step = self._sent_at = 0
        self._prompt: tuple[tuple[int, ...], Tensor] | None = None  # of a group that did not fit whole: [V] logits

    def run(self) -> None:
        """Until every rollout has ended."""
        while self._todo or self._slots:
            self._receive()
            self._admit()
            if reading := [slot for slot in self._slots[: self._num_decoding] if slot.is_reading]:
                self._read(reading)
            elif self._num_decoding:
                self._decode()
            self._send()

    # Searches

    def _send(self) -> None:
        """Send all queries that wait, unless a batch is under way."""
        if self._asking and self._answers is None:
            self._answers = self._searches.submit([slot.query for slot in self._asking])
            self._report(0, len(self._asking), 0)
            self._waiting, self._asking, self._sent_at = self._asking, [], self._step

    def _receive(self) -> None:
        """Take the answers where it is time, or where there is nothing else to do."""
        if self._answers is None or (self._num_decoding and not self._is_due(self._answers)):
            return
        waiting, results = self._waiting, self._answers.result()
        self._waiting, self._answers = [], None
        for slot, result in zip(waiting, results, strict=True):
            slot.unread += slot.conversation.observe(result)
            self._exchange(slot.row, self._num_decoding)
            self._num_decoding += 1
            self._drop_ended(slot)

    def _is_due(self, answers: Future[list[SearchResult]]) -> bool:
        overlap = self._schedule.overlap_steps
        return answers.done() if overlap is None else self._step >= self._sent_at + overlap

    # Rows

    def _admit(self) -> None:
        """Give free rows to the next rollouts."""
        while self._todo and len(self._slots) < self._rows.num_rows:
            slot = self._todo.popleft()
            if slot.conversation.stop_reason is not None:  # its prompt leaves no room for a token
                self._finish(slot)
                continue
            slot.row = len(self._slots)
            self._slots.append(slot)
            self._exchange(slot.row, self._num_decoding)
            self._num_decoding += 1

    def _settle(self, slot: Slot, token_id: int, logprob: float) -> None:
        """Tell the conversation of a token, and move the slot to where it belongs now."""
        event = slot.conversation.accept(token_id, logprob)
        slot.unread = [token_id]
        if isinstance(event, Continue):
            slot.unread += event.forced
        elif isinstance(event, Search):
            slot.query = event.query
            self._asking.append(slot)
            self._num_decoding -= 1
            self._exchange(slot.row, self._num_decoding)
        self._drop_ended(slot)

    def _drop_ended(self, slot: Slot) -> None:
        """Free the row of a decoding slot whose rollout has ended."""
        if slot.conversation.stop_reason is None:
            return
        slot.length = 0
        self._num_decoding -= 1
        self._exchange(slot.row, self._num_decoding)
        self._exchange(slot.row, len(self._slots) - 1)
        self._slots.pop()
        self._finish(slot)

    def _finish(self, slot: Slot) -> None:
        self._done[slot.index] = slot.conversation.finish()
        self._report(1, 0, 0)

    def _exchange(self, row: int, other: int) -> None:
        one, two = self._slots[row], self._slots[other]
        self._rows.exchange(row, one.length, other, two.length)
        self._slots[row], self._slots[other] = two, one
        one.row, two.row = other, row

    # Tokens

    def _read(self, reading: Sequence[Slot]) -> None:
        """Feed all unread tokens, a prompt once for all that begin with it, and draw the next token of each."""
        readers: dict[tuple[int, ...], Slot] = {}  # by prompt: whose row holds it
        known: dict[tuple[int, ...], Tensor] = {}  # by prompt: [V] logits after it
        if self._prompt is not None:
            prompt, logits = self._prompt
            if holder := next((s for s in self._slots if s.length and s.request.prompt_ids == prompt), None):
                readers[prompt], known[prompt] = holder, logits
        beginning = [slot for slot in reading if not slot.length]
        for slot in beginning:
            readers.setdefault(slot.request.prompt_ids, slot)
        fed: dict[Slot, Tensor] = {}
        for slots in self._portions([s for s in reading if s.length or readers[s.request.prompt_ids] is s]):
            fed |= zip(slots, self._feed(slots), strict=True)
        for slot in beginning:
            prompt, reader = slot.request.prompt_ids, readers[slot.request.prompt_ids]
            if reader is slot:
                known[prompt] = fed[slot]
            else:
                slot.length = len(prompt)
                self._rows.copy(reader.row, slot.row, slot.length)
                fed[slot] = known[prompt]
        following = self._todo[0].request.prompt_ids if self._todo else ()
        self._prompt = (following, known[following]) if following in known else None
        self._draw(reading, torch.stack([fed[slot] for slot in reading]))

    def _portions(self, slots: Sequence[Slot]) -> list[list[Slot]]:
        """As many together as may be fed in one pass."""
        portions: list[list[Slot]] = []
        total = 0
        for slot in slots:
            total += len(slot.unread)
            if not portions or total > self._schedule.max_prefill_tokens:
                portions.append([])
                total = len(slot.unread)
            portions[-1].append(slot)
        return portions

    def _feed(self, slots: Sequence[Slot]) -> Tensor:
        """[m, V] logits after each slot's unread tokens."""
        feeds = [Feed(slot.row, slot.length, len(slot.unread)) for slot in slots]
        tokens = self._tensor([token for slot in slots for token in slot.unread])
        positions = self._tensor([feed.start + i for feed in feeds for i in range(feed.length)])
        ends = self._tensor([feed.length for feed in feeds]).cumsum(0) - 1
        for slot, feed in zip(slots, feeds, strict=True):
            slot.length += feed.length
        self._counts.prefill_tokens += len(tokens)
        return self._policy.advance(tokens, positions, PrefillRows(self._rows, feeds), ends)

    def _decode(self) -> None:
        """One token more for every decoding slot."""
        slots = self._slots[: self._num_decoding]
        lengths = [slot.length for slot in slots]
        tokens, positions = self._tensor([slot.unread[0] for slot in slots]), self._tensor(lengths)
        every = self._tensor(range(len(slots)))
        logits = self._policy.advance(tokens, positions, DecodeRows(self._rows, lengths), every)
        for slot in slots:
            slot.length += 1
        self._step += 1
        self._counts.steps += 1
        self._counts.decode_rows += len(slots)
        self._draw(slots, logits)

    def _draw(self, slots: Sequence[Slot], logits: Tensor) -> None:
        """Sample a token for each slot from its logits [m, V]."""
        tokens, logprobs = sample(logits, [s.request.sampling for s in slots], [s.generator for s in slots])
        drawn = list(zip(slots, tokens.tolist(), logprobs.tolist(), strict=True))
        check_finite((slot.request, logprob) for slot, _, logprob in drawn)
        for slot, token_id, logprob in drawn:
            self._settle(slot, token_id, logprob)
        self._report(0, 0, len(drawn))

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._rows.cells.device)
