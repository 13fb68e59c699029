"""Damages a checkpoint at random places and counts what a run that goes on would make of it, and what checksums cost.

    python -m benchmarks.damaged_checkpoints                     # 400 flipped bits, 60 zeroed pages; both kinds

The checkpoint is that of a small model with the state of AdamW, as a file and as a folder of shards; the one before it
is intact. "lost" would be a run that ends or goes on from damaged bytes. The cost is that of a file of --megabytes.
Exit code 1 tells that some damage was not found.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from sdsearch_lightning.checkpoints.reading import open_checkpoint
from sdsearch_lightning.checkpoints.seals import check_seal, seal
from sdsearch_lightning.checkpoints.writing import PlainFiles
from sdsearch_lightning.runs.folder import RunFolder

PAGE = 4096


def state(width: int) -> dict[str, Any]:
    """Weights and the state of an optimizer, in pieces as a model has them; 12 * width^2 floats."""
    torch.manual_seed(0)
    names = [f"policy.model.layers.{i}.weight" for i in range(4)]
    moments = {i: {key: torch.randn(width, width) for key in ("exp_avg", "exp_avg_sq")} for i in range(4)}
    return {"state_dict": {name: torch.randn(width, width) for name in names}, "optimizer_states": [{"state": moments}]}


def write_file(path: Path, step: int, width: int = 64) -> None:
    """A sealed checkpoint of one process."""
    PlainFiles().save_checkpoint({"global_step": step, **state(width)}, path)
    seal(path)


def write_folder(path: Path, step: int) -> None:
    """A sealed checkpoint of shards."""
    values = state(64)
    dcp.save(  # type: ignore[attr-defined]
        {"state_dict": values["state_dict"], "optimizer_0": values["optimizer_states"][0]},
        checkpoint_id=path,
        no_dist=True,
    )
    torch.save({"global_step": step}, path / "meta.pt")
    for file in path.iterdir():
        seal(file)


def flip_bit(contents: bytearray, dice: random.Random) -> None:
    """Turn one bit at a random place over, as a failing disk does."""
    contents[dice.randrange(len(contents))] ^= 1 << dice.randrange(8)


def zero_page(contents: bytearray, dice: random.Random) -> None:
    """One page that the disk lost."""
    start = dice.randrange(0, len(contents), PAGE)
    contents[start : start + PAGE] = bytes(len(contents[start : start + PAGE]))


def outcome(folder: RunFolder) -> str:
    """What a run that goes on makes of the folder."""
    with contextlib.redirect_stderr(io.StringIO()) as told:
        try:
            point = folder.resume_point()
        except Exception as error:  # whatever it is, it would end the run
            return f"lost: {type(error).__name__}"
    if point is None or point[1] == 4:
        return "lost: believed"
    return "found, the one before taken" if len(told.getvalue().splitlines()) == 1 else "found, not in one line"


def damage(
    folder: RunFolder, change: Callable[[bytearray, random.Random], None], times: int, seed: int
) -> Counter[str]:
    """Counts of the outcomes, each of one damage."""
    dice, found = random.Random(seed), Counter[str]()
    path = folder.checkpoints / "step_00000004.ckpt"
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for _ in range(times):
        file = dice.choices(files, [file.stat().st_size for file in files])[0]
        whole = file.read_bytes()
        changed = bytearray(whole)
        while changed == whole:
            change(changed, dice)
        file.write_bytes(changed)
        found[outcome(folder)] += 1
        file.write_bytes(whole)
    return found


def cost(folder: Path, megabytes: int) -> str:
    """Seconds of writing a checkpoint, of its checksum, and of checking it."""
    path, clock = folder / "large.ckpt", [time.perf_counter()]
    values = {"global_step": 1, **state(int((megabytes * 1e6 / 48) ** 0.5))}
    clock[0] = time.perf_counter()
    PlainFiles().save_checkpoint(values, path)
    clock.append(time.perf_counter())
    seal(path)
    clock.append(time.perf_counter())
    check_seal(path)
    clock.append(time.perf_counter())
    written, sealed, checked = (later - earlier for earlier, later in zip(clock, clock[1:], strict=False))
    size = path.stat().st_size
    return (
        f"{size / 1e6:.0f} MB: written in {written:.2f} s, its checksum {sealed:.2f} s ({sealed / written:.0%} of "
        f"that, {size / sealed / 1e9:.1f} GB/s), checked in {checked:.2f} s"
    )


def main() -> int:
    """Prints a line per kind of checkpoint and damage, and the cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=400)
    parser.add_argument("--pages", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--megabytes", type=int, default=500, help="of the checkpoint that is timed")
    options = parser.parse_args()
    lost = 0
    with tempfile.TemporaryDirectory() as temporary:
        for kind, write in (("file", write_file), ("folder", write_folder)):
            folder = RunFolder(Path(temporary) / kind)
            for step in (2, 4):
                write(folder.checkpoints / f"step_{step:08d}.ckpt", step)
            folder.last_checkpoint.symlink_to("step_00000004.ckpt")
            assert open_checkpoint(folder.last_checkpoint).is_sealed
            for what, change, times in (("bits", flip_bit, options.bits), ("pages", zero_page, options.pages)):
                found = damage(folder, change, times, options.seed)
                lost += times - found["found, the one before taken"]
                print(f"{kind:6}  {times} {what:5}  {dict(found)}", flush=True)
        print(cost(Path(temporary), options.megabytes))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
