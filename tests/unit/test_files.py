"""Files that are whole or not there, rows that stay, and one sentence about a full disk, whoever writes."""

import errno
import os
import re

import pytest
import torch
from safetensors.torch import save_file

from helpers.disks import small_disk
from sdsearch_lightning import files
from sdsearch_lightning.files import DiskFullError, append_lines, sync, telling_full_disk, write_text, written_whole


def fill(folder, kilobytes):
    (folder / "ballast").write_bytes(bytes(1024 * kilobytes))


def torch_save(path):
    torch.save({"weights": torch.zeros(500_000)}, path)


def safetensors_save(path):
    save_file({"weights": torch.zeros(500_000)}, path)


def text(path):
    path.write_text("x" * 1_000_000)


@pytest.mark.parametrize("write", [torch_save, safetensors_save, text])
def test_a_full_disk_is_told_the_same_whoever_writes(tmp_path, write):
    with small_disk(tmp_path / "disk", 512) as disk:
        with pytest.raises(DiskFullError) as raised, written_whole(disk / "out") as draft:
            write(draft)
        assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(disk / "out")
        assert re.fullmatch(
            r"No space left .* \(\d\.\d MB of it are written, 0\.\d MB are free\)", raised.value.strerror
        )
        assert not list(disk.iterdir()), "no draft stays"


def test_lines_are_appended_all_or_none(tmp_path):
    with small_disk(tmp_path / "disk", 64) as disk:
        append_lines(disk / "rows", ["one\n"])
        for path in (disk / "rows", disk / "new"):
            with pytest.raises(DiskFullError, match="No space left"):
                append_lines(path, ["x" * 40_000 + "\n"] * 3)
        assert (disk / "rows").read_text() == "one\n"
    with pytest.raises(ZeroDivisionError):
        append_lines(tmp_path / "rows", (str(1 // n) for n in (1, 0)))
    assert (tmp_path / "rows").read_text() == ""


def test_another_error_stays_what_it_is(tmp_path):
    for error in (
        PermissionError(errno.EACCES, "no"),
        RuntimeError("inline_container.cc: enforce fail"),
        KeyError("x"),
    ):
        with pytest.raises(type(error)) as raised, telling_full_disk(tmp_path / "x"):
            raise error
        assert raised.value is error


@pytest.fixture
def order(monkeypatch):
    """What is flushed and renamed, in order."""
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        files.os, "fsync", lambda number: (calls.append(os.path.realpath(f"/proc/self/fd/{number}")), fsync(number))
    )
    monkeypatch.setattr(files.os, "replace", lambda a, b: (calls.append(f"-> {b}"), replace(a, b)))
    return calls


def test_contents_are_on_the_disk_before_the_name_and_the_name_is_too(tmp_path, order):
    write_text(tmp_path / "summary.json", "{}")
    assert order == [str(tmp_path / ".summary.json.draft"), f"-> {tmp_path / 'summary.json'}", str(tmp_path)]


def test_a_folder_is_flushed_with_all_that_is_in_it(tmp_path, order):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/file").write_text("")
    (tmp_path / "a/link").symlink_to("nowhere")
    sync(tmp_path / "a")
    assert order == [str(tmp_path / place) for place in ("a/b/file", "a/b", "a")]


def test_rows_are_flushed_and_a_new_file_has_its_name(tmp_path, order):
    path = tmp_path / "rows"
    append_lines(path, ["a\n"])
    append_lines(path, ["b\n"])
    assert order == [str(path), str(tmp_path), str(path)]


def test_a_new_folder_has_its_name_too(tmp_path, order):
    write_text(tmp_path / "runs" / "mine" / "config.yaml", "")
    write_text(tmp_path / "runs" / "mine" / "summary.json", "")
    names = [str(tmp_path), str(tmp_path / "runs")]
    assert order[:2] == names and not set(order[2:]) & set(names)
