"""Rewards of live multi-turn episodes: the step rewards of arXiv 2505.14246, averaged over the steps of an episode.

The released code scores one teacher-forced step at a time (``stepwise``). Here the model walks the whole way itself,
and its turns are matched with the steps of the gold in the order of their kinds: the n-th gold step of a kind with the
n-th turn of that kind. A step without a turn scores 0; a turn without a step costs format.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import fmean

from arft_fast.protocol import Action, ActionKind, parse_labels, parse_turn
from arft_fast.rewards.similarity import QuerySimilarity, lexical_similarity, thresholded
from arft_fast.rewards.stepwise import label_accuracy
from arft_fast.rewards.text import exact_match, token_f1
from arft_fast.trajectory import Turn


@dataclass(frozen=True)
class GoldStep:
    """One step that a good episode holds."""

    kind: ActionKind
    target: str | Sequence[str] = ""
    """``problem``: the labels. ``search``, ``answer``: the text, or several of which the best match counts.
    ``code``: not read, running is what counts."""


def episode_rewards(
    trajectory_turns: Sequence[Turn],
    gold_steps: Sequence[GoldStep],
    *,
    similarity: QuerySimilarity = lexical_similarity,
) -> dict[str, float]:
    """Reward components of one finished episode, [0, 1] each.

    Trained:

    - ``accuracy``: mean over the gold steps of: ``problem`` the label rule (1, 0.5, 0); ``code`` 1 when the observation
      that follows has an image and did not fail; ``search`` similarity of the queries, 0 below 0.5; ``answer`` F1.
    - ``format``: well-formed turns of the kinds that the gold holds, each counted as often as the gold has it, divided
      by the number of turns or of gold steps, whichever is larger.

    Reported: ``answer_f1`` and ``answer_em`` where the gold holds an answer; ``problem``, ``code`` and ``search``, the
    mean accuracy of that kind, where the gold holds the kind.

    Args:
        trajectory_turns: the model's turns and the observations between them, in order.
        gold_steps: the steps of a good episode, in order.
        similarity: of (query, gold query); values below 0.5 count as 0.

    Raises:
        ValueError: no gold step, or one without the target that its kind needs.
    """
    if not gold_steps:
        raise ValueError("gold_steps is empty; give at least the answer's step")
    for step in gold_steps:
        if step.kind != "code" and not step.target:
            raise ValueError(f"gold_steps: the {step.kind} step has no target; give its text or its labels")

    turns_of_kind: defaultdict[ActionKind | None, list[tuple[Action, bool]]] = defaultdict(list)
    for turn, after in zip_longest(trajectory_turns, trajectory_turns[1:]):
        if turn.role == "assistant":
            parsed = parse_turn(turn.text)
            turns_of_kind[parsed.kind].append((parsed, _gave_an_image(after)))

    similarity = thresholded(similarity)
    scores: defaultdict[str, list[float]] = defaultdict(list)
    steps_of_kind: Counter[ActionKind] = Counter()
    for step in gold_steps:
        matched = turns_of_kind[step.kind][steps_of_kind[step.kind] :]
        steps_of_kind[step.kind] += 1
        action = matched[0][0] if matched else None
        if step.kind == "answer":
            scores["answer_f1"].append(_best(token_f1, action, step))
            scores["answer_em"].append(_best(exact_match, action, step))
        elif step.kind == "search":
            scores["search"].append(_best(similarity, action, step))
        elif step.kind == "problem":
            predicted = parse_labels(action.body) if action else None
            scores["problem"].append(label_accuracy(predicted or [], _texts(step)))
        else:
            scores["code"].append(float(bool(matched) and matched[0][1]))

    well_formed = sum(
        min(wanted, sum(parsed.well_formed for parsed, _ in turns_of_kind[kind]))
        for kind, wanted in steps_of_kind.items()
    )
    turn_count = sum(map(len, turns_of_kind.values()))
    return {
        "format": well_formed / max(turn_count, len(gold_steps)),
        "accuracy": fmean(score for name, values in scores.items() if name != "answer_em" for score in values),
        **{name: fmean(values) for name, values in scores.items()},
    }


def _gave_an_image(observation: Turn | None) -> bool:
    return (
        observation is not None
        and observation.role == "observation"
        and not observation.failed
        and len(observation.images) > 0
    )


def _texts(step: GoldStep) -> Sequence[str]:
    return [step.target] if isinstance(step.target, str) else step.target


def _best(metric: QuerySimilarity, action: Action | None, step: GoldStep) -> float:
    return max(metric(action.body, text) for text in _texts(step)) if action else 0.0
