"""From text to normalised vectors: any sentence-transformers model, with the prompts and pooling it was trained with.

What stands in front of a text is decided once, in this order: the option, the model's own configuration, the convention
of its family (which the configuration of many e5 and bge models does not state), nothing. The family is the option, or
is told by a name: the folder's, the repository's in the hub's cache, or the one that `config.json` remembers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sdsearch_lightning.errors import ConfigError, DataError, RetrievalError, reading_foreign
from sdsearch_lightning.retrieval.faiss_index import Vectors
from sdsearch_lightning.retrieval.index_folder import digest_folder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

STATIC = "static"
"""Name of the embedded encoder, which is made from the corpus (static_encoder.py)."""
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Convention:
    """How a family of encoders wants its texts."""

    query_prompt: str
    passage_prompt: str
    pooling: str
    """For a plain transformers folder, which does not say: "mean" or "cls"."""


CONVENTIONS = {
    "e5": Convention("query: ", "passage: ", "mean"),
    "bge": Convention("Represent this sentence for searching relevant passages: ", "", "cls"),
    "contriever": Convention("", "", "mean"),
    "gte": Convention("", "", "mean"),
}
NONE = Convention("", "", "mean")
Pooling = Literal["mean", "cls"]
_APART = {"m3", "instruct", "zh", "icl"}
"""Words of models that belong to a family and ask for something else."""


def convention_of(name: str) -> Convention:
    """The convention of a model by its names: `intfloat/e5-base-v2`, `my-e5`, a snapshot in the hub's cache.

    A name counts by its words, wherever they stand (a test for equality with "e5" would miss `e5-base-v2`). Models of a
    family that ask for something else (bge-m3, instruct models) say so in their own configuration, or get nothing.
    """
    for known in _names_of(name):
        words = set(re.split(r"[^a-z0-9]+", known.lower()))
        if words & _APART:
            return NONE
        for family, convention in CONVENTIONS.items():
            if family in words:
                return convention
    return NONE


def _names_of(name: str) -> list[str]:
    """What a model is called, nearest first: by its folder, by its repository in the hub's cache
    (`models--intfloat--e5-base-v2/snapshots/<hash>`), by its configuration.
    """
    path = Path(name)
    names = [path.name]
    if path.parent.name == "snapshots":
        names = [path.parent.parent.name.rpartition("--")[2]]
    try:
        told = json.loads((path / "config.json").read_text(encoding="utf-8")).get("_name_or_path", "")
    except (OSError, ValueError, AttributeError):
        return names  # no folder, or none with a readable config: loading it will tell
    return [*names, Path(told).name] if isinstance(told, str) and told else names


class TextEncoder:
    """Loads at its first use.

    Args:
        name: a sentence-transformers folder or hub name, or a plain transformers one.
        query_prompt: text put before every query; None: see the head of this file.
        passage_prompt: the same for passages.
        batch_size: texts per forward pass.
        device: where it runs; None: a GPU if there is one.
        dtype: of its weights: "float32", "bfloat16" or "float16". Vectors are float32 always.
        convention: a family of `CONVENTIONS`; None: the one that a name tells.
        pooling: of a plain transformers folder; None: by the convention.
        max_length: tokens of a text that are read; None: as many as the model can.
    """

    def __init__(
        self,
        name: str,
        query_prompt: str | None = None,
        passage_prompt: str | None = None,
        batch_size: int = 256,
        device: str | None = None,
        dtype: str = "float32",
        convention: str | None = None,
        pooling: Pooling | None = None,
        max_length: int | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}.")
        if batch_size < 1:
            raise ConfigError(f"batch_size: expected at least 1 text per forward pass, found {batch_size}.")
        if convention is not None and convention not in CONVENTIONS:
            raise ConfigError(f"convention: expected one of {', '.join(CONVENTIONS)}, found {convention!r}.")
        if max_length is not None and max_length < 1:
            raise ConfigError(f"max_length: expected at least 1 token of a text, found {max_length}.")
        self.name = name
        self.batch_size = batch_size
        self._prompts = {"query": query_prompt, "passage": passage_prompt}
        self._device, self._dtype = device, dtype
        self._family, self._pooling, self._max_length = convention, pooling, max_length

    @property
    def _convention(self) -> Convention:
        return CONVENTIONS[self._family] if self._family else convention_of(self.name)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that the vectors of passages depend on: content where there is a folder, the name where a hub keeps it.

        Nothing is loaded for it: where a prompt is left to the model, the model stands for it.
        """
        encoder = digest_folder(Path(self.name)) if self.is_folder else self.name
        prompt, family = self._prompts["passage"], self._convention
        convention = [family.passage_prompt if prompt is None else None, self._pooling or family.pooling]
        cut = {} if self._max_length is None else {"max_length": self._max_length}
        return {"encoder": encoder, "passage_prompt": prompt, "convention": convention, "dtype": self._dtype} | cut

    @property
    def is_folder(self) -> bool:
        """Whether it is read from a folder; one that is called "static" is not the embedded encoder."""
        return self.name != STATIC and Path(self.name).is_dir()

    @property
    def device(self) -> Any:
        """The torch device that the encoder runs on."""
        return self._model.device

    @property
    def dimension(self) -> int:
        """D, the length of the vectors."""
        return int(self._model.get_embedding_dimension() or len(self.encode_queries(["dimension"])[0]))

    def encode_queries(self, queries: Sequence[str]) -> Vectors:
        """[B, D] vectors of length 1.

        Raises:
            RetrievalError: a vector is not finite.
        """
        prompt = self._prompt("query", ("query",))
        texts = [query.encode(errors="replace").decode() for query in queries]  # a tokenizer refuses half a character
        vectors = _rows(self._model.encode_query(texts, prompt=prompt, **self._options))
        if not np.isfinite(vectors).all():
            raise RetrievalError(f"encoder {self.name!r} made a vector that is not finite. Try it with dtype float32.")
        return vectors

    def encode_passages(self, passages: Sequence[str]) -> Vectors:
        """[B, D] vectors of length 1.

        Raises:
            DataError: a vector is not finite.
        """
        # encode_document stops at "document", which the default configuration sets to "".
        prompt = self._prompt("passage", ("document", "passage", "corpus"))
        vectors = _rows(self._model.encode_document(list(passages), prompt=prompt, **self._options))
        if not np.isfinite(vectors).all():
            raise DataError(f"encoder {self.name!r} made vectors that are not finite. Try it with dtype float32.")
        return vectors

    @property
    def _options(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "normalize_embeddings": True, "show_progress_bar": False}

    def _prompt(self, side: str, keys: tuple[str, ...]) -> str:
        if (given := self._prompts[side]) is not None:
            return given
        own = next(filter(None, (self._model.prompts.get(key) for key in keys)), "")
        # A model that states one of the two means it: its other side wants none.
        if own or any(self._model.prompts.values()):
            return own
        return self._convention.query_prompt if side == "query" else self._convention.passage_prompt

    @cached_property
    def _model(self) -> SentenceTransformer:
        from sentence_transformers import SentenceTransformer

        # Weights in safetensors only: the older files are pickles. Code that a model brings along never runs.
        options = {"use_safetensors": True, "dtype": self._dtype}
        with reading_foreign(
            f"encoder: expected 'static', a sentence-transformers folder or a hub name, found {self.name!r}, "
            "which cannot be loaded"
        ):
            folder = _without_pickles(self.name)
            if _is_plain(folder):
                model = _pooled(str(folder), self._pooling or self._convention.pooling, self._device, options)
            else:
                _check_modules(folder)
                model = SentenceTransformer(
                    str(folder), device=self._device, model_kwargs=options, trust_remote_code=False
                )
                _check_pooling(model, self._pooling)
            if self._max_length is not None and hasattr(model[0], "auto_model"):  # a static one reads all of a text
                model.max_seq_length = min(self._max_length, model.max_seq_length or self._max_length)
            return model


def _rows(vectors: Any) -> Vectors:
    return np.ascontiguousarray(vectors, dtype=np.float32)


def _without_pickles(name: str) -> Path:
    """The folder of a model, fetched from the hub where it is none, and without the files that are pickles.

    Raises:
        OSError, ValueError: it cannot be had, or has weights as pickles only.
    """
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        pickles = ["*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt"]
        other = ["*.h5", "*.msgpack", "*.ot", "*.onnx", "onnx/*", "openvino/*"]
        folder = Path(snapshot_download(name, ignore_patterns=pickles + other))
    for pickled in folder.rglob("*.bin"):
        if not any(pickled.parent.glob("*.safetensors")):
            raise ValueError(f"{pickled} is a pickle, which is never read. Save the model as safetensors.")
    if any(folder.rglob("adapter_config.json")):
        raise ValueError("it holds an adapter of another model. Merge the two, and save them as one")
    return folder


def _check_modules(folder: Path) -> None:
    """Raise ValueError where modules.json names a class that is no module of sentence-transformers."""
    from sentence_transformers.sentence_transformer import modules

    for module in json.loads((folder / "modules.json").read_text(encoding="utf-8")):
        package, _, name = module["type"].rpartition(".")
        if package.partition(".")[0] != "sentence_transformers" or name not in modules.__all__:
            raise ValueError(f"modules.json names {module['type']}, which is no module of sentence-transformers")


def _check_pooling(model: Any, pooling: str | None) -> None:
    """Raise ValueError where a model that says how it pools is asked for another way."""
    own = next((module.pooling_mode for module in model if hasattr(module, "pooling_mode")), None)
    if pooling is not None and own is not None and own not in (pooling, (pooling,), [pooling]):
        raise ValueError(f"its modules.json pools by {own}, not by {pooling}. Leave pooling out")


def _is_plain(folder: Path) -> bool:
    """Whether it is a transformers folder that does not say how to pool."""
    return (folder / "config.json").is_file() and not (folder / "modules.json").is_file()


def _pooled(name: str, pooling: str, device: str | None, options: dict[str, Any]) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    safe = {"trust_remote_code": False}  # left out, transformers may ask instead of refusing
    body = Transformer(name, model_kwargs=options | safe, processor_kwargs=safe, config_kwargs=safe)
    return SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension(), pooling)], device=device)
