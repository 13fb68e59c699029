"""Checkpoints on disk: written whole or not at all, read without running anything, a file or a folder of shards."""
