"""Taking more than a call may have, and leaving something behind."""

from __future__ import annotations

from arft_fast.tools.sandbox import SandboxResult
from tests.sandbox_attacks.attack import attack, it_is_late
from tests.sandbox_attacks.world import World

_OUTPUT_BYTES = 4096
LEFT = "LEFT-" + "BEHIND"
"""What an earlier call holds in its code and its output."""


def _flooded(result: SandboxResult, world: World) -> bool:
    return max(len(result.stdout), len(result.stderr)) > _OUTPUT_BYTES


def _no_error(result: SandboxResult, world: World) -> bool:
    return result.error is None


_LATE = {
    "endless-loop": "while True: pass",
    "endless-loop-in-c": "10 ** 10 ** 8",
    "endless-search": "import re\nre.match('(a+)+$', 'a' * 64 + 'b')",
    "sleep": "import time\ntime.sleep(600)",
    "ignore-signals": """
import signal
for number in set(signal.Signals) - {9, 19}: signal.signal(number, signal.SIG_IGN)
while True: pass
""",
    "stop-itself": "import time\nos.kill(os.getpid(), 19)\ntime.sleep(600)",
    "wait-for-input": "import sys, time\nsys.stdin.read()\ntime.sleep(600)",
    "endless-output": "while True: os.write(1, b'y' * 65536)",
    "close-everything-and-wait": "import time\nos.closerange(0, 64)\ntime.sleep(600)",
}

RESOURCES = (
    *(attack(name, code, hurried=True, harm=it_is_late) for name, code in _LATE.items()),
    attack("one-big-block", "bytearray(8 << 30)\nwon()"),
    attack("many-blocks", "kept = []\nwhile len(kept) < 4096: kept.append(b'x' * (1 << 20))\nwon()"),
    attack("memory-by-mmap", "won(libc.mmap(None, ctypes.c_size_t(8 << 30), 3, 0x22, -1, 0) not in (None, 2**64 - 1))"),
    attack(
        "memory-by-shared-mmap",
        "won(libc.mmap(None, ctypes.c_size_t(8 << 30), 3, 0x21, -1, 0) not in (None, 2**64 - 1))",
    ),
    attack(
        "thread-bomb",
        """
import threading, time
threading.stack_size(1 << 16)
for count in range(1000): threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
won()
""",
    ),
    attack(
        "fork-bomb",
        """
for _ in range(1000):
    if os.fork() == 0: continue
won()
""",
    ),
    attack("lift-the-limits", "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nwon()"),
    attack("endless-recursion", "def f(): f()\nf()", harm=_no_error),
    attack(
        "recursion-without-a-limit",
        "import sys\nsys.setrecursionlimit(2**31 - 1)\nclass A:\n    def __repr__(self): return repr(self)\nrepr(A())",
        harm=_no_error,
    ),
    attack("big-stdout", "import sys\nfor _ in range(200): sys.stdout.write('x' * 100_000)", harm=_flooded),
    attack("big-stderr", "import sys\nfor _ in range(200): sys.stderr.write('x' * 100_000)", harm=_flooded),
    attack("long-error-line", "raise ValueError('x' * 10_000_000)", harm=lambda r, w: len(r.error or "") > 5000),
    attack("big-file", "open('f', 'wb').write(bytes(100 << 20))\nwon(os.stat('f').st_size == 100 << 20)"),
    attack("sparse-file", "os.truncate(os.open('f', os.O_CREAT | os.O_RDWR), 1 << 40)\nwon()"),
    attack("sparse-output", "open('out', 'wb').truncate(60 << 20)", collect=("out",), harm=lambda r, w: bool(r.files)),
    attack("fill-the-disk", "for i in range(5): open(str(i), 'wb').write(bytes(50 << 20))\nwon()"),
    attack("fill-the-inodes", "for i in range(10_000): open(str(i), 'w').close()\nwon()"),
    attack("many-descriptors", "kept = [os.open('/dev/null', 0) for _ in range(1000)]\nwon()"),
    attack("segfault", "ctypes.string_at(0)", harm=_no_error),
    attack("abort", "os.abort()", harm=_no_error),
    attack("corrupt-the-interpreter", "ctypes.memset(id(None), 255, 64)\nprint({}.get(1))", harm=_no_error),
    attack("leave-at-once", "os._exit(7)", harm=_no_error),
    attack("forge-the-report", "os.write(3, b'-fault')\nos._exit(0)", harm=lambda r, w: "fault" in (r.error or "")),
    attack(
        "hook-into-imports",
        "import builtins, sys\nbuiltins.open = builtins.print = None\nsys.meta_path.clear()\nsys.modules.clear()",
        harm=lambda r, w: False,  # the call after it, the control, must not notice
    ),
    attack(
        "find-an-earlier-call",
        f"""
import gc
mark = {LEFT[::-1]!r}[::-1].encode()
libc.sbrk.restype = ctypes.c_void_p
libc.sbrk.argtypes = [ctypes.c_long]
end = libc.sbrk(0)
heap = ctypes.string_at(end - (128 << 10), 128 << 10)
texts = [text for kept in gc.get_objects() if type(kept) in (list, tuple, dict)
         for text in (kept.values() if type(kept) is dict else kept) if type(text) in (str, bytes) and text is not mark]
won(mark in heap or any(mark in (text if type(text) is bytes else text.encode(errors="replace")) for text in texts))
""",
    ),
    attack("find-files-of-earlier-calls", "won(any(os.path.exists(f'../call-{n}/out') for n in range(1, 400)))"),
)
