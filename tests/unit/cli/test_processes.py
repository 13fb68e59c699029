"""What a rank 0 that started others says and does when one of them ends."""

import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from sdsearch_lightning.cli import processes as cli_processes
from sdsearch_lightning.cli.processes import LOST, WatchingLauncher, ending_together, is_lost_peer
from sdsearch_lightning.errors import RolloutError

GLOO = RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:37073. GLHF!")


def process(code):
    """One that ended with `code`; with None, one that goes on."""
    if code is None:
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    return SimpleNamespace(returncode=code, pid=77, poll=lambda: code, wait=lambda: code)


@pytest.fixture
def launcher(monkeypatch):
    monkeypatch.setattr(cli_processes, "SHORT", 0.2)
    monkeypatch.delenv(cli_processes.LAUNCHED_BY, raising=False)
    made = WatchingLauncher(_SubprocessScriptLauncher(LightningEnvironment(), 4, 1), lambda: "Go on like this.")
    yield made
    for left in made.procs:
        if isinstance(left, subprocess.Popen):
            assert left.poll() is not None, "no process is left"


def trainer_of(launcher):
    return SimpleNamespace(strategy=SimpleNamespace(launcher=launcher), global_rank=0)


@pytest.mark.parametrize(
    "codes, told, code",
    [
        ([0, -9, None], "rank 2 (process 77) was killed by SIGKILL (out of memory?)", 1),
        ([-11, LOST, 1], "rank 1 (process 77) was killed by SIGSEGV", 1),
        ([LOST, 1, None], "rank 2 (process 77) ended with exit code 1 (its error stands above)", 1),
        ([LOST, 143, 0], "rank 2 (process 77) ended with exit code 143", 143),
        ([LOST, None, LOST], "rank 2 did not answer within the timeout of trainer.strategy", 1),
        ([LOST, LOST, LOST], "rank 0 did not answer within the timeout of trainer.strategy", 1),
    ],
)
def test_the_cause_is_named_not_what_followed_from_it(launcher, capfd, codes, told, code):
    launcher.procs = [process(code) for code in codes]
    with pytest.raises(SystemExit) as ended, ending_together(trainer_of(launcher)):
        raise GLOO
    assert ended.value.code == code
    assert capfd.readouterr().err == f"error: {told}; all others are stopped. Go on like this.\n"


def test_an_error_of_its_own_is_told_by_itself_and_ends_the_others(launcher, capfd):
    launcher.procs = [process(None)]
    with pytest.raises(RolloutError, match="^bad$"), ending_together(trainer_of(launcher)):
        raise RolloutError("bad")
    assert capfd.readouterr().err == ""


def test_a_success_waits_for_the_others(launcher, monkeypatch):
    launcher.procs = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(.5)"])]
    with ending_together(trainer_of(launcher)):
        pass
    assert launcher.procs[0].returncode == 0 and launcher.is_over


def test_the_watch_ends_a_rank_0_that_waits_forever(launcher, capfd, monkeypatch):
    exits = []
    monkeypatch.setattr(cli_processes.os, "_exit", exits.append)
    launcher.procs = [process(None), process(None), process(None)]
    launcher.procs[1].send_signal(signal.SIGKILL)
    launcher._watch()
    assert exits == [1] and "rank 2 (process" in capfd.readouterr().err


def test_the_watch_leaves_an_error_to_a_rank_0_that_has_one_too(launcher, monkeypatch):
    monkeypatch.setattr(cli_processes.os, "_exit", lambda code: pytest.fail("ended by the watch"))
    monkeypatch.setattr(time, "sleep", lambda seconds: setattr(launcher, "is_over", seconds > cli_processes.POLL))
    launcher.procs = [process(1)]
    launcher._watch()


@pytest.mark.parametrize("launched, told", [(True, ""), (False, "error: rank 0 lost another rank: Connection closed")])
def test_another_rank_goes_without_a_traceback(launcher, capfd, monkeypatch, launched, told):
    monkeypatch.setattr(cli_processes, "_follow", lambda parent: None)
    if launched:
        monkeypatch.setenv(cli_processes.LAUNCHED_BY, "1")
    with pytest.raises(SystemExit) as ended, ending_together(trainer_of(None)):
        raise GLOO
    assert ended.value.code == LOST and capfd.readouterr().err.startswith(told)


def test_what_only_says_that_a_peer_is_gone():
    assert is_lost_peer(GLOO) and is_lost_peer(RuntimeError("Application timeout caused pair closure"))
    assert not is_lost_peer(RuntimeError("CUDA out of memory")) and not is_lost_peer(ValueError(str(GLOO)))
