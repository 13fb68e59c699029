"""The run folder `runs/<name>/`: what lies where, and what a run that finds one does: start, resume or report.

Invariant: a folder belongs to one configuration and one seed. It is resumed or reported, never silently redone, mixed
with another run or overwritten.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch.utilities import rank_zero_only

from sdsearch_lightning.checkpoints.reading import open_checkpoint
from sdsearch_lightning.errors import ConfigError, DataError
from sdsearch_lightning.files import remove, written_whole
from sdsearch_lightning.report.example import harmless
from sdsearch_lightning.runs.names import CONFIG, WRITTEN, check_name
from sdsearch_lightning.trust.secrets import names_secret, without_secrets

IGNORED = ("run.", "config", "ckpt_path", "weights_only", "trainer.enable_progress_bar", "trainer.enable_model_summary",
           "trainer.logger", "trainer.profiler", "trainer.log_every_n_steps",
           "trainer.devices", "trainer.num_nodes", "trainer.strategy",
           "data.init_args.batch_size", "data.init_args.eval_batch_size")  # fmt: skip
"""Keys that may change while a run is under way: they do not change what it computes.

So may the number of processes: data.batch_size times it is what a step holds, and `TrainingBatches` checks that.
"""


@dataclass
class RunOptions:
    """Where a run keeps its files.

    Args:
        name: name of the run; its folder is `<root>/<name>`, which lies in no other run's.
        root: folder that holds all runs.
        overwrite: discard the run that is in the folder, instead of resuming or reporting it.
        checkpoint_every: steps between two checkpoints. A killed run loses at most this many steps; Ctrl-C and SIGTERM
            lose none.
        checkpoint_keep: the newest so many checkpoints stay. With one, a run whose checkpoint a disk has damaged has
            none to go on from.
        checkpoint_keep_every: checkpoints of steps that are a multiple of this stay too; null: none of them.
        num_threads: threads of PyTorch's CPU operations; null leaves its default. With one, a small model runs fastest
            and its results do not depend on the number of cores. auto: one per core that is free at the start, which
            pays from some ten million parameters on; another number changes the last bits of a sum.
    """

    name: str = "default"
    root: str = "runs"
    overwrite: bool = False
    checkpoint_every: int = 10
    checkpoint_keep: int = 2
    checkpoint_keep_every: int | None = None
    num_threads: int | Literal["auto"] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.num_threads, int) and self.num_threads < 1:
            raise ConfigError(f"run.num_threads: expected 1 or more, or auto, got {self.num_threads}.")
        if self.checkpoint_every < 1:
            raise ConfigError(f"run.checkpoint_every: expected 1 or more steps, got {self.checkpoint_every}.")
        if self.checkpoint_keep < 1:
            raise ConfigError(f"run.checkpoint_keep: expected 1 or more checkpoints, got {self.checkpoint_keep}.")
        if self.checkpoint_keep_every is not None and (
            self.checkpoint_keep_every < 1 or self.checkpoint_keep_every % self.checkpoint_every
        ):
            raise ConfigError(
                f"run.checkpoint_keep_every: expected a multiple of run.checkpoint_every ({self.checkpoint_every}) or "
                f"null, got {self.checkpoint_keep_every}; other steps have no checkpoint."
            )
        check_name(self.root, self.name)

    def outdated(self, checkpoints: Sequence[Path]) -> list[Path]:
        """Which of these `step_<n>.ckpt`, oldest first, do not stay."""
        every = self.checkpoint_keep_every
        return [path for path in checkpoints[: -self.checkpoint_keep] if every is None or _step(path) % every]


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run and the questions asked of them."""

    path: Path

    @property
    def config(self) -> Path:
        """The configuration that started the run."""
        return self.path / CONFIG

    @property
    def metrics(self) -> Path:
        """One row per logged step."""
        return self.path / "metrics.csv"

    @property
    def checkpoints(self) -> Path:
        """step_<n>.ckpt and the link last.ckpt."""
        return self.path / "checkpoints"

    @property
    def last_checkpoint(self) -> Path:
        """The newest checkpoint whose step is wholly written."""
        return self.checkpoints / "last.ckpt"

    @property
    def model(self) -> Path:
        """The trained weights and tokenizer as a Hugging Face folder."""
        return self.path / "model"

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end; summary.json is the last thing it needs."""
        return (self.path / "summary.json").is_file()

    @property
    def published_step(self) -> int | None:
        """The step that last.ckpt stands at; None where no step was published."""
        if not self.last_checkpoint.is_symlink():
            return None
        return _step(self.last_checkpoint.readlink())

    @property
    def way_on(self) -> str:
        """What a run that ends here is told to do."""
        step = self.published_step
        where = "starts anew: no checkpoint was saved yet" if step is None else f"goes on after step {step}"
        return f"Run the same command again: it {where}."

    @property
    def _has_checkpoint(self) -> bool:
        return self.last_checkpoint.is_symlink() or self.last_checkpoint.exists()

    def check_owner(self, config: Mapping[str, Any]) -> None:
        """Raises ConfigError if the folder holds a started run of another configuration than `config`."""
        if not self.is_finished and not self._has_checkpoint:
            return
        if not self.config.is_file():
            raise ConfigError(f"{self.path} holds a run without its config.yaml.\n{_WAY_OUT}")
        try:
            saved = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())[:120]
            raise DataError(f"{self.config}: expected the configuration of the run ({reason}).\n{_WAY_OUT}") from error
        found, wanted = _flatten(without_secrets(saved)), _flatten(without_secrets(config))
        keys = [k for k in found | wanted if found.get(k) != wanted.get(k) and not k.startswith(IGNORED)]
        keys = [key for key in keys if not names_secret(key)]  # another token, or from elsewhere: the same run
        if keys:
            more = f" (and {len(keys) - 3} more)" if len(keys) > 3 else ""
            told = "; ".join(f"{key} is {found.get(key)!r} there, {wanted.get(key)!r} now" for key in keys[:3])
            raise ConfigError(f"{self.path} holds a run with another configuration: {told}{more}.\n{_WAY_OUT}")

    def resume_point(self) -> tuple[Path, int] | None:
        """The checkpoint to go on from and its step; None where there is none. A damaged file is passed over.

        Raises:
            DataError: there are checkpoints and none can be read.
        """
        if not self._has_checkpoint:
            return None
        candidates = sorted(self.checkpoints.glob("step_*.ckpt"), reverse=True)
        if self.last_checkpoint.is_symlink():  # files of later steps were never published
            newest = self.last_checkpoint.readlink().name
            candidates = [path for path in candidates if path.name <= newest]
        else:
            candidates = [self.last_checkpoint, *candidates]
        for path in candidates:
            try:
                stored = open_checkpoint(path)
            except DataError as error:
                warn(f"{path} is damaged and passed over: {error}")
                continue
            if stored.note:
                warn(stored.note)
            return path, stored.step
        raise DataError(f"none of the {len(candidates)} checkpoints in {self.checkpoints} can be read.\n{_WAY_OUT}")

    def replace_model(self, save: Callable[[Path], None]) -> None:
        """Has `save` write the model folder; a folder half written is never left under its name."""
        with written_whole(self.model) as draft:
            save(draft)

    @rank_zero_only
    def clear(self) -> None:
        """Removes what a run writes, and nothing else that a user may keep there."""
        for name in WRITTEN:
            remove(self.path / name)
        for path in [*self.path.glob("trajectories*.jsonl*"), *self.path.glob(".trajectories*.draft")]:
            remove(path)

    @rank_zero_only
    def clear_after(self, step: int, options: RunOptions) -> None:
        """Removes checkpoints of steps after `step`: they were never completed, and the run will reach them again.

        So it does with those that do not stay, and with drafts, which a kill or a power cut may have left.
        """
        paths = sorted(self.checkpoints.glob("step_*.ckpt"))
        done = [path for path in paths if _step(path) <= step]
        for path in [*paths[len(done) :], *options.outdated(done)]:
            remove(path)
        for draft in [*self.checkpoints.glob(".*.draft"), *self.path.glob(".trajectories*.draft")]:
            remove(draft)


_WAY_OUT = "Choose another folder with --run.name NAME, or discard that run with --run.overwrite true."


def _step(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("step_"))


def _flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; a list is one value."""
    if not isinstance(config, Mapping) or not config:
        return {prefix: config}
    items = (_flatten(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in config.items())
    return {key: value for item in items for key, value in item.items()}


@rank_zero_only
def warn(line: str) -> None:
    """Prints a warning of one line, once for all ranks."""
    print(f"warning: {harmless(line)}", file=sys.stderr)
