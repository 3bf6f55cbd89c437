"""Running the model's code as a script would run. Standard library only: this happens in the confined child."""

from __future__ import annotations

import os
import sys
import traceback
import types
from typing import NoReturn

REPORT_BYTES = 4096


def execute(code: str, report_fd: int) -> NoReturn:
    """Run ``code`` as ``__main__`` and leave with a script's exit status; one line about an error to ``report_fd``."""
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.argv = ["code.py"]
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    # Line by line, so that what was printed before the deadline is seen.
    out = open(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    err = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stdout, sys.stderr = out, err
    status = 0
    try:
        exec(compile(code, "<code>", "exec", dont_inherit=True), main.__dict__)
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if not isinstance(leaving.code, int | None):
            report(report_fd, "", str(leaving.code))
    except BaseException as error:
        status = 1
        report(report_fd, "", traceback.format_exception_only(error)[-1])
        if not err.closed:
            inner = error.__traceback__ and error.__traceback__.tb_next  # without this function's own frame
            traceback.print_exception(error.with_traceback(inner), file=err)
    if not out.closed:
        out.flush()
    os._exit(status & 0xFF)


def report(fd: int, mark: str, line: str) -> None:
    """Write ``mark`` and ``line``, made one line of bounded length."""
    os.write(fd, (mark + " ".join(line.split())).encode(errors="backslashreplace")[: REPORT_BYTES - 1])
