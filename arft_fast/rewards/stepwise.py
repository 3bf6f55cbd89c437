"""Rewards of single teacher-forced steps: how the authors of arXiv 2505.14246 trained.

A step is scored against the teacher's next action (the *solution*): ``format`` and ``accuracy``, [0, 1] each, weighted
1 and 1. A step of the wrong kind has accuracy 0; the right kind is scored by what it holds:

    answer    token F1
    search    similarity of the queries, 0 below 0.5
    code      faithful: the constant 0.9 of the released code, whatever was written; corrected: 1.0 if it ran, else 0.0
    problem   1 for the same labels; 0.5 for the rotation alone, where the gold is a rotation and one more; else 0

``faithful`` follows the released code: the kind is judged by substrings, and an answer or query without its tags, or
over more than one line, is compared as the *whole* completion. ``corrected`` scores the parsed action and nothing else.

One quirk is not taken over: the released search reward first asks math_verify whether the whole completion "equals"
the solution, and then gives 1.0 whatever the tags. It needs two more packages, and it rewards broken turns.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Sequence

from arft_fast.protocol import parse_code, parse_labels, parse_turn
from arft_fast.rewards.format import (
    CODING_KINDS,
    SEARCH_KINDS,
    coding_format,
    gold_action,
    published_kind,
    search_format,
)
from arft_fast.rewards.similarity import QuerySimilarity, thresholded
from arft_fast.rewards.text import Fidelity, token_f1

PUBLISHED_CODE_REWARD = 0.9
"""The released code; equation 4 of the paper says 1."""


def search_step_rewards(
    completion: str, solution: str, *, fidelity: Fidelity, similarity: QuerySimilarity
) -> dict[str, float]:
    """``format`` and ``accuracy`` of one search step.

    Args:
        completion: what the model wrote (untrusted).
        solution: the teacher's step, one ``<search>`` or ``<answer>`` block.
        fidelity: ``faithful`` to the released code or ``corrected``.
        similarity: of (query, gold query); values below 0.5 count as 0.

    Raises:
        ValueError: ``solution`` holds neither block (corrected; the released code then gives 0).
    """
    accuracy = _published_search_accuracy if fidelity == "faithful" else _search_accuracy
    return {
        "format": search_format(completion, solution, fidelity=fidelity),
        "accuracy": accuracy(completion, solution, thresholded(similarity)),
    }


def coding_step_rewards(
    completion: str, solution: str, *, fidelity: Fidelity, executed: bool | None = None
) -> dict[str, float]:
    """``format`` and ``accuracy`` of one coding step.

    Args:
        completion: what the model wrote (untrusted; it is at most parsed here, never run).
        solution: the teacher's step, one ``<problem>``, ``<code>`` or ``<answer>`` block.
        fidelity: ``faithful`` to the released code or ``corrected``.
        executed: whether the code ran and left an image; None when nobody ran it: then a python block that compiles
            passes. Read by ``corrected`` alone.

    Raises:
        ValueError: ``solution`` holds none of the blocks, or no labels (corrected; the released code then gives 0).
    """
    if fidelity == "faithful":
        accuracy = _published_coding_accuracy(completion, solution)
    else:
        accuracy = _coding_accuracy(completion, solution, executed)
    return {"format": coding_format(completion, solution, fidelity=fidelity), "accuracy": accuracy}


def label_accuracy(predicted: Sequence[str], gold: Sequence[str]) -> float:
    """1.0 for the same labels in any order, repeats counted; 0.5 for the rotation alone of a gold pair; else 0.0.

    A gold pair of both rotations gives half credit for ``rotation90`` only, as in the released code.
    """
    rotation = next((name for name in ("rotation90", "rotation180") if name in gold), None)
    if len(gold) == 2 and rotation is not None and list(predicted) == [rotation]:
        return 0.5
    return float(sorted(predicted) == sorted(gold))


def compiles(source: str) -> bool:
    """Whether ``source`` is a Python module of at least one statement. Nothing is executed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "invalid escape sequence" and the like, of code that is not ours
        try:
            module = ast.parse(source)
            compile(module, "<completion>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # also null bytes, surrogates, deep nesting
            return False
    return bool(module.body)


def _search_accuracy(completion: str, solution: str, similarity: QuerySimilarity) -> float:
    gold, action = gold_action(solution, SEARCH_KINDS), parse_turn(completion)
    if action.kind != gold.kind:
        return 0.0
    return token_f1(action.body, gold.body) if gold.kind == "answer" else similarity(action.body, gold.body)


def _coding_accuracy(completion: str, solution: str, executed: bool | None) -> float:
    gold, action = gold_action(solution, CODING_KINDS), parse_turn(completion)
    gold_labels = parse_labels(gold.body) if gold.kind == "problem" else []
    if gold_labels is None:
        raise ValueError(f"solution {solution[:80]!r} holds no labels; write them as {{'dark', 'blur'}}")
    if action.kind != gold.kind:
        return 0.0
    if gold.kind == "answer":
        return token_f1(action.body, gold.body)
    if gold.kind == "code":
        if executed is None:
            source = parse_code(action.body)
            executed = source is not None and compiles(source)
        return float(executed)
    return label_accuracy(parse_labels(action.body) or [], gold_labels)


def _published_search_accuracy(completion: str, solution: str, similarity: QuerySimilarity) -> float:
    kind = published_kind(solution, SEARCH_KINDS)
    if kind is None or ("<search>" if kind == "answer" else "<answer>") in completion:
        return 0.0
    written, gold = _published_block(completion, kind), _published_block(solution, kind)
    return token_f1(written, gold, fidelity="faithful") if kind == "answer" else similarity(written, gold)


def _published_coding_accuracy(completion: str, solution: str) -> float:
    kind = published_kind(solution, CODING_KINDS)
    if kind is None or any(f"<{other}>" in completion for other in CODING_KINDS if other != kind):
        return 0.0
    if kind == "answer":
        written, gold = _published_block(completion, kind), _published_block(solution, kind)
        return token_f1(written, gold, fidelity="faithful")
    if kind == "code":
        return PUBLISHED_CODE_REWARD
    return label_accuracy(_published_labels(completion), _published_labels(solution))


def _published_block(text: str, tag: str) -> str:
    """``re.search("<tag>(.*?)</tag>", text)``, stripped: a block within one line; without one the whole text."""
    for line in text.split("\n"):
        _, _, after = line.partition(f"<{tag}>")
        body, closing, _ = after.partition(f"</{tag}>")
        if closing:
            return body.strip()
    return text.strip()


def _published_labels(text: str) -> list[str]:
    r"""``re.findall("'([^']+)'", ..)`` in the first ``<problem>\s*{..}\s*</problem>``; empty without one."""
    openings = text.split("<problem>")
    start = next((i for i in range(1, len(openings)) if openings[i].lstrip().startswith("{")), None)
    if start is None:
        return []
    closings = "<problem>".join(openings[start:]).lstrip().removeprefix("{").split("</problem>")
    end = next((i for i, part in enumerate(closings[:-1]) if part.rstrip().endswith("}")), None)
    if end is None:
        return []
    between_quotes = "</problem>".join(closings[: end + 1]).split("'")[1:-1]
    names, i = [], 0
    while i < len(between_quotes):
        if between_quotes[i]:
            names.append(between_quotes[i])
            i += 1  # its closing quote opens no other name
        i += 1
    return names
