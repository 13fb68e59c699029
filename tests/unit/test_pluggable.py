"""Plug-ins are judged by their methods; a base class is a convenience."""

from __future__ import annotations

import pytest

from sdsearch_lightning.hindsight import BlockBuilder, QueriesAndLabels
from sdsearch_lightning.losses.divergences import Divergence, JensenShannon
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
