"""A script that answers the questions of real_facts by searching: what `sdsearch demonstrate` makes demonstrations of.

Its queries are of mixed quality on purpose: a model that learns from it knows how to search, and reinforcement finds
out which words the encoder understands. Its reading never lies: what the passages do not say is asked again, or not
known.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from sdsearch_lightning.datamodules.scripts import Answer, Search, Task
from sdsearch_lightning.types import Label, Passage

GOOD_SHARES = (0.2, 0.6, 1.0)
"""How often the first query for a fact is well put; a rollout is of one of these kinds."""
AGAIN_SHARE = 0.5
"""How often one that found nothing is put again, in other words."""
UNKNOWN = "unknown"
"""The answer where nothing was found. A guess, a title say, would be learnt as a way to answer."""
WELL_PUT = {
    "located_in": ("{x} city", "which country is {x} in", "{x} is a city in"),
    "capital_of": ("{x} is the capital of which country", "{x} capital city"),
    "neighbour": ("neighbours of {x}", "which countries border {x}"),
    "place": ("discovery of {x}", "where was {x} discovered"),
    "symbol_of": ("chemical element with the symbol {x}", "symbol {x} element"),
    "number_of": ("chemical element with atomic number {x}", "atomic number {x}"),
    "currency": ("currency of {x}", "currency used in {x}"),
    "currency_code": ("currency of {x}", "code of the currency of {x}"),
    "domain": ("internet domain of {x}", "{x} internet domain"),
    "calling_code": ("telephone calling code of {x}", "calling code of {x}"),
    "capital": ("capital of {x}", "{x} capital city"),
    "discoverer": ("who discovered {x}", "discovery of {x}"),
    "year": ("discovery of {x}", "when was {x} discovered"),
}
"""Queries by relation."""
POORLY_PUT = ("{x}", "facts about {x}", "{question}")
"""Queries that find it at times."""
NEEDED = {
    "located_in": "the country of {x}",
    "capital_of": "the country whose capital is {x}",
    "neighbour": "the neighbour of {x}",
    "place": "where {x} was discovered",
    "symbol_of": "the element with the symbol {x}",
    "number_of": "the element with atomic number {x}",
    "currency": "the currency of {x}",
    "currency_code": "the currency code of {x}",
    "domain": "the internet domain of {x}",
    "calling_code": "the calling code of {x}",
    "capital": "the capital of {x}",
    "discoverer": "who discovered {x}",
    "year": "when {x} was discovered",
}
"""What a thought says before a search."""

Steps = Generator[Search | Answer, list[Passage], None]


def script(task: Task) -> Steps:
    """One rollout: a search for each fact of the chain, and another where it found nothing.

    Where siblings are told, the queries are those of the shortest CORRECT one: each of its queries found something.
    """
    hints, good_share = _hints(task), task.rng.choice(GOOD_SHARES)
    for relation, subject, found in task.row["metadata"]["hops"]:
        need = NEEDED[relation].format(x=subject)
        query = hints.pop(0) if hints else _first_query(task, good_share, relation, subject)
        passages = yield Search(query, thought=f"I need to find {need}.")
        if not _states(passages, subject, found):
            hints = []
            if task.rng.random() < AGAIN_SHARE:
                others = [put for way in WELL_PUT[relation] if (put := way.format(x=subject)) != query]
                query = task.rng.choice(others)
                passages = yield Search(query, thought=f"Not found. I still need {need}.")
            if not _states(passages, subject, found):
                yield Answer(UNKNOWN, thought=f"I did not find {need}.")
                return
    yield Answer(found, thought=f"The answer is {found}.")


def _hints(task: Task) -> list[str]:
    correct = [sibling.queries for sibling in task.siblings if sibling.label is Label.CORRECT]
    return list(min(correct, key=len, default=()))


def _first_query(task: Task, good_share: float, relation: str, subject: str) -> str:
    ways: Sequence[str] = WELL_PUT[relation] if task.rng.random() < good_share else POORLY_PUT
    return task.rng.choice(ways).format(x=subject, question=task.question.text)


def _states(passages: Sequence[Any], subject: str, found: str) -> bool:
    """Whether a passage names both."""
    return any(subject in passage.contents and found.lower() in passage.contents.lower() for passage in passages)
