"""A graph for a corpus: the triples around the entities that a query mentions, as passages.

    python -m sdsearch_lightning fit --config ... \
        --data.retriever examples.knowledge_graph_retriever.KnowledgeGraphRetriever --data.retriever.path triples.tsv

The file has one triple per line: subject, relation, object between tabs (.tsv), or a JSON object of these three keys
(.jsonl). An entity is mentioned where its name, of up to ten words, stands in the query. A triple scores 1 + the number
of the query's words in it, halved per hop: "Marie Curie" also finds what is known of a "Marie", and ranks it lower.

Cost: some microseconds for each triple of the entities mentioned, and with two hops of their neighbours; `max_triples`
of one entity count. Memory: all of the graph, about 1.3 KB per triple, in each process. `examples.` works from the root
of the repository; a file of yours only has to be on PYTHONPATH.
"""

import re
from pathlib import Path

from sdsearch_lightning.retrieval.jsonl import read_jsonl
from sdsearch_lightning.types import Passage


class KnowledgeGraphRetriever:
    """Passage i is triple i of the file; found where an entity of the query is one or two (`hops`) steps away."""

    def __init__(self, path: str, hops: int = 1, max_triples: int = 1000):
        """Reads the file."""
        self.hops, self.triples, self.rows_of = hops, [], {}
        for row, (subject, relation, target) in enumerate(read_triples(Path(path))):
            self.triples.append((words(subject), words(target), f'"{subject}"\n{subject} {relation} {target}'))
            for entity in {words(subject), words(target)} - {()}:
                if len(rows_of := self.rows_of.setdefault(entity, [])) < max_triples:
                    rows_of.append(row)

    def search(self, queries, k):
        """At most k triples per query; equal scores keep the order of the file."""
        return [self.best(words(query), k) for query in queries]

    def best(self, query, k):
        """Goes from the entities of the query from triple to triple."""
        spans = {query[start : start + size] for start in range(len(query)) for size in range(1, 11)}
        scores, entities = {}, spans & self.rows_of.keys()
        for hop in range(self.hops):
            rows = {row for entity in entities for row in self.rows_of.get(entity, [])} - scores.keys()
            scores |= {row: (1 + len({*query} & {*words(self.triples[row][2])})) / 2**hop for row in rows}
            entities = {entity for row in rows for entity in self.triples[row][:2]}
        ranked = sorted(scores, key=lambda row: (-scores[row], row))
        return [Passage(str(row), self.triples[row][2], scores[row]) for row in ranked[:k]]


def read_triples(path):
    """Subject, relation and object of every line."""
    if path.suffix == ".tsv":
        return [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [[row.values[key] for key in ("subject", "relation", "object")] for row in read_jsonl(path)]


def words(text):
    """Lower-case words of a text, without punctuation."""
    return tuple(re.findall(r"\w+", text.casefold()))
