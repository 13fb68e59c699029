"""The loop that collapses runs, planted: a teacher of the same weights that is always surer of tags."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.training import make_module, taught_batch
from sdsearch_lightning import SDSearchModule, module as module_file
from sdsearch_lightning.callbacks.health_defaults import RULES
from sdsearch_lightning.callbacks.health_rules import Watch
from sdsearch_lightning.losses.divergences import JensenShannon
from sdsearch_lightning.step.collate import SearchBatch
from sdsearch_lightning.step.control_tokens import ControlTokens
from sdsearch_lightning.step.teacher_rows import TeacherRows

STEPS, TIMES, FEW = 40, 10.0, 1e-3


def write_few_tags(module: SDSearchModule, batch: SearchBatch) -> None:
    """Train until tags have a probability of .1 % inside queries, as after a cold start."""
    optimizer = torch.optim.Adam(module.policy.parameters(), lr=1e-2)
    mass = torch.ones(())
    while mass > FEW:
        probs = module.policy.logits(batch.sequences, batch.query_row).softmax(-1)
        mass = probs[:, module.policy_tag_ids].sum(-1).mean()
        optimizer.zero_grad()
        mass.log().backward()
        optimizer.step()


def tag_masses(exclude_tags: bool, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """Student's and teacher's probability of the policy's tags inside queries, by step of training on the JSD alone."""
    plain = module_file.summarize_teacher

    def surer_of_tags(logits: Tensor, *rest: Any) -> TeacherRows:
        controls: ControlTokens = rest[-1]
        return plain(
            logits.index_add(-1, controls.policy, torch.full_like(logits[:, controls.policy], math.log(TIMES))), *rest
        )

    monkeypatch.setattr(module_file, "summarize_teacher", surer_of_tags)
    module = make_module(divergence=JensenShannon(top_k=20), exclude_tags=exclude_tags)
    batch = taught_batch(module)
    write_few_tags(module, batch)
    optimizer = torch.optim.Adam(module.policy.parameters(), lr=3e-3)
    found = []
    for _ in range(STEPS):
        teacher = module.teacher_step(batch)
        sums = module.student_step(batch, teacher)
        optimizer.zero_grad()
        sums.jsd_loss.backward()
        optimizer.step()
        tokens = sums.metrics["query_tokens"]
        found.append(tuple(float(sums.metrics[f"policy_tag_mass_{who}"] / tokens) for who in ("student", "teacher")))
    return found


def alarm(masses: list[tuple[float, float]]) -> int | None:
    """The step at which a rule on the probability of tags first speaks."""
    rules = RULES["policy_tag_mass"], RULES["teacher_policy_tag_mass"]
    watches = [Watch() for _ in rules]
    for step, pair in enumerate(masses, 1):
        if any([watch.judge(rule, value) for watch, rule, value in zip(watches, rules, pair, strict=True)]):
            return step
    return None


def test_left_out_of_the_divergence_tags_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    masses = tag_masses(True, monkeypatch)
    assert alarm(masses) is None and masses[-1][0] < 3 * masses[0][0]


def test_by_the_papers_letter_the_loop_starts_and_is_seen_while_it_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    masses = tag_masses(False, monkeypatch)
    step = alarm(masses)
    assert masses[-1][0] > 20 * masses[0][0]
    assert step is not None and masses[step - 1][0] < 0.02
