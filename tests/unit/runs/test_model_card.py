"""The card says what the run's files say, and neither more nor where they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from sdsearch_lightning.runs.model_card import CARD, SETTINGS, Training, without_machine_paths, write_card

SUMMARY: dict[str, Any] = {
    "exact_match": {"before": 0.25, "after": 0.5},
    "f1": {"before": None, "after": 0.625},
    "searches_per_question": {"before": 1.5, "after": 2.0},
    "questions": 128,
    "seed": 3,
    "decoding": {"greedy": True, "max_searches": 4},
    "versions": {"torch": "2.13.0"},
    "sd": {"steps": 40},
}


def config(**model: Any) -> dict[str, Any]:
    return {
        "seed_everything": 3,
        "ckpt_path": "/home/somebody/runs/x.ckpt",
        "config": ["/home/somebody/mine.yaml"],
        "run": {"name": "wiki", "root": "runs"},
        "data": {
            "class_path": "sdsearch_lightning.datamodules.SearchDataModule",
            "init_args": {
                "train_files": {
                    "nq": 1.0,
                    "owner/multi-hop": 2.0,
                    "/home/somebody/own.jsonl": 1.0,
                    "data/more.jsonl": 1.0,
                },
                "hub": "RUC-NLPIR/FlashRAG_datasets",
                "batch_size": 256,
                "retriever": {
                    "class_path": "sdsearch_lightning.retrieval.DenseRetriever",
                    "init_args": {"corpus_path": "/data/wiki/corpus.jsonl"},
                },
            },
        },
        "model": {
            "model_name_or_path": "Qwen/Qwen3-4B",
            "protocol": "autorefine",
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-6}},
            "kl_coef": 0.001,
            "lora": None,
            **model,
        },
        "rollout": {"group_size": 5, "max_searches": 4},
        "jsd": {"weight": 0.001, "warmup_steps": 50},
    }


def card(folder: Path, training: Training) -> tuple[Any, str]:
    """Its metadata, and all of its text."""
    write_card(folder, training)
    text = (folder / CARD).read_text()
    return ModelCard(text).data, text


def test_the_front_matter_names_what_is_on_the_hub(tmp_path: Path) -> None:
    data, _ = card(tmp_path, Training(config(), 40, SUMMARY))
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert (data.base_model, data.base_model_relation) == ("Qwen/Qwen3-4B", "finetune")
    assert data.datasets == ["RUC-NLPIR/FlashRAG_datasets", "owner/multi-hop"]
    assert {"sd-search", "grpo"} <= set(data.tags)


@pytest.mark.parametrize("name", ["./models/base", "/models/base", "runs/cold/model", "~/base", "a/b/c", None])
def test_a_base_on_this_machine_is_no_base_on_the_hub(tmp_path: Path, name: str | None) -> None:
    data, _ = card(tmp_path, Training(config(model_name_or_path=name), 40))
    assert data.base_model is None


def test_a_base_is_found_through_the_card_of_the_model_before(tmp_path: Path) -> None:
    cold, run = tmp_path / "cold", tmp_path / "run"
    cold.mkdir()
    run.mkdir()
    card(cold, Training({key: value for key, value in config().items() if key != "rollout"}, 24))
    data, text = card(run, Training(config(model_name_or_path=str(cold)), 40))
    assert data.base_model == "Qwen/Qwen3-4B"
    assert "| initial model | cold |" in text and "sft" in ModelCard((cold / CARD).read_text()).data.tags


def test_the_text_holds_settings_scores_versions_and_a_way_to_load_it(tmp_path: Path) -> None:
    _, text = card(tmp_path, Training(config(), 40, SUMMARY))
    for line in (
        "# wiki",
        "| steps | 40 |",
        "| training data | SearchDataModule: nq, owner/multi-hop, own.jsonl, data/more.jsonl |",
        "| retriever | DenseRetriever |",
        "| optimizer | AdamW, learning rate 1e-06 |",
        "| JSD weight | 0.001, after 50 steps |",
        "On 128 held-out questions, greedy decoding, at most 4 searches, seed 3; before is the initial model.",
        "| exact match | 0.250 | 0.500 |",
        "| F1 |  | 0.625 |",
        "torch 2.13.0",
        'model = AutoModelForCausalLM.from_pretrained("PATH_OR_NAME")',
        "sdsearch predict --config sdsearch_config.yaml --model.model_name_or_path PATH_OR_NAME",
    ):
        assert line in text.splitlines(), line


def test_scores_are_those_of_these_weights_or_none(tmp_path: Path) -> None:
    assert "## Scores" not in card(tmp_path, Training(config(), 40))[1]
    earlier = card(tmp_path, Training(config(), 20, SUMMARY))[1]
    assert "the run was evaluated after step 40, these weights are of step 20" in earlier
    assert "0.500" not in earlier
    unmeasured = SUMMARY | {"exact_match": {"before": None, "after": None}}
    assert "## Scores" not in card(tmp_path, Training(config(), 40, unmeasured))[1]


def test_an_adapter_and_a_merged_one_say_so(tmp_path: Path) -> None:
    lora = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "adapter": None}
    _, merged = card(tmp_path, Training(config(lora=lora), 40))
    assert "The LoRA adapter it learned is merged." in merged and "--model.lora null" in merged
    assert "| LoRA | r 8, lora_alpha 16, all-linear |" in merged.splitlines()
    (tmp_path / "adapter_config.json").write_text("{}")
    data, alone = card(tmp_path, Training(config(lora=lora), 40))
    assert (data.library_name, data.base_model_relation) == ("peft", "adapter")
    assert "from peft import AutoPeftModelForCausalLM" in alone and "--model.lora.adapter" in alone


def test_without_self_distillation_it_is_not_claimed(tmp_path: Path) -> None:
    plain = config() | {"jsd": {"weight": 0.0, "warmup_steps": 50}}
    assert "trained with GRPO to search" in card(tmp_path, Training(plain, 40))[1]


def test_no_path_of_this_machine_is_in_it_and_what_was_written_stays(tmp_path: Path) -> None:
    write_card(tmp_path, Training(config(model_name_or_path="/home/somebody/base"), 40, SUMMARY))
    for name in (CARD, SETTINGS):
        assert "somebody" not in (tmp_path / name).read_text() and "/data/wiki" not in (tmp_path / name).read_text()
    kept = yaml.safe_load((tmp_path / SETTINGS).read_text())
    assert kept["data"]["init_args"]["train_files"] == {
        "nq": 1.0,
        "owner/multi-hop": 2.0,
        "own.jsonl": 1.0,
        "data/more.jsonl": 1.0,
    }
    assert kept["data"]["init_args"]["retriever"]["init_args"]["corpus_path"] == "corpus.jsonl"
    assert kept["model"]["optimizer"] == config()["model"]["optimizer"] and "ckpt_path" not in kept


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("/srv/a/b.jsonl", "b.jsonl"),
        ("~/a/b", "b"),
        ("runs/cold/model", "runs/cold/model"),
        ("Answer: {question} / no path", "Answer: {question} / no path"),
        ("/ {question}", "/ {question}"),
        (3, 3),
        (None, None),
    ],
)
def test_only_absolute_paths_are_cut(written: Any, told: Any) -> None:
    assert without_machine_paths([written]) == [told]
