import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from sdsearch_lightning.datamodules.sources import BENCHMARKS, SourceFile, find_files
from sdsearch_lightning.errors import ConfigError, DataError

HUB = "RUC-NLPIR/FlashRAG_datasets"


def folder(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps({"question": name, "answers": ["a"]}) + "\n")
    return str(root)


def found(root, entry, split="train", hub=HUB):
    """Files below `root` and the sources of their rows."""
    return [(str(file.path.relative_to(root)), file.source) for file in find_files(entry, split, hub)]


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the hub was asked")

    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, refuse)


@pytest.mark.usefixtures("no_hub")
def test_files_and_weights():
    a, b = SourceFile(Path("a.jsonl")), SourceFile(Path("x/b.parquet"))
    assert find_files(None, "train", HUB) == []
    assert find_files("a.jsonl", "train", HUB) == [a]
    assert find_files(["a.jsonl", "x/b.parquet", "a.jsonl"], "val", HUB) == [a, b, a]
    weighted = find_files({"a.jsonl": 2, "x/b.parquet": 0.5}, "train", HUB)
    assert [(file.path.name, file.weight) for file in weighted] == [("a.jsonl", 2), ("b.parquet", 0.5)]
    assert find_files("x/y.csv/z", "train", HUB) == [SourceFile(Path("x/y.csv/z"))]  # two slashes: no name on the hub


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(ConfigError, match=r"data\.train_files: expected a weight above 0 for 'a\.jsonl', found "):
        find_files({"b.jsonl": 1, "a.jsonl": weight}, "train", HUB)


# --- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("names", "train", "val", "test"),
    [
        (["train.parquet", "test.parquet", "README.md", "info.json"], "train", "test", "test"),  # Search-R1
        (["train.parquet", "validation.parquet"], "train", "validation", "validation"),  # SkyRL
        (["train.jsonl", "dev.jsonl", "test.jsonl"], "train", "dev", "test"),  # FlashRAG
        (["train.jsonl.gz", "val.jsonl.gz", "tests.jsonl"], "train", "val", "val"),
        (["train.jsonl", "training.jsonl"], "train", None, "train"),
        (["test.jsonl"], None, "test", "test"),
        (["dev.jsonl", "validation.jsonl"], None, "validation", "dev"),
    ],
)
def test_the_splits_of_a_folder(tmp_path, names, train, val, test):
    entry = folder(tmp_path / "mine", *names)
    for split, word in (("train", train), ("val", val), ("test", test)):
        if word is None:
            with pytest.raises(DataError, match=rf"mine: expected files of {split[:3]}.* found .*{names[0]}"):
                find_files(entry, split, HUB)
        else:
            name = next(name for name in names if name.startswith(f"{word}."))
            assert found(tmp_path / "mine", entry, split) == [(name, "mine")]


@pytest.mark.usefixtures("no_hub")
def test_one_format_of_a_split_is_read(tmp_path):
    assert found(tmp_path, folder(tmp_path, "train.parquet", "train.jsonl")) == [("train.jsonl", tmp_path.name)]


@pytest.mark.usefixtures("no_hub")
def test_shards_are_read_in_order_and_all_of_them(tmp_path):
    names = [f"data/train-{i:05}-of-00011.parquet" for i in range(11)]
    entry = folder(tmp_path / "wiki", *reversed(names), "data/test-00000-of-00001.parquet")
    assert found(tmp_path / "wiki", entry) == [(name, "wiki") for name in names]
    hashed = folder(tmp_path / "old", "train-00000-of-00001-9128379123871238.parquet", "train-of-life.parquet")
    assert found(tmp_path / "old", hashed) == [("train-00000-of-00001-9128379123871238.parquet", "old")]
    assert found(tmp_path / "wiki", entry, "test") == [("data/test-00000-of-00001.parquet", "wiki")]
    (tmp_path / "wiki" / names[4]).unlink()
    with pytest.raises(DataError, match=r"expected 11 shards of train\.parquet, found 10: train-00000-of-00011"):
        find_files(entry, "train", HUB)


@pytest.mark.usefixtures("no_hub")
def test_each_data_set_of_a_folder_has_its_own_split(tmp_path):
    entry = folder(
        tmp_path, "nq/train.jsonl", "nq/test.jsonl", "hotpotqa/dev.jsonl", "hotpotqa/train.jsonl", "note/x.txt"
    )
    assert found(tmp_path, entry, "test") == [("hotpotqa/dev.jsonl", "hotpotqa"), ("nq/test.jsonl", "nq")]
    assert [file.weight for file in find_files({entry: 0.5}, "train", HUB)] == [0.5, 0.5]


# --- benchmarks and the hub -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_hub")
def test_the_seven_benchmarks_from_a_folder(tmp_path):
    hub = folder(tmp_path, *(f"{name}/{word}.jsonl" for name in BENCHMARKS for word in ("train", "dev", "test")))
    expected = [
        ("nq/test.jsonl", "nq"),
        ("triviaqa/test.jsonl", "triviaqa"),
        ("popqa/test.jsonl", "popqa"),
        ("hotpotqa/dev.jsonl", "hotpotqa"),
        ("2wikimultihopqa/dev.jsonl", "2wikimultihopqa"),
        ("musique/dev.jsonl", "musique"),
        ("bamboogle/test.jsonl", "bamboogle"),
    ]
    assert found(tmp_path, list(BENCHMARKS), "test", hub) == found(tmp_path, list(BENCHMARKS), "val", hub) == expected
    assert found(tmp_path, {"nq": 1, "hotpotqa": 2}, "train", hub) == [
        ("nq/train.jsonl", "nq"), ("hotpotqa/train.jsonl", "hotpotqa")
    ]  # fmt: skip
    (tmp_path / "hotpotqa/dev.jsonl").unlink()
    with pytest.raises(ConfigError) as error:
        find_files("hotpotqa", "test", hub)
    assert str(error.value) == (
        f"data.test_files: expected hotpotqa/dev.jsonl for 'hotpotqa' in data.hub, the folder {hub}, found test.jsonl, "
        "train.jsonl in hotpotqa/."
    )


def test_a_benchmark_from_the_hub(tmp_path, monkeypatch):
    asked = []

    def download(repo, file, repo_type):
        asked.append((repo, file, repo_type))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert found(tmp_path, ["nq", "musique"], "test") == [("nq/test.jsonl", "nq"), ("musique/dev.jsonl", "musique")]
    assert find_files("nq", "train", "me/copy")[0].is_benchmark
    assert asked == [
        (HUB, "nq/test.jsonl", "dataset"),
        (HUB, "musique/dev.jsonl", "dataset"),
        ("me/copy", "nq/train.jsonl", "dataset"),
    ]


def test_a_whole_data_set_of_the_hub(tmp_path, monkeypatch):
    everything = ["train.parquet", "test.parquet", "README.md", "data/train-00000-of-00001.parquet", "retrieval.jsonl"]

    def snapshot(repo, repo_type, allow_patterns):
        assert (repo, repo_type) == ("PeterJinGo/nq_hotpotqa_train", "dataset")
        wanted = list(huggingface_hub.utils.filter_repo_objects(everything, allow_patterns=allow_patterns))
        return folder(tmp_path / str(len(wanted)) / "hash", *wanted)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    (train,) = find_files("PeterJinGo/nq_hotpotqa_train", "train", HUB)
    assert train.path.name == "train.parquet" and train.source == "nq_hotpotqa_train"
    assert sorted(path.name for path in train.path.parent.rglob("*.*")) == [
        "train-00000-of-00001.parquet",
        "train.parquet",
    ]  # no more was fetched than was needed
    (test,) = find_files("PeterJinGo/nq_hotpotqa_train", "val", HUB)
    assert test.path.name == "test.parquet"


@pytest.mark.parametrize(
    "failure", [LocalEntryNotFoundError("no net\nand more"), OSError("no net"), ValueError("no net")]
)
def test_without_a_network_one_line_says_what_was_looked_for(monkeypatch, failure):
    def fail(*args, **kwargs):
        raise failure

    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, fail)
    with pytest.raises(ConfigError) as error:
        find_files("nq", "test", HUB)
    assert str(error.value) == (
        f"data.test_files: 'nq': expected nq/test.jsonl of data.hub, {HUB}, found none (no net). "
        "A local folder of that layout works too."
    )
    with pytest.raises(ConfigError) as error:
        find_files("data/nq", "train", HUB)
    assert str(error.value) == (
        "data.train_files: 'data/nq' is no path here: expected a data set of that name on the hub, with files of "
        "train, found none (no net). A local folder of that layout works too."
    )


def test_the_real_hub_client_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for entry in ("nq", "PeterJinGo/nq_hotpotqa_train"):
        with pytest.raises(ConfigError, match=r"A local folder of that layout works too\."):
            find_files(entry, "train", HUB)
    with pytest.raises(ConfigError, match=r"found none \(.*'not/a/name'"):
        find_files("nq", "train", "not/a/name")
