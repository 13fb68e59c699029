"""What answers, found out from files: of a run, a model folder, an adapter; and what is refused before any import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.inference.origin import find_origin

REMOTE = {
    "class_path": "sdsearch_lightning.datamodules.SearchDataModule",
    "init_args": {"retriever": {"class_path": "RemoteRetriever", "init_args": {"url": "http://x"}}, "seed": 3},
}
CONFIG: dict[str, Any] = {
    "seed_everything": 3,
    "model": {"model_name_or_path": "base/model", "protocol": "search_r1", "kl_coef": 0.1, "lora": {"r": 4}},
    "data": REMOTE,
    "rollout": {"top_k": 2, "max_searches": 4, "reward": {"class_path": "mine.Reward"}},
    "run": {"num_threads": 1},
    "trainer": {"precision": "bf16-mixed"},
}


def write(folder: Path, name: str, config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """runs/mine, not yet with weights."""
    monkeypatch.chdir(tmp_path)
    return write(Path("runs/mine"), "config.yaml", CONFIG)


def test_a_run_gives_its_model_protocol_retriever_and_limits(run: Path) -> None:
    write(run / "model", "config.json", {})
    for name in ("mine", "runs/mine", str(run.absolute())):
        origin = find_origin(run=name)
        assert origin.config["model"] == {
            "model_name_or_path": str(Path(name if "/" in name else "runs/mine") / "model"),
            "protocol": "search_r1", "scratch": None, "lora": None,  # merged
        }  # fmt: skip
        assert origin.config["rollout"] == {"top_k": 2, "max_searches": 4}, "a reward is not needed"
        assert origin.config["data"]["init_args"] == {"retriever": REMOTE["init_args"]["retriever"]}
        assert (origin.checkpoint, origin.num_threads, origin.precision) == (None, 1, "bf16-mixed")


def test_an_unfinished_run_answers_with_its_last_checkpoint(run: Path) -> None:
    with pytest.raises(ConfigError, match="has no model yet: expected model/ or checkpoints/last.ckpt"):
        find_origin(run="mine")
    write(run / "checkpoints", "last.ckpt", {})
    origin = find_origin(run="mine")
    assert origin.checkpoint == run / "checkpoints/last.ckpt" and origin.config["model"]["lora"] == {"r": 4}
    assert find_origin(run="mine", ckpt_path="some.ckpt").checkpoint == Path("some.ckpt")


def test_files_are_added_and_the_later_one_wins(run: Path, tmp_path: Path) -> None:
    write(run / "model", "config.json", {})
    write(tmp_path, "a.yaml", {"rollout": {"top_k": 5}, "model": {"protocol": "autorefine"}})
    write(tmp_path, "b.yaml", {"rollout": {"top_k": 7}, "data": {"class_path": "other.Data", "init_args": {"x": 1}}})
    config = find_origin(run="mine", config=["a.yaml", "b.yaml"]).config
    assert config["rollout"] == {"top_k": 7, "max_searches": 4} and config["model"]["protocol"] == "autorefine"
    assert config["data"] == {"class_path": "other.Data", "init_args": {"x": 1}}, "another class, other options"
    assert config["model"]["model_name_or_path"] == "runs/mine/model", "a file does not change whose answers these are"


def test_plain_keys_of_a_file_are_those_of_the_runs_data(run: Path, tmp_path: Path) -> None:
    """As `fit` reads them: `data: {retriever: ...}` without a class."""
    write(run / "model", "config.json", {})
    other = {"class_path": "RemoteRetriever", "init_args": {"url": "http://y"}}
    write(tmp_path, "a.yaml", {"data": {"retriever": other}})
    data = find_origin(run="mine", config=["a.yaml"]).config["data"]
    assert data == {"class_path": REMOTE["class_path"], "init_args": {"retriever": other}}
    alone = find_origin(model="a/model", config=["a.yaml"]).config["data"]
    assert alone == data


def test_an_adapter_stands_on_its_base(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", "sdsearch_config.yaml", CONFIG)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "the/base"}))
    model = find_origin(model=str(folder), given=["data.retriever"]).config["model"]
    assert model["model_name_or_path"] == "the/base" and model["lora"] == {"adapter": str(folder)}
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="does not name its base"):
        find_origin(model=str(folder), given=["data.retriever"])
    trusted = find_origin(model=str(folder), config=[str(folder / "sdsearch_config.yaml")])
    assert trusted.config["model"]["model_name_or_path"] == "base/model"


WORLD = {"class_path": "SyntheticWorldDataModule", "init_args": {"num_entities": 30, "seed": 4, "cache_dir": "/etc"}}
EVIL = {"class_path": "os.system", "init_args": {"command": "true"}}


def test_of_a_foreign_folder_come_texts_and_numbers(tmp_path: Path) -> None:
    theirs = CONFIG | {"data": WORLD, "rollout": {"top_k": 2, "reward": EVIL, "max_tokens": EVIL}}
    config = find_origin(model=str(write(tmp_path / "m", "sdsearch_config.yaml", theirs))).config
    assert config["data"] == {
        "class_path": "sdsearch_lightning.datamodules.SyntheticWorldDataModule",
        "init_args": {"num_entities": 30},
    }
    assert config["rollout"] == {"top_k": 2} and config["model"]["protocol"] == "search_r1"
    assert config["seed_everything"] == 3


@pytest.mark.parametrize(
    "change",
    [
        {"data": REMOTE},  # an address: questions would go there, with whatever token it asks for
        {"data": {"class_path": "evil.Data"}},
        {"data": {"class_path": "SearchDataModule", "init_args": {"retriever": EVIL}}},
    ],
)
def test_a_foreign_folders_retriever_is_taken_once_the_file_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = write(tmp_path / "m", "sdsearch_config.yaml", CONFIG | change)
    with pytest.raises(
        ConfigError, match=r"no retriever is known.*--config .*sdsearch_config.yaml, if you trust"
    ) as told:
        find_origin(model=str(folder))
    assert len(str(told.value).splitlines()) == 1
    trusted = find_origin(model=str(folder), config=[str(folder / "sdsearch_config.yaml")])
    assert trusted.config["data"]["class_path"] == change["data"]["class_path"]


@pytest.mark.parametrize(
    "protocol",
    [EVIL, {"class_path": "sdsearch_lightning.protocol.Protocol", "init_args": {"block": [EVIL]}}, "../there.yaml"],
)
def test_a_foreign_protocol_brings_no_class_and_no_file(tmp_path: Path, protocol: Any) -> None:
    theirs = {"data": WORLD, "model": {"protocol": protocol}}
    folder = write(tmp_path / "m", "sdsearch_config.yaml", theirs)
    (tmp_path / "there.yaml").write_text("class_path: os.system\n")
    assert "protocol" not in find_origin(model=str(folder)).config["model"]


def test_usage_errors(run: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("model: [")
    (tmp_path / "list.yaml").write_text("- 1\n")
    for arguments, told in (
        ({}, "expected --run RUN .* found neither"),
        ({"run": "mine", "model": "x"}, "found both"),
        ({"run": "other"}, "found none at other. In runs/ are: mine."),
        ({"model": "./nowhere"}, "found nothing at ./nowhere"),
        ({"model": "gpt2"}, "no retriever is known"),
        ({"model": "gpt2", "ckpt_path": "last"}, "expected it beside --run"),
        ({"model": "gpt2", "config": ["none.yaml"]}, "there is no file none.yaml"),
        ({"model": "gpt2", "config": ["broken.yaml"]}, "expected YAML in broken.yaml"),
        ({"model": "gpt2", "config": ["list.yaml"]}, "expected keys such as data"),
    ):
        with pytest.raises(ConfigError, match=told) as error:
            find_origin(**arguments)  # type: ignore[arg-type]
        assert len(str(error.value).splitlines()) == 1
