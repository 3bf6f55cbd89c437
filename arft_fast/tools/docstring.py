"""Reads what a docstring says of a function and of its parameters, in Google's and in reST's form."""

from __future__ import annotations

import re

_SECTION = re.compile(r"([A-Z][a-z]+):")
_GOOGLE_ENTRY = re.compile(r"(\w+)(?: ?\([^)]*\))?: ?(.*)")
_REST_FIELD = re.compile(r":(\w+)(?: ([^:]*))?: ?(.*)")
_GOOGLE_SECTIONS = ("Args", "Arguments", "Parameters")


def read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """The description, and what is said of each parameter, by name; each on one line.

    Google's form is a section ``Args:`` with entries ``name: text`` or ``name (type): text``, continued on deeper
    lines; reST's is ``:param name: text`` or ``:param type name: text``. The description ends where either begins.

    Args:
        text: without the indentation of the code around it, as ``inspect.getdoc`` gives it.
    """
    description: list[str] = []
    entries: dict[str, list[str]] = {}
    open_lines: list[str] | None = description
    section, entry_depth = "", 0
    for line in filter(str.strip, text.splitlines()):
        words = line.strip()
        depth = len(line) - len(line.lstrip())
        if depth == 0:  # what begins here ends what was before
            if heading := _SECTION.fullmatch(words):
                section, entry_depth, open_lines = heading[1], 0, None
            elif (field := _REST_FIELD.fullmatch(words)) is not None:
                section, open_lines = "field", None
                if field[1] == "param" and field[2]:
                    open_lines = entries.setdefault(field[2].split()[-1], [])
                    words = field[3]
            elif section:
                open_lines = None
        elif section in _GOOGLE_SECTIONS:
            entry_depth = entry_depth or depth
            if depth == entry_depth and (entry := _GOOGLE_ENTRY.fullmatch(words)):
                open_lines, words = entries.setdefault(entry[1], []), entry[2]
        if open_lines is not None:
            open_lines.append(words)
    return " ".join(description), {name: " ".join(filter(None, lines)) for name, lines in entries.items()}
