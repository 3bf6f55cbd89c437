"""Row kernels of the native CUDA library against autograd in float64; they need a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from arft_fast.kernels import native_rows
from arft_fast.kernels.rows import KLS, SURROGATES, RowObjective

from .native_row_runs import CAPPED, PLAIN, TRANSFORMS, nan_vectors, run
from .row_truth import assert_close, log_softmax_at_tokens, make_case, relative_error, truth
from .test_native_rows import CISPO, matrix

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not native_rows.available(torch.device("cuda")), reason="no GPU, or libarft_cuda.so is not built"
    ),
]


@pytest.mark.parametrize("vocabulary", [2, 63, 257, 8192, 32001, 152_064])
@pytest.mark.parametrize(("narrow", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
def test_a_gradient_may_lie_over_the_logits_in_a_narrower_dtype(
    vocabulary: int, narrow: torch.dtype, bound: float
) -> None:
    for transform, biased in itertools.product((PLAIN, CAPPED), (False, True)):
        wide = make_case(7, vocabulary, transform, CISPO, biased=biased, device="cuda")
        case, want = wide.to(torch.float32), truth(wide)
        (logprobs, entropy, coefficient), gradient = nan_vectors(case, 3), case.logits.view(narrow)[:, :vocabulary]
        native_rows.policy(*case, logprobs, entropy, coefficient, gradient)
        assert relative_error(logprobs, want.logprobs) <= 1e-6 and relative_error(entropy, want.entropy) <= 1e-6
        assert relative_error(coefficient, want.coefficient) <= 1e-5
        assert relative_error(gradient, want.gradient) <= bound


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_every_objective_has_the_gradient_that_autograd_finds(surrogate: str, kl: str) -> None:
    for transform, biased in itertools.product(TRANSFORMS, (False, True)):
        full = make_case(24, 63, transform, biased=biased, device="cuda")
        for objective, old in matrix(surrogate, kl):
            case = full._replace(objective=objective)
            case = case if old else case._replace(vectors=case.vectors._replace(old=None))
            assert_close(run(case.to(torch.float32)), truth(case), 1e-6, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_have_statistics_in_float32(dtype: torch.dtype) -> None:
    case = make_case(300, 32001, device="cuda").to(torch.float32, dtype)
    logprobs, entropy = nan_vectors(case, 2)
    native_rows.score(*case[:4], logprobs, entropy)
    want = log_softmax_at_tokens(case.logits.double(), case)
    assert relative_error(logprobs, want[0]) <= 1e-6 and relative_error(entropy, want[1]) <= 1e-6


def test_two_runs_give_the_same_bits() -> None:
    case = make_case(65_537, 9, objective=RowObjective(beta=0.1), device="cuda").to(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(run(case), run(case), strict=True))
