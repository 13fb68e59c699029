import json

import numpy as np
import pytest

from sdsearch_lightning.errors import DataError
from sdsearch_lightning.retrieval.corpus import Corpus, write_corpus
from sdsearch_lightning.retrieval.index_folder import CorpusFile


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_passages_are_read_by_offset(tmp_path):
    path = write(
        tmp_path / "corpus.jsonl",
        {"id": "a", "contents": '"Zoë"\nnaïve\ttext'},
        {"id": 2, "title": "Rome", "text": "a city"},
        {"id": "c", "contents": "", "url": "u"},
    )
    path.write_text("\n" + path.read_text().rstrip("\n"))  # a blank first line, and no newline at the end
    write_corpus(CorpusFile.read(path, tmp_path), tmp_path)
    corpus = Corpus.open(path, tmp_path)
    assert len(corpus) == 3
    assert corpus[2].id == "c" and corpus[2].contents == "" and corpus[2].fields == {"url": "u"}
    assert corpus[0].contents == '"Zoë"\nnaïve\ttext' and corpus[0].title == '"Zoë"'
    assert corpus[1].id == "2" and corpus[1].contents == '"Rome"\na city'
    assert corpus[1].fields == {"title": "Rome", "text": "a city"}
    assert [list(chunk) for chunk in corpus.contents(2)] == [[corpus[0].contents, corpus[1].contents], [""]]
    corpus.close()


@pytest.mark.parametrize("row", [{"contents": "c"}, {"id": "1"}, {"id": "1", "title": "t"}, {"id": "1", "contents": 3}])
def test_a_row_without_its_keys_is_named(tmp_path, row):
    path = write(tmp_path / "corpus.jsonl", {"id": "0", "contents": "fine"}, row)
    with pytest.raises(DataError, match=r"corpus\.jsonl line 2: expected 'id' and a text 'contents'"):
        write_corpus(CorpusFile.read(path, tmp_path), tmp_path)


def test_an_empty_corpus_is_refused(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n\n")
    with pytest.raises(DataError, match=r"corpus\.jsonl: expected at least one passage, found an empty file"):
        write_corpus(CorpusFile.read(path, tmp_path), tmp_path)


def test_a_file_changed_since_is_an_error_not_a_wrong_passage(tmp_path):
    path = write(tmp_path / "corpus.jsonl", {"id": "0", "contents": "fine"}, {"id": "1", "contents": "too"})
    write_corpus(CorpusFile.read(path, tmp_path), tmp_path)
    corpus = Corpus(path, np.load(tmp_path / "offsets.npy") + np.int64(3))
    with pytest.raises(DataError, match="passage 1: expected one JSON object"):
        corpus[1]


def test_half_a_character_is_named(tmp_path):
    path = write(tmp_path / "corpus.jsonl", {"id": "0", "contents": "fine"})
    with path.open("a") as file:
        file.write('{"id": "1", "contents": "a \\ud83d b"}\n')
    with pytest.raises(DataError, match=r"corpus\.jsonl line 2: expected text, found half a character"):
        write_corpus(CorpusFile.read(path, tmp_path), tmp_path)


def test_a_text_without_a_title_is_its_contents(tmp_path):
    path = write(tmp_path / "corpus.jsonl", {"id": "0", "text": "bare"}, {"id": "1", "title": None, "text": "too"})
    write_corpus(CorpusFile.read(path, tmp_path), tmp_path)
    corpus = Corpus.open(path, tmp_path)
    assert [corpus[0].contents, corpus[1].contents] == ["bare", "too"]


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: bytes(len(b)), lambda b: b[:-8], lambda b: b[:9] + b"~" + b[10:]]
)
def test_damaged_offsets_are_told_in_a_line(tmp_path, damage):
    path = write(tmp_path / "corpus.jsonl", {"id": "0", "contents": "fine"})
    write_corpus(CorpusFile.read(path, tmp_path), tmp_path)
    offsets = tmp_path / "offsets.npy"
    offsets.write_bytes(damage(offsets.read_bytes()))
    for read in (lambda: Corpus.open(path, tmp_path), lambda: write_corpus(CorpusFile.read(path, tmp_path), tmp_path)):
        with pytest.raises(DataError, match=r"offsets\.npy: expected an array \(.*Delete the folder") as raised:
            read()
        assert "\n" not in str(raised.value)
