"""The command line as child processes, with what they cost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parent.parent
THREADS = {"OMP_NUM_THREADS": "1"}
"""All that is set in the environment of a run: one core per worker."""
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)
"""Exit codes of a run that somebody stopped: it has not failed, and will be done again."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a process ended."""

    exit_code: int
    cpu_seconds: float
    wall_seconds: float


class Executor(Protocol):
    """Runs a command to its end, with its output in `log`; `stop` ends all that are running."""

    def __call__(self, arguments: Sequence[str], log: Path) -> Outcome: ...

    def stop(self) -> None: ...


class Processes:
    """Runs `python -m sdsearch_lightning` as child processes, from the root of the repository."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._is_stopped = False

    def __call__(self, arguments: Sequence[str], log: Path) -> Outcome:
        command = [sys.executable, "-m", "sdsearch_lightning", *arguments]
        start = time.monotonic()
        with log.open("wb") as file, self._lock:
            if self._is_stopped:
                return Outcome(-signal.SIGTERM, 0.0, 0.0)
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=file,
                cwd=ROOT,
                env=os.environ | THREADS,
                close_fds=False,  # the claim, so that it lasts as long as the run if this process is killed
            )
            self._running.add(process)
        # Not process.wait(): the kernel tells what this child used only to the one who waits like this.
        _, status, usage = os.wait4(process.pid, 0)
        with self._lock:
            process.returncode = os.waitstatus_to_exitcode(status)
            self._running.discard(process)
        return Outcome(process.returncode, usage.ru_utime + usage.ru_stime, time.monotonic() - start)

    def stop(self) -> None:
        with self._lock:
            self._is_stopped = True
            for process in self._running:
                process.terminate()
