"""Step rewards: a golden table of completions in both fidelities, and the released extraction without patterns."""

from __future__ import annotations

import re
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arft_fast.protocol import render_turn
from arft_fast.rewards.stepwise import (
    _published_block,
    _published_labels,
    coding_step_rewards,
    compiles,
    label_accuracy,
    search_step_rewards,
)
from arft_fast.rewards.text import Fidelity

T = "<think>t</think>"
CODE = "<code>\n```python\nx = 1\n```\n</code>"
ANSWER, SEARCH, PAIR = "<answer>red car</answer>", "<search>eiffel tower height</search>", "{'dark', 'rotation90'}"


def first_word_similarity(query: str, gold: str) -> float:
    """1 for the same query, 0.7 for the same first word, 0.4 otherwise: one value on each side of the floor."""
    return 1.0 if query == gold else 0.7 if query.split()[:1] == gold.split()[:1] else 0.4


# completion, solution, (format, accuracy) faithful, (format, accuracy) corrected
SEARCH_TABLE = [
    (f"{T}{ANSWER}", ANSWER, (1, 1), (1, 1)),
    (f"{T}\n<answer> The red car! </answer>", ANSWER, (1, 1), (1, 1)),
    (f"{T}<answer>red</answer>", ANSWER, (1, 2 / 3), (1, 2 / 3)),
    (f"{T}<answer>boat</answer>", ANSWER, (1, 0), (1, 0)),
    (f"{T}{ANSWER}\n", ANSWER, (0, 1), (1, 1)),  # one trailing newline costs the released format
    (f"{T}<answer>red\ncar</answer>", ANSWER, (1, 0), (1, 1)),  # multi-line: the released code scores the whole text
    (f"{T}<answer>my\nred car </answer>", ANSWER, (1, 2 / 3), (1, 0.8)),
    (f"{T}{SEARCH}", ANSWER, (1, 0), (0, 0)),  # the wrong kind of step
    (ANSWER, ANSWER, (0, 1), (0, 1)),
    ("red car", ANSWER, (0, 1), (0, 0)),  # no tag: the released code scores the whole text
    (f"{T}{ANSWER}{ANSWER}", ANSWER, (0, 1), (0, 1)),
    (f"<think>so <search></think>{ANSWER}", ANSWER, (1, 0), (0, 1)),
    (f"{T}<answer>red car</answer></answer>", ANSWER, (1, 1), (0, 1)),  # only opening tags are counted
    (f"{T}<answer>A</answer>", "<answer>A</answer>", (1, 0), (1, 1)),  # "A" normalises to nothing
    ("", ANSWER, (0, 0), (0, 0)),
    (f"{T}{SEARCH}", SEARCH, (1, 1), (1, 1)),
    (f"{T}<search> eiffel tower height </search>", SEARCH, (1, 1), (1, 1)),
    (f"{T}<search>eiffel age</search>", SEARCH, (1, 0.7), (1, 0.7)),
    (f"{T}<search>tower height</search>", SEARCH, (1, 0), (1, 0)),  # 0.4 lies below the floor
    (f"{T}{ANSWER}", SEARCH, (1, 0), (0, 0)),
    ("eiffel tower height", SEARCH, (0, 1), (0, 0)),
    (f"{T}<search>eiffel\ntower</search>", SEARCH, (1, 0), (1, 0.7)),
]
CODING_TABLE = [
    (f"{T}<problem>{{'dark'}}</problem>", "<problem> {'dark'} </problem>", (1, 1), (1, 1)),
    (f"{T}<problem>{{'blur'}}</problem>", "<problem> {'dark'} </problem>", (1, 0), (1, 0)),
    (f"{T}<problem>{{'rotation90', 'dark'}}</problem>", f"<problem>{PAIR}</problem>", (1, 1), (1, 1)),
    (f"{T}<problem>{{'rotation90'}}</problem>", f"<problem>{PAIR}</problem>", (1, 0.5), (1, 0.5)),
    (f"{T}<problem>{{'dark'}}</problem>", f"<problem>{PAIR}</problem>", (1, 0), (1, 0)),
    (f"{T}<problem>{{'dark', 'dark'}}</problem>", "<problem> {'dark'} </problem>", (1, 0), (1, 0)),
    (f"{T}<problem>dark</problem>", "<problem> {'dark'} </problem>", (0, 0), (0, 0)),
    (f"{T}<problem>{{'dark' and 'blur'}}</problem>", "<problem>{'dark', 'blur'}</problem>", (0, 1), (0, 0)),
    (f"{T}{CODE}", "<problem> {'dark'} </problem>", (0, 0), (0, 0)),
    (f"{T}{CODE}", CODE, (1, 0.9), (1, 1)),
    (f"{T}<code>\n```python\nx = (\n```\n</code>", CODE, (1, 0.9), (1, 0)),
    (f"{T}<code>\n```python\n```\n</code>", CODE, (1, 0.9), (1, 0)),  # nothing at all "compiles" too
    (f"{T}<code>x = 1</code>", CODE, (0, 0.9), (0, 0)),
    ("I would rather not.", CODE, (0, 0.9), (0, 0)),  # 0.9 for no code at all
    (f"{T}{ANSWER}", CODE, (0, 0), (0, 0)),
    (f"{T}{ANSWER}", ANSWER, (1, 1), (1, 1)),
    (f"{T}<answer>car</answer> ", ANSWER, (0, 2 / 3), (1, 2 / 3)),
    (f"{T}{CODE}", ANSWER, (0, 0), (0, 0)),
    ("a red car", ANSWER, (0, 1), (0, 0)),
]


def both(rewards: dict[str, float]) -> tuple[float, float]:
    assert rewards.keys() == {"format", "accuracy"}
    return rewards["format"], rewards["accuracy"]


@pytest.mark.parametrize(("completion", "solution", "faithful", "corrected"), SEARCH_TABLE)
def test_search_steps_earn_what_the_table_says(
    completion: str, solution: str, faithful: tuple[float, float], corrected: tuple[float, float]
) -> None:
    for fidelity, expected in (("faithful", faithful), ("corrected", corrected)):
        rewards = search_step_rewards(completion, solution, fidelity=fidelity, similarity=first_word_similarity)  # type: ignore[arg-type]
        assert both(rewards) == pytest.approx(expected), fidelity


@pytest.mark.parametrize(("completion", "solution", "faithful", "corrected"), CODING_TABLE)
def test_coding_steps_earn_what_the_table_says(
    completion: str, solution: str, faithful: tuple[float, float], corrected: tuple[float, float]
) -> None:
    for fidelity, expected in (("faithful", faithful), ("corrected", corrected)):
        rewards = coding_step_rewards(completion, solution, fidelity=fidelity)  # type: ignore[arg-type]
        assert both(rewards) == pytest.approx(expected), fidelity


@pytest.mark.parametrize(("executed", "accuracy"), [(True, 1.0), (False, 0.0), (None, 1.0)])
def test_corrected_code_is_scored_by_whether_it_ran(executed: bool | None, accuracy: float) -> None:
    completion = render_turn("t", "code", "```python\nx = 1\n```")
    assert coding_step_rewards(completion, CODE, fidelity="corrected", executed=executed)["accuracy"] == accuracy


def test_faithful_code_is_scored_by_a_constant_even_when_it_failed() -> None:
    completion = render_turn("t", "code", "```python\nx = 1\n```")
    assert coding_step_rewards(completion, CODE, fidelity="faithful", executed=False)["accuracy"] == 0.9


@pytest.mark.parametrize(
    ("predicted", "gold", "accuracy"),
    [
        (["dark", "rotation180"], ["rotation180", "dark"], 1.0),
        (["rotation180"], ["rotation180", "dark"], 0.5),
        (["rotation90"], ["rotation180", "dark"], 0.0),
        (["rotation90"], ["rotation90", "rotation180"], 0.5),
        (["rotation180"], ["rotation90", "rotation180"], 0.0),
        (["rotation90"], ["rotation90"], 1.0),
        (["rotation90"], ["rotation90", "dark", "blur"], 0.0),
        (["rotation90", "rotation90"], ["rotation90", "dark"], 0.0),
        ([], ["dark"], 0.0),
    ],
)
def test_half_a_rotated_pair_is_worth_half(predicted: list[str], gold: list[str], accuracy: float) -> None:
    assert label_accuracy(predicted, gold) == accuracy


LABEL_SOUP = st.lists(
    st.sampled_from(["<problem>", "</problem>", "{", "}", "'", "'a'", "''", ",", " ", "\n", "\u3000", "b"]), max_size=16
).map("".join)
LINE_SOUP = st.lists(st.sampled_from(["<answer>", "</answer>", "\n", "\r", "\u2028", "x", " "]), max_size=12).map(
    "".join
)


@settings(max_examples=500)
@given(st.one_of(LABEL_SOUP, LABEL_SOUP.map(lambda text: f"<problem>{{{text}}}</problem>")))
def test_faithful_labels_are_what_the_released_patterns_find(text: str) -> None:
    match = re.search(r"<problem>\s*\{(.*?)\}\s*</problem>", text, re.DOTALL)
    assert _published_labels(text) == (re.findall(r"'([^']+)'", match.group(1)) if match else [])


@settings(max_examples=500)
@given(LINE_SOUP)
def test_faithful_answers_are_what_the_released_pattern_finds(text: str) -> None:
    match = re.search(r"<answer>(.*?)</answer>", text)
    assert _published_block(text, "answer") == (match.group(1) if match else text).strip()


@pytest.mark.parametrize("solution", ["", "red car", "<problem>dark</problem>"])
def test_a_solution_that_nothing_could_match_is_an_error_when_corrected(solution: str) -> None:
    with pytest.raises(ValueError, match="solution"):
        coding_step_rewards(f"{T}{ANSWER}", solution, fidelity="corrected")


@pytest.mark.parametrize("solution", ["", "red car"])
def test_a_solution_without_a_tag_earns_nothing_when_faithful(solution: str) -> None:
    assert both(coding_step_rewards(f"{T}{ANSWER}", solution, fidelity="faithful")) == (0, 0)
    rewards = search_step_rewards(solution, solution, fidelity="faithful", similarity=first_word_similarity)
    assert both(rewards) == (0, 0)


HOSTILE_CODE = {
    "brackets": "(" * 50_000,
    "minus signs": "-" * 50_000 + "1",
    "a sum": "1" + "+1" * 50_000,
    "attributes": "x" + ".y" * 50_000,
    "lambdas": "lambda:" * 20_000 + "1",
    "nested blocks": "".join(" " * depth + "if x:\n" for depth in range(200)) + " " * 200 + "pass",
    "a null byte": "x = '\0'",
    "a surrogate": "x = '\ud800'",
    "a huge number": "x = " + "9" * 10_000,
    "a return": "return 1",
}


@pytest.mark.parametrize("source", HOSTILE_CODE.values(), ids=HOSTILE_CODE.keys())
def test_hostile_code_does_not_compile_and_harms_nobody(source: str) -> None:
    verdicts: list[bool] = []
    reader = threading.Thread(target=lambda: verdicts.append(compiles(source)))  # a thread's stack is the smaller one
    reader.start()
    reader.join(timeout=10)
    assert verdicts == [False]


@pytest.mark.parametrize("source", ["9**9**9", "'x' * 10**9", "1 << 10**9", "'%999999999d' % 1", "(0,) * 10**9"])
def test_constants_are_not_computed_while_compiling(source: str) -> None:
    begin = time.thread_time()
    assert compiles(source)
    assert time.thread_time() - begin < 0.2


def test_code_with_a_warning_compiles_in_silence(recwarn: pytest.WarningsRecorder) -> None:
    assert compiles(r"x = '\d'") and compiles("x = 1 is 1")
    assert not recwarn.list


@pytest.mark.parametrize("fidelity", ["faithful", "corrected"])
@pytest.mark.parametrize(
    "unit", ["<problem>", "<problem>{", "}</problem>", "'", "<problem>{ '", "</problem>", "\n", " "]
)
def test_a_megabyte_of_tags_is_scored_in_linear_time(unit: str, fidelity: Fidelity) -> None:
    completion = unit * (1_000_000 // len(unit))
    begin = time.thread_time()
    coding_step_rewards(completion, "<problem>{'dark'}</problem>", fidelity=fidelity)
    assert time.thread_time() - begin < 0.8
