"""Reading and changing what lies outside the call's directory."""

from __future__ import annotations

from arft_fast.tools.sandbox import SandboxResult
from tests.sandbox_attacks.attack import attack
from tests.sandbox_attacks.world import SECRET, World


def _handed_out(result: SandboxResult, world: World) -> bool:
    return any(SECRET.encode() in data for data in result.files.values())


def _file_changed(result: SandboxResult, world: World) -> bool:
    """Something about ``FILE``; put back for the next attack."""
    file = world.folder / "file"
    info = file.stat() if file.exists() else None
    changed = info is None or file.read_text() != "before" or info.st_mode & 0o777 != 0o666 or info.st_mtime == 1.0
    if changed:
        file.write_text("before")
        file.chmod(0o666)
    return changed


READS = {
    "read-a-file": "won(SECRET[::-1] in open(SECRET_FILE).read())",
    "read-passwd": "won('root:' in open('/etc/passwd').read())",
    "list-a-folder": "won('secret' in os.listdir(FOLDER))",
    "list-the-root": "won('etc' in os.listdir('/'))",
    "read-through-a-symlink": "os.symlink(SECRET_FILE, 'link')\nwon(SECRET[::-1] in open('link').read())",
    "read-by-traversal": "won(SECRET[::-1] in open('../' * 20 + SECRET_FILE[1:]).read())",
    "read-through-proc-root": "won(SECRET[::-1] in open('/proc/self/root' + SECRET_FILE).read())",
    "read-through-proc-cwd": "os.chdir(FOLDER)\nwon(SECRET[::-1] in open('/proc/self/cwd/secret').read())",
    "read-with-the-c-library": """
fd = libc.open(SECRET_FILE.encode(), 0)
buffer = ctypes.create_string_buffer(100)
won(libc.read(fd, buffer, 99) > 0 and SECRET[::-1].encode() in buffer.raw)
""",
    "read-with-openat2": """
NUMBERS["openat2"] = 437
how = (ctypes.c_uint64 * 3)(0, 0, 0)
fd = call("openat2", -100, SECRET_FILE.encode(), how, 24)
won(fd >= 0 and SECRET[::-1].encode() in os.read(fd, 100))
""",
    "read-the-gold-answer": "won('_VICTIM' in open(HERE).read())",
    "map-a-file": """
import mmap
with open(SECRET_FILE, 'rb') as file:
    won(SECRET[::-1].encode() in mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)[:])
""",
    "read-the-trainers-command-line": "won(open(f'/proc/{TRAINER}/cmdline').read() != '')",
    "list-all-processes": "won(sum(name.isdigit() for name in os.listdir('/proc')) > 0)",
    "list-descriptors-in-proc": "won(os.listdir('/proc/self/fd'))",
    "read-own-memory-map": "won('libc' in open('/proc/self/maps').read())",
    "write-own-memory-file": "open('/proc/self/mem', 'r+b').close()\nwon()",
    "read-the-mount-table": "won(open('/proc/self/mountinfo').read())",
}

CHANGES = {
    "write-a-file": "open(FILE, 'w').write('x')",
    "append-to-a-file": "open(FILE, 'a').write('x')",
    "truncate-a-file": "os.truncate(FILE, 0)",
    "change-a-mode": "os.chmod(FILE, 0o600)",
    "change-times": "os.utime(FILE, (1.0, 1.0))",
    "delete-a-file": "os.unlink(FILE)",
    "move-a-file-in": "os.rename(FILE, 'mine')",
    "replace-a-file": "open('x', 'w').write('x')\nos.rename('x', FILE)",
    "write-through-a-symlink": "os.symlink(FILE, 'link')\nopen('link', 'w').write('x')",
}

FILES = (
    *(attack(name, code, unconfined=True) for name, code in READS.items()),
    *(attack(name, code, harm=_file_changed, unconfined="move" not in name) for name, code in CHANGES.items()),
    attack("make-a-file", "open(FOLDER + '/new', 'w').close()\nwon()", unconfined=True),
    attack("make-a-folder", "os.mkdir(FOLDER + '/new-folder')\nwon()", unconfined=True),
    attack("make-a-link-outside", "os.symlink('/', FOLDER + '/new-link')\nwon()", unconfined=True),
    attack("hard-link-in", "os.link(SECRET_FILE, 'out')\nwon(SECRET[::-1] in open('out').read())"),
    attack("hand-out-a-symlink", "os.symlink(SECRET_FILE, 'out')", collect=("out",), harm=_handed_out),
    attack("hand-out-a-hard-link", "os.link(SECRET_FILE, 'out')", collect=("out",), harm=_handed_out),
    attack("hand-out-a-folder-link", "os.symlink(FOLDER, 'out')", collect=("out",), harm=_handed_out),
    attack("set-an-attribute", "os.setxattr(FILE, 'user.x', b'1')\nwon()"),
    attack("write-into-shared-memory", "open('/dev/shm/arft-attack', 'w').close()\nwon()"),
    attack("plant-sitecustomize", "open(LIBRARY + '/sitecustomize.py', 'x').close()\nwon()"),
    attack("plant-bytecode", "open(LIBRARY + '/__pycache__/this.attack.pyc', 'x').close()\nwon()"),
    attack("write-a-sysctl", "open('/proc/sys/vm/swappiness', 'r+').close()\nwon()"),
    attack("read-kernel-symbols", "won(open('/proc/kallsyms').readline())"),
    attack("read-the-kernel-log", "won(os.open('/dev/kmsg', os.O_RDONLY | os.O_NONBLOCK) >= 0)"),
    attack("open-physical-memory", "won(os.open('/dev/mem', os.O_RDONLY) >= 0)"),
    attack("open-a-terminal", "won(os.open('/dev/ptmx', os.O_RDWR) >= 0)"),
    attack("make-a-device", "os.mknod('null', 0o20666, os.makedev(1, 3))\nwon()"),
    attack(
        "read-the-trainers-environment",
        "won(any(SECRET[::-1] in open(f'/proc/{pid}/environ').read() for pid in (TRAINER, VICTIM)))",
    ),
    attack("find-a-secret-in-the-environment", "won(SECRET[::-1] in str(dict(os.environ)))"),
    attack(
        "find-an-inherited-descriptor",
        """
def is_open(fd):
    try:
        return bool(os.fstat(fd))
    except OSError:
        return False
won([fd for fd in range(1024) if is_open(fd)] != [0, 1, 2, 3])
""",
    ),
)
