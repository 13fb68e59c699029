"""What a run may be called: a folder of its own below `run.root`, and in no other run's folder."""

from __future__ import annotations

from pathlib import Path

from sdsearch_lightning.errors import ConfigError

CONFIG = "config.yaml"
WRITTEN = (CONFIG, "metrics.csv", "summary.json", "report.html", "checkpoints", "model")
"""Names of what a run writes into its folder, beside its trajectories."""
_LONGEST = 200
"""Bytes of a part: file systems take 255, and drafts have longer names."""


def check_name(root: str, name: str) -> None:
    """Raise ConfigError unless `name` is one folder name per part, such as `mine` or `comparison/grpo-seed3`."""
    parts = name.split("/")
    if wrong := [part for part in parts if not _is_folder_name(part)]:
        raise ConfigError(
            f"run.name: expected a folder below run.root, such as mine or comparison/mine, found {name[:99]!r}, with "
            f"{wrong[0][:50]!r} in it. Use letters, digits, - and _."
        )
    if theirs := [part for part in parts[1:] if part in WRITTEN]:
        raise ConfigError(f"run.name: found {name!r}, but {theirs[0]} is what a run writes. Choose another name.")
    for above in [Path(root, *parts[:count]) for count in range(len(parts))]:
        if (above / CONFIG).is_file():
            raise ConfigError(f"run.name: found {name!r}, which lies in the run {above}. Choose another name.")


def _is_folder_name(part: str) -> bool:
    fits = 0 < len(part.encode(errors="replace")) <= _LONGEST and part == part.strip()
    return fits and part.isprintable() and not part.startswith((".", "~")) and "\\" not in part
