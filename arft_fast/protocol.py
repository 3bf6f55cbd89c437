"""The tags that a model acts with, and how its text is read (arXiv 2505.14246).

A turn is one thought and one action::

    <think> The scene is too dark. </think>
    <problem> {'dark'} </problem>

``search``, ``answer``, ``code``, ``problem`` and ``tool_call`` are the model's actions; ``information``, ``tips`` and
``tool_response`` are the scaffold's. A ``tool_call`` is written as Qwen2.5 was trained to: a JSON object with the name
and the arguments of a function. What a model writes is untrusted: every reader here takes any text, in time linear in
its length, by ``str`` searches alone, so that no text can make a pattern backtrack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ActionKind = Literal["search", "answer", "code", "problem", "tool_call"]

ACTION_KINDS: tuple[ActionKind, ...] = ("search", "answer", "code", "problem", "tool_call")
TAGS = ("think", *ACTION_KINDS, "information", "tips", "tool_response")
PROTOCOL_TAGS = tuple(tag for name in TAGS for tag in (f"<{name}>", f"</{name}>"))
"""The 18 opening and closing tags."""
STOP_TAGS = ("</search>", "</code>", "</problem>", "</answer>", "</tool_call>")
"""Generation of a turn ends after the first of these: one action a turn."""
MAT_LABELS = ("rotation90", "rotation180", "dark", "overexposure", "blur", "noise", "crop", "none")
"""The closed set of image problems of MAT-Coding."""


@dataclass(frozen=True)
class Action:
    """What one turn of the model asks for."""

    kind: ActionKind | None
    """None: the text holds no complete action block."""
    body: str
    """Text between the action's tags, stripped; empty when ``kind`` is None."""
    think: str
    """Text of the first complete thought, stripped; empty without one."""
    well_formed: bool
    """The turn is one thought, optional whitespace and one action, without another protocol tag (``parse_turn``)."""


def parse_turn(text: str) -> Action:
    """Read one turn: its thought, and the first action block that closes outside of the thought.

    Blocks that the model only thinks about do not count. A thought that never closes hides nothing: generation
    stops at the first action that closes, so what follows an open ``<think>`` is what the model did.

    ``well_formed`` needs, after surrounding whitespace is stripped, exactly ``<think>..</think>``, optional whitespace
    and one action block: each of these four tags once, every other protocol tag never, and no text outside.
    """
    think, after_think = _block(text, "think")
    if think is None:
        kind, body = _first_action(text)
    else:
        kind, body = _first_action(text[: text.find("<think>")])
        if kind is None:
            kind, body = _first_action(text[after_think:])
    return Action(kind=kind, body=body, think=think or "", well_formed=kind is not None and _is_well_formed(text, kind))


def render_turn(think: str, kind: ActionKind, body: str) -> str:
    """The turn that ``parse_turn`` reads back as ``Action(kind, body.strip(), think.strip(), well_formed=True)``.

    Raises:
        ValueError: ``kind`` is no action, or ``think`` or ``body`` holds a protocol tag and could not be read back.
    """
    if kind not in ACTION_KINDS:
        raise ValueError(f"kind is {kind!r}; give one of {', '.join(ACTION_KINDS)}")
    for name, value in (("think", think), ("body", body)):
        found = [tag for tag in PROTOCOL_TAGS if tag in value]
        if found:
            raise ValueError(f"{name} holds the protocol tag {found[0]}; remove it, or the turn cannot be read back")
    gap = "\n" if kind in ("code", "tool_call") else " "  # MAT's code fences and Qwen's calls stand on their own lines
    return f"<think> {think.strip()} </think>\n<{kind}>{gap}{body.strip()}{gap}</{kind}>"


def parse_labels(body: str) -> list[str] | None:
    """Names in ``{'rotation90', 'dark'}``, in the order written; None when the text is anything else.

    At least one name; each in single quotes, not empty and without a quote inside; commas between; any whitespace
    around the parts. Names need not be in ``MAT_LABELS``: an unknown one is a wrong answer, not a wrong format.
    """
    body = body.strip()
    if len(body) < 2 or body[0] != "{" or body[-1] != "}":
        return None
    gaps_and_names = body[1:-1].split("'")
    gaps, names = gaps_and_names[0::2], gaps_and_names[1::2]
    if len(gaps) != len(names) + 1 or not names or not all(names):
        return None
    if gaps[0].strip() or gaps[-1].strip() or any(gap.strip() != "," for gap in gaps[1:-1]):
        return None
    return names


def render_labels(labels: Sequence[str]) -> str:
    """``["rotation90", "dark"]`` as ``{'rotation90', 'dark'}``: the inverse of ``parse_labels``.

    Raises:
        ValueError: no label, an empty one, or one that holds a single quote.
    """
    if isinstance(labels, str) or not labels or not all(labels) or any("'" in label for label in labels):
        raise ValueError(f"labels is {labels!r}; give a list of one or more names without single quotes")
    return "{" + ", ".join(f"'{label}'" for label in labels) + "}"


def parse_code(body: str) -> str | None:
    """Source inside the ```` ```python ```` fence that ``body`` begins with; None without a fence or its end."""
    body = body.strip()
    fence = "```python"
    end = body.find("```", len(fence))
    return body[len(fence) : end] if body.startswith(fence) and end >= 0 else None


def neutralise(text: str) -> str:
    """``text`` of a tool with its protocol tags opened up (``< answer>``), so that none speaks for the scaffold."""
    for tag in PROTOCOL_TAGS:
        text = text.replace(tag, f"< {tag[1:]}")
    return text


def _block(text: str, tag: str) -> tuple[str | None, int]:
    """Stripped inner text of the first complete ``tag`` block and the index after it; ``(None, len(text))`` without."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    start = text.find(opening)
    end = text.find(closing, start + len(opening)) if start >= 0 else -1
    if end < 0:
        return None, len(text)
    return text[start + len(opening) : end].strip(), end + len(closing)


def _first_action(text: str) -> tuple[ActionKind | None, str]:
    """The action block that closes first, as a reader that stops at the first closing tag would see it."""
    first: tuple[ActionKind | None, str] = (None, "")
    first_end = len(text) + 1
    for kind in ACTION_KINDS:
        body, end = _block(text, kind)
        if body is not None and end < first_end:
            first, first_end = (kind, body), end
    return first


def _is_well_formed(text: str, kind: ActionKind) -> bool:
    text = text.strip()
    opening, closing = f"<{kind}>", f"</{kind}>"
    if not text.startswith("<think>") or not text.endswith(closing):
        return False
    if any(text.count(tag) != (tag in ("<think>", "</think>", opening, closing)) for tag in PROTOCOL_TAGS):
        return False
    between = text[text.find("</think>") + len("</think>") : text.find(opening)]
    return text.find("</think>") < text.find(opening) and not between.strip()
