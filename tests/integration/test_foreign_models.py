"""A command that is given somebody else's model: one line, exit code 2, and nothing of it ran."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.traps import Trap
from helpers.workplace import COLD_START, Workplace


@pytest.mark.parametrize(
    "trap", [Trap.foreign_model, Trap.foreign_tokenizer, Trap.looping_template, Trap.pickled_model]
)
def test_a_command_tells_it_in_one_line(trap: Callable[[Trap], None], tmp_path: Path) -> None:
    place, trapped = Workplace(tmp_path), Trap(tmp_path / "theirs")
    trap(trapped)
    scratch = next(line for line in COLD_START.splitlines() if "options:" in line)
    (tmp_path / "cold.yaml").write_text(COLD_START.replace(f"  scratch:\n{scratch}", "  model_name_or_path: ./theirs"))
    done = place.sdsearch("supervise", "--config", "cold.yaml")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert done.stderr.startswith("error: ") and not trapped.marker.exists()
    assert not place.run("cold").exists(), "before anything was written"
