"""The loss once more, from the paper's formulas: one token at a time, nothing packed and nothing shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from helpers.training_rollouts import TRAINING_CODEC, TRAINING_PROTOCOL, TRAINING_TOKENIZER
from helpers.trajectories import query_mask
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.types import RolloutGroup


def logprob_rows(model: Any, token_ids: Sequence[int], temperature: float = 1.0) -> Tensor:
    """[T, V] log-probs of each token given those before it; row 0 is of no use."""
    logits = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
    return (logits.roll(1, dims=0) / temperature).log_softmax(-1)


def closed_form(
    module: SDSearchModule,
    groups: Sequence[RolloutGroup],
    group_weights: Sequence[float],
    block_texts: Sequence[str],
    on_policy: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Policy loss (token-mean), JSD (full vocabulary) and KL of one update, with gradient.

    `group_weights` and `block_texts` are written out by the test, one per group.
    """
    model, judged = module.policy.model, [[t for t in g.trajectories if t.label is not None] for g in groups]
    num_tokens = sum(sum(t.policy_mask) for ts in judged for t in ts)
    num_searching = sum(any(query_mask(t)) for ts in judged for t in ts)
    steering = {*TRAINING_TOKENIZER.all_special_ids, *TRAINING_TOKENIZER.convert_tokens_to_ids(TRAINING_PROTOCOL.tags)}
    said = [i for i in range(model.config.vocab_size) if i not in steering or not module.exclude_tags]
    policy_loss, jsd_loss, kl = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    for trajectories, group_weight, text in zip(judged, group_weights, block_texts, strict=True):
        for t in trajectories:
            tokens = t.token_ids
            rows = logprob_rows(model, tokens, module.policy_terms.temperature)
            frozen = (
                logprob_rows(module.reference.model, tokens, module.policy_terms.temperature).detach()
                if module.policy_terms.kl_coef
                else rows
            )
            for i, token in enumerate(tokens):
                if not t.policy_mask[i]:
                    continue
                old = rows[i, token].detach() if on_policy else t.sampled_logprobs[i]
                ratio = (rows[i, token] - old).exp()
                objective = ratio * t.advantage
                clipped = (
                    min(max(ratio.item(), 1 - module.policy_terms.clip_low), 1 + module.policy_terms.clip_high)
                    * t.advantage
                )
                policy_loss = policy_loss - (objective if objective.item() <= clipped else clipped) / num_tokens
                d = frozen[i, token] - rows[i, token]
                kl = kl + (d.exp() - d - 1) / num_tokens
            queries = [i for i, is_query in enumerate(query_mask(t)) if is_query]
            if not queries or not group_weight:
                continue
            prompt = TRAINING_CODEC.encode(f"{t.question.text} {text}")
            student = logprob_rows(model, tokens)
            teacher = logprob_rows(model, prompt + tokens[t.prompt_length :]).detach()
            for i in queries:
                p, q = (
                    row[said] / row[said].sum()
                    for row in (teacher[i + len(prompt) - t.prompt_length].exp(), student[i].exp())
                )
                m = (p + q) / 2
                jsd = ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
                jsd_loss = jsd_loss + group_weight * jsd / len(queries) / num_searching
    return policy_loss, jsd_loss, kl
