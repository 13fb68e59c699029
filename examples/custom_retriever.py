"""A retriever of your own: any class with `search(queries, k)`. No base class and no annotations are needed.

This one looks words up in a small JSON file of {title: text} and ranks by how many of the query's words a text holds.

    python -m sdsearch_lightning fit --config ... \
        --data.retriever examples.custom_retriever.KeywordRetriever --data.retriever.path facts.json

`examples.` works from the root of the repository; a file of yours only has to be on PYTHONPATH.
"""

import json

from sdsearch_lightning.types import Passage


class KeywordRetriever:
    """Counts shared words."""

    def __init__(self, path):
        """Reads the file; each text is kept with its set of words."""
        with open(path, encoding="utf-8") as file:
            facts = json.load(file)
        contents = {title: f'"{title}"\n{text}' for title, text in facts.items()}
        self.passages = [(Passage(id=title, contents=text), words(text)) for title, text in contents.items()]

    def search(self, queries, k):
        """One list per query, best first, of at most k passages; sorting is stable, so ties keep the file's order."""
        return [self.best(words(query), k) for query in queries]

    def best(self, query, k):
        """Passages that share a word with the query."""
        ranked = sorted(self.passages, key=lambda entry: -len(query & entry[1]))
        return [passage for passage, known in ranked[:k] if query & known]


def words(text):
    """Lower-case words of a text, without punctuation."""
    return {word.strip('.,;:!?"()') for word in text.lower().split()}
