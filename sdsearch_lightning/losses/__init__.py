"""The arithmetic: losses per token, and the weights that add them up.

clipped_surrogate, kl_k3, jensen_shannon     [.., T] or [Q] values per token        terms.py
Support, Divergence and its formulas         which tokens of the vocabulary count   divergences.py
TeacherUse and its kinds                     what the teacher's verdict is used for teacher_use.py
token_weights, query_weights, aggregate      what a value counts for in the loss    weights.py
"""

from sdsearch_lightning.losses.divergences import (
    Divergence,
    ForwardKL,
    JensenShannon,
    LogitMSE,
    ReverseKL,
    SupportedDivergence,
)
from sdsearch_lightning.losses.teacher_use import CAST, RLCSD, RLSD, SDAR, Distillation, TeacherUse
from sdsearch_lightning.losses.terms import clipped_surrogate, jensen_shannon, kl_k3
from sdsearch_lightning.losses.weights import aggregate, group_weight, query_weights, token_weights

__all__ = [
    "CAST",
    "RLCSD",
    "RLSD",
    "SDAR",
    "Distillation",
    "Divergence",
    "ForwardKL",
    "JensenShannon",
    "LogitMSE",
    "ReverseKL",
    "SupportedDivergence",
    "TeacherUse",
    "aggregate",
    "clipped_surrogate",
    "group_weight",
    "jensen_shannon",
    "kl_k3",
    "query_weights",
    "token_weights",
]
