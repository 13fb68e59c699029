"""Written rollouts: their form, their blocks, and that a block helps exactly where a sibling was CORRECT."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest

from sdsearch_lightning.datamodules.synthetic_world_demonstrations import (
    ChooseQuery,
    Script,
    WorldDemonstrations,
    label_of,
)
from sdsearch_lightning.datamodules.synthetic_world_encoder import WorldSearch, word_vectors
from sdsearch_lightning.datamodules.synthetic_world_generation import WorldShape, generate_world, question_of
from sdsearch_lightning.types import Demonstration, Label, Question, SpanKind

SHAPE = WorldShape(num_entities=60, num_relations=8, terms_per_relation=4, facts_per_entity=6)
EVALUATED = generate_world(SHAPE, SHAPE.groups(), random.Random("evaluated"))
EXCLUDED = frozenset(fact.triple for fact in EVALUATED.facts)
SEARCH = WorldSearch(word_vectors(SHAPE, 0), EVALUATED.documents)


def make(seed: int = 0, length: int = 2000, block_share: float = 0.7) -> WorldDemonstrations:
    return WorldDemonstrations(
        SHAPE,
        word_vectors(SHAPE, seed),
        EXCLUDED,
        length=length,
        num_worlds=4,
        hop_mix=(0.2, 0.5, 0.3),
        block_share=block_share,
        top_k=2,
        seed=seed,
    )


@pytest.fixture(scope="module")
def demonstrations() -> list[Demonstration]:
    return list(make())


def is_right(demonstration: Demonstration) -> bool:
    return demonstration.turns[-1][1] in demonstration.question.answers


def has_correct(demonstration: Demonstration) -> bool:
    return any(sibling.label is Label.CORRECT for sibling in demonstration.siblings)


def test_turns_have_the_form_of_a_rollout(demonstrations: list[Demonstration]) -> None:
    vocabulary = set(SHAPE.vocabulary)
    for demonstration in demonstrations:
        num_hops = demonstration.question.text.split().count("the")
        hop = [SpanKind.REASONING, SpanKind.QUERY, SpanKind.OBSERVATION]
        assert [kind for kind, _ in demonstration.turns] == hop * num_hops + [SpanKind.REASONING, SpanKind.ANSWER]
        assert all(word in vocabulary for _, text in demonstration.turns for word in text.split())
        assert all(len(text.split("\n")) == 2 for kind, text in demonstration.turns if kind is SpanKind.OBSERVATION)


def test_reasoning_follows_what_was_read(demonstrations: list[Demonstration]) -> None:
    for demonstration in demonstrations:
        entity = demonstration.question.text.split()[1]
        for (_, thought), _, (_, passages) in zip(*[iter(demonstration.turns[:-2])] * 3, strict=True):
            _, relation, _, subject = thought.split()
            assert subject == entity
            facts = [line.split() for line in passages.split("\n")]
            read = [fact[3] for fact in facts if fact[0] == entity and fact[1].startswith(f"{relation}_")]
            entity = (read or [facts[0][3]])[0]
        assert demonstration.turns[-1][1] == entity


def test_hops_follow_the_mix(demonstrations: list[Demonstration]) -> None:
    sources = [demonstration.question.source for demonstration in demonstrations]
    assert [sources.count(f"{hops}-hop") / 2000 for hops in (1, 2, 3)] == pytest.approx([0.2, 0.5, 0.3], abs=0.04)


def test_share_of_blocks_and_their_size(demonstrations: list[Demonstration]) -> None:
    with_block = [demonstration for demonstration in demonstrations if demonstration.siblings]
    assert len(with_block) / len(demonstrations) == pytest.approx(0.7, abs=0.04)
    assert {len(demonstration.siblings) for demonstration in with_block} == set(range(2, 9))
    assert not any(demonstration.siblings for demonstration in make(length=50, block_share=0.0))


def test_a_block_helps_only_with_a_correct_sibling(demonstrations: list[Demonstration]) -> None:
    scores = {
        "correct": [is_right(d) for d in demonstrations if has_correct(d)],
        "incorrect": [is_right(d) for d in demonstrations if d.siblings and not has_correct(d)],
        "none": [is_right(d) for d in demonstrations if not d.siblings],
    }
    share = {name: sum(values) / len(values) for name, values in scores.items()}
    assert share["correct"] > 0.85
    assert share["incorrect"] < 0.3 and share["none"] < 0.35


def make_script(rng: random.Random) -> tuple[Script, Question]:
    path = EVALUATED.sample_path(rng, SHAPE.entities, 2)
    return Script(SHAPE, EVALUATED, SEARCH, path, rng, top_k=2), question_of(path, "q")


def ask_right(hop: int, entity: str, relation: str, previous: str | None) -> str:
    return f"{entity} {EVALUATED.terms[relation]}"


def lost_then_right(num_lost: int) -> ChooseQuery:
    """Asks for a document of nobody's `num_lost` times, then as `ask_right`."""
    asked: list[int] = []

    def choose(hop: int, entity: str, relation: str, previous: str | None) -> str:
        asked.append(hop)
        return "nonsense" if len(asked) <= num_lost else ask_right(hop, entity, relation, previous)

    return choose


def test_a_search_that_did_not_find_its_hop_is_asked_again() -> None:
    rng = random.Random(0)
    path = EVALUATED.sample_path(rng, SHAPE.entities, 2)
    script = Script(SHAPE, EVALUATED, SEARCH, path, rng, top_k=2, missing_share=1.0, max_searches=4)
    rollout = script.run(lost_then_right(2))
    start, relations = path[0].subject, [fact.relation for fact in path]
    thoughts = [text for kind, text in rollout.turns if kind is SpanKind.REASONING]
    wording = [f"need {relations[0]} of {start}", *[f"missing {relations[0]} of {start}"] * 2]
    assert thoughts == [*wording, f"need {relations[1]} of {path[0].object}", "found"]
    assert rollout.hops == (0, 0, 0, 1) and rollout.found == (False, False, True, True)
    assert rollout.queries[:2] == ("nonsense", "nonsense") and rollout.answer == path[1].object


def test_asking_again_leaves_a_search_for_every_hop_and_is_not_done_at_a_share_of_0() -> None:
    rng = random.Random(0)
    path = EVALUATED.sample_path(rng, SHAPE.entities, 3)
    for share, max_searches, hops in ((1.0, 5, (0, 0, 0, 1, 2)), (1.0, 2, (0, 1, 2)), (0.0, 9, (0, 1, 2))):
        script = Script(SHAPE, EVALUATED, SEARCH, path, rng, 2, share, max_searches)
        assert script.run(lambda hop, entity, relation, previous: "nonsense").hops == hops


def test_the_reader_copies_the_query_that_found_the_hop() -> None:
    rng = random.Random(0)
    path = EVALUATED.sample_path(rng, SHAPE.entities, 2)
    script = Script(SHAPE, EVALUATED, SEARCH, path, rng, top_k=2, missing_share=1.0, max_searches=4)
    sibling = script.run(lost_then_right(1))
    read = [script.run(script.reader([sibling])).queries for _ in range(40)]
    assert read.count(sibling.queries[1:]) > 30


def test_a_rollout_is_labelled_by_its_own_answer() -> None:
    rng = random.Random(0)
    labels = []
    for _ in range(200):
        script, question = make_script(rng)
        right, lost = script.run(ask_right), script.run(lambda hop, entity, relation, previous: "e0")
        labels.append(label_of(right, question))
        assert all(right.found) == (labels[-1] is Label.CORRECT)
        assert label_of(lost, question) is (Label.CORRECT if lost.answer == question.answers[0] else Label.INCORRECT)
    assert labels.count(Label.CORRECT) >= 195


def test_the_reader_copies_correct_siblings_only() -> None:
    rng = random.Random(0)
    copied: dict[bool, list[bool]] = {True: [], False: []}
    for _ in range(300):
        script, question = make_script(rng)
        sibling = script.run(script.guess)
        is_correct = label_of(sibling, question) is Label.CORRECT and all(sibling.found)
        copied[is_correct].append(script.run(script.reader([sibling])).queries == sibling.queries)
    assert sum(copied[True]) / len(copied[True]) > 0.85
    assert sum(copied[False]) / len(copied[False]) < 0.2


def test_no_fact_of_the_evaluated_world_occurs(demonstrations: list[Demonstration]) -> None:
    assert all(EXCLUDED.isdisjoint(fact.triple for fact in world.facts) for world in make().worlds)
    shown = {
        (subject, term.split("_")[0], value)
        for demonstration in demonstrations
        for kind, text in demonstration.turns
        if kind is SpanKind.OBSERVATION
        for subject, term, _, value, _ in map(str.split, text.split("\n"))
    }
    assert len(shown) > 500 and EXCLUDED.isdisjoint(shown)


def test_an_item_depends_on_seed_and_index_alone(demonstrations: list[Demonstration]) -> None:
    again = make()
    assert [again[index] for index in (1999, 0, 777)] == [demonstrations[index] for index in (1999, 0, 777)]
    assert again[-1] == demonstrations[-1] and again[3:5] == demonstrations[3:5]
    assert make(seed=1)[777] != demonstrations[777]
    with pytest.raises(IndexError):
        again[2000]


def test_another_process_makes_the_same_demonstrations(demonstrations: list[Demonstration]) -> None:
    code = "import runpy, sys; print(*runpy.run_path(sys.argv[1])['make']()[300:340], sep='\\n')"
    environment = {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    made = subprocess.run(
        [sys.executable, "-c", code, __file__], check=True, capture_output=True, text=True, env=os.environ | environment
    )
    assert made.stdout.splitlines() == [repr(demonstration) for demonstration in demonstrations[300:340]]
