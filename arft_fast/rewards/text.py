"""Agreement of an answer with its gold: token F1 and exact match (the accuracy reward of arXiv 2505.14246).

``faithful`` is the released training code, quirks included. ``corrected`` repairs three of them:

- overlap is counted with repetitions; the released code divides a *set* overlap by *list* lengths, so that an exact
  match with a repeated word scores below 1;
- each Chinese character is a token and full-width punctuation is dropped, as in the released evaluation;
- a gold that is nothing but articles or punctuation (the option "A") is compared as written: the released
  normalisation deletes it, so that no answer could ever score.

The released *evaluation* is a third variant: ``rewards.evaluator``.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Literal

Fidelity = Literal["faithful", "corrected"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
DELETE_ASCII = str.maketrans("", "", string.punctuation)
# As the released MAT-Coding evaluation: full-width forms of ASCII punctuation, then quotes, stops and brackets.
DELETE_FULL_WIDTH = str.maketrans(
    "",
    "",
    "".join(chr(ord(ch) + 0xFEE0) for ch in string.punctuation)
    + "\uff61\u201c\u201d\u2018\u2019\u3001\u3002\u300a\u300b\u3010\u3011",
)
_TOKEN = re.compile(r"[\u4e00-\u9fff]|[^\s\u4e00-\u9fff]+")


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, single spaces (the SQuAD normalisation)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(DELETE_ASCII)).split())


def answer_tokens(text: str) -> list[str]:
    """Words of the normalised text, each Chinese character on its own, full-width punctuation dropped."""
    return _TOKEN.findall(normalize_answer(text.translate(DELETE_FULL_WIDTH)))


def token_f1(prediction: str, gold: str, *, fidelity: Fidelity = "corrected") -> float:
    """Harmonic mean of token precision and recall, in [0, 1]; 0 without a common token.

    Corrected: ``overlap = sum_t min(count_prediction(t), count_gold(t))``; hence 1 wherever ``exact_match`` is 1.
    Faithful: ``overlap = |set(prediction) & set(gold)|`` over whitespace tokens of ``normalize_answer``.
    """
    if fidelity == "faithful":
        return set_overlap_f1(normalize_answer(prediction).split(), normalize_answer(gold).split())
    predicted, golden = _comparable_tokens(prediction, gold)
    if predicted == golden:
        return 1.0
    return _f1((Counter(predicted) & Counter(golden)).total(), predicted, golden)


def set_overlap_f1(predicted: Sequence[str], golden: Sequence[str]) -> float:
    """F1 as released: distinct common tokens over the lengths of the lists, repetitions included; in [0, 1]."""
    return _f1(len(set(predicted) & set(golden)), predicted, golden)


def _f1(overlap: int, predicted: Sequence[str], golden: Sequence[str]) -> float:
    if overlap == 0:
        return 0.0
    precision, recall = overlap / len(predicted), overlap / len(golden)
    return 2 * precision * recall / (precision + recall)


def exact_match(prediction: str, gold: str, *, fidelity: Fidelity = "corrected") -> float:
    """1.0 when both normalise to the same text (corrected: to the same tokens), else 0.0."""
    if fidelity == "faithful":
        return float(normalize_answer(prediction) == normalize_answer(gold))
    predicted, golden = _comparable_tokens(prediction, gold)
    return float(predicted == golden)


def _comparable_tokens(prediction: str, gold: str) -> tuple[list[str], list[str]]:
    """Tokens of both, by the strictest normalisation that leaves something of the gold.

    Were a deleted gold compared as "", every empty or article-only answer would match it.
    """
    golden = answer_tokens(gold)
    if golden:
        return answer_tokens(prediction), golden
    return prediction.lower().split(), gold.lower().split()
