"""The world's facts and questions: groups that never meet, one term per relation, paths without repetition."""

from __future__ import annotations

import random
from itertools import islice

import pytest

from sdsearch_lightning.datamodules.synthetic_world_generation import (
    Fact,
    World,
    WorldShape,
    generate_world,
    question_of,
    sample_questions,
)
from sdsearch_lightning.errors import ConfigError

SHAPE = WorldShape(num_entities=60, num_relations=6, terms_per_relation=3, facts_per_entity=4)
WORLD = generate_world(SHAPE, SHAPE.groups(), random.Random("world"))


def test_facts_stay_in_their_group() -> None:
    train, held_out = map(set, SHAPE.groups())
    assert train.isdisjoint(held_out) and train | held_out == set(SHAPE.entities)
    assert all((fact.subject in train) == (fact.object in train) for fact in WORLD.facts)
    one_group = generate_world(SHAPE, [SHAPE.entities], random.Random("world"))
    assert any((fact.subject in train) != (fact.object in train) for fact in one_group.facts)


def test_every_entity_has_its_facts_with_the_worlds_terms() -> None:
    assert len(WORLD.documents) == SHAPE.num_entities * SHAPE.facts_per_entity
    for entity in SHAPE.entities:
        facts = WORLD.facts_of[entity]
        assert len({fact.relation for fact in facts}) == SHAPE.facts_per_entity
        assert all(fact.term == WORLD.terms[fact.relation] and fact.object != entity for fact in facts)


def test_excluded_triples_do_not_occur() -> None:
    excluded = frozenset(fact.triple for fact in WORLD.facts)
    free = generate_world(SHAPE, SHAPE.groups(), random.Random("other"))
    assert not excluded.isdisjoint(fact.triple for fact in free.facts), "the test needs worlds that collide by chance"
    guarded = generate_world(SHAPE, SHAPE.groups(), random.Random("other"), excluded)
    assert excluded.isdisjoint(fact.triple for fact in guarded.facts)


def test_paths_are_chains_that_visit_no_entity_twice() -> None:
    rng = random.Random(0)
    for num_hops in (1, 2, 3):
        for _ in range(100):
            path = WORLD.sample_path(rng, SHAPE.entities, num_hops)
            visited = [path[0].subject, *(fact.object for fact in path)]
            assert len(path) == num_hops and len(set(visited)) == num_hops + 1
            assert [fact.subject for fact in path] == visited[:-1]


def test_a_world_without_long_paths_says_so() -> None:
    there_and_back = {"e0": (Fact("e0", "rel0", "rel0_a", "e1"),), "e1": (Fact("e1", "rel0", "rel0_a", "e0"),)}
    world = World({"rel0": "rel0_a"}, tuple(fact for (fact,) in there_and_back.values()), there_and_back)
    with pytest.raises(ConfigError, match="no path of 2 hops"):
        world.sample_path(random.Random(0), ["e0"], 2)


def test_question_names_relations_in_hop_order() -> None:
    path = (Fact("e5", "rel3", "rel3_a", "e9"), Fact("e9", "rel7", "rel7_b", "e2"))
    question = question_of(path, "q")
    assert question.text == "question e5 the rel3 the rel7 ?"
    assert question.answers == ("e2",) and question.source == "2-hop"
    assert path[0].document == "e5 rel3_a is e9 ."


def test_questions_differ_and_follow_the_hop_mix() -> None:
    stream = sample_questions(WORLD, random.Random(0), SHAPE.entities, (0.0, 0.5, 0.5), "train")
    questions = list(islice(stream, 400))
    assert len({question.text for question in questions}) == len({question.id for question in questions}) == 400
    share = sum(question.source == "2-hop" for question in questions) / 400
    assert 0.4 < share < 0.6 and not any(question.source == "1-hop" for question in questions)


def test_an_exhausted_world_says_so() -> None:
    one_hop = sample_questions(WORLD, random.Random(0), SHAPE.entities[:1], (1.0,), "val")
    with pytest.raises(ConfigError, match="no more 1-hop questions after 4 val questions"):
        list(islice(one_hop, 5))


def test_vocabulary_holds_every_word_once() -> None:
    vocabulary = SHAPE.vocabulary
    assert len(set(vocabulary)) == len(vocabulary)
    questions = islice(sample_questions(WORLD, random.Random(0), SHAPE.entities, (1, 1, 1), "q"), 50)
    texts = [*WORLD.documents, *(question.text for question in questions)]
    assert {word for text in texts for word in text.split()} <= set(vocabulary)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((60, 6, 3, 7), r"data\.facts_per_entity: expected 1 to num_relations \(6\), found 7"),
        ((60, 6, 27, 4), r"data\.terms_per_relation: expected 1 to 26 \(a to z\), found 27"),
        ((29, 6, 3, 4), r"data\.num_entities: expected at least 30, found 29"),
    ],
)
def test_impossible_sizes_are_refused(sizes: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WorldShape(*sizes)
