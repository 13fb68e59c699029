"""Plug-ins are judged by their methods; a base class is a convenience."""

from __future__ import annotations

import re
from typing import Any

import pytest

from sdsearch_lightning.callbacks import RolloutGrouping
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.hindsight import BlockBuilder, QueriesAndLabels
from sdsearch_lightning.losses.divergences import Divergence, JensenShannon
from sdsearch_lightning.losses.teacher_use import RLSD, TeacherUse
from sdsearch_lightning.protocol.templates import Protocol, SearchR1Protocol
from sdsearch_lightning.retrieval import DenseRetriever, Retriever
from sdsearch_lightning.rollout import Engine, GenerateEngine
from sdsearch_lightning.schedules import Constant, Schedule
from sdsearch_lightning.scoring.rewards import ExactMatchReward, F1LabelRule, LabelRule, Reward

BASES = [
    (Retriever, ["search"], DenseRetriever),
    (Engine, ["attach", "run"], GenerateEngine),
    (Protocol, ["prompt_ids", "render_block"], SearchR1Protocol),
    (Reward, ["score"], ExactMatchReward),
    (LabelRule, ["label"], F1LabelRule),
    (BlockBuilder, ["build"], QueriesAndLabels),
    (Divergence, ["divergence"], JensenShannon),
    (TeacherUse, ["weigh"], RLSD),
    (Schedule, ["factor"], Constant),
]


def duck(*methods: str) -> type:
    """A class without annotations or bases."""
    return type("Duck", (), {name: lambda self, *args: None for name in methods})


@pytest.mark.parametrize(("base", "methods", "ours"), BASES, ids=[base.__name__ for base, _, _ in BASES])
def test_what_counts_is_what_a_class_can_do(base: type, methods: list[str], ours: type) -> None:
    assert list(base.required) == methods  # type: ignore[attr-defined]
    assert issubclass(duck(*methods), base) and isinstance(duck(*methods)(), base)
    for missing in methods:
        assert not issubclass(duck(*(name for name in methods if name != missing)), base)
    assert issubclass(ours, base) and not issubclass(ours, tuple(b for b, _, _ in BASES if b is not base))


def test_a_value_is_no_method() -> None:
    assert not issubclass(type("Duck", (), {"search": "yes"}), Retriever)


def test_look_alikes_of_a_base_are_not_taken_for_its_subclasses() -> None:
    """Or every retriever would be a DenseRetriever."""
    assert not issubclass(duck("search"), DenseRetriever)
    assert not issubclass(duck("prompt_ids", "render_block"), SearchR1Protocol)


# Adoption


def slotted(*methods: str, **values: object) -> Any:
    """An object that can be given nothing."""
    return type("Duck", (), {"__slots__": (), **{name: lambda self, *args: None for name in methods}, **values})()


def test_what_a_look_alike_lacks_it_is_given_and_what_it_has_it_keeps() -> None:
    found: Any = duck("attach", "run", "sync")()
    assert Engine.adopt(found) is found
    assert found.draws is True and found.is_exact is True and found.step_back() is False
    assert found.step_back.__self__ is found and found.sync() is None and "sync" not in vars(found)
    found = duck("attach", "run")()
    found.draws = False
    assert Engine.adopt(found).draws is False


def test_what_can_be_given_nothing_is_refused_by_name() -> None:
    message = "Duck lacks 'is_exact' and can be given none, since it has __slots__. Derive it from Engine, or write "
    with pytest.raises(ConfigError, match=re.escape(f"{message}'is_exact'.")) as caught:
        Engine.adopt(slotted("attach", "run"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="Duck lacks 'draws'"):
        RolloutGrouping(engine=slotted("attach", "run", is_exact=True))


def test_slots_do_no_harm_where_nothing_is_missing() -> None:
    whole = slotted("attach", "run", "step_back", "sync", "sleep", "wake", is_exact=False, draws=False)
    assert Engine.adopt(whole) is whole
