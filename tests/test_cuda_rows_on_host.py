"""The CUDA row kernel without a GPU: ``csrc/policy_rows.cu``, compiled by g++ with the headers of ``cuda_on_host``.

They run the threads of a block in a random order between barriers and check that 16-byte moves are aligned. What nvcc
and a GPU make of the kernel does not show here: ``test_cuda_build.py`` and ``test_cuda_rows.py`` have that.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arft_fast.kernels import native, native_rows
from arft_fast.kernels.rows import KLS, SURROGATES, RowObjective, Transform, Vectors

from .native_row_runs import CAPPED, PLAIN, TRANSFORMS, nan_vectors
from .row_truth import Case, Results, assert_close, log_softmax_at_tokens, make_case, relative_error, truth
from .test_native_rows import CISPO, matrix

HEADERS, CSRC = (Path(__file__).parent / folder for folder in ("cuda_on_host", "../csrc"))
SOURCE = (CSRC / "policy_rows.cu").read_text()
LAUNCH = re.compile(r"(\w+)<<<(\w+), kThreads, .*>>>\((\w+)\);")  # kernel, blocks, argument
BARRIER = "__syncthreads();"
# Hidden symbols: libraries that differ by a fault share no state. A gradient lies over logits of another type.
FLAGS = ("-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing")
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
BOUNDS = {FLOAT32: 1e-5, BFLOAT16: 4e-3, FLOAT16: 1e-3}  # on the relative error of a gradient
PAIRS = [(FLOAT32, FLOAT32), (FLOAT32, BFLOAT16), (FLOAT32, FLOAT16), (BFLOAT16, BFLOAT16), (FLOAT16, FLOAT16)]
ROWS = 4  # one more than blocks


def has_compiler() -> bool:
    found = sys.platform == "linux" and shutil.which("g++") is not None
    return found and int(subprocess.check_output(["g++", "-dumpversion"]).split(b".")[0]) >= 12  # knows _Float16


pytestmark = pytest.mark.skipif(not has_compiler(), reason="needs Linux and g++ 12 or later")


def build(folder: Path, source: str) -> ctypes.CDLL:
    text, launches = LAUNCH.subn(r"cuda_on_host::launch(\1, \2, \3);", source)
    assert launches == 1
    path, library = folder / "policy_rows.cpp", folder / "libpolicy_rows.so"
    path.write_text(text)
    subprocess.run(["g++", *FLAGS, "-I", HEADERS, "-I", CSRC, path, "-o", library], check=True)
    loaded = native._load(library)
    loaded.arft_cuda_last_error.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("cuda_on_host"), SOURCE)


def launch(library: ctypes.CDLL, case: Case, gradient: Tensor | None, **vectors: Tensor | None) -> None:
    """Any of the three modes; the objective counts where there is an advantage."""
    rows = native_rows._rows(case.logits, case.token_ids, case.bias, gradient)
    native_rows._vectors(rows, case.logits, **{name: value for name, value in vectors.items() if value is not None})
    transform = ctypes.byref(native_rows._Transform(*case.transform))
    objective = ctypes.byref(native_rows._row_objective(case.objective)) if "advantage" in vectors else None
    status = library.arft_cuda_policy_rows(ctypes.byref(rows), transform, objective, 0, None)
    if status != 0:
        raise RuntimeError(f"{native.error(status)} ({library.arft_cuda_last_error().decode()})")


def run(library: ctypes.CDLL, case: Case, gradient: Tensor) -> Results:
    outputs = dict(zip(("logprobs", "entropy", "coefficient"), nan_vectors(case, 3), strict=True))
    names = ("advantage", "scale", "old_logprobs", "ref_logprobs", "sampler_logprobs")
    launch(library, case, gradient, **outputs, **dict(zip(names, case.vectors, strict=True)))
    return Results(*outputs.values(), gradient)


def compare(library: ctypes.CDLL, full: Case, dtype: torch.dtype, narrow: torch.dtype, start: int) -> None:
    """The gradient lies over logits in a wider matrix, from column ``start``: 0 aligns every row, 1 none."""
    case, (rows, vocabulary) = full.to(FLOAT32, dtype), full.logits.shape
    memory = torch.full((rows, (vocabulary + 15) // 8 * 8), 7.0, dtype=dtype)
    logits = memory[:, start : start + vocabulary]
    logits.copy_(case.logits)
    got, want = run(library, case._replace(logits=logits), logits.view(narrow)[:, :vocabulary]), truth(case)
    assert_close(got._replace(gradient=want.gradient), want, 1e-6, 1e-5)
    assert relative_error(got.gradient, want.gradient) <= BOUNDS[narrow], "gradient"
    assert (memory[:, :start] == 7).all() and (memory[:, start + vocabulary :] == 7).all()


@pytest.mark.parametrize("vocabulary", [1, 2, 63, 257, 1000, 8193])
@pytest.mark.parametrize(("dtype", "narrow"), PAIRS)
def test_a_gradient_over_the_logits_is_that_of_autograd(
    library: ctypes.CDLL, dtype: torch.dtype, narrow: torch.dtype, vocabulary: int
) -> None:
    for transform, biased, start in itertools.product((PLAIN, CAPPED), (False, True), (0, 1)):
        compare(library, make_case(ROWS, vocabulary, transform, CISPO, biased=biased), dtype, narrow, start)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_every_objective_has_the_gradient_that_autograd_finds(library: ctypes.CDLL, surrogate: str, kl: str) -> None:
    """One of 17; ``test_native_rows.py`` has them all, with the same maths."""
    choices = itertools.product(TRANSFORMS, (False, True), matrix(surrogate, kl))
    for transform, biased, (objective, old) in itertools.islice(choices, 0, None, 17):
        full = make_case(ROWS, 63, transform, objective, biased=biased)
        case = full if old else full._replace(vectors=full.vectors._replace(old=None))
        narrow = case.to(FLOAT32)
        assert_close(run(library, narrow, narrow.logits), truth(case), 1e-6, 1e-5)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_scoring_only_reads_the_logits(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    case = make_case(ROWS, 257, CAPPED, biased=True).to(FLOAT32, dtype)
    before, (logprobs, entropy) = case.logits.clone(), nan_vectors(case, 2)
    launch(library, case, None, logprobs=logprobs, entropy=entropy)
    want = log_softmax_at_tokens(before.double(), case)
    assert torch.equal(case.logits, before)
    assert relative_error(logprobs, want[0]) <= 1e-6 and relative_error(entropy, want[1]) <= 1e-6


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("unaligned", ["nothing", "bias", "gradient"])
def test_given_coefficients_yield_the_gradient_of_their_sum(
    library: ctypes.CDLL, transform: Transform, with_entropy: bool, unaligned: str
) -> None:
    full = make_case(ROWS, 1000, transform, biased=True)
    g, e = full.vectors.advantage, full.vectors.scale if with_entropy else None
    logits = full.logits.clone().requires_grad_()
    logp, entropy = log_softmax_at_tokens(logits, full)
    (want,) = torch.autograd.grad((g * logp).sum() + (0 if e is None else (e * entropy).sum()), logits)
    case, gradient = full.to(FLOAT32), torch.full((ROWS, 1008), math.nan)[:, unaligned == "gradient" :][:, :1000]
    if unaligned == "bias":
        case = case._replace(bias=torch.cat((case.bias[:1], case.bias))[1:])
    launch(library, case, gradient, coefficient=g.float(), entropy_weight=None if e is None else e.float())
    assert relative_error(gradient, want) <= 1e-5


@pytest.mark.parametrize("narrow", [FLOAT32, BFLOAT16])
def test_a_row_without_a_gradient_gets_zeros(library: ctypes.CDLL, narrow: torch.dtype) -> None:
    case = make_case(6, 65).to(FLOAT32)
    case.logits[1] = math.nan
    g, e = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0, -1.0]), torch.tensor([0.0, 0.0, 0.0, 3.0, 0.0, 0.0])
    gradient = case.logits.view(narrow)[:, :65]
    launch(library, case, gradient, coefficient=g, entropy_weight=e)
    assert [bool((row == 0).all()) for row in gradient] == [False, True, False, False, True, False]


def test_a_row_of_scale_zero_takes_no_part_whatever_its_inputs(library: ctypes.CDLL) -> None:
    objective = RowObjective(surrogate="cispo", kl="k2", beta=0.3, sampler="mask", entropy_coef=0.1)
    case, nothing = make_case(ROWS, 65, objective=objective).to(FLOAT32), torch.full((ROWS,), math.nan)
    case = case._replace(vectors=Vectors(nothing, torch.zeros(ROWS), nothing, nothing, nothing))
    got = run(library, case, torch.full_like(case.logits, math.nan))
    assert not (got.coefficient.any() or got.gradient.any()) and torch.stack(got[:2]).isfinite().all()


def test_neither_the_order_of_threads_nor_a_buffer_of_its_own_changes_a_bit(library: ctypes.CDLL) -> None:
    case = make_case(ROWS, 8193, CAPPED, CISPO).to(FLOAT32)
    apart = run(library, case, torch.full_like(case.logits, math.nan))
    assert all(torch.equal(a, b) for a, b in zip(apart, run(library, case, case.logits), strict=True))


def test_a_token_outside_the_vocabulary_is_a_trap(library: ctypes.CDLL) -> None:
    case = make_case(ROWS, 5).to(FLOAT32)
    case.token_ids[2] = 5
    with pytest.raises(RuntimeError, match="trap"):
        run(library, case, case.logits)


# ---- What it says of a kernel with a fault ----

FAULTY = make_case(ROWS, 8193, objective=CISPO), FLOAT32, BFLOAT16


@pytest.mark.parametrize("barrier", range(SOURCE.count(BARRIER)))
def test_a_kernel_without_one_of_its_barriers_is_wrong(tmp_path: Path, barrier: int) -> None:
    parts = SOURCE.split(BARRIER)
    without = build(tmp_path, BARRIER.join(parts[: barrier + 1]) + ";" + BARRIER.join(parts[barrier + 1 :]))
    for start in (0, 1):
        with pytest.raises((AssertionError, RuntimeError), match=r"gradient|logprobs|never come"):
            compare(without, *FAULTY, start)


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("a.vectorised = on_16_bytes", "a.vectorised = true || on_16_bytes", "misaligned address"),
        ("if (warp == 0) {", "if (warp == 0 && lane < 9) {", "never come"),
    ],
)
def test_a_fault_ends_the_launch(tmp_path: Path, right: str, wrong: str, message: str) -> None:
    assert SOURCE.count(right) == 1
    with pytest.raises(RuntimeError, match=message):
        compare(build(tmp_path, SOURCE.replace(right, wrong)), *FAULTY, start=1)
