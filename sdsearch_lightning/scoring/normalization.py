"""What of two answers has to be equal for them to be the same: case, punctuation, articles and spaces do not count.

Invariant: on ASCII text all rules give the same, so a rule for other languages changes no English score.
"""

from __future__ import annotations

import re
import string
import unicodedata
from functools import cache

from sdsearch_lightning.enums import UNSPACED
from sdsearch_lightning.errors import ConfigError

RULES = ("english", "unicode")
"""What `Question.normalization` may be."""
_UNSPACED = re.compile(f"[{UNSPACED}]")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str, rule: str = "english") -> str:
    """`text` in lower case without punctuation, articles and surplus white space, in that order.

    Args:
        text: an answer, a gold answer or a passage.
        rule: english is SQuAD's, as Search-R1 and AutoRefine use it: punctuation is ASCII's, everything else stays.
            unicode does the same to any script: composed characters (NFKC: one spelling of an accent, full-width
            letters and digits as ASCII's), case folded, digits of any script as ASCII's, punctuation of any script
            and invisible characters deleted, and in scripts without spaces a word per character.

    Raises:
        ConfigError: there is no such rule.
    """
    if rule not in RULES:
        raise ConfigError(f"normalization: expected one of {', '.join(RULES)}, found {rule!r}.")
    plain = _spelled(text) if rule == "unicode" else text.lower()
    return " ".join(_ARTICLES.sub(" ", plain.translate(_NO_PUNCTUATION)).split())


def _spelled(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(map(_character, unicodedata.normalize("NFKC", folded)))


@cache
def _character(character: str) -> str:
    category = unicodedata.category(character)
    if category[0] == "P" or category == "Cf":  # formats: zero width, soft hyphen, direction
        return ""
    if category == "Nd":
        return str(unicodedata.decimal(character))
    return f" {character} " if _UNSPACED.match(character) else character
