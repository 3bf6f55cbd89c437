"""System calls that lead to new powers, or to parts of the kernel with a history of holes."""

from __future__ import annotations

from tests.sandbox_attacks.attack import attack

_ALSO_WITHOUT_POWERS = {
    "new-user-namespace": "won(call('unshare', 0x10000000) == 0)",
    "event-by-inotify": "won(call('inotify_add_watch', call('inotify_init1', 0), FOLDER.encode(), 0xFFF) >= 0)",
    "shared-memory": "won(call('shmget', 0, 1 << 20, 0o1600) >= 0)",
    "message-queue": "won(call('msgget', 0, 0o1600) >= 0)",
    "semaphores": "won(call('semget', 0, 1, 0o1600) >= 0)",
    "anonymous-file": "won(call('memfd_create', b'x', 0) >= 0)",
    "linux-aio": "won(call('io_setup', 1, (ctypes.c_ulong * 1)()) == 0)",
    "personality": "won(call('personality', 0xFFFFFFFF) >= 0)",
    "a-call-of-tomorrow": "NUMBERS['new'] = 464\ncall('new')\nwon(ctypes.get_errno() not in (1, 38))",
}

_NEEDS_POWERS = {
    "new-namespaces-by-clone": "won(call('clone', 0x10000000 | 17, 0, 0, 0, 0) >= 0)",
    "new-mount-namespace": "won(call('unshare', 0x00020000) == 0)",
    "join-a-namespace": "won(call('setns', 0, 0) == 0)",
    "mount-memory": "won(call('mount', b'x', os.getcwd().encode(), b'tmpfs', 0, None) == 0)",
    "mount-proc": "won(call('mount', b'proc', os.getcwd().encode(), b'proc', 0, None) == 0)",
    "remount-writable": "won(call('mount', b'', b'/', b'', 32 | 4096, None) == 0)",
    "uncover-a-mount": "won(call('umount2', b'/dev/shm', 2) == 0)",
    "new-mount-interface": "won(call('fsopen', b'tmpfs', 0) >= 0)",
    "clone-a-tree": "won(call('open_tree', -100, b'/', 1) >= 0)",
    "unlock-mounts": "a = (ctypes.c_uint64 * 4)(0, 1)\nwon(call('mount_setattr', -100, b'/', 0x8000, a, 32) == 0)",
    "change-the-root": "os.mkdir('r')\nwon(call('chroot', b'r') == 0)",
    "swap-the-root": "won(call('pivot_root', b'.', b'.') == 0)",
    "open-by-handle": "won(call('open_by_handle_at', -100, (ctypes.c_uint64 * 4)(8, 0, 0, 0), 0) >= 0)",
    "become-root": "won(call('setuid', 0) == 0)",
    "become-someone": "won(call('setresuid', 65534, 65534, 65534) == 0)",
    "join-groups": "won(call('setgroups', 0, None) == 0)",
    "gain-capabilities": """
header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[2**32 - 1] * 6)
won(call('capset', header, data) == 0)
""",
    "allow-new-powers": "libc.prctl(38, 0, 0, 0, 0) or won()",
    "leave-the-filter": "libc.prctl(22, 0, 0, 0, 0) or won()",
    "load-a-program-into-the-kernel": "won(call('bpf', 0, (ctypes.c_uint64 * 16)(1, 0x0400000004, 1), 72) >= 0)",
    "watch-the-processor": "won(call('perf_event_open', (ctypes.c_uint64 * 14)(1, 112 << 32), 0, -1, -1, 0) >= 0)",
    "faults-by-hand": "won(call('userfaultfd', 1) >= 0)",
    "io-uring": "won(call('io_uring_setup', 1, (ctypes.c_uint32 * 30)()) >= 0)",
    "session-keyring": "won(call('keyctl', 0, -3, 1) > 0)",
    "add-a-key": "won(call('add_key', b'user', b'x', b'y', 1, -2) > 0)",
    "secret-memory": "won(call('memfd_secret', 0) >= 0)",
    "set-the-clock": "won(call('clock_settime', 0, (ctypes.c_long * 2)(0, 0)) == 0)",
    "bend-the-clock": "won(call('adjtimex', (ctypes.c_long * 32)()) >= 0)",
    "rename-the-host": "won(call('sethostname', b'x', 1) == 0)",
    "load-a-module": "won(call('finit_module', 0, b'', 0) == 0)",
    "kernel-log": "won(call('syslog', 10, None, 0) >= 0)",
    "accounting": "won(call('acct', None) == 0)",
    "stop-swapping": "won(call('swapoff', b'/nowhere') == 0 or ctypes.get_errno() == 2)",
    "restart-the-machine": "won(call('reboot', 0, 0, 0, None) == 0 or ctypes.get_errno() == 22)",
    "watch-all-files": "won(call('fanotify_init', 0, 0) >= 0)",
    "flush-all-disks": "won(call('sync') == 0)",
    "type-into-the-terminal": "won(any(call('ioctl', fd, 0x5412, b'x') == 0 for fd in range(4)))",
    "calls-of-another-kind": "NUMBERS['x32'] = 0x40000000 + 39\nwon(call('x32') > 0)",
    "pipes-without-copies": "r, w = os.pipe()\nwon(call('tee', r, w, 1, 2) >= 0 or ctypes.get_errno() == 11)",
    "hold-a-file": "import fcntl\nwon(fcntl.fcntl(os.open(LIBRARY + '/os.py', os.O_RDONLY), 1024, 0) == 0)",
}

_BY_KERNEL = ("new-user-namespace", "a-call-of-tomorrow", "linux-aio")
"""Not on every kernel."""

KERNEL = (
    *(attack(name, code, unconfined=name not in _BY_KERNEL) for name, code in _ALSO_WITHOUT_POWERS.items()),
    *(attack(name, code) for name, code in _NEEDS_POWERS.items()),
)
