"""Which checkpoint a command goes on from, and what is told where it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from sdsearch_lightning.callbacks.run_start import check_optimizers
from sdsearch_lightning.checkpoints.reading import StoredCheckpoint, named_checkpoint
from sdsearch_lightning.cli.common import say
from sdsearch_lightning.errors import ConfigError, SDSearchError
from sdsearch_lightning.runs.folder import RunFolder, warn


def find_checkpoint(command: str, options: Any, folder: RunFolder, is_evaluation: bool) -> StoredCheckpoint | None:
    """The checkpoint of `ckpt_path`; `last` becomes a path, or nothing in training, which resumes anyway.

    Raises:
        ConfigError: there is none, or it is damaged or something else.
    """
    path, last = options.ckpt_path, folder.last_checkpoint
    if path == "last":
        if not last.exists():
            raise ConfigError(
                f"ckpt_path: expected the last checkpoint of a run, found none at {last}. Leave --ckpt_path out to "
                "take the weights of model:, or name another run with --run.name."
            )
        path = options.ckpt_path = str(last) if is_evaluation else None
    if path is None and is_evaluation and last.exists():
        say(f"{command} takes the initial weights of model:; --ckpt_path last takes those of this run")
    if path in (None, "best"):
        return None
    stored = named_checkpoint(Path(path))
    if stored.note:
        warn(stored.note)
    return stored


@contextmanager
def explaining_loads(trainer: pl.Trainer, path: str | None) -> Iterator[None]:
    """Around a command: torch's error about optimizer states that do not fit becomes one for the user.

    Raises:
        ConfigError: on all ranks, as all load the same.
    """
    try:
        yield
    except (ValueError, LookupError) as error:
        is_loading = trainer.state.fn == TrainerFn.FITTING and trainer.optimizers and not trainer.training
        if path in (None, "best") or not is_loading or isinstance(error, SDSearchError):
            raise
        check_optimizers(named_checkpoint(Path(str(path))), trainer)
        raise ConfigError(f"ckpt_path: the optimizers in {path} are not those of model: {error}") from error
