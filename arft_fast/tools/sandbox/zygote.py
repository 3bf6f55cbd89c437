"""A warm Python that forks once per call. Run as ``python -I zygote.py SETTINGS``, never imported by the trainer.

Started in a fresh process (a fork of the trainer would hand the trainer's memory to the model), single-threaded,
numpy and Pillow loaded. Frames (``frame.py``) arrive on stdin and leave on stdout:

    ->  hello    {"layers": [...]}                                    once; {"fault": reason} when it cannot start
    <-  call     {"code", "names", "collect"} + one blob per name
    ->  reply    {"error", "timed_out", "seconds", "names"} + stdout, stderr, one blob per name; or {"fault": reason}

Pipe closed: the trainer is gone, so is the zygote. An exception here ends it; the pool starts another.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import resource
import select
import signal
import sys
import sysconfig
import time
import traceback
import types
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from arft_fast.tools.sandbox import confine, frame, landlock, output
else:  # -I leaves this folder out of the path, and the package around it would load what is not needed here
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import confine
    import frame
    import landlock
    import output

    del sys.path[0]

PRELOAD = (
    "numpy",
    "PIL.Image",
    "PIL.ImageDraw",
    "PIL.ImageEnhance",
    "PIL.ImageFilter",
    "PIL.ImageFont",
    "PIL.ImageOps",
)
REPORT_BYTES = 4096


class Zygote:
    """Settings, layers and the loop."""

    def __init__(self, settings: Mapping[str, Any], requests: int) -> None:
        self.root: str = settings["root"]
        self.timeout_s: float = settings["timeout_s"]
        self.output_bytes: int = settings["output_bytes"]
        self.requests = requests
        # The CPU limit is the deadline's second line, one second behind it.
        self.limits = confine.Limits(cpu_s=math.ceil(self.timeout_s) + 1, memory_bytes=settings["memory_mib"] << 20)
        names: tuple[str, ...] = ()
        if "namespaces" in settings["try"]:
            for flags in confine.NAMESPACE_SETS:
                if confine.namespaces_allowed(flags, self.root):
                    names = confine.enter_namespaces(flags, self.root)
                    break
        self.has_pid_namespace = "pid-namespace" in names
        self.landlock_abi = landlock.abi() if "landlock" in settings["try"] else 0
        self.layers = (*confine.REQUIRED_LAYERS, *names, *landlock.layers(self.landlock_abi))
        if not self.has_pid_namespace:
            confine.die_with_parent()
            confine.adopt_orphans()
        for name in PRELOAD:
            importlib.import_module(name)
        sys.modules["PIL.Image"].init()  # every codec
        self.readable = _readable_paths()
        gc.collect()
        gc.freeze()  # children do not copy pages by counting references of what lives here

    def serve(self, replies: int) -> None:
        frame.write(replies, frame.encode({"layers": self.layers}))
        number = 0
        while (request := frame.read(self.requests)) is not None:
            number += 1  # a fresh name each time: a path that code wrote down leads nowhere later
            frame.write(replies, self.call(*request, directory=os.path.join(self.root, f"call-{number}")))

    def call(self, header: Mapping[str, Any], blobs: Sequence[bytes], directory: str) -> bytes:
        os.mkdir(directory, 0o700)
        for name, blob in zip(header["names"], blobs, strict=True):
            with open(os.path.join(directory, name), "xb") as file:
                file.write(blob)
        with ExitStack() as stack:
            home = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, home)
            captures = [
                output.Capture(self.output_bytes),
                output.Capture(self.output_bytes, keep="tail"),
                output.Capture(REPORT_BYTES),
            ]
            for capture in captures:
                stack.callback(capture.close)
            started = time.monotonic()
            with confine.next_child_is_init() if self.has_pid_namespace else nullcontext():
                pid = os.fork()
                if pid == 0:
                    self._child(header["code"], directory, [capture.write_fd for capture in captures])
            for capture in captures:
                capture.close_write()
            try:
                timed_out = self._watch(pid, captures, deadline=started + self.timeout_s)
            finally:
                status = self._end(pid)
            seconds = time.monotonic() - started
            for capture in captures:
                capture.pump()
            stdout, stderr, report = (bytes(capture.kept) for capture in captures)
            files, refused = ({}, "") if timed_out else output.collect(home, header["collect"])
        confine.clear_directory(directory)
        os.rmdir(directory)
        if not report.startswith(b"+") and not timed_out:
            return frame.encode({"fault": f"the child was not confined: {report.decode(errors='replace') or status}"})
        error = _verdict(status, timed_out, report[1:].decode(errors="replace"), self.timeout_s) or refused or None
        reply = {"error": error, "timed_out": timed_out, "seconds": seconds, "names": list(files)}
        return frame.encode(reply, [stdout, stderr, *files.values()])

    def _watch(self, pid: int, captures: Sequence[output.Capture], deadline: float) -> bool:
        """Drain the pipes until the child ends (False) or its time is up (True)."""
        by_fd = {capture.read_fd: capture for capture in captures}
        child = os.pidfd_open(pid)
        try:
            poller = select.poll()
            for fd in (child, *by_fd):
                poller.register(fd, select.POLLIN)
            poller.register(self.requests, 0)  # hang-up only: the trainer is gone
            while (left_s := deadline - time.monotonic()) > 0:
                for fd, _ in poller.poll(math.ceil(left_s * 1000)):
                    if fd == child:
                        return False
                    if fd == self.requests:
                        raise EOFError("the trainer is gone")
                    if by_fd[fd].pump():
                        poller.unregister(fd)
            return True
        finally:
            os.close(child)

    def _end(self, pid: int) -> int:
        """Kill the child and whatever it started; returns the child's exit code (negative: signal)."""
        for kill in (os.killpg, os.kill):
            with suppress(ProcessLookupError):  # the group exists once the child has called setsid
                kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if not self.has_pid_namespace:  # with one, waitpid has waited for everything in it
            until = time.monotonic() + 2.0
            while children := _children():
                if time.monotonic() > until:
                    raise RuntimeError(f"{len(children)} processes of a call keep multiplying")
                for child in children:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
        return status

    def _child(self, code: str, directory: str, fds: Sequence[int]) -> NoReturn:
        report = 3
        try:
            os.setsid()
            spare = [os.dup(fd) for fd in fds]  # all above 3, whatever the numbers were
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for target, fd in enumerate(spare, start=1):
                os.dup2(fd, target)
            os.closerange(report + 1, os.sysconf("SC_OPEN_MAX"))
            confine.confine(self.limits, directory)
            if self.landlock_abi:
                landlock.restrict(self.landlock_abi, read=self.readable, write=[directory, os.devnull])
            os.write(report, b"+")
        except BaseException as error:  # not confined, so the code does not run
            os.write(report, f"-{error!r}".encode()[:REPORT_BYTES])
            os._exit(1)
        try:
            _execute(code, report)
        finally:  # MemoryError while reporting a MemoryError, a closed stdout: never back into the zygote's loop
            os._exit(1)


def _execute(code: str, report: int) -> NoReturn:
    """Run ``code`` as a script would run, and leave with a script's exit status."""
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
            _report(report, str(leaving.code))
    except BaseException as error:
        status = 1
        _report(report, traceback.format_exception_only(error)[-1])
        if not err.closed:
            inner = error.__traceback__ and error.__traceback__.tb_next  # without this function's own frame
            traceback.print_exception(error.with_traceback(inner), file=err)
    if not out.closed:
        out.flush()
    os._exit(status & 0xFF)


def _report(fd: int, line: str) -> None:
    os.write(fd, " ".join(line.split()).encode(errors="backslashreplace")[: REPORT_BYTES - 1])


def _verdict(status: int, timed_out: bool, report: str, timeout_s: float) -> str | None:
    if timed_out:
        return f"timed out after {timeout_s:g} s"
    if status < 0:
        name = next((known.name for known in signal.Signals if known == -status), f"signal {-status}")
        return f"killed by {name}"
    return (report or f"exited with status {status}") if status else None


def _readable_paths() -> list[str]:
    """Python, its packages, shared libraries and fonts: what a lazy import or a font needs."""
    paths = {sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    paths |= {os.path.dirname(os.path.dirname(str(sys.modules[name].__file__))) for name in ("numpy", "PIL.Image")}
    paths |= {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/fonts", "/usr/share/zoneinfo"}
    paths |= {"/etc/ld.so.cache", "/dev/zero", "/dev/random", "/dev/urandom"}
    return sorted(path for path in paths if os.path.exists(path))


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


def main() -> None:
    # The pipes move away from 0 and 1, so that nothing printed by accident lands between frames.
    requests, replies = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # when memory runs out, the kernel ends a sandbox before the trainer
        zygote = Zygote(json.loads(sys.argv[1]), requests)
    except Exception as error:
        frame.write(replies, frame.encode({"fault": f"{type(error).__name__}: {error}"}))
        raise
    try:
        zygote.serve(replies)
    finally:
        confine.clear_directory(zygote.root)


if __name__ == "__main__":
    main()
