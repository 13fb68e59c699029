"""What commands with a trainer and commands without one share: one seed for everything, and a line of progress."""

from __future__ import annotations

import inspect

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only


def link_seed(parser: LightningArgumentParser, module_class: type) -> None:
    """One seed for everything: `seed_everything` reaches each class that takes a seed."""
    parser.link_arguments("seed_everything", "data.init_args.seed", int)
    if "seed" in inspect.signature(module_class).parameters:
        parser.link_arguments("seed_everything", "model.seed", int)


@rank_zero_only
def say(line: str) -> None:
    """Prints one line of progress."""
    print(line, flush=True)
