import pytest

from sdsearch_lightning.runs.metrics_logger import MetricsLogger


@pytest.fixture
def logger(tmp_path):
    return MetricsLogger(tmp_path / "run" / "metrics.csv")


def test_a_new_metric_adds_a_column_and_keeps_the_rows(logger):
    logger.log_metrics({"a": 1.0}, step=1)
    logger.log_metrics({"b": 0.1 + 0.2, "a": 2.0}, step=2)
    logger.log_metrics({"b": 3.0}, step=3)
    assert logger.path.read_text() == "step,a,b\n1,1.0,\n2,2.0,0.30000000000000004\n3,,3.0\n"


def test_a_cut_file_grows_into_what_an_uncut_one_is(logger):
    history = [({"a": 1.0}, 1), ({"a": 2.0}, 2), ({"val": 5.0}, 2), ({"a": 3.0, "late": 1.0}, 3), ({"a": 4.0}, 4)]
    for metrics, step in history:
        logger.log_metrics(metrics, step=step)
    whole = logger.path.read_bytes()
    logger.path.write_bytes(whole[:-2])  # a kill in the middle of a line
    resumed = MetricsLogger(logger.path)
    resumed.cut_after(2)
    assert resumed.path.read_text() == "step,a,val\n1,1.0,\n2,2.0,\n2,,5.0\n"
    for metrics, step in history[3:]:
        resumed.log_metrics(metrics, step=step)
    assert resumed.path.read_bytes() == whole


def test_a_torn_line_is_not_taken_for_an_earlier_step(logger):
    for step in range(1, 13):
        logger.log_metrics({"a": float(step)}, step=step)
    text = logger.path.read_text()
    logger.path.write_text(text[: text.index("12,") + 1])  # of step 12, only the 1 was written
    logger.cut_after(3)
    assert logger.path.read_text() == "step,a\n1,1.0\n2,2.0\n3,3.0\n"


def test_what_is_logged_for_a_step_is_known(logger):
    assert not logger.has("val/", 0)
    logger.log_metrics({"val/f1": 0.0}, step=0)
    logger.log_metrics({"train/loss": 1.0}, step=1)
    assert logger.has("val/", 0)
    assert not logger.has("val/", 1)
    assert not logger.has("val/", 10)
