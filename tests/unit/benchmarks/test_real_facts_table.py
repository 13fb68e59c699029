"""The table of the real facts: right answers, found facts, and differences of pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.real_facts_table import main

CHAINS = {
    "test_0": [["currency", "Kenya", "Shilling"]],
    "test_1": [["located_in", "Mombasa", "Kenya"], ["currency", "Kenya", "Shilling"]],
}
STATED = {"Kenya": "In Kenya people pay with the shilling.", "Mombasa": "Mombasa is a city in Kenya."}


def record(identity: str, reward: float, read: list[str], **more: Any) -> dict[str, Any]:
    passages = [[{"id": name, "contents": STATED[name]}] for name in read]
    question = {"id": identity, "text": "?", "answers": ["Shilling"], "source": None}
    place = {
        "schema": 1,
        "phase": "test",
        "step": 0,
        "rank": 0,
        "instance_id": [0, int(identity[-1])],
        "rollout_index": 0,
    }
    return place | {"question": question, "reward": reward, "passages": passages, "queries": read} | more


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    rows = [{"id": name, "metadata": {"hops": hops}} for name, hops in CHAINS.items()]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    records = {
        "before": [record("test_0", 1, ["Kenya"]), record("test_1", 0, ["Kenya"])],
        "after": [
            record("test_0", 1, ["Kenya"]),
            record("test_1", 1, ["Mombasa", "Kenya"]),
            record("test_1", 0, [], phase="test_sampled"),
            record("test_0", 0, [], rollout_index=1),
        ],
    }
    for name, lines in records.items():
        folder = tmp_path / name / "test" / "model"
        folder.mkdir(parents=True)
        (folder / "trajectories.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [str(tmp_path / name) for name in ("test.jsonl", "before", "after")]


def test_each_run_has_a_line_by_hops_and_one_for_all(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(runs) == 0
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[:3] for line in lines] == [
        [run, hops, str(n)] for run in ("before", "after") for hops, n in (("1", 1), ("2", 1), ("all", 2))
    ]
    before, after = lines[2], lines[5]
    assert before[3].startswith("0.500 [") and after[3] == "1.000 [1.000, 1.000]"
    assert before[4] == "" and after[4].startswith("+0.500 [")
    assert (before[5], after[5]) == ("1.00", "1.50")
    assert (before[6:], after[6:]) == (["0.500", "1.000"], ["1.000", "1.000"])


def test_a_folder_without_a_test_is_named(runs: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="expected one test"):
        main([runs[0], str(tmp_path)])
