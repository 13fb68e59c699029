"""metrics.csv after a power cut, and with the names that data may have."""

import pytest

from sdsearch_lightning.errors import DataError
from sdsearch_lightning.report.metrics import Point, read_metrics, read_rows
from sdsearch_lightning.runs.metrics_logger import MetricsLogger


@pytest.fixture
def logger(tmp_path):
    logger = MetricsLogger(tmp_path / "metrics.csv")
    for step in (1, 2, 3):
        logger.log_metrics({"train/loss": step / 2}, step=step)
    return logger


DAMAGE = {
    "zeros at the end": lambda whole: whole + bytes(4096),
    "zeros, and a row behind them": lambda whole: whole + bytes(300_000) + b"4,2.0\n",
    "half a line, and a row behind it": lambda whole: whole + b"3,1.4,2.0\n",
    "no UTF-8": lambda whole: whole + b"\xff\xfe\n",
    "half a character": lambda whole: whole + "4,é".encode()[:-1],
    "a line of zeros in the middle": lambda whole: whole.replace(b"2,1.0\n", bytes(5) + b"\n2,1.0\n"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_a_power_cut_leaves_is_cut_and_said(logger, damage):
    whole = logger.path.read_bytes()
    logger.path.write_bytes(damaged := damage(whole))
    told = MetricsLogger(logger.path).cut_after(3)
    assert logger.path.read_bytes() == whole
    assert len(told) == damaged.endswith(b"\n"), "what ends without a newline was only not yet written"
    assert all("metrics.csv line " in line and "(a power cut?)" in line and "\n" not in line for line in told)


def test_a_report_names_a_damaged_line(logger):
    with logger.path.open("ab") as file:
        file.write(bytes(10) + b"4,2.0\n5,2.5\n")
    with pytest.raises(DataError, match=r"metrics\.csv line 5, .*Delete that line"):
        read_metrics(logger.path.parent)


def test_columns_that_are_lost_are_told(logger):
    logger.path.write_bytes(bytes(4096) + logger.path.read_bytes()[4:])
    with pytest.raises(DataError, match=r"metrics\.csv line 1: expected the columns"):
        logger.cut_after(3)


@pytest.mark.parametrize("name", ["a\u2028b", "a\x0cb", "a\x85b", "a\x1cb", 'a"b,c', "a\nb", "\u2029"])
def test_any_name_of_a_source_is_a_column(tmp_path, name):
    key = f"val/exact_match/{name}"
    logger = MetricsLogger(tmp_path / "metrics.csv")
    logger.log_metrics({key: 0.5}, step=1)
    logger.log_metrics({key: 0.75, "val/f1": 1.0}, step=2)
    assert logger.has("val/", 2) and not MetricsLogger(logger.path).cut_after(2)
    logger.log_metrics({key: 1.0}, step=3)
    assert read_metrics(tmp_path)[key] == [Point(1, 0.5), Point(2, 0.75), Point(3, 1.0)]
    assert not read_rows(logger.path).damaged
