"""The page as a person meets it, in headless Chromium: what its script shows and what keys and clicks do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.browser import CHROMIUM, Browser
from helpers.reports import city_rollout, credit, read_lines, write_records, write_run
from sdsearch_lightning.report import compare_runs, print_report
from sdsearch_lightning.report.trajectories import append_records

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path: the page is not looked at")
EVIL = "</script><script>window.evil=1</script><img src=x onerror=window.evil=1><!--\u2028"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as started:
        yield started


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two mixed groups at step 2 and a wrong one at step 3."""
    folder = tmp_path_factory.mktemp("runs") / "<script>window.evil=1<img src=x onerror=window.evil=1>\x1b[31m"
    folder.mkdir()
    write_run(folder)
    path = folder / "trajectories.jsonl"
    for place, answers in ((8, ("Rome", "Oslo")), (9, ("Oslo", "Oslo"))):
        for index, answer in enumerate(answers):
            queries = ("capital of Italy", "where is Rome")
            rollout = city_rollout(answer, instance_id=(0, place), index=index, queries=queries)
            write_records(path, [rollout], "train", place - 6, block=EVIL, credit=credit(rollout))
    records = read_lines(path)
    for record in records:
        record["question"]["text"] = f"{EVIL} {record['instance_id'][1]}"
    path.unlink()
    append_records(path, records)
    print_report(folder)
    return folder


@pytest.fixture
def page(browser: Browser, run: Path) -> Browser:
    browser.problems.clear()
    browser.open(run / "report.html")
    return browser


def texts(page: Browser, selector: str) -> list[str]:
    return page.value(f"[...document.querySelectorAll({selector!r})].map((one) => one.textContent)")


def click(page: Browser, selector: str) -> None:
    page.value(f"document.querySelector({selector!r}).click()")


def test_hostile_text_is_shown_and_never_run(page: Browser) -> None:
    assert page.value("window.evil") is None and page.problems == []
    (asked,) = page.value("[...document.querySelectorAll('.group .asked')].map((one) => one.firstChild.textContent)")
    assert asked.startswith("</script><script>window.evil=1</script><img src=x onerror=window.evil=1>")
    assert page.value("document.images.length") == 0


def test_the_content_policy_stops_a_script_that_got_in(page: Browser) -> None:
    page.value("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.evil=2'}))")
    page.value("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.evil=3\">')")
    page.value("new Promise((done) => setTimeout(done, 50))")
    assert page.value("window.evil") is None
    assert any("Content Security Policy" in problem for problem in page.problems)


def test_step_outcome_and_words_choose_what_is_listed(page: Browser) -> None:
    choose = "document.querySelector('.stepper select')"
    page.value(f"({choose}.value = '', {choose}.onchange())")
    assert texts(page, "[data-outcome]") == ["all 3", "mixed 2", "right 0", "wrong 1"]
    click(page, "[data-outcome=wrong]")
    assert len(texts(page, ".entry")) == 1 and "question 0.9" in texts(page, ".about")[0]
    click(page, "[data-outcome=right]")
    assert texts(page, ".entry") == [] and "No group is like that" in texts(page, ".list")[0]
    assert texts(page, ".map") == []
    click(page, "[data-outcome=all]")
    page.value("(words = document.querySelector('input'), words.value = '--> 7', words.oninput())")
    assert texts(page, ".entry") == []
    page.value("(words.value = ' 7', words.oninput())")
    assert len(texts(page, ".entry")) == 1 and "question 0.7" in texts(page, ".about")[0]


def test_a_token_tells_its_numbers_on_click_and_by_keyboard(page: Browser) -> None:
    page.value("open(DATA.groups.find((group) => group.step === 2 && group.instance[1] === 8), 0)")
    assert texts(page, ".detail") == []
    click(page, "[data-query='0'][data-token='0']")
    (told,) = texts(page, ".detail")
    assert "capital was written. The teacher gives it 1.3 times the student's probability" in told
    assert "teacher − student +0.25 nats, JSD 0.100 nats" in told
    assert "student61 %" in told and "teacher78 %" in told and "where60 %" not in told
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert "Italy was written. It is outside the teacher's top-k" in texts(page, ".detail")[0]
    page.press("ArrowRight")  # into the next query
    assert page.value("document.activeElement.dataset.query + document.activeElement.dataset.token") == "10"
    page.press("Escape")
    assert texts(page, ".detail") == []


def test_questions_and_siblings_go_by_keys_and_the_address_keeps_them(page: Browser) -> None:
    page.value("open(DATA.groups.find((group) => group.step === 2), 0)")
    page.press("2")
    assert texts(page, ".card h3 span")[0].startswith("wrong, reward 0.00, advantage −0.50")
    page.press("j")
    assert "question 0.8" in texts(page, ".about")[0]
    page.press("2")
    there = page.value("location.hash")
    assert there == "#rollouts/0/train/2/0.8/1"
    page.press("k")
    assert "question 0.7" in texts(page, ".about")[0]
    page.value(f"new Promise((done) => {{ addEventListener('hashchange', done); location.hash = {there!r}; }})")
    assert "question 0.8" in texts(page, ".about")[0]
    assert page.value("document.querySelectorAll('tr.chosen .sibling')[0].textContent").startswith("✗ 2")


def test_the_map_holds_a_number_for_every_query(page: Browser) -> None:
    page.value("open(DATA.groups.find((group) => group.step === 2 && group.instance[1] === 8), 0)")
    assert texts(page, ".cell") == ["capital of Italy+0.25", "where is Rome+0.25"] * 2
    click(page, "[data-measure=jsd]")
    assert texts(page, ".cell") == ["capital of Italy0.100", "where is Rome0.100"] * 2
    page.value("document.querySelectorAll('.cell')[3].click()")
    assert texts(page, "tr.chosen .sibling")[0].startswith("✗ 2")
    assert page.value("document.activeElement.dataset.query") == "1"


def test_a_chart_tells_the_values_of_a_step(page: Browser) -> None:
    page.value("document.querySelector('figure').focus()")
    page.press("ArrowRight")
    assert texts(page, "figure output")[0] == "step 12"
    page.press("ArrowLeft")
    assert texts(page, "figure output")[0] == "step 0"
    assert texts(page, "figure .legend b")[:2] == ["0.250", "0.250"]
    page.value("document.activeElement.blur()")
    assert texts(page, "figure .legend b")[:2] == ["0.750", "0.750"]


def test_an_evaluation_says_that_it_has_no_verdicts(page: Browser) -> None:
    page.value("open(DATA.groups.find((group) => group.phase === 'val'), 0)")
    assert texts(page, ".none") == ["Teacher and credit belong to training groups; these are evaluated only."]
    assert [text.split()[:2] for text in texts(page, ".sibling")] == [["✓", "greedy"], ["✓", "sampled"]]


def test_runs_of_a_comparison_are_chosen_in_the_page(browser: Browser, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    compare_runs([run, write_run(other)], tmp_path / "both.html")
    browser.open(tmp_path / "both.html")
    browser.value("(runs = document.querySelector('.filters select'), runs.value = '1', runs.onchange())")
    assert "where is Rome" in texts(browser, ".group .asked")[0]
    assert browser.value("location.hash").startswith("#rollouts/1/train/2/")


@pytest.mark.parametrize("is_dark", [False, True])
def test_a_phone_shows_it_all_without_a_sideways_page(run: Path, is_dark: bool) -> None:
    with Browser(390, 844, is_dark=is_dark) as phone:
        phone.open(run / "report.html")
        assert phone.value("document.documentElement.scrollWidth") == 390
        light = phone.value("getComputedStyle(document.body).backgroundColor").removeprefix("rgb(").split(",")[0]
        assert (int(light) < 60) == is_dark
        small = phone.value(
            "[...document.querySelectorAll('.cell, .sibling, .switch button, .entry')].filter((one) => "
            "one.getBoundingClientRect().height < 30).length"
        )
        assert small == 0, "targets that a thumb misses"
