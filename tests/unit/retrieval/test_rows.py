import gzip
import json
import sys
from collections.abc import Iterator

import pyarrow as pa
import pytest
from pyarrow import parquet

from sdsearch_lightning.errors import ConfigError, DataError
from sdsearch_lightning.retrieval.rows import read_rows

ROWS = [{"id": str(i), "gold": {"target": [f"a{i}"]}, "prompt": [{"role": "user", "content": "é"}]} for i in range(5)]


def write(path, rows=ROWS, **options):
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path, **options)
        return path
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.mark.parametrize(("suffix", "place"), [("jsonl", "line"), ("jsonl.gz", "line"), ("parquet", "row")])
def test_the_same_rows_come_from_every_format(tmp_path, suffix, place):
    path = write(tmp_path / f"x.{suffix}")
    found = list(read_rows(path))
    assert [row.values for row in found] == ROWS  # plain lists and dictionaries
    assert [row.where for row in found] == [f"{path} {place} {i}" for i in range(1, 6)]
    assert len({row.offset for row in found}) == 5 and found[0].offset == 0
    assert [row.values["id"] for row in read_rows(path, limit=2)] == ["0", "1"]
    assert isinstance(read_rows(path), Iterator)


def test_row_groups_and_batches_do_not_show(tmp_path, monkeypatch):
    monkeypatch.setattr("sdsearch_lightning.retrieval.rows._ROWS_AT_ONCE", 2)
    path = write(tmp_path / "x.parquet", row_group_size=3)
    assert [row.where.split()[-1] for row in read_rows(path)] == ["1", "2", "3", "4", "5"]
    assert [row.values for row in read_rows(path)] == ROWS


def test_columns_that_are_not_wanted_stay_packed(tmp_path):
    found = list(read_rows(write(tmp_path / "x.parquet"), without=("prompt", "other")))
    assert found[1].values == {"id": "1", "gold": {"target": ["a1"]}}
    (bare, *_) = read_rows(write(tmp_path / "y.parquet", [{"prompt": 1}]), without=("prompt",))
    assert bare.values == {}


def damaged(path, size):
    """A file whose second row group is noise."""
    write(path, [{"text": f"{i} " + "x" * 50} for i in range(2 * size)], row_group_size=size, use_dictionary=False)
    start = parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    path.write_bytes(path.read_bytes()[:start] + b"\xff" * 64 + path.read_bytes()[start + 64 :])
    return path


def test_a_limit_reads_no_further_and_damage_is_named(tmp_path):
    path = damaged(tmp_path / "x.parquet", size=50)
    assert len(list(read_rows(path, limit=40))) == 40
    with pytest.raises(DataError, match=r"x\.parquet row \d+: the file is damaged \(.+\)\. Download it again\."):
        list(read_rows(path))


@pytest.mark.parametrize("content", [b"", b"no parquet at all", b"PAR1" + b"\0" * 20 + b"PAR1"])
def test_what_is_no_parquet_is_named(tmp_path, content):
    path = tmp_path / "x.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.parquet row 1: the file is damaged"):
        list(read_rows(path))


def test_missing_files_and_unknown_suffixes_are_named(tmp_path):
    for name in ("x.parquet", "x.jsonl"):
        with pytest.raises(DataError, match=rf"Expected a file at .*{name}, found nothing"):
            list(read_rows(tmp_path / name))
    with pytest.raises(
        DataError, match=r"x\.csv: expected a file that ends in one of \.jsonl, \.jsonl\.gz, \.parquet, found 'x\.csv'"
    ):
        read_rows(tmp_path / "x.csv")


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r'pip install "sdsearch-lightning\[data\]"'):
        list(read_rows(path))
