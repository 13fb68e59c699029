"""Rules by which answers are the same: English as the peers have it, and the same for any script."""

from __future__ import annotations

import random
import re
import string
import unicodedata
from dataclasses import replace

import pytest

from helpers.reports import city_rollout, read_lines, write_records
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.report.example import is_correct
from sdsearch_lightning.scoring.normalization import normalize_answer
from sdsearch_lightning.scoring.query_credit import AnswerEvidence
from sdsearch_lightning.scoring.rewards import (
    AutoRefineReward,
    ExactMatchLabelRule,
    ExactMatchReward,
    F1LabelRule,
    F1Reward,
    exact_match,
    f1,
    holds_gold,
    substring_match,
)
from sdsearch_lightning.scoring.scores import RolloutScores
from sdsearch_lightning.types import Label, Passage, Question, RolloutGroup, Trajectory


def search_r1(text: str) -> str:
    """SQuAD's rule as Search-R1 has it (verl/utils/reward_score/qa_em.py), step by step."""
    text = text.lower()
    text = "".join(character for character in text if character not in set(string.punctuation))
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return " ".join(text.split())


def texts(alphabet: str) -> list[str]:
    dice = random.Random(0)
    words = ["the", "A", "an", "U.S.", "yes", *map("".join, (dice.choices(alphabet, k=4) for _ in range(40)))]
    return [dice.choice(["", " ", "-", "\t"]).join(dice.choices(words, k=5)) for _ in range(300)]


@pytest.mark.parametrize("text", ["Ｔｈｅ １９６９", "The Café", "北京。", "“Paris”", "\u200bthe\u00a0x", "İstanbul"])
def test_english_is_the_peers_to_the_byte(text: str) -> None:
    assert normalize_answer(text) == search_r1(text)


def test_english_is_the_peers_and_on_ascii_every_rule_is() -> None:
    for text in texts(string.printable + "äß北京。１2\u3000"):
        assert normalize_answer(text) == search_r1(text)
    for text in texts(string.printable):
        assert normalize_answer(text, "unicode") == search_r1(text)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("café", unicodedata.normalize("NFD", "café")),
        ("１９６９年", "1969年"),
        ("١٩٦٩", "1969"),
        ("Ｔｏｋｙｏ", "tokyo"),
        ("東京。", "東京"),
        ("「東京」", "東京"),
        ("東京　タワー", "東京タワー"),
        ("ﾀﾜｰ", "タワー"),
        ("“Paris”", "Paris"),
        ("Jean‑Paul", "Jean-Paul"),
        ("STRASSE", "Straße"),
        ("\ufeffParis\u200b", "the Paris"),
        ("¿Qué?", "qué"),
    ],
)
def test_unicode_takes_for_the_same_what_readers_do(one: str, other: str) -> None:
    assert exact_match(one, [other], "unicode") == f1(one, [other], "unicode") == 1.0
    assert exact_match(one, [other]) == 0.0, "English does not"


@pytest.mark.parametrize(
    ("one", "other"), [("café", "cafe"), ("東京", "京都"), ("1969", "1970"), ("ガ", "カ"), ("。", "")]
)
def test_unicode_keeps_apart_what_differs(one: str, other: str) -> None:
    assert exact_match(one, [other or "京"], "unicode") == 0.0


def test_words_are_characters_where_there_are_no_spaces() -> None:
    assert f1("北京市", ["北京"], "unicode") == pytest.approx(0.8) and f1("北京市", ["北京"]) == 0.0
    assert substring_match("在北京市", ["北京"], "unicode") == 1.0
    assert holds_gold(["北京"], ["中国的首都是北京。"], "unicode") and not holds_gold(["北京"], ["中国的首都是北京。"])
    assert not holds_gold(["Rom"], ["Rome, 北京"], "unicode"), "elsewhere words stay whole"


def test_another_rule_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"normalization: expected one of english, unicode, found 'latin'"):
        normalize_answer("x", "latin")


ASKED = Question("q", "哪年？", ("1969年",), normalization="unicode")


def rollout(rule: str, answer: str = "１９６９年。") -> Trajectory:
    found = (Passage("p", "人类在１９６９年登上月球。"),)
    made = city_rollout(question=replace(ASKED, normalization=rule))
    return replace(made, answer=answer, passages=(found,), refinements=("１９６９年",))


@pytest.mark.parametrize(("rule", "value"), [("unicode", 1.0), ("english", 0.0)])
def test_everything_that_compares_asks_the_question_for_its_rule(tmp_path, rule: str, value: float) -> None:
    made = rollout(rule)
    label = Label.CORRECT if value else Label.INCORRECT
    assert ExactMatchReward().score(made) == F1Reward().score(made) == value
    assert AutoRefineReward(0.25).score(replace(made, answer="月")) == 0.25 * value
    assert ExactMatchLabelRule().label(made) == F1LabelRule().label(made) == label
    assert AnswerEvidence().assign(RolloutGroup(made.question, (0, 0), (made,))) == [[value]]
    scores = RolloutScores()
    scores.update([made])
    found = scores.compute()
    assert [found[name].item() for name in ("exact_match", "f1", "substring_match")] == [value] * 3
    write_records(path := tmp_path / "trajectories.jsonl", [made], "val", 1)
    (record,) = read_lines(path)
    assert is_correct(record) == bool(value)
    assert ("normalization" in record["question"]) == (rule != "english"), "schema 1 as it was"


def test_the_rule_is_no_part_of_what_a_checkpoint_knows_a_question_by() -> None:
    assert repr(ASKED) == repr(replace(ASKED, normalization="english"))
