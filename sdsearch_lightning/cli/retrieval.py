"""The commands without a model: `sdsearch index` builds a retrieval index, `sdsearch serve` shares one over HTTP.

Search-R1's flag names are taken beside ours where they mean the same; what needs nothing here is answered in a line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdsearch_lightning.cli.errors import ShortErrorParser
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.files import DiskFullError
from sdsearch_lightning.retrieval import BM25Retriever, CachedRetriever, DenseRetriever, Retriever
from sdsearch_lightning.retrieval.backends import BACKENDS
from sdsearch_lightning.retrieval.encoder import CONVENTIONS, DTYPES, TextEncoder
from sdsearch_lightning.retrieval.imported import index_embeddings
from sdsearch_lightning.retrieval.index_folder import described, finished_folders
from sdsearch_lightning.retrieval.torch_index import PRECISIONS

NOTES = {
    "save_embedding": "a killed build goes on from its vectors by itself; --backend torch keeps them, as vectors.npy",
    "faiss_gpu": "an index is built on the CPU and encoded on the GPU (--device); give --faiss_gpu to sdsearch serve",
}
"""Flags of Search-R1's builder that change nothing here, and what stands in their place."""
RETRIEVER_NAME = f"bm25; or a name with {', '.join(CONVENTIONS)}, whose prompts and pooling it then gets; or any"


def index(argv: Sequence[str]) -> None:
    """Builds a retrieval index of a corpus; a killed build goes on where it stopped, a finished one is left alone."""
    options = _index_parser().parse_args(list(argv))
    if Path(options.index_path).is_file():
        raise ConfigError(f"index_path: expected a folder, which may be new, found the file {options.index_path}.")
    if options.retriever_name == "bm25":
        BM25Retriever(options.corpus_path, options.index_path).prepare()
        print(f"BM25 index of {options.corpus_path} is in {options.index_path}")
        return
    for flag, note in NOTES.items():
        if getattr(options, flag):
            print(f"note: --{flag} changes nothing: {note}.")
    given = {
        "passage_prompt": options.passage_prompt,
        "batch_size": options.batch_size,
        "device": options.device,
        "dtype": "float16" if options.use_fp16 else options.dtype,
        "pooling": options.pooling_method,
        **_encoder_options(options),
    }
    if options.embedding_path is not None:
        _index_embeddings(options, given)
        return
    retriever = DenseRetriever(
        options.corpus_path,
        options.encoder,
        options.index_path,
        backend=options.backend,
        factory=options.factory,
        **given,
    )
    there = retriever.is_built
    try:
        retriever.prepare()
    except DiskFullError:
        raise
    except OSError as error:  # a folder that may not be written, most of all
        raise ConfigError(f"index_path: {error}. What is built so far is kept: the same command goes on.") from error
    size = sum(path.stat().st_size for path in retriever.folder.rglob("*") if path.is_file())
    print(f"{'there already' if there else 'built'}: {retriever.index_file} ({size / 1e6:.3g} MB in its folder)")
    print(f"serve it: sdsearch serve --corpus_path {options.corpus_path} --index_path {options.index_path}")


def _index_embeddings(options: Any, given: dict[str, Any]) -> None:
    """A plain FAISS file of vectors that are there already, compared with what the encoder makes of three passages."""
    name = Path(options.encoder).name if options.retriever_name == "dense" else options.retriever_name.lower()
    file = Path(options.index_path) / f"{name}_{options.factory.replace(',', '_')}.index"
    if file.exists():
        raise ConfigError(
            f"index_path: expected no {file.name} in {options.index_path} yet, found one. Remove it first."
        )
    encoder = TextEncoder(options.encoder, **given)
    num_vectors = index_embeddings(Path(options.embedding_path), encoder.dimension, file, options.factory)
    try:
        DenseRetriever(options.corpus_path, options.encoder, file, **given).search(["a first search"], 1)
    except Exception:
        file.unlink()
        raise
    print(f"built: {file} of the {num_vectors:,} vectors in {options.embedding_path}")
    more = "" if options.retriever_name == "dense" else f" --retriever_name {options.retriever_name}"
    where = f"--corpus_path {options.corpus_path} --index_path {file}"
    print(f"serve it: sdsearch serve {where} --encoder {options.encoder}{more}")


def _encoder_options(options: Any) -> dict[str, Any]:
    """What `--retriever_name` and `--max_length` tell of an encoder: nothing where they are not given."""
    words = re.split(r"[^a-z0-9]+", options.retriever_name.lower())
    family = next((name for name in CONVENTIONS if name in words), None)
    told = {"convention": family, "max_length": options.max_length}
    return {name: value for name, value in told.items() if value is not None}


def serve(argv: Sequence[str]) -> None:
    """Serves an index over HTTP, POST /retrieve, as Search-R1's retrieval server does; stops with Ctrl-C."""
    options = _serve_parser().parse_args(list(argv))
    from sdsearch_lightning.retrieval.server.limits import ServerLimits
    from sdsearch_lightning.retrieval.server.process import serve as run_server  # needs the extra `serve`

    retriever: Retriever = _opened(options)
    if options.cache_entries:
        retriever = CachedRetriever(retriever, options.cache_entries)
    token = os.environ.get("SDSEARCH_TOKEN") or None  # not an option: those are seen in the list of processes
    limits = ServerLimits(
        max_request_passages=options.max_request_passages, max_client_connections=options.max_client_connections
    )
    hosts = [name.strip() for name in options.allowed_hosts.split(",") if name.strip()]
    run_server(retriever, options.topk, options.host, options.port, token, limits, allowed_hosts=hosts)


def _opened(options: Any) -> Retriever:
    path = Path(options.index_path)
    build = f"Build it: sdsearch index --corpus_path {options.corpus_path} --index_path {path}"
    if options.retriever_name == "bm25":
        lexical = BM25Retriever(options.corpus_path, path)
        if not lexical.is_built:
            raise ConfigError(
                f"index_path: expected a BM25 index of {options.corpus_path}, as that is now, in {path}, found none. "
                f"{build} --retriever_name bm25"
            )
        return lexical
    if not path.exists():
        is_in = path.suffix == ".index" and path.parent.is_dir() and finished_folders(path.parent)
        advice = (
            f"Name the folder, which holds indexes: --index_path {path.parent}"
            if is_in
            else (f"Build it: sdsearch index --corpus_path {options.corpus_path} --index_path {path}")
        )
        raise ConfigError(f"index_path: expected an index at {path}, found nothing. {advice}")
    given = {"nprobe": options.nprobe, "ef_search": options.ef_search, "scan": options.scan, "device": options.device}
    backend = "faiss-gpu" if options.faiss_gpu else options.backend
    if backend != "auto":
        given["backend"] = backend
    if options.query_prompt is not None:
        given["query_prompt"] = options.query_prompt
    given |= _encoder_options(options)
    retriever = DenseRetriever.from_index(options.corpus_path, options.index_path, options.encoder, **given)
    if not retriever.is_built:
        raise ConfigError(
            f"index_path: expected an index of {options.corpus_path} by encoder {retriever.encoder!r}, as that is now, "
            f"in {path}, found {described(path) or 'none'}. {build} --encoder {retriever.encoder}"
        )
    return retriever


def _index_parser() -> ShortErrorParser:
    parser = _parser("index", str(index.__doc__))
    add = parser.add_argument
    add("--index_path", "--save_dir", type=str, required=True, help="folder that keeps indexes")
    add("--encoder", "--model_path", type=str, default="static", help="sentence-transformers folder, hub name, static")
    add(
        "--factory",
        "--faiss_type",
        type=str,
        default="Flat",
        help="FAISS kind: Flat, IVF4096,SQ8, IVF4096,PQ64, HNSW32",
    )
    add("--retriever_name", "--retrieval_method", type=str, default="dense", help=RETRIEVER_NAME)
    add("--max_length", type=int | None, default=None, help="tokens of a text that the encoder reads; null: all it can")
    add(
        "--pooling_method", type=str | None, choices=("mean", "cls"), default=None, help="of a plain transformers model"
    )
    add("--embedding_path", type=str | None, default=None, help="vectors that are encoded already: a float32 memmap")
    add("--save_embedding", action="store_true", help="taken, and not needed")
    add("--faiss_gpu", action="store_true", help="taken, and not needed")
    add(
        "--backend",
        type=str,
        choices=BACKENDS,
        default="auto",
        help="who will search it; auto: faiss where it is installed",
    )
    add("--passage_prompt", type=str, default=None, help="text before every passage; null: as the encoder wants")
    add("--batch_size", type=int, default=256, help="passages per forward pass")
    add("--device", type=str, default=None, help="where the encoder runs; null: a GPU if there is one")
    add("--dtype", type=str, choices=DTYPES, default="float32", help="number format of the encoder's weights")
    add("--use_fp16", action="store_true", help="the same as --dtype float16")
    return parser


def _serve_parser() -> ShortErrorParser:
    parser = _parser("serve", str(serve.__doc__))
    add = parser.add_argument
    add("--index_path", type=str, required=True, help="folder from sdsearch index, or a FAISS file (e5_Flat.index)")
    add(
        "--encoder",
        "--retriever_model",
        type=str,
        default=None,
        help="sentence-transformers folder, hub name, static; null: as it was built",
    )
    add("--topk", type=int, default=3, help="passages per query where a request does not say")
    add(
        "--host",
        type=str,
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0 opens it to the network: set SDSEARCH_TOKEN",
    )
    add("--port", type=int, default=8000, help="port to listen at")
    add("--allowed_hosts", type=str, default="", help="names beside loopback's for the Host header, a,b; * for any")
    add("--max_request_passages", type=int, default=16384, help="queries x topk of one request; more is refused (413)")
    add("--max_client_connections", type=int, default=512, help="connections of one address; more are refused (429)")
    add("--retriever_name", type=str, default="dense", help=RETRIEVER_NAME)
    add("--max_length", type=int | None, default=None, help="tokens of a query that are read; null: as it was built")
    add("--backend", type=str, choices=BACKENDS, default="auto", help="who searches; auto: who built it")
    add("--faiss_gpu", action="store_true", help="the same as --backend faiss-gpu")
    add("--nprobe", type=int, default=32, help="lists that a query visits (IVF)")
    add("--ef_search", type=int, default=128, help="candidates that a query keeps (HNSW)")
    add("--scan", type=str, choices=PRECISIONS, default="auto", help="arithmetic of torch's scan; exact in any")
    add("--query_prompt", type=str, default=None, help="text before every query; null: as the encoder wants")
    add("--device", type=str, default=None, help="where the encoder runs; null: a GPU if there is one")
    add("--cache_entries", type=int, default=0, help="answers to remember; 0: none")
    return parser


def _parser(name: str, description: str) -> ShortErrorParser:
    usage = f"sdsearch {name} --corpus_path FILE --index_path FOLDER [--key value ...]"
    parser = ShortErrorParser(prog=f"sdsearch {name}", usage=usage, description=description)
    parser.add_argument(
        "--corpus_path", type=str, required=True, help="passages to search: a .jsonl, .jsonl.gz or .parquet file"
    )
    return parser
