from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sdsearch_lightning.errors import DataError
from sdsearch_lightning.report.settings import Settings, differences, read_settings


def run(folder: Path, **config: object) -> Settings:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return read_settings(folder)


def test_main_settings_are_shown_as_one_would_type_them(tmp_path: Path) -> None:
    settings = run(
        tmp_path,
        rollout={"group_size": 5, "reward": {"class_path": "a.b.F1Reward", "init_args": {"x": 1, "y": None}}},
        data={"class_path": "a.World"},
        jsd={"weight": 0.3},
    )
    shown = [("data.class_path", "World"), ("rollout.group_size", "5"), ("rollout.reward", "F1Reward(x=1)")]
    assert settings.main == [*shown, ("jsd.weight", "0.3")]
    assert yaml.safe_load(settings.text)["jsd"] == {"weight": 0.3}


def test_secrets_stay_out(tmp_path: Path) -> None:
    settings = run(tmp_path, data={"init_args": {"token": "hush", "url": "https://me:hush@host/x"}})
    assert "hush" not in settings.text + str(settings.flat)


def test_a_run_without_a_configuration_has_no_settings(tmp_path: Path) -> None:
    assert read_settings(tmp_path) == Settings()


@pytest.mark.parametrize("text", ["a: [", "- a list", "\x00"])
def test_a_damaged_configuration_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(DataError, match="config.yaml: expected") as caught:
        read_settings(tmp_path)
    assert "\n" not in str(caught.value)


def test_runs_differ_where_their_values_do_and_their_names_do_not_count(tmp_path: Path) -> None:
    one = run(tmp_path / "a", run={"name": "a"}, jsd={"weight": 0.0, "warmup_steps": 4})
    two = run(tmp_path / "b", run={"name": "b"}, jsd={"weight": 0.3, "warmup_steps": 4}, credit=None)
    assert differences([one, two]) == [("jsd.weight", ["0.0", "0.3"]), ("credit", ["-", "null"])]
