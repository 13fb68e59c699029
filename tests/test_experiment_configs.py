"""Every file of configs/experiment is understood on top of the quick start, and an ablation changes one thing."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.paths import ROOT
from sdsearch_lightning.cli.training import METHOD
from sdsearch_lightning.datamodules import SearchDataModule, SyntheticWorldDataModule
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.runs.folder import RunOptions

CONFIGS = ROOT / "configs"
ABLATIONS = sorted((CONFIGS / "experiment/ablation").glob("*.yaml"))
PRESETS = sorted((CONFIGS / "experiment/preset").glob("*.yaml"))
GROUPS = dict(zip(("rollout", "hindsight", "jsd", "credit"), METHOD, strict=True))
CHANGES = {
    "block": "hindsight.block",
    "groups": "hindsight.groups",
    "divergence": "model.divergence",
    "support": "model.divergence",
    "positions": "model.positions",
    "teacher": "model.teacher",
    "label": "rollout.label",
    "schedule": "jsd.schedule",
}
"""What the first word of an ablation's name says."""


@cache
def parser() -> LightningArgumentParser:
    made = LightningArgumentParser()
    made.add_argument("--config", action="config")
    made.add_argument("--seed_everything", type=int)
    made.add_class_arguments(RunOptions, "run")
    made.add_lightning_class_args(SDSearchModule, "model")
    made.add_lightning_class_args(SearchDataModule, "data", subclass_mode=True)
    made.add_lightning_class_args(pl.Trainer, "trainer")
    for name, callback in GROUPS.items():
        made.add_lightning_class_args(callback, name)
    return made


@cache
def parsed(*files: Path) -> Any:
    return parser().parse_args([f"--config={path}" for path in (CONFIGS / "quickstart.yaml", *files)])


def changes(before: Any, after: Any, name: str = "") -> Iterator[str]:
    """Options whose values differ, a plug-in as one."""
    for key in {*before, *after}:
        pair = before.get(key), after.get(key)
        if all(isinstance(value, dict) and "class_path" not in value for value in pair):
            yield from changes(*pair, f"{name}{key}.")
        elif pair[0] != pair[1]:
            yield f"{name}{key}"


def stem(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", ABLATIONS, ids=stem)
def test_an_ablation_changes_one_thing(path: Path) -> None:
    found = set(changes(parsed().as_dict(), parsed(path).as_dict())) - {"config"}
    expected = {"run.name", CHANGES[path.stem.split("_")[0]]}
    assert found == (expected if path.stem != "groups_mixed" else {"run.name"}), "the quick start has mixed groups"


@pytest.mark.parametrize("path", [*ABLATIONS, *PRESETS], ids=stem)
def test_a_run_has_the_name_of_its_file_and_its_parts_can_be_made(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ") and yaml.safe_load(text)["run"] == {"name": path.stem}
    options = parsed(path).clone()
    options.data = options.trainer = None  # not what these files are about
    made = parser().instantiate(options)
    assert isinstance(made.model, SDSearchModule)
    assert all(isinstance(made[name], callback) for name, callback in GROUPS.items())


@pytest.mark.parametrize("path", PRESETS, ids=stem)
def test_a_preset_says_where_it_comes_from_and_what_is_missing(path: Path) -> None:
    text = path.read_text()
    assert ("arXiv:" in text or path.stem == "best") and "Not reproduced" in text or path.stem == "sharpening_control"


def test_a_peer_comes_with_its_own_reward() -> None:
    """A protocol alone would train on the reward of another."""
    by_name = {path.stem: parsed(path) for path in PRESETS}
    rewards = {name: by_name[name].rollout.reward.class_path.rpartition(".")[2] for name in ("search_r1", "autorefine")}
    assert rewards == {"search_r1": "ExactMatchReward", "autorefine": "AutoRefineReward"}
    for name in rewards:
        model = by_name[name].model
        assert model.protocol == name and model.old_logprobs == "trainer" and by_name[name].jsd.weight == 0
        assert set(vars(model.entropy_coef).values()) == {0.001}


@pytest.mark.parametrize("name", ["dense", "sparse", "long", "large"])
def test_the_data_module_of_a_world_can_be_made(name: str, tmp_path: Path) -> None:
    world = CONFIGS / f"experiment/world/{name}.yaml"
    files = (world, world.with_name("long_rollout.yaml")) if name == "long" else (world,)
    before, after = parsed(), parsed(*files)
    found = set(changes(before.as_dict(), after.as_dict())) - {"config", "data"}
    assert found == ({"rollout.top_k", "rollout.max_searches"} if name == "long" else set())
    options = after.data.init_args
    assert options.demonstration_top_k == after.rollout.top_k
    assert options.demonstration_max_searches == after.rollout.max_searches
    assert options.batch_size == before.data.init_args.batch_size, "what the quick start says stays"
    data = SyntheticWorldDataModule(**options.as_dict() | {"cache_dir": str(tmp_path), "num_train_questions": 64})
    hops = {question.source for question in data.questions("train")}
    expected = {"dense": (1, 2, 3), "sparse": (3,), "long": (2, 3, 4, 5), "large": (1, 2, 3)}[name]
    assert hops == {f"{n}-hop" for n in expected}
    if name == "dense":
        assert options == before.data.init_args


def test_the_large_world_comes_with_a_model_and_its_training() -> None:
    large, model, fit = (CONFIGS / f"experiment/world/large{part}.yaml" for part in ("", "_model", "_fit"))
    found = set(changes(parsed(large).as_dict(), parsed(large, fit).as_dict())) - {"config"}
    expected = {"run.num_threads", "model.optimizer", "model.max_micro_batch_tokens", "rollout.group_size"}
    assert found == expected
    options = yaml.safe_load((CONFIGS / "quickstart_cold_start.yaml").read_text())["model"]["scratch"]["options"]
    options |= yaml.safe_load(model.read_text())["model"]["scratch"]["options"]
    data = SyntheticWorldDataModule(**parsed(large).data.init_args.as_dict())
    with torch.device("meta"):
        made = LlamaForCausalLM(LlamaConfig(**options, vocab_size=len(data.vocabulary())))
    assert 19e6 < made.num_parameters() < 21e6


def test_no_two_files_say_the_same() -> None:
    assert (len(ABLATIONS), len(PRESETS)) == (30, 16)
    options = [parsed(path).as_dict() for path in (*ABLATIONS, *PRESETS)]
    assert len({str([row[group] for group in ("model", *GROUPS)]) for row in options}) == len(options)


@pytest.mark.parametrize("name", ["grpo", "best", "gpu"])
def test_real_facts_with_each_overlay(name: str) -> None:
    base = parser().parse_args([f"--config={CONFIGS / 'real_facts.yaml'}"])
    both = parser().parse_args(
        [f"--config={CONFIGS / file}" for file in ("real_facts.yaml", f"real_facts_{name}.yaml")]
    )
    assert set(changes(base.as_dict(), both.as_dict())) >= {"trainer.precision" if name == "gpu" else "jsd.weight"}
    assert both.data.init_args.retriever.class_path == base.data.init_args.retriever.class_path
