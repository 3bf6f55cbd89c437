"""What attacks aim at: a secret, a victim process, listening sockets, a folder, all of the test's own making."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

SECRET = "sword" + "fish"
_VICTIM = "import sys, time; secret = 'sword' + 'fish'; print('ready', flush=True); time.sleep(600)"


@dataclass(frozen=True)
class World:
    """``aims``: name in an attack's code -> value. ``abstract``: a Unix socket's name; ``port``: of a TCP socket."""

    folder: Path
    victim: subprocess.Popen[bytes]
    port: int
    udp_port: int
    abstract: str

    @property
    def machine(self) -> str:
        return os.uname().machine

    @property
    def aims(self) -> dict[str, object]:
        return {
            "SECRET_FILE": str(self.folder / "secret"),
            "SECRET": SECRET[::-1],  # backwards: not itself a find
            "FOLDER": str(self.folder),
            "FILE": str(self.folder / "file"),
            "SOCKET": str(self.folder / "socket"),
            "ABSTRACT": self.abstract,
            "PORT": self.port,
            "UDP_PORT": self.udp_port,
            "TRAINER": os.getpid(),
            "VICTIM": self.victim.pid,
            "HERE": __file__,
            "LIBRARY": str(Path(os.__file__).parent),
        }


@contextmanager
def made(folder: Path) -> Iterator[World]:
    """A world in ``folder``."""
    (folder / "secret").write_text(SECRET)
    (folder / "file").write_text("before")
    folder.chmod(0o777)
    for name in ("secret", "file"):
        (folder / name).chmod(0o666)
    abstract = f"arft-test-{secrets.token_hex(8)}"
    with ExitStack() as stack:
        tcp, udp, path, name_only = (
            stack.enter_context(socket.socket(family, kind))
            for family, kind in (
                (socket.AF_INET, socket.SOCK_STREAM),
                (socket.AF_INET, socket.SOCK_DGRAM),
                (socket.AF_UNIX, socket.SOCK_STREAM),
                (socket.AF_UNIX, socket.SOCK_STREAM),
            )
        )
        for one in (tcp, udp):
            one.bind(("127.0.0.1", 0))
        path.bind(str(folder / "socket"))
        (folder / "socket").chmod(0o777)
        name_only.bind(f"\0{abstract}")
        for one in (tcp, path, name_only):
            one.listen(200)
        victim = stack.enter_context(
            subprocess.Popen([sys.executable, "-c", _VICTIM], env={"SECRET": SECRET}, stdout=subprocess.PIPE)
        )
        stack.callback(victim.kill)
        assert victim.stdout is not None
        victim.stdout.readline()
        yield World(folder, victim, tcp.getsockname()[1], udp.getsockname()[1], abstract)
