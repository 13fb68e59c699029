"""A vector database: one client for an embedded file and for a cluster that serves any number of machines.

    uri: ./milvus.db            milvus-lite inside this process; one process at a time may open the file
    uri: http://host:19530      a server or cluster; every rank connects, and none holds vectors

The collection holds all that a search needs: row i is passage i, with id, contents and fields. Its property "sdsearch"
tells what it was filled from, and one filled from something else is refused. Rows are upserted, so a killed fill goes
on, and a request that was sent twice, or two nodes that fill at once, make no duplicates.

Cost: encoding the queries here, then one request per batch: with milvus-lite, about 10 ms for one query, 0.5 ms per
query of a batch of 64 (10,000 passages, 256 numbers each). Memory: here the encoder; there 4 bytes per number of each
vector, and the index. milvus-lite keeps all that, and the texts, in this process.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from sdsearch_lightning.errors import ConfigError, DataError, RetrievalError
from sdsearch_lightning.retrieval.base import Retriever
from sdsearch_lightning.retrieval.corpus import Corpus, write_corpus
from sdsearch_lightning.retrieval.encoder import TextEncoder
from sdsearch_lightning.retrieval.index_folder import CorpusFile, IndexFolder
from sdsearch_lightning.retrieval.static_encoder import write_static_encoder
from sdsearch_lightning.trust.secrets import read_secret, without_secrets
from sdsearch_lightning.types import Passage

_FORMAT = 1  # of the collection
_PROPERTY = "sdsearch"
_TEXTS = ("id", "contents", "fields")  # fields as JSON text: what Milvus does to numbers in its own JSON is its affair
_MAX_BYTES = 65_535  # of a text, by Milvus
_MAX_QUERIES = 1024  # per request; servers stop at 16,384, and an answer carries k texts for each
_ROWS = 256  # per request: some MB, where servers stop at 64
_MINUTES = 3600.0  # seconds for loading or flushing, which take a cluster minutes where the collection is large
_LARGE = 100_000  # passages from which a fill talks

_lite_users: Counter[str] = Counter()  # by file: the last one to close stops milvus-lite, which would stay up otherwise


class MilvusRetriever(Retriever):
    """Searches a Milvus collection by the inner product of normalised sentence embeddings; fills it from a corpus.

    Args:
        uri: address of a server, http://host:19530, or a local path that ends in .db.
        corpus: .jsonl, .jsonl.gz or .parquet to fill the collection from; null: it must be there, and full.
        collection: name of the collection.
        encoder: a sentence-transformers folder or hub name, or "static", which is made from the
            corpus and so needs one.
        token: "user:password" or an API key, or env:NAME, file:PATH; null: none, or what the uri says.
        index: kind of a new collection's index: FLAT (exact, reads every vector), HNSW, IVF_FLAT, ... or AUTOINDEX (the
            server chooses; approximate). On milvus-lite AUTOINDEX found 51% of the best 5 of 10,000, 96% with ef 512.
        search_params: of that index, e.g. {ef: 512} or {nprobe: 32}.
        index_path: folder for byte offsets of the corpus and the static encoder; null: `<corpus>.index` beside it.
        timeout: seconds for connecting and for each request.
        query_prompt: text put before every query; null: as the encoder wants it.
        passage_prompt: text put before every passage; null: as the encoder wants it.
        batch_size: texts per forward pass of the encoder.
        device: where the encoder runs; null: a GPU if there is one ("static" always runs on the CPU).
        dtype: of the encoder's weights, "float32", "bfloat16" or "float16".
    """

    def __init__(
        self,
        uri: str,
        corpus: str | Path | None = None,
        collection: str = "passages",
        encoder: str = "static",
        token: str | None = None,
        index: str = "FLAT",
        search_params: dict[str, Any] | None = None,
        index_path: str | Path | None = None,
        timeout: float = 30.0,
        query_prompt: str | None = None,
        passage_prompt: str | None = None,
        batch_size: int = 256,
        device: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        if encoder == "static" and corpus is None:
            raise ConfigError("encoder: 'static' is made from the corpus, found none. Name the corpus, or an encoder.")
        self._is_file = "://" not in uri and not uri.startswith("unix:")
        if self._is_file and not uri.endswith(".db"):
            raise ConfigError(f"uri: expected http://host:port or a local path that ends in .db, found {uri!r}.")
        self.uri = str(Path(uri).absolute()) if self._is_file else uri
        self.corpus_path = None if corpus is None else Path(corpus)
        self.index_path = None if corpus is None else Path(f"{corpus}.index" if index_path is None else index_path)
        self.collection, self.encoder, self._token, self._timeout = collection, encoder, token, timeout
        self._index, self._search_params = index, search_params or {}
        self._encoder_options: dict[str, Any] = {"query_prompt": query_prompt, "passage_prompt": passage_prompt}
        self._encoder_options |= {"batch_size": batch_size, "device": device, "dtype": dtype}
        self._text_encoder = TextEncoder(encoder, **self._encoder_options)  # loads nothing yet
        self._opened: tuple[Any, TextEncoder] | None = None  # client and encoder

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """The best passages for each query; fills the collection if `prepare` has not.

        Raises:
            ConfigError: k below 1, a collection of something else, or a missing package. DataError: a bad corpus.
            RetrievalError: the server cannot be reached, is late, or refuses.
        """
        if k < 1:
            raise ConfigError(f"k: expected at least 1 passage per query, found {k}.")
        if not queries:
            return []
        client, encoder = self._open()
        vectors = encoder.encode_queries(queries)
        how = {"metric_type": "IP", "params": self._search_params}
        parts = (vectors[start : start + _MAX_QUERIES] for start in range(0, len(vectors), _MAX_QUERIES))
        ask = partial(self._ask, client, "search", limit=k, search_params=how, output_fields=list(_TEXTS))
        return [_passages(hits) for part in parts for hits in ask(part)]

    def prepare(self) -> None:
        """Creates and fills the collection unless it is there, and goes on where a killed fill stopped."""
        self._open()

    def close(self) -> None:
        """Disconnects, and stops milvus-lite; the next search connects again."""
        if self._opened is not None:
            self._disconnect(self._opened[0])
            self._opened = None
        for cached in ("_source", "_folder"):  # the corpus may be another by then
            self.__dict__.pop(cached, None)

    @cached_property
    def _source(self) -> CorpusFile:
        assert self.corpus_path is not None and self.index_path is not None  # a folder is made for a corpus only
        return CorpusFile.read(self.corpus_path, self.index_path)

    @cached_property
    def _folder(self) -> IndexFolder | None:
        if self.corpus_path is None or self.index_path is None:
            return None
        identity = {"format": _FORMAT, "retriever": "milvus", "encoder": "static" if self.encoder == "static" else None}
        return IndexFolder(self.index_path, identity | {"corpus": self._source.digest})

    def _open(self) -> tuple[Any, TextEncoder]:
        if self._opened is None:
            client = self._connect()
            try:
                self._opened = client, self._make_ready(client)
            finally:
                if self._opened is None:
                    self._disconnect(client)
        return self._opened

    def _make_ready(self, client: Any) -> TextEncoder:
        encoder = self._text_encoder
        wanted: dict[str, Any] = {"format": _FORMAT, "encoder": encoder.identity}
        if self._folder is not None:
            self._folder.build(self._write_folder)
            wanted |= {key: self._folder.manifest[key] for key in ("corpus", "num_passages")}
            if self.encoder == "static":
                encoder = TextEncoder(str(self._folder.path / "encoder"), **(self._encoder_options | {"device": "cpu"}))
        wanted["dimension"] = encoder.dimension
        if not self._ask(client, "has_collection"):
            self._create(client, wanted)
        made = self._check(client, wanted)
        self._ask(client, "load_collection", timeout=_MINUTES)
        self._fill(client, encoder, made["num_passages"])
        return encoder

    def _create(self, client: Any, mark: dict[str, Any]) -> None:
        if self._folder is None:
            raise ConfigError(f"{self._name} is not there, and no corpus was named to fill it from. Name one.")
        types = _import("pymilvus").DataType
        schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("row", types.INT64, is_primary=True)
        schema.add_field("vector", types.FLOAT_VECTOR, dim=mark["dimension"])
        for name in _TEXTS:
            schema.add_field(name, types.VARCHAR, max_length=_MAX_BYTES)
        indexes = client.prepare_index_params()
        indexes.add_index("vector", index_type=self._index, metric_type="IP")
        told = {_PROPERTY: json.dumps(mark, sort_keys=True)}
        try:
            self._ask(client, "create_collection", schema=schema, index_params=indexes, properties=told)
        except RetrievalError:  # another node was faster?
            if not self._ask(client, "has_collection"):
                raise

    def _check(self, client: Any, wanted: dict[str, Any]) -> dict[str, Any]:
        """What the collection was filled from; another source than the one wanted is an error."""
        properties = self._ask(client, "describe_collection")["properties"]
        made: dict[str, Any] = json.loads(properties.get(_PROPERTY, "{}"))
        if wrong := [key for key in wanted if made.get(key) != wanted[key]]:
            told = "; ".join(f"{key} {wanted[key]!r}, found {made.get(key)!r}" for key in wrong)
            who = "" if made else " Something else than MilvusRetriever made it."
            raise ConfigError(f"{self._name}: expected {told}.{who} Name another collection, or drop this one.")
        return made

    def _fill(self, client: Any, encoder: TextEncoder, num_passages: int) -> None:
        if (done := self._count(client)) == num_passages:
            return
        if self._folder is None or self.corpus_path is None:
            told = f"expected {num_passages:,} passages, found {done:,}. Is it being filled?"
            raise ConfigError(f"{self._name}: {told} Name the corpus, and the rest is added.")
        size = 16 * encoder.batch_size
        start = max(0, done - _ROWS)  # of a torn request, which a cluster splits, any rows may have arrived
        with closing(Corpus.open(self.corpus_path, self._folder.path)) as corpus:
            for first in range(start, num_passages, size):
                rows = range(first, min(first + size, num_passages))
                entries = [_entry(row, corpus[row], self.corpus_path) for row in rows]
                vectors = encoder.encode_passages([entry["contents"] for entry in entries])
                for entry, vector in zip(entries, vectors, strict=True):
                    entry["vector"] = vector
                for part in range(0, len(entries), _ROWS):
                    self._ask(client, "upsert", entries[part : part + _ROWS])
                if num_passages >= _LARGE:
                    print(f"milvus: {rows.stop:,} of {num_passages:,} passages", file=sys.stderr, flush=True)
        self._ask(client, "flush", timeout=_MINUTES)
        if (done := self._count(client)) != num_passages:
            told = f"expected {num_passages:,} passages after the fill, found {done:,}"
            raise RetrievalError(f"{self._name}: {told}. Does something else write to it? Drop it; it is filled again.")

    def _count(self, client: Any) -> int:
        """Rows, those included that were written a moment ago."""
        answer = self._ask(client, "query", output_fields=["count(*)"], consistency_level="Strong")
        return int(answer[0]["count(*)"])

    def _write_folder(self, folder: Path) -> dict[str, Any]:
        told = write_corpus(self._source, folder)
        if self.encoder == "static":
            write_static_encoder(self._source.path, folder)
        return told

    def _connect(self) -> Any:
        pymilvus = _import("pymilvus")
        if self._is_file:
            _import("milvus_lite")
            Path(self.uri).absolute().parent.mkdir(parents=True, exist_ok=True)
        with self._asking("connecting"):
            client = pymilvus.MilvusClient(
                self.uri, token=read_secret(self._token, "token") or "", timeout=self._timeout
            )
        _lite_users[self.uri] += self._is_file
        return client

    def _disconnect(self, client: Any) -> None:
        client.close()
        _lite_users[self.uri] -= self._is_file
        if self._is_file and not _lite_users[self.uri]:
            _import("milvus_lite").server_manager_instance.release_server(self.uri)

    def _ask(self, client: Any, request: str, *values: Any, timeout: float | None = None, **options: Any) -> Any:
        with self._asking(request):
            return getattr(client, request)(self.collection, *values, timeout=timeout or self._timeout, **options)

    @contextmanager
    def _asking(self, request: str) -> Iterator[None]:
        """Failures come as one exception, not as log lines, a traceback each, from three loggers."""
        levels = {logger: logger.level for logger in map(logging.getLogger, ("pymilvus", "milvus_lite", "grpc"))}
        for logger in levels:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        except (_import("pymilvus").MilvusException, _import("grpc").RpcError) as error:
            hint = " Only one process at a time may open a file; a server serves many." if self._is_file else ""
            reason = getattr(error, "message", error)
            raise RetrievalError(f"{self._name}: {request} failed: {reason}.{hint}") from error
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)

    @property
    def _name(self) -> str:
        return f"Milvus collection {self.collection!r} at {without_secrets(self.uri)}"


def _entry(row: int, passage: Passage, source: Path) -> dict[str, Any]:
    texts = {"id": passage.id, "contents": passage.contents, "fields": json.dumps(passage.fields, ensure_ascii=False)}
    for name, text in texts.items():
        if (size := len(text.encode())) > _MAX_BYTES:
            limit = f"expected at most {_MAX_BYTES:,} bytes of {name}, which is what Milvus holds, found {size:,}"
            raise DataError(f"{source} passage {row} ({passage.id[:40]!r}): {limit}. Split the passage.")
    return {"row": row, **texts}


def _passages(hits: Any) -> list[Passage]:
    found = []
    for hit in sorted(hits, key=lambda hit: (-hit["distance"], hit["row"])):
        identity, contents, fields = (hit["entity"][name] for name in _TEXTS)
        found.append(Passage(identity, contents, float(hit["distance"]), json.loads(fields)))
    return found


def _import(name: str) -> Any:
    try:
        return import_module(name)  # half a second for pymilvus: not before it is needed
    except ImportError as error:
        repair = 'Install it: pip install "sdsearch-lightning[milvus]"'
        raise ConfigError(f"MilvusRetriever needs {name}, found none. {repair}") from error
