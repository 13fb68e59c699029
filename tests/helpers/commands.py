"""What the command line makes of arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import yaml

from helpers.paths import ROOT
from sdsearch_lightning.cli import commands


def parsed(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The configuration of a command, which is not run."""
    monkeypatch.chdir(ROOT)
    assert commands.run([*arguments, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)
