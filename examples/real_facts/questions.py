"""Questions of one to three hops about the facts, for training and held out.

Invariants: the two parts share no country, city, capital, element or answer; every hop is a fact that the corpus
states, and its relation is a function, so the answer is the only one.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from examples.real_facts.facts import Fact, World, the
from sdsearch_lightning.scoring.normalization import normalize_answer

HELD_OUT_SHARE = 0.4
HELD_OUT_COUNTRY = "Kenya"
"""Of the question that the README asks."""
ASKED = {
    "currency": ("What currency is used in {x}?", "Which currency do people pay with in {x}?"),
    "currency_code": ("What is the code of the currency of {x}?", "Which currency code does {x} have?"),
    "domain": ("What is the internet domain of {x}?", "In which internet domain do web addresses of {x} end?"),
    "calling_code": ("What is the telephone calling code of {x}?", "Which calling code does one dial for {x}?"),
    "capital": ("What is the capital of {x}?", "Which city is the capital of {x}?"),
    "discoverer": ("Who discovered {x}?",),
    "year": ("In which year was {x} discovered?", "When was {x} discovered?"),
}
"""What is asked at the end of a chain."""
MEANT = {
    "located_in": ("the country where the city of {x} lies", "the country in which {x} is located"),
    "capital_of": ("the country whose capital is {x}",),
    "neighbour": ("the only country that borders on {x}", "the only neighbour of {x}"),
    "place": ("the country where {x} was discovered",),
    "symbol_of": ("the chemical element with the symbol {x}",),
    "number_of": ("the chemical element with atomic number {x}", "the element whose atomic number is {x}"),
}
"""How a place in the middle of a chain is meant by what lies before it."""
KINDS = {
    (): 0.10,
    ("located_in",): 0.36,
    ("capital_of",): 0.16,
    ("neighbour",): 0.03,
    ("located_in", "neighbour"): 0.08,
    ("capital_of", "neighbour"): 0.03,
    ("symbol_of",): 0.05,
    ("number_of",): 0.05,
    ("symbol_of", "place"): 0.07,
    ("number_of", "place"): 0.07,
}
"""Relations before the last one, and how often a question is of that kind, where there are enough."""


@dataclass(frozen=True)
class Chain:
    """Facts of which each begins where the one before ends: what a question asks for, step by step."""

    hops: tuple[Fact, ...]

    @property
    def names(self) -> frozenset[str]:
        """Everything on the way and the answer, as answers are compared."""
        return frozenset(normalize_answer(name) for hop in self.hops for name in (hop.subject, hop.object))

    @property
    def answer(self) -> str:
        """What the last fact gives: the gold answer."""
        return self.hops[-1].object

    @property
    def kind(self) -> tuple[str, ...]:
        """Relations before the last one."""
        return tuple(hop.relation for hop in self.hops[:-1])

    def ask(self, rng: random.Random) -> str:
        """The question in words."""
        first, last = self.hops[0], self.hops[-1]
        words = the(first.subject)
        if not self.kind and last.relation in ("discoverer", "year"):
            words = f"the element {words}"
        for hop in self.hops[:-1]:
            words = rng.choice(MEANT[hop.relation]).format(x=words)
        return rng.choice(ASKED[last.relation]).format(x=words)


@dataclass(frozen=True)
class Asked:
    """A question, and the chain that answers it."""

    text: str
    chain: Chain


def make_questions(world: World, seed: int, num_train: int, num_held_out: int) -> tuple[list[Asked], list[Asked]]:
    """Different questions for training, and held-out ones.

    Args:
        world: the facts.
        seed: decides what is held out, and which questions are drawn.
        num_train: for training.
        num_held_out: of the rest.
    """
    rng = random.Random(f"{seed}/split")
    parts: tuple[list[Chain], list[Chain]] = ([], [])
    held_out = _held_out(world, rng)
    for chain in _chains(world):
        sides = {entity in held_out for entity in _split_by(chain)}
        if len(sides) == 1:
            parts[sides.pop()].append(chain)
    train, test = _apart(*parts, rng)
    return (
        _draw(train, num_train, random.Random(f"{seed}/train")),
        _draw(test, num_held_out, random.Random(f"{seed}/held-out")),
    )


def _held_out(world: World, rng: random.Random) -> frozenset[str]:
    """Countries and elements; those that only one another border on stay together."""
    groups: dict[str, set[str]] = {name: {name} for name in world.countries}
    for name, facts in world.countries.items():
        if (other := facts.get("neighbour")) in groups:
            joined = groups[name] | groups[str(other)]
            for member in joined:
                groups[member] = joined
    units = [*{min(group): sorted(group) for group in groups.values()}.values(), *([name] for name in world.elements)]
    chosen = {member for unit in units if rng.random() < HELD_OUT_SHARE for member in unit}
    return frozenset(chosen | groups[HELD_OUT_COUNTRY])


def _split_by(chain: Chain) -> Iterator[str]:
    """Countries and elements of a chain: all that it passes, and its beginning where that is one."""
    if chain.hops[0].relation not in ("located_in", "capital_of", "symbol_of", "number_of"):
        yield chain.hops[0].subject
    yield from (hop.object for hop in chain.hops[:-1])


def _chains(world: World) -> Iterator[Chain]:
    """All that the facts allow, kind by kind."""
    countries, elements = world.countries, world.elements
    into_country = [Fact("located_in", city, name) for name, cities in world.cities.items() for city in cities]
    into_country += [Fact("capital_of", facts["capital"], name) for name, facts in countries.items()]
    ways: list[tuple[str, tuple[Fact, ...]]] = [(name, ()) for name in countries]
    ways += [(fact.object, (fact,)) for fact in into_country]
    for name, path in ways:
        yield from _ends(path, name, countries)
        if (other := countries[name].get("neighbour")) in countries:
            yield from _ends((*path, Fact("neighbour", name, str(other))), str(other), countries)
    for name, facts in elements.items():
        yield from _ends((), name, elements)
        for kind in ("symbol", "number"):
            step = Fact(f"{kind}_of", facts[kind], name)
            yield from _ends((step,), name, elements)
            if (place := facts.get("place")) is not None:
                yield from _ends((step, Fact("place", name, place)), place, countries)


def _ends(path: tuple[Fact, ...], name: str, known: dict[str, dict[str, str]]) -> Iterator[Chain]:
    is_of_its_capital = Fact("capital_of", known[name].get("capital", ""), name) in path
    for relation, found in known[name].items():
        if relation in ASKED and not (is_of_its_capital and relation == "capital"):
            yield Chain((*path, Fact(relation, name, found)))


def _apart(train: Sequence[Chain], test: Sequence[Chain], rng: random.Random) -> tuple[list[Chain], list[Chain]]:
    """Both parts without a name in common: one that both have, the Euro, goes to one of them."""
    names = [{name for chain in part for name in chain.names} for part in (train, test)]
    shared = sorted(names[0] & names[1])
    is_held_out = {name: rng.random() < HELD_OUT_SHARE for name in shared}
    asked = {name for chain in test if chain.hops[-1].subject == HELD_OUT_COUNTRY for name in chain.names}
    is_held_out |= dict.fromkeys(asked & is_held_out.keys(), True)
    return (
        [chain for chain in train if not any(is_held_out.get(name, False) for name in chain.names)],
        [chain for chain in test if all(is_held_out.get(name, True) for name in chain.names)],
    )


def _draw(chains: Sequence[Chain], count: int, rng: random.Random) -> list[Asked]:
    """Different questions, kinds by their shares as long as there are any, each answer as often as chance has it."""
    by_kind: dict[tuple[str, ...], list[Chain]] = defaultdict(list)
    for chain in chains:
        by_kind[chain.kind].append(chain)
    for found in by_kind.values():
        rng.shuffle(found)
    drawn: list[Asked] = []
    texts: set[str] = set()
    while len(drawn) < count:
        left = [kind for kind, found in by_kind.items() if found]
        assert left, f"the facts give {len(drawn)} questions, {count} were asked for"
        (kind,) = rng.choices(left, [KINDS[kind] for kind in left])
        chain = by_kind[kind].pop()
        text = chain.ask(rng)
        if text not in texts:
            texts.add(text)
            drawn.append(Asked(text, chain))
    return drawn
