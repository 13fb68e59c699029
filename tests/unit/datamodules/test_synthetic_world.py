"""The data module of the embedded world: held-out questions stay unseen, and retrieval is the ordinary dense one."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.paths import ROOT
from sdsearch_lightning.datamodules import SearchDataModule, SyntheticWorldDataModule
from sdsearch_lightning.datamodules.synthetic_world_encoder import WorldSearch, word_vectors
from sdsearch_lightning.datamodules.synthetic_world_generation import MISSING, WorldShape
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.policy.loading import word_level_tokenizer
from sdsearch_lightning.protocol.block_templates import BlockTemplates
from sdsearch_lightning.protocol.templates import Protocol
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.types import Label, Question, SiblingRecord, SpanKind

SMALL: dict[str, Any] = dict(
    num_entities=90,
    num_relations=8,
    terms_per_relation=4,
    facts_per_entity=6,
    num_train_questions=200,
    num_val_questions=40,
    num_demonstrations=400,
    num_demonstration_worlds=3,
)


def make(cache_dir: Path, **options: Any) -> SyntheticWorldDataModule:
    return SyntheticWorldDataModule(**SMALL | {"cache_dir": str(cache_dir)} | options)


def visited(data: SyntheticWorldDataModule, question: Question) -> list[str]:
    """Start, bridges and answer, found by walking the world's facts."""
    words = question.text.split()
    entities = [words[1]]
    for relation in (word for word in words if word.startswith("rel")):
        (fact,) = [fact for fact in data.world.facts_of[entities[-1]] if fact.relation == relation]
        entities.append(fact.object)
    assert question.answers == (entities[-1],)
    return entities


def test_held_out_questions_share_no_entity_with_training(tmp_path: Path) -> None:
    data = make(tmp_path)
    entities = {
        split: {entity for question in data.questions(split) for entity in visited(data, question)}
        for split in ("train", "val", "test")
    }
    assert len(data.questions("train")) == 200 and len(data.questions("val")) == len(data.questions("test")) == 40
    assert entities["train"].isdisjoint(entities["val"] | entities["test"])
    texts = [question.text for split in entities for question in data.questions(split)]
    assert len(set(texts)) == 280, "splits share no question"
    assert data.questions("predict") == data.questions("test")


def test_no_fact_of_the_evaluated_world_in_any_demonstration(tmp_path: Path) -> None:
    data = make(tmp_path)
    facts = {fact.triple for fact in data.world.facts}
    documents = set(data.world.documents)
    shown = [
        document
        for demonstration in data.demonstrations()
        for kind, text in demonstration.turns
        if kind is SpanKind.OBSERVATION
        for document in text.split("\n")
    ]
    assert len(shown) > 1000 and documents.isdisjoint(shown)
    assert facts.isdisjoint((s, term.split("_")[0], o) for s, term, _, o, _ in map(str.split, shown))


def test_the_vocabulary_spells_questions_documents_and_demonstrations(tmp_path: Path) -> None:
    data = make(tmp_path)
    texts = [
        *(question.text for split in ("train", "val") for question in data.questions(split)),
        *data.world.documents,
        *(text for demonstration in data.demonstrations() for _, text in demonstration.turns),
    ]
    assert {word for text in texts for word in text.split()} <= set(data.vocabulary())


def test_the_vocabulary_spells_the_texts_of_its_protocol(tmp_path: Path) -> None:
    options = yaml.safe_load((ROOT / "configs" / "protocol" / "synthetic_world.yaml").read_text())["init_args"]
    protocol = Protocol(**options | {"block": BlockTemplates(**options["block"])})
    data = make(tmp_path)
    codec = TokenCodec(word_level_tokenizer(data.vocabulary(), protocol.tags), protocol.tags)
    unknown = codec.tokenizer.unk_token_id
    assert unknown in codec.encode("nonsense") and unknown not in codec.encode(protocol.invalid_message)
    silent = SiblingRecord(9, (), Label.INCORRECT)
    for demonstration in data.demonstrations():
        shown = replace(demonstration, siblings=(*demonstration.siblings, silent))
        for span in protocol.demonstration_spans(codec, shown):
            assert unknown not in span.token_ids, codec.decode(span.token_ids)


def test_the_dense_index_and_the_plain_search_agree(tmp_path: Path) -> None:
    data = make(tmp_path)
    data.prepare_data()
    rng = random.Random(0)
    terms = data.world.terms
    queries = [f"{rng.choice(list(data.world.facts_of))} {rng.choice(list(terms.values()))}" for _ in range(100)]
    queries += [f"e{number} rel{number % 8}_{letter}" for number in range(60) for letter in "abcd"]
    queries += ["e5", "e89", "e5 rel3", terms["rel2"], f"{terms['rel2']} e5 e5"]
    search = WorldSearch(word_vectors(WorldShape(90, 8, 4, 6), seed=0), data.world.documents)
    dense = [[int(passage.id) for passage in passages] for passages in data.retriever.search(queries, 2)]
    plain = [search.search(query, 2) for query in queries]
    assert dense == plain
    shuffled = WorldSearch(word_vectors(WorldShape(90, 8, 4, 6), seed=1), data.world.documents)
    assert dense != [shuffled.search(query, 2) for query in queries], "other vectors must not pass"
    assert data.retriever.search(["e5"], 1)[0][0].contents in data.world.documents


def test_it_serves_batches_as_any_data_module(tmp_path: Path) -> None:
    data = make(tmp_path, batch_size=8, eval_batch_size=16)
    data.prepare_data()
    data.setup("fit")
    first = next(iter(data.train_dataloader()))
    assert len(first) == 8 and set(first.questions) <= set(data.questions("train"))
    served = [question for batch in data.val_dataloader() for question in batch.questions]
    assert served == data.questions("val")


def test_a_world_is_written_once_and_found_again(tmp_path: Path) -> None:
    data = make(tmp_path)
    data.prepare_data()
    corpus = data.world_folder / "corpus.jsonl"
    written = corpus.stat().st_mtime_ns, corpus.read_bytes()
    again = make(tmp_path, num_val_questions=10)
    again.prepare_data()
    assert again.world_folder == data.world_folder
    assert (corpus.stat().st_mtime_ns, corpus.read_bytes()) == written
    assert make(tmp_path, seed=1).world_folder != data.world_folder
    assert make(tmp_path, terms_per_relation=3).world_folder != data.world_folder
    assert [path.name for path in tmp_path.iterdir()] == [data.world_folder.name], "no draft is left behind"


def test_everything_follows_the_seed(tmp_path: Path) -> None:
    one, same, other = make(tmp_path), make(tmp_path), make(tmp_path, seed=1)
    assert one.world.documents == same.world.documents != other.world.documents
    assert one.questions("train") == same.questions("train") != other.questions("train")
    assert one.demonstrations()[399] == same.demonstrations()[399] != other.demonstrations()[399]


def test_seeds_share_the_world_of_a_world_seed_and_differ_in_order_only(tmp_path: Path) -> None:
    default = make(tmp_path, seed=7)
    one, two = (make(tmp_path, seed=seed, world_seed=7) for seed in (1, 2))
    for data in (one, two):
        assert data.world_folder == default.world_folder, "the fingerprint follows the world's seed"
        assert data.world.documents == default.world.documents
        for split in ("train", "val", "test"):
            assert data.questions(split) == default.questions(split)
        for index in (0, 399):
            assert data.demonstrations()[index] == default.demonstrations()[index]
    other = make(tmp_path, seed=1, world_seed=8)
    assert other.world_folder != one.world_folder and other.world.documents != one.world.documents
    assert other.questions("val") != one.questions("val") and other.demonstrations()[0] != one.demonstrations()[0]
    default.prepare_data()
    queries = [f"e{number} rel{number % 8}_a" for number in range(20)]
    assert one.retriever.search(queries, 2) == default.retriever.search(queries, 2), "one encoder"
    batches = {seed: next(iter(make(tmp_path, seed=seed, world_seed=7).train_dataloader())) for seed in (1, 2, 7)}
    assert len({tuple(batch.questions) for batch in batches.values()}) == 3, "each seed has an order of its own"
    assert make(tmp_path, seed=1, world_seed=0).world_folder == make(tmp_path, seed=0).world_folder, "0 is a seed too"


def test_the_default_is_the_quick_start_world(tmp_path: Path) -> None:
    data = SyntheticWorldDataModule(cache_dir=str(tmp_path))
    assert isinstance(data, SearchDataModule)
    assert len(data.world.documents) == 2400 and len(data.world.terms) == 12
    assert len(data.questions("val")) == 128 and len(data.demonstrations()) >= 10_000


def test_questions_have_as_many_hops_as_their_weights_say(tmp_path: Path) -> None:
    data = make(tmp_path, hop_mix=(0, 0, 0, 0, 1), num_val_questions=20)
    for split in ("train", "val", "test"):
        assert all(len(set(visited(data, question))) == 6 for question in data.questions(split))
    assert {demonstration.question.source for demonstration in data.demonstrations()[:50]} == {"5-hop"}
    make(tmp_path, hop_mix=(0,) * 28 + (1, 0, 0))  # the longest that 30 held-out entities can hold


def test_demonstrations_may_have_a_hop_mix_of_their_own(tmp_path: Path) -> None:
    default = make(tmp_path)
    sparse = make(tmp_path, hop_mix=(0, 0, 1), demonstration_hop_mix=(0.2, 0.5, 0.3))
    assert {question.source for question in sparse.questions("train")} == {"3-hop"}
    assert sparse.demonstrations()[:50] == default.demonstrations()[:50], "the two can share a cold start"
    assert sparse.demonstrations()[:50] != make(tmp_path, hop_mix=(0, 0, 1)).demonstrations()[:50]
    assert sparse.world_folder == default.world_folder


def test_demonstrations_that_ask_again_add_one_word(tmp_path: Path) -> None:
    default, again = make(tmp_path), make(tmp_path, missing_share=0.5)
    assert again.vocabulary() == (*default.vocabulary(), MISSING) and MISSING not in default.vocabulary()
    words = {word for shown in again.demonstrations() for _, text in shown.turns for word in text.split()}
    assert MISSING in words and words <= set(again.vocabulary())
    assert max(len(shown.turns) for shown in again.demonstrations()) == 3 * 4 + 2
    longer = make(tmp_path, missing_share=0.5, demonstration_max_searches=6).demonstrations()
    assert max(len(shown.turns) for shown in longer) == 3 * 6 + 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hop_mix": ()}, r"data\.hop_mix: expected weights .*, found \(\)"),
        ({"hop_mix": (0.5, -0.5, 1.0)}, r"data\.hop_mix: expected weights .*, none negative"),
        ({"hop_mix": (0,) * 29 + (1,)}, r"data\.hop_mix: expected at most 29 hops, since 30 entities .*, found 30"),
        ({"demonstration_hop_mix": (0, 0)}, r"data\.demonstration_hop_mix: expected weights .* not all 0"),
        ({"missing_share": 1.1}, r"data\.missing_share: expected a share between 0 and 1, found 1\.1"),
        ({"demonstration_max_searches": 0}, r"data\.demonstration_max_searches: expected at least 1, found 0"),
        ({"block_share": -0.1}, r"data\.block_share: expected a share between 0 and 1, found -0\.1"),
        ({"num_demonstration_worlds": 0}, r"data\.num_demonstration_worlds: expected at least 1, found 0"),
        ({"facts_per_entity": 9}, r"data\.facts_per_entity: expected 1 to num_relations \(8\), found 9"),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, **options)


def test_the_best_query_finds_the_first_hop_first(tmp_path: Path) -> None:
    data = make(tmp_path)
    data.prepare_data()
    for question in data.questions("val")[:8]:
        start, relation = question.text.split()[1:4:2]
        ((first, *_),) = data.retriever.search([data.best_query(question)], 2)
        subject, term, *_ = first.contents.split()
        assert subject == start and term.startswith(f"{relation}_")
