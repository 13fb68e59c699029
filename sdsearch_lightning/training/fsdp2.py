"""FSDP2: the weights of a policy split over ranks, and whole again where rollouts need them.

    training    each layer is gathered when its turn comes, and given up again; gradients are summed into shards
    rollouts    everything is gathered once (`gathered`): ranks then draw tokens without meeting, as many as they like
    memory      float32 shards of weights, gradients and optimizer state; passes run on gathered copies, in bfloat16
                where the trainer's precision says so: the shards are the master weights

Every forward pass is a collective, so all ranks make equally many.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed import broadcast
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from sdsearch_lightning.checkpoints.reading import CheckpointFile, CheckpointFolder, named_checkpoint
from sdsearch_lightning.checkpoints.shards import read_into
from sdsearch_lightning.errors import ConfigError, DataError
from sdsearch_lightning.policy.policy import Policy


class FSDP2Strategy(ModelParallelStrategy):
    """`trainer.strategy: fsdp2`: FSDP2 over all processes of all nodes; for a `PolicyModule`, which shards itself.

    A checkpoint is a folder with a file per rank; `sdsearch export` makes one model of it.

    Args:
        process_group_backend: nccl or gloo; null takes that of the device.
        timeout: after which a collective that some rank never joins is an error.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__("auto", 1, True, process_group_backend, timeout)

    def setup_environment(self) -> None:
        """See Lightning, whose "auto" would mean one data-parallel group per node."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Weights and optimizer states of a sharded folder or of a single file, whatever ranks saved it.

        Raises:
            ConfigError: it belongs to another model or to other optimizers.
        """
        stored = named_checkpoint(Path(self.broadcast(checkpoint_path)))
        module: Any = self.lightning_module
        weights = {name: value for name, value in get_model_state_dict(self._module).items() if module.is_saved(name)}
        module.check_checkpoint(stored.facts, stored.shapes, weights)
        try:
            if isinstance(stored, CheckpointFolder):
                self._read_shards(stored.path, weights)
            elif isinstance(stored, CheckpointFile):
                self._take_file(stored)
        except (RuntimeError, ValueError, DataError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise ConfigError(f"ckpt_path: expected a checkpoint of this model and its optimizers: {reason}") from error
        return dict(stored.facts)

    def _read_shards(self, path: Path, weights: dict[str, Any]) -> None:
        """Each rank reads what it needs, whoever wrote it."""
        read_into({"state_dict": weights}, path)
        self._module.load_state_dict(weights, strict=False)
        for index, optimizer in enumerate(self.optimizers):
            state = {f"optimizer_{index}": get_optimizer_state_dict(self._module, optimizer)}
            read_into(state, path)
            set_optimizer_state_dict(self._module, optimizer, state[f"optimizer_{index}"])

    def _take_file(self, stored: CheckpointFile) -> None:
        """Each rank cuts its shards out of a checkpoint of one process or of DDP, which is mapped, not read."""
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(self._module, dict(stored.weights), options=options)
        names = {parameter: name for name, parameter in self._module.named_parameters()}
        states = stored.facts["optimizer_states"] if self.optimizers else []  # none to evaluate
        for optimizer, state in zip(self.optimizers, states, strict=True):
            order = [names[weight] for group in optimizer.param_groups for weight in group["params"]]
            groups = [group | {"params": [order[i] for i in group["params"]]} for group in state["param_groups"]]
            values = {order[i]: value for i, value in state["state"].items()}
            named: dict[str, Any] = {"state": values, "param_groups": groups}
            set_optimizer_state_dict(self._module, optimizer, named, options=options)

    @property
    def _module(self) -> nn.Module:
        assert self.model is not None
        return self.model


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2: fully sharded data parallel")


def check_strategy(strategy: Any) -> None:
    """Refuses the sharding strategy that cannot train this module."""
    name = strategy if isinstance(strategy, str) else str(getattr(strategy, "class_path", ""))
    if (name.lower().startswith("fsdp") and name.lower() != "fsdp2") or name.endswith(".FSDPStrategy"):
        raise ConfigError(
            f"trainer.strategy {name}: in Lightning, FSDP1 cannot train with manual optimisation. Use fsdp2."
        )


def shard(policy: Policy, mesh: DeviceMesh, compute_dtype: torch.dtype | None = None) -> None:
    """Split a policy over the ranks of `mesh`, with the weights that rank 0 has.

    Other ranks may have it without memory (on the meta device). One layer at a time is whole on every rank.

    Args:
        policy: not yet wrapped, alike on all ranks but for its values.
        mesh: one dimension.
        compute_dtype: of gathered weights; None keeps that of the shards. Gradients are summed in float32.
    """
    reduce_dtype = None if compute_dtype is None else torch.float32
    precision = MixedPrecisionPolicy(compute_dtype, reduce_dtype, cast_forward_inputs=False)
    blocks = set(policy.model._no_split_modules or ())
    for layer in [module for module in policy.modules() if type(module).__name__ in blocks]:
        _take_from_rank_0(layer, mesh)
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    _take_from_rank_0(policy, mesh)
    fully_shard(policy, mesh=mesh, mp_policy=precision)
    for name in Policy.ENTRANCES:
        register_fsdp_forward_method(policy, name)


@torch.no_grad()
def _take_from_rank_0(module: nn.Module, mesh: DeviceMesh) -> None:
    """Give every weight and buffer that is not sharded yet memory on the device, and rank 0's values."""
    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    whole: dict[Tensor, Tensor] = {}  # tied weights stay one
    for owner in module.modules():
        named = [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]
        for name, tensor in named:
            if isinstance(tensor, DTensor):
                continue
            if tensor not in whole:
                values = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device)
                broadcast(values, group=mesh.get_group(), group_src=0)
                is_weight = isinstance(tensor, nn.Parameter)
                whole[tensor] = nn.Parameter(values, tensor.requires_grad) if is_weight else values
            setattr(owner, name, whole[tensor])


@contextmanager
def gathered(policy: Policy) -> Iterator[None]:
    """All weights whole on every rank, so that each may run as many passes as it likes; nothing to do where they are.

    A collective to enter, not to leave.
    """
    root: nn.Module = policy
    parts = [module for module in root.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            # The root stays whole between a forward and its backward pass.
            part.set_reshard_after_forward(part is not root, recurse=False)
            part.reshard()


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module with whole tensors in main memory; a collective where they are sharded."""
    state = module.state_dict()
    return {name: value.full_tensor().cpu() if isinstance(value, DTensor) else value for name, value in state.items()}
