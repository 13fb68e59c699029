"""exact_match and f1 against torchmetrics' port of the SQuAD v1.1 evaluation script."""

from __future__ import annotations

import random

import pytest
from torchmetrics.functional.text import squad

from sdsearch_lightning.scoring.rewards import exact_match, f1, normalize_answer

WORDS = "The a an of Paris paris U.S.A. usa twenty-one Beyoncé “quoted” 3,000 St. O'Neil  \t naïve (b) yes! no".split(
    " "
)


def squad_scores(prediction: str, golds: list[str]) -> tuple[float, float]:
    answers = {"answer_start": [0] * len(golds), "text": golds}
    scores = squad([{"prediction_text": prediction, "id": "0"}], [{"answers": answers, "id": "0"}])
    return scores["exact_match"].item() / 100, scores["f1"].item() / 100


def random_cases() -> list[tuple[str, list[str]]]:
    draw = random.Random(0)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 4)))

    return [(text(), [text() for _ in range(draw.randint(1, 3))]) for _ in range(2000)]


def rules_part(text: str) -> bool:
    return normalize_answer(text) in ("", "yes", "no")


def test_scores_equal_squads() -> None:
    cases = [case for case in random_cases() if not any(map(rules_part, (case[0], *case[1])))]
    matches, overlaps = 0, 0
    for prediction, golds in cases:
        expected_match, expected_f1 = squad_scores(prediction, golds)
        assert exact_match(prediction, golds) == expected_match, (prediction, golds)
        assert f1(prediction, golds) == pytest.approx(expected_f1, abs=1e-6), (prediction, golds)  # theirs is float32
        matches += expected_match == 1
        overlaps += 0 < expected_f1 < 1
    assert len(cases) > 1000 and matches > 20 and overlaps > 200  # the comparison saw every kind of case


def test_a_changed_prediction_is_noticed() -> None:
    expected_match, expected_f1 = squad_scores("the city of Paris", ["Paris"])
    assert exact_match("Paris", ["Paris"]) != expected_match
    assert f1("city Paris", ["Paris"]) != pytest.approx(expected_f1, abs=1e-6)
    assert f1("city of Paris", ["Paris"]) == pytest.approx(expected_f1, abs=1e-6)


def test_where_the_rules_part_on_purpose() -> None:
    """HotpotQA's whole verdicts, and no reward for an empty answer: as AutoRefine and FlashRAG score."""
    assert squad_scores("yes sir", ["yes"])[1] == pytest.approx(2 / 3)
    assert f1("yes sir", ["yes"]) == 0.0
    assert squad_scores("the", ["a"]) == (1.0, 1.0)
    assert (exact_match("the", ["a"]), f1("the", ["a"])) == (1.0, 0.0)
