"""An entry of `train_files`, `val_files` or `test_files` becomes files: it is one, a folder, a benchmark or a data set.

All of them end as files of this machine, so that only this module knows of the hub.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from sdsearch_lightning.errors import ConfigError, DataError

Files = str | list[str] | dict[str, float] | None
"""One entry, several, or several with their weights."""

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
BENCHMARKS = {
    "nq": "test",
    "triviaqa": "test",
    "popqa": "test",
    "hotpotqa": "dev",
    "2wikimultihopqa": "dev",
    "musique": "dev",
    "bamboogle": "test",
}
"""The seven of Search-R1's evaluation, and the split of each that it evaluates."""
SPLITS = {
    "train": ("train",),
    "val": ("validation", "dev", "val", "test"),
    "test": ("test", "dev", "validation", "val", "train"),
}
"""What a split may be called in a folder; the first that is there is read."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A data file on this machine, with the name of its source and its weight."""

    path: Path
    source: str | None = None
    """What rows without a `data_source` belong to; None leaves it to the file's name."""
    weight: float = 1.0
    is_benchmark: bool = False
    """Whether it has the benchmarks' own columns."""


def find_files(files: Files, split: str, hub: str) -> list[SourceFile]:
    """The files behind the entries of `data.<split>_files`, in order; what is on the hub is fetched.

    Args:
        files: what the option holds.
        split: "train", "val" or "test".
        hub: where benchmarks come from: a local folder, or a data set of the hub.

    Raises:
        ConfigError: a weight that is none, or an entry that is neither on this machine nor to be had from the hub.
        DataError: a folder without files of the split.
    """
    weights = check_weights(files, split)
    return [replace(file, weight=weight) for entry, weight in weights for file in _expand(entry, split, hub)]


def check_weights(files: Files, split: str) -> list[tuple[str, float]]:
    """Each entry with its weight, 1 where none is given.

    Raises:
        ConfigError: a weight that is no number above 0.
    """
    if not isinstance(files, dict):
        return [(entry, 1.0) for entry in ([files] if isinstance(files, str) else files or ())]
    for entry, weight in files.items():
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(
                f"data.{split}_files: expected a weight above 0 for {entry!r}, found {weight}. It is how often an "
                "epoch reads each row of the file; leave out a file that is not to be read."
            )
    return list(files.items())


def _expand(entry: str, split: str, hub: str) -> list[SourceFile]:
    path = Path(entry).expanduser()
    if entry in BENCHMARKS:
        return [SourceFile(file, entry, is_benchmark=True) for file in _benchmark_files(entry, split, hub)]
    if path.is_dir():
        return _folder_files(path, split, path.absolute().name)
    if entry.endswith(SUFFIXES) or not re.fullmatch(r"[\w.-]+/[\w.-]+", entry):
        return [SourceFile(path)]
    return _folder_files(_fetch(entry, split), split, entry.rpartition("/")[2])


def _benchmark_files(name: str, split: str, hub: str) -> list[Path]:
    wanted = "train" if split == "train" else BENCHMARKS[name]
    folder = Path(hub).expanduser()
    if folder.is_dir():
        if paths := _files_of_split(folder / name, wanted):
            return paths
        raise ConfigError(
            f"data.{split}_files: expected {name}/{wanted}.jsonl for {name!r} in data.hub, the folder {folder}, found "
            f"{_listing(folder / name)} in {name}/."
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    file = f"{name}/{wanted}.jsonl"
    try:
        return [Path(hf_hub_download(hub, file, repo_type="dataset"))]
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise ConfigError(_unreachable(f"data.{split}_files: {name!r}", f"{file} of data.hub, {hub}", error)) from error


def _fetch(entry: str, split: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    # All at once: taking one name after the other would make the result depend on what the cache holds.
    patterns = [f"{place}{word}{end}" for word in SPLITS[split] for place in ("", "*/") for end in (".*", "-*")]
    try:
        return Path(snapshot_download(entry, repo_type="dataset", allow_patterns=patterns))
    except (OSError, ValueError, EntryNotFoundError) as error:
        wanted = f"a data set of that name on the hub, with files of {' or '.join(SPLITS[split])}"
        raise ConfigError(_unreachable(f"data.{split}_files: {entry!r} is no path here", wanted, error)) from error


def _unreachable(option: str, wanted: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{option}: expected {wanted}, found none ({reason}). A local folder of that layout works too."


def _folder_files(folder: Path, split: str, source: str) -> list[SourceFile]:
    """The files of a split: those of the folder, of its folder `data`, or else of each data set in it."""
    if paths := _split_files(folder, split) or _split_files(folder / "data", split):
        return [SourceFile(path, source) for path in paths]
    inner = sorted(path for path in folder.iterdir() if path.is_dir())
    found = [SourceFile(path, part.name) for part in inner for path in _split_files(part, split)]
    if not found:
        raise DataError(
            f"{folder}: expected files of {' or '.join(SPLITS[split])} that end in one of {', '.join(SUFFIXES)}, in it "
            f"or in a folder of each data set, found {_listing(folder)}. data.{split}_files may name files too."
        )
    return found


def _split_files(folder: Path, split: str) -> list[Path]:
    return next((paths for word in SPLITS[split] if (paths := _files_of_split(folder, word))), [])


def _files_of_split(folder: Path, word: str) -> list[Path]:
    """`word.<suffix>`, or the shards `word-00000-of-00002[-<hash>].<suffix>` in order; none where there is neither."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for suffix in SUFFIXES:
        if (whole := folder / f"{word}{suffix}").is_file():
            return [whole]
        pattern = re.compile(rf"{word}-\d+-of-(\d+)(-[0-9a-f]+)?{re.escape(suffix)}")
        matches = [found for name in names if (found := pattern.fullmatch(name))]
        shards = [folder / found[0] for found in matches]
        if shards and len(shards) != (count := int(matches[0][1])):
            raise DataError(
                f"{folder}: expected {count} shards of {word}{suffix}, found {len(shards)}: "
                f"{', '.join(path.name for path in shards[:3])}, ... Copy the others too."
            )
        if shards:
            return shards
    return []


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
