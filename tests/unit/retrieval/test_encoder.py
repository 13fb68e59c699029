"""Against plain sentence-transformers, on a tiny BERT made here."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from sdsearch_lightning.errors import ConfigError, DataError, RetrievalError
from sdsearch_lightning.retrieval.encoder import CONVENTIONS, NONE, TextEncoder, convention_of

TEXTS = ["the capital of france", "a play", "the river and the play of a capital", "seine"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "query", "passage", ":", "the", "capital", "of", "france", "a"]
WORDS += ["play", "river", "and", "represent", "this", "sentence", "for", "searching", "relevant", "passages"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A plain transformers folder."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=40, **shape)).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make(bert, tmp_path_factory):
    """A sentence-transformers folder of a name, pooling and prompts."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    def made(name, pooling="mean", prompts=None):
        folder = tmp_path_factory.mktemp("encoders") / name
        modules = [Transformer(str(bert)), Pooling(32, pooling)]
        SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save(str(folder))
        return folder

    return made


def plain(folder, texts, prompt=""):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu").encode(texts, prompt=prompt, normalize_embeddings=True)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_a_folder_gives_the_vectors_of_sentence_transformers(make, pooling):
    folder = make("mine", pooling, {"query": "query: ", "document": "passage: "})
    encoder = TextEncoder(str(folder), batch_size=2, device="cpu")
    queries, passages = encoder.encode_queries(TEXTS), encoder.encode_passages(TEXTS)
    np.testing.assert_allclose(queries, plain(folder, TEXTS, "query: "), atol=1e-6)
    np.testing.assert_allclose(passages, plain(folder, TEXTS, "passage: "), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-6)
    assert encoder.dimension == 32 and np.abs(queries - passages).max() > 1e-4


@pytest.mark.parametrize("key", ["document", "passage", "corpus"])
def test_any_key_of_passage_prompts_counts(make, key):
    folder = make("mine", prompts={"query": "query: ", key: "passage: "})
    np.testing.assert_allclose(
        TextEncoder(str(folder)).encode_passages(TEXTS), plain(folder, TEXTS, "passage: "), atol=1e-6
    )


@pytest.mark.parametrize("name", ["e5", "e5-base-v2", "my_e5_small"])
def test_e5_gets_both_prompts_whatever_it_is_called(make, name):
    """A builder that tests the name for equality with "e5" leaves e5-base-v2 without its passage prompt."""
    folder = make(name)
    encoder = TextEncoder(str(folder))
    np.testing.assert_allclose(encoder.encode_queries(TEXTS), plain(folder, TEXTS, "query: "), atol=1e-6)
    np.testing.assert_allclose(encoder.encode_passages(TEXTS), plain(folder, TEXTS, "passage: "), atol=1e-6)


def test_what_is_given_wins_over_what_the_model_says(make):
    folder = make("e5", prompts={"query": "the "})
    encoder = TextEncoder(str(folder))
    np.testing.assert_allclose(encoder.encode_queries(TEXTS), plain(folder, TEXTS, "the "), atol=1e-6)
    np.testing.assert_allclose(encoder.encode_passages(TEXTS), plain(folder, TEXTS), atol=1e-6)  # it states one side
    given = TextEncoder(str(folder), query_prompt="", passage_prompt="a ")
    np.testing.assert_allclose(given.encode_queries(TEXTS), plain(folder, TEXTS), atol=1e-6)
    np.testing.assert_allclose(given.encode_passages(TEXTS), plain(folder, TEXTS, "a "), atol=1e-6)


@pytest.mark.parametrize(("name", "pooling"), [("bge-small", "cls"), ("contriever", "mean"), ("gte", "mean")])
def test_a_plain_folder_is_pooled_by_its_family(bert, tmp_path, name, pooling):
    folder = shutil.copytree(bert, tmp_path / name)
    encoder = TextEncoder(str(folder), batch_size=1, device="cpu")
    body, tokenizer = BertModel.from_pretrained(bert).eval(), BertTokenizerFast.from_pretrained(bert)
    prompt = convention_of(name).query_prompt
    with torch.no_grad():
        hidden = [body(**tokenizer(prompt + text, return_tensors="pt")).last_hidden_state[0] for text in TEXTS]
    pooled = torch.stack([row.mean(0) if pooling == "mean" else row[0] for row in hidden])
    expected = torch.nn.functional.normalize(pooled, dim=1).numpy()
    np.testing.assert_allclose(encoder.encode_queries(TEXTS), expected, atol=1e-6)
    other = torch.stack([row[0] if pooling == "mean" else row.mean(0) for row in hidden])
    assert np.abs(torch.nn.functional.normalize(other, dim=1).numpy() - expected).max() > 1e-3


def test_families_by_name():
    assert convention_of("intfloat/e5-base-v2").passage_prompt == "passage: "
    assert convention_of("BAAI/bge-base-en-v1.5").query_prompt.startswith("Represent this sentence")
    assert convention_of("BAAI/bge-base-en-v1.5").pooling == "cls"
    others = [
        "BAAI/bge-m3",
        "intfloat/multilingual-e5-large-instruct",
        "sentence-transformers/all-MiniLM-L6-v2",
        "be5t",
    ]
    assert all(convention_of(name) == NONE for name in others)


def test_half_precision_is_close(make):
    folder = make("mine")
    full, half = (TextEncoder(str(folder), dtype=dtype).encode_queries(TEXTS) for dtype in ("float32", "bfloat16"))
    assert half.dtype == np.float32 and 1e-5 < np.abs(full - half).max() < 3e-2
    with pytest.raises(ConfigError, match="dtype: expected one of float32, bfloat16, float16, found 'int8'"):
        TextEncoder(str(folder), dtype="int8")


def test_the_identity_knows_what_passages_depend_on(make):
    folder = make("e5")
    same = shutil.copytree(folder, folder.parent / "copies" / "e5")

    def identity(path, **options):
        return TextEncoder(str(path), **options).identity

    assert identity(folder) == identity(same, query_prompt="q", batch_size=3)
    others = [identity(folder, passage_prompt=""), identity(folder, dtype="bfloat16")]
    others += [identity(shutil.copytree(folder, folder.parent / "bge")), identity("intfloat/e5-base-v2")]
    assert all(other != identity(folder) for other in others)


def test_pooling_by_name_is_part_of_the_identity(bert, tmp_path):
    """A plain folder is pooled by its family: the same weights under another name are another encoder."""
    mean, cls = (shutil.copytree(bert, tmp_path / name) for name in ("model", "my-bge"))
    assert TextEncoder(str(mean)).identity != TextEncoder(str(cls)).identity


def test_a_pickle_in_a_later_module_is_not_read(make):
    from safetensors.torch import load_file
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense

    folder = make("dense")
    model = SentenceTransformer(str(folder), device="cpu")
    model.append(Dense(32, 8))
    model.save(str(folder))
    assert TextEncoder(str(folder)).dimension == 8
    (weights,) = folder.glob("2_*/model.safetensors")
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin is a pickle, which is never read"):
        TextEncoder(str(folder)).encode_queries(TEXTS)


def test_a_hub_model_is_fetched_without_pickles(make, monkeypatch):
    folder, asked = make("e5"), {}

    def fetch(name, ignore_patterns):
        asked[name] = ignore_patterns
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    vectors = TextEncoder("intfloat/e5-base-v2", device="cpu").encode_passages(TEXTS)
    np.testing.assert_allclose(vectors, plain(folder, TEXTS, "passage: "), atol=1e-6)
    assert {"*.bin", "*.pkl"} <= set(asked["intfloat/e5-base-v2"])


def test_vectors_that_are_not_finite_are_no_vectors(make):
    from sentence_transformers import SentenceTransformer

    folder = make("broken")
    model = SentenceTransformer(str(folder), device="cpu")
    model[0].model.embeddings.word_embeddings.weight.data[:] = torch.nan
    model.save(str(folder))
    with pytest.raises(RetrievalError, match="made a vector that is not finite"):
        TextEncoder(str(folder)).encode_queries(TEXTS)
    with pytest.raises(DataError, match="made vectors that are not finite"):
        TextEncoder(str(folder)).encode_passages(TEXTS)


def test_pickled_weights_are_not_read(bert, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "pickled")
    torch.save(BertModel.from_pretrained(bert).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"which cannot be loaded: .*is a pickle"):
        TextEncoder(str(folder)).encode_queries(TEXTS)


# --- families that are told, and found -------------------------------------------------------------------------------


def test_a_snapshot_of_the_hub_is_known_by_its_repository():
    cache = "/root/.cache/huggingface/hub/models--{}/snapshots/f52bf8ec8c7124536f0efb74aca902b2995e5bcd"
    assert convention_of(cache.format("intfloat--e5-base-v2")) == CONVENTIONS["e5"]
    assert convention_of(cache.format("BAAI--bge-base-en-v1.5")) == CONVENTIONS["bge"]
    assert convention_of(cache.format("BAAI--bge-m3")) == convention_of(cache.format("me--model")) == NONE


def test_the_models_own_config_tells_its_family(bert, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "encoder")
    config = json.loads((folder / "config.json").read_text())
    for told, family in [("intfloat/e5-base-v2", "e5"), ("/old/place/bge-large", "bge"), ("BAAI/bge-m3", None)]:
        (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": told}))
        assert convention_of(str(folder)) == CONVENTIONS.get(family, NONE)
    named = folder.rename(tmp_path / "my-e5")  # the nearest name wins
    (named / "config.json").write_text(json.dumps(config | {"_name_or_path": "BAAI/bge-large"}))
    assert convention_of(str(named)) == CONVENTIONS["e5"]
    (named / "config.json").write_text("[")
    assert convention_of(str(named.rename(tmp_path / "x"))) == NONE


def test_a_family_that_is_told_gives_prompts_and_pooling(bert, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "model")
    named = shutil.copytree(bert, tmp_path / "bge-small")
    told, other = TextEncoder(str(folder), convention="bge"), TextEncoder(str(folder))
    expected = TextEncoder(str(named)).encode_queries(TEXTS)
    np.testing.assert_allclose(told.encode_queries(TEXTS), expected, atol=1e-6)
    assert np.abs(other.encode_queries(TEXTS) - expected).max() > 1e-3
    assert told.identity == TextEncoder(str(named)).identity != other.identity
    cls = TextEncoder(str(folder), pooling="cls", query_prompt=CONVENTIONS["bge"].query_prompt)
    np.testing.assert_allclose(cls.encode_queries(TEXTS), expected, atol=1e-6)
    with pytest.raises(ConfigError, match="convention: expected one of e5, bge, contriever, gte, found 'e6'"):
        TextEncoder(str(folder), convention="e6")


def test_pooling_against_the_models_own_is_refused(make):
    folder = str(make("mine", "cls"))
    assert TextEncoder(folder, pooling="cls").dimension == 32
    with pytest.raises(ConfigError, match="pools by .*cls.*, not by mean"):
        TextEncoder(folder, pooling="mean").encode_queries(TEXTS)


def test_texts_are_cut_at_max_length(make):
    folder = str(make("mine"))
    short = TextEncoder(folder, max_length=4)  # [CLS] the capital [SEP]
    np.testing.assert_allclose(
        short.encode_passages(["the capital of france"]),
        TextEncoder(folder).encode_passages(["the capital"]),
        atol=1e-6,
    )
    assert short.identity != TextEncoder(folder).identity
    with pytest.raises(ConfigError, match="max_length: expected at least 1 token"):
        TextEncoder(folder, max_length=0)
