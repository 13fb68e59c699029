"""One command at a time writes a run folder, and who finds it taken is told by whom."""

import os
import signal
import subprocess
import sys

import pytest

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.runs import lock
from sdsearch_lightning.runs.lock import held_alone

HOLDER = """
import sys, time
from pathlib import Path
from sdsearch_lightning.runs.lock import held_alone
with held_alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_who_holds_a_folder_is_told_and_a_dead_process_holds_none(tmp_path):
    folder = tmp_path / "runs" / "mine"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout.readline() == b"held\n"
            holder.send_signal(signal.SIGSTOP)  # Ctrl-Z
            with pytest.raises(ConfigError) as refused, held_alone(folder):
                pass
        finally:
            holder.kill()
    told = str(refused.value)
    assert told.startswith(f"{folder} is in use by process {holder.pid} on {lock.socket.gethostname()} since 20")
    assert "--run.name NAME" in told and "\n" not in told
    with held_alone(folder), held_alone(tmp_path / "runs" / "other"):
        assert not folder.exists(), "the lock lies beside the folder"


def test_a_forked_worker_does_not_hold_it(tmp_path):
    ready, told = os.pipe()
    with held_alone(tmp_path / "mine"):
        if (worker := os.fork()) == 0:
            os.write(told, b".")
            signal.pause()
        os.read(ready, 1)
    try:
        with held_alone(tmp_path / "mine"):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


@pytest.mark.parametrize("name, rank", [("NODE_RANK", 0), ("GROUP_RANK", 0), ("", 1)])
def test_other_ranks_leave_it_to_rank_0(tmp_path, monkeypatch, name, rank):
    monkeypatch.setattr(lock.rank_zero_only, "rank", rank, raising=False)
    if name:
        monkeypatch.setenv(name, "1")
    with held_alone(tmp_path / "mine"):
        assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def refuses(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", refuses)
    with held_alone(tmp_path / "mine"):
        pass
    assert "cannot be locked ([Errno 38] Function not implemented)" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(ConfigError, match="run.root: expected a folder to write to"), held_alone(tmp_path / "runs/x"):
        pass
