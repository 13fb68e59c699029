"""A run folder is written by one command at a time.

A suspended run, or a requeued job, would else go on beside a second start of the same command, and mix its rows with
those of the other. The lock is the kernel's (flock): it goes with the process that holds it, however that ends.

    <root>/.<name>.lock     beside the folder, so that a start that is refused leaves no folder; never removed: a lock
                            that is moved or removed is none
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_only

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.files import telling_full_disk


@contextmanager
def held_alone(folder: Path) -> Iterator[None]:
    """Holds a folder for this process inside the block; on ranks other than 0, which rank 0 holds it for, nothing.

    Raises:
        ConfigError: another process holds it, or nothing can be written beside it.
    """
    # Before the trainer is made, on a node that was started by hand, every first process believes to be rank 0.
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    if getattr(rank_zero_only, "rank", 0) or node != "0":
        yield
        return
    path = folder.with_name(f".{folder.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"run.root: expected a folder to write to, found {folder.parent} ({error}).") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise ConfigError(
                f"{folder} is in use by {holder}; two runs would mix there. Wait for that one or end it (a suspended "
                "one holds it too), or choose another folder with --run.name NAME."
            ) from None
        except OSError as error:  # a file system without locks
            print(f"warning: {path} cannot be locked ({error}): start no second run in {folder}.", file=sys.stderr)
        # A forked worker that outlives this process must not hold what nobody uses.
        os.register_at_fork(after_in_child=lock.close)
        with telling_full_disk(path):
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}")
            lock.flush()
        yield
