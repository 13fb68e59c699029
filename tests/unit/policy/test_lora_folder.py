"""What a folder of an adapter has to be, and fingerprints of the base it was trained on."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.lora import (
    adapted,
    move_adapter,
)
from helpers.models import tiny_model
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.policy.lora import LoRA
from sdsearch_lightning.policy.lora_folder import CONFIG, ORIGIN, WEIGHTS, fingerprint

pytest.importorskip("peft")


def test_without_peft_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdsearch_lightning.policy.lora_folder.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^model.lora needs peft.*pip install 'sdsearch-lightning\[lora\]'$"):
        adapted()


# Folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    move_adapter(adapted()).save_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def going_on(folder: Path, model: Any = None, **options: Any) -> SDSearchModule:
    return adapted(model, LoRA(adapter=str(folder), **options))


def test_an_adapter_of_another_base_is_refused(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)was trained on another base, scratch llama \(fingerprint \w{16}\)"
    ) as e:
        going_on(folder, tiny_model(seed=1))
    assert len(str(e.value).splitlines()) == 2


def test_without_a_fingerprint_another_name_is_doubted(folder: Path) -> None:
    (folder / ORIGIN).unlink()
    going_on(folder)  # neither name nor fingerprint: it fits, and that is all that can be known
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "Qwen/Qwen3-4B"}))
    with pytest.warns(UserWarning, match="was trained on Qwen/Qwen3-4B, and the model here is scratch llama"):
        going_on(folder)


@pytest.mark.parametrize("lacking", [CONFIG, WEIGHTS])
def test_an_unfinished_folder_is_refused(folder: Path, lacking: str) -> None:
    (folder / lacking).unlink()
    with pytest.raises(ConfigError, match=f"expected a folder of a peft adapter, found no {lacking} in"):
        going_on(folder)


def test_torn_and_foreign_weights_are_refused(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / ORIGIN).unlink()
    (folder / WEIGHTS).write_bytes(whole[:500])
    with pytest.raises(ConfigError, match="the weights in .* do not fit the model"):
        going_on(folder)
    (folder / WEIGHTS).write_bytes(whole)
    with pytest.raises(ConfigError, match=r"do not fit the model: size mismatch for .*lora_A"):
        going_on(folder, tiny_model(hidden_size=32))
    with pytest.raises(ConfigError, match=r"has, beyond the model's, .*layers\.1.*Is it an adapter of another model\?"):
        going_on(folder, tiny_model(num_hidden_layers=1))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"use_dora": True}, "found one with use_dora True"),
        ({"bias": "all"}, "found one with bias all"),
        ({"peft_type": "IA3"}, "found one with peft_type"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(folder: Path, change: dict[str, Any], told: str) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=told), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unexpected keyword arguments")
        going_on(folder)


def test_an_adapters_own_numbers_hold_and_others_are_refused(folder: Path) -> None:
    assert going_on(folder).policy.model.peft_config["default"].r == 4
    assert going_on(folder, r=4).policy.model.peft_config["default"].r == 4
    with pytest.raises(ConfigError, match=r"model.lora.r: the adapter in .* has 4, found 8. Leave it out"):
        going_on(folder, r=8)


# Fingerprints


def test_a_fingerprint_tells_models_apart_and_not_their_dtype(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    mine = fingerprint(model)
    assert mine == fingerprint(model.float()) == fingerprint(model.double())
    assert mine != fingerprint(tiny_model(dtype=torch.bfloat16, seed=1))
    assert mine != fingerprint(
        tiny_model(dtype=torch.bfloat16, num_attention_heads=4, num_key_value_heads=1, head_dim=8)
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.01)
    assert mine != fingerprint(model)
