"""What grows is found, and what is made once is not."""

import os

import pytest

from benchmarks.steady_state import Sample, slope, tell

FLAT = [Sample(step, 500_000_000 + (step > 3) * 90_000_000, 9, 3) for step in range(1, 101)]


def test_a_sample_is_of_this_process(tmp_path):
    before = Sample.now(1)
    with (tmp_path / "open").open("w"):
        now = Sample.now(2)
    assert now.descriptors == before.descriptors + 1 and now.threads >= 1
    assert 10e6 < now.resident < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_what_is_made_once_is_no_growth(capsys):
    assert slope(FLAT, "resident") == 0.0 and not tell(FLAT, FLAT[0], FLAT[-1], ())
    assert "590.0 -> 590.0 MB (ratio 1.0000), +0.00 KB a step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("growing", "left"),
    [
        (lambda s: Sample(s.step, s.resident + 20_000 * s.step, 9, 3), FLAT[-1]),
        (lambda s: Sample(s.step, s.resident, 9 + s.step // 10, 3), FLAT[-1]),
        (lambda s: s, Sample(100, 0, 9, 4)),
        (lambda s: s, Sample(100, 0, 10, 3)),
    ],
)
def test_what_grows_is_found(growing, left):
    assert tell([growing(sample) for sample in FLAT], FLAT[0], left, ())
