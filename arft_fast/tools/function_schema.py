"""What a Python function asks for, read from its signature and docstring: once as JSON schema for a chat template, once
as a check of what a model then sends.

Types that parameters may have: ``bool``, ``int``, ``float`` (takes integers too), ``str``; ``Literal`` and ``Enum`` of
these (a member's value is given); ``list[T]``, ``tuple[T, ...]``, ``tuple[A, B]``; unions and ``None`` of these.
Nothing is converted: ``"3"`` is no integer, nor is ``3.0`` or ``true``. One parameter may be a Pillow ``Image``, or one
or None: it gets the episode's current image and is no part of the schema.
"""

from __future__ import annotations

import enum
import inspect
import json
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from PIL.Image import Image

from arft_fast.tools.docstring import read_docstring
from arft_fast.tools.json_argument import ArgumentRejected

_NAME = re.compile(r"[A-Za-z_]\w{0,63}", re.ASCII)
_PLAIN: Mapping[type, tuple[str, str]] = {
    bool: ("boolean", "true or false"),
    int: ("integer", "an integer"),
    float: ("number", "a number"),
    str: ("string", "a text"),
}
_UNIONS = (Union, types.UnionType)


class Unsupported(TypeError):
    """A function cannot be a tool as it is. The message names it and says what to change."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One named argument that a model gives."""

    name: str
    annotation: Any
    required: bool
    schema: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class FunctionSchema:
    """A function as a model sees it."""

    name: str
    description: str
    parameters: Sequence[Parameter]
    image_parameter: str | None
    """The parameter that takes the episode's current image."""
    image_required: bool

    def as_json(self) -> dict[str, object]:
        """The form that chat templates take: ``{"type": "function", "function": {..}}``."""
        parameters = {
            "type": "object",
            "properties": {parameter.name: dict(parameter.schema) for parameter in self.parameters},
            "required": [parameter.name for parameter in self.parameters if parameter.required],
        }
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}

    def keywords(self, values: Mapping[str, object], image: Image | None) -> dict[str, object]:
        """The keyword arguments for the function: ``values`` checked, and a copy of ``image`` where it takes one.

        A copy, for samples of a prompt share their image and a function may draw on the one that it gets.

        Raises:
            ArgumentRejected: a parameter is missing, unknown or of another type, or there is no image.
        """
        by_name = {parameter.name: parameter for parameter in self.parameters}
        for name in values:
            if name not in by_name:
                known = ", ".join(by_name) or "none"
                raise ArgumentRejected(f"there is no parameter {name!r:.60}; the parameters are: {known}")
        for parameter in self.parameters:
            if parameter.required and parameter.name not in values:
                raise ArgumentRejected(f"{parameter.name} is missing; give {expected(parameter.annotation)}")
        keywords = {name: convert(by_name[name].annotation, value, name) for name, value in values.items()}
        if self.image_parameter is not None:
            if image is None and self.image_required:
                raise ArgumentRejected("there is no image to work on")
            keywords[self.image_parameter] = None if image is None else image.copy()
        return keywords


def read_function(
    function: Callable[..., object], *, name: str | None = None, skip_first: bool = False
) -> FunctionSchema:
    """The schema of ``function``, called ``name`` (default: its own name).

    Args:
        skip_first: the first parameter is ``self``.

    Raises:
        Unsupported: no docstring; a parameter without a type, of an unsupported one, or not to be given by name.
    """
    name = name or str(getattr(function, "__name__", ""))
    if not _NAME.fullmatch(name):
        raise Unsupported(f"tool name {name!r} is no name of at most 64 ASCII letters, digits and underscores")
    description, described = read_docstring(inspect.getdoc(function) or "")
    if not description:
        raise Unsupported(f"{name} has no docstring; say in one what it does: the model reads it")
    hints = _hints(function, name)
    parameters, image_parameter, image_required = [], None, False
    for parameter in list(inspect.signature(function).parameters.values())[int(skip_first) :]:
        where = f"parameter {parameter.name!r} of {name}"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise Unsupported(f"{where} cannot be given by name; use plain parameters")
        if parameter.name not in hints:
            raise Unsupported(f"{where} has no type; annotate it")
        annotation, required = hints[parameter.name], parameter.default is parameter.empty
        if annotation is Image or annotation == Image | None:
            if image_parameter is not None:
                raise Unsupported(f"{where} is a second image; a tool gets the current one only")
            image_parameter, image_required = parameter.name, annotation is Image
            continue
        schema = json_schema(annotation, where)
        if text := described.get(parameter.name):
            schema["description"] = text
        parameters.append(Parameter(name=parameter.name, annotation=annotation, required=required, schema=schema))
    return FunctionSchema(
        name=name,
        description=description,
        parameters=parameters,
        image_parameter=image_parameter,
        image_required=image_required,
    )


def json_schema(annotation: Any, where: str) -> dict[str, object]:
    """JSON schema of a type.

    Raises:
        Unsupported: the type is not in the module docstring's list; the message begins with ``where``.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _PLAIN:
        return {"type": _PLAIN[annotation][0]}
    if (choices := _choices(annotation)) is not None:
        kinds = {type(choice) for choice in choices}
        if len(kinds) != 1 or (kind := kinds.pop()) not in _PLAIN:
            raise Unsupported(f"{where}: the values of {annotation} must be texts, or numbers of one type")
        return {"type": _PLAIN[kind][0], "enum": list(choices)}
    if (origin is list and arguments) or (origin is tuple and arguments[-1:] == (Ellipsis,)):
        return {"type": "array", "items": json_schema(arguments[0], where)}
    if origin is tuple and arguments:
        items = [json_schema(argument, where) for argument in arguments]
        alike = all(item == items[0] for item in items)
        each: dict[str, object] = {"items": items[0]} if alike else {"prefixItems": items}
        return {"type": "array", **each, "minItems": len(items), "maxItems": len(items)}
    if origin in _UNIONS:
        members = [json_schema(argument, where) for argument in arguments if argument is not types.NoneType]
        schema: dict[str, object] = members[0] if len(members) == 1 else {"anyOf": members}
        return {**schema, "nullable": True} if types.NoneType in arguments else schema
    raise Unsupported(
        f"{where}: type {annotation} is not supported; use bool, int, float, str, Literal, an Enum, list[..], tuple[..]"
        " or a union of these, or one PIL.Image.Image"
    )


def convert(annotation: Any, value: object, where: str) -> object:
    """``value``, read from JSON, as ``annotation`` wants it: an array becomes a tuple, a value its enum's member.

    Raises:
        ArgumentRejected: ``value`` is of another type; the message names ``where``, what is expected and what came.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is float and type(value) is int:
        return float(value)
    if annotation in _PLAIN and type(value) is annotation:
        return value
    for choice in _choices(annotation) or ():
        if type(value) is type(choice) and value == choice:
            return value if origin is Literal else annotation(value)
    if origin in (list, tuple) and isinstance(value, list):
        open_ended = origin is list or arguments[-1] is Ellipsis
        item_types = [arguments[0]] * len(value) if open_ended else arguments
        if len(item_types) == len(value):
            items = zip(item_types, value, strict=True)
            return origin(convert(each, item, f"{where}[{number}]") for number, (each, item) in enumerate(items))
    if origin in _UNIONS:
        if value is None and types.NoneType in arguments:
            return None
        kinds = [each for each in arguments if each is not types.NoneType]
        if len(kinds) == 1:
            return convert(kinds[0], value, where)  # its error says which item is wrong
        for kind in kinds:
            try:
                return convert(kind, value, where)
            except ArgumentRejected:
                continue  # the next kind may take it
    raise ArgumentRejected(f"{where} must be {expected(annotation)}, got {_shape(value)}")


def expected(annotation: Any) -> str:
    """What a model should write for a type, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _PLAIN:
        return _PLAIN[annotation][1]
    if annotation is types.NoneType:
        return "null"
    if (choices := _choices(annotation)) is not None:
        return f"one of {', '.join(map(repr, choices))}"
    if origin is list or Ellipsis in arguments:
        return f"a list, each {expected(arguments[0])}"
    if origin is tuple:
        items = [expected(argument) for argument in arguments]
        return f"a list of {len(items)}: {', '.join(items)}"
    return " or ".join(expected(argument) for argument in arguments)


def _hints(function: Callable[..., object], name: str) -> dict[str, Any]:
    try:
        return get_type_hints(function)
    except (NameError, AttributeError, TypeError, SyntaxError) as error:
        raise Unsupported(f"the types of {name} cannot be read ({error}); import what they name at run time") from error


def _choices(annotation: Any) -> Sequence[object] | None:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return [member.value for member in annotation]
    return None


def _shape(value: object) -> str:
    """What ``value`` is, in a few words; of what may be long, no more than the beginning."""
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    return json.dumps(value)
