"""Row kernels of the native CPU library against autograd in float64: objectives, shapes, modes, threads, refusals.

``test_native_rows_digits.py`` has the numbers at the edges, ``test_cuda_rows.py`` the same kernels on a GPU.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arft_fast.kernels import native, native_rows
from arft_fast.kernels.rows import KLS, SAMPLER_CORRECTIONS, SURROGATES, RowObjective, Transform, Vectors

from . import native_row_runs
from .native_row_runs import CAPPED, ISAS, PLAIN, TRANSFORMS, every_isa, nan_vectors, run
from .row_truth import Case, Results, assert_close, log_softmax_at_tokens, make_case, relative_error, truth

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library is not built")

isa = native_row_runs.isa  # a fixture
HEADER = Path(__file__).parent.parent / "csrc" / "arft.h"
FLOAT64 = (1e-12, 1e-12)  # bounds forward and backward
FLOAT32 = (1e-6, 1e-5)
CISPO = RowObjective(surrogate="cispo", beta=0.3, entropy_coef=0.05)  # uses every part, and leaves no row without
CLIPS = {"delta": 1.6, "ratio_low": 0.8, "ratio_high": 1.28}
SAMPLERS = {"sampler_low": 0.7, "sampler_high": 1.5}


def as_float32(case: Case) -> Case:
    return case.to(torch.float32)


# ---- The matrix of objectives ----


def matrix(surrogate: Any, kl: Any) -> Iterator[tuple[RowObjective, bool]]:
    """(objective, with old) for everything but the surrogate and the KL estimate."""
    choices = itertools.product((False, True), (0.0, 0.3), SAMPLER_CORRECTIONS, (0.0, 0.05), (False, True))
    for correction, beta, sampler, entropy_coef, old in choices:
        settings: dict[str, Any] = {"kl_correction": correction, "beta": beta, "sampler": sampler}
        settings["dual_clip"] = 1.4 if correction else math.inf  # below delta it hides it
        settings |= {"entropy_coef": entropy_coef, **CLIPS, **SAMPLERS}
        yield RowObjective(surrogate=surrogate, kl=kl, **settings), old


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_every_objective_has_the_gradient_that_autograd_finds(surrogate: str, kl: str) -> None:
    for transform, biased in itertools.product(TRANSFORMS, (False, True)):
        full = make_case(24, 63, transform, biased=biased)
        for objective, old in matrix(surrogate, kl):
            case = full._replace(objective=objective)
            case = case if old else case._replace(vectors=case.vectors._replace(old=None))
            want = truth(case)
            assert_close(run(case), want, *FLOAT64)
            assert_close(run(as_float32(case)), want, *FLOAT32)


@pytest.mark.parametrize("absent", ["ref", "sampler"])
def test_a_vector_that_the_objective_does_not_use_may_be_absent(absent: str) -> None:
    case = make_case(8, 63, objective=RowObjective(beta=0.0 if absent == "sampler" else 0.3))
    case = case._replace(vectors=case.vectors._replace(**{absent: None}))
    assert_close(run(case), truth(case), *FLOAT64)


CHANGES: tuple[dict[str, Any], ...] = (
    {"surrogate": "cispo"},
    {"ratio_low": 0.77},
    {"ratio_high": 1.29},
    {"delta": 1.45},
    {"dual_clip": 1.4},
    {"beta": 0.301},
    {"kl": "k2"},
    {"kl_correction": True},
    {"sampler": "truncate"},
    {"sampler_low": 0.71},
    {"sampler_high": 1.4},
)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_the_comparison_sees_a_setting_that_is_slightly_off(change: dict[str, Any]) -> None:
    settings: dict[str, Any] = {**CLIPS, **SAMPLERS, "beta": 0.3, "sampler": "mask"}
    case = make_case(300, 63, objective=RowObjective(**settings))
    wrong = run(case._replace(objective=RowObjective(**(settings | change))))
    with pytest.raises(AssertionError, match="coefficient"):
        assert_close(wrong, truth(case), *FLOAT32)


# ---- Shapes ----


@every_isa
@pytest.mark.parametrize("vocabulary", [2, 63, 257, 1000, 32001])
def test_every_instruction_set_agrees_with_autograd_at_every_size(isa: str, vocabulary: int) -> None:
    for transform, biased in itertools.product((PLAIN, CAPPED), (False, True)):
        case = make_case(8, vocabulary, transform, CISPO, biased=biased)
        want = truth(case)
        assert_close(run(case), want, *FLOAT64)
        assert_close(run(as_float32(case)), want, *FLOAT32)


@every_isa
def test_the_only_id_of_a_vocabulary_is_certain(isa: str) -> None:
    got = run(as_float32(make_case(3, 1, CAPPED, CISPO)))
    assert not got.logprobs.any() and not got.entropy.any() and not got.gradient.any()


@pytest.mark.parametrize("rows", [1, 2, 3, 17, 64, 65, 300])
def test_any_number_of_rows(rows: int) -> None:
    case = make_case(rows, 129, objective=RowObjective(surrogate="sapo"))
    assert_close(run(as_float32(case)), truth(case), *FLOAT32)


def test_no_rows_are_no_work() -> None:
    case = as_float32(make_case(4, 5))
    vectors = Vectors(*(None if v is None else v[:0] for v in case.vectors))
    empty = case._replace(logits=case.logits[:0], token_ids=case.token_ids[:0], vectors=vectors)
    assert run(empty).gradient.shape == (0, 5)


def test_more_than_65536_rows(two_threads: None) -> None:
    case = make_case(65_537, 3, objective=CISPO)
    assert_close(run(as_float32(case)), truth(case), *FLOAT32)


def test_row_starts_past_two_to_the_31_elements() -> None:
    """Memory that is never touched costs nothing: two rows, far apart."""
    case, pitch = as_float32(make_case(2, 257, objective=CISPO)), 2**31 + 3
    far = torch.empty(pitch + 257).as_strided((2, 257), (pitch, 1))
    far.copy_(case.logits)
    want, outs = run(case), nan_vectors(case, 3)
    native_rows.policy(far, *case[1:], *outs, far)
    assert torch.equal(far, want.gradient) and torch.equal(outs[0], want.logprobs)


def test_rows_of_a_wider_matrix_leave_the_rest_of_it_alone() -> None:
    case = as_float32(make_case(5, 65, objective=CISPO))
    wide, into = torch.full((5, 80), 7.0), torch.full((5, 71), 7.0)
    logits, gradient = wide[:, 3:68], into[:, 1:66]
    logits.copy_(case.logits)
    native_rows.policy(logits, *case[1:], *nan_vectors(case, 3), gradient)
    assert torch.equal(gradient, run(case).gradient) and torch.equal(logits, case.logits)
    assert (wide[:, :3] == 7).all() and (wide[:, 68:] == 7).all()
    assert (into[:, :1] == 7).all() and (into[:, 66:] == 7).all()


# ---- The three modes ----


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scoring_only_reads_the_logits(isa: str, dtype: torch.dtype) -> None:
    wide = make_case(9, 257, CAPPED, biased=True)
    case = wide.to(dtype)
    before, (logprobs, entropy) = case.logits.clone(), nan_vectors(case, 2)
    native_rows.score(*case[:4], logprobs, entropy)
    want = log_softmax_at_tokens(wide.logits, wide)
    assert torch.equal(case.logits, before)
    assert relative_error(logprobs, want[0]) <= 1e-6 and relative_error(entropy, want[1]) <= 1e-6


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_given_coefficients_yield_the_gradient_of_their_sum(transform: Transform, with_entropy: bool) -> None:
    wide = make_case(33, 1000, transform, biased=True)
    g, e = wide.vectors.advantage, wide.vectors.scale if with_entropy else None
    logits = wide.logits.clone().requires_grad_()
    logp, entropy = log_softmax_at_tokens(logits, wide)
    (want,) = torch.autograd.grad((g * logp).sum() + (0 if e is None else (e * entropy).sum()), logits)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        case, gradient = wide.to(dtype), torch.full_like(want, math.nan, dtype=dtype)
        native_rows.gradients(*case[:4], g.to(dtype), None if e is None else e.to(dtype), gradient)
        assert relative_error(gradient, want) <= bound


def test_a_row_without_a_gradient_gets_zeros() -> None:
    case = as_float32(make_case(6, 65))
    g = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0, -1.0])
    e = torch.tensor([0.0, 0.0, 0.0, 3.0, 0.0, 0.0])
    gradient = torch.full_like(case.logits, math.nan)
    native_rows.gradients(*case[:4], g, e, gradient)
    assert [bool((row == 0).all()) for row in gradient] == [False, True, False, False, True, False]


def test_a_row_of_scale_zero_takes_no_part_whatever_its_inputs() -> None:
    objective = RowObjective(surrogate="cispo", kl="k2", beta=0.3, sampler="mask", entropy_coef=0.1)
    case, nothing = as_float32(make_case(4, 65, objective=objective)), torch.full((4,), math.nan)
    case = case._replace(vectors=Vectors(nothing, torch.zeros(4), nothing, nothing, nothing))
    got = run(case)
    assert not got.coefficient.any() and not got.gradient.any()
    assert got.logprobs.isfinite().all() and got.entropy.isfinite().all()


@every_isa
def test_in_place_gives_the_same_bits_as_a_buffer_of_its_own(isa: str) -> None:
    case = as_float32(make_case(5, 1000, CAPPED, CISPO))
    apart = torch.full_like(case.logits, math.nan)
    native_rows.policy(*case, *nan_vectors(case, 3), apart)
    assert torch.equal(apart, run(case).gradient)


@every_isa
@pytest.mark.parametrize(("rows", "vocabulary"), [(20_000, 7), (101, 5000)])
def test_the_number_of_threads_changes_no_bit(isa: str, rows: int, vocabulary: int, two_threads: None) -> None:
    case = as_float32(make_case(rows, vocabulary, objective=CISPO, biased=True))
    two, again = run(case), run(case)
    torch.set_num_threads(1)
    one = run(case)
    assert same_bits(two, again) and same_bits(one, two)


def same_bits(a: Results, b: Results) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


THREADS = """
import os, torch
from arft_fast.kernels import native_rows
from arft_fast.kernels.rows import Transform
torch.set_num_threads(2)
def runtimes(): return {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rsplit("/", 1)[-1]}
def threads(): return len(os.listdir("/proc/self/task"))
before, outs = (runtimes(), threads()), torch.empty(2, 64)
native_rows.score(torch.zeros(64, 4096), torch.zeros(64, dtype=torch.int64), None, Transform(), *outs)
ours = threads()
torch.zeros(64, 65536).exp_()
print(runtimes() == before[0], ours - before[1], threads() - ours)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc, and OpenMP is used on Linux only")
def test_the_library_runs_on_the_threads_of_torch() -> None:
    """A runtime of its own would be a second library and a second pool: it starts one thread, and torch none more."""
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "1", "0"]


# ---- The boundary ----


def test_the_structs_have_the_fields_of_the_header() -> None:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    types = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "double": ctypes.c_double}
    structs = {
        "arft_transform": native_rows._Transform,
        "arft_row_objective": native_rows._RowObjective,
        "arft_rows": native_rows._Rows,
    }
    for name, struct in structs.items():
        body = re.search(r"typedef struct \{([^}]*)\} " + name + ";", text)
        assert body
        fields = []
        for kind, names in re.findall(r"((?:const )?\w+\*?) ([\w, ]+);", body[1]):
            fields += [(field.strip(), types.get(kind, ctypes.c_void_p)) for field in names.split(",")]
        assert tuple(fields) == tuple(struct._fields_)


def test_the_enums_have_the_order_of_the_header() -> None:
    text = HEADER.read_text()
    for prefix, names in (("", SURROGATES), ("", KLS), ("SAMPLER_", SAMPLER_CORRECTIONS), ("ISA_", ISAS)):
        for number, name in enumerate(names):
            assert f"ARFT_{prefix}{name.upper()} = {number}" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": torch.tensor([0, 5])}, "a token id lies outside the vocabulary"),
        ({"token_ids": torch.tensor([-1, 0])}, "a token id lies outside the vocabulary"),
        ({"transform": Transform(temperature=0.0)}, "temperature"),
        ({"transform": Transform(logit_scale=-1.0)}, "logit_scale"),
        ({"transform": Transform(softcap=math.inf)}, "softcap"),
        ({"logits": torch.zeros(2, 5, dtype=torch.bfloat16)}, "dtypes"),
    ],
)
def test_a_refusal_says_what_was_wrong(change: dict[str, Any], message: str) -> None:
    arguments = {"logits": torch.zeros(2, 5), "token_ids": torch.tensor([0, 4]), "transform": PLAIN} | change
    with pytest.raises(RuntimeError, match=message):
        native_rows.score(**arguments, bias=None, logprobs=torch.zeros(2), entropy=torch.zeros(2))


def test_an_instruction_set_that_the_build_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_rows, "_FORCED_ISA", 3)
    with pytest.raises(RuntimeError, match="instruction set"):
        native_rows.score(torch.zeros(1, 2), torch.tensor([0]), None, PLAIN, torch.zeros(1), torch.zeros(1))


def gradient_of(logits: Tensor, gradient: Tensor) -> None:
    rows = len(logits)
    native_rows.gradients(logits, torch.zeros(rows, dtype=torch.int64), None, PLAIN, torch.ones(rows), None, gradient)


def test_a_gradient_over_the_logits_with_other_row_starts_is_refused() -> None:
    memory = torch.zeros(64)
    with pytest.raises(AssertionError, match="row starts"):
        gradient_of(memory[:20].view(2, 10), memory.as_strided((2, 10), (11, 1)))


def test_a_gradient_that_is_wider_than_the_logits_is_refused() -> None:
    with pytest.raises(AssertionError, match="wider"):
        gradient_of(torch.zeros(2, 10), torch.zeros(2, 10, dtype=torch.float64))
