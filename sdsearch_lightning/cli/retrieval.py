"""The commands without a model: `sdsearch index` builds a retrieval index, `sdsearch serve` shares one over HTTP.

Search-R1's flag names are taken beside ours where they mean the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdsearch_lightning.cli.errors import ShortErrorParser
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.retrieval import BM25Retriever, CachedRetriever, DenseRetriever, Retriever
from sdsearch_lightning.retrieval.backends import BACKENDS
from sdsearch_lightning.retrieval.encoder import DTYPES
from sdsearch_lightning.retrieval.torch_index import PRECISIONS


def index(argv: Sequence[str]) -> None:
    """Builds a retrieval index of a corpus; a killed build goes on where it stopped, a finished one is left alone."""
    options = _index_parser().parse_args(list(argv))
    if Path(options.index_path).is_file():
        raise ConfigError(f"index_path: expected a folder, which may be new, found the file {options.index_path}.")
    if options.retriever_name == "bm25":
        BM25Retriever(options.corpus_path, options.index_path).prepare()
        print(f"BM25 index of {options.corpus_path} is in {options.index_path}")
        return
    retriever = DenseRetriever(
        options.corpus_path,
        options.encoder,
        options.index_path,
        backend=options.backend,
        factory=options.factory,
        passage_prompt=options.passage_prompt,
        batch_size=options.batch_size,
        device=options.device,
        dtype="float16" if options.use_fp16 else options.dtype,
    )
    there = retriever.is_built
    try:
        retriever.prepare()
    except OSError as error:  # a full disk, most of all
        raise ConfigError(f"index_path: {error}. What is built so far is kept: the same command goes on.") from error
    size = sum(path.stat().st_size for path in retriever.folder.rglob("*") if path.is_file())
    print(f"{'there already' if there else 'built'}: {retriever.index_file} ({size / 1e6:.3g} MB in its folder)")
    print(f"serve it: sdsearch serve --corpus_path {options.corpus_path} --index_path {options.index_path}")


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
    if options.retriever_name == "bm25":
        return BM25Retriever(options.corpus_path, options.index_path)
    if not Path(options.index_path).exists():
        raise ConfigError(
            f"index_path: expected an index at {options.index_path}, found nothing. Build it: "
            f"sdsearch index --corpus_path {options.corpus_path} --index_path {options.index_path}"
        )
    given = {"nprobe": options.nprobe, "ef_search": options.ef_search, "scan": options.scan, "device": options.device}
    backend = "faiss-gpu" if options.faiss_gpu else options.backend
    if backend != "auto":
        given["backend"] = backend
    if options.query_prompt is not None:
        given["query_prompt"] = options.query_prompt
    retriever = DenseRetriever.from_index(options.corpus_path, options.index_path, options.encoder, **given)
    if not retriever.is_built:
        raise ConfigError(
            f"index_path: expected the index of {options.corpus_path} by {retriever.encoder}, as that is now, in "
            f"{options.index_path}; found those of something else only. Build it: sdsearch index ..."
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
    add("--retriever_name", "--retrieval_method", type=str, default="dense", help="bm25, or any name for a dense one")
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
    add("--retriever_name", type=str, default="dense", help="bm25, or any name for a dense one")
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
