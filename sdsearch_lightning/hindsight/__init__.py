"""What the teacher reads of a group, and what it must never read: one short class per block.

The paper's block is `QueriesAndLabels`: from an allow-list, the executed queries and the outcome of each rollout, the
taught one among them. Thoughts, documents and answers stay out, or the gold answer could be read off the prefix
("future masking").

    h(G) = { (M(tau_j), y(tau_j)) : j = 1..G }                                        (arXiv:2605.18299)

The others change one thing each. A builder decides text and views only; which groups are taught, and with what weight,
is the `groups` rule's. Rollouts that ended in a retrieval error, and queries that hold a tag, enter no block.
"""

from sdsearch_lightning.hindsight.ablations import (
    CorrectOnly,
    CurrentDocuments,
    GoldAnswer,
    LeaveOneOut,
    NoLabels,
    OwnRollout,
    Placebo,
    ShuffledLabels,
    SuccessfulSibling,
    UnmaskedRollouts,
)
from sdsearch_lightning.hindsight.base import BlockBuilder, GroupBlocks, judged, sibling_records
from sdsearch_lightning.hindsight.contrast import ContrastedSiblings
from sdsearch_lightning.hindsight.queries_and_labels import QueriesAndLabels
from sdsearch_lightning.hindsight.query_labels import QueryLabels
from sdsearch_lightning.hindsight.writer import BlockBudget, BlockWriter

__all__ = [
    "BlockBudget",
    "BlockBuilder",
    "BlockWriter",
    "ContrastedSiblings",
    "CorrectOnly",
    "CurrentDocuments",
    "GoldAnswer",
    "GroupBlocks",
    "LeaveOneOut",
    "NoLabels",
    "OwnRollout",
    "Placebo",
    "QueriesAndLabels",
    "QueryLabels",
    "ShuffledLabels",
    "SuccessfulSibling",
    "UnmaskedRollouts",
    "judged",
    "sibling_records",
]
