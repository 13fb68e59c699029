"""Rollouts, groups, a tiny policy and a short fit, for the tests of the training side.

Trajectories come out of the real `Conversation`, so their spans are those of a run. `closed_form` is the loss once
more, from the paper's formulas: one sequence at a time, one token at a time, nothing packed and nothing shared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdsearch_lightning.errors import RetrievalError
from sdsearch_lightning.hindsight import QueriesAndLabels
from sdsearch_lightning.module import SDSearchModule, StepSums
from sdsearch_lightning.policy.loading import ScratchModel, word_level_tokenizer
from sdsearch_lightning.protocol.block_templates import BlockTemplates
from sdsearch_lightning.protocol.conversation import Conversation, Search
from sdsearch_lightning.protocol.templates import Protocol
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.step.collate import SearchBatch, collate, split_groups, weigh
from sdsearch_lightning.types import (
    Demonstration,
    HindsightBlock,
    Label,
    Limits,
    Passage,
    Question,
    RolloutGroup,
    RolloutRequest,
    SiblingRecord,
    SpanKind,
    Trajectory,
)

PROTOCOL = Protocol(
    prompt="{question}",
    question_mark=False,
    documents_tag="documents",
    passage_template="{contents}\n",
    invalid_message=" invalid action ",
    block=BlockTemplates(
        header=" siblings", entry="", query=" {label} {query} ;", no_query=" {label} none ;", unlabelled_entry=""
    ),
)
WORDS = "Rome Oslo Italy Norway capital of river where is the siblings CORRECT INCORRECT none ; invalid action".split()
TOKENIZER = word_level_tokenizer(WORDS, PROTOCOL.tags)
CODEC = TokenCodec(TOKENIZER, PROTOCOL.tags)
QUESTION = Question("q0", "where is Rome", ("Rome",), "toy")
PASSAGES = (Passage("d0", "Rome is the capital of Italy"), Passage("d1", "Oslo is the capital of Norway"))
LIMITS = Limits(max_searches=3, max_turn_tokens=32, max_observation_tokens=24, max_tokens=160)

DIRECT = "<think> the river </think> <answer> Oslo </answer>"
ONE = "<think> where </think> <search> capital of Italy </search> <answer> Rome </answer>"
TWO = "<search> the river </search> <think> Oslo </think> <search> Norway </search> <answer> Rome of Italy </answer>"
SCRIPTS = (DIRECT, ONE, TWO)


# Rollouts


def play(conversation: Conversation, text: str, result: Any = PASSAGES, logprobs: Iterable[float] = ()) -> Trajectory:
    """Take `text` as the policy's own words; every search returns `result`."""
    wave = (-3 + 0.5 * math.sin(1.7 * i) for i in itertools.count())
    for token, logprob in zip(CODEC.encode(text), itertools.chain(logprobs, wave), strict=False):
        if isinstance(conversation.accept(token, logprob), Search):
            conversation.observe(result)
        if conversation.stop_reason is not None:
            break
    return conversation.finish()


def rollout(
    text: str, index: int = 0, advantage: float = 1.0, label: Label | None = Label.CORRECT, position: int = 0
) -> Trajectory:
    """A scored rollout; without a label, its first search fails."""
    question = replace(QUESTION, id=f"q{position}", text=f"{QUESTION.text} {WORDS[position]}")
    request = RolloutRequest(question, (0, position), index, PROTOCOL.prompt_ids(CODEC, question.text), seed=0)
    result = PASSAGES if label else RetrievalError("no such host")
    played = play(Conversation(request, PROTOCOL, CODEC, LIMITS), text, result)
    return replace(played, reward=float(label is Label.CORRECT), advantage=advantage, label=label)


def group(*rollouts: Trajectory) -> RolloutGroup:
    return RolloutGroup(rollouts[0].question, rollouts[0].instance_id, rollouts)


def three_groups() -> list[RolloutGroup]:
    """A mixed group, one without contrast, and one in which a search failed: nine rollouts, five of them with queries
    that count."""
    right, wrong = Label.CORRECT, Label.INCORRECT
    return [
        group(rollout(TWO, 0, 1.2, right), rollout(ONE, 1, -0.4, wrong), rollout(DIRECT, 2, -0.8, wrong)),
        group(*(rollout(text, i, 0.0, right, position=1) for i, text in enumerate((ONE, ONE, DIRECT)))),
        group(rollout(TWO, 0, 0.7, right, 2), rollout(ONE, 1, 0.0, None, 2), rollout(DIRECT, 2, -0.7, wrong, 2)),
    ]


def blocks_of(groups: Sequence[RolloutGroup], rule: str = "all") -> list[HindsightBlock | None]:
    return QueriesAndLabels().build(groups, rule, PROTOCOL, CODEC)  # type: ignore[arg-type]


def demonstration(siblings: tuple[SiblingRecord, ...] = ()) -> Demonstration:
    """`ONE` as a written rollout."""
    documents = PROTOCOL.format_passages(PASSAGES)
    turns = ((SpanKind.REASONING, "where"), (SpanKind.QUERY, "capital of Italy"), (SpanKind.OBSERVATION, documents))
    return Demonstration(QUESTION, (*turns, (SpanKind.ANSWER, "Rome")), siblings)


# The policy


def tiny_model(model_type: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> Any:
    """A random causal LM whose distributions are far from uniform."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "max_position_embeddings": 256, "initializer_range": 0.3}
    if model_type == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256, "initializer_range": 0.3}
    special = {"pad_token_id": 1, "eos_token_id": 2, "bos_token_id": None}
    config = AutoConfig.for_model(model_type, vocab_size=len(TOKENIZER), **sizes | special | options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def make_module(model: Any = None, **options: Any) -> SDSearchModule:
    """A module with a ready model, without a Trainer; float64 unless the model says otherwise."""
    module = SDSearchModule(scratch=ScratchModel(), protocol=PROTOCOL, **{"kl_coef": 0.0} | options)
    module.attach(model or tiny_model(), TOKENIZER)
    return module


def micro_batches(
    module: SDSearchModule,
    groups: Sequence[RolloutGroup],
    blocks: Sequence[HindsightBlock | None] | None = None,
    max_tokens: int = 100_000,
    **options: Any,
) -> list[SearchBatch]:
    """The micro-batches of one update; without `blocks`, those of GRPO alone."""

    def prompt(trajectory: Trajectory, block_text: str) -> Sequence[int]:
        return PROTOCOL.prompt_ids(CODEC, trajectory.question.text, block_text)

    options.setdefault("mode", module.aggregation)
    weighed = weigh(groups, blocks or [None] * len(groups), dtype=module.policy.dtype, **options)
    layout, dtype = module.policy.layout, module.policy.dtype
    shares = split_groups(weighed, max_tokens, layout.size)
    return [
        collate(share, prompt if blocks else None, dtype=dtype, cut_teacher=layout.cuts_teacher) for share in shares
    ]


def taught_batch(
    module: SDSearchModule, groups: Sequence[RolloutGroup] | None = None, rule: str = "all"
) -> SearchBatch:
    """One micro-batch of all rollouts, the teacher's side included."""
    groups = groups or three_groups()
    (batch,) = micro_batches(module, groups, blocks_of(groups, rule))
    return batch


def drifted(model: Any = None, **options: Any) -> SDSearchModule:
    """A policy that has moved away from its reference."""
    module = make_module(model, kl_coef=0.1, **options)
    with torch.no_grad():
        for i, weight in enumerate(module.policy.parameters()):
            weight.add_(0.05 * torch.sin(torch.arange(weight.numel()).view_as(weight) + i))
    return module


def step(module: SDSearchModule, batch: SearchBatch) -> StepSums:
    return module.student_step(batch, module.teacher_step(batch) if batch.teacher is not None else None)


def gradient(module: SDSearchModule, loss: Tensor) -> Tensor:
    """[P] gradient of `loss` in all weights, one after the other."""
    weights = list(module.policy.parameters())
    grads = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for g, w in zip(grads, weights, strict=True)])


def weights_of(module: Any) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in module.policy.parameters()])


# The loss once more


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
    num_searching = sum(any(t.query_mask) for ts in judged for t in ts)
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
            queries = [i for i, is_query in enumerate(t.query_mask) if is_query]
            if not queries or not group_weight:
                continue
            prompt = CODEC.encode(f"{t.question.text} {text}")
            student = logprob_rows(model, tokens)
            teacher = logprob_rows(model, prompt + tokens[t.prompt_length :]).detach()
            for i in queries:
                p, q = teacher[i + len(prompt) - t.prompt_length].exp(), student[i].exp()
                m = (p + q) / 2
                jsd = ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
                jsd_loss = jsd_loss + group_weight * jsd / len(queries) / num_searching
    return policy_loss, jsd_loss, kl
