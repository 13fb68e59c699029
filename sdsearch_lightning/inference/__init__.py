"""From a run folder or a model folder back to objects that work: the module, its retriever, answers to questions."""
