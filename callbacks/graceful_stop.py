"""GracefulStop: Ctrl-C and SIGTERM leave a checkpoint from which the run goes on exactly.

Lightning's own SIGTERM handler can deadlock when several ranks get the signal at once, and ends with exit code 0; its
Ctrl-C saves nothing. Here a signal only sets a flag; all ranks agree on it at the end of a batch, save, and leave
together before the next batch begins. Several signals at once, on any ranks, are one.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
"""SIGUSR1 is what batch systems are often asked to send ahead of the time limit."""
ECHO = 2.0
"""Seconds in which another signal is the first one told again: torchrun and srun pass on what reached all processes."""


class GracefulStop(Callback):
    """Finishes the step in flight (a validation that is due included), saves a checkpoint and exits.

    The exit code is 143 after SIGTERM, 130 after Ctrl-C and 138 after SIGUSR1. A second signal ends at once, and so
    does the first one outside training, where there is nothing to save. Put it before callbacks that do long work at
    the start of a batch.

    Args:
        save: called on all ranks at the end of the batch that is the last; None: a checkpoint is saved as
            `checkpoints/last.ckpt` in `trainer.default_root_dir`.
        advice: how to go on, for the line that is printed at the end.
    """

    def __init__(self, save: Callable[[], None] | None = None, advice: str = "") -> None:
        self.save = save
        self.advice = advice
        self.signal: int | None = None
        """The signal that came, on this rank."""
        self.agreed: int | None = None
        """The signal that all ranks stop for. Not the same: one sent to all may reach this rank after they agreed."""
        self.is_stopping = False
        """Whether the ranks agreed to stop."""
        self._signal_time = 0.0
        self._trainer: Trainer | None = None
        self._old_handlers: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """Exit code of a process that a signal stopped: 128 + its number, as shells have it."""
        return 128 + (self.agreed or self.signal or signal.SIGTERM)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning would set its handlers now and then, and a signal between that and the hooks below would meet them.
        trainer._signal_connector.register_signal_handlers = lambda: self._install(trainer)  # type: ignore[method-assign]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        number = torch.tensor(self.signal or 0, device=trainer.strategy.root_device)
        number = trainer.strategy.reduce(number, reduce_op="max")  # type: ignore[assignment]
        if not number:
            return
        self.agreed, self.is_stopping = int(number), True
        if self.save is not None:
            self.save()
        else:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt", weights_only=False)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Not `trainer.should_stop`, which would start a validation that the uninterrupted run does not have.
        if self.is_stopping:
            self.leave(trainer.global_step)

    def leave(self, step: int) -> None:
        """Tell how to go on, and exit; called where the checkpoint of the step is saved."""
        _say(f"stopped after step {step}; a checkpoint is saved. {self.advice}".rstrip())
        raise SystemExit(self.exit_code)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_outside_fit(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_outside_fit(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install(trainer)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_outside_fit(trainer)

    def _install(self, trainer: Trainer) -> None:
        """Sets the handlers, in place of Lightning's."""
        self._trainer = trainer
        if self._old_handlers or threading.current_thread() is not threading.main_thread():
            return
        self._old_handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def _restore(self) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._old_handlers = {}

    def _restore_outside_fit(self, trainer: Trainer) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self._restore()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        is_first = self.signal is None
        if is_first:
            self.signal, self._signal_time = number, time.monotonic()
        name = signal.Signals(number).name
        if self._trainer is None or self._trainer.state.fn != TrainerFn.FITTING:
            _say(f"{name}: stopped; outside training there is nothing to save.")
        elif is_first:
            _say(f"{name}: stopping after this step, with a checkpoint. Once more: at once.")
            return
        elif time.monotonic() - self._signal_time < ECHO:
            return
        self.signal = number
        raise SystemExit(128 + number)


@rank_zero_only
def _say(line: str) -> None:
    # os.write, not print: a signal handler may interrupt a print.
    os.write(2, f"\n{line}\n".encode())
