"""The tag protocol: any text is read, in linear time, and what is rendered is read back."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arft_fast.protocol import (
    ACTION_KINDS,
    MAT_LABELS,
    PROTOCOL_TAGS,
    STOP_TAGS,
    Action,
    neutralise,
    parse_code,
    parse_labels,
    parse_turn,
    render_labels,
    render_turn,
)

MEGABYTE = 1_000_000
SOUP = st.lists(st.sampled_from([*PROTOCOL_TAGS, " ", "\n", "a", "<", ">", "</", "{'x'}", "```python", "\x00"])).map(
    "".join
)
PLAIN = st.text().filter(lambda text: not any(tag in text for tag in PROTOCOL_TAGS))


def test_the_protocol_has_nine_tags_and_five_of_them_stop_a_turn() -> None:
    assert len(set(PROTOCOL_TAGS)) == 18
    assert set(STOP_TAGS) == {f"</{kind}>" for kind in ACTION_KINDS}
    assert len(set(MAT_LABELS)) == 8


@given(PLAIN, st.sampled_from(ACTION_KINDS), PLAIN)
def test_a_rendered_turn_is_read_back(think: str, kind: str, body: str) -> None:
    read = parse_turn(render_turn(think, kind, body))  # type: ignore[arg-type]
    assert read == Action(kind=kind, body=body.strip(), think=think.strip(), well_formed=True)  # type: ignore[arg-type]


@given(st.one_of(st.text(), SOUP))
def test_any_text_is_read(text: str) -> None:
    action = parse_turn(text)
    assert action.body == action.body.strip() and action.body in text and action.think in text
    if action.kind is None:
        assert (action.body, action.well_formed) == ("", False)
    else:
        assert f"<{action.kind}>" in text and f"</{action.kind}>" in text


@given(SOUP)
def test_a_well_formed_turn_has_four_tags_in_order_and_no_text_outside(text: str) -> None:
    # The definition once more, by cutting the text at its tags.
    tags, outside, rest = [], [], text.strip()
    while rest:
        tag = next((tag for tag in PROTOCOL_TAGS if rest.startswith(tag)), None)
        if tag:
            tags.append(tag)
        elif len(tags) in (0, 2, 4):
            outside.append(rest[0])
        rest = rest[len(tag) :] if tag else rest[1:]
    shapes = [["<think>", "</think>", f"<{kind}>", f"</{kind}>"] for kind in ACTION_KINDS]
    assert parse_turn(text).well_formed == (tags in shapes and not "".join(outside).strip())


@pytest.mark.parametrize(
    ("text", "kind", "body", "think"),
    [
        ("<think>t</think><answer>x</answer>", "answer", "x", "t"),
        ("<answer>x</answer>", "answer", "x", ""),
        ("<think>t <search>q</search></think><answer>x</answer>", "answer", "x", "t <search>q</search>"),
        ("<think>t <search>q</search></think>", None, "", "t <search>q</search>"),
        ("<think>never closed <search>q</search>", "search", "q", ""),
        ("<search>q</search><think>t</think><answer>x</answer>", "search", "q", "t"),
        ("<answer> a <search>q</search> b </answer>", "search", "q", ""),
        ("<search>a<search>b</search>", "search", "a<search>b", ""),
        ("</search><search>q</search>", "search", "q", ""),
        ("<code>x = 1</code><answer>1</answer>", "code", "x = 1", ""),
        ("<think>t</think><tool_call>\n{}\n</tool_call>", "tool_call", "{}", "t"),
        ("<tool_call>{}</tool_call><answer>1</answer>", "tool_call", "{}", ""),
        ("<answer>1</answer><tool_call>{}</tool_call>", "answer", "1", ""),
        ("<tool_call>{}<answer>1</answer>", "answer", "1", ""),
        ("<search>q", None, "", ""),
        ("<search>q<think>t</think>r</search>", None, "", "t"),
        ("<ANSWER>x</ANSWER>", None, "", ""),
        ("", None, "", ""),
    ],
)
def test_the_action_is_the_block_that_closes_first_outside_of_the_thought(
    text: str, kind: str | None, body: str, think: str
) -> None:
    action = parse_turn(text)
    assert (action.kind, action.body, action.think) == (kind, body, think)


@pytest.mark.parametrize(
    "text",
    [
        "<answer>x</answer>",
        "<think>t</think>x<answer>x</answer>",
        "<think>t</think><answer>x</answer> I am done.",
        "Well: <think>t</think><answer>x</answer>",
        "<think>t</think><think>t</think><answer>x</answer>",
        "<think>t</think></think><answer>x</answer>",
        "<think>t</think><answer>x</answer></answer>",
        "<think>t</think><answer>x</answer><search>q</search>",
        "<think>t <search>q</search></think><answer>x</answer>",
        "<think>t</think><answer><information>I made this up</information></answer>",
        "<think>t</think><tool_call>{}</tool_call><tool_response>I made this up</tool_response>",
        "<answer><think>t</think>x</answer>",
        "<think>t<answer></think>x</answer>",
    ],
)
def test_a_turn_with_anything_else_is_not_well_formed(text: str) -> None:
    assert not parse_turn(text).well_formed


def test_whitespace_around_a_turn_is_well_formed() -> None:
    assert parse_turn("\n <think>t</think>\n\n<answer>x</answer> \n").well_formed


@pytest.mark.parametrize(
    "unit",
    [
        *PROTOCOL_TAGS,
        "<think></think>",
        "<search></think>",
        "<answer><search>",
        "<tool_call></tool_call",
        "<think>a</think> ",
        "<",
        " ",
        "<think>\n</think> <answer> </answer",
    ],
)
def test_a_megabyte_of_tags_is_read_in_linear_time(unit: str) -> None:
    text = unit * (MEGABYTE // len(unit))
    begin = time.thread_time()
    parse_turn(text)
    assert time.thread_time() - begin < 0.2


@pytest.mark.parametrize("unit", ["'", "''", "',", "'a',", "{", "{'a'}", " ", "'a' "])
def test_a_megabyte_of_labels_is_read_in_linear_time(unit: str) -> None:
    body = "{" + unit * (MEGABYTE // len(unit)) + "}"
    begin = time.thread_time()
    parse_labels(body)
    assert time.thread_time() - begin < 0.2


@given(st.lists(st.text(min_size=1).filter(lambda name: "'" not in name), min_size=1))
def test_rendered_labels_are_read_back(labels: list[str]) -> None:
    assert parse_labels(render_labels(labels)) == labels


@pytest.mark.parametrize(
    ("body", "labels"),
    [
        ("{'rotation90', 'dark'}", ["rotation90", "dark"]),
        (" {\n'dark'} ", ["dark"]),
        ("{ 'dark' ,'blur' }", ["dark", "blur"]),
        ("{'dark', 'dark'}", ["dark", "dark"]),
        ("{'nonsense'}", ["nonsense"]),
        ("{'dark', blur}", None),
        ("{'dark' 'blur'}", None),
        ("{'dark',}", None),
        ("{,'dark'}", None),
        ("{'dark''blur'}", None),
        ("{'dark, 'blur'}", None),
        ("{''}", None),
        ("{}", None),
        ("{", None),
        ("}", None),
        ("", None),
        ("'dark'", None),
        ('{"dark"}', None),
        ("['dark']", None),
        ("{'dark'} and more", None),
    ],
)
def test_labels_are_quoted_names_in_braces(body: str, labels: list[str] | None) -> None:
    assert parse_labels(body) == labels


@pytest.mark.parametrize(
    ("body", "source"),
    [
        ("```python\nx = 1\n```", "\nx = 1\n"),
        ("\n```python\nx = 1\n``` done", "\nx = 1\n"),
        ("```python\na```b```", "\na"),
        ("```python\nx = 1", None),
        ("```\nx = 1\n```", None),
        ("first ```python\nx = 1\n```", None),
        ("x = 1", None),
        ("", None),
    ],
)
def test_code_is_what_stands_in_the_python_fence(body: str, source: str | None) -> None:
    assert parse_code(body) == source


@pytest.mark.parametrize(
    ("think", "kind", "body", "named"),
    [
        ("t", "information", "x", "kind"),
        ("I write <answer>", "answer", "x", "think"),
        ("t", "answer", "x</answer>", "body"),
    ],
)
def test_a_turn_that_cannot_be_read_back_is_not_rendered(think: str, kind: str, body: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        render_turn(think, kind, body)  # type: ignore[arg-type]


def test_a_call_is_written_on_lines_of_its_own() -> None:
    assert render_turn("t", "tool_call", "{}") == "<think> t </think>\n<tool_call>\n{}\n</tool_call>"
    assert render_turn("t", "search", "q") == "<think> t </think>\n<search> q </search>"


@pytest.mark.parametrize("labels", [[], [""], ["it's"], "dark"])
def test_labels_that_cannot_be_read_back_are_not_rendered(labels: list[str]) -> None:
    with pytest.raises(ValueError, match="labels"):
        render_labels(labels)


@given(st.lists(st.one_of(st.sampled_from(PROTOCOL_TAGS), st.text(max_size=4)), max_size=8))
def test_no_protocol_tag_is_left_in_a_neutralised_text(pieces: list[str]) -> None:
    assert not any(tag in neutralise("".join(pieces)) for tag in PROTOCOL_TAGS)


def test_neutralising_leaves_other_text_as_it_is() -> None:
    assert neutralise("a < b, <b>bold</b>, <answer> 3") == "a < b, <b>bold</b>, < answer> 3"
