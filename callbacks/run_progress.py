"""RunProgress: where a run stands, as one live display on a terminal, or as a line per step where output is piped.

Invariant: nobody else moves the cursor of standard output; rollout windows tell this callback what they do.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, TextIO

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text

from sdsearch_lightning.rollout.progress import RolloutProgress

SHOWN = {
    "rollout/reward": "reward",
    "rollout/exact_match": "exact match",
    "distill/jsd": "JSD",
    "rollout/tokens_per_second": "tokens/s",
    "train/loss": "loss",
}
"""Metrics of a step that are shown, where they are logged, with the words for them."""
VALIDATION = {"val/exact_match": "exact match", "val/f1": "F1"}
QUIET = 30.0
"""Seconds of one rollout window without a word, where output is piped."""


class RunProgress(ProgressBar):
    """Shows the step, the time left, the reward, the exact match of the last validation, the JSD and the speed.

    The progress bar of `sdsearch fit` and the other commands; one in `trainer.callbacks` takes its place, and
    `trainer.enable_progress_bar: false` turns it off. On a terminal it is three lines at the bottom, above which
    everything else scrolls; elsewhere it writes a line per `trainer.log_every_n_steps` steps and per validation.

    Args:
        refresh_rate: redraws per second on a terminal.
    """

    def __init__(self, refresh_rate: float = 4.0) -> None:
        super().__init__()
        self.refresh_rate = refresh_rate
        self._live: Live | None = None
        self._logs = _Rerouted()
        self._enabled = True
        self._phase, self._unit, self._done, self._total = "", "step", 0, 0.0
        self._first_step, self._began = 0, 0.0
        self._last: dict[str, float] = {}
        self._validation = ""
        self._window: RolloutProgress | None = None
        self._next_word = 0.0

    def disable(self) -> None:
        """Show nothing: ranks other than 0."""
        self._enabled = False

    def enable(self) -> None:
        """Undo `disable`: rank 0, where Lightning turned every bar off before."""
        self._enabled = True

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_live": None}  # it has locks, which nothing can copy

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_step, self._began = trainer.global_step, time.monotonic()
        self._begin("training", trainer.global_step, _last_step(trainer))

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._phase = ""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:  # type: ignore[override]
        self._done = trainer.global_step
        values = trainer.callback_metrics
        self._last = {key: float(values[key]) for key in SHOWN if key in values}
        self._phase = ""
        if self._done % max(trainer.log_every_n_steps, 1) == 0 or self._done == self._total:  # type: ignore[attr-defined]
            self._show(f"{self._step()}: {_told(self._last, SHOWN)}, {self._time_left()}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not _in_fit(trainer):
            self._begin("", trainer.global_step, _last_step(trainer))

    def on_validation_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int, *_: Any) -> None:
        self._phase = f"validation, batch {index + 1} of {trainer.num_val_batches[0]:g}"

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._phase = ""
        values = {key: float(value) for key, value in trainer.callback_metrics.items() if key in VALIDATION}
        if values:
            self._validation = f"validation after step {trainer.global_step}: {_told(values, VALIDATION)}"
            self._show(self._validation)
        if not _in_fit(trainer):
            self._end()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin("", 0, sum(trainer.num_test_batches), "batch")

    def on_test_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:  # type: ignore[override]
        self._done += 1

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin("", 0, sum(trainer.num_predict_batches), "batch")

    on_predict_batch_end = on_test_batch_end  # type: ignore[assignment]
    on_predict_end = on_test_end  # type: ignore[assignment]

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._end()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._end()

    def show_rollouts(self, window: RolloutProgress) -> None:
        """Told by a rollout window what it has done so far."""
        if not self._enabled:
            return
        phase = (
            f"rollouts {window.done}/{window.total}, {window.searches} searches, "
            f"{window.tokens_per_second:.0f} tokens/s"
        )
        if self._live is not None:
            prefix = f"{self._phase.split(': ')[0]}: " if self._phase.startswith("validation") else ""
            self._phase = f"{prefix}{phase}"
        elif window is not self._window or window.seconds >= self._next_word:
            if window is self._window:
                print(f"{self._step()}: {phase}", flush=True)
            self._window, self._next_word = window, window.seconds + QUIET

    def _begin(self, phase: str, done: int, total: float, unit: str = "step") -> None:
        self._phase, self._done, self._total, self._unit = phase, done, total, unit
        if not self._enabled or self._live is not None:
            return
        console = Console(file=sys.stdout)
        if console.is_terminal:
            self._live = Live(
                get_renderable=self._screen,
                console=console,
                refresh_per_second=self.refresh_rate,
                transient=True,
            )
            self._live.start()
            self._logs.begin()

    def _end(self) -> None:
        if self._live is not None:
            self._logs.end()
            self._live.stop()
            self._live = None

    def _show(self, line: str) -> None:
        """Prints a line, where there is no live display that says it."""
        if self._live is None and self._enabled:
            print(line, flush=True)

    def _screen(self) -> Group:
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        known = 0 < self._total < float("inf")
        head.add_row(
            self._step(),
            Bar(total=self._total if known else None, completed=self._done, pulse=not known),
            self._time_left(),
        )
        lines = (self._phase, _told(self._last, SHOWN), self._validation)
        return Group(head, *(Text(line) for line in lines if line))

    def _step(self) -> str:
        return f"{self._unit} {self._done}" + (f"/{self._total:g}" if 0 < self._total < float("inf") else "")

    def _time_left(self) -> str:
        """From the mean time of the steps that this process made, what lay between them included."""
        made, left = self._done - self._first_step, self._total - self._done
        if made <= 0 or not 0 <= left < float("inf") or not self._began:
            return ""
        seconds = round((time.monotonic() - self._began) / made * left)
        return f"{timedelta(seconds=seconds)} left"


class _Rerouted:
    """Log handlers hold the stream that they were made with; while a live display stands they write above it."""

    def __init__(self) -> None:
        self._handlers: list[tuple[logging.StreamHandler[TextIO], TextIO]] = []

    def begin(self) -> None:
        """Lets handlers of the process's own streams write to those that `sys` holds now."""
        for handler in _stream_handlers():
            if handler.stream in (sys.__stderr__, sys.__stdout__):
                self._handlers.append((handler, handler.stream))
                handler.setStream(sys.stderr if handler.stream is sys.__stderr__ else sys.stdout)

    def end(self) -> None:
        """Gives them their own streams again."""
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers.clear()


def _stream_handlers() -> Iterator[logging.StreamHandler[TextIO]]:
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                yield handler


def _in_fit(trainer: pl.Trainer) -> bool:
    """Whether an evaluation is one of those between training steps."""
    return trainer.state.fn == "fit"


def _last_step(trainer: pl.Trainer) -> float:
    """The step at which training ends, as far as it is known; infinity where it is not."""
    ends = [float(trainer.max_steps)] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and trainer.num_training_batches:
        ends.append(float(trainer.max_epochs * trainer.num_training_batches))
    return min(ends, default=float("inf"))


def _told(values: Mapping[str, float], words: Mapping[str, str]) -> str:
    return ", ".join(
        f"{words[key]} {value:.0f}" if abs(value) >= 100 else f"{words[key]} {value:.3g}"
        for key, value in values.items()
    )
