"""The trainer's side of the sandbox: a few warm zygotes, one fork a call, everything awaited.

A call forks a zygote (``zygote.py``: a fresh Python with numpy and Pillow loaded), the child gives up what it can
(``confine.py``, ``landlock.py``), runs the code as a script in an empty private directory, and is killed with all its
descendants when it ends or its time is up. ``Sandbox.layers`` names what is active on this kernel.

Covered, always (a child that cannot take one of these steps does not run the code):

- ``deadline``: wall time, enforced from outside with SIGKILL. ``process-group``: nothing outlives its call.
- ``rlimits``: CPU, address space, file size, open files, processes, no core dump. Output and files are bounded too.
- ``environment``: emptied; standard input is /dev/null; no descriptor of the trainer or the zygote is open.
- ``no-new-privs``, ``no-capabilities``: setuid programs gain nothing; root's child is root without powers.

Covered where the kernel and the container allow:

- ``user-``, ``pid-``, ``network-``, ``ipc-namespace``: no other process can be seen or signalled, no network, not even
  localhost. ``mount-namespace``: the directory is a 128 MiB memory file system, /run and /dev/shm are hidden.
  ``no-nested-namespace``: a new user namespace, the usual way to new powers, is refused. ``process-count``: a fork bomb
  stops at 364 processes even for root (Linux 6.14).
- ``landlock-files``: reads Python, its packages, shared libraries and fonts; writes its own directory; executes no
  program. ``landlock-tcp``, ``landlock-signals``: as they say, also without namespaces.

NOT covered:

- The kernel itself: no seccomp filter, so every system call is open to an exploit.
- Memory and CPU of a call as a whole: there is no cgroup. Each of its processes is limited, their sum is not, save by
  the process limits, and RLIMIT_NPROC does not bind root.
- Without ``landlock-files``, every file that the user can read can be read, and written where the user may write.
- Without ``pid-namespace`` and ``landlock-signals``, the code can signal the user's other processes.
- Without ``mount-namespace``, disk use is bounded per file only, and Unix sockets can be reached by path.
- Between calls: a child can read leftovers of earlier calls (code, images) in the memory of its zygote.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arft_fast.tools.sandbox import confine, frame
from arft_fast.tools.tool import InfraFault

_ZYGOTE = Path(__file__).with_name("zygote.py")
_FILE_NAME = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_START_S = 60.0
_GRACE_S = 10.0
"""How much later than the deadline a reply may be before the zygote itself is taken for dead."""


@dataclass(frozen=True, kw_only=True)
class SandboxResult:
    """What one call left behind. All of it is untrusted."""

    stdout: str
    """The first ``output_bytes`` bytes; undecodable bytes replaced."""
    stderr: str
    """The last ``output_bytes`` bytes; undecodable bytes replaced."""
    error: str | None
    """One line when the code failed: exception, exit status, signal, deadline, or an output file that was refused."""
    files: dict[str, bytes]
    """Those of ``collect`` that exist as regular files of at most 8 MiB. Empty after a time-out."""
    seconds: float
    """Wall time of the child, queueing not included."""
    timed_out: bool


class Sandbox:
    """``workers`` zygotes, each running one call at a time.

    Construct it anywhere; ``await start()`` before the first CUDA or engine work, or let the first ``run`` start it.
    From then on it belongs to the running event loop and its thread; the processes end with either, or with the
    trainer, however that ends. ``await close()`` leaves no process, descriptor or file; a trainer that is killed leaves
    a directory ``arft-sandbox-*`` among the temporary files.

    Args:
        workers: calls that run at the same time; more wait their turn.
        timeout_s: wall time of one call.
        memory_mib: address space of each process, interpreter and libraries (about 150 MiB) included.
        output_bytes: how much of stdout and of stderr is kept.
    """

    _try: tuple[str, ...] = (
        "namespaces",
        "landlock",
    )  # tests leave some out, to see what a kernel that refuses them gets

    def __init__(
        self, *, workers: int = 2, timeout_s: float = 5.0, memory_mib: int = 1024, output_bytes: int = 65536
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        if memory_mib < 256:
            raise ValueError(f"memory_mib must be at least 256 (numpy and Pillow live in it), got {memory_mib}")
        if output_bytes < 1:
            raise ValueError(f"output_bytes must be positive, got {output_bytes}")
        self._workers = workers
        self._timeout_s = timeout_s
        self._settings = {
            "timeout_s": timeout_s,
            "memory_mib": memory_mib,
            "output_bytes": output_bytes,
            "try": self._try,
        }
        self._loop: asyncio.AbstractEventLoop | None = None
        self._root: tempfile.TemporaryDirectory[str] | None = None
        self._slots: asyncio.Queue[_Zygote | None] = asyncio.Queue()  # None: a zygote is to be started here
        self._zygotes: set[_Zygote] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._layers: tuple[str, ...] = ()
        self._closing = asyncio.Lock()
        self._closed = False

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the active confinement layers (module docstring); empty before ``start``."""
        return self._layers

    async def start(self) -> None:
        """Start the zygotes; nothing to do once they run.

        Raises:
            InfraFault: a zygote did not come up (not Linux, numpy or Pillow missing, ...), or the sandbox is closed.
            RuntimeError: the sandbox was started in another event loop.
        """

        async def warm() -> None:
            async with self._turn():
                pass

        if not self._layers:
            outcomes = await asyncio.gather(*[warm() for _ in range(self._workers)], return_exceptions=True)
            for fault in filter(None, outcomes):
                raise fault

    async def run(self, code: str, files: Mapping[str, bytes], collect: Sequence[str]) -> SandboxResult:
        """Run ``code`` in a fresh directory that holds ``files``; hand back the files named in ``collect``.

        Cancelling the call kills its process.

        Raises:
            ValueError: a file name is not a plain name (letters, digits, ``_ . -``).
            InfraFault: the sandbox itself failed (a zygote died, the sandbox was closed); the next call gets a new one.
            RuntimeError: the sandbox was started in another event loop.
        """
        for name in (*files, *collect):
            if not _FILE_NAME.fullmatch(name):
                raise ValueError(f"files and collect take plain file names without folders, got {name!r}")
        call = frame.encode({"code": code, "names": list(files), "collect": list(collect)}, list(files.values()))
        async with self._turn() as zygote:
            header, (stdout, stderr, *blobs) = await zygote.ask(call, self._timeout_s + _GRACE_S)
        return SandboxResult(
            stdout=stdout.decode(errors="replace"),
            stderr=stderr.decode(errors="replace"),
            error=header["error"],
            files=dict(zip(header["names"], blobs, strict=True)),
            seconds=header["seconds"],
            timed_out=header["timed_out"],
        )

    async def close(self) -> None:
        """End all processes, remove the directory. Calls in flight and later ones raise ``InfraFault``. Idempotent."""
        async with self._closing:
            if self._closed or self._root is None:
                self._closed = True
                return
            self._bind()
            self._closed = True
            idle = []
            while not self._slots.empty():
                idle.append(self._slots.get_nowait())
            for zygote in self._zygotes.difference(idle):
                zygote.kill()  # its call raises InfraFault and gives the slot back
            while len(idle) < self._workers:
                idle.append(await self._slots.get())
            await asyncio.gather(*[zygote.end() for zygote in self._zygotes], *self._ending)
            self._zygotes.clear()
            await asyncio.to_thread(_remove, self._root)
            for _ in range(self._workers):
                self._slots.put_nowait(None)  # whoever waits for a turn, now or later, learns that there is none

    def _bind(self) -> None:
        """The first use decides on the event loop."""
        if self._loop is None:
            if sys.platform != "linux":
                raise InfraFault(f"the sandbox needs Linux, this is {sys.platform}; use a task without code")
            self._loop = asyncio.get_running_loop()
            self._root = tempfile.TemporaryDirectory(prefix="arft-sandbox-")
            for _ in range(self._workers):
                self._slots.put_nowait(None)
        elif self._loop is not asyncio.get_running_loop():
            raise RuntimeError("this Sandbox was started in another event loop; make one Sandbox per loop")

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[_Zygote]:
        """A zygote for one call, started if there is none, thrown away if the call does not end well."""
        if self._closed:
            raise InfraFault("the sandbox is closed")
        self._bind()
        zygote = await self._slots.get()
        try:
            if zygote is not None and zygote.is_dead:
                self._discard(zygote)
                zygote = None
            if zygote is None and not self._closed:
                zygote = await self._spawn()
            if zygote is None or self._closed:
                raise InfraFault("the sandbox is closed")
            yield zygote
        except BaseException:  # cancelled or broken in mid-frame: the pipes of this zygote are of no more use
            if zygote is not None:
                self._discard(zygote)
                zygote = None
            raise
        finally:
            self._slots.put_nowait(zygote)

    async def _spawn(self) -> _Zygote:
        assert self._root is not None, "start comes first"
        root = tempfile.mkdtemp(dir=self._root.name)
        environment = {"LANG": "C.UTF-8", **confine.ONE_THREAD}
        if "LD_LIBRARY_PATH" in os.environ:  # some Pythons do not start without it
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", str(_ZYGOTE), json.dumps({**self._settings, "root": root})),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=environment,
                cwd="/",
                start_new_session=True,  # Ctrl-C in a terminal goes to the trainer, which closes the sandbox in order
            )
        except OSError as error:
            raise InfraFault(f"the sandbox could not start {sys.executable}: {error}") from error
        zygote = _Zygote(process)
        self._zygotes.add(zygote)
        try:
            hello, _ = await zygote.ask(b"", _START_S)
        except BaseException:
            self._discard(zygote)
            raise
        self._layers = tuple(hello["layers"])
        return zygote

    def _discard(self, zygote: _Zygote) -> None:
        zygote.kill()
        self._zygotes.discard(zygote)
        task = asyncio.get_running_loop().create_task(zygote.end())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


class _Zygote:
    """One zygote process and its two pipes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def is_dead(self) -> bool:
        return self._process.returncode is not None

    async def ask(self, data: bytes, timeout_s: float) -> tuple[dict[str, Any], list[bytes]]:
        """Send a frame (none if empty) and read the answer. Raises ``InfraFault`` when none comes in time."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None, "opened with PIPE"
        try:
            async with asyncio.timeout(timeout_s):
                stdin.write(data)
                await stdin.drain()
                (length,) = frame.LENGTH.unpack(await stdout.readexactly(frame.LENGTH.size))
                header: dict[str, Any] = json.loads(await stdout.readexactly(length))
                blobs = [await stdout.readexactly(size) for size in header["sizes"]]
        except TimeoutError as error:
            raise InfraFault(f"a sandbox process gave no answer within {timeout_s:g} s") from error
        except (OSError, asyncio.IncompleteReadError) as error:
            raise InfraFault("a sandbox process died") from error
        if "fault" in header:
            raise InfraFault(f"sandbox: {header['fault']}")
        return header, blobs

    def kill(self) -> None:
        if not self.is_dead:
            with suppress(ProcessLookupError):  # gone in this moment
                # Not Process.kill, which may reap the child before asyncio's watcher does, and so lose its status.
                os.kill(self._process.pid, signal.SIGKILL)

    async def end(self) -> None:
        """Close the pipes, which ends a zygote in good health; kill it otherwise; wait until it is gone."""
        try:
            async with asyncio.timeout(2.0):
                await self._process.communicate(b"")
        except TimeoutError:
            self.kill()
            await self._process.communicate(b"")


def _remove(root: tempfile.TemporaryDirectory[str]) -> None:
    confine.clear_directory(root.name)  # a zygote that was killed may have left a tree that rmtree cannot take
    root.cleanup()
