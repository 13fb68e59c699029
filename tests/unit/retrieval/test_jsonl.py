import gzip

import pytest

from sdsearch_lightning.errors import DataError
from sdsearch_lightning.retrieval.jsonl import read_jsonl

LINES = b'{"a": 1}\n\n{"a": "\xc3\xa9"}\n{"a": 3}'


@pytest.mark.parametrize("packed", [False, True])
def test_rows_know_their_line_and_offset(tmp_path, packed):
    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    path.write_bytes(gzip.compress(LINES) if packed else LINES)
    rows = list(read_jsonl(path))
    assert [row.values["a"] for row in rows] == [1, "é", 3]
    assert [row.where for row in rows] == [f"{path} line {line}" for line in (1, 3, 4)]
    assert all(LINES[row.offset :].startswith(b'{"a": ') for row in rows)
    assert [row.offset for row in rows] == [0, 10, 22]


@pytest.mark.parametrize("line", [b'{"a": 1', b"[1, 2]", b"\xff\xff"])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(DataError, match=r"rows\.jsonl line 2: expected one JSON object, found"):
        list(read_jsonl(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl, found nothing"):
        list(read_jsonl(tmp_path / "nowhere.jsonl"))
    with pytest.raises(DataError, match="found a folder"):
        list(read_jsonl(tmp_path))


def test_a_torn_archive_is_named(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 9)[:-6])
    with pytest.raises(DataError, match="the archive is damaged"):
        list(read_jsonl(path))
    path.write_bytes(b"no archive at all")
    with pytest.raises(DataError, match="line 1: the archive is damaged"):
        list(read_jsonl(path))
