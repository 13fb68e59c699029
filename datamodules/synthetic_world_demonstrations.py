"""Written rollouts for the cold start: the form of a rollout, how to read a passage, how to read a hindsight block.

They come from other worlds than the evaluated one, and are of mixed quality on purpose: their terms are guesses, so
a policy trained on them knows how to search but not which words the evaluated world understands. Where a demonstration
holds a block, its searches copy those of CORRECT siblings; without a CORRECT sibling they are the plain guesses, so
that the mere presence of a block does not help. Invariant: item i depends on (seed, i) alone and nothing is stored.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

from sdsearch_lightning.datamodules.synthetic_world_encoder import Vectors, WorldSearch
from sdsearch_lightning.datamodules.synthetic_world_generation import (
    MISSING,
    Fact,
    World,
    WorldShape,
    generate_world,
    question_of,
)
from sdsearch_lightning.types import Demonstration, Label, Question, SiblingRecord, SpanKind

COPY_PROBABILITY = 0.97
NUM_SIBLINGS = (2, 8)
SIBLING_QUALITY_EXPONENT = 1.5
_FULL, _NO_ENTITY, _NO_TERM, _OTHER_TERM, _REPEAT = range(5)
_PLAIN_MIX = (0.64, 0.10, 0.10, 0.08, 0.08)

Turns = tuple[tuple[SpanKind, str], ...]
ChooseQuery = Callable[[int, str, str, str | None], str]
"""(hop, entity, relation, previous query) -> query."""


@dataclass(frozen=True, slots=True)
class ScriptedRollout:
    """One scripted run: a search per hop, whatever it finds, and some that ask again."""

    turns: Turns
    queries: tuple[str, ...]
    hops: tuple[int, ...]
    """Per query: the hop it was for."""
    found: tuple[bool, ...]
    """Per query: the passages held the fact of the path."""
    answer: str


class WorldDemonstrations(Sequence[Demonstration]):
    """`length` demonstrations, made when asked for and alike at every index: they may be read in any order.

    Args:
        shape: words and sizes of the worlds.
        vectors: word vectors of the search engine, the same for all worlds.
        excluded: triples that must not occur: those of the evaluated world.
        hop_mix: weights of 1, 2, ... hops.
        block_share: share of demonstrations with a hindsight block.
        top_k: passages per search.
        missing_share: how often a search that did not find what its thought needed is followed by one for the same hop.
        max_searches: searches of a rollout, as far as those that ask again go: every hop has one.
    """

    def __init__(
        self,
        shape: WorldShape,
        vectors: Vectors,
        excluded: frozenset[tuple[str, str, str]],
        *,
        length: int,
        num_worlds: int,
        hop_mix: Sequence[float],
        block_share: float,
        top_k: int,
        seed: int,
        missing_share: float = 0.0,
        max_searches: int = 4,
    ) -> None:
        self.worlds = tuple(
            generate_world(shape, [shape.entities], random.Random(f"{seed}/cold-start-world/{index}"), excluded)
            for index in range(num_worlds)
        )
        self._searches: list[WorldSearch | None] = [None] * num_worlds
        self._shape, self._vectors, self._length, self._seed, self._top_k = shape, vectors, length, seed, top_k
        self._hop_mix, self._block_share = tuple(hop_mix), block_share
        self._missing_share, self._max_searches = missing_share, max_searches

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Demonstration: ...
    @overload
    def __getitem__(self, index: slice) -> list[Demonstration]: ...
    def __getitem__(self, index: int | slice) -> Demonstration | list[Demonstration]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(f"demonstration {index} of {self._length}")
        return self._demonstration(index % self._length)

    def _demonstration(self, index: int) -> Demonstration:
        rng = random.Random(f"{self._seed}/demonstration/{index}")
        world_index = rng.randrange(len(self.worlds))
        world = self.worlds[world_index]
        (num_hops,) = rng.choices(range(1, len(self._hop_mix) + 1), self._hop_mix)
        path = world.sample_path(rng, self._shape.entities, num_hops)
        question = question_of(path, f"demonstration-{index}")
        search, shares = self._search(world_index), (self._missing_share, self._max_searches)
        script = Script(self._shape, world, search, path, rng, self._top_k, *shares)
        if rng.random() >= self._block_share:
            return Demonstration(question, script.run(script.guess).turns)
        siblings = script.run_siblings()
        records = tuple(
            SiblingRecord(position, sibling.queries, label_of(sibling, question))
            for position, sibling in enumerate(siblings)
        )
        return Demonstration(question, script.run(script.reader(siblings)).turns, records)

    def _search(self, world_index: int) -> WorldSearch:
        search = self._searches[world_index]
        if search is None:
            search = self._searches[world_index] = WorldSearch(self._vectors, self.worlds[world_index].documents)
        return search


def label_of(rollout: ScriptedRollout, question: Question) -> Label:
    """CORRECT where the answer is the gold answer, which is one word."""
    return Label.CORRECT if rollout.answer in question.answers else Label.INCORRECT


class Script:
    """Scripted rollouts of one question: the queries differ, the reading of passages never does."""

    def __init__(
        self,
        shape: WorldShape,
        world: World,
        search: WorldSearch,
        path: Sequence[Fact],
        rng: random.Random,
        top_k: int,
        missing_share: float = 0.0,
        max_searches: int = 4,
    ) -> None:
        self._shape, self._world, self._search = shape, world, search
        self._path, self._rng, self._top_k = path, rng, top_k
        self._missing_share, self._max_searches = missing_share, max_searches

    def run(self, choose: ChooseQuery) -> ScriptedRollout:
        """Search for each hop with what `choose` asks, go on from what was read, answer with the last entity."""
        turns: list[tuple[SpanKind, str]] = []
        queries: list[str] = []
        hops: list[int] = []
        found: list[bool] = []
        entity, word, hop = self._path[0].subject, "need", 0
        while hop < len(self._path):
            step = self._path[hop]
            query = choose(hop, entity, step.relation, queries[-1] if queries else None)
            facts = [self._world.facts[index] for index in self._search.search(query, self._top_k)]
            turns += [
                (SpanKind.REASONING, f"{word} {step.relation} of {entity}"),
                (SpanKind.QUERY, query),
                (SpanKind.OBSERVATION, "\n".join(fact.document for fact in facts)),
            ]
            queries.append(query)
            hops.append(hop)
            found.append(step in facts)
            answer = _read(facts, entity, step.relation)
            if answer is None and self._asks_again(len(queries) + len(self._path) - hop):
                word = MISSING
                continue
            # Where the passages do not say it, the script goes on from what the first one says.
            entity, word, hop = answer or facts[0].object, "need", hop + 1
        turns += [(SpanKind.REASONING, "found"), (SpanKind.ANSWER, entity)]
        return ScriptedRollout(tuple(turns), tuple(queries), tuple(hops), tuple(found), entity)

    def _asks_again(self, num_searches: int) -> bool:
        """Drawn at random where `num_searches`, one more for this hop and one for each after it, are allowed."""
        # Nothing is drawn at a share of 0: the other draws stay as they are.
        allowed = self._missing_share > 0 and num_searches <= self._max_searches
        return allowed and self._rng.random() < self._missing_share

    def guess(self, hop: int, entity: str, relation: str, previous: str | None) -> str:
        """The plain mixture: mostly a full query with a random term of the relation, and four kinds of mistakes."""
        (kind,) = self._rng.choices(range(len(_PLAIN_MIX)), _PLAIN_MIX)
        term = self._rng.choice(self._shape.terms(relation))
        if kind == _NO_ENTITY:
            return term
        if kind == _NO_TERM:
            return entity
        if kind == _OTHER_TERM:
            others = [other for other in self._shape.relations if other != relation]
            return f"{entity} {self._rng.choice(self._shape.terms(self._rng.choice(others)))}"
        if kind == _REPEAT and previous is not None:
            return previous
        return f"{entity} {term}"

    def run_siblings(self) -> list[ScriptedRollout]:
        """2 to 8 rollouts that know the right term with a probability drawn once per question."""
        quality = self._rng.random() ** SIBLING_QUALITY_EXPONENT

        def choose(hop: int, entity: str, relation: str, previous: str | None) -> str:
            if self._rng.random() < quality:
                return f"{entity} {self._world.terms[relation]}"
            return self.guess(hop, entity, relation, previous)

        return [self.run(choose) for _ in range(self._rng.randint(*NUM_SIBLINGS))]

    def reader(self, siblings: Sequence[ScriptedRollout]) -> ChooseQuery:
        """What a good reader of the block asks: what a CORRECT sibling asked where it found this hop, else a guess."""
        correct = [sibling for sibling in siblings if sibling.answer == self._path[-1].object]

        def choose(hop: int, entity: str, relation: str, previous: str | None) -> str:
            good = [
                query
                for sibling in correct
                for query, query_hop, found in zip(sibling.queries, sibling.hops, sibling.found, strict=True)
                if query_hop == hop and found
            ]
            if good and self._rng.random() < COPY_PROBABILITY:
                return self._rng.choice(good)
            return self.guess(hop, entity, relation, previous)

        return choose


def _read(facts: Sequence[Fact], entity: str, relation: str) -> str | None:
    """The object the passages give for (entity, relation); None where they do not."""
    answers = (fact.object for fact in facts if (fact.subject, fact.relation) == (entity, relation))
    return next(answers, None)
