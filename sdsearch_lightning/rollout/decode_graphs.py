"""Decode steps of fixed sizes, recorded once and replayed: on CUDA, launching kernels takes longer than running them.

A step gives the first rows one token each. Its size is how many rows it computes and how many cells they see, both
rounded up, so that few sizes serve a whole window. A row too many writes to a cell that nobody looks at. A step reads
its tokens from buffers and leaves its logits in one; the next step takes them away.

    advance(tokens, cells) -> fill the buffers -> replay the recording of this size -> the first rows of its logits

Invariant: what a recording refers to (weights, rows, buffers) stays where it is as long as the recording is used, so
both belong to one window.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.rollout.kv_rows import KVRows, RowsAttention

Step = Callable[[], Tensor]
Capture = Callable[[Step, Any], Step]
"""Records a step, in a memory pool, and gives what replays it."""

PATIENCE = 4
"""Steps of one size that run unrecorded: a size that comes up less often would not pay, and kernels load meanwhile."""
CELLS = 256
"""Cells are rounded up to a multiple of this."""


def capture_graph(step: Step, pool: Any) -> Step:
    """Record `step` as a CUDA graph. Other threads, which search, may use the device meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        logits = step()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


class DecodeGraphs:
    """Runs decode steps over rows.

    Args:
        policy: whose steps they are; its weights stay where they are.
        rows: what its tokens look at.
        capture: how to record.
    """

    def __init__(self, policy: Policy, rows: KVRows, capture: Capture) -> None:
        self._policy, self._rows, self._capture = policy, rows, capture
        self._inputs = torch.zeros(3, rows.num_rows, dtype=torch.long, device=rows.device)
        """Token, position and cell of each row."""
        self._recorded: dict[tuple[int, int], Step] = {}
        self._times: Counter[tuple[int, int]] = Counter()
        self._pool = torch.cuda.graph_pool_handle() if rows.device.type == "cuda" else None
        self._can_record = True

    def advance(self, tokens: Tensor, cells: Sequence[int]) -> Tensor:
        """[A, V] logits after each of the first A rows has read a token; good until the next step.

        Args:
            tokens: [A] one per row, beside the rows.
            cells: [A] where they go; `KVRows.reach` made them ready.
        """
        size = self._size(len(tokens), max(cells) + 1)
        self._rows.reach(size[1])
        spare = size[0] - len(tokens)
        places = [[*cells, *[0] * spare], [*cells, *[self._rows.capacity] * spare]]
        self._inputs[1:, : size[0]] = self._rows.numbers(places)
        self._inputs[0, : len(tokens)] = tokens
        self._inputs[0, len(tokens) : size[0]] = 0
        self._times[size] += 1
        if self._times[size] == PATIENCE + 1 and self._can_record:
            self._record(size)
        return self._recorded.get(size, lambda: self._step(*size))()[: len(tokens)]

    def _size(self, num_rows: int, num_cells: int) -> tuple[int, int]:
        """Both rounded up: rows to a power of two or one and a half of it, cells to a multiple of `CELLS`."""
        power = 1 << (num_rows - 1).bit_length()
        rows = 3 * power // 4 if power >= 4 and 3 * power // 4 >= num_rows else power
        cells = -(-num_cells // CELLS) * CELLS
        return min(rows, self._rows.num_rows), min(cells, self._rows.capacity)

    def _step(self, num_rows: int, num_cells: int) -> Tensor:
        tokens, positions, cells = self._inputs[:, :num_rows]
        attention = RowsAttention(self._rows, (), cells, num_cells)
        return self._policy.advance(tokens, positions, attention, torch.arange(num_rows, device=tokens.device))

    def _record(self, size: tuple[int, int]) -> None:
        """Record the step of a size; where that fails, this window goes on without recordings."""
        device = self._rows.device.type
        # A cast that autocast keeps would belong to the recording, and hold no numbers before its first replay.
        casting = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
        )
        try:
            with casting:
                self._recorded[size] = self._capture(lambda: self._step(*size), self._pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._can_record = False
            reason = str(error).splitlines()[0]
            warnings.warn(
                f"Decode steps of models of type {self._policy.model.config.model_type} cannot be recorded as CUDA "
                f"graphs ({reason}): they run one by one, which is slower. rollout.engine.cuda_graphs: false says that "
                "this is known.",
                stacklevel=2,
            )
