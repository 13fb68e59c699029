"""Retrieval: what a rollout searches with. Importing it is cheap; models and indexes load at the first use."""

from sdsearch_lightning.retrieval.base import Retriever, as_passages, check_retriever
from sdsearch_lightning.retrieval.dense import DenseRetriever

__all__ = ["DenseRetriever", "Retriever", "as_passages", "check_retriever"]
