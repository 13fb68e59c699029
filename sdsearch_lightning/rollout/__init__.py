"""Engines that turn rollout requests into trajectories, and the search pool they share."""

from sdsearch_lightning.rollout.engine import Engine
from sdsearch_lightning.rollout.generate import GenerateEngine
from sdsearch_lightning.rollout.search_pool import SearchPool
from sdsearch_lightning.rollout.slots import SlotEngine

__all__ = ["Engine", "GenerateEngine", "SearchPool", "SlotEngine"]
