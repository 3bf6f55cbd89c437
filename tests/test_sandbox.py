"""Each test attacks one property of the sandbox, most of them also as a kernel without namespaces and Landlock."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from arft_fast.tools.sandbox import Sandbox, SandboxRefused, SandboxResult, frame, layers, output, pool
from arft_fast.tools.tool import InfraFault

TIMEOUT_S = 4.0
HURRY_S = 0.3
LATE_S = 0.5
OUTPUT_BYTES = 4096


class BareSandbox(Sandbox):
    """What is left where the kernel refuses namespaces, Landlock and seccomp."""

    _use = ()

    def __init__(self, **settings: Any) -> None:
        super().__init__(mode="best_effort", **settings)


class Running:
    """A started sandbox with its loop, called from plain tests."""

    def __init__(self, sandbox: Sandbox, runner: asyncio.Runner) -> None:
        self.sandbox = sandbox
        self._runner = runner

    def __call__(
        self, code: str, files: Mapping[str, bytes] | None = None, collect: Sequence[str] = ()
    ) -> SandboxResult:
        return self._runner.run(self.sandbox.run(code, files or {}, collect))

    @property
    def is_at_rest(self) -> bool:
        """Only the zygote, the supervisor of the call to come and, with namespaces, whoever waits outside are left."""
        return len(processes_of(self.sandbox)) == (3 if "pid-namespace" in self.sandbox.layers else 2)


def processes_of(sandbox: Sandbox) -> set[int]:
    """The zygotes and whatever was forked from them: all carry the sandbox's directory in their command line."""
    assert sandbox._root is not None
    return processes_with(sandbox._root.name)


def processes_with(mark: str) -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark.encode() in (entry / "cmdline").read_bytes():
                    found.add(int(entry.name))
            except OSError:  # it ended while we looked
                continue
    return found


def eventually(condition: Callable[[], bool], within_s: float = 2.0) -> bool:
    until = time.monotonic() + within_s
    while not (holds := condition()) and time.monotonic() < until:
        time.sleep(0.01)
    return holds


@contextmanager
def running(kind: type[Sandbox], timeout_s: float) -> Iterator[Running]:
    with asyncio.Runner() as runner, pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARFT_TEST_SECRET", "swordfish")
        sandbox = kind(workers=1, timeout_s=timeout_s, memory_mib=512, output_bytes=OUTPUT_BYTES)
        runner.run(sandbox.start())
        yield Running(sandbox, runner)
        runner.run(sandbox.close())


@pytest.fixture(scope="module", params=[Sandbox, BareSandbox], ids=["all-layers", "bare"])
def run(request: pytest.FixtureRequest) -> Iterator[Running]:
    with running(request.param, TIMEOUT_S) as started:
        yield started


@pytest.fixture(scope="module", params=[Sandbox, BareSandbox], ids=["all-layers", "bare"])
def hurried_run(request: pytest.FixtureRequest) -> Iterator[Running]:
    with running(request.param, HURRY_S) as started:
        yield started


all_layers = pytest.mark.parametrize("run", [Sandbox], indirect=True, ids=["all-layers"])


def need(run: Running, *layers: str) -> None:
    missing = set(layers) - set(run.sandbox.layers)
    if missing:
        pytest.skip(f"not active here: {', '.join(sorted(missing))}")


# --- what works


def test_files_go_in_and_out(run: Running) -> None:
    result = run("open('b', 'wb').write(open('a', 'rb').read()[::-1])", {"a": b"\x00abc"}, ["b", "missing"])
    assert (result.error, result.files) == (None, {"b": b"cba\x00"})


def test_numpy_and_pillow_work_with_lazy_imports(run: Running) -> None:
    code = """
import json, numpy as np, statistics
from PIL import Image, ImageDraw, ImageOps
image = ImageOps.mirror(Image.fromarray(np.zeros((8, 6, 3), dtype=np.uint8)))
image.rotate(90, expand=True).save("out.png")
print(json.dumps(Image.open("out.png").size), np.linalg.inv(np.eye(3)).sum())
"""
    result = run(code)
    assert (result.error, result.stdout) == (None, "[8, 6] 3.0\n")


def test_output_streams_are_kept_apart(run: Running) -> None:
    result = run("import sys\nprint('out')\nprint('err', file=sys.stderr)")
    assert (result.stdout, result.stderr, result.error) == ("out\n", "err\n", None)


def test_calls_share_no_state(run: Running) -> None:
    run("import builtins, os\nbuiltins.leak = 1\nos.environ['LEAK'] = '1'\nopen('leak', 'w').close()\nx = 1")
    result = run(
        "import builtins, os\nprint(hasattr(builtins, 'leak'), 'LEAK' in os.environ, os.listdir(), 'x' in globals())"
    )
    assert result.stdout == "False False [] False\n"


def test_the_callers_future_imports_do_not_leak_into_the_code(run: Running) -> None:
    assert run("def f(x: undefined): pass").error == "NameError: name 'undefined' is not defined"


def test_the_layers_of_every_mode_are_reported(run: Running) -> None:
    assert set(layers.BASE) <= set(run.sandbox.layers)


# --- how code fails


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("x = (", "SyntaxError: '(' was never closed"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("import sys; sys.exit('reason')", "reason"),
        ("import sys; sys.exit(3)", "exited with status 3"),
        ("import sys; sys.exit()", None),
        ("import os; os._exit(5)", "exited with status 5"),
        ("import ctypes; ctypes.string_at(0)", "killed by SIGSEGV"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("b = bytearray(3 << 30)", "MemoryError"),
        ("l = []\nwhile True: l.append(bytearray(1 << 20))", "MemoryError"),
        ("import os\nos.close(1); os.close(2); 1 / 0", "ZeroDivisionError: division by zero"),
        (
            "'\udc00'",
            "UnicodeEncodeError: 'utf-8' codec can't encode character '\\udc00' in position 1: surrogates not allowed",
        ),
        ("import os; os.close(3); 1 / 0", "exited with status 1"),
    ],
)
def test_an_error_is_one_line(run: Running, code: str, error: str | None) -> None:
    assert run(code).error == error
    assert run("print('next')").stdout == "next\n"


def test_a_signal_without_a_name_is_an_error_of_the_code(run: Running) -> None:
    error = run("import os; os.kill(os.getpid(), 40)").error
    assert error in (None, "killed by signal 40"), "process 1 of a namespace ignores it"
    assert error is not None or "pid-namespace" in run.sandbox.layers


def test_the_traceback_shows_the_code_only(run: Running) -> None:
    stderr = run("def f():\n    raise KeyError('k')\nf()").stderr
    assert 'File "<code>", line 2, in f' in stderr
    assert "zygote" not in stderr


# --- time


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal\nfor s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(60)",
        "10 ** 10 ** 8",
    ],
    ids=["loop", "sleep", "signals-ignored", "stopped", "in-c"],
)
def test_the_deadline_ends_it(hurried_run: Running, code: str) -> None:
    started = time.monotonic()
    result = hurried_run(code)
    assert time.monotonic() - started < HURRY_S + LATE_S
    assert result.timed_out and result.error == f"timed out after {HURRY_S} s"


def test_what_was_printed_before_the_deadline_is_kept(hurried_run: Running) -> None:
    assert hurried_run("print('before')\nwhile True: pass").stdout == "before\n"


# --- output


def test_standard_output_is_bounded(run: Running) -> None:
    result = run("import sys\nfor i in range(20_000): print(i, 'x' * 100)")
    assert result.error is None
    assert len(result.stdout) == OUTPUT_BYTES and result.stdout.startswith("0 xxx")


def test_endless_output_ends_at_the_deadline(hurried_run: Running) -> None:
    result = hurried_run("import os\nwhile True: os.write(1, b'y' * 65536)")
    assert result.timed_out and result.stdout == "y" * OUTPUT_BYTES


def test_a_flood_does_not_hide_the_error(run: Running) -> None:
    result = run("import sys\nsys.stderr.write('x' * 300_000)\n1 / 0")
    assert len(result.stderr) == OUTPUT_BYTES and result.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert result.error == "ZeroDivisionError: division by zero"


def test_undecodable_output_is_replaced(run: Running) -> None:
    assert run("import os; os.write(1, b'a\\xffb')").stdout == "a\N{REPLACEMENT CHARACTER}b"


def test_a_huge_file_cannot_be_written(run: Running) -> None:
    result = run("with open('f', 'wb') as f:\n    for _ in range(100): f.write(bytes(1 << 20))")
    assert result.error == "OSError: [Errno 27] File too large"


def test_an_output_file_over_the_cap_is_refused(run: Running) -> None:
    result = run("open('f', 'wb').truncate((8 << 20) + 1)", collect=["f"])
    assert (result.files, result.error) == ({}, "f has 8388609 bytes, more than 8388608")


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import os; os.mkdir('f')", "f is not a regular file"),
        ("import os; os.symlink('/etc/hostname', 'f')", "f cannot be read: Too many levels of symbolic links"),
    ],
    ids=["directory", "link"],
)
def test_only_a_regular_file_is_collected(run: Running, code: str, error: str) -> None:
    result = run(code, collect=["f"])
    assert (result.files, result.error) == ({}, error)


def test_a_fifo_is_not_collected(run: Running) -> None:
    result = run("import os; os.mkfifo('f')", collect=["f"])
    refused = "PermissionError: [Errno 1] Operation not permitted"  # by seccomp, before there is one
    assert result.error == (refused if "seccomp" in run.sandbox.layers else "f is not a regular file")
    assert result.files == {}


# --- what the code can reach


def test_the_environment_is_scrubbed(run: Running) -> None:
    assert os.environ["ARFT_TEST_SECRET"] == "swordfish"
    code = """
import os
seen = str(dict(os.environ))
for pid in ("self", os.getppid()):
    try:
        seen += open(f"/proc/{pid}/environ").read()
    except OSError:
        pass
print("PATH" in seen, "swordfish" in seen)
"""
    assert run(code).stdout == "True False\n"


def test_no_descriptor_is_inherited(run: Running) -> None:
    code = """
import os
def is_open(fd):
    try:
        return bool(os.fstat(fd))
    except OSError:
        return False
print([fd for fd in range(64) if is_open(fd)])
"""
    assert run(code).stdout == "[0, 1, 2, 3]\n", "3 carries the error line and nothing else"


def test_standard_input_is_empty(run: Running) -> None:
    assert run("print(repr(__import__('sys').stdin.read()))").stdout == "''\n"


def test_the_code_holds_no_capability_and_can_gain_none(run: Running) -> None:
    code = """
import ctypes
libc = ctypes.CDLL(None)
header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
print(libc.capget(header, data), list(data), libc.prctl(39, 0, 0, 0, 0))
"""
    assert run(code).stdout == "0 [0, 0, 0, 0, 0, 0] 1\n"


def test_the_number_of_open_files_is_bounded(run: Running) -> None:
    assert run("f = [open('/dev/null') for _ in range(100)]").error == (
        "OSError: [Errno 24] Too many open files: '/dev/null'"
    )


@all_layers
def test_the_network_is_out_of_reach(run: Running) -> None:
    need(run, "network-namespace")
    code = """
import socket
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    try:
        s = socket.socket(socket.AF_INET, kind)
        s.connect(("127.0.0.1", 9))
        s.send(b"x")
        print("reached")
    except OSError:
        print("refused")
"""
    assert run(code).stdout == "refused\nrefused\n"


@all_layers
def test_no_other_process_is_seen(run: Running) -> None:
    need(run, "pid-namespace")
    assert run("import os; print(os.getpid(), os.getppid())").stdout == "1 0\n"


@all_layers
def test_the_user_inside_is_not_root(run: Running) -> None:
    need(run, "user-namespace")
    assert run("import os; print(os.getuid(), os.getgid())").stdout == "1000 1000\n"


@all_layers
def test_a_nested_user_namespace_is_refused(run: Running) -> None:
    need(run, "no-nested-namespace")
    assert run("import ctypes; print(ctypes.CDLL(None).unshare(0x10000000))").stdout == "-1\n"


@all_layers
def test_files_outside_cannot_be_read(run: Running, tmp_path: Path) -> None:
    need(run, "landlock-files")
    (tmp_path / "secret").write_text("swordfish")
    for path in ("/etc/passwd", "/proc/self/environ", __file__, str(tmp_path / "secret")):
        assert run(f"open({path!r})").error == f"PermissionError: [Errno 13] Permission denied: {path!r}"
    assert run(f"import os; os.link({str(tmp_path / 'secret')!r}, 'f')").error is not None


@all_layers
def test_files_outside_cannot_be_written(run: Running, tmp_path: Path) -> None:
    need(run, "landlock-files")
    assert "Error: [Errno" in str(run(f"open({str(tmp_path / 'new')!r}, 'w')").error)
    assert "PermissionError" in str(run("import os; open(os.path.dirname(os.getcwd()) + '/new', 'w')").error)
    assert not (tmp_path / "new").exists()


@all_layers
def test_no_program_can_be_executed(run: Running) -> None:
    need(run, "landlock-files")
    assert "PermissionError" in str(run("import subprocess; subprocess.run(['/bin/true'])").error)
    code = "import os\nopen('p', 'w').write('#!/bin/sh\\n')\nos.chmod('p', 0o700)\nos.execv('./p', ['p'])"
    assert "PermissionError" in str(run(code).error)


@all_layers
def test_the_disk_cannot_be_filled(run: Running) -> None:
    need(run, "mount-namespace")
    result = run(
        "for i in range(4):\n    with open(str(i), 'wb') as f:\n        for _ in range(60): f.write(bytes(1 << 20))"
    )
    assert result.error == "OSError: [Errno 28] No space left on device"


def test_opencv_is_loaded_where_it_is_installed(run: Running) -> None:
    pytest.importorskip("cv2")
    code = """
import sys
print("cv2" in sys.modules)
import cv2, numpy as np
cv2.imwrite("f.png", cv2.GaussianBlur(cv2.resize(np.zeros((500, 500, 3), np.uint8), (1500, 1500)), (5, 5), 1))
print(cv2.imread("f.png").shape, cv2.getNumThreads())
"""
    result = run(code)
    assert (result.error, result.stdout) == (None, "True\n(1500, 1500, 3) 1\n")


def test_threads_work(run: Running) -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool: print(sum(pool.map(abs, range(-9, 9))))
"""
    result = run(code)
    assert (result.error, result.stdout) == (None, "81\n")


def test_the_limit_of_memory_is_what_code_may_add(run: Running) -> None:
    assert run("b = bytearray(400 << 20)").error is None
    assert run("b = bytearray(600 << 20)").error == "MemoryError"


# --- modes


def test_strict_refuses_to_start_and_names_layers_and_remedies() -> None:
    class WithoutLandlock(Sandbox):
        _use = ("namespaces", "seccomp")

    async def use() -> set[int]:
        sandbox = WithoutLandlock(workers=2)
        try:
            for start in (sandbox.start, sandbox.start, lambda: sandbox.run("print('ran')", {}, [])):
                with pytest.raises(SandboxRefused, match=r"no landlock-files: use Linux 5\.13 .* \"best_effort\""):
                    await start()
        finally:
            await sandbox.close()
        assert sandbox.layers == ()
        return processes_of(sandbox)

    assert asyncio.run(use()) == set()


@pytest.mark.parametrize("layer", layers.STRICT)
def test_every_layer_of_strict_is_missed_by_name(layer: str) -> None:
    absent = layers.missing([other for other in layers.STRICT if other != layer])
    assert absent == (layer,)
    assert f"no {layer}: {layers.STRICT[layer]}" in layers.refusal(absent)


def test_strict_does_not_weaken_when_a_zygote_is_replaced() -> None:
    async def use() -> None:
        sandbox = Sandbox(workers=1)
        await sandbox.start()
        assert sandbox.missing == ()
        sandbox._settings["use"] = ()  # as if the machine had changed meanwhile
        os.kill(min(processes_of(sandbox)), 9)
        await asyncio.sleep(0.2)
        try:
            await sandbox.run("print('ran')", {}, [])
        finally:
            await sandbox.close()

    with pytest.raises(SandboxRefused):
        asyncio.run(use())


@pytest.mark.parametrize("mode", ["best_effort", "off"])
def test_a_weaker_mode_says_what_it_lacks(mode: layers.Mode) -> None:
    class WithoutLandlock(Sandbox):
        _use = ("namespaces", "seccomp")

    async def use() -> tuple[tuple[str, ...], str, str]:
        sandbox = WithoutLandlock(workers=1, mode=mode)
        result = await sandbox.run("print('ran')", {}, [])
        await sandbox.close()
        return sandbox.layers, sandbox.summary, result.stdout

    active, summary, stdout = asyncio.run(use())
    assert stdout == "ran\n"
    assert "landlock-files" not in active and "landlock-files" in summary.partition("WITHOUT")[2]
    assert (active[0] == layers.NOT_CONFINED) == (mode == "off")
    assert mode != "off" or active[1:] in (layers.BASE, (*layers.BASE, "process-count"))


# --- what is left behind


@pytest.mark.parametrize(
    "code",
    [
        "import os, time\nfor _ in range(4):\n    if os.fork() == 0:\n        time.sleep(60)\nprint('x')",
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.fork() or time.sleep(60)\n    os._exit(0)",
        "import os\nwhile True:\n    if os.fork() == 0 and os.getpid() % 40 == 0:\n        os.setsid()",
    ],
    ids=["children", "daemon", "bomb"],
)
def test_no_process_outlives_its_call(run: Running, code: str) -> None:
    if "while" in code and os.getuid() == 0:
        need(run, "process-count")  # nothing else bounds root's bomb, and this machine is shared
    assert eventually(lambda: run.is_at_rest)
    run(code)
    time.sleep(0.05)  # until the zygote has replaced the supervisor
    assert eventually(lambda: run.is_at_rest)
    assert run("print('next')").stdout == "next\n"


@all_layers
def test_threads_stay_available_after_many_calls(run: Running) -> None:
    need(run, "process-count")
    code = """
import threading, time
for _ in range({}): threading.Thread(target=time.sleep, args=({},), daemon=True).start()
"""
    run(code.format(330, 0))  # the numbers of the namespace wrap around
    assert run(code.format(20, 9)).error is None


def test_the_directory_is_gone_afterwards(run: Running) -> None:
    directory = run("import os; print(os.getcwd())", {"a": b""}).stdout.strip()
    assert Path(directory).is_absolute() and not Path(directory).exists()
    assert run(f"import os; print(os.path.exists({directory!r}))").stdout == "False\n"


def test_a_nasty_tree_is_cleared(run: Running) -> None:
    code = """
import os
os.symlink("/", "root")
os.makedirs("locked/inner")
open("locked/file", "w").close()
os.chmod("locked/inner", 0)
os.chmod("locked", 0)
for _ in range(1500):
    os.mkdir("d"); os.chdir("d")
"""
    assert run(code).error is None
    assert run("import os; print(os.listdir())").stdout == "[]\n"


def test_clearing_follows_no_link_and_no_depth(tmp_path: Path) -> None:
    kept, top = tmp_path / "kept", tmp_path / "top"
    kept.mkdir()
    (kept / "file").touch()
    top.mkdir()
    (top / "link").symlink_to(kept)
    fd = os.open(top, os.O_RDONLY)
    for _ in range(1200):  # deeper than Python recurses, longer than a path may be
        os.mkdir("a" * 20, dir_fd=fd)
        inner = os.open("a" * 20, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    output.clear_directory(str(top))
    assert list(top.iterdir()) == []
    assert (kept / "file").exists()


@pytest.mark.parametrize("kind", [Sandbox, BareSandbox])
def test_close_leaves_no_process_descriptor_or_file(kind: type[Sandbox]) -> None:
    async def use() -> tuple[str, int]:
        descriptors = len(os.listdir("/proc/self/fd"))
        sandbox = kind(workers=2, timeout_s=0.3)
        await asyncio.gather(*[sandbox.run("open('f', 'w')\nwhile True: pass", {}, []) for _ in range(2)])
        assert sandbox._root is not None
        assert len(processes_of(sandbox)) >= 2
        await sandbox.close()
        await sandbox.close()
        assert len(os.listdir("/proc/self/fd")) == descriptors
        return sandbox._root.name, descriptors

    before = len(os.listdir("/proc/self/fd"))
    root, _ = asyncio.run(use())
    assert eventually(lambda: not processes_with(root))
    assert not Path(root).exists()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("kind", [Sandbox, BareSandbox])
def test_a_killed_trainer_leaves_no_process(kind: type[Sandbox]) -> None:
    trainer = f"""
import asyncio, os
from arft_fast.tools.sandbox import Sandbox
async def train():
    Sandbox._use = {kind._use}
    sandbox = Sandbox(workers=1, timeout_s=60, mode="best_effort")
    await sandbox.start()
    call = asyncio.create_task(sandbox.run("while True: pass", {{}}, []))
    await asyncio.sleep(0.2)
    print(sandbox._root.name, flush=True)
    os.kill(os.getpid(), 9)
asyncio.run(train())
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", trainer], env=environment, capture_output=True, text=True, timeout=30)
    root = done.stdout.strip()
    assert done.returncode == -9 and root
    assert eventually(lambda: not processes_with(root))
    shutil.rmtree(root)


# --- faults of the world


@pytest.mark.parametrize("kind", [Sandbox, BareSandbox])
def test_it_survives_an_engine_that_kills_all_children(kind: type[Sandbox]) -> None:
    def children() -> set[int]:
        return {
            int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()
        }

    async def use() -> str:
        sandbox = kind(workers=1)
        await sandbox.start()
        processes = processes_of(sandbox)
        assert processes and not processes & children()
        for parent in map(str, processes):
            assert f"PPid:\t{os.getpid()}\n" not in Path("/proc", parent, "status").read_text()
        result = await sandbox.run("print('alive')", {}, [])
        await sandbox.close()
        return result.stdout

    assert asyncio.run(use()) == "alive\n"


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_call_whose_supervisor_fails_is_an_infra_fault(signal_number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_GRACE_S", 0.2)

    async def use() -> str:
        sandbox = Sandbox(workers=1, timeout_s=0.5)
        await sandbox.start()
        call = asyncio.create_task(sandbox.run("while True: pass", {}, []))
        await asyncio.sleep(0.2)
        os.kill(sorted(processes_of(sandbox))[2], signal_number)
        with pytest.raises(InfraFault, match=r"died|no answer"):
            await call
        result = await sandbox.run("print('next')", {}, [])
        root = sandbox._root
        await sandbox.close()
        assert root is not None and not processes_with(root.name)
        return result.stdout

    assert asyncio.run(use()) == "next\n"


def test_a_killed_zygote_is_an_infra_fault_and_is_replaced() -> None:
    async def use() -> tuple[str, str, int]:
        sandbox = Sandbox(workers=1)
        await sandbox.start()
        call = asyncio.create_task(sandbox.run("import time; time.sleep(60)", {}, []))
        await asyncio.sleep(0.1)
        victims = processes_of(sandbox)
        os.kill(min(victims), 9)  # the one that the pool started
        with pytest.raises(InfraFault, match="died") as fault:
            await call
        result = await sandbox.run("print('alive')", {}, [])
        left = len(victims & processes_of(sandbox))
        await sandbox.close()
        return str(fault.value), result.stdout, left

    assert asyncio.run(use()) == ("a sandbox process died", "alive\n", 0)


def test_a_cancelled_call_ends_its_process() -> None:
    async def use() -> str:
        sandbox = Sandbox(workers=1)
        await sandbox.start()
        before = processes_of(sandbox)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(sandbox.run("while True: pass", {}, []), 0.2)
        result = await sandbox.run("print('next')", {}, [])
        assert not before & processes_of(sandbox)
        await sandbox.close()
        return result.stdout

    assert asyncio.run(use()) == "next\n"


def test_code_never_runs_unconfined(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use() -> None:
        sandbox = Sandbox(workers=1)
        monkeypatch.setitem(sandbox._settings, "memory_mib", 1 << 50)  # no rlimit can hold that
        try:
            await sandbox.run("print('ran')", {}, [])
        finally:
            await sandbox.close()

    with pytest.raises(InfraFault, match="the child was not confined: -OverflowError"):
        asyncio.run(use())


def test_a_zygote_that_cannot_start_says_why_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use() -> str:
        sandbox = Sandbox(workers=2)
        with monkeypatch.context() as patch:
            patch.setitem(sandbox._settings, "timeout_s", None)
            with pytest.raises(InfraFault, match="sandbox: TypeError"):
                await sandbox.start()
            with pytest.raises(InfraFault, match="sandbox: TypeError"):
                await sandbox.run("", {}, [])
        result = await sandbox.run("print('mended')", {}, [])
        await sandbox.close()
        return result.stdout

    assert asyncio.run(use()) == "mended\n"


def test_a_zygote_that_died_between_calls_is_replaced_unnoticed() -> None:
    async def use() -> str:
        sandbox = Sandbox(workers=1)
        await sandbox.start()
        os.kill(min(processes_of(sandbox)), 9)
        await asyncio.sleep(0.2)
        result = await sandbox.run("print('alive')", {}, [])
        await sandbox.close()
        return result.stdout

    assert asyncio.run(use()) == "alive\n"


def test_a_cancelled_start_can_be_repeated() -> None:
    async def use() -> str:
        sandbox = Sandbox(workers=2)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(sandbox.start(), 0.02)
        await sandbox.start()
        result = await sandbox.run("print('on')", {}, [])
        await sandbox.close()
        return result.stdout

    assert asyncio.run(use()) == "on\n"


def test_closing_during_the_start_leaves_nothing() -> None:
    async def use() -> str:
        sandbox = Sandbox(workers=2)
        start = asyncio.create_task(sandbox.start())
        await asyncio.sleep(0.02)
        await sandbox.close()
        with pytest.raises(InfraFault):
            await start
        assert sandbox._root is not None
        return sandbox._root.name

    root = asyncio.run(use())
    assert eventually(lambda: not processes_with(root)) and not Path(root).exists()


def test_closing_fails_the_calls_in_flight_and_those_that_wait() -> None:
    async def use() -> list[object]:
        sandbox = Sandbox(workers=1)
        await sandbox.start()
        calls = [asyncio.create_task(sandbox.run("import time; time.sleep(60)", {}, [])) for _ in range(3)]
        await asyncio.sleep(0.1)
        await sandbox.close()
        async with asyncio.timeout(1.0):
            return [*await asyncio.gather(*calls, return_exceptions=True)]

    assert all(isinstance(outcome, InfraFault) for outcome in asyncio.run(use()))


def test_a_second_event_loop_is_refused() -> None:
    sandbox = Sandbox(workers=1)
    with asyncio.Runner() as first, ThreadPoolExecutor(1) as thread:
        first.run(sandbox.start())
        with pytest.raises(RuntimeError, match="one Sandbox per loop"):
            thread.submit(lambda: asyncio.run(sandbox.run("", {}, []))).result()
        first.run(sandbox.close())


# --- many calls


def test_twenty_calls_at_once_get_their_own_answer() -> None:
    async def use() -> list[tuple[str, dict[str, bytes]]]:
        async with asyncio.timeout(20):
            sandbox = Sandbox(workers=2)
            results = await asyncio.gather(
                *[sandbox.run(f"print({i})\nopen('f', 'w').write('{i}')", {}, ["f"]) for i in range(20)]
            )
            await sandbox.close()
        return [(result.stdout, result.files) for result in results]

    assert asyncio.run(use()) == [(f"{i}\n", {"f": b"%d" % i}) for i in range(20)]


def test_the_event_loop_keeps_turning_during_a_call() -> None:
    async def use() -> int:
        sandbox = Sandbox(workers=1)
        await sandbox.start()
        call = asyncio.create_task(sandbox.run("import time; time.sleep(0.3)", {"in": bytes(5 << 20)}, ["in"]))
        ticks = 0
        while not call.done():
            await asyncio.sleep(0.01)
            ticks += 1
        await sandbox.close()
        return ticks

    assert asyncio.run(use()) >= 10


# --- arguments and frames


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/etc/passwd", "../x", "a\0b", "a b", "ü", "-rf", ".hidden", "x" * 200]
)
def test_only_plain_file_names_are_taken(name: str) -> None:
    for files, collect in (({name: b""}, []), ({}, [name])):
        with pytest.raises(ValueError, match="plain file names"):
            asyncio.run(Sandbox().run("", files, collect))


@pytest.mark.parametrize(
    "setting", [{"workers": 0}, {"timeout_s": 0.0}, {"memory_mib": 64}, {"output_bytes": 0}, {"mode": "lax"}]
)
def test_a_bad_setting_is_named(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        Sandbox(**setting)


def test_frames_survive_the_pipe() -> None:
    read, write = os.pipe()
    header = {"code": "é\ud800\n", "n": 1}
    os.write(write, frame.encode(header, [b"", b"\x00raw"]))
    os.close(write)
    assert frame.read(read) == ({**header, "sizes": [0, 4]}, [b"", b"\x00raw"])
    assert frame.read(read) is None
    os.close(read)


def test_a_torn_frame_is_an_error() -> None:
    read, write = os.pipe()
    os.write(write, frame.encode({}, [b"abc"])[:-1])
    os.close(write)
    with pytest.raises(EOFError):
        frame.read(read)
    os.close(read)
