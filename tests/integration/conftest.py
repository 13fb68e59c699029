"""One cold start and one run of the command line, on a world of thirty entities, that the tests here look at."""

from __future__ import annotations

import pytest

from helpers.workplace import COLD_START, FIT, Workplace


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """After `supervise` and `fit`: runs/cold and runs/rl."""
    place = Workplace(tmp_path_factory.mktemp("workplace"))
    (place.path / "cold.yaml").write_text(COLD_START)
    (place.path / "fit.yaml").write_text(FIT)
    for command in (("supervise", "--config", "cold.yaml"), ("fit", "--config", "fit.yaml")):
        done = place.start("-m", "sdsearch_lightning", *command)
        (place.path / f"{command[0]}.out").write_text(done.stdout)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return place
