"""The arguments of a tool call, as a model writes them: one JSON object, read strictly.

What JSON leaves open, readers decide differently, so it is refused: a name given twice, ``NaN`` and ``Infinity``, a
number that no 64-bit reader can hold, half a surrogate pair.
"""

from __future__ import annotations

import json
from math import isfinite

MAX_ARGUMENT_CHARACTERS = 100_000
MAX_INTEGER = 2**63 - 1
"""Largest magnitude of an integer."""
_INTEGER_CHARACTERS = 20  # of "-9223372036854775807"; longer ones are refused unread, for reading them is slow


class ArgumentRejected(ValueError):
    """The model's argument is not what the tool takes. The message is one line and may be shown to the model."""


def read_object(text: str) -> dict[str, object]:
    """The JSON object that ``text`` is, and nothing beside it.

    Raises:
        ArgumentRejected: ``text`` is longer than ``MAX_ARGUMENT_CHARACTERS``, is no JSON, is no object, is nested too
            deeply, or holds something of the module docstring's list.
    """
    if len(text) > MAX_ARGUMENT_CHARACTERS:
        raise ArgumentRejected(f"the arguments have {len(text)} characters, more than {MAX_ARGUMENT_CHARACTERS}")
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_int=_integer, parse_float=_real, parse_constant=_constant
        )
        json.dumps(value, ensure_ascii=False).encode()
    except ArgumentRejected:
        raise
    except RecursionError as error:
        raise ArgumentRejected("the arguments are nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ArgumentRejected("the arguments hold half a surrogate pair") from error
    except json.JSONDecodeError as error:
        raise ArgumentRejected(f"the arguments are no JSON object: {error.msg} at character {error.pos}") from error
    if not isinstance(value, dict):
        raise ArgumentRejected('the arguments are no JSON object; write {"name": value, ...}')
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ArgumentRejected(f"{name!r:.60} is given twice")
        found[name] = value
    return found


def _integer(digits: str) -> int:
    if len(digits) > _INTEGER_CHARACTERS or abs(number := int(digits)) > MAX_INTEGER:
        raise ArgumentRejected(f"the number {digits[:_INTEGER_CHARACTERS]}.. is too large")
    return number


def _real(digits: str) -> float:
    if not isfinite(number := float(digits)):
        raise ArgumentRejected(f"the number {digits[:_INTEGER_CHARACTERS]} is too large")
    return number


def _constant(name: str) -> float:
    raise ArgumentRejected(f"{name} is no JSON number")
