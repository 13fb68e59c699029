"""Every family trains on its own rollouts, or is refused: engine and layouts against plain forward passes.

python -m pytest tests/unit/rollout/test_families.py --write-models     writes the table of docs/models.md
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.families import FAMILIES, VOCABULARY, WINDOW, family_model
from helpers.paths import ROOT
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.policy.packing import PackedSequences
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.rollout import GenerateEngine, SlotEngine
from sdsearch_lightning.rollout.engine import Engine, run_awake
from sdsearch_lightning.rollout.probe import EXACT, HALF, PLANS, Gap, find_exact, measure_gap, probe_requests
from sdsearch_lightning.types import Trajectory

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers tells of kernels that are not installed
MAX_TOKENS, ROWS = 300, 12
TEXT = tuple(range(3, VOCABULARY - 1))
PAGE = ROOT / "docs/models.md"
HYBRID = ("qwen3_next", "qwen3_5", "lfm2")
REFUSED = {"mamba2": "does not sample from the policy that is trained, for models of type 'mamba2'"}
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}
LOOSER = {"deepseek_v3": 1e-6, "gpt_oss": 1e-6, "gemma2": 1e-5, "qwen3_next": 1e-4, "qwen3_5": 1e-4}
"""Float64 bounds where transformers' own layers compute in float32: routers, capped softmax, gated delta rule."""


def bound(name: str, dtype: torch.dtype) -> float:
    return max(BOUNDS[dtype], LOOSER.get(name, 0.0)) * (20 if dtype == torch.float32 and name in LOOSER else 1)


def prepared(name: str, dtype: torch.dtype) -> tuple[Policy, SlotEngine, list[str]]:
    """The policy, and the engine that a run would use on it."""
    policy = Policy(family_model(name, dtype)).eval()
    engine = SlotEngine(kv_cache_gib=0.05, max_slots=8)
    with torch.no_grad():
        _, reasons = find_exact(engine, policy, TEXT, MAX_TOKENS)
    return policy, engine, reasons


def plain_gap(policy: Policy, played: list[Trajectory]) -> float:
    """Recorded log-probs against a forward pass of the stock model on each rollout alone."""
    worst = 0.0
    for trajectory in played:
        ids = trajectory.token_ids
        logprobs = policy.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        for i, (token, is_sampled) in enumerate(zip(ids, trajectory.policy_mask, strict=True)):
            if is_sampled:
                gap = abs(float(logprobs[i - 1, token]) - trajectory.sampled_logprobs[i])
                worst = max(worst, gap)
    return worst


def played_by(engine: Engine, policy: Policy) -> list[Trajectory]:
    requests, start, searches = probe_requests(policy, TEXT, MAX_TOKENS, copies=ROWS // len(PLANS))
    engine.attach(policy, start, searches)
    return run_awake(engine, policy, requests)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
def test_rollouts_are_the_policys(name: str, dtype: torch.dtype) -> None:
    """Twelve rows, several searches, some waiting while others go on, all but the shortest beyond the window."""
    policy, engine, reasons = prepared(name, dtype)
    policy.check(torch.device("cpu"))
    with torch.no_grad():
        played = played_by(engine, policy)
        assert len(played) == ROWS and max(len(t.token_ids) for t in played) > 2 * WINDOW
        assert plain_gap(policy, played) <= bound(name, dtype)
    assert bool(reasons) or policy.unpackable is not None or name not in HYBRID
    assert (policy.unpackable is not None) == (name in HYBRID)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
def test_packed_losses_are_padded_losses(name: str) -> None:
    model = family_model(name, torch.float64)
    rows = [[(5 * i + j * j) % (VOCABULARY - 4) + 3 for j in range(30 + 7 * i)] for i in range(4)]
    rows = [rows[0][:9] + row[9:] for row in rows]
    sequences = PackedSequences.pack(rows, prompt_lengths=[9] * len(rows))
    targets = (sequences.position_ids > 0).nonzero()[:, 0]
    theirs = [model(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1] for row in rows]
    expected = torch.cat(theirs).log_softmax(-1)
    for layout in ("padded", "packed", "shared_prefix"):
        found = Policy(model, layout).logits(sequences, targets).log_softmax(-1)  # type: ignore[arg-type]
        assert (found - expected).abs().max() <= bound(name, torch.float64), layout
        assert (found * 1.001 - expected).abs().max() > bound(name, torch.float64)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exact_is_refused_at_the_start(name: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED[name]):
        prepared(name, torch.float32)


@pytest.mark.parametrize("name", ["mistral, window", "gemma3", "gpt_oss"])
def test_the_probe_sees_an_engine_that_decodes_with_holes(name: str) -> None:
    policy = Policy(family_model(name, torch.float32)).eval()
    with torch.no_grad():
        assert measure_gap(GenerateEngine(8), policy, TEXT, MAX_TOKENS).mean > 1e-3
        engine = GenerateEngine(8)
        gap, reasons = find_exact(engine, policy, TEXT, MAX_TOKENS)
    assert gap.mean < 1e-5 and len(reasons) == 1 and engine.max_batch_size == 1
    assert "log-probs differ from a training pass by" in reasons[0]


def test_the_probe_sees_weights_that_did_not_arrive() -> None:
    policy, stale = (Policy(family_model("llama", torch.float32)).eval() for _ in range(2))
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1.05)

    class Stale(GenerateEngine):
        def attach(self, policy: Any, *arguments: Any) -> None:
            super().attach(stale, *arguments)

    with torch.no_grad(), pytest.raises(ConfigError, match="Stale does not sample from the policy that is trained"):
        find_exact(Stale(8), policy, TEXT, MAX_TOKENS)


def test_what_is_rounding_follows_the_precision_and_the_size_of_logits() -> None:
    """In bfloat16 numbers from 64 to 128 are a half apart; computed in it, logits of float32 differ less."""
    policy = Policy(family_model("llama", torch.float32)).eval()
    narrow = Policy(policy.model, wide_head=False)

    def rounding(policy: Policy, is_half: bool = True) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            return measure_gap(GenerateEngine(8), policy, TEXT, MAX_TOKENS).rounding

    with torch.no_grad():
        assert rounding(policy, is_half=False) == EXACT
        assert rounding(policy) == rounding(narrow) == HALF
        policy.model.get_output_embeddings().weight.mul_(1000)
        assert rounding(policy) == HALF < rounding(narrow)

    class Rounded(GenerateEngine):
        is_exact = False

    with torch.no_grad():
        gap, reasons = find_exact(Rounded(8), policy, TEXT, MAX_TOKENS)
    assert isinstance(gap, Gap) and gap.mean < 1e-4 and not reasons


def test_longrope_has_one_regime_per_run() -> None:
    short = Policy(family_model("phi3, longrope", torch.float64)).eval()
    assert short.max_context == 96
    with pytest.raises(ConfigError, match="longer than the 96 that the model"):
        short.logits(PackedSequences.pack([list(range(3, 60)) * 2]), torch.tensor([5]))
    long = Policy(family_model("phi3, longrope", torch.float64), long_context=True).eval()
    assert long.max_context == 512
    row = [3 + i % 50 for i in range(120)]
    targets, few = torch.arange(1, 30), PackedSequences.pack([row[:40]])
    alone = long.logits(few, targets)
    beside = long.logits(PackedSequences.pack([row[:40], row]), targets)
    torch.testing.assert_close(alone, beside, rtol=0, atol=1e-12)
    assert not torch.allclose(alone, short.logits(few, targets), atol=1e-3), "the two sets differ"
    stock = family_model("phi3, longrope", torch.float64)
    own = stock(
        input_ids=torch.tensor(
            [
                row[:40],
            ]
        ),
        use_cache=False,
    ).logits[0, :29]
    torch.testing.assert_close(short.logits(few, targets), own, rtol=0, atol=1e-12)


# The table


def table() -> str:
    rows = ["| family | layout | rollouts | log-probs against a plain forward pass, float64 |", "|---|---|---|---|"]
    for name in FAMILIES:
        if name in REFUSED:
            rows.append(f"| {name} | padded | refused at the start: no engine keeps its state | |")
            continue
        policy, engine, _ = prepared(name, torch.float64)
        with torch.no_grad():
            gap = plain_gap(policy, played_by(engine, policy))
        layout = "padded" if policy.unpackable else "shared prefix"
        how = "slot engine" if engine.exact_way is None else engine.exact_way
        rows.append(f"| {name} | {layout} | {how} | {'exact' if gap < 1e-12 else f'{gap:.0e}'} |")
    return "\n".join(rows)


def test_the_table_of_the_docs_is_what_is_found_here(request: pytest.FixtureRequest) -> None:
    page = Path(PAGE).read_text()
    start, end = page.index("| family |"), page.index("\n\n", page.index("| family |"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = table()
    if request.config.getoption("--write-models"):
        PAGE.write_text(page[:start] + found + page[end:])
        return

    def facts(text: str) -> list[list[str]]:
        """Rounding differs by machine: of a gap its order is compared only."""
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
        return [[*row[:3], re.sub(r"\de-\d\d", "small", row[3])] for row in cells]

    assert facts(page[start:end]) == facts(found)
