"""One call: a supervisor, forked from the zygote for this call only, and the child that runs the code.

The supervisor reads the request, collects the output and answers the trainer, so nothing of a call, neither its code
nor its images, is ever in the memory from which the next call is forked. Standard library only.
"""

from __future__ import annotations

import math
import os
import select
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from arft_fast.tools.sandbox import frame, namespaces, output
from arft_fast.tools.sandbox.confine import Plan, confine
from arft_fast.tools.sandbox.script import REPORT_BYTES, execute, report

_REPORT = 3


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a supervisor needs to know. ``requests``: the pipe whose hang-up means that the trainer is gone."""

    plan: Plan
    requests: int
    directory: str
    timeout_s: float
    output_bytes: int
    pid_namespace: bool


def answer(call: Call) -> bytes:
    """Wait for a request, carry it out in a fresh ``call.directory``; returns the reply's frame.

    Raises:
        EOFError: the trainer hung up; nothing of the call is left.
        OSError: something that must not fail did; the child, if any, is gone.
    """
    request = frame.read(call.requests)
    if request is None:
        raise EOFError("the trainer is gone")
    header, blobs = request
    os.mkdir(call.directory, 0o700)
    for name, blob in zip(header["names"], blobs, strict=True):
        with open(os.path.join(call.directory, name), "xb") as file:
            file.write(blob)
    try:
        return _run(call, header)
    finally:
        output.clear_directory(call.directory)
        os.rmdir(call.directory)


def _run(call: Call, header: Mapping[str, Any]) -> bytes:
    with ExitStack() as stack:
        home = os.open(call.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, home)
        captures = [
            output.Capture(call.output_bytes),
            output.Capture(call.output_bytes, keep="tail"),
            output.Capture(REPORT_BYTES),
        ]
        for capture in captures:
            stack.callback(capture.close)
        if call.pid_namespace:
            namespaces.enter_for_call()
        else:
            namespaces.adopt_orphans()
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _child(call, header["code"], [capture.write_fd for capture in captures])
        for capture in captures:
            capture.close_write()
        try:
            timed_out = _watch(call, pid, captures, deadline=started + call.timeout_s)
        finally:
            status = _end(pid)
            if not call.pid_namespace:  # with one, waitpid has waited for everything in it
                end_children()
        seconds = time.monotonic() - started
        for capture in captures:
            capture.pump()
        stdout, stderr, said = (bytes(capture.kept) for capture in captures)
        files, refused = ({}, "") if timed_out else output.collect(home, header["collect"])
    if not said.startswith(b"+") and not timed_out:
        return frame.encode({"fault": f"the child was not confined: {said.decode(errors='replace') or status}"})
    error = _verdict(status, timed_out, said[1:].decode(errors="replace"), call.timeout_s) or refused or None
    reply = {"error": error, "timed_out": timed_out, "seconds": seconds, "names": list(files)}
    return frame.encode(reply, [stdout, stderr, *files.values()])


def _child(call: Call, code: str, fds: Sequence[int]) -> NoReturn:
    try:
        os.setsid()
        spare = [os.dup(fd) for fd in fds]  # all above 3, whatever the numbers were
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for target, fd in enumerate(spare, start=1):
            os.dup2(fd, target)
        os.closerange(_REPORT + 1, os.sysconf("SC_OPEN_MAX"))
        confine(call.plan, call.directory)
        report(_REPORT, "+", "")
    except BaseException as error:  # not confined, so the code does not run
        report(_REPORT, "-", repr(error))
        os._exit(1)
    try:
        execute(code, _REPORT)
    finally:  # MemoryError while reporting a MemoryError, a closed stdout: never back into the supervisor
        os._exit(1)


def _watch(call: Call, pid: int, captures: Sequence[output.Capture], deadline: float) -> bool:
    """Drain the pipes until the child ends (False) or its time is up (True)."""
    by_fd = {capture.read_fd: capture for capture in captures}
    child = os.pidfd_open(pid)
    try:
        poller = select.poll()
        for fd in (child, *by_fd):
            poller.register(fd, select.POLLIN)
        poller.register(call.requests, 0)  # hang-up only
        while (left_s := deadline - time.monotonic()) > 0:
            for fd, _ in poller.poll(math.ceil(left_s * 1000)):
                if fd == child:
                    return False
                if fd == call.requests:
                    raise EOFError("the trainer is gone")
                if by_fd[fd].pump():
                    poller.unregister(fd)
        return True
    finally:
        os.close(child)


def _end(pid: int) -> int:
    """Kill the child and its group; returns the child's exit code (negative: signal)."""
    for kill in (os.killpg, os.kill):
        with suppress(ProcessLookupError):  # the group exists once the child has called setsid
            kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def end_children() -> None:
    """Kill and wait for all children of the caller, adopted ones included.

    Raises:
        RuntimeError: they multiply faster than they can be killed.
    """
    until = time.monotonic() + 2.0
    while _has_children():
        children = _children()
        if time.monotonic() > until:
            raise RuntimeError(f"{len(children)} processes of a call keep multiplying")
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _has_children() -> bool:
    """Certain, where the list in /proc may miss some while others end."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


def _verdict(status: int, timed_out: bool, said: str, timeout_s: float) -> str | None:
    if timed_out:
        return f"timed out after {timeout_s:g} s"
    if status < 0:
        name = next((known.name for known in signal.Signals if known == -status), f"signal {-status}")
        return f"killed by {name}"
    return (said or f"exited with status {status}") if status else None
