"""Every recipe is read by the parser of `fit`, keeps the paper's batch, and fits the GPUs of docs/recipes.md."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, NamedTuple

import pytest

from helpers.paths import ROOT
from sdsearch_lightning.cli.commands import quieten
from sdsearch_lightning.cli.plan import PlanCLI, check_fit, sums_of
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.plan.architecture import find_architecture
from sdsearch_lightning.plan.memory import GIB, Part, Settings, plan_parts
from sdsearch_lightning.plan.settings import settings_of

PAGE = (ROOT / "docs/recipes.md").read_text()
PRESETS = ("grpo", "sd_search")


class Row(NamedTuple):
    """One line of the page's table."""

    model: str
    hardware: str
    rollout: float
    backward: float
    step: float
    fits: str


ROWS = [
    Row(cells[0], cells[1], *map(float, cells[2:5]), cells[5])
    for line in re.findall(r"^\| `qwen.*\|$", PAGE, re.MULTILINE)
    if len(cells := [cell.strip(" `") for cell in line.strip("|").split("|")]) == 6
]


def files(model: str, hardware: str, preset: str, *more: str) -> list[str]:
    """Arguments of `fit`, in the order that the page tells."""
    names = (
        "base",
        "experiment/recipe/nq_hotpotqa",
        *more,
        f"experiment/recipe/{model}",
        f"strategy/{hardware}",
        f"experiment/preset/{preset}",
    )
    return [f"--config={ROOT / 'configs' / name}.yaml" for name in names]


@cache
def planned(model: str, hardware: str) -> tuple[Any, Settings, list[Part]]:
    quieten()
    cli = PlanCLI(["fit", *files(model, hardware, "sd_search")])
    make, _ = find_architecture(cli.options.model.model_name_or_path, None)
    settings = settings_of(cli.options, cli.made, make, 80 * GIB)
    return cli, settings, plan_parts(settings)


def by_name(row: Row) -> str:
    return f"{row.model}-{row.hardware}"


@pytest.mark.parametrize("row", ROWS, ids=by_name)
def test_the_page_tells_what_the_plan_says(row: Row) -> None:
    cli, settings, parts = planned(row.model, row.hardware)
    sums = [size / GIB for size in sums_of(parts).values()]
    assert sums == pytest.approx([row.rollout, row.backward, row.step], abs=0.051)
    smallest = float(row.fits) if row.fits != "none" else 0.0
    if smallest:
        check_fit(settings, parts, smallest * GIB)
    if smallest != 80:
        with pytest.raises(ConfigError, match="expected at most 80.0 GiB per GPU"):
            check_fit(settings, parts, 80 * GIB)
    assert settings.num_gpus * cli.options.data.init_args.batch_size == 256, "the paper's batch"


@pytest.mark.parametrize("row", ROWS, ids=by_name)
def test_grpo_and_sd_search_differ_by_the_teacher_alone(row: Row) -> None:
    baseline = PlanCLI(["fit", *files(row.model, row.hardware, "grpo")]).options
    ours = planned(row.model, row.hardware)[0].options
    assert (baseline.jsd.weight, ours.jsd.weight, ours.jsd.warmup_steps) == (0.0, 0.001, 50)
    assert (ours.trainer.max_steps, ours.rollout.group_size, ours.rollout.max_searches) == (200, 5, 5)
    assert baseline.trainer == ours.trainer and baseline.data == ours.data
    assert baseline.rollout.max_tokens == ours.rollout.max_tokens and baseline.model.compute == ours.model.compute


def test_the_index_in_process_takes_the_place_of_the_server() -> None:
    index = "experiment/recipe/wiki18_in_process"
    data = PlanCLI(["fit", *files("qwen2.5_3b_full", "fsdp2_8", "grpo", index)]).options.data.init_args
    assert data.retriever.class_path.endswith("DenseRetriever") and data.retriever.init_args.device == "cpu"
    assert (data.batch_size, data.holdout, len(data.test_files)) == (32, 512, 7)


def test_the_table_is_complete() -> None:
    recipes = {path.stem for path in (ROOT / "configs/experiment/recipe").glob("qwen*.yaml")}
    hardware = {path.stem for path in (ROOT / "configs/strategy").glob("*.yaml")}
    assert {row.model for row in ROWS} == recipes and {row.hardware for row in ROWS} == hardware
    assert "none" in {row.fits for row in ROWS}, "one that no GPU holds"


def test_every_file_that_the_page_names_is_there() -> None:
    named = set(re.findall(r"configs/[\w./]+\.yaml", PAGE))
    assert len(named) >= 7 and all((ROOT / name).is_file() for name in named)


def test_a_smaller_gpu_would_be_seen() -> None:
    _, settings, parts = planned("qwen2.5_3b_full", "fsdp2_8")
    with pytest.raises(ConfigError, match=r"found 27\.9 at the peak \(rollout\)"):
        check_fit(settings, parts, 25 * GIB)
