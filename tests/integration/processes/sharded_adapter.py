"""A policy with adapters, sharded over two processes: the reference, the gradients and the merged weights.

    torchrun --nproc_per_node 2 sharded_adapter.py DTYPE

Every check compares with the same policy before it was sharded; a failed one ends the process with an error.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[3]), str(Path(__file__).parents[2])]

import torch  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402

from helpers.models import tiny_model  # noqa: E402
from helpers.training import make_module, step, taught_batch  # noqa: E402
from sdsearch_lightning.__main__ import end_process  # noqa: E402
from sdsearch_lightning.module import SDSearchModule  # noqa: E402
from sdsearch_lightning.policy.lora import LoRA, is_learned, plain_weights  # noqa: E402


def learned(dtype: torch.dtype) -> SDSearchModule:
    module = make_module(tiny_model(dtype=dtype), lora=LoRA(r=4), kl_coef=0.1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in module.policy.named_parameters():
            if is_learned(name):
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return module


def main(dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    whole, module = learned(dtype), learned(dtype)
    expected = step(whole, taught_batch(whole))
    expected.kl.backward()
    merged = dict(plain_weights(whole.policy.model, whole.policy.model.state_dict()))
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for layer in module.policy.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module.policy, mesh=mesh)
    batch = taught_batch(module)
    for _ in range(2):  # a switch between two passes of one update
        sums = step(module, batch)
        torch.testing.assert_close(sums.kl, expected.kl, rtol=1e-5, atol=1e-7)
        sums.kl.backward()
    gradients = {name: weight.grad for name, weight in whole.policy.named_parameters()}
    for name, weight in module.policy.named_parameters():
        assert (weight.grad is not None) == is_learned(name), name
        if weight.grad is not None:  # summed over two passes, averaged over two ranks that read the same
            torch.testing.assert_close(weight.grad.full_tensor() / 2, gradients[name], rtol=1e-3, atol=1e-6)
    found = dict(plain_weights(module.policy.model, module.policy.model.state_dict()))
    assert found.keys() == merged.keys()
    assert all(torch.equal(found[name], merged[name]) for name in merged)


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    main(getattr(torch, sys.argv[1]))
    end_process(0)
