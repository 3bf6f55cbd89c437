"""The campaign as a user without privileges, from a test that runs as root."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

_NOBODY = "65534"
_REPOSITORY = Path(__file__).parents[2]
# In a mount namespace of its own: a folder that others may not enter (root's home) becomes an empty one, in which only
# the paths that Python needs appear again.
_SCRIPT = """
set -e
stash=$(mktemp -d); mount -t tmpfs none "$stash"
for path in $PATHS; do mkdir -p "$stash/$path"; mount --bind "$path" "$stash/$path"; done
for folder in $CLOSED; do mount -t tmpfs -o mode=755 none "$folder"; done
for path in $PATHS; do mkdir -p "$path"; mount --bind "$stash/$path" "$path"; done
umount -l "$stash"; rmdir "$stash"
cd "$REPOSITORY"
exec setpriv --reuid $USER_ID --regid $USER_ID --clear-groups env -i PATH="$PATH" PYTHONDONTWRITEBYTECODE=1 "$@"
"""


def why_not() -> str:
    """Why this machine cannot show it; empty where it can."""
    if os.getuid() != 0:
        return "the other tests already run without privileges"
    tools = [tool for tool in ("unshare", "setpriv") if not shutil.which(tool)]
    if tools:
        return f"{' and '.join(tools)} of util-linux not found"
    probe = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True
    )
    return f"this container's root may not mount: {probe.stderr.strip()}" if probe.returncode else ""


def run_campaign(timeout_s: float) -> subprocess.CompletedProcess[str]:
    """All attacks on a strict sandbox of user nobody; status 0: none succeeded."""
    needed = {Path(sys.prefix), Path(sys.base_prefix), _REPOSITORY}
    closed = {path: folder for path in needed if (folder := _closed_ancestor(path))}
    environment = {
        "PATH": os.environ["PATH"],
        "PATHS": " ".join(map(str, closed)),
        "CLOSED": " ".join({str(folder) for folder in closed.values()}),
        "REPOSITORY": str(_REPOSITORY),
        "USER_ID": _NOBODY,
    }
    python = [sys.executable, "-m", "tests.sandbox_attacks.campaign"]
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _SCRIPT, "sh", *python]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s)


def _closed_ancestor(path: Path) -> Path | None:
    """The outermost folder above ``path`` that others may not enter."""
    folders = [folder for folder in (*reversed(path.parents), path) if not folder.stat().st_mode & stat.S_IXOTH]
    return folders[0] if folders else None
