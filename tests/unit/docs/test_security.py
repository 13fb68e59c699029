"""docs/security.md: each promise names a test that is there, and each limit is the default."""

import re
from pathlib import Path

import pytest

from helpers.paths import ROOT
from sdsearch_lightning.retrieval.server.limits import ServerLimits

PAGE = (ROOT / "docs/security.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", PAGE, re.MULTILINE))
PROMISES = {name: re.findall(r"^\| (.+) \|$", text, re.MULTILINE)[2:] for name, text in SECTIONS.items()}
FOREIGN = "tests/unit/test_foreign_files.py"


def source_of(section: str) -> str:
    """The tests of a section that are named without a file."""
    place = re.search(r"tests are in `(tests/[\w/]+/)`", SECTIONS[section])
    paths = sorted((ROOT / place[1]).glob("test_*.py")) if place else [ROOT / FOREIGN]
    return "".join(path.read_text() for path in paths)


@pytest.mark.parametrize("section", [name for name, rows in PROMISES.items() if rows])
def test_each_promise_has_a_test(section: str) -> None:
    above = ""
    for row in PROMISES[section]:
        promise, *_, tests = row.split(" | ")
        tests = above if tests == "the same" else tests
        assert re.search(r"`tests/|`benchmarks/|`test_|`\[", tests), f"no test beside {promise!r}"
        for path in re.findall(r"`((?:tests|benchmarks)/[\w/.]+)`", tests):
            assert (ROOT / path).is_file(), f"{path} is not there, beside {promise!r}"
        for name in re.findall(r"`(test_\w+)", tests):
            files = [ROOT / path for path in re.findall(r"`(tests/[\w/.]+)`", tests)]
            assert f"def {name}(" in source_of(section) + "".join(map(Path.read_text, files)), name
        for case in re.findall(r"\[([\w -]+?)(?: ?\.\.\.|-encoder)?\]", tests):
            assert f'"{case}' in source_of(section), f"no case {case!r}, beside {promise!r}"
        above = tests


def test_every_section_of_promises_was_found() -> None:
    wanted = {"Files of somebody else's", "Secrets", "Terminal and page", "Damaged state", "Servers", "Data"}
    assert wanted <= {name for name, rows in PROMISES.items() if rows}
    assert all("ot promised" in SECTIONS[name] for name in wanted)


def test_limits_are_those_of_the_server() -> None:
    limits = ServerLimits()
    numbers = re.findall(r"\| `(\w+)` (\d+)(?: \(flag\))? \|", SECTIONS["Servers"])
    assert len(numbers) == 9
    assert all(getattr(limits, name) == float(number) for name, number in numbers)
    waiting = limits.max_queued_queries + limits.max_request_queries - 1
    assert f"up\n  to {waiting} of up to {limits.max_query_chars} characters" in SECTIONS["Servers"]
