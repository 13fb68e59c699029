"""Several processes end together, and the one that died is named.

Rank 0 starts the others (Lightning's launcher) and watches them; each of them watches rank 0. Where torchrun or SLURM
starts all, they do the watching, and name the rank. Lightning's own observer looks every five seconds, kills rank 0
without a word, and does so after an orderly stop as well, since that is an exit code too.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from sdsearch_lightning.errors import SDSearchError

LAUNCHED_BY = "SDSEARCH_LAUNCHED_BY"
"""Environment variable: the process id of the rank 0 that started this process."""
LOST = 75
"""Exit code of a process that lost the connection to another: it is not the one to be named."""
POLL, SHORT, LONG = 0.2, 5.0, 60.0
"""Seconds: between two looks, and what others get to end by themselves, after an error and after a success."""
Process = subprocess.Popen[bytes]


class WatchingLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher with a watch that speaks.

    Args:
        launcher: what it replaces, before it launched anything.
        advice: how to go on, for the line that names a dead process.
    """

    def __init__(self, launcher: _SubprocessScriptLauncher, advice: Callable[[], str]) -> None:
        super().__init__(launcher.cluster_environment, launcher.num_processes, launcher.num_nodes)
        self.advice = advice
        self.is_over = False
        """Whether this process is about to end; the watch then leaves everything to it."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            os.environ[LAUNCHED_BY] = str(os.getpid())
            self._call_children_scripts()
            threading.Thread(target=self._watch, daemon=True, name="watch-ranks").start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def _watch(self) -> None:
        """Ends everything where a process died and this one does not notice: it may wait in a collective forever."""
        while not self.is_over:
            time.sleep(POLL)
            if failed := self.failed():
                # One that ended with an error may have company: that of this process is told better by itself.
                time.sleep(POLL if failed[0][1].returncode < 0 else 2 * SHORT)
                if not self.is_over:
                    os._exit(self.blame())
                return

    def failed(self) -> list[tuple[int, Process]]:
        """Processes that failed, with their local ranks; the likeliest cause first: a signal, an error, a lost peer."""
        failed = [(rank, process) for rank, process in enumerate(self.procs, 1) if process.poll()]
        return sorted(failed, key=lambda entry: (entry[1].returncode > 0, entry[1].returncode == LOST))

    def blame(self) -> int:
        """Ends all processes and prints whose fault it was and how to go on; the exit code that this makes."""
        told, code = self._cause()  # before it is mixed up with the end of the others
        self.end_all(SHORT / 5)
        _tell(f"error: {told}; all others are stopped. {self.advice()}")
        return code

    def _cause(self) -> tuple[str, int]:
        causes = [(rank, process) for rank, process in self.failed() if process.returncode != LOST]
        if not causes:
            silent = [str(rank) for rank, process in enumerate(self.procs, 1) if process.poll() is None] or ["0"]
            return f"rank {', '.join(silent)} did not answer within the timeout of trainer.strategy", 1
        rank, process = causes[0]
        code: int = process.returncode
        is_stop = code - 128 in (signal.SIGTERM, signal.SIGINT)  # by a second signal: without a checkpoint
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = " (out of memory?)" if code == -signal.SIGKILL else " (its error stands above)" if code in (1, 2) else ""
        return f"rank {rank} (process {process.pid}) {how}{hint}", code if is_stop else 1

    def end_all(self, patience: float) -> None:
        """Waits for the launched processes, and kills those that take longer than `patience` seconds."""
        deadline = time.monotonic() + patience
        while any(process.poll() is None for process in self.procs) and time.monotonic() < deadline:
            time.sleep(POLL / 4)
        for process in self.procs:
            if process.poll() is None:
                process.kill()
            process.wait()

    def await_cause(self) -> None:
        """Waits for the process whose connection was lost to be seen dead; one that only hangs never is."""
        deadline = time.monotonic() + 2 * SHORT
        while time.monotonic() < deadline and all(process.returncode == LOST for _, process in self.failed()):
            time.sleep(POLL)


def watch_processes(trainer: Trainer, advice: Callable[[], str]) -> None:
    """Has the trainer's processes watched, where it starts them itself."""
    launcher = trainer.strategy.launcher
    if type(launcher) is _SubprocessScriptLauncher:
        trainer.strategy._launcher = WatchingLauncher(launcher, advice)


@contextmanager
def ending_together(trainer: Trainer) -> Iterator[None]:
    """Around a command: no process of it outlives it, and an error that only followed from another's death is not told.

    Raises:
        SystemExit: another process died, and was named.
    """
    parent = os.environ.get(LAUNCHED_BY)
    if parent not in (None, str(os.getpid())):
        threading.Thread(target=_follow, args=(int(str(parent)),), daemon=True, name="watch-rank-0").start()
    launcher = trainer.strategy.launcher
    watch = launcher if isinstance(launcher, WatchingLauncher) and not trainer.global_rank else None
    try:
        yield
    except BaseException as error:
        if watch is not None and watch.procs:
            watch.is_over = True
            _end_after(error, watch)
        elif is_lost_peer(error):
            if parent is not None:
                time.sleep(3 * POLL)  # where it is rank 0 that died, `_follow` tells
            else:
                _tell(
                    f"error: rank {trainer.global_rank} lost another rank: {_reason(error)}. Who started it tells more."
                )
            raise SystemExit(LOST) from None
        raise
    if watch is not None:
        watch.is_over = True
        watch.end_all(LONG)


def _end_after(error: BaseException, watch: WatchingLauncher) -> None:
    """Ends the launched processes after an error of rank 0, or names the one whose death caused it."""
    if is_lost_peer(error):
        watch.await_cause()
        raise SystemExit(watch.blame()) from None
    # An error that all ranks raise together is told once: the others wait a moment before they tell theirs.
    watch.end_all(0 if isinstance(error, SDSearchError) else SHORT)


def is_lost_peer(error: BaseException) -> bool:
    """Whether the error only says that another process is gone or does not answer."""
    told = str(error)
    is_gloo = isinstance(error, RuntimeError) and ("gloo/transport" in told or "caused pair closure" in told)
    return is_gloo or isinstance(error, torch.distributed.DistError)


def _follow(parent: int) -> None:
    """Ends this process when the rank 0 that started it is gone; one of those left tells."""
    while os.getppid() == parent:
        time.sleep(POLL)
    if os.environ.get("LOCAL_RANK") == "1":
        _tell(f"error: rank 0 (process {parent}) died; all others are stopped. Run the same command again to go on.")
    os._exit(1)


def _reason(error: BaseException) -> str:
    """What torch says without the place in its source."""
    found = re.search(r"Connection \w+ by peer|Timed out[^.\n]*", str(error))
    return found[0] if found else str(error).partition("\n")[0][:160]


def _tell(line: str) -> None:
    sys.stdout.flush()
    os.write(2, f"{line}\n".encode())
