"""A YAML file that is wrong as a file is told with its name and line, before anything is read from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdsearch_lightning.cli.config_files import check_config_files
from sdsearch_lightning.errors import ConfigError

WRONG = {
    "model: [": "line 1: this is no YAML",
    "model:\n  a: 1\n b: 2\n": "line 3: this is no YAML",
    "": "expected keys such as `trainer:`, found nothing in it",
    "# only a remark\n": "found nothing in it",
    "- a\n- b\n": "line 1: expected keys such as `trainer:`, found a sequence",
    "text": "line 1: expected keys such as `trainer:`, found a scalar",
    "trainer: {max_steps: 3}\nmodel: {}\ntrainer: {max_epochs: 2}\n": "line 3: the key 'trainer' stands in line 1",
    "model:\n  kl_coef: 1\n  lora: {r: 1}\n  kl_coef: 2\n": "line 4: the key 'kl_coef' stands in line 2",
    "trainer:\n  callbacks:\n  - {a: 1}\n  - b: 1\n    b: 2\n": "line 5: the key 'b' stands in line 4",
}


@pytest.mark.parametrize("text, told", WRONG.items())
@pytest.mark.parametrize("form", ["--config {}", "--config={}", "--config=nowhere.yaml --x 3 --config {}"])
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, text: str, told: str, form: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        check_config_files(["fit", *form.format(path).split()])
    message = str(refused.value)
    assert message.startswith(str(path)) and told in message and "\n" not in message


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="this is no YAML text"):
        check_config_files(["--config", str(path)])


def test_equal_keys_of_different_mappings_and_anchors_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("a: &x {lr: 1}\nb: {<<: *x, lr: 2}\nc: [{lr: 1}, {lr: 2}]\n")
    check_config_files(["--config", str(path), "--config"])
