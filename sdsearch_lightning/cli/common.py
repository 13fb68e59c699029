"""What commands with a trainer and commands without one share: their keys without secrets, and a line of progress."""

from __future__ import annotations

from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only

from sdsearch_lightning.trust.secrets import without_secrets


def shared_config(parser: LightningArgumentParser, options: Any) -> dict[str, Any]:
    """All keys of a command, without secrets: what a run writes down and is known by."""
    config: dict[str, Any] = without_secrets(yaml.safe_load(parser.dump(options, skip_unset=False)))
    return config


@rank_zero_only
def say(line: str) -> None:
    """Prints one line of progress."""
    print(line, flush=True)
