"""Where models and tokenizers come from: a Hugging Face folder or name, or nothing but a config and a vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from sdsearch_lightning.errors import ConfigError, reading_foreign

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAFE: dict[str, Any] = {"trust_remote_code": False}
"""For whatever transformers loads: left out, it may ask the user instead of refusing a folder's own code."""
SPECIAL_TOKENS = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>"}


def load(name_or_path: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and fast tokenizer of a Hugging Face folder or hub name; no remote code is ever run.

    Raises:
        ConfigError: no such folder, not a model folder, or a hub name that cannot be reached.
    """
    from transformers import AutoModelForCausalLM

    if (file := gguf_file(name_or_path)) is not None:
        return load_gguf(file, dtype)
    # transformers would load bfloat16 checkpoints as bfloat16, in which small updates are lost.
    options = {"dtype": dtype, "use_safetensors": True, **SAFE}  # the older weights are pickles
    return _load(name_or_path, lambda folder: AutoModelForCausalLM.from_pretrained(folder, **options))


def gguf_file(name_or_path: str) -> Path | None:
    """The GGUF file that a path means: itself, or the one in a folder without config.json; None where it means none."""
    path = Path(name_or_path).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return path
    found = sorted(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").is_file() else []
    return found[0] if len(found) == 1 else None


def load_gguf(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a GGUF file, with plain weights: quantized ones are expanded, and can then be saved.

    Raises:
        ConfigError: the package `gguf` is not installed, or the file cannot be read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    told = f"model.model_name_or_path: cannot load {file}"
    if find_spec("gguf") is None:
        raise ConfigError(f"{told}: the package gguf is not installed. Install it: pip install gguf.")
    with reading_foreign(told):
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype, **SAFE)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, **SAFE)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers would refuse to save what it has just expanded
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **SAFE)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model, tokenizer


def load_skeleton(name_or_path: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The same without weights: its parameters are on the meta device, and cost no memory."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    def make(folder: str) -> PreTrainedModel:
        config = AutoConfig.from_pretrained(folder, **SAFE)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **SAFE)
        with suppress(OSError):  # which tokens end a turn has to be the same on all ranks
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model  # type: ignore[no-any-return]

    return _load(name_or_path, make, has_weights=False)


def _load(
    name_or_path: str, make: Callable[[str], PreTrainedModel], has_weights: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoTokenizer

    looks_local = name_or_path.startswith((".", "/", "~", "runs/")) or name_or_path.count("/") > 1
    folder = str(Path(name_or_path).expanduser()) if looks_local else name_or_path
    if looks_local and not Path(folder).is_dir():
        raise ConfigError(
            f"model.model_name_or_path: there is no folder {name_or_path!r}. If it is the result of a cold start, run "
            "`python -m sdsearch_lightning supervise` first."
        )
    if (Path(folder) / "adapter_config.json").is_file():  # transformers would load the model that this file names
        raise ConfigError(
            f"model.model_name_or_path: expected a model, found an adapter_config.json in {name_or_path!r}. Name the "
            "adapter's base there, and the adapter as model.lora.adapter."
        )
    advice = "" if looks_local else "There is no such folder, and no such name at hand: name a folder."
    if Path(folder).is_dir():
        check_model_folder(Path(folder), has_weights)
        advice = ""
    with reading_foreign(f"model.model_name_or_path: cannot load {name_or_path!r}", advice=advice):
        return make(folder), AutoTokenizer.from_pretrained(folder, **SAFE)


def check_model_folder(folder: Path, has_weights: bool = True) -> None:
    """Say which part of a Hugging Face folder is missing, which transformers tells at length or not at all.

    Raises:
        ConfigError: there is no config, no weights or no tokenizer.
    """
    wanted = {
        "config.json": ("config.json",),
        "weights (model.safetensors)": ("*.safetensors", "*.safetensors.index.json") if has_weights else ("*",),
        "tokenizer (tokenizer.json)": ("tokenizer*", "vocab.*", "*.model", "tekken.json"),
    }
    for what, patterns in wanted.items():
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            raise ConfigError(
                f"model.model_name_or_path: expected a Hugging Face folder, found no {what} in {str(folder)!r}. Name a "
                "folder that `save_pretrained` of model and tokenizer, or `sdsearch export`, wrote."
            )


@dataclass
class ScratchModel:
    """A causal LM with random weights, for worlds small enough to learn from nothing."""

    model_type: str = "llama"
    """Kind of causal LM, by its name in transformers; any that leaves the tokenizer alone."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the config class of that kind; vocab_size comes from the tokenizer."""
    embedding_std: float | None = None
    """Standard deviation of the input embeddings; null: 1 / sqrt(hidden_size), at which small models learn fastest."""


def from_scratch(
    spec: ScratchModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, seed: int
) -> PreTrainedModel:
    """A causal LM with random weights; equal arguments, equal weights, whatever was drawn before.

    Args:
        spec: what to make.
        tokenizer: gives vocabulary size and special ids.
        dtype: of the weights.
        seed: of the weights.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.for_model(
            spec.model_type,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            **spec.options,
        )
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = error.__cause__ or error  # config classes wrap what is wrong
        raise ConfigError(f"model.scratch: {str(reason).splitlines()[0]}") from error
    # A config class keeps whatever it is given: a misspelled option would quietly leave its default.
    if unknown := [name for name in spec.options if not hasattr(type(config)(), name)]:
        raise ConfigError(f"model.scratch.options: {spec.model_type!r} has no option {', '.join(unknown)}.")
    _check_reload(config, tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **SAFE)
        embedding = model.get_input_embeddings().weight
        torch.nn.init.normal_(embedding, std=spec.embedding_std or embedding.shape[1] ** -0.5)
    return model  # type: ignore[no-any-return]


def disable_dropout(model: PreTrainedModel) -> None:
    """Turn dropout off for good: with it, the policy that trains would not be the policy that sampled."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        # Attention layers hold their rate as a number of their own, read from the config when they were made.
        for name in [name for name, rate in vars(module).items() if "dropout" in name and isinstance(rate, float)]:
            setattr(module, name, 0.0)
    for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)


def _check_reload(config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model type for which AutoTokenizer would load another tokenizer than the one that was saved."""
    from transformers import AutoTokenizer

    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        loaded = AutoTokenizer.from_pretrained(folder, **SAFE)
    sample = tokenizer.convert_ids_to_tokens(range(min(len(tokenizer), 16)))
    if loaded.encode(" ".join(sample)) != tokenizer.encode(" ".join(sample)):
        raise ConfigError(
            f"model.scratch.model_type {config.model_type!r}: transformers ties this type to {type(loaded).__name__}, "
            "which cannot read a word-level tokenizer. Use llama."
        )


def word_level_tokenizer(words: Sequence[str], tags: Sequence[str]) -> PreTrainedTokenizerBase:
    """A tokenizer whose tokens are whole words, split at white space; every tag is one token.

    Args:
        words: the vocabulary, in order.
        tags: the protocol's.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = list(dict.fromkeys([*SPECIAL_TOKENS.values(), *tags, *words]))
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    # Whitespace, but not at every punctuation mark: a tag is one word.
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS)


def first_difference(found: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size]) -> str | None:
    """The first weight in which a checkpoint differs from a model by name or shape, in words; None where none does.

    Args:
        found: shapes of the checkpoint's weights, by name.
        wanted: of the model's.
    """
    for name, shape in wanted.items():
        if name not in found:
            return f"it has no {name}"
        if tuple(found[name]) != tuple(shape):
            return f"{name} is {list(found[name])} there and {list(shape)} here"
    return next((f"{name} is in it and not in the model" for name in found if name not in wanted), None)
