"""Cuts the power of runs at random moments, starts them again, and compares with a run that was never cut.

    python -m benchmarks.power_cut --runs 20                      # one process
    python -m benchmarks.power_cut --runs 5 --strategy ddp        # two processes; or fsdp2

The run is that of kill_and_resume.py. What a disk promises is kept beside it: contents of a file as they were when it
was flushed (fsync), names in a folder as they were when that was. At a random flush, of any process, the folder is
rebuilt from that alone, or with a part of what was not flushed yet, or with zeros in its place, as a journal without
data leaves them; then all processes are killed. The same command has to go on to the end and leave the same, bit for
bit; what it says is lost is counted. Exit code 1 tells that some run differed.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.kill_and_resume import LIMIT, Arena, contents, differences
from sdsearch_lightning.__main__ import end_process

Entries = dict[str, "int | str"]
"""Names in a folder: the inode of a file or a folder, or where a link points to."""


class Disk:
    """What is on the disk of a run folder, whatever its files look like; all processes of a run share it.

    Args:
        root: the run folder; what is in it is on the disk when the store is made.
        store: a folder where contents are kept, on the same file system; made where it is not there.
    """

    def __init__(self, root: Path, store: Path) -> None:
        self.root, self.store = root, store
        if store.is_dir():
            return
        store.mkdir()
        for path in [root, *root.rglob("*")] if root.is_dir() else []:
            if not path.is_symlink():
                self.flushed(path)

    @contextmanager
    def alone(self) -> Iterator[int]:
        """One process at a time flushes; yields how many times any did, this one included."""
        calls = os.open(self.store / "calls", os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            fcntl.flock(calls, fcntl.LOCK_EX)
            os.write(calls, b".")
            yield os.fstat(calls).st_size
        finally:
            os.close(calls)

    def flushed(self, path: Path) -> None:
        """Keeps a file or the names in a folder as they are now."""
        number = path.stat().st_ino
        if path.is_dir():
            self._names(number).write_text(json.dumps(entries_of(path)))
            return
        if not (alive := self.store / f"{number}.alive").exists():
            os.link(path, alive)  # or the number would be another's once the file is removed
        shutil.copyfile(path, self.store / str(number))

    def rebuild(self, target: Path, dice: random.Random, mixed: bool) -> None:
        """Writes to `target` what a cut leaves.

        Args:
            target: a new folder.
            dice: decides what else survives.
            mixed: whether something else does.
        """
        if self.root.is_dir():
            self._folder(self.root.stat().st_ino, self.root, target, dice, mixed)

    def _folder(self, number: int, now: Path | None, target: Path, dice: random.Random, mixed: bool) -> None:
        target.mkdir()
        names = self._names(number)
        entries: Entries = json.loads(names.read_text()) if names.is_file() else {}
        if now is not None and mixed and dice.random() < 0.5:
            entries = entries_of(now)
        for name, entry in entries.items():
            if isinstance(entry, str):
                (target / name).symlink_to(entry)
                continue
            same = now is not None and os.path.lexists(now / name) and (now / name).lstat().st_ino == entry
            current = now / name if now is not None and same else None
            if self._names(entry).is_file() or (current is not None and current.is_dir()):
                self._folder(entry, current, target / name, dice, mixed)
            else:
                (target / name).write_bytes(self._contents(entry, current, dice, mixed))

    def _names(self, number: int) -> Path:
        return self.store / f"{number}.names"

    def _contents(self, number: int, now: Path | None, dice: random.Random, mixed: bool) -> bytes:
        kept = self.store / str(number)
        durable = kept.read_bytes() if kept.is_file() else b""
        if now is None or not mixed or dice.random() < 0.5:
            return durable
        current = now.read_bytes()
        return current if dice.random() < 0.5 else durable + bytes(max(0, len(current) - len(durable)))


def entries_of(folder: Path) -> Entries:
    """The names in a folder as they are now."""
    return {
        entry.name: os.readlink(entry.path) if entry.is_symlink() else entry.inode() for entry in os.scandir(folder)
    }


def victim(name: str, nth: str, seed: str, *argv: str) -> int:
    """The command line, cut at the `nth` flush of its processes in their run folder; 0: never."""
    root = Path("runs", name).absolute()
    dice, flush = random.Random(int(seed)), os.fsync
    disk = Disk(root, Path(f"{name}.disk").absolute())

    def counted(number: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{number}"))
        if not path.is_relative_to(root):
            flush(number)
            return
        with disk.alone() as calls:
            flush(number)
            if calls == int(nth):  # in half of the cases just before it
                stop_others()
                if is_after := dice.random() < 0.5:
                    disk.flushed(path)
                disk.rebuild(root.with_name(f"{name}.after"), dice, mixed=dice.random() < 0.5 or is_after)
                os.killpg(0, signal.SIGKILL)
            disk.flushed(path)

    os.fsync = counted  # type: ignore[assignment]
    from sdsearch_lightning.__main__ import main as command_line

    return command_line(argv)


def stop_others() -> None:
    """Hold all other processes of this group: a cut is one moment, and they write on while the folder is rebuilt."""
    others = [
        int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and int(path.name) != os.getpid()
    ]
    for number in others:
        with suppress(OSError):  # one that ended meanwhile
            if os.getpgid(number) == os.getpgrp():
                os.kill(number, signal.SIGSTOP)
                while (Path("/proc") / str(number) / "stat").read_text().rpartition(")")[2].split()[0] not in "TZ":
                    time.sleep(0.01)


def start(arena: Arena, name: str, nth: int, seed: int) -> tuple[bool, str, int]:
    """Runs a command under a `Disk`: whether it came to its end, what it said on both outputs, and its flushes."""
    command = ["-m", "benchmarks.power_cut", "--victim", name, str(nth), str(seed), *arena.fit, "--run.name", name]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path.cwd())}
    process = subprocess.Popen(
        [sys.executable, *command], cwd=arena.path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        told, _ = process.communicate(timeout=arena.limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise SystemExit(f"{' '.join(command)} hangs: no end in {arena.limit:.0f} s") from None
    if nth and process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"the run to be cut ended by itself, with exit code {process.returncode}: {told[-600:]}")
    calls = arena.path / f"{name}.disk" / "calls"
    flushes = calls.stat().st_size if calls.is_file() else 0
    shutil.rmtree(calls.parent)
    if (after := arena.path / "runs" / f"{name}.after").is_dir():
        shutil.rmtree(arena.path / "runs" / name)
        after.rename(arena.path / "runs" / name)
    return process.returncode == 0, told, flushes


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one line per run and a verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--strategy", choices=["ddp", "fsdp2"])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds after which a run hangs")
    options = parser.parse_args(argv)
    dice, equal, told_lost = random.Random(options.seed), 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        arena = Arena(Path(temporary), options.strategy, limit=options.limit)
        arena.prepare()
        done, told, flushes = start(arena, "counted", 0, 0)
        assert done, told
        print(f"a run flushes {flushes} times, {options.strategy or 'one process'}", flush=True)
        for number in range(1, options.runs + 1):
            name, nth = f"cut{number}", dice.randint(1, flushes)
            start(arena, name, nth, dice.randrange(1 << 30))
            done, told, _ = start(arena, name, 0, 0)
            left = contents(arena.path / "runs" / name) if done else {}
            different = differences(left, arena.whole) if done else [f"did not go on: {told[-300:]}"]
            if "file names" in different:
                different += sorted({*left["file names"]} ^ {*arena.whole["file names"]})
            warnings = [line for line in told.splitlines() if line.startswith(("warning: ", "error: "))]
            equal, told_lost = equal + (not different), told_lost + bool(warnings)
            verdict = f"DIFFERENT: {', '.join(different)}" if different else "equal"
            print(f"run {number:3}  cut at flush {nth:3}  {verdict}", *warnings, sep="\n    ", flush=True)
    print(f"{equal} of {options.runs} equal the run that was never cut; {told_lost} said that something was lost")
    return 0 if equal == options.runs else 1


if __name__ == "__main__":
    end_process(victim(*sys.argv[2:5], *sys.argv[5:]) if "--victim" in sys.argv[1:2] else main())
