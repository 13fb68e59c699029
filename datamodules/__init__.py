"""Data modules: questions, demonstrations and the retriever. Imported as `sdsearch_lightning.datamodules`."""

if __name__ == "datamodules":  # the bare folder on sys.path: every class would exist twice
    raise ImportError("import this package as sdsearch_lightning.datamodules")

from sdsearch_lightning.datamodules.questions import SearchDataModule
from sdsearch_lightning.datamodules.synthetic_world import SyntheticWorldDataModule

__all__ = ["SearchDataModule", "SyntheticWorldDataModule"]
