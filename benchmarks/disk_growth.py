"""What a run has written: bytes of a step, of a token, what packing leaves of them, and the size of its checkpoints.

python -m benchmarks.disk_growth runs/quickstart
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from sdsearch_lightning.report.segments import numbered_lines

SAMPLE = 64 * 2**20
"""Bytes that are packed, at most: as much as a segment."""


def lines_of(folder: Path) -> Iterator[bytes]:
    """All lines of all ranks."""
    for path in sorted(folder.glob("trajectories*.jsonl")):
        yield from (line for line, _ in numbered_lines(path))


def measure(folder: Path) -> dict[str, float]:
    """Figures of a run folder.

    Raises:
        SystemExit: it holds no training rollouts.
    """
    steps: set[int] = set()
    size = num_tokens = num_rollouts = 0
    sample = bytearray()
    for line in lines_of(folder):
        record = json.loads(line)
        if record["phase"] != "train":
            continue
        steps.add(record["step"])
        size, num_rollouts = size + len(line), num_rollouts + 1
        num_tokens += sum(len(span["token_ids"]) for span in record["spans"])
        if len(sample) < SAMPLE:
            sample += line
    if not steps:
        raise SystemExit(f"{folder}: expected training rollouts, found none. Name the folder of a run, runs/<name>.")
    checkpoints = [path for path in (folder / "checkpoints").glob("step_*.ckpt")]
    each = sum(p.stat().st_size for path in checkpoints for p in [path, *path.rglob("*")] if p.is_file())
    return {
        "training steps": len(steps),
        "rollouts per step": num_rollouts / len(steps),
        "tokens per rollout": num_tokens / num_rollouts,
        "bytes per step": size / len(steps),
        "bytes per token": size / num_tokens,
        "packed / bytes": len(gzip.compress(bytes(sample), 3)) / len(sample),
        "bytes per checkpoint": each / max(1, len(checkpoints)),
    }


def main() -> int:
    """Prints the figures of a run folder, a line each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.disk_growth", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="runs/<name>")
    for name, figure in measure(parser.parse_args().folder).items():
        print(f"{name:22} {figure:.6g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
