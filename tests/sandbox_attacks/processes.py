"""Starting processes, and reaching those that run."""

from __future__ import annotations

from tests.sandbox_attacks.attack import attack

_SOCKETS = {
    "tcp-connect": "socket.create_connection(('127.0.0.1', PORT), timeout=1)\nwon()",
    "udp-send": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', UDP_PORT))\nwon()",
    "tcp-listen": "s = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()\nwon()",
    "ipv6": "won(socket.socket(socket.AF_INET6).bind(('::', 0)) is None)",
    "unix-socket-by-path": "socket.socket(socket.AF_UNIX).connect(SOCKET)\nwon()",
    "unix-socket-abstract": "socket.socket(socket.AF_UNIX).connect('\\0' + ABSTRACT)\nwon()",
    "unix-datagram-pair": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\nwon()",
    "netlink": "won(socket.socket(16, socket.SOCK_RAW, 0).fileno() >= 0)",
}

_STARTS = {
    "execute-a-program": "os.posix_spawn('/bin/true', ['true'], {})\nwon()",
    "execute-a-shell": "import subprocess\nwon(subprocess.run('echo x', shell=True, capture_output=True).stdout)",
    "execute-with-a-preload": """
import subprocess
won(subprocess.run(['/bin/true'], env={'LD_PRELOAD': './evil.so'}).returncode == 0)
""",
    "execute-memory": """
fd = call("memfd_create", b"x", 0)
os.write(fd, open("/bin/true", "rb").read() if os.access("/bin/true", os.R_OK) else b"")
os.posix_spawn(f"/proc/self/fd/{fd}", ["x"], {})
won()
""",
    "fork": "won(os.fork() >= 0)",
    "fork-by-clone": "pid = call('clone', 17, 0, 0, 0, 0)\nif pid == 0: os._exit(0)\nwon(pid > 0)",
    "fork-by-clone3": """
arguments = (ctypes.c_uint64 * 8)(0, 0, 0, 0, 17, 0, 0, 0)
pid = call('clone3', arguments, 64)
if pid == 0: os._exit(0)
won(pid > 0)
""",
    "leave-a-daemon": "won(os.fork() or (os.setsid(), os.fork() or os._exit(0)))",
}

_REACHES = {
    "probe-the-trainer": "os.kill(TRAINER, 0)\nwon()",
    "signal-another-process": "os.kill(VICTIM, 28)\nwon()",
    "signal-a-thread": "won(call('tgkill', VICTIM, VICTIM, 28) == 0)",
    "signal-by-tkill": "won(call('tkill', VICTIM, 28) == 0)",
    "signal-by-pidfd": "won(call('pidfd_send_signal', call('pidfd_open', VICTIM, 0), 28, None, 0) == 0)",
    "become-owner-of-its-signals": "import fcntl\nfcntl.fcntl(1, fcntl.F_SETOWN, VICTIM)\nwon()",
    "trace": "r = call('ptrace', 0x4206, VICTIM, 0, 0)\nwon(r == 0)",
    "read-another-memory": """
buffer = ctypes.create_string_buffer(8)
vector = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 8)
call('process_vm_readv', VICTIM, vector, 1, vector, 1, 0)
won(ctypes.get_errno() == 14)  # EFAULT: allowed, but nothing lies at this address there
""",
    "change-anothers-limits": "won(call('prlimit64', VICTIM, 7, None, (ctypes.c_uint64 * 2)()) == 0)",
    "change-anothers-priority": "won(call('setpriority', 0, VICTIM, 19) == 0)",
    "pin-another-process": "won(call('sched_setaffinity', VICTIM, 8, (ctypes.c_uint64 * 1)(2**64 - 1)) == 0)",
    "compare-processes": "won(call('kcmp', VICTIM, VICTIM, 1, 0, 0) >= 0)",
}

_AS_STRONG = (
    "trace",
    "read-another-memory",
    "compare-processes",
    "change-anothers-priority",
    "pin-another-process",
)
"""Need the victim's capabilities, which no child has, confined or not."""

PROCESSES = (
    *(attack(name, "import socket\n" + code, unconfined=name != "ipv6") for name, code in _SOCKETS.items()),
    *(attack(name, code, unconfined="execute-memory" != name) for name, code in _STARTS.items()),
    *(attack(name, code, unconfined=name not in _AS_STRONG) for name, code in _REACHES.items()),
    attack("resolve-a-name", "import socket\nwon(socket.getaddrinfo('example.com', 80))"),
    attack("raw-socket", "import socket\nwon(socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).fileno() >= 0)"),
    attack("packet-socket", "import socket\nwon(socket.socket(17, socket.SOCK_RAW, 0).fileno() >= 0)"),
    attack("host-socket", "import socket\nwon(socket.socket(40, socket.SOCK_STREAM, 0).fileno() >= 0)"),
    attack("signal-everything", "os.kill(-1, 0)\nwon()"),
    attack("signal-the-zygote", "os.kill(os.getppid() or 2, 0)\nwon()"),
    attack("signal-the-zygotes-group", "os.killpg(2, 0)\nwon()"),
    attack("steal-a-descriptor", "won(call('pidfd_getfd', call('pidfd_open', 1, 0), 0, 0) >= 0)"),
    attack("outlive-the-zygote", "libc.prctl(1, 0, 0, 0, 0) or won()"),
    attack("let-anyone-trace", "libc.prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0) or won()"),
)
