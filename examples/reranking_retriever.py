"""A second look: a cross-encoder reads the query with each candidate of another retriever and sorts them anew.

    data:
      class_path: SearchDataModule
      init_args:
        retriever:
          class_path: examples.reranking_retriever.RerankingRetriever
          init_args:
            model: cross-encoder/ms-marco-MiniLM-L6-v2
            retriever: {class_path: sdsearch_lightning.retrieval.BM25Retriever, init_args: {corpus: corpus.jsonl}}

Cost: the search for `depth` passages, then `depth` forward passes of the model per query, which wants a GPU.
Memory: the weights (90 MB for that model) and a batch of pairs, on the GPU of the rollouts if there is one, unless
`device` says otherwise. Put a CachedRetriever around it.
`examples.` works from the root of the repository; a file of yours only has to be on PYTHONPATH.
"""

from dataclasses import replace

from sdsearch_lightning.retrieval import Retriever, as_passages


class RerankingRetriever(Retriever):
    """Asks `retriever` for `depth` passages, or k if that is more, and keeps the k that `model` scores highest."""

    def __init__(self, retriever: Retriever, model: str, depth: int = 30, batch_size: int = 32, device: str = None):
        """`model` is a folder or hub name of a sentence-transformers CrossEncoder with one output."""
        self.retriever, self.model, self.depth = retriever, model, depth
        self.batch_size, self.device, self.encoder = batch_size, device, None

    def search(self, queries, k):
        """One list per query, all pairs in one call; equal scores keep the order of the retriever."""
        depth = max(self.depth, k)
        found = as_passages(self.retriever.search(queries, depth), len(queries), depth)
        pairs = [(query, hit.contents) for query, hits in zip(queries, found, strict=True) for hit in hits]
        options = {"batch_size": self.batch_size, "show_progress_bar": False}
        scores = iter(self.load().predict(pairs, **options).tolist() if pairs else [])
        scored = [[replace(hit, score=next(scores)) for hit in hits] for hits in found]
        return [sorted(hits, key=lambda hit: -hit.score)[:k] for hits in scored]

    def load(self):
        """The model; weights in safetensors only, since the older files are pickles, which can run code."""
        if self.encoder is None:
            from sentence_transformers import CrossEncoder

            self.encoder = CrossEncoder(self.model, device=self.device, model_kwargs={"use_safetensors": True})
        return self.encoder

    def prepare(self):
        """Prepares the retriever."""
        getattr(self.retriever, "prepare", lambda: None)()

    def close(self):
        """Lets go of the model and closes the retriever."""
        self.encoder = None
        getattr(self.retriever, "close", lambda: None)()
