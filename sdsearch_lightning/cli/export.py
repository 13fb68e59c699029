"""`export`: a checkpoint becomes a Hugging Face folder that other programs load.

The run's config.yaml tells what the weights belong to: the module is built from it, without a trainer, and takes the
weights of its policy. Copies that only training needs are not made.

Invariant: under the name that was asked for there is a whole folder or none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sdsearch_lightning.checkpoints.reading import named_checkpoint
from sdsearch_lightning.cli.common import say
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.files import written_whole
from sdsearch_lightning.inference.building import build_module, restore
from sdsearch_lightning.report.summary import read_summary
from sdsearch_lightning.runs.eval_results import evaluations_of
from sdsearch_lightning.runs.folder import RunFolder, warn
from sdsearch_lightning.runs.hub import check_name, push
from sdsearch_lightning.runs.model_card import Training, write_card


def export(options: Any) -> None:
    """Writes what `export_parser` was told to.

    Raises:
        ConfigError: there is no such checkpoint or no configuration beside it, or the output is there already.
    """
    path, output = Path(options.ckpt_path), Path(options.output)
    if options.push_to_hub is not None:
        check_name(options.push_to_hub)
    if output.exists() or output.is_symlink():
        raise ConfigError(f"output: {output} exists already; name a new folder.")
    checkpoint, run = named_checkpoint(path), _run_of(path)
    if checkpoint.note:
        warn(checkpoint.note)
    config = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    module = build_module(config)
    restore(module, checkpoint)

    def write(folder: Path) -> None:
        (module.save_adapter if options.adapter else module.save_pretrained)(folder)
        found = evaluations_of(run.path, checkpoint.step)
        write_card(folder, Training(config, checkpoint.step, read_summary(run.path), found))

    with written_whole(output) as draft:
        write(draft)
    what = "an adapter of peft" if options.adapter else "a Hugging Face folder"
    say(f"step {checkpoint.facts['global_step']} of {path} is now {what}: {output}")
    if options.push_to_hub is not None:
        say(f"pushed to {push(output, options.push_to_hub)}")


def _run_of(path: Path) -> RunFolder:
    """The run that a checkpoint belongs to: that of its place, or of the place that it is a link to."""
    runs = [RunFolder(place.parent.parent) for place in (path.absolute(), path.resolve())]
    found = next((run for run in runs if run.config.is_file()), None)
    if found is None:
        raise ConfigError(
            f"ckpt_path: expected the run's configuration at {runs[0].config}, found none.\n"
            "Leave checkpoints in their run folder: config.yaml tells what they belong to."
        )
    return found
