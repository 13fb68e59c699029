"""The embedded world: entities, facts and the one index term per relation that its documents use.

A question says `rel3`; the documents of a world say one of `rel3_a rel3_b ...`, drawn once per world. Which one is
knowledge of that world only, so a policy has to learn it by searching. Invariant: a fact never leaves its group of
entities, so questions that start in different groups share no start, bridge or answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_lowercase

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.types import Label, Question

MISSING = "missing"
"""Begins the thought after a search that did not find what was needed; a word of worlds that show such searches."""
_MIN_ENTITIES = 30  # with fewer, a held-out group may hold no path of three hops at all
_MAX_TRIES = 1000
_FUNCTION_WORDS = ("question", "the", "?", "need", "of", "found", "is", ".")
_PROTOCOL_WORDS = ("siblings", *Label, ";", "none", "invalid", "action")  # of configs/protocol/synthetic_world.yaml


@dataclass(frozen=True, slots=True)
class WorldShape:
    """The words of a family of worlds, and how many facts each entity has."""

    num_entities: int
    num_relations: int
    terms_per_relation: int
    facts_per_entity: int

    def __post_init__(self) -> None:
        if not 1 <= self.facts_per_entity <= self.num_relations:
            raise ConfigError(
                f"data.facts_per_entity: expected 1 to num_relations ({self.num_relations}), found "
                f"{self.facts_per_entity}. An entity has at most one fact per relation."
            )
        if not 1 <= self.terms_per_relation <= len(ascii_lowercase):
            raise ConfigError(f"data.terms_per_relation: expected 1 to 26 (a to z), found {self.terms_per_relation}.")
        if self.num_entities < _MIN_ENTITIES:
            raise ConfigError(f"data.num_entities: expected at least {_MIN_ENTITIES}, found {self.num_entities}.")

    @property
    def entities(self) -> tuple[str, ...]:
        """The words that name entities: `e0 e1 ...`."""
        return tuple(f"e{index}" for index in range(self.num_entities))

    @property
    def relations(self) -> tuple[str, ...]:
        """`rel0 rel1 ...`, the words of the questions."""
        return tuple(f"rel{index}" for index in range(self.num_relations))

    def terms(self, relation: str) -> tuple[str, ...]:
        """`rel3_a rel3_b ...`, of which a world's documents use one."""
        return tuple(f"{relation}_{letter}" for letter in ascii_lowercase[: self.terms_per_relation])

    @property
    def all_terms(self) -> tuple[str, ...]:
        """The terms of all relations."""
        return tuple(term for relation in self.relations for term in self.terms(relation))

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Every word of the world and of the texts its configuration gives the protocol, but no tags."""
        return (*_FUNCTION_WORDS, *map(str, _PROTOCOL_WORDS), *self.relations, *self.all_terms, *self.entities)

    def groups(self, train_share: float = 2 / 3) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Training and held-out entities: no fact of a world with these groups leads from one to the other."""
        cut = round(self.num_entities * train_share)
        return self.entities[:cut], self.entities[cut:]


@dataclass(frozen=True, slots=True)
class Fact:
    """`subject relation object`, written with the world's `term` for the relation."""

    subject: str
    relation: str
    term: str
    object: str

    @property
    def document(self) -> str:
        """The one document of this fact."""
        return f"{self.subject} {self.term} is {self.object} ."

    @property
    def triple(self) -> tuple[str, str, str]:
        """What the fact says, whatever the term."""
        return self.subject, self.relation, self.object


@dataclass(frozen=True)
class World:
    """One world: the term of each relation and the facts of each entity. Document i states fact i."""

    terms: Mapping[str, str]
    facts: tuple[Fact, ...]
    facts_of: Mapping[str, tuple[Fact, ...]]

    @property
    def documents(self) -> list[str]:
        """One document per fact."""
        return [fact.document for fact in self.facts]

    def sample_path(self, rng: random.Random, starts: Sequence[str], num_hops: int) -> tuple[Fact, ...]:
        """A chain of `num_hops` facts from one of `starts` that visits no entity twice.

        Raises:
            ConfigError: none was found in many tries; only worlds with very few facts have none.
        """
        for _ in range(_MAX_TRIES):
            path = [rng.choice(self.facts_of[rng.choice(starts)])]
            visited = {path[0].subject, path[0].object}
            while len(path) < num_hops:
                onward = [fact for fact in self.facts_of[path[-1].object] if fact.object not in visited]
                if not onward:
                    break
                path.append(rng.choice(onward))
                visited.add(path[-1].object)
            if len(path) == num_hops:
                return tuple(path)
        raise ConfigError(f"data: the world has no path of {num_hops} hops. Raise facts_per_entity or num_entities.")


def generate_world(
    shape: WorldShape,
    groups: Iterable[Sequence[str]],
    rng: random.Random,
    excluded: frozenset[tuple[str, str, str]] = frozenset(),
) -> World:
    """A world with random terms and facts; objects stay in their subject's group, no triple of `excluded` occurs."""
    terms = {relation: rng.choice(shape.terms(relation)) for relation in shape.relations}
    facts_of: dict[str, tuple[Fact, ...]] = {}
    for group in groups:
        for subject in group:
            relations = rng.sample(shape.relations, shape.facts_per_entity)
            facts_of[subject] = tuple(
                Fact(subject, relation, terms[relation], _object(subject, relation, group, rng, excluded))
                for relation in relations
            )
    return World(terms, tuple(fact for facts in facts_of.values() for fact in facts), facts_of)


def _object(
    subject: str, relation: str, group: Sequence[str], rng: random.Random, excluded: frozenset[tuple[str, str, str]]
) -> str:
    while True:
        candidate = rng.choice(group)
        if candidate != subject and (subject, relation, candidate) not in excluded:
            return candidate


def question_of(path: Sequence[Fact], question_id: str) -> Question:
    """`question e5 the rel3 the rel7 ?`: relations in hop order, answered by the last object."""
    hops = " ".join(f"the {fact.relation}" for fact in path)
    return Question(question_id, f"question {path[0].subject} {hops} ?", (path[-1].object,), f"{len(path)}-hop")


def sample_questions(
    world: World, rng: random.Random, starts: Sequence[str], hop_mix: Sequence[float], prefix: str
) -> Iterator[Question]:
    """An endless stream of different questions from `starts`; `hop_mix` weighs 1, 2, ... hops."""
    asked: set[str] = set()
    while True:
        (num_hops,) = rng.choices(range(1, len(hop_mix) + 1), hop_mix)
        for _ in range(_MAX_TRIES):
            question = question_of(world.sample_path(rng, starts, num_hops), f"{prefix}-{len(asked)}")
            if question.text not in asked:
                break
        else:
            raise ConfigError(
                f"data: the world has no more {num_hops}-hop questions after {len(asked)} {prefix} questions. "
                "Ask for fewer questions, or raise num_entities or facts_per_entity."
            )
        asked.add(question.text)
        yield question
