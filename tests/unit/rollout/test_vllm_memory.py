"""The vLLM adapter: weights, memory and what goes wrong, against a fake; tests/vllm runs the same with a real one."""

from __future__ import annotations

import importlib.util
import math
import os
import random
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from helpers.fake_vllm import FakeModel, FakeSamplingParams, FakeVLLM
from helpers.paths import ROOT
from helpers.players import make_request
from helpers.vllm_runs import attach_vllm, install_vllm, pretend_version, run_vllm, vllm_requests
from sdsearch_lightning.errors import ConfigError, RolloutError
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.rollout import Engine, vllm as adapter, vllm_weights
from sdsearch_lightning.rollout.vllm import VLLMEngine


@pytest.fixture
def world(byte_codec: TokenCodec, monkeypatch: pytest.MonkeyPatch) -> FakeVLLM:
    return install_vllm(FakeVLLM(byte_codec), monkeypatch)


@pytest.fixture
def talkative(word_codec: TokenCodec, monkeypatch: pytest.MonkeyPatch) -> FakeVLLM:
    return install_vllm(FakeVLLM(word_codec), monkeypatch)


# Weights and memory


def test_a_step_wakes_pushes_runs_and_sleeps(world: FakeVLLM) -> None:
    engine = VLLMEngine("folder")
    push = ["load", "reset", "generate 7", "generate 6", "generate 5", "sleep 2"]
    awake = ["wake weights", "load", "wake kv_cache", *push[1:]]
    for step in range(3):
        run_vllm(world, vllm_requests(world), engine=engine)
        assert world.log == ["build", *push, *awake * step]
        assert sorted(world.llm.model.loaded) == sorted(name for name, _ in world.policy.model.named_parameters())


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_is_refused_where_the_platform_cannot(world: FakeVLLM, level: int) -> None:
    world.on_cpu = True
    with pytest.raises(ConfigError, match=rf"sleep_level is {level}, .* Set sleep_level to 0"):
        run_vllm(world, vllm_requests(world), engine=VLLMEngine("folder", sleep_level=level))
    assert len(run_vllm(world, vllm_requests(world), engine=VLLMEngine("folder", sleep_level=0))) == 7


@pytest.mark.parametrize("level", [0, 1, 2])
def test_sleep_levels(world: FakeVLLM, level: int) -> None:
    engine = VLLMEngine("folder", sleep_level=level)
    engine.sleep()  # nothing to put to sleep yet
    for _ in range(2):
        run_vllm(world, vllm_requests(world), engine=engine)
        engine.sleep()  # already asleep
    assert world.arguments[0]["enable_sleep_mode"] == (level > 0)
    assert [entry for entry in world.log if entry.startswith("sleep")] == [f"sleep {level}"] * 2 * (level > 0)


def test_run_pushes_weights_by_itself_where_it_has_none(world: FakeVLLM) -> None:
    engine = VLLMEngine("folder")
    pool = attach_vllm(engine, world)
    for _ in range(2):
        assert len(engine.run(vllm_requests(world))) == 7  # the fake would not have it without
        engine.sleep()
    assert world.log.count("load") == 2
    pool.close()


def test_sync_wakes_what_sleeps(world: FakeVLLM) -> None:
    engine = VLLMEngine("folder")
    run_vllm(world, vllm_requests(world), engine=engine)
    world.log.clear()
    engine.sync(world.policy)
    assert world.log == ["wake weights", "load", "wake kv_cache", "reset"]
    engine.wake()
    assert len(world.log) == 4


@pytest.mark.parametrize("level", [0, 2])
def test_a_push_that_failed_is_done_again(world: FakeVLLM, monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    engine = VLLMEngine("folder", sleep_level=level)
    run_vllm(world, vllm_requests(world), engine=engine)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(FakeModel, "load_weights", lambda self, weights: 1 / 0)
        engine.sync(world.policy)
    engine.sleep()  # of someone's finally; half awake is left as it is
    pool = attach_vllm(engine, world)
    assert engine.run(vllm_requests(world))[0].answer == "b"  # the fake would not have it with half the weights
    pool.close()


def test_weights_that_skip_the_reload_are_refused(world: FakeVLLM) -> None:
    """As in reality; or the fake would take a push that vLLM does not."""
    engine = VLLMEngine("folder")
    engine.sync(world.policy)
    with pytest.raises(AttributeError, match="no attribute 'weight_loader'"):
        world.llm.model.load_weights(world.policy.model.named_parameters())


@pytest.mark.parametrize("follows", [True, False])
def test_a_tied_output_layer_follows(word_codec: TokenCodec, monkeypatch: pytest.MonkeyPatch, follows: bool) -> None:
    world = install_vllm(FakeVLLM(word_codec, tied=True), monkeypatch)
    assert "lm_head.weight" not in dict(world.policy.model.named_parameters())
    if not follows:
        monkeypatch.setattr(vllm_weights, "_repack_shared", lambda model: None)
    engine, requests = VLLMEngine("folder"), [make_request(world.codec)]
    with nullcontext() if follows else pytest.raises(AssertionError, match="stale weights"):
        for _ in range(3):
            run_vllm(world, requests, engine=engine)
            with torch.no_grad():
                world.policy.model.lm_head.weight.mul_(0.7)


@pytest.mark.parametrize(("dtype", "exact"), [("float32", True), ("bfloat16", False), ("auto", False)])
def test_numerics_are_the_trainers_in_float32(world: FakeVLLM, dtype: str, exact: bool) -> None:
    assert VLLMEngine("folder", dtype=dtype).is_exact == exact


def test_weights_that_nobody_pushes_are_an_error(world: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    load = FakeModel.load_weights
    monkeypatch.setattr(FakeModel, "load_weights", lambda self, weights: load(self, list(weights)[1:]))
    with pytest.raises(ConfigError, match=r"1 weights of vLLM's model .* policy\.model\.model\.embed_tokens\.weight"):
        run_vllm(world, vllm_requests(world))


def test_shards_are_pushed_whole(world: FakeVLLM) -> None:
    def shard(parameter: torch.Tensor) -> SimpleNamespace:
        half = SimpleNamespace(full_tensor=parameter.detach, shape=(1,), requires_grad=False)
        return SimpleNamespace(detach=lambda: half)

    names = [(name, shard(p)) for name, p in world.policy.model.named_parameters()]
    model = SimpleNamespace(named_parameters=lambda: names)
    engine = VLLMEngine("folder")
    pool = attach_vllm(engine, world)
    engine.sync(SimpleNamespace(model=model, parameters=world.policy.parameters))
    assert len(engine.run(vllm_requests(world))) == 7  # the fake compares with the whole weights
    pool.close()


def test_a_prefix_cache_that_stays_is_an_error(world: FakeVLLM) -> None:
    world.resets = False
    with pytest.raises(RolloutError, match="kept its prefix cache"):
        run_vllm(world, vllm_requests(world))


def test_the_trainers_random_numbers_stay(world: FakeVLLM) -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    drawn = []
    for engine in (None, VLLMEngine("folder", seed=3)):
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        if engine:
            engine.sync(world.policy)
        drawn.append(draw())
    assert drawn[0] == drawn[1]
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    assert draw() != drawn[0]  # what the fake sets


def test_the_trainer_may_set_its_threads(world: FakeVLLM) -> None:
    before = torch.set_num_threads
    VLLMEngine("folder").sync(world.policy)
    assert torch.set_num_threads is before


def test_several_ranks_share_the_trainers_group(world: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    VLLMEngine("folder").sync(world.policy)
    assert world.arguments[0]["distributed_executor_backend"] == "external_launcher"
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["1", "2", "0"]


@pytest.mark.parametrize(("length", "tokens"), [(1000, 4096), (5000, 5000)])
def test_a_cpu_reads_prompts_whole(world: FakeVLLM, length: int, tokens: int) -> None:
    world.on_cpu = True
    VLLMEngine("folder", max_model_len=length, sleep_level=0).sync(world.policy)
    assert {"max_num_batched_tokens": tokens, "enable_chunked_prefill": False}.items() <= world.arguments[0].items()


def test_one_process_needs_no_launcher(world: FakeVLLM) -> None:
    VLLMEngine("folder", 0.3, 1000, 12, "float32", seed=4, options={"enforce_eager": True}).sync(world.policy)
    assert world.arguments == [
        {
            "model": "folder",
            "gpu_memory_utilization": 0.3,
            "max_model_len": 1000,
            "max_num_seqs": 12,
            "dtype": "float32",
            "logprobs_mode": "processed_logprobs",
            "enable_sleep_mode": True,
            "enable_prefix_caching": True,
            "generation_config": "vllm",
            "trust_remote_code": False,
            "seed": 4,
            "enforce_eager": True,
        }
    ]


# Failures


def test_broken_logprobs_stop_the_run_and_name_the_rollouts(world: FakeVLLM) -> None:
    requests = vllm_requests(world)
    talk, broken = world.talk, {requests[2].prompt_ids, requests[4].prompt_ids}

    def talk_nonsense(ids: list[int], params: FakeSamplingParams) -> Iterator[tuple[int, float]]:
        for i, (token_id, logprob) in enumerate(talk(ids, params)):
            yield token_id, math.nan if i == 3 and tuple(ids) in broken else logprob

    world.talk = talk_nonsense
    with pytest.raises(RolloutError, match=r": \(0, 2\)/7, \(0, 4\)/7\)"):
        run_vllm(world, requests)


def test_an_output_without_tokens_does_not_run_for_ever(world: FakeVLLM) -> None:
    world.talk = lambda ids, params: iter(())
    with pytest.raises(RolloutError, match=r"no token for rollout \(0, 6\)/0"):
        run_vllm(world, [make_request(world.codec, instance_id=(0, 6))])


def test_a_context_that_is_too_short_is_refused(world: FakeVLLM) -> None:
    run_vllm(world, vllm_requests(world), engine=VLLMEngine("folder", max_model_len=900))
    world.llm = None
    with pytest.raises(ConfigError, match="max_model_len is 899, but rollout.max_tokens is 900"):
        run_vllm(world, vllm_requests(world), engine=VLLMEngine("folder", max_model_len=899))


def test_mixed_precision_of_the_trainer_stays_outside(world: FakeVLLM) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the fake refuses to run in it
        run_vllm(world, vllm_requests(world))
        assert torch.is_autocast_enabled("cpu")


def test_options_cannot_undo_what_the_engine_needs(world: FakeVLLM) -> None:
    with pytest.raises(ConfigError, match="generation_config.*logprobs_mode"):
        VLLMEngine("folder", options={"logprobs_mode": "raw_logits", "generation_config": "auto"})


@pytest.mark.parametrize("found", ["0.21.9", "0.33.0", "1.0", "0.8.5.post1", "0.9.2", "dev"])
def test_other_releases_are_refused(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    pretend_version(monkeypatch, found)
    with pytest.raises(ConfigError, match=rf"{found}.*pip install 'vllm>=0\.22,<0\.33'"):
        VLLMEngine("folder")


@pytest.mark.parametrize("found", ["0.22.0", "0.32.0", "0.32.5rc1+cu129", "0.29.1.dev3+g12ab"])
def test_known_releases_are_taken(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    for distribution in adapter.DISTRIBUTIONS:
        pretend_version(monkeypatch, found, distribution)
        VLLMEngine("folder")


def test_vllm_may_be_missing_until_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it raises
    spec = importlib.util.spec_from_file_location("another_copy", adapter.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    pretend_version(monkeypatch, None)
    with pytest.raises(ConfigError, match=r"expected vLLM to be installed, found none\. Run pip install"):
        copy.VLLMEngine("folder")


def test_progress_adds_up(world: FakeVLLM) -> None:
    engine, told = VLLMEngine("folder"), []
    world.overshoot = 2
    pool = attach_vllm(engine, world, report=lambda *counts: told.append(counts))
    trajectories = engine.run(vllm_requests(world, tail=" and more"))
    sampled, searches = sum(sum(t.policy_mask) for t in trajectories), sum(len(t.queries) for t in trajectories)
    assert tuple(map(sum, zip(*told, strict=True))) == (7, searches, sampled)
    assert sampled < world.num_sampled
    assert pool.take_counts().queries == searches > 0
    pool.close()


def test_the_documented_configuration_selects_it(world: FakeVLLM) -> None:
    _, _, rest = (ROOT / "docs/vllm.md").read_text().partition("```yaml\n")
    engine = yaml.safe_load(rest.partition("```")[0])["rollout"]["engine"]
    parser = ArgumentParser()
    parser.add_argument("--engine", type=Engine)
    made = parser.instantiate(parser.parse_object({"engine": engine})).engine
    assert isinstance(made, VLLMEngine) and made.sleep_level == 2
