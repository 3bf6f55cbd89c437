"""From a function to its schema, and from a model's JSON to the function's arguments."""

from __future__ import annotations

import asyncio
import enum
import json
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from arft_fast.tools.docstring import read_docstring
from arft_fast.tools.function_schema import Unsupported
from arft_fast.tools.function_tool import FunctionTool, function_tool
from arft_fast.tools.json_argument import MAX_ARGUMENT_CHARACTERS
from arft_fast.tools.tool import ToolResult


class Axis(enum.Enum):
    HORIZONTAL = "h"
    VERTICAL = "v"


def describe(
    box: tuple[float, float, float, float],
    axis: Axis,
    mode: Literal["fast", "good"] = "fast",
    names: list[str] | None = None,
    count: int | str = 1,
    flag: bool = False,
    pair: tuple[int, str] = (0, ""),
) -> str:
    """Say what was given,
    in full.

    Args:
        box: left, top,
            right, bottom.
        axis (Axis): where to: turn.

    Returns:
        The values: as text.
    """
    return repr((box, axis, mode, names, count, flag, pair))


def call(tool: FunctionTool, argument: object, image: Image.Image | None = None) -> ToolResult:
    return asyncio.run(tool.call(argument if isinstance(argument, str) else json.dumps(argument), image))


GOOD = {"box": [0, 1.5, 2, 3], "axis": "v"}


def test_the_schema_has_the_form_of_chat_templates() -> None:
    (schema,) = function_tool(describe).schemas
    assert schema == {
        "type": "function",
        "function": {
            "name": "describe",
            "description": "Say what was given, in full.",
            "parameters": {
                "type": "object",
                "properties": {
                    "box": {
                        "type": "array",
                        "items": {"type": "number"},
                        "minItems": 4,
                        "maxItems": 4,
                        "description": "left, top, right, bottom.",
                    },
                    "axis": {"type": "string", "enum": ["h", "v"], "description": "where to: turn."},
                    "mode": {"type": "string", "enum": ["fast", "good"]},
                    "names": {"type": "array", "items": {"type": "string"}, "nullable": True},
                    "count": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
                    "flag": {"type": "boolean"},
                    "pair": {
                        "type": "array",
                        "prefixItems": [{"type": "integer"}, {"type": "string"}],
                        "minItems": 2,
                        "maxItems": 2,
                    },
                },
                "required": ["box", "axis"],
            },
        },
    }


def test_the_schema_is_that_of_transformers() -> None:
    from transformers.utils import get_json_schema

    def turn(degrees: int, names: list[str], strength: float | None = None) -> None:
        """Turn the image.

        Args:
            degrees: clockwise
            names: of the parts
            strength: of the turn
        """

    theirs = get_json_schema(turn)
    theirs["function"].pop("return")  # a template has no use for it
    assert function_tool(turn).schemas == [theirs]


def test_the_function_gets_its_own_types() -> None:
    text = call(function_tool(describe), {**GOOD, "names": ["a"], "count": "x", "pair": [1, "b"]}).text
    assert text == repr(((0.0, 1.5, 2.0, 3.0), Axis.VERTICAL, "fast", ["a"], "x", False, (1, "b")))


def test_rest_fields_describe_parameters_too() -> None:
    text = (
        "Do it.\n\nMore.\n:param int a: first,\n    and on\n:param b: second\n:returns: nothing\n    at all\n:rtype: x"
    )
    assert read_docstring(text) == ("Do it. More.", {"a": "first, and on", "b": "second"})


def test_text_after_a_section_belongs_to_no_parameter() -> None:
    assert read_docstring("Do.\n\nArgs:\n    a: first\n\nAfter.\n    deep\n") == ("Do.", {"a": "first"})


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"box": [0, 1, 2]}, "box must be a list of 4: a number, a number, a number, a number, got a list of 3"),
        ({"box": [0, 1, "2", 3]}, "box[2] must be a number, got the text '2'"),
        ({"box": [0, 1, True, 3]}, "box[2] must be a number, got true"),
        ({"box": {"x": 1}}, "box must be a list of 4: a number, a number, a number, a number, got an object"),
        ({"axis": "d"}, "axis must be one of 'h', 'v', got the text 'd'"),
        ({"mode": 1}, "mode must be one of 'fast', 'good', got 1"),
        ({"names": ["a", None]}, "names[1] must be a text, got null"),
        ({"count": 1.0}, "count must be an integer or a text, got 1.0"),
        ({"flag": 1}, "flag must be true or false, got 1"),
        ({"flag": None}, "flag must be true or false, got null"),
        ({"boxx": 1}, "there is no parameter 'boxx'; the parameters are: box, axis, mode, names, count, flag, pair"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, object], error: str) -> None:
    result = call(function_tool(describe), {**GOOD, **change})
    assert (result.error, result.text) == (error, "")


def test_a_missing_argument_is_named() -> None:
    assert call(function_tool(describe), {"box": [0, 1, 2, 3]}).error == "axis is missing; give one of 'h', 'v'"


@pytest.mark.parametrize(
    ("argument", "error"),
    [
        ("", "the arguments are no JSON object: Expecting value at character 0"),
        ("[1]", 'the arguments are no JSON object; write {"name": value, ...}'),
        ("{} {}", "the arguments are no JSON object: Extra data at character 3"),
        ('{"x": 1, "x": 2}', "'x' is given twice"),
        ('{"x": NaN}', "NaN is no JSON number"),
        ('{"x": -Infinity}', "-Infinity is no JSON number"),
        ('{"x": 1e999}', "the number 1e999 is too large"),
        ('{"x": 9223372036854775808}', "the number 9223372036854775808.. is too large"),
        ('{"x": ' + "9" * 50_000 + "}", "the number 99999999999999999999.. is too large"),
        ('{"x": "\\ud800"}', "the arguments hold half a surrogate pair"),
        ("[" * 50_000, "the arguments are nested too deeply"),
        (" " * (MAX_ARGUMENT_CHARACTERS + 1), "the arguments have 100001 characters, more than 100000"),
    ],
    ids=range(12),
)
def test_json_is_read_strictly(argument: str, error: str) -> None:
    assert call(function_tool(describe), argument).error == error


@given(st.text(alphabet='{}[]":,.-+eE0123456789ntrufalsx\\ ', max_size=60))
def test_no_argument_raises(argument: str) -> None:
    result = call(function_tool(describe), argument)
    assert result.error is not None and "\n" not in result.error


def no_docstring(a: int) -> str:
    return str(a)


def no_type(a) -> str:  # type: ignore[no-untyped-def]
    """Do."""
    return str(a)


def starred(*a: int) -> str:
    """Do."""
    return str(a)


def mapping(a: dict[str, int]) -> str:
    """Do."""
    return str(a)


def bare(a: list) -> str:
    """Do."""
    return str(a)


def two_images(a: Image.Image, b: Image.Image) -> str:
    """Do."""
    return f"{a}{b}"


def unknown_type(a: Nowhere) -> str:  # type: ignore[name-defined]  # noqa: F821
    """Do."""
    return str(a)


def mixed(a: Literal["x", 1]) -> str:
    """Do."""
    return str(a)


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (no_docstring, "no_docstring has no docstring"),
        (no_type, "parameter 'a' of no_type has no type; annotate it"),
        (starred, "parameter 'a' of starred cannot be given by name"),
        (mapping, r"parameter 'a' of mapping: type dict\[str, int\] is not supported; use bool"),
        (bare, "parameter 'a' of bare: type <class 'list'> is not supported"),
        (two_images, "parameter 'b' of two_images is a second image"),
        (unknown_type, "the types of unknown_type cannot be read .*Nowhere"),
        (mixed, "parameter 'a' of mixed: the values of .* must be texts, or numbers of one type"),
        (lambda: "", "tool name '<lambda>' is no name"),
    ],
)
def test_a_function_that_cannot_be_a_tool_is_refused_with_the_remedy(function: Any, error: str) -> None:
    with pytest.raises(Unsupported, match=error):
        function_tool(function)
