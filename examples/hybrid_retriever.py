"""Words and meaning at once: the rankings of several retrievers, merged by reciprocal rank fusion.

    data:
      class_path: SearchDataModule
      init_args:
        retriever:
          class_path: examples.hybrid_retriever.HybridRetriever
          init_args:
            retrievers:
              - {class_path: sdsearch_lightning.retrieval.BM25Retriever, init_args: {corpus: corpus.jsonl}}
              - {class_path: sdsearch_lightning.retrieval.DenseRetriever, init_args: {corpus: corpus.jsonl}}

A passage scores the sum of 1 / (60 + rank) over the rankings that hold it (Cormack, Clarke & Buettcher, SIGIR 2009):
only ranks count, so scores of different kinds need no scaling. Passages are the same where their ids are.

Cost: all searches, one after the other, for `depth` passages each; the fusion is nothing beside them. Memory: theirs.
`examples.` works from the root of the repository; a file of yours only has to be on PYTHONPATH.
"""

from dataclasses import replace

from sdsearch_lightning.retrieval import Retriever, as_passages


class HybridRetriever(Retriever):
    """Asks every retriever for `depth` passages, or k if that is more, and fuses what they find."""

    def __init__(self, retrievers: list[Retriever], depth: int = 50, rank_constant: float = 60.0):
        """A larger `rank_constant` makes the first ranks count less."""
        self.retrievers, self.depth, self.rank_constant = retrievers, depth, rank_constant

    def search(self, queries, k):
        """One list per query; equal scores keep the order of the retrievers."""
        depth = max(self.depth, k)
        found = [as_passages(each.search(queries, depth), len(queries), depth) for each in self.retrievers]
        return [self.fuse(rankings)[:k] for rankings in zip(*found, strict=True)]

    def fuse(self, rankings):
        """All passages of some rankings, best first."""
        scores, passages = {}, {}
        for ranking in rankings:
            for rank, passage in enumerate(ranking, start=1):
                passages.setdefault(passage.id, passage)
                scores[passage.id] = scores.get(passage.id, 0.0) + 1 / (self.rank_constant + rank)
        return [replace(passages[key], score=scores[key]) for key in sorted(scores, key=scores.get, reverse=True)]

    def prepare(self):
        """Prepares all that can be."""
        for retriever in self.retrievers:
            getattr(retriever, "prepare", lambda: None)()

    def close(self):
        """Closes all that can be."""
        for retriever in self.retrievers:
            getattr(retriever, "close", lambda: None)()
