"""The cold start: demonstrations as a rollout would hold them, and a weighted cross-entropy by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from helpers.closed_form import logprob_rows
from helpers.fits import Record, ToyData, fit
from helpers.models import tiny_model
from helpers.paths import ROOT
from helpers.training import gradient, weights_of
from helpers.training_rollouts import (
    TRAINING_CODEC,
    TRAINING_PASSAGES,
    TRAINING_PROTOCOL,
    TRAINING_TOKENIZER,
    demonstration,
)
from sdsearch_lightning.datamodules.synthetic_world_demonstrations import WorldDemonstrations
from sdsearch_lightning.datamodules.synthetic_world_encoder import word_vectors
from sdsearch_lightning.datamodules.synthetic_world_generation import WorldShape
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.losses.weights import LossWeights
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.policy.loading import ScratchModel, word_level_tokenizer
from sdsearch_lightning.policy.packing import PackedSequences
from sdsearch_lightning.protocol.block_templates import BlockTemplates
from sdsearch_lightning.protocol.conversation import Conversation
from sdsearch_lightning.protocol.templates import Protocol
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.schedules import Linear
from sdsearch_lightning.supervised import SupervisedModule
from sdsearch_lightning.training.options import OptimizerSpec
from sdsearch_lightning.types import (
    Demonstration,
    Label,
    Limits,
    Passage,
    RolloutRequest,
    SiblingRecord,
    SpanKind,
    Trajectory,
)

pytestmark = pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no")

UNEVEN = LossWeights(reasoning=0.5, query=3.0, answer=2.0, scaffold=1.0, observation=0.0)
PLAIN = [OptimizerSpec(lambda params: torch.optim.SGD(params, lr=1.0))]


def supervised(model: Any = None, **options: Any) -> SupervisedModule:
    options = {"optimizers": PLAIN, "gradient_clip_val": None} | options
    module = SupervisedModule(scratch=ScratchModel(), protocol=TRAINING_PROTOCOL, **options)
    module.attach(model or tiny_model(), TRAINING_TOKENIZER)
    return module


def by_hand(module: SupervisedModule, batch: Sequence[Demonstration], weights: LossWeights) -> Tensor:
    """The weighted mean over all tokens of the batch, one sequence at a time."""
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for written in batch:
        spans = TRAINING_PROTOCOL.demonstration_spans(TRAINING_CODEC, written)
        rows = logprob_rows(module.policy.model, [token for span in spans for token in span.token_ids])
        position = 0
        for span in spans:
            weight = getattr(weights, span.kind.lower()) if span.kind is not SpanKind.PROMPT else 0.0
            for token in span.token_ids:
                if weight:
                    total, count = total - weight * rows[position, token], count + weight
                position += 1
    return total / count


# Demonstrations


def kinds(spans: Any) -> list[tuple[SpanKind, int]]:
    return [(span.kind, token) for span in spans for token in span.token_ids]


def replay(written: Demonstration, protocol: Protocol, codec: TokenCodec) -> Trajectory:
    """The same text as a policy would have written it, token by token, and found by its searches."""
    tags = {SpanKind.REASONING: "think", SpanKind.QUERY: "search", SpanKind.ANSWER: "answer"}
    prompt = protocol.prompt_ids(codec, written.question.text, protocol.render_block(codec, written.siblings))
    conversation = Conversation(RolloutRequest(written.question, (0, 0), 0, prompt, 0), protocol, codec, Limits())
    found = iter([text for kind, text in written.turns if kind is SpanKind.OBSERVATION])
    for kind, text in written.turns:
        if kind is SpanKind.OBSERVATION:
            continue
        for token in codec.encode(f"<{tags[kind]}> {text} </{tags[kind]}>"):
            conversation.accept(token, -1.0)
        if kind is SpanKind.QUERY:
            conversation.observe([Passage(str(i), line) for i, line in enumerate(next(found).split("\n"))])
    return conversation.finish()


def test_a_demonstration_holds_what_a_rollout_with_the_same_text_holds() -> None:
    texts = yaml.safe_load((ROOT / "configs/protocol/synthetic_world.yaml").read_text())["init_args"]
    protocol = Protocol(**texts | {"block": BlockTemplates(**texts["block"])})
    shape = WorldShape(num_entities=60, num_relations=8, terms_per_relation=4, facts_per_entity=6)
    codec = TokenCodec(word_level_tokenizer(shape.vocabulary, protocol.tags), protocol.tags)
    options = {"length": 30, "num_worlds": 2, "hop_mix": (0.2, 0.5, 0.3), "block_share": 0.5, "top_k": 2, "seed": 0}
    written = list(WorldDemonstrations(shape, word_vectors(shape, 0), frozenset(), **options))
    random.Random(0).shuffle(written)
    assert any(one.siblings for one in written) and not all(one.siblings for one in written)
    for one in written:
        rollout, spans = replay(one, protocol, codec), protocol.demonstration_spans(codec, one)
        assert kinds(spans) == kinds(rollout.spans)
        assert rollout.queries == tuple(text for kind, text in one.turns if kind is SpanKind.QUERY)
        assert rollout.answer == one.turns[-1][1]
        assert not any(span.sampled for span in spans), "nobody drew these tokens"
        assert codec.tokenizer.unk_token_id not in {token for span in spans for token in span.token_ids}


def test_siblings_stand_in_the_prompt_as_a_block() -> None:
    siblings = (SiblingRecord(0, ("the river",), Label.INCORRECT), SiblingRecord(1, (), Label.CORRECT))
    plain, taught = (TRAINING_PROTOCOL.demonstration_spans(TRAINING_CODEC, demonstration(s)) for s in ((), siblings))
    text = "where is Rome siblings INCORRECT the river ; CORRECT none ;"
    assert TRAINING_CODEC.decode(taught[0].token_ids) == text and taught[0].kind is SpanKind.PROMPT
    assert TRAINING_CODEC.decode(plain[0].token_ids) == "where is Rome"
    assert taught[1:] == plain[1:]


def test_passages_are_cut_as_the_rollouts_that_follow_cut_them() -> None:
    turns = (*demonstration().turns[:2], (SpanKind.OBSERVATION, TRAINING_PASSAGES), demonstration().turns[3])
    shown = replace(demonstration(), turns=turns)
    lengths = []
    for options in ({}, {"max_observation_tokens": 8}):
        module = supervised(**options)
        module._trainer = SimpleNamespace(world_size=1)  # type: ignore[assignment]
        (micro,) = module._micro_batches([shown])
        lengths.append(len(micro.sequences.token_ids))
        spans = TRAINING_PROTOCOL.demonstration_spans(TRAINING_CODEC, shown, module.max_observation_tokens)
        assert micro.sequences.token_ids.tolist() == [token for span in spans for token in span.token_ids]
    assert lengths[0] - lengths[1] == 14 - 8, "two texts of six words between two tags"


# The loss


@pytest.mark.parametrize("max_tokens", [1, 90, 100_000])
def test_a_step_by_hand(max_tokens: int) -> None:
    module, record = supervised(loss_weights=UNEVEN, max_micro_batch_tokens=max_tokens), Record()
    start = weights_of(module)
    data = ToyData(batch_size=12)
    wanted = by_hand(module, data.demonstrations(), UNEVEN)
    pull = gradient(module, wanted)  # type: ignore[arg-type]
    fit(module, record, data=data)
    assert record.metrics[0]["train/loss"] == pytest.approx(wanted.item(), rel=1e-6)  # Lightning logs float32
    assert record.metrics[0]["train/grad_norm"] == pytest.approx(pull.norm().item(), rel=1e-6)
    torch.testing.assert_close(start - weights_of(module), pull, rtol=0, atol=1e-11)
    assert wanted.item() != pytest.approx(by_hand(supervised(), data.demonstrations(), LossWeights()).item(), rel=1e-3)


@pytest.mark.parametrize(("observation", "changes"), [(0.0, False), (1.0, True)])
def test_documents_are_learned_only_where_they_weigh(observation: float, changes: bool) -> None:
    """What a last search returned is nobody's context, so only a weight on it could make it count."""
    module = supervised(loss_weights=LossWeights(observation=observation))
    module._trainer = SimpleNamespace(world_size=1)  # type: ignore[assignment]
    results = []
    for documents in ("Rome is the capital of Italy", "Oslo is the river of Norway"):
        turns = (*demonstration().turns[:2], (SpanKind.OBSERVATION, documents))
        (micro,) = module._micro_batches([replace(demonstration(), turns=turns)])
        loss = module.cross_entropy(micro.sequences, micro.weight)
        results.append(torch.cat([loss.detach()[None], gradient(module, loss)]))  # type: ignore[arg-type]
    assert torch.equal(*results) is not changes


def test_the_cross_entropy_is_a_plain_weighted_sum() -> None:
    module = supervised()
    tokens, weights = [4, 9, 7, 12, 5], [0.0, 1.0, 0.0, 2.5, 0.5]
    loss = module.cross_entropy(PackedSequences.pack([tokens]), torch.tensor(weights, dtype=torch.float64))
    rows = logprob_rows(module.policy.model, tokens)
    assert loss.item() == pytest.approx(
        -rows[1, 9].item() - 2.5 * rows[3, 12].item() - 0.5 * rows[4, 5].item(), abs=1e-12
    )


def test_a_prompt_weighs_nothing() -> None:
    weights = LossWeights(1, 2, 3, 4, 5, 6).by_kind()
    assert weights == dict(
        zip(["REASONING", "QUERY", "REFINE", "ANSWER", "SCAFFOLD", "OBSERVATION"], range(1, 7), strict=True)
    ) | {"PROMPT": 0}


@pytest.mark.parametrize("weights", [{"query": -1.0}, dict.fromkeys(("reasoning", "query", "answer", "scaffold"), 0)])
def test_weights_that_cannot_work_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"model.loss_weights: .*LossWeights\(reasoning="):
        LossWeights(**{"refine": 0.0} | weights)


def test_a_batch_in_which_nothing_weighs_changes_nothing() -> None:
    module, record = supervised(loss_weights=LossWeights(0, 0, refine=1.0, answer=0, scaffold=0)), Record()
    start = weights_of(module)
    fit(module, record)
    assert record.metrics[0]["train/loss"] == record.metrics[0]["train/grad_norm"] == 0
    assert torch.equal(weights_of(module), start)


# A run

MUON = [
    OptimizerSpec(lambda params: torch.optim.Muon(params, lr=0.02), r"layers.*proj\.weight"),
    OptimizerSpec(lambda params: torch.optim.AdamW(params, lr=0.01)),
]
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def cold_start(folder: Path, steps: int = 12) -> tuple[SupervisedModule, Record, Any]:
    record = Record()
    module = SupervisedModule(
        scratch=ScratchModel("llama", SMALL),
        protocol=TRAINING_PROTOCOL,
        optimizers=MUON,
        lr_schedule=Linear(total_steps=steps),
    )
    trainer = fit(module, record, max_steps=steps, default_root_dir=folder)
    return module, record, trainer


def test_two_optimizers_are_one_step_and_one_step_of_the_schedule(tmp_path: Path) -> None:
    module, record, trainer = cold_start(tmp_path)
    assert trainer.global_step == len(record.metrics) == 12
    assert [m["train/lr"] for m in record.metrics] == pytest.approx([0.02 * (1 - i / 12) for i in range(12)])
    assert [config.scheduler.last_epoch for config in trainer.lr_scheduler_configs] == [12, 12]
    losses = [m["train/loss"] for m in record.metrics]
    assert losses[-1] < 0.7 * losses[0], "it learns"


def test_its_folder_is_what_search_training_starts_from(tmp_path: Path) -> None:
    module, _, _ = cold_start(tmp_path, steps=2)
    module.save_pretrained(tmp_path / "model")
    loaded = SDSearchModule(str(tmp_path / "model"), protocol=TRAINING_PROTOCOL)
    loaded.configure_model()
    packed = PackedSequences.pack([[3, 4, 5, 6], [9, 8]])
    rows = (packed.position_ids > 0).nonzero()[:, 0]
    ours, theirs = module.policy.logits(packed, rows), loaded.policy.logits(packed, rows)
    assert torch.equal(ours, theirs) and ours.std() > 0.05
    text = "<search> capital of Italy </search> <eos>"
    assert loaded.codec.encode(text) == module.codec.encode(text)
    assert loaded.codec.control_strings == module.codec.control_strings
