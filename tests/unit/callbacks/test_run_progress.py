"""What a terminal shows while a run goes on, read from a pseudo-terminal; and what a pipe gets."""

from __future__ import annotations

import logging
import os
import pty
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any

import lightning.pytorch as pl
import pyte
import pytest
import torch

from helpers.fits import DrawnScripts, ToyData, grouping
from helpers.models import tiny_model
from helpers.training_rollouts import TRAINING_PROTOCOL, TRAINING_TOKENIZER
from sdsearch_lightning import SDSearchModule
from sdsearch_lightning.callbacks import HindsightConstruction, JSDWeightScheduler, RunProgress
from sdsearch_lightning.callbacks.run_progress import _Rerouted
from sdsearch_lightning.policy.loading import ScratchModel
from sdsearch_lightning.rollout.progress import RolloutProgress

COLUMNS = 60


class Terminal:
    """A pseudo-terminal of 60 columns, and the screen that a person would see."""

    def __init__(self) -> None:
        self.screen = pyte.HistoryScreen(COLUMNS, 40, history=1000)
        self.raw = b""
        self._stream = pyte.ByteStream(self.screen)
        self._master, slave = pty.openpty()
        self.file = os.fdopen(slave, "w")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:
                return
            self.raw += data
            self._stream.feed(data)

    def lines(self) -> list[str]:
        """All that was written and still stands, scrolled away or not."""
        length = -1
        while length != len(self.raw):  # the reader is another thread
            length = len(self.raw)
            time.sleep(0.05)
        gone = ["".join(row[i].data for i in range(COLUMNS)).rstrip() for row in self.screen.history.top]
        return [line for line in [*gone, *(line.rstrip() for line in self.screen.display)] if line]

    def close(self) -> None:
        self.file.close()
        self._reader.join(5)
        os.close(self._master)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    terminal = Terminal()
    for key, value in {"COLUMNS": str(COLUMNS), "LINES": "40", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(key, value)
    for key in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(key, raising=False)
    yield terminal


class Shots(pl.Callback):
    """The screen at the end of each step, and lines that others write meanwhile."""

    def __init__(self, terminal: Terminal, bar: RunProgress) -> None:
        self.terminal, self.bar, self.shots = terminal, bar, []  # type: ignore[var-annotated]

    def on_train_batch_end(self, *_: Any) -> None:
        print("a line of somebody else")
        assert self.bar._live is not None
        self.bar._live.refresh()
        self.shots.append(self.terminal.lines())


def trained(*callbacks: pl.Callback, steps: int = 3, every: int = 1) -> pl.Trainer:
    module = SDSearchModule(
        scratch=ScratchModel(), protocol=TRAINING_PROTOCOL, optimizer=lambda params: torch.optim.SGD(params, lr=1e-2)
    )
    module.attach(tiny_model(), TRAINING_TOKENIZER)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        max_steps=steps,
        log_every_n_steps=every,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        callbacks=[grouping(DrawnScripts()), HindsightConstruction(), JSDWeightScheduler(0.3, 0), *callbacks],
    )
    trainer.fit(module, datamodule=ToyData())
    return trainer


def test_a_terminal_has_one_region_of_progress_and_nothing_is_left_of_it(terminal: Terminal) -> None:
    bar = RunProgress()
    shots = Shots(terminal, bar)
    with redirect_stdout(terminal.file):
        trained(bar, shots)
    terminal.close()
    last = shots.shots[-1]
    assert sum(line.startswith("step ") for line in last) == 1, last
    head = next(line for line in last if line.startswith("step "))
    assert re.fullmatch(r"step 3/3 ━+ 0:00:00 left", head), head
    assert any(line.startswith("reward ") and "exact match" in line and "JSD" in line for line in last)
    assert any(line.startswith("validation after step 2: exact match") for line in last)
    above = last[: last.index(head)]
    assert above[-3:] == ["a line of somebody else"] * 3, "it scrolls above the region"
    assert all(len(line) <= COLUMNS for line in last)
    assert terminal.lines() == above, "what moved is wiped"
    assert b"Epoch" not in terminal.raw and b"\x1b[?25h" in terminal.raw, "the cursor is shown again"


def test_a_pipe_gets_a_line_per_step_and_per_validation(capsys: pytest.CaptureFixture[str]) -> None:
    trained(RunProgress())
    written = capsys.readouterr()
    lines = written.out.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split(":")[0] for line in steps] == ["step 1/3", "step 2/3", "step 3/3"]
    assert all(re.search(r"reward [\d.-]+, exact match .*, \d:\d\d:\d\d left$", line) for line in steps), steps
    assert sum(line.startswith("validation after step 2: exact match ") for line in lines) == 1
    assert "\x1b" not in written.out and written.err == ""


def test_a_pipe_gets_the_steps_that_are_logged_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    trained(RunProgress(), every=2)
    steps = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in steps] == ["step 2/3", "step 3/3"]


def test_a_long_window_says_a_word_now_and_then_on_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("sdsearch_lightning.rollout.progress.time.perf_counter", lambda: clock[0])
    bar = RunProgress()
    window = RolloutProgress(8, bar.show_rollouts)
    for now in (1.0, 29.0, 31.0, 60.0, 61.0):
        clock[0] = now
        window.report(1, 2, 0)
    assert capsys.readouterr().out.splitlines() == [
        "step 0: rollouts 3/8, 6 searches, 0 tokens/s",
        "step 0: rollouts 5/8, 10 searches, 0 tokens/s",
    ]
    bar.disable()
    clock[0] = 1000.0
    window.report(1, 2, 0)
    assert capsys.readouterr().out == ""


def test_log_handlers_write_where_the_display_is(monkeypatch: pytest.MonkeyPatch) -> None:
    handler, elsewhere = logging.StreamHandler(sys.__stderr__), logging.StreamHandler(open(os.devnull, "w"))
    logger = logging.getLogger("a logger of this test")
    monkeypatch.setattr(logger, "handlers", [handler, elsewhere])
    above, file = open(os.devnull, "w"), elsewhere.stream
    monkeypatch.setattr(sys, "stderr", above)
    logs = _Rerouted()
    logs.begin()
    assert handler.stream is above and elsewhere.stream is file
    logs.end()
    assert handler.stream is sys.__stderr__
    file.close()
    above.close()
