"""The language model: loading, one pass over packed sequences, the output layer, adapters, teachers."""
