"""What commands beside `fit` do with its keys: read them, and make some of its objects."""

from __future__ import annotations

from sdsearch_lightning.cli.training import SearchCLI


class SettingsCLI(SearchCLI):
    """Reads `fit` and its keys, as they were given; makes nothing, runs nothing, writes nothing."""

    def before_instantiate_classes(self) -> None:
        """Leave run folders alone: the run may be under way."""

    def instantiate_classes(self) -> None:
        """Leave out all objects: a subclass makes those that its command needs, and what others need may be missing."""

    def after_instantiate_classes(self) -> None:
        """Leave out what `fit` tells of a resumed run: nothing is run here."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Leave out the command itself."""
