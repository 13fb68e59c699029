"""Secrets: where they come from, and that they are in nothing that is saved, shown or published."""
