"""A warm Python that is forked once per call. ``main`` runs in a process of its own, never in the trainer's.

Started fresh (a fork of the trainer would hand the trainer's memory to the model), single-threaded, numpy, Pillow and,
where installed, OpenCV loaded. Frames (``frame.py``) arrive on stdin and leave on stdout:

    ->  hello    {"layers": [...]}                                    once; {"fault": reason} when it cannot start
    <-  call     {"code", "names", "collect"} + one blob per name
    ->  reply    {"error", "timed_out", "seconds", "names"} + stdout, stderr, one blob per name; or {"fault": reason}

It is no child of the trainer's: whoever ends all of the trainer's children (an engine that shuts down) spares it. Pipe
closed: the trainer is gone, so is the zygote. An exception here ends it; the pool starts another.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import math
import os
import resource
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from arft_fast.tools.sandbox import call, frame, landlock, layers, namespaces, output, seccomp
from arft_fast.tools.sandbox.confine import Limits, Plan

PRELOAD = (
    "numpy",
    "PIL.Image",
    "PIL.ImageDraw",
    "PIL.ImageEnhance",
    "PIL.ImageFilter",
    "PIL.ImageFont",
    "PIL.ImageOps",
)
_HUNG_UP = 2
"""Exit status of a supervisor that found the trainer gone."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """As the pool sends them; ``use``: of ``namespaces``, ``landlock`` and ``seccomp`` those to be tried."""

    root: str
    timeout_s: float
    memory_mib: int
    output_bytes: int
    use: list[str]


@dataclass(frozen=True, kw_only=True)
class Zygote:
    """A process that is ready to be forked."""

    settings: Settings
    layers: tuple[str, ...]
    plan: Plan
    requests: int

    @property
    def pid_namespace(self) -> bool:
        return "pid-namespace" in self.layers

    def serve(self, replies: int) -> None:
        """Say hello, then fork a supervisor for every call, ahead of it, until the trainer hangs up."""
        frame.write(replies, frame.encode({"layers": self.layers}))
        for number in itertools.count(1):
            pid = os.fork()
            if pid == 0:
                self._supervise(f"call-{number}", replies)  # a fresh name: a path written down leads nowhere later
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if status == _HUNG_UP:
                return
            if status:
                if not self.pid_namespace:
                    call.end_children()
                raise RuntimeError(f"the supervisor of a call ended with {status}")

    def _supervise(self, name: str, replies: int) -> NoReturn:
        status = 1
        try:
            namespaces.die_with_parent()
            task = call.Call(
                plan=self.plan,
                requests=self.requests,
                directory=os.path.join(self.settings.root, name),
                timeout_s=self.settings.timeout_s,
                output_bytes=self.settings.output_bytes,
                pid_namespace=self.pid_namespace,
            )
            frame.write(replies, call.answer(task))
            status = 0
        except (EOFError, BrokenPipeError):
            status = _HUNG_UP  # everything is cleaned up
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)


def prepare(settings: Settings, requests: int) -> Zygote:
    """Enter namespaces, load libraries, decide what calls will give up; returns in the namespaces' first process."""
    names: tuple[str, ...] = ()
    bounded = os.getuid() != 0  # by RLIMIT_NPROC
    if "namespaces" in settings.use:
        flags = next((flags for flags in namespaces.SETS if namespaces.allowed(flags, settings.root)), 0)
        names = namespaces.enter(flags, settings.root) if flags else ()
    if "pid-namespace" not in names:
        namespaces.adopt_orphans()
    bounded |= "process-count" in names
    filtered = "seccomp" in settings.use and seccomp.supported()
    abi = landlock.abi() if "landlock" in settings.use else 0
    _preload()
    plan = Plan(
        # The CPU limit is the deadline's second line, one second behind it.
        limits=Limits(
            cpu_s=math.ceil(settings.timeout_s) + 1,
            memory_bytes=_address_space_bytes() + (settings.memory_mib << 20),
        ),
        landlock_abi=abi,
        readable=_readable_paths(),
        seccomp=filtered,
        threads=bounded,
    )
    won = (*layers.BASE, *names, *landlock.layers(abi))
    won += ("seccomp",) if filtered else ()
    won += ("process-count",) if (bounded or filtered) and "process-count" not in won else ()
    return Zygote(settings=settings, layers=won, plan=plan, requests=requests)


def _preload() -> None:
    for name in PRELOAD:
        importlib.import_module(name)
    sys.modules["PIL.Image"].init()  # every codec
    with suppress(ImportError):  # optional, and some builds of it need libraries that a server lacks
        cv2 = importlib.import_module("cv2")
        cv2.setNumThreads(1)  # a pool of threads would not survive the fork
        cv2.ocl.setUseOpenCL(False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "arft_fast"]:
        del sys.modules[name]  # the stubs of ``main``'s caller, not what code would mean by these names
    gc.collect()
    gc.freeze()  # children do not copy pages by counting references of what lives here


def _address_space_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _readable_paths() -> list[str]:
    """Python, its packages, shared libraries and fonts: what a lazy import or a font needs."""
    paths = {sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    paths |= set(_folders_of_packages(("numpy", "PIL", "cv2")))
    paths |= {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/fonts", "/usr/share/zoneinfo"}
    paths |= {"/etc/ld.so.cache", "/dev/zero", "/dev/random", "/dev/urandom"}
    return sorted(path for path in paths if os.path.exists(path))


def _folders_of_packages(names: Iterable[str]) -> Iterable[str]:
    for name in names:
        if name in sys.modules:
            yield os.path.dirname(os.path.dirname(str(sys.modules[name].__file__)))


def main(arguments: Mapping[str, Any]) -> None:
    """Serve until stdin closes. ``arguments``: the fields of ``Settings``."""
    if os.fork():
        os._exit(0)  # what goes on is an orphan, and so no child of the trainer's
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
        zygote = prepare(Settings(**arguments), requests)
    except Exception as error:
        frame.write(replies, frame.encode({"fault": f"{type(error).__name__}: {error}"}))
        raise
    try:
        zygote.serve(replies)
    finally:
        output.clear_directory(zygote.settings.root)


def run(text: str) -> None:
    """``main`` with arguments as JSON, as they stand on a command line."""
    main(json.loads(text))
