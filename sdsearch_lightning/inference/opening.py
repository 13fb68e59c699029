"""From an origin to what runs rollouts: module, data module and a sampler with weights and retriever in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser

from sdsearch_lightning.callbacks import RolloutGrouping
from sdsearch_lightning.checkpoints.reading import named_checkpoint
from sdsearch_lightning.datamodules import SearchDataModule
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.inference.building import build_for_answers, load_model, restore
from sdsearch_lightning.inference.origin import LIMITS, Origin
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.retrieval import Retriever, check_retriever
from sdsearch_lightning.rollout import SearchPool, SlotEngine
from sdsearch_lightning.rollout.groups import GroupSampler
from sdsearch_lightning.types import Sampling


@dataclass(frozen=True)
class Opened:
    """What samples, ready to."""

    module: SDSearchModule
    data: SearchDataModule
    rollout: RolloutGrouping
    """Keys of `rollout:`; no callback of a trainer."""
    sampler: GroupSampler

    @property
    def retriever(self) -> Retriever:
        """What the rollouts search with, checked."""
        assert self.data.retriever is not None, "an opened data module has one"
        return self.data.retriever

    def close(self) -> None:
        """Stop the search worker, and let the retriever give back what it holds."""
        self.sampler.searches.close()
        self.retriever.close()


def open_origin(
    origin: Origin,
    keys: Sequence[str] = (),
    parser_class: type[LightningArgumentParser] = LightningArgumentParser,
    retriever: Any = None,
    temperature: float | None = None,
    seed: int = 0,
    device: str | None = None,
    rollout: Sequence[str] = LIMITS,
) -> Opened:
    """Load the model, check the retriever, try the engine.

    Args:
        origin: from `find_origin`.
        keys: more keys, see `build_for_answers`.
        parser_class: see there.
        retriever: takes the place of the configuration's; None: that one.
        temperature: of sampling; 0 is greedy, None: temperature and nucleus of training rollouts.
        seed: of the rollouts.
        device: where the model runs; None: a GPU where there is one.
        rollout: keys of `rollout:` that may be given, see `find_origin`.

    Raises:
        ConfigError: what was named cannot be used; the retriever is missing or breaks its contract.
    """
    checkpoint = named_checkpoint(origin.checkpoint) if origin.checkpoint is not None else None
    module, data, grouping = build_for_answers(origin.config, keys, parser_class, rollout)
    if retriever is not None:
        data.retriever = retriever
    if data.retriever is None:
        raise ConfigError("data.retriever: expected something to search, found null. Name one.")
    load_model(module, data)
    if checkpoint is not None:
        restore(module, checkpoint)
    data.prepare_data()
    check_retriever(data.retriever, grouping.top_k)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    module.to(place)
    longest = min(grouping.limits.max_tokens, module.policy.max_context or grouping.limits.max_tokens)
    is_mixed = str(origin.precision) == "bf16-mixed" and place.type == "cuda"

    @contextmanager
    def opened() -> Iterator[None]:
        with torch.autocast(place.type, torch.bfloat16, enabled=is_mixed):
            yield

    sampler = GroupSampler(
        module.policy,
        module.protocol,
        module.codec,
        SlotEngine(),
        SearchPool(data.retriever, grouping.top_k),
        grouping.scoring,
        replace(grouping.limits, max_tokens=longest),
        grouping.sampling if temperature is None else Sampling(temperature),
        seed,
        opened,
    )
    if sampler.engine.draws:
        sampler.prove_engine()
    return Opened(module, data, grouping, sampler)
