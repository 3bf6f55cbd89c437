"""``python -m arft_fast.tools doctor``: see ``doctor``."""

from __future__ import annotations

import sys

from arft_fast.tools import doctor

_USAGE = "usage: python -m arft_fast.tools doctor [--json]"


def main(arguments: list[str]) -> int:
    """Run the command that ``arguments`` begin with; returns the exit status, 2 for one that is unknown."""
    if arguments[:1] == ["doctor"]:
        return doctor.main(arguments[1:])
    print(_USAGE, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
