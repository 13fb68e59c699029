"""Retrieval: what a rollout searches with. Importing it is cheap; models and indexes load at the first use."""

from sdsearch_lightning.retrieval.base import Retriever, as_passages, check_retriever
from sdsearch_lightning.retrieval.bm25 import BM25Retriever
from sdsearch_lightning.retrieval.cached import CachedRetriever
from sdsearch_lightning.retrieval.dense import DenseRetriever
from sdsearch_lightning.retrieval.milvus import MilvusRetriever
from sdsearch_lightning.retrieval.remote import RemoteRetriever

__all__ = [
    "BM25Retriever",
    "CachedRetriever",
    "DenseRetriever",
    "MilvusRetriever",
    "RemoteRetriever",
    "Retriever",
    "as_passages",
    "check_retriever",
]
