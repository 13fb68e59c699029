import gzip
import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from sdsearch_lightning.datamodules.readers import parse_question, read_questions
from sdsearch_lightning.errors import ConfigError, DataError
from sdsearch_lightning.protocol.templates import SEARCH_R1_PROMPT
from sdsearch_lightning.types import Question

GOOD = {"question": "who ?", "answers": ["A"]}


def write(path, *rows):
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(list(rows)), path)
        return path
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_flashrag_rows(tmp_path):
    row = {"id": "test_0", "question": "who ?", "golden_answers": ["A", "B"], "metadata": {"type": "bridge"}}
    assert read_questions(write(tmp_path / "nq.jsonl", row)) == [Question("test_0", "who ?", ("A", "B"), "nq")]


@pytest.mark.parametrize("row", [{}, {"answers": [""]}, {"golden_answers": []}, {"answers": None}])
@pytest.mark.parametrize("columns", [{}, {"answers": "gold.text"}])
def test_answers_may_be_missing_where_nobody_scores(tmp_path, row, columns):
    path = write(tmp_path / "open.jsonl", {"question": "who ?"} | row, GOOD | {"gold": {"text": "A"}})
    found = read_questions(path, columns=columns, need_answers=False)
    assert [question.answers for question in found] == [(), ("A",)]


def test_simple_rows_and_sources(tmp_path):
    rows = [GOOD, GOOD | {"answers": "B"}, GOOD | {"id": 7, "answers": ["", "C"], "data_source": "hotpotqa"}]
    path = write(tmp_path / "my.set.jsonl.gz", *rows)
    assert read_questions(str(path)) == [
        Question("1", "who ?", ("A",), "my.set"),  # without an id, its line
        Question("2", "who ?", ("B",), "my.set"),
        Question("7", "who ?", ("C",), "hotpotqa"),  # an empty string is no answer
    ]


def test_limit_stops_reading(tmp_path):
    path = write(tmp_path / "nq.jsonl", GOOD, GOOD, {"question": "broken"})
    assert len(read_questions(path, limit=2)) == 2
    with pytest.raises(DataError):
        read_questions(path, limit=3)


@pytest.mark.parametrize("gold", [[], "", " ", None, [""], {"target": []}, {"other": ["A"]}])
@pytest.mark.parametrize("key", ["answers", "golden_answers"])
def test_a_row_without_answers_is_named(tmp_path, key, gold):
    path = write(tmp_path / "nq.jsonl", GOOD, {"question": "who ?", key: gold})
    with pytest.raises(DataError) as error:
        read_questions(path)
    assert str(error.value) == (
        f"{path} line 2: expected a non-empty list under '{key}', found {gold!r}. "
        "Every question needs at least one gold answer, but for `predict`."
    )


def test_other_faults_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nq\.jsonl line 1: expected a text under 'question', found None"):
        read_questions(write(tmp_path / "nq.jsonl", {"prompt": "who ?", "answers": ["A"]}))
    with pytest.raises(DataError, match=r"nq\.jsonl: expected at least one row, found an empty file"):
        read_questions(write(tmp_path / "nq.jsonl"))
    with pytest.raises(DataError, match=r"nq\.csv: expected a file that ends in one of \.jsonl, \.jsonl\.gz"):
        read_questions(write(tmp_path / "nq.csv", GOOD))
    with pytest.raises(DataError, match=r"nowhere\.jsonl, found nothing"):
        read_questions(tmp_path / "nowhere.jsonl")


# --- the files of Search-R1, verl and SkyRL -------------------------------------------------------------------------

INSTRUCTIONS = "Answer the given question. For example, <answer> Beijing </answer>. Question: "


def search_r1(source, index, **other):
    """A row as Search-R1's own scripts write it."""
    question = f"{source} {index}?"
    row = {
        "id": f"train_{index}",
        "question": question,
        "golden_answers": ["A", "B"],
        "metadata": {"context": ["long"]},
        "data_source": source,
        "prompt": [{"role": "user", "content": INSTRUCTIONS + question + "\n"}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": ["A", "B"]}},
        "extra_info": {"split": "train", "index": index},
    }
    return row | other


def verl(source, index, reward="reward_model", **other):
    """A row as verl's script rewrites it; SkyRL's differs by `reward`."""
    question = f"{source} {index}?"
    system = {"role": "system", "content": "You are a helpful and harmless assistant. Question: none"}
    row = {
        "data_source": f"searchR1_{source}",
        "prompt": [system, {"role": "user", "content": INSTRUCTIONS + question}],
        "ability": "fact-reasoning",
        reward: {"style": "rule", "ground_truth": {"target": ["A", "B"]}},
        "extra_info": {"index": index, "need_tools_kwargs": True, "question": question, "split": "train"},
        "metadata": None,
    }
    return row | other


@pytest.mark.parametrize(
    ("row", "ids"),
    [
        (search_r1, ["train_0", "train_0"]),  # not unique, and nobody minds
        (lambda *at: verl(*at), ["nq_0", "hotpotqa_0"]),
        (lambda *at: verl(*at, reward="reward_spec", env_class="search"), ["nq_0", "hotpotqa_0"]),
    ],
    ids=["search_r1", "verl", "skyrl"],
)
def test_peers_files_are_read_as_they_are(tmp_path, row, ids):
    path = write(tmp_path / "train.parquet", row("nq", 0), row("hotpotqa", 0))
    assert read_questions(path) == [
        Question(ids[0], "nq 0?", ("A", "B"), "nq"),
        Question(ids[1], "hotpotqa 0?", ("A", "B"), "hotpotqa"),
    ]


def test_arrays_are_read_as_lists():
    """What pandas makes of a parquet file."""
    row = search_r1("nq", 3) | {"golden_answers": np.array(["A", "B"], dtype=object)}
    assert parse_question(row, "x row 1", "s").answers == ("A", "B")
    row = verl("nq", 3) | {"extra_info": {"index": np.int64(3)}}
    row["prompt"] = np.array(row["prompt"], dtype=object)
    row["reward_model"] = {"ground_truth": {"target": np.array(["A"], dtype=object)}}
    assert parse_question(row, "x row 1", "s") == Question("nq_3", "nq 3?", ("A",), "nq")


@pytest.mark.parametrize(
    "gold", ["A", ["A"], {"target": ["A"]}, {"target": "A"}, np.array(["A"]), {"target": np.array(["A"])}]
)
@pytest.mark.parametrize("place", ["golden_answers", "answers", "ground_truth", "reward_model", "reward_spec"])
def test_answers_in_any_form_and_place(place, gold):
    held = {"ground_truth": gold} if place.startswith("reward") else gold
    assert parse_question({"question": "q", place: held}, "x row 7", "s") == Question("7", "q", ("A",), "s")


def test_a_null_is_no_answer_where_another_column_has_one():
    row = {"question": "q", "golden_answers": None, "reward_model": {"ground_truth": {"target": ["A"]}}, "id": None}
    assert parse_question(row, "x row 7", "s") == Question("7", "q", ("A",), "s")


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ([{"role": "user", "content": INSTRUCTIONS + "who?\n"}], "who?"),
        ([{"role": "user", "content": "Question: old"}, {"role": "user", "content": "Question: new "}], "new"),
        ([{"role": "user", "content": "Question: old"}, {"role": "assistant", "content": "Question: no"}], "old"),
        ([{"role": "user", "content": "Question: an example. Question: who?"}], "who?"),
        ([{"role": "user", "content": "no such word"}], "no such word"),
        ([{"role": "system", "content": "Question: who?"}], None),
        ([{"role": "user", "content": "Question: "}], None),
        ([{"role": "user", "content": None}], None),
        (["Question: who?"], None),
        ([], None),
    ],
)
def test_a_question_that_stands_in_the_prompt_only(prompt, text):
    row = {"prompt": prompt, "answers": ["A"]}
    if text is not None:
        assert parse_question(row, "x row 1", "s").text == text
        return
    with pytest.raises(DataError, match=r"x row 1: expected a text under 'question', found .* \['answers', 'prompt'\]"):
        parse_question(row, "x row 1", "s")


def test_the_text_is_kept_as_it_is():
    assert parse_question({"question": " Who . ", "answers": [" A "]}, "x row 1", "s") == Question(
        "1", " Who . ", (" A ",), "s"
    )


def test_what_a_file_without_data_source_belongs_to(tmp_path):
    (tmp_path / "hotpotqa").mkdir()
    names = ("dev.jsonl", "test.jsonl.gz", "train-00000-of-00002.parquet", "tests.jsonl", "nq-dev.jsonl")
    found = [read_questions(write(tmp_path / "hotpotqa" / name, GOOD))[0].source for name in names]
    assert found == ["hotpotqa", "hotpotqa", "hotpotqa", "tests", "nq-dev"]
    assert read_questions(tmp_path / "hotpotqa" / "dev.jsonl", source="mine")[0].source == "mine"


# --- a file's own columns -------------------------------------------------------------------------------------------

OWN = {"q": "who ?", "gold": {"labels": ["A"]}, "n": 0, "metadata": {"from": "web"}, "id": "x", "question": "wrong"}


@pytest.mark.parametrize("name", ["mine.parquet", "mine.jsonl"])
def test_columns_of_other_names(tmp_path, name):
    path = write(tmp_path / name, OWN)
    columns = {"question": "q", "answers": "gold.labels", "id": "n", "source": "metadata.from"}
    assert read_questions(path, columns=columns) == [Question("0", "who ?", ("A",), "web")]
    assert read_questions(path, columns={"answers": "gold.labels"}) == [Question("x", "wrong", ("A",), "mine")]


@pytest.mark.parametrize("columns", [{"question": "Q"}, {"answers": "gold.other"}, {"id": "q.x"}, {"source": "none"}])
def test_a_missing_column_is_named_with_those_there_are(tmp_path, columns):
    (name,) = columns.values()
    with pytest.raises(DataError) as error:
        read_questions(write(tmp_path / "mine.jsonl", OWN | {"answers": ["A"]}), columns=columns)
    assert str(error.value) == (
        f"{tmp_path}/mine.jsonl line 1: expected a value in the column {name!r}, which data.columns names, found none. "
        "The row has ['answers', 'gold', 'id', 'metadata', 'n', 'q', 'question']."
    )


def test_an_unknown_name_in_columns_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"data\.columns: expected keys among question, answers, id, source, support, found text\."
    ):
        read_questions(tmp_path / "mine.jsonl", columns={"text": "q"})


def test_a_column_may_have_a_dot_in_its_name():
    row = {"q": "who?", "a.b": "gold", "a": {"b": "nested"}}
    question = parse_question(row, "f row 1", "f", {"question": "q", "answers": "a.b"})
    assert question.answers == ("gold",)


def test_an_empty_list_of_answers_leaves_it_to_the_next_place():
    row = {"question": "who?", "golden_answers": [], "reward_model": {"ground_truth": {"target": ["gold"]}}}
    assert parse_question(row, "f row 1", "f").answers == ("gold",)


# Golds that are not what they seem


@pytest.mark.parametrize(
    ("gold", "answers"),
    [
        ('["Ada Byron","Countess of Lovelace"]', ("Ada Byron", "Countess of Lovelace")),
        ('{"target": ["Paris"]}', ("Paris",)),
        ([1969], ("1969",)),
        (["1969", 2.5], ("1969", "2.5")),
        ("[sic]", ("[sic]",)),
        ('{"name": "Paris"}', ('{"name": "Paris"}',)),
    ],
)
def test_golds_that_were_written_as_text_or_numbers_are_read(gold: object, answers: tuple[str, ...]) -> None:
    assert parse_question({"question": "who?", "golden_answers": gold}, "f row 1", "s").answers == answers


@pytest.mark.parametrize("gold", [["Bo", None], [["Bo", "Beau"]], [True], '["Bo", null]', [{"name": "Bo"}]])
def test_golds_that_are_no_texts_are_refused_for_what_they_are(gold: object) -> None:
    with pytest.raises(DataError, match=r"f row 1: expected texts or numbers under 'golden_answers', found .*Bo|True"):
        parse_question({"question": "who?", "golden_answers": gold}, "f row 1", "s")


@pytest.mark.parametrize(
    ("content", "question"),
    [
        ('who said "Question: why" in the play', 'who said "Question: why" in the play'),
        ("capital of kenya", "capital of kenya"),
        ("Question: who?", "who?"),
        (SEARCH_R1_PROMPT.format(question='who said "Question: why"?'), 'who said "Question: why"?'),
        ("Think first!\nQuestion: who? Question: no", "who? Question: no"),
    ],
)
def test_the_question_of_a_prompt_is_whole(content: str, question: str) -> None:
    row = {"prompt": [{"role": "user", "content": content}], "answers": ["Bo"]}
    assert parse_question(row, "f row 1", "s").text == question
    moved = {"asked": row["prompt"], "answers": ["Bo"]}
    assert parse_question(moved, "f row 1", "s", {"question": "asked"}).text == question


# --- prompts alone, and columns inside of lists ----------------------------------------------------------------------


def asked(content, **options):
    row = {"prompt": np.array([{"role": "user", "content": content}]), "reward_model": {"ground_truth": "Bo"}}
    return parse_question(row, "x.parquet row 1", "x", **options).text


@pytest.mark.parametrize("columns", [None, {"question": "prompt.0.content"}, {"question": "prompt.-1.content"}])
def test_a_prompt_alone_is_the_question(columns):
    assert asked("capital of kenya", columns=columns) == "capital of kenya"
    quoted = 'who said "Question: why" in the play'
    assert asked(quoted, columns=columns) == quoted
    assert asked(SEARCH_R1_PROMPT.replace("{question}", quoted), columns=columns) == quoted
    assert asked(INSTRUCTIONS + "Question: what is it?", columns=columns) == "Question: what is it?"


def test_a_column_may_lie_in_a_list(tmp_path):
    row = {"turns": [{"text": "hello"}, {"text": "who ?"}], "gold": [["A", "B"], ["C"]], "keys": {"0": "k"}}
    columns = {"question": "turns.1.text", "answers": "gold.0", "id": "keys.0"}
    assert read_questions(write(tmp_path / "m.parquet", row), columns=columns) == [
        Question("k", "who ?", ("A", "B"), "m")
    ]
    for name in ("turns.2.text", "turns.text", "turns.x.text", "gold.0.0.0"):
        with pytest.raises(DataError, match=f"expected a value in the column '{name}'"):
            read_questions(write(tmp_path / "m.jsonl", row), columns=columns | {"question": name})


# --- supporting passages ---------------------------------------------------------------------------------------------

HOTPOT = {
    "supporting_facts": {"title": ["Rome", "Tiber", "Rome"], "sent_id": [0, 2, 1]},
    "context": {"title": ["Oslo"]},
}
HOPS = [{"question": "a", "support_paragraph": {"title": t, "paragraph_text": "text"}} for t in ("Rome", "Tiber")]
PARAGRAPHS = [{"title": t, "is_supporting": t != "Oslo"} for t in ("Rome", "Oslo", "Tiber")]
FORMS = {
    "hotpotqa and 2wikimultihopqa of FlashRAG": (HOTPOT, "supporting_facts.title"),
    "musique of FlashRAG": ({"question_decomposition": HOPS}, "question_decomposition.*.support_paragraph"),
    "its titles": ({"question_decomposition": HOPS}, "question_decomposition.*.support_paragraph.title"),
    "musique's own": ({"paragraphs": PARAGRAPHS}, "paragraphs"),
}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_support_is_read_where_columns_name_it(tmp_path, form, suffix):
    metadata, place = FORMS[form]
    path = write(tmp_path / f"hops.{suffix}", GOOD | {"metadata": metadata}, GOOD | {"metadata": None})
    found = read_questions(path, columns={"support": f"metadata.{place}"})
    assert [question.support for question in found] == [("Rome", "Tiber"), ()], (
        "each once, in order; a row may have none"
    )
    assert [question.support for question in read_questions(path)] == [(), ()]


@pytest.mark.parametrize(
    ("value", "support"),
    [
        ([["Rome", 0], ["Rome", 1], ["Tiber", 0]], ("Rome", "Tiber")),  # HotpotQA's own
        (np.array([np.array(["Rome", 0], dtype=object), np.array(["Tiber", 1], dtype=object)]), ("Rome", "Tiber")),
        ('[["Rome", 0], ["Tiber", 1]]', ("Rome", "Tiber")),
        ([["Rome"], ["Tiber"]], ("Rome", "Tiber")),
        (np.array(["Rome", "Tiber"]), ("Rome", "Tiber")),
        ([12, "doc-7"], ("12", "doc-7")),
        ("Rome", ("Rome",)),
        ([" ", None, "Rome"], ("Rome",)),
        ([], ()),
    ],
)
def test_support_in_any_form(value, support):
    assert parse_question(GOOD | {"s": value}, "f row 1", "s", {"support": "s"}).support == support


@pytest.mark.parametrize(
    "value", [HOTPOT["supporting_facts"], [["Rome", "Tiber"]], [["Rome", 0, 1]], [[0, 1]], [{"name": "Rome"}], [True]]
)
def test_support_of_another_form_is_refused(tmp_path, value):
    path = write(tmp_path / "hops.jsonl", GOOD, GOOD | {"s": value})
    with pytest.raises(DataError) as error:
        read_questions(path, columns={"support": "s"})
    assert str(error.value) == (
        f"{path} line 2: expected titles or ids of passages under 's', as texts, {{title: ...}} or [title, number], "
        f"found {value!r:.80}. data.columns.support names the place: a dot leads deeper, * into each of a list."
    )


def test_a_star_leads_into_each_element():
    row = {"q": "who?", "gold": [{"names": ["A"]}, {"names": ["B"]}]}
    columns = {"question": "q", "answers": "gold.*.names.0"}
    assert parse_question(row, "f row 1", "s", columns).answers == ("A", "B")
