"""Format rewards of single steps (arXiv 2505.14246): is the completion one thought and one action, as told?

``faithful`` gives the verdicts of the released regular expressions, quirks included: only *opening* tags are counted,
any character outside of the outer tags fails (a trailing newline too), and a search step is judged by the tags that
the completion itself uses. ``corrected`` asks for a ``protocol.parse_turn(..).well_formed`` turn of the gold's kind
whose body follows the same grammar: a closed python fence in ``<code>``, quoted names in ``<problem>``.

The released patterns are lazy groups over untrusted text. Here each verdict is a handful of ``str`` searches: a format
tag opens at most once by then, so there is only one place where a pattern could match.
"""

from __future__ import annotations

from collections.abc import Sequence

from arft_fast.protocol import Action, ActionKind, parse_code, parse_labels, parse_turn
from arft_fast.rewards.text import Fidelity

SEARCH_KINDS: tuple[ActionKind, ...] = ("answer", "search")
"""Actions of a search step, in the order in which the released code looks for them."""
CODING_KINDS: tuple[ActionKind, ...] = ("answer", "code", "problem")
"""Actions of a coding step, in the order in which the released code looks for them."""


def search_format(completion: str, solution: str, *, fidelity: Fidelity = "corrected") -> float:
    """1.0 for a turn of one thought and one search or answer, else 0.0. Errors: see ``gold_action``."""
    if fidelity == "corrected":
        return _corrected_format(completion, gold_action(solution, SEARCH_KINDS))
    if _opens_twice(completion, ("think", *SEARCH_KINDS)):
        return 0.0
    for kind in SEARCH_KINDS:
        if f"<{kind}>" in completion and f"</{kind}>" in completion:
            return float(_thought_then_block(completion, kind) is not None)
    return 0.0


def coding_format(completion: str, solution: str, *, fidelity: Fidelity = "corrected") -> float:
    """1.0 for a turn of one thought and one action of the gold's kind, else 0.0. Errors: see ``gold_action``."""
    if fidelity == "corrected":
        return _corrected_format(completion, gold_action(solution, CODING_KINDS))
    kind = published_kind(solution, CODING_KINDS)
    if kind is None or _opens_twice(completion, ("think", *CODING_KINDS)):
        return 0.0
    body = _thought_then_block(completion, kind)
    return float(body is not None and _fits(kind, body))


def gold_action(solution: str, kinds: Sequence[ActionKind]) -> Action:
    """The action of a teacher's solution.

    Raises:
        ValueError: the solution holds no complete action of ``kinds``: a row that no completion could be scored on.
    """
    gold = parse_turn(solution)
    if gold.kind not in kinds:
        wanted = ", ".join(f"<{kind}>..</{kind}>" for kind in kinds)
        raise ValueError(f"solution {solution[:80]!r} holds no complete action; it must be one of {wanted}")
    return gold


def published_kind(solution: str, kinds: Sequence[ActionKind]) -> ActionKind | None:
    """The kind of step by the released rule: the first of ``kinds`` whose opening tag stands in the solution."""
    return next((kind for kind in kinds if f"<{kind}>" in solution), None)


def _corrected_format(completion: str, gold: Action) -> float:
    action = parse_turn(completion)
    return float(action.well_formed and action.kind == gold.kind and _fits(action.kind, action.body))


def _fits(kind: ActionKind | None, body: str) -> bool:
    """Whether the body of an action follows the grammar of its kind."""
    if kind == "code":
        return parse_code(body) is not None
    return kind != "problem" or parse_labels(body) is not None


def _opens_twice(text: str, tags: Sequence[str]) -> bool:
    return any(text.count(f"<{tag}>") >= 2 for tag in tags)


def _thought_then_block(text: str, kind: ActionKind) -> str | None:
    r"""Body where ``<think>.*?</think>\s*<kind>(.*)</kind>`` matches the whole text, else None.

    ``<kind>`` stands at most once in the text, so the pattern has one place to match, and no need to search for it.
    """
    opening, closing = f"<{kind}>", f"</{kind}>"
    before, _, body = text.partition(opening)
    thought = before.rstrip()
    if not thought.startswith("<think>") or not thought.endswith("</think>"):
        return None
    return body[: -len(closing)] if body.endswith(closing) else None
