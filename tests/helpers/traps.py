"""Booby traps: files of somebody else's that run something, never end, or claim absurd sizes."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import save as save_sharded

from helpers.models import tiny_model
from helpers.tokenizers import byte_tokenizer

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
"""A chat template that does not end."""


class Trap:
    """Writes traps into a folder; what any of them runs makes `marker`.

    Args:
        folder: where they are put.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.marker = folder, folder.parent / "marker"
        folder.mkdir()
        (folder / "evil.py").write_text(f"open({str(self.marker)!r}, 'w')\nclass Evil:\n    load = None\n")

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)

    def json(self, name: str, **changes: Any) -> None:
        """Changes keys of a JSON file, which may be new."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        found = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(found | changes))

    def model(self) -> None:
        """A model folder as it should be."""
        tokenizer = byte_tokenizer()
        tiny_model(tokenizer=tokenizer).save_pretrained(self.folder)
        tokenizer.save_pretrained(self.folder)

    def pickled_model(self, name: str = "pytorch_model.bin") -> None:
        """Weights that are a pickle."""
        self.model()
        (self.folder / "model.safetensors").unlink()
        torch.save(self, self.folder / name)

    def foreign_model(self) -> None:
        """A kind of model that only its own code knows."""
        self.model()
        classes = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoModel": "evil.Evil"}
        self.json("config.json", model_type="evil", auto_map=classes)

    def foreign_tokenizer(self) -> None:
        """A tokenizer that only its own code knows."""
        self.model()
        (self.folder / "tokenizer.json").unlink()
        auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        self.json("tokenizer_config.json", tokenizer_class="Evil", auto_map=auto_map)

    def no_tokenizer(self) -> None:
        """What makes the tokenizers library raise a bare Exception."""
        self.model()
        (self.folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Evil"}}')

    def huge_header(self, name: str = "model.safetensors") -> None:
        """Safetensors whose header has more bytes than any disk."""
        self.model()
        (self.folder / name).write_bytes(struct.pack("<Q", 1 << 62) + b"{}")

    def looping_template(self, template: str = LOOPS) -> None:
        """A chat template that is a program of its own kind."""
        self.model()
        (self.folder / "chat_template.jinja").write_text(template)

    def adapter_of_another(self) -> None:
        """What transformers would follow to another model."""
        self.json("adapter_config.json", peft_type="LORA", base_model_name_or_path=str(self.folder.parent / "other"))

    def adapter(self, **options: Any) -> None:
        """A LoRA adapter, with options beside those of a plain one."""
        self.json(
            "adapter_config.json", peft_type="LORA", task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **options
        )
        (self.folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")

    def modules(self, kind: str) -> None:
        """A sentence-transformers folder with one module."""
        modules = [{"idx": 0, "name": "0", "path": "", "type": kind}]
        (self.folder / "modules.json").write_text(json.dumps(modules))
        self.json("router_config.json", types={"query": "evil.Evil"}, structure={"query": ["query"]}, parameters={})
        self.json("query/config.json")

    def array(self, name: str) -> None:
        """An array of objects, which are pickles."""
        with (self.folder / name).open("wb") as file:
            np.save(file, np.array([self], dtype=object), allow_pickle=True)

    def words(self) -> None:
        """A BM25 index whose vocabulary and arrays are pickles."""
        for name in ("vocab.index.json", "params.index.json"):
            (self.folder / name).write_bytes(pickle.dumps(self))
        for name in ("data.csc.index.npy", "indices.csc.index.npy", "indptr.csc.index.npy"):
            self.array(name)

    def vectors(self, kind: bytes = b"IxFI", count: int = 1 << 60) -> None:
        """A FAISS file that claims more vectors than there are bytes."""
        header = kind + struct.pack("<iqqqBi", 8, count, 1 << 20, 1 << 20, 1, 0) + struct.pack("<Q", count)
        (self.folder / "index.faiss").write_bytes(header)

    def checkpoint(self) -> None:
        """A checkpoint that holds an object."""
        torch.save({"state_dict": {}, "global_step": 1, "hyper_parameters": self}, self.folder / "step_00000001.ckpt")

    def sharded(self, part: str) -> None:
        """A checkpoint of shards; one part of it is a pickle."""
        path = self.folder / "step_00000001.ckpt"
        value: Any = self if part == "shard" else 1
        save_sharded(
            {"state_dict": {"w": torch.ones(2)}, "optimizer_0": {"lr": value}}, checkpoint_id=path, no_dist=True
        )
        torch.save({"global_step": self if part == "meta.pt" else 1}, path / "meta.pt")
        if part == ".metadata":
            command = f"touch {self.marker}".encode()
            texts = [b"torch.distributed.checkpoint.metadata", b"os.system", command]
            module, name, argument = (pickle.SHORT_BINUNICODE + bytes([len(text)]) + text for text in texts)
            call = pickle.STACK_GLOBAL + argument + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP
            (path / ".metadata").write_bytes(pickle.PROTO + b"\x04" + module + name + call)
