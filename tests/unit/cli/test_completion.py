"""The script of `sdsearch completion`, sourced by a real bash."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from sdsearch_lightning.__main__ import main
from sdsearch_lightning.cli.completion import completion_script, keys_of
from sdsearch_lightning.errors import ConfigError

HELP = """usage: sdsearch fit [--config FILE ...]

options:
  -h, --help            show this help message and exit
  -c CONFIG, --config CONFIG
                        a YAML file; see --not_this in a text
  --rollout.group_size GROUP_SIZE
                        rollouts per question
  --rollout.top_k TOP_K
"""


def told(command: Sequence[str]) -> None:
    print(HELP)
    raise SystemExit(0)


def test_keys_are_those_that_a_help_lists() -> None:
    assert keys_of("fit", told) == ["config", "rollout.group_size", "rollout.top_k"]
    assert {"ckpt_path", "output", "adapter"} <= set(keys_of("export", main))


@pytest.mark.parametrize(
    ("words", "proposed"),
    [
        (["fit", "--rollout."], {"--rollout.group_size", "--rollout.top_k"}),
        (["exp"], {"export"}),
        (["fit", "--config", "mi"], {"mine.yaml"}),
        (["fit", "--rollout.top_k", "mi"], set()),
    ],
)
def test_bash_proposes_commands_keys_and_files(tmp_path: Path, words: list[str], proposed: set[str]) -> None:
    pytest.importorskip("shtab", reason="extra `completion`")
    (tmp_path / "script").write_text(completion_script("bash", told))
    (tmp_path / "mine.yaml").touch()
    line = f"COMP_WORDS=(sdsearch {' '.join(words)}); COMP_CWORD={len(words)}"
    shell = (
        f'source ./script; {line}; _shtab_sdsearch sdsearch "${{COMP_WORDS[-1]}}"; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert set(done.stdout.split()) == proposed, done.stderr


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_get_a_script(shell: str) -> None:
    pytest.importorskip("shtab", reason="extra `completion`")
    assert "rollout.group_size" in completion_script(shell, told)


def test_what_cannot_be_done_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="expected bash, zsh, tcsh, found 'fish'"):
        completion_script("fish", told)
    monkeypatch.setattr("sdsearch_lightning.cli.completion.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'sdsearch_lightning\[completion\]'"):
        completion_script("bash", told)
