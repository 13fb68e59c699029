"""Cuts the power of runs at random moments, starts them again, and compares with a run that was never cut.

    python -m benchmarks.power_cut --runs 20

The run is that of kill_and_resume.py, in one process. What a disk promises is kept beside it: contents of a file as
they were when it was flushed (fsync), names in a folder as they were when that was. At a random flush the folder is
rebuilt from that alone, or with a part of what was not flushed yet, or with zeros in its place, as a journal without
data leaves them; then the process is killed. The same command has to go on to the end and leave the same, bit for bit;
what it says is lost is counted. Exit code 1 tells that some run differed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.kill_and_resume import LIMIT, Arena, contents, differences

Entries = dict[str, "int | str"]
"""Names in a folder: the inode of a file or a folder, or where a link points to."""


class Disk:
    """What is on the disk of a run folder, whatever its files look like.

    Args:
        root: the run folder; what is in it now is on the disk.
        store: where contents are kept.
    """

    def __init__(self, root: Path, store: Path) -> None:
        self.root, self.store = root, store
        self.folders: dict[int, Entries] = {}
        store.mkdir()
        for path in [root, *root.rglob("*")] if root.is_dir() else []:
            if not path.is_symlink():
                self.flushed(path)

    def flushed(self, path: Path) -> None:
        """Keeps a file or the names in a folder as they are now."""
        number = path.stat().st_ino
        if path.is_dir():
            self.folders[number] = entries_of(path)
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
        entries = self.folders.get(number, {})
        if now is not None and mixed and dice.random() < 0.5:
            entries = entries_of(now)
        for name, entry in entries.items():
            if isinstance(entry, str):
                (target / name).symlink_to(entry)
                continue
            same = now is not None and os.path.lexists(now / name) and (now / name).lstat().st_ino == entry
            current = now / name if now is not None and same else None
            if entry in self.folders or (current is not None and current.is_dir()):
                self._folder(entry, current, target / name, dice, mixed)
            else:
                (target / name).write_bytes(self._contents(entry, current, dice, mixed))

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
    """The command line, cut at the `nth` flush in its run folder; 0: never, and the flushes are counted."""
    root = Path("runs", name).absolute()
    dice, calls, flush = random.Random(int(seed)), 0, os.fsync
    with tempfile.TemporaryDirectory(dir=".") as store:  # on the same file system, for links
        disk = Disk(root, Path(store) / "disk")

        def counted(number: int) -> None:
            nonlocal calls
            path = Path(os.readlink(f"/proc/self/fd/{number}"))
            flush(number)
            if not path.is_relative_to(root):
                return
            calls += 1
            if calls == int(nth):  # in half of the cases just before it
                if is_after := dice.random() < 0.5:
                    disk.flushed(path)
                disk.rebuild(root.with_name(f"{name}.after"), dice, mixed=dice.random() < 0.5 or is_after)
                os.kill(os.getpid(), signal.SIGKILL)
            disk.flushed(path)

        os.fsync = counted
        from sdsearch_lightning.__main__ import main as command_line

        code = command_line(argv)
        os.fsync = flush
    Path("flushes").write_text(str(calls))
    return code


def start(arena: Arena, name: str, nth: int, seed: int) -> tuple[bool, str]:
    """Runs a command under a `Disk`: whether it came to its end, and what it said on standard error and output."""
    command = ["-m", "benchmarks.power_cut", "--victim", name, str(nth), str(seed), *arena.fit, "--run.name", name]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path.cwd())}
    process = subprocess.run(
        [sys.executable, *command], cwd=arena.path, env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    if (after := arena.path / "runs" / f"{name}.after").is_dir():
        shutil.rmtree(arena.path / "runs" / name)
        after.rename(arena.path / "runs" / name)
    return process.returncode == 0, process.stdout + process.stderr


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one line per run and a verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args(argv)
    dice, equal, told_lost = random.Random(options.seed), 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        arena = Arena(Path(temporary), None)
        arena.prepare()
        assert start(arena, "counted", 0, 0)[0]
        flushes = int((arena.path / "flushes").read_text())
        print(f"a run flushes {flushes} times", flush=True)
        for number in range(1, options.runs + 1):
            name, nth = f"cut{number}", dice.randint(1, flushes)
            start(arena, name, nth, dice.randrange(1 << 30))
            done, told = start(arena, name, 0, 0)
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
    sys.exit(victim(*sys.argv[2:5], *sys.argv[5:]) if "--victim" in sys.argv[1:2] else main())
