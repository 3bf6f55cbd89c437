"""The trainer's side of the sandbox: a few warm zygotes, one confined process a call, everything awaited.

A zygote (``zygote.py``: a fresh Python with numpy, Pillow and OpenCV loaded) keeps a fork ready, the supervisor of the
next call (``call.py``). That one reads the call and forks the child, which gives up what it can (``confine.py``), runs
the code as a script in an empty private directory, and is killed when it ends or its time is up.

Modes (``layers.py``): ``strict``, the default, does not start where a layer of ``layers.STRICT`` is missing;
``best_effort`` takes what there is, and ``Sandbox.missing`` says what it lacks; ``off`` gives the first list below and
nothing more, and says so among the layers. No mode changes into another by itself.

Covered, always (a child that cannot take one of these steps does not run the code):

- ``deadline``: wall time, enforced from outside with SIGKILL. ``process-group``: nothing outlives its call.
- ``rlimits``: CPU, address space, file size, open files, processes, no core dump. Output and files are bounded too.
- ``environment``: emptied; standard input is /dev/null; no descriptor of the trainer or the zygote is open.
- ``no-new-privs``, ``no-capabilities``: setuid programs gain nothing; root's child is root without powers.
- Earlier calls: their code, images and output were never in the zygote's memory, only in their supervisors'.

Covered by ``strict``, and by ``best_effort`` where the kernel and the container allow:

- ``seccomp``: the system calls that image code never needs are refused (list and policy: ``seccomp.py``): among them
  every socket, every new process and program, signals to others, ``ptrace``, ``bpf``, ``io_uring``, ``userfaultfd``.
- ``process-count``: with seccomp the code is one process, so its address space bounds the memory of the whole call; its
  threads are bounded by the namespace's pid_max (364, Linux 6.14) or, for users other than root, by RLIMIT_NPROC (32),
  and refused where neither works. Without seccomp the same two bound processes.
- ``landlock-files``: reads Python, its packages, shared libraries and fonts; writes its own directory; executes no
  program. ``landlock-tcp``, ``landlock-signals``: as they say, also without namespaces.
- ``user-``, ``pid-``, ``network-``, ``ipc-namespace``: no other process can be seen or signalled, no network, not even
  localhost. ``mount-namespace``: the directory is a 128 MiB memory file system, /run and /dev/shm are hidden.
  ``read-only-files``: everything else is read-only, file modes and times too, which Landlock does not guard.
  ``no-nested-namespace``: a new user namespace is refused a second time.

NOT covered, even by ``strict``:

- Holes of the kernel in system calls that stay allowed: the kernel is shared. A virtual machine would be the answer.
- Which paths exist, with their sizes and times: ``stat`` works outside too (contents and folder listings do not).
- Timing and load: code sees clocks, /dev/urandom and how busy the machine is, and may use one core until its deadline.
- What the code says: text and image are untrusted input for whoever reads them.

NOT covered without the layer:

- ``landlock-files``: every file that the user can read can be read, and written where the user may write.
- ``seccomp``: the kernel's whole surface is open; the memory of a call is bounded per process only; without
  ``landlock-signals`` and ``pid-namespace`` the user's other processes can be signalled.
- ``mount-namespace``: disk use is bounded per file only. ``read-only-files``: modes and times of the user's own files.
"""

from __future__ import annotations

import asyncio
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from arft_fast.tools.sandbox import frame, layers, output
from arft_fast.tools.sandbox.handle import Handle, spawn
from arft_fast.tools.sandbox.layers import Mode
from arft_fast.tools.tool import InfraFault

_FILE_NAME = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_GRACE_S = 10.0
"""How much later than the deadline a reply may be before the zygote itself is taken for dead."""
_HANG_UP_S = 2.0
"""How long ``close`` waits for calls in flight to end in order."""


class SandboxRefused(InfraFault):
    """The machine cannot give what mode strict demands; the message names the remedies."""

    permanent = True


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
        memory_mib: address space that the code may take, interpreter and preloaded libraries not included.
        output_bytes: how much of stdout and of stderr is kept.
        mode: ``strict``, ``best_effort`` or ``off`` (module docstring).
    """

    _use: tuple[str, ...] = ("namespaces", "landlock", "seccomp")
    """Tests leave some out, to see what a kernel that refuses them gets."""

    def __init__(
        self,
        *,
        workers: int = 2,
        timeout_s: float = 5.0,
        memory_mib: int = 1024,
        output_bytes: int = 65536,
        mode: Mode = "strict",
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        if memory_mib < 256:
            raise ValueError(f"memory_mib must be at least 256 (an image and its copies live in it), got {memory_mib}")
        if output_bytes < 1:
            raise ValueError(f"output_bytes must be positive, got {output_bytes}")
        if mode not in layers.MODES:
            raise ValueError(f"mode must be one of {', '.join(layers.MODES)}, got {mode!r}")
        self._workers = workers
        self._timeout_s = timeout_s
        self._mode = mode
        self._settings = {
            "timeout_s": timeout_s,
            "memory_mib": memory_mib,
            "output_bytes": output_bytes,
            "use": () if mode == "off" else self._use,
        }
        self._loop: asyncio.AbstractEventLoop | None = None
        self._root: tempfile.TemporaryDirectory[str] | None = None
        self._slots: asyncio.Queue[Handle | None] = asyncio.Queue()  # None: a zygote is to be started here
        self._zygotes: set[Handle] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._layers: tuple[str, ...] = ()
        self._closing = asyncio.Lock()
        self._closed = False

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the active layers (module docstring); empty before ``start``. Mode off begins with NOT-CONFINED."""
        return self._layers

    @property
    def missing(self) -> tuple[str, ...]:
        """Those of ``layers.STRICT`` that are not active; always empty in mode strict. Only known after ``start``."""
        return layers.missing(self._layers) if self._layers else ()

    @property
    def summary(self) -> str:
        """One line for a banner: the mode, what is active and what is not."""
        lacks = f"; WITHOUT {', '.join(self.missing)}" if self.missing else ""
        return f"{self._mode}: {', '.join(self._layers)}{lacks}"

    async def start(self) -> None:
        """Start the zygotes; nothing to do once they run.

        Raises:
            SandboxRefused: mode strict, and a layer is missing.
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
            await self._end_calls(idle)
            await asyncio.gather(*[zygote.end() for zygote in self._zygotes], *self._ending)
            self._zygotes.clear()
            await asyncio.to_thread(_remove, self._root)
            for _ in range(self._workers):
                self._slots.put_nowait(None)  # whoever waits for a turn, now or later, learns that there is none

    async def _end_calls(self, idle: list[Handle | None]) -> None:
        """Let the calls in flight raise ``InfraFault`` and give their slots back into ``idle``."""
        busy = self._zygotes.difference(idle)
        for zygote in busy:
            zygote.hang_up()
        try:
            async with asyncio.timeout(_HANG_UP_S):
                while len(idle) < self._workers:
                    idle.append(await self._slots.get())
        except TimeoutError:
            for zygote in busy:
                zygote.kill()
            while len(idle) < self._workers:
                idle.append(await self._slots.get())

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
    async def _turn(self) -> AsyncIterator[Handle]:
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

    async def _spawn(self) -> Handle:
        assert self._root is not None, "start comes first"
        zygote = await spawn({**self._settings, "root": tempfile.mkdtemp(dir=self._root.name)})
        self._zygotes.add(zygote)
        try:
            won = await zygote.hello()
            absent = layers.missing(won)
            if self._mode == "strict" and absent:
                raise SandboxRefused(layers.refusal(absent))
        except BaseException:
            self._discard(zygote)
            raise
        self._layers = (layers.NOT_CONFINED, *won) if self._mode == "off" else won
        return zygote

    def _discard(self, zygote: Handle) -> None:
        self._zygotes.discard(zygote)
        zygote.hang_up()
        task = asyncio.get_running_loop().create_task(zygote.end())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


def _remove(root: tempfile.TemporaryDirectory[str]) -> None:
    output.clear_directory(root.name)  # a zygote that was killed may have left a tree that rmtree cannot take
    root.cleanup()
