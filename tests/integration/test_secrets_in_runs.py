"""Secrets of a configuration are in no file of a run, of its checkpoints and of its model; and the run goes on."""

from __future__ import annotations

from pathlib import Path

from helpers.workplace import COLD_START, Workplace

CALLER = """
  callbacks:
  - class_path: helpers.secrets.Caller
    init_args: {url: 'http://user:secret-word@127.0.0.1:8000/x', token: secret-token, phrase: secret-phrase}
"""


def test_no_file_holds_a_secret_and_the_run_is_known_again(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    text = COLD_START.replace("trainer: {max_steps: 96, ", "trainer: {max_steps: 2, ").replace("96", "8")
    head, tail = text.split("trainer: {", 1)
    options, rest = tail.split("}\n", 1)
    lines = "".join(f"  {option.strip()}\n" for option in options.split(","))
    (tmp_path / "cold.yaml").write_text(f"{head}trainer:\n{lines}{CALLER.lstrip(chr(10))}{rest}")
    done = place.sdsearch("supervise", "--config", "cold.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    again = place.sdsearch("supervise", "--config", "cold.yaml")
    assert again.returncode == 0 and "holds this run, finished" in again.stdout, again.stderr
    checkpoint = str(place.run("cold") / "checkpoints" / "last.ckpt")
    exported = place.sdsearch("export", "--ckpt_path", checkpoint, "--output", "model")
    assert exported.returncode == 0, exported.stderr
    files = [path for folder in (place.run("cold"), tmp_path / "model") for path in folder.rglob("*") if path.is_file()]
    assert {"config.yaml", "sdsearch_config.yaml", "README.md", "step_00000002.ckpt"} <= {path.name for path in files}
    assert not [path for path in files if b"secret-" in path.read_bytes()]
    assert "secret-" not in done.stdout + again.stdout + exported.stdout
    assert "helpers.secrets.Caller" in (place.run("cold") / "config.yaml").read_text()
