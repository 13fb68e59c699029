"""Models and tokenizers: loaded from a folder, or made of nothing but a config and a vocabulary."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from transformers import PreTrainedModel

from helpers.models import tiny_model
from helpers.tokenizers import WORDS, byte_tokenizer, word_tokenizer
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.policy import loading as models
from sdsearch_lightning.policy.loading import ScratchModel, from_scratch, word_level_tokenizer

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def make(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    return from_scratch(ScratchModel("llama", SMALL | options), word_tokenizer(), dtype, seed)


def same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# Loading


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = byte_tokenizer()
    tiny_model(tokenizer=tokenizer).bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_come_in_the_dtype_asked_for(folder: Path, dtype: torch.dtype) -> None:
    """transformers alone would keep the checkpoint's bfloat16."""
    model, tokenizer = models.load(str(folder), dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert tokenizer.is_fast and tokenizer.encode("<search>") == byte_tokenizer().encode("<search>")


def test_a_home_folder_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert models.load(f"~/{folder.name}", torch.float32)[0].config.model_type == "llama"


@pytest.mark.parametrize("name", ["runs/quickstart_cold_start/model", "./nowhere", "~/no/where", "a/b/c"])
def test_a_missing_folder_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"there is no folder '{name}'. If it is the result of a cold start, run"):
        models.load(name, torch.float32)


@pytest.mark.parametrize(
    "missing, told",
    [
        ("*", "found no config.json in"),
        ("config.json", "found no config.json in"),
        ("*.safetensors", r"found no weights \(model.safetensors\) in"),
        ("tokenizer*", r"found no tokenizer \(tokenizer.json\) in"),
    ],
)
def test_a_folder_that_lacks_a_part_is_refused_by_its_name(
    folder: Path, tmp_path: Path, missing: str, told: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for path in list(copy.glob(missing)):
        path.unlink()
    with pytest.raises(ConfigError, match=rf"{told} '{copy}'\. Name a folder") as caught:
        models.load(str(copy), torch.float32)
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_that_cannot_be_read_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=rf"model_name_or_path: cannot load '{copy}': ") as caught:
        models.load(str(copy), torch.float32)
    assert len(str(caught.value).splitlines()) == 1 and "no such folder" not in str(caught.value)


def test_a_hub_name_that_cannot_be_reached_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="model_name_or_path: cannot load 'nobody/nothing': "):
        models.load("nobody/nothing", torch.float32)


# GGUF


def gguf_header(architecture: str) -> bytes:
    """A file without tensors: version 3, and one value, the architecture."""
    texts = [len(text).to_bytes(8, "little") + text.encode() for text in ("general.architecture", architecture)]
    return struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + texts[0] + struct.pack("<I", 8) + texts[1]


def test_which_file_a_path_means(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    assert models.gguf_file(str(tmp_path)) == models.gguf_file(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"
    assert models.gguf_file(str(tmp_path / "b.gguf")) is None and models.gguf_file("nobody/nothing") is None
    (tmp_path / "b.gguf").touch()
    assert models.gguf_file(str(tmp_path)) is None, "two: it has to be said which"
    (tmp_path / "b.gguf").rename(tmp_path / "config.json")
    assert models.gguf_file(str(tmp_path)) is None, "a model of transformers that has a GGUF beside it"


def test_without_its_package_a_gguf_file_is_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    (tmp_path / "model.gguf").write_bytes(gguf_header("nobody"))
    for path in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(
            ConfigError, match=r"cannot load .*model\.gguf: .* Install it: pip install gguf\."
        ) as caught:
            models.load(str(path), torch.float32)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no model", b"GGUF" + bytes(60), gguf_header("llama")[:-3]])
def test_a_broken_gguf_file_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("gguf", reason="comes with the extra `real`")
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model_name_or_path: cannot load .*model\.gguf: ") as caught:
        models.load(str(tmp_path), torch.float32)
    assert len(str(caught.value).splitlines()) == 1 and "pip install" not in str(caught.value)


# From scratch


def test_equal_arguments_give_equal_weights() -> None:
    torch.manual_seed(1)
    one = make()
    after = torch.rand(())
    torch.manual_seed(1)
    assert torch.equal(torch.rand(()), after)  # the caller's random numbers are untouched
    assert same(one, make()) and not same(one, make(seed=1))


@pytest.mark.parametrize(("wanted", "std"), [(None, 64**-0.5), (0.5, 0.5)])
def test_the_embedding_has_its_own_scale(wanted: float | None, std: float) -> None:
    spec = ScratchModel("llama", SMALL | {"hidden_size": 64}, wanted)
    weight = from_scratch(spec, word_tokenizer(), torch.float32, 0).get_input_embeddings().weight
    assert weight.std().item() == pytest.approx(std, rel=0.1)


def test_the_tokenizer_gives_size_and_special_ids() -> None:
    model, tokenizer = make(dtype=torch.float64), word_tokenizer()
    assert model.dtype == torch.float64
    assert model.config.vocab_size == len(tokenizer) == model.get_output_embeddings().weight.shape[0]
    assert (model.config.pad_token_id, model.config.eos_token_id) == (1, 2)
    assert model.config.bos_token_id is None


def test_a_scratch_model_comes_back_from_its_folder(tmp_path: Path) -> None:
    model, tokenizer = make(), word_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = models.load(str(tmp_path), torch.float32)
    assert same(model, loaded)
    text = "<search> capital of France </search>"
    assert loaded_tokenizer.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ScratchModel("lama", SMALL), r"model.scratch: .*lama"),
        (ScratchModel("llama", {"vocab_size": 3}), r"model.scratch: .*vocab_size"),
        (
            ScratchModel("llama", SMALL | {"hidden_size": 15}),
            r"model.scratch: The hidden size \(15\) is not a multiple",
        ),
        (ScratchModel("llama", SMALL | {"hidden_size": "16"}), r"model.scratch: .*'hidden_size' expected int, got str"),
    ],
)
def test_an_impossible_model_is_refused(spec: ScratchModel, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_scratch(spec, word_tokenizer(), torch.float32, 0)


def test_a_type_that_brings_its_own_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'qwen2': transformers ties this type to Qwen2Tokenizer, .*\. Use llama\."):
        from_scratch(ScratchModel("qwen2", SMALL), word_tokenizer(), torch.float32, 0)


# The word-level tokenizer


def test_words_and_tags_are_one_token_each() -> None:
    tokenizer = word_level_tokenizer([*WORDS, "Paris", "<search>"], ["<search>", "</search>"])
    assert tokenizer.convert_ids_to_tokens(range(6)) == ["<unk>", "<pad>", "<eos>", "<search>", "</search>", WORDS[0]]
    assert len(tokenizer) == 5 + len(dict.fromkeys(WORDS))
    assert tokenizer.tokenize("<search> capital of  Mars\n</search>") == [
        "<search>",
        "capital",
        "of",
        "<unk>",
        "</search>",
    ]
    assert (tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.decode(tokenizer.encode("<search> a ? </search>")) == "<search> a ? </search>"
