"""The CUDA library as it was built: architectures, resources of each kernel, and how it fails without a GPU."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from arft_fast.kernels import native, native_rows

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")
DTYPE_PAIRS = 5
THREADS = 1024
REGISTERS_OF_A_BLOCK = 65_536
STATIC_SHARED_BYTES = 48 * 1024


def cuobjdump() -> str | None:
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if spec and spec.origin else None
    return str(bundled) if bundled and bundled.is_file() else shutil.which("cuobjdump")


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


pytestmark = [
    pytest.mark.skipif(not native.available(), reason="arft_fast is imported from a folder, not installed"),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH: the build makes no CUDA library"),
]


def library() -> Path:
    path = native.cuda_library_path()
    assert path is not None, "nvcc is here, libarft_cuda.so is not"
    return path


def test_the_cuda_library_lies_beside_the_cpu_library() -> None:
    cpu = native.library_path()
    assert cpu is not None and library().parent == cpu.parent


def test_it_has_the_version_of_the_header() -> None:
    assert native._cuda_library().arft_abi_version() == native.ABI_VERSION


SCORE = """
import ctypes, torch
from arft_fast.kernels import native, native_rows
library = native._cuda_library()
logits, ids, outs = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), torch.zeros(2, 1)
rows = native_rows._rows(logits, ids, None, None)
native_rows._vectors(rows, logits, logprobs=outs[0], entropy=outs[1])
transform = native_rows._Transform(1.0, 0.0, 1.0)
status = library.arft_cuda_policy_rows(ctypes.byref(rows), ctypes.byref(transform), None, 0, None)
print(native.error(status), "|", library.arft_cuda_last_error().decode())
"""


@pytest.mark.skipif(has_driver(), reason="there is a CUDA driver: a launch on host memory would succeed and then fail")
def test_without_a_gpu_it_reports_what_the_cuda_runtime_says() -> None:
    done = subprocess.run([sys.executable, "-c", SCORE], capture_output=True, text=True, check=True)
    status, message = done.stdout.strip().split(" | ")
    assert status == "the CUDA runtime refused" and re.search("driver|device", message)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"vocabulary": 2**31 - 1}, 2),
        ({"logits_dtype": 1}, 6),
        ({"logits_dtype": 2}, 6),  # a float32 gradient over bfloat16 logits would be wider
        ({"rows": 0}, 0),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused_before_cuda_is_asked(change: dict[str, int], status: int) -> None:
    somewhere = 4096  # never read: the refusal comes first, and no rows are no work
    pointers = ("logits", "gradient", "token_ids", "coefficient")
    fields = {"rows": 1, "vocabulary": 2, **dict.fromkeys(pointers, somewhere)} | change
    rows, transform = native_rows._Rows(**fields), native_rows._Transform(1.0, 0.0, 1.0)
    call = native._cuda_library().arft_cuda_policy_rows
    assert call(ctypes.byref(rows), ctypes.byref(transform), None, 0, None) == status


@pytest.fixture(scope="module")
def usage() -> dict[str, list[dict[str, int]]]:
    """Architecture -> the resources of each of its kernels."""
    tool = cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump: neither bundled with triton nor on PATH")
    run = subprocess.run([tool, "--dump-resource-usage", str(library())], capture_output=True, text=True, check=True)
    found: dict[str, list[dict[str, int]]] = {}
    for part in run.stdout.split("arch = ")[1:]:
        kernels = re.findall(r"policy_rows\w*:\s*(.*)", part)
        numbers = [{name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)} for line in kernels]
        found.setdefault(part.split()[0], []).extend(numbers)
    return found


def test_every_architecture_has_a_kernel_for_each_pair_of_dtypes(usage: dict[str, list[dict[str, int]]]) -> None:
    assert {arch: len(kernels) for arch, kernels in usage.items()} == dict.fromkeys(ARCHITECTURES, DTYPE_PAIRS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills_and_each_block_fits(usage: dict[str, list[dict[str, int]]], architecture: str) -> None:
    for kernel in usage[architecture]:
        assert kernel["STACK"] == 0 and kernel["LOCAL"] == 0
        assert kernel["REG"] * THREADS <= REGISTERS_OF_A_BLOCK
        assert 0 < kernel["SHARED"] <= STATIC_SHARED_BYTES
