"""Output that hurts whoever reads it: as the code tool reads it, checked and bounded."""

from __future__ import annotations

from arft_fast.tools.images import ImageRejected, decode_image
from arft_fast.tools.sandbox import SandboxResult
from tests.sandbox_attacks.attack import attack
from tests.sandbox_attacks.world import World


def _decoded(result: SandboxResult, world: World) -> bool:
    """The trainer would take it for an image."""
    if "out" not in result.files:
        return False
    try:
        decode_image(result.files["out"], max_pixels=4_000_000)
    except ImageRejected:
        return False
    return True


def _unwritable(result: SandboxResult, world: World) -> bool:
    """A record of it cannot be written as UTF-8."""
    return result.stdout.encode(errors="ignore").decode() != result.stdout or not result.stdout


_SAVE = "from PIL import Image\n"
_OUTPUTS = {
    "png-bomb": """
import struct, zlib
def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
rows = zlib.compress(bytes(40_000 * 125), 9)
header = struct.pack(">IIBBBBB", 40_000, 40_000, 1, 0, 0, 0, 0)
open("out", "wb").write(
    b"\\x89PNG\\r\\n\\x1a\\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
""",
    "tiff-bomb": _SAVE + "Image.new('1', (60_000, 60_000)).save('out', 'TIFF', compression='group4')",
    "gif-animation": _SAVE
    + "f = [Image.new('P', (9, 9), n) for n in range(9)]\nf[0].save('out', 'GIF', save_all=True, append_images=f[1:])",
    "eps": "open('out', 'wb').write(b'%!PS-Adobe-3.0 EPSF-3.0\\n%%BoundingBox: 0 0 9 9\\n(%pipe%id) (r) file\\n')",
    "svg": "open('out', 'w').write('<svg xmlns=\"http://www.w3.org/2000/svg\"><image href=\"file:///etc/passwd\"/></svg>')",
    "pickle": """
import pickle
class A:
    def __reduce__(self): return os.getpid, ()
pickle.dump(A(), open("out", "wb"))
""",
    "object-array": "import numpy as np\nnp.save(open('out', 'wb'), np.array([0, 'x'], dtype=object))",
    "torn-image": _SAVE + "Image.new('RGB', (99, 99)).save('out', 'PNG')\nos.truncate('out', 60)",
    "empty-file": "open('out', 'w').close()",
    "fifo": "os.mkfifo('out')",
    "folder": "os.mkdir('out')",
    "endless-device": "os.symlink('/dev/zero', 'out')",
}

IMAGES = (
    *(attack(f"output-{name}", code, collect=("out",), harm=_decoded) for name, code in _OUTPUTS.items()),
    attack("output-not-utf8", "os.write(1, bytes(range(128, 256)))", harm=_unwritable),
)
