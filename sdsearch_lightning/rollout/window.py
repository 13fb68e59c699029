"""The life of a slot: rollouts come and go row by row, and a pass computes only what some rollout needs.

Every running rollout has a slot, and with it a KV row. The first rows run; behind them stand those that wait for a
search; behind those, free ones. Two rows change places where a slot changes sides, so the rows that run are always a
view of the first ones.

             admit                        query                  send
    todo ------------> RUNNING --------------------> ASKING ------------> WAITING
                        ^ |  ^                                              |
                        | |  +----------------------------------------------+
           token, or    +-+                  documents                      |  search failed, or
           message        |                                                 |  no room for them
                          v  answer, or a budget is spent                   v
                        ended <---------------------------------------------+

One pass gives every running slot its next token. A slot has one unread token then, the one it sampled last; or it has
more, documents or a message before it, and they are read in the same pass, back to back, without padding. A prompt is
read once for all rollouts that begin with it: the others copy its cells. Who has the tokens, and when, is drawing.py's.

Queries are sent while others run, one batch at a time, and their answers are taken `overlap_steps` passes later.
Counting passes, not seconds, keeps the schedule the same in every run; and since each rollout draws from its own seed,
a schedule changes no result anyway, but for the rounding of float32.

Invariant: a slot has read `length` tokens, the cells of its row; `unread` is what its conversation holds beyond them.

Next: callbacks/hindsight_construction.py, once a group is scored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.protocol.conversation import Continue, Search
from sdsearch_lightning.rollout.decode_graphs import DecodeGraphs
from sdsearch_lightning.rollout.drawing import UNSEEN, Drawing, Slot
from sdsearch_lightning.rollout.engine import ReportProgress, WorkCounts, check_finite
from sdsearch_lightning.rollout.kv_rows import KVRows, NewTokens, RowsAttention
from sdsearch_lightning.rollout.search_pool import SearchPool, SearchResult
from sdsearch_lightning.types import Trajectory


@dataclass(frozen=True, slots=True)
class Schedule:
    """When a window takes answers and how much it reads at once, from its engine's options."""

    overlap_steps: int | None
    max_prefill_tokens: int
    looks_late: bool = False
    """Whether the host sees tokens one pass late, see drawing.py."""


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
        graphs: where to run the steps that read one token per slot; None = as every other pass.
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
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self._graphs = graphs
        self._policy, self._rows, self._searches, self._schedule = policy, rows, searches, schedule
        self._done, self._counts, self._report = done, counts, report
        self._todo = deque(todo)
        self._slots: list[Slot] = []  # by row: the first `_num_running` run, the others ask or wait
        self._num_running = 0
        self._asking: list[Slot] = []
        self._waiting: list[Slot] = []  # for `_answers`
        self._answers: Future[list[SearchResult]] | None = None
        self._step = self._sent_at = 0
        self._drawings: deque[Drawing] = deque()  # that the host has yet to read, the newest last

    def run(self) -> None:
        """Run until every rollout has ended."""
        while self._todo or self._slots:
            self._receive()
            self._admit()
            if self._num_running:
                self._advance()
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
        if self._answers is None or (self._num_running and not self._is_due(self._answers)):
            return
        waiting, results = self._waiting, self._answers.result()
        self._waiting, self._answers = [], None
        for slot, result in zip(waiting, results, strict=True):
            slot.unread += slot.conversation.observe(result)
            self._exchange(slot.row, self._num_running)
            self._num_running += 1
            self._drop_ended(slot)

    def _is_due(self, answers: Future[list[SearchResult]]) -> bool:
        overlap = self._schedule.overlap_steps
        return answers.done() if overlap is None else self._step >= self._sent_at + overlap

    # Rows

    def _admit(self) -> None:
        """Give free rows to the next rollouts, and let them read their prompts."""
        fresh = []
        while self._todo and len(self._slots) < self._rows.num_rows:
            slot = self._todo.popleft()
            if slot.conversation.stop_reason is not None:  # its prompt leaves no room for a token
                self._finish(slot)
                continue
            slot.row = len(self._slots)
            self._slots.append(slot)
            self._exchange(slot.row, self._num_running)
            self._num_running += 1
            fresh.append(slot)
        if fresh:
            self._read_prompts(fresh)

    def _settle(self, slot: Slot, token_id: int, logprob: float) -> None:
        """Tell the conversation of a token, and move the slot to where it belongs now."""
        event = slot.conversation.accept(token_id, logprob)
        if self._drawings:  # the pass under way has read the token, and draws the next one
            if event == Continue():
                return
            self._drawings[-1].take_back(slot)
        slot.unread = [token_id]
        if isinstance(event, Continue):
            slot.unread += event.forced
        elif isinstance(event, Search):
            slot.query = event.query
            self._asking.append(slot)
            self._num_running -= 1
            self._exchange(slot.row, self._num_running)
        self._drop_ended(slot)

    def _drop_ended(self, slot: Slot) -> None:
        """Free the row of a running slot whose rollout has ended."""
        if slot.conversation.stop_reason is None:
            return
        slot.length = 0
        self._num_running -= 1
        self._exchange(slot.row, self._num_running)
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

    def _read_prompts(self, fresh: Sequence[Slot]) -> None:
        """Read all but the last token of new prompts, each once; an earlier sibling's row holds one already."""
        readers = {slot.request.prompt_ids: slot for slot in self._slots if slot.length}
        for slot in fresh:
            readers.setdefault(slot.request.prompt_ids, slot)
        new = [slot for slot in fresh if readers[slot.request.prompt_ids] is slot and len(slot.unread) > 1]
        for portion in self._portions(new):
            self._pass(portion, [])
        for slot in fresh:
            reader = readers[slot.request.prompt_ids]
            if reader is not slot:
                slot.length, slot.unread = len(slot.unread) - 1, slot.unread[-1:]
                self._rows.copy(reader.row, slot.row, slot.length)

    def _advance(self) -> None:
        """Give every running slot its next token."""
        running = self._slots[: self._num_running]
        *early, last = self._portions([slot for slot in running if len(slot.unread) > 1]) or [[]]
        if self._graphs is not None and last:  # a step that is recorded reads one token of each
            early, last = [*early, last], []
        for portion in early:
            self._pass(portion, [])
        logits = self._pass(last, running)
        self._step += 1
        self._counts.steps += 1
        self._drawings.append(Drawing(running, logits, self._rows.place, self._schedule.looks_late))
        if len(self._drawings) > self._schedule.looks_late:
            self._read(self._drawings.popleft())

    def _portions(self, slots: Sequence[Slot]) -> list[list[Slot]]:
        """As many together as may read in one pass."""
        portions: list[list[Slot]] = []
        total = 0
        for slot in slots:
            total += len(slot.unread)
            if not portions or total > self._schedule.max_prefill_tokens:
                portions.append([])
                total = len(slot.unread)
            portions[-1].append(slot)
        return portions

    def _pass(self, reading: Sequence[Slot], running: Sequence[Slot]) -> Tensor:
        """Let `reading` read all but their last token, and `running`, the first rows, their last: its logits [A, V]."""
        new = [NewTokens(slot.row, slot.length, len(slot.unread) - 1) for slot in reading]
        cells = [slot.length + len(slot.unread) - 1 for slot in running]
        width = max(cells, default=-1) + 1
        self._rows.reach(max([width, *(part.start + part.length for part in new)]))
        if self._graphs is not None and not reading:
            logits = self._graphs.advance(self._tokens((), running), cells)
        else:
            tokens = [token for slot in reading for token in slot.unread[:-1]]
            positions = [part.start + i for part in new for i in range(part.length)]
            numbers = self._rows.numbers
            logits = self._policy.advance(
                self._tokens(tokens, running),
                numbers(positions + cells),
                RowsAttention(self._rows, new, numbers(cells), width),
                numbers(range(len(tokens), len(tokens) + len(running))),
            )
        self._counts.prefill_tokens += sum(part.length for part in new)
        self._counts.decode_rows += len(running)
        for slot, part in zip(reading, new, strict=True):
            slot.length, slot.unread = slot.length + part.length, slot.unread[-1:]
        for slot in running:
            slot.length += 1
        return logits

    def _tokens(self, first: Sequence[int], running: Sequence[Slot]) -> Tensor:
        """[T + A] these, then the last unread token of each slot, wherever it is."""
        last = [slot.unread[-1] for slot in running]
        tokens = self._rows.numbers([*first, *last])
        if UNSEEN in last:
            index = [slot.drawn if token == UNSEEN else 0 for slot, token in zip(running, last, strict=True)]
            drawn, known = self._drawings[-1].tokens[self._rows.numbers(index)], tokens[len(first) :]
            tokens[len(first) :] = torch.where(known == UNSEEN, drawn, known)
        return tokens

    def _read(self, drawing: Drawing) -> None:
        """See what was drawn, and tell the conversations."""
        drawn = list(drawing.read())
        check_finite((slot.request, logprob) for slot, _, logprob in drawn)
        for slot, token_id, logprob in drawn:
            self._settle(slot, token_id, logprob)
        self._report(0, 0, len(drawn))
