"""What commands with a trainer and commands without one share: one seed for everything, and a line of progress."""

from __future__ import annotations

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only


def link_seed(parser: LightningArgumentParser) -> None:
    """One seed for everything: `seed_everything` reaches the data module and the module."""
    parser.link_arguments("seed_everything", "data.init_args.seed", int)
    parser.link_arguments("seed_everything", "model.seed", int)


@rank_zero_only
def say(line: str) -> None:
    """Prints one line of progress."""
    print(line, flush=True)
