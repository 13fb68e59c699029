"""How the policy's weights get into vLLM's model: through vLLM's own `reload_weights`.

Once loaded, a layer of vLLM may hold its weights in another form or place; on a CPU it multiplies with packed copies,
and its parameters are empty. `reload_weights` brings each layer back to the form of a checkpoint, loads it, and makes
its copies anew. What it forgets are layers that share a weight with another one; they follow here.
"""

from __future__ import annotations

from typing import Any

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.policy.lora import plain_weights
from sdsearch_lightning.policy.policy import Policy


def load_weights(llm: Any, policy: Policy) -> None:
    """Give vLLM's model every weight of the policy, layer by layer.

    Args:
        llm: a `vllm.LLM` whose worker is in this process.
        policy: with adapters or without; names and shapes are those of its Hugging Face model without, and vLLM casts.

    Raises:
        ConfigError: vLLM's model has weights that the policy has not.
    """
    weights = {name: parameter.detach() for name, parameter in policy.model.named_parameters()}

    def reload(worker: Any) -> list[str]:
        model, failures, loaded = worker.get_model(), [], []
        wanted, load = {name for name, _ in model.named_parameters()}, model.load_weights

        def load_and_tell(given: Any) -> Any:
            try:
                loaded.append(load(given))
            except BaseException as error:  # vLLM has to put its layers back before anybody hears of it
                failures.append(error)
                loaded.append(set())
            return loaded[-1]

        model.load_weights = load_and_tell
        try:
            worker.reload_weights(weights_iterator=plain_weights(policy.model, weights))
        finally:
            del model.load_weights
        if failures:
            raise failures[0]
        _repack_shared(model)
        return [] if loaded[-1] is None else sorted(wanted - set(loaded[-1]))

    (missing,) = llm.collective_rpc(reload)
    if missing:
        raise ConfigError(
            f"VLLMEngine.model: {len(missing)} weights of vLLM's model are not in the policy, the first is "
            f"{missing[0]}: they would hold anything. Name the folder of the model that is trained."
        )


def _repack_shared(model: Any) -> None:
    """Have layers that share a weight with an earlier one, such as a tied output layer, make their copies anew.

    A weight that two layers share comes once, and `reload_weights` processes the layer it came to only: the other one
    would go on with copies of the first weights that it ever had.
    """
    seen: set[int] = set()
    for layer in model.modules():
        own = {id(weight) for weight in layer.parameters(recurse=False)}
        if own & seen and (method := getattr(layer, "quant_method", None)) is not None:
            method.process_weights_after_loading(layer)
        seen |= own
