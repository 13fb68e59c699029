"""SyntheticWorldDataModule: the embedded search problem, small enough for a laptop, that the quick start learns.

It generates what another run would read from files: a corpus, an encoder, questions and demonstrations, all from
`world_seed`. Retrieval is the ordinary DenseRetriever over the written corpus and encoder. Invariants: training and
held-out questions share no start, bridge or answer entity; no fact of the evaluated world occurs in any demonstration.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import islice
from pathlib import Path

from sdsearch_lightning.datamodules.questions import SearchDataModule
from sdsearch_lightning.datamodules.synthetic_world_demonstrations import WorldDemonstrations
from sdsearch_lightning.datamodules.synthetic_world_encoder import Vectors, save_encoder, word_vectors
from sdsearch_lightning.datamodules.synthetic_world_generation import (
    MISSING,
    World,
    WorldShape,
    generate_world,
    sample_questions,
)
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.retrieval import DenseRetriever
from sdsearch_lightning.types import Demonstration, Question

_FORMAT = 1  # of the written folder: raise it when the same options come to mean other bytes


class SyntheticWorldDataModule(SearchDataModule):
    """Questions, demonstrations and a dense index of a generated world; needs no files and no download.

    Args:
        num_entities: entities of a world; two thirds are for training questions, one third is held out.
        num_relations: relations, each with one question word.
        terms_per_relation: index terms per relation, of which a world's documents use one.
        facts_per_entity: facts, and so documents, per entity; at most `num_relations`.
        hop_mix: weights of questions with 1, 2, ... hops; any number of them that the held-out entities can serve.
        num_train_questions: different questions for reinforcement learning.
        num_val_questions: different held-out questions of `validate`, and as many others of `test` and `predict`.
        num_demonstrations: written rollouts of the cold start; they are made when read, so any number is free.
        num_demonstration_worlds: worlds they come from, none of them the evaluated one.
        block_share: share of demonstrations whose prompt holds a hindsight block.
        demonstration_top_k: passages per search in demonstrations; set it as the rollouts' own.
        demonstration_hop_mix: `hop_mix` of the demonstrations; null: as the questions'.
        missing_share: how often a demonstration whose search did not find what its thought needed says so and asks
            again for the same hop; above 0 the vocabulary has one word more.
        demonstration_max_searches: searches of a demonstration with those that ask again; set it as the rollouts' own.
        cache_dir: where corpus, encoder and index are written; default `$XDG_CACHE_HOME/sdsearch_lightning`.
        batch_size: questions (or demonstrations) per process and step.
        eval_batch_size: questions per process and evaluation batch.
        seed: decides the order of every epoch and, without `world_seed`, everything else: the same seed gives the same
            bytes in any process.
        world_seed: fixes the world, its encoder, its questions and the demonstrations, so that runs of several seeds
            can share a world and a cold start; null: `seed`.
    """

    def __init__(
        self,
        num_entities: int = 300,
        num_relations: int = 12,
        terms_per_relation: int = 4,
        facts_per_entity: int = 8,
        hop_mix: tuple[float, ...] = (0.2, 0.5, 0.3),
        num_train_questions: int = 1024,
        num_val_questions: int = 128,
        num_demonstrations: int = 16_000,
        num_demonstration_worlds: int = 40,
        block_share: float = 0.7,
        demonstration_top_k: int = 2,
        demonstration_hop_mix: tuple[float, ...] | None = None,
        missing_share: float = 0.0,
        demonstration_max_searches: int = 4,
        cache_dir: str | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 128,
        seed: int = 0,
        world_seed: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed)
        for name, value in (
            ("num_train_questions", num_train_questions),
            ("num_val_questions", num_val_questions),
            ("num_demonstrations", num_demonstrations),
            ("num_demonstration_worlds", num_demonstration_worlds),
            ("demonstration_top_k", demonstration_top_k),
            ("demonstration_max_searches", demonstration_max_searches),
        ):
            if value < 1:
                raise ConfigError(f"data.{name}: expected at least 1, found {value}.")
        for name, share in (("block_share", block_share), ("missing_share", missing_share)):
            if not 0 <= share <= 1:
                raise ConfigError(f"data.{name}: expected a share between 0 and 1, found {share}.")
        self.world_seed = seed if world_seed is None else world_seed
        self._shape = WorldShape(num_entities, num_relations, terms_per_relation, facts_per_entity)
        held_out = len(self._shape.groups()[1])
        self._hop_mix = _checked_hop_mix("hop_mix", hop_mix, held_out)
        self._demonstration_hop_mix = (
            self._hop_mix
            if demonstration_hop_mix is None
            else _checked_hop_mix("demonstration_hop_mix", demonstration_hop_mix, num_entities)
        )
        self._num_questions = {"train": num_train_questions, "val": num_val_questions}
        self._num_demonstrations, self._num_demonstration_worlds = num_demonstrations, num_demonstration_worlds
        self._block_share, self._missing_share = block_share, missing_share
        self._demonstration_top_k, self._max_searches = demonstration_top_k, demonstration_max_searches
        folder = Path(cache_dir).expanduser() if cache_dir else _default_cache()
        self.world_folder = folder / f"world-{self._fingerprint()}"
        """Holds the corpus, the encoder and the index once `prepare_data` has run."""
        self.retriever = DenseRetriever(self.world_folder / "corpus.jsonl", encoder=str(self.world_folder / "encoder"))

    @cached_property
    def world(self) -> World:
        """The evaluated world: that of reinforcement learning, validation and test."""
        return generate_world(self._shape, self._shape.groups(), random.Random(f"{self.world_seed}/world"))

    def prepare_data(self) -> None:
        """Write corpus and encoder where they are missing, then build the index. Runs on one process per node."""
        if not self.world_folder.is_dir():
            self._write()
        super().prepare_data()

    def questions(self, split: str) -> Sequence[Question]:
        """Different questions of `split`: train, val, test or predict; the last three start from held-out entities."""
        train, held_out = self._shape.groups()
        starts, stream = (train, "train") if split == "train" else (held_out, "held-out")
        rng = random.Random(f"{self.world_seed}/{stream}")
        questions = sample_questions(self.world, rng, starts, self._hop_mix, stream)
        count = self._num_questions["train" if split == "train" else "val"]
        skipped = count if split in ("test", "predict") else 0
        return list(islice(questions, skipped, skipped + count))

    def demonstrations(self) -> Sequence[Demonstration]:
        """Written rollouts in other worlds, which share the search engine's word vectors but no fact with this one."""
        return WorldDemonstrations(
            self._shape,
            self._vectors,
            frozenset(fact.triple for fact in self.world.facts),
            length=self._num_demonstrations,
            num_worlds=self._num_demonstration_worlds,
            hop_mix=self._demonstration_hop_mix,
            block_share=self._block_share,
            top_k=self._demonstration_top_k,
            missing_share=self._missing_share,
            max_searches=self._max_searches,
            seed=self.world_seed,
        )

    def best_query(self, question: Question) -> str:
        """The query that finds the first hop: the start entity with the term that this world's documents use."""
        _, start, _, relation, *_ = question.text.split()
        return f"{start} {self.world.terms[relation]}"

    def vocabulary(self) -> tuple[str, ...]:
        """Words of a word-level tokenizer for the world and its protocol texts; the tags come from the protocol."""
        return (*self._shape.vocabulary, MISSING) if self._missing_share else self._shape.vocabulary

    @property
    def _vectors(self) -> Vectors:
        return word_vectors(self._shape, self.world_seed)

    def _fingerprint(self) -> str:
        options = {"format": _FORMAT, "seed": self.world_seed, **asdict(self._shape)}
        return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]

    def _write(self) -> None:
        # Into a folder of its own, then renamed: a killed or concurrent run never leaves half a world behind.
        self.world_folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.world_folder.parent) as temporary:
            draft = Path(temporary) / "world"
            draft.mkdir()
            rows = ({"id": str(index), "contents": text} for index, text in enumerate(self.world.documents))
            (draft / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            save_encoder(self._vectors, draft / "encoder")
            try:
                draft.rename(self.world_folder)
            except OSError:
                if not self.world_folder.is_dir():  # otherwise another process was faster, with the same bytes
                    raise


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdsearch_lightning"


def _checked_hop_mix(name: str, hop_mix: Sequence[float], num_entities: int) -> tuple[float, ...]:
    if not hop_mix or min(hop_mix) < 0 or sum(hop_mix) <= 0:
        raise ConfigError(
            f"data.{name}: expected weights of questions with 1, 2, ... hops, none negative and not all 0, found "
            f"{tuple(hop_mix)}."
        )
    longest = max(hops for hops, weight in enumerate(hop_mix, start=1) if weight)
    if longest >= num_entities:  # a path of n hops visits n + 1 entities
        raise ConfigError(
            f"data.{name}: expected at most {num_entities - 1} hops, since {num_entities} entities serve no more, "
            f"found {longest}. Give fewer weights, or raise data.num_entities."
        )
    return tuple(hop_mix)
