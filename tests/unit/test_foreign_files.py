"""Files of somebody else's: whatever lies in them, nothing of it runs, and one line tells why it is refused."""

from __future__ import annotations

import re
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.lora import adapted
from helpers.paths import ROOT
from helpers.tokenizers import CHATML, byte_tokenizer
from helpers.traps import LOOPS, Trap
from sdsearch_lightning.checkpoints.reading import named_checkpoint, open_checkpoint
from sdsearch_lightning.checkpoints.shards import AnyCheckpointIO
from sdsearch_lightning.errors import ConfigError, SDSearchError
from sdsearch_lightning.plan.architecture import find_architecture
from sdsearch_lightning.policy.loading import load, load_skeleton
from sdsearch_lightning.policy.lora import LoRA
from sdsearch_lightning.policy.lora_folder import check_base
from sdsearch_lightning.protocol.chat_template import MAX_ADDED, MAX_TEMPLATE, render_chat
from sdsearch_lightning.protocol.templates import SearchR1Protocol
from sdsearch_lightning.protocol.tokenization import TokenCodec, end_of_turn_ids
from sdsearch_lightning.retrieval.bm25 import BM25Retriever
from sdsearch_lightning.retrieval.corpus import Corpus
from sdsearch_lightning.retrieval.encoder import TextEncoder
from sdsearch_lightning.retrieval.faiss_index import FaissIndex
from sdsearch_lightning.retrieval.torch_index import TorchIndex
from sdsearch_lightning.rollout.vllm import VLLMEngine

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is .*un")
Loader = Callable[[Path], Any]


def policy(folder: Path) -> None:
    load(str(folder), torch.float32)


def skeleton(folder: Path) -> None:
    load_skeleton(str(folder), torch.float32)


def plan(folder: Path) -> None:
    find_architecture(str(folder), None)


def prompts(folder: Path) -> None:
    _, tokenizer = load(str(folder), torch.float32)
    protocol = SearchR1Protocol()
    protocol.prompt_ids(TokenCodec(tokenizer, protocol.tags, end_of_turn_ids(tokenizer)), "who?")


def adapter(folder: Path) -> None:
    pytest.importorskip("peft")
    adapted(None, LoRA(adapter=str(folder)))


def adapter_origin(folder: Path) -> None:
    check_base(folder, {"name": "x", "base": "y"})


def encoder(folder: Path) -> None:
    TextEncoder(str(folder)).encode_queries(["who?"])


def bm25(folder: Path) -> None:
    pytest.importorskip("bm25s")
    corpus = folder / "corpus.jsonl"
    corpus.write_text('{"id": "1", "contents": "\\"a\\"\\nsome words"}\n')
    retriever = BM25Retriever(corpus, folder / "index")
    retriever.prepare()
    for path in folder.glob("*.index.*"):
        shutil.copy(path, retriever.folder)
    retriever.search(["words"], 1)


def corpus(folder: Path) -> None:
    (folder / "corpus.jsonl").write_text("{}\n")
    Corpus.open(folder / "corpus.jsonl", folder)


def vectors(folder: Path) -> None:
    TorchIndex(folder / "vectors.npy", "cpu")


def faiss_file(folder: Path) -> None:
    pytest.importorskip("faiss")
    FaissIndex(folder / "index.faiss")


def checkpoint(folder: Path) -> None:
    named_checkpoint(folder / "step_00000001.ckpt")


def resumed(folder: Path) -> None:
    open_checkpoint(folder / "step_00000001.ckpt")


def restored(folder: Path) -> None:
    path = folder / "step_00000001.ckpt"
    named_checkpoint(path)  # what `find_checkpoint` does before Lightning reads it
    AnyCheckpointIO().load_checkpoint(path)


ALIEN, OURS = "evil.Evil", "sentence_transformers.sentence_transformer.modules."
TRAPS: list[tuple[str, tuple[Loader, ...], Callable[[Trap], None]]] = [
    ("pickled .bin", (policy, prompts, encoder), Trap.pickled_model),
    ("pickled .pt", (policy, encoder), partial(Trap.pickled_model, name="model.pt")),
    ("auto_map of a model", (policy, skeleton, plan, encoder), Trap.foreign_model),
    ("auto_map of a tokenizer", (policy, skeleton, encoder), Trap.foreign_tokenizer),
    ("no tokenizer", (policy, skeleton, encoder), Trap.no_tokenizer),
    ("huge header", (policy, encoder), Trap.huge_header),
    ("adapter of another model", (policy, skeleton, plan, encoder, adapter), Trap.adapter_of_another),
    ("adapter with a huge header", (adapter,), Trap.adapter),
    ("adapter that imports", (adapter,), partial(Trap.adapter, megatron_config={"a": 1}, megatron_core="evil")),
    ("origin", (adapter_origin,), lambda trap: (trap.folder / "sdsearch_origin.json").write_text("[]")),
    ("module in a file", (encoder,), partial(Trap.modules, kind=ALIEN)),
    ("module of Python", (encoder,), partial(Trap.modules, kind="json")),
    ("module of another library", (encoder,), partial(Trap.modules, kind="torch.hub")),
    ("no module of theirs", (encoder,), partial(Trap.modules, kind="sentence_transformers.base.model.json")),
    ("module in a module", (encoder,), partial(Trap.modules, kind=f"{OURS}Router")),
    ("looping template", (prompts,), Trap.looping_template),
    ("template of a TB", (prompts,), partial(Trap.looping_template, template="{{ 'a' * (10 ** 12) }}")),
    ("template out of its box", (prompts,), partial(Trap.looping_template, template="{{ ''.__class__.mro() }}")),
    ("objects among words", (bm25,), Trap.words),
    ("objects among offsets", (corpus,), partial(Trap.array, name="offsets.npy")),
    ("objects among vectors", (vectors,), partial(Trap.array, name="vectors.npy")),
    ("absurd FAISS header", (faiss_file,), Trap.vectors),
    ("absurd FAISS header", (faiss_file,), partial(Trap.vectors, kind=b"IwFl")),
    ("absurd FAISS header", (faiss_file,), partial(Trap.vectors, kind=b"IHNf", count=1 << 38)),
    ("object in a checkpoint", (checkpoint, resumed, restored), Trap.checkpoint),
    *(
        (f"object in {part}", (checkpoint, resumed, restored), partial(Trap.sharded, part=part))
        for part in (".metadata", "meta.pt")
    ),
    ("object in a shard", (restored,), partial(Trap.sharded, part="shard")),
]


@pytest.mark.parametrize(
    ("loader", "trap"),
    [pytest.param(each, trap, id=f"{name}-{each.__name__}") for name, loaders, trap in TRAPS for each in loaders],
)
def test_nothing_of_it_runs(
    loader: Loader, trap: Callable[[Trap], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trapped = Trap(tmp_path / "theirs")
    trap(trapped)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(str(trapped.folder))  # as in a shell that stands there
    began = time.monotonic()
    with pytest.raises(SDSearchError) as caught:
        loader(trapped.folder)
    first, *rest = str(caught.value).splitlines()
    assert first and all(line.startswith(("Take that", "Look at")) for line in rest), "one line, and what to do"
    assert not trapped.marker.exists(), "it was run"
    assert time.monotonic() - began < 60


def test_no_loader_is_left_out() -> None:
    """A new place that reads what others wrote has to come to the list above."""
    calls = re.compile(
        r"\.from_pretrained\(|\bnp\.load\(|\bload_array\(|\btorch\.load\(|\bread_index\(|\bBM25\.load\(|Unpickler\(|"
        r"SentenceTransformer\(\n?\s*str|\bload_peft_weights\(|\bapply_chat_template\("
    )
    found = {
        str(path.relative_to(ROOT / "sdsearch_lightning"))
        for path in (ROOT / "sdsearch_lightning").rglob("*.py")
        if calls.search(path.read_text())
    }
    written = {"runs/model_card.py"}  # text for a reader
    assert found - written == {
        "checkpoints/reading.py", "checkpoints/shards.py", "plan/architecture.py", "policy/loading.py",
        "policy/lora_folder.py", "protocol/chat_template.py", "retrieval/bm25.py", "retrieval/corpus.py",
        "retrieval/encoder.py", "retrieval/faiss_index.py", "retrieval/torch_index.py",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["callbacks", "datamodules"])
def test_the_other_packages_load_nothing(name: str) -> None:
    assert not [
        path
        for path in (ROOT / name).rglob("*.py")
        if re.search(r"from_pretrained\(|pickle|np\.load\(", path.read_text())
    ]


def test_vllm_cannot_be_told_to_trust_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdsearch_lightning.rollout.vllm.check_version", lambda: None)
    with pytest.raises(ConfigError, match=r"options sets \['trust_remote_code'\]"):
        VLLMEngine("folder", options={"trust_remote_code": True})


def test_faiss_makes_no_more_room_than_the_file_has(tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    limit = faiss.get_deserialization_vector_byte_limit()
    trap = Trap(tmp_path / "theirs")
    trap.vectors(b"IHNf", count=1 << 25)
    with pytest.raises(SDSearchError, match="deserialization_vector_byte_limit"):
        faiss_file(trap.folder)
    assert faiss.get_deserialization_vector_byte_limit() == limit, "of others in this process"


# Chat templates


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (LOOPS, "one that ends within 0.2 s"),
        ("{% set n = namespace(x='ab') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "ends within"),
        ("a" * (MAX_TEMPLATE + 1), f"at most {MAX_TEMPLATE} characters, found {MAX_TEMPLATE + 1}"),
        (f"{{% for i in range({MAX_ADDED // 4}) %}}aaaaaaaaaa{{% endfor %}}", f"adds at most {MAX_ADDED} characters"),
    ],
)
def test_a_template_has_bounds(template: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdsearch_lightning.protocol.chat_template.MAX_SECONDS", 0.2)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    began = time.monotonic()
    with pytest.raises(ConfigError, match=told) as caught:
        render_chat(tokenizer, [{"role": "user", "content": "who?"}])
    assert time.monotonic() - began < 30 and len(str(caught.value).splitlines()) == 1


def test_the_bounds_leave_timers_as_they_were() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    before = signal.getsignal(signal.SIGALRM)
    assert "who?" in render_chat(tokenizer, [{"role": "user", "content": "who?"}])
    assert signal.getsignal(signal.SIGALRM) is before
    tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(ConfigError, match="cannot be rendered: no system turn"):
        render_chat(tokenizer, [{"role": "user", "content": "who?"}])
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_whole_folder_is_still_loaded(tmp_path: Path) -> None:
    trap = Trap(tmp_path / "theirs")
    trap.looping_template(CHATML)
    prompts(trap.folder)
    skeleton(trap.folder)
    plan(trap.folder)
