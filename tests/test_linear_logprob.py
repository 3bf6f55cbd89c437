"""Log-probs and entropy from hidden states, against the full log-softmax."""

import math
from functools import partial

import pytest
import torch

from arft_fast import kernels
from arft_fast.kernels import linear_logprob

SHAPES = [(1, 1, 2), (5, 63, 257), (257, 8, 63), (63, 16, 1000)]


@pytest.fixture(autouse=True)
def with_each_implementation(impl, monkeypatch):
    """Each test below runs once with every ``impl``."""
    monkeypatch.setitem(globals(), "linear_logprob", partial(kernels.linear_logprob, impl=impl))


def problem(rows, width, vocabulary, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rows + vocabulary)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    ids = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), ids


def by_hand(hidden, weight, ids, bias=0.0, temperature=1.0):
    """Probabilities from exponentials, no log_softmax: independent of the implementation; for small fp64 logits."""
    mass = torch.exp((hidden @ weight.T + bias) / temperature)
    p = mass / mass.sum(1, keepdim=True)
    entropy = torch.stack([-sum(q * q.log() for q in row if q > 0) for row in p.unbind()])
    return p[torch.arange(len(ids)), ids].log(), entropy


def gradients(outputs, inputs):
    """Of a sum in which every row and both outputs have a weight of their own."""
    logprobs, entropy = outputs
    rows = torch.arange(1, len(logprobs) + 1, dtype=logprobs.dtype)
    return torch.autograd.grad((logprobs * rows).sum() + (entropy * rows.flip(0)).sum(), inputs)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_equals_the_definition(shape, temperature):
    hidden, weight, ids = problem(*shape)
    bias = torch.randn(shape[2], dtype=torch.float64)
    actual = linear_logprob(hidden, weight, ids, bias=bias, temperature=temperature)
    expected = by_hand(hidden, weight, ids, bias, temperature)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual, (hidden, weight)), gradients(expected, (hidden, weight)))


def test_the_temperature_is_not_ignored():
    hidden, weight, ids = problem(3, 4, 7)
    plain, warm = (linear_logprob(hidden, weight, ids, temperature=t)[0] for t in (1.0, 1.1))
    assert (plain - warm).abs().max() > 1e-3


@pytest.mark.parametrize("chunk_rows", [1, 2, 5])
def test_gradcheck(chunk_rows):
    hidden, weight, ids = problem(5, 3, 7)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)

    def function(hidden, weight, bias):
        return linear_logprob(hidden, weight, ids, bias=bias, temperature=0.9, chunk_bytes=chunk_rows * 7 * 8)

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk_rows", [1, 7, 64])
def test_chunks_change_nothing(shape, chunk_rows):
    hidden, weight, ids = problem(*shape)
    whole = linear_logprob(hidden, weight, ids)
    parts = linear_logprob(hidden, weight, ids, chunk_bytes=chunk_rows * shape[2] * 8)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(gradients(parts, (hidden, weight)), gradients(whole, (hidden, weight)))


def kept_for_backward(**budgets):
    """Elements of the largest tensor, weight aside, that the forward pass of 64 rows and 500 ids keeps."""
    hidden, weight, ids = problem(64, 4, 500, torch.float32)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel() if tensor.data_ptr() != weight.data_ptr() else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear_logprob(hidden, weight, ids, **budgets)
    return max(kept, default=0)


def test_no_logits_are_kept_for_the_backward_pass_beyond_the_stash(impl):
    assert kept_for_backward(chunk_bytes=8 * 500 * 4, stash_bytes=0) < 500
    if impl != "reference":  # which keeps all or nothing
        assert kept_for_backward(chunk_bytes=8 * 500 * 4, stash_bytes=20 * 500 * 4) == 20 * 500


def test_what_fits_in_one_chunk_is_kept_and_not_computed_twice():
    assert kept_for_backward(chunk_bytes=64 * 500 * 4) == 64 * 500


@pytest.mark.parametrize("stash_rows", [0, 3, 4, 9])
def test_the_stash_changes_nothing(stash_rows):
    hidden, weight, ids = problem(9, 5, 11)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    whole = linear_logprob(hidden, weight, ids, bias=bias)
    parts = linear_logprob(hidden, weight, ids, bias=bias, chunk_bytes=2 * 11 * 8, stash_bytes=stash_rows * 11 * 8)
    torch.testing.assert_close(parts, whole)
    operands = (hidden, weight, bias)
    torch.testing.assert_close(gradients(parts, operands), gradients(whole, operands))


@pytest.mark.parametrize("chunk_rows", [2, 100])
def test_forbidden_ids_have_no_mass_and_no_gradient(chunk_rows):
    hidden, weight, ids = problem(6, 5, 9)
    allowed = torch.tensor([0, 2, 3, 6, 8])
    bias = torch.full((9,), -math.inf, dtype=torch.float64)
    bias[allowed] = torch.randn(5, dtype=torch.float64)
    position = ids % 5
    actual = linear_logprob(hidden, weight, allowed[position], bias=bias, chunk_bytes=chunk_rows * 9 * 8)
    expected = by_hand(hidden, weight[allowed], position, bias[allowed])
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual, (hidden, weight)), gradients(expected, (hidden, weight)))


def test_a_token_that_is_itself_forbidden_has_logprob_minus_infinity():
    hidden, weight, _ = problem(2, 3, 4)
    bias = torch.tensor([0.0, -math.inf, 0.0, 0.0])
    logprobs, entropy = linear_logprob(hidden, weight, torch.tensor([1, 2]), bias=bias)
    assert logprobs[0] == -math.inf and logprobs[1].isfinite() and entropy.isfinite().all()


def test_peaked_and_huge_logits_stay_finite():
    hidden = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    outputs = linear_logprob(hidden, weight, torch.tensor([0, 0, 2]))
    torch.testing.assert_close(outputs[0], torch.tensor([0.0, -2e4, -math.log(3)]))
    torch.testing.assert_close(outputs[1], torch.tensor([0.0, 0.0, math.log(3)]))
    assert all(gradient.isfinite().all() for gradient in gradients(outputs, (hidden, weight)))


@pytest.mark.parametrize("chunk_rows", [4, 100])
def test_bfloat16_operands_are_computed_in_float32(chunk_rows):
    hidden, weight, ids = problem(21, 16, 63, torch.bfloat16)
    actual = linear_logprob(hidden, weight, ids, chunk_bytes=chunk_rows * 63 * 4)
    upcast = [operand.detach().double().requires_grad_() for operand in (hidden, weight)]
    expected = linear_logprob(*upcast, ids)
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients(actual, (hidden, weight)), gradients(expected, upcast), strict=True):
        assert got.dtype == torch.bfloat16
        # One rounding to bfloat16 (8 bits) at the end, not one for each chunk.
        torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-3)


def test_autocast_does_not_blur_the_logits():
    hidden, weight, ids = problem(9, 16, 63, torch.float32)
    plain = linear_logprob(hidden, weight, ids, chunk_bytes=4 * 63 * 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_logprob(hidden, weight, ids, chunk_bytes=4 * 63 * 4)
        assert (hidden @ weight.T).dtype == torch.bfloat16  # autocast is really on
    assert torch.equal(cast[0], plain[0]) and torch.equal(cast[1], plain[1])
    for got, want in zip(gradients(cast, (hidden, weight)), gradients(plain, (hidden, weight)), strict=True):
        assert torch.equal(got, want)


def test_int32_ids_are_accepted():
    hidden, weight, ids = problem(9, 4, 11)
    assert torch.equal(linear_logprob(hidden, weight, ids.int())[0], linear_logprob(hidden, weight, ids)[0])


def test_no_rows_stay_connected_to_the_graph():
    hidden, weight, ids = problem(0, 4, 11)
    logprobs, entropy = linear_logprob(hidden, weight, ids)
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert hidden.grad.shape == (0, 4) and torch.equal(weight.grad, torch.zeros(11, 4, dtype=torch.float64))


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, ids = problem(9, 4, 11)
    frozen = weight.detach()
    linear_logprob(hidden, frozen, ids, chunk_bytes=2 * 11 * 8)[0].sum().backward()
    assert frozen.grad is None and hidden.grad.abs().sum() > 0


H, W, IDS = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)
BAD = [
    ((None, W, IDS), {}, TypeError, "hidden: expected a torch.Tensor"),
    ((H.long(), W, IDS), {}, TypeError, "hidden: expected a floating dtype"),
    ((H[0], W, IDS), {}, ValueError, r"hidden: expected shape \[N, D\]"),
    ((H, W[:, :3], IDS), {}, ValueError, r"weight: expected shape \[V, D\] with D=4 \(from hidden\)"),
    ((H, W[:0], IDS), {}, ValueError, "weight: has no rows"),
    ((H, W.to("meta"), IDS), {}, ValueError, r"weight: is on meta but hidden on cpu; move it"),
    ((H, W, IDS[:2]), {}, ValueError, r"token_ids: expected shape \[N\] with N=3"),
    ((H, W, IDS.float()), {}, TypeError, "token_ids: expected a integer dtype"),
    ((H, W, IDS + 5), {}, ValueError, r"token_ids: ids must lie in 0 \.\. 4"),
    ((H, W, IDS - 100), {}, ValueError, r"token_ids: ids must lie in 0 \.\. 4"),
    ((H, W, IDS), {"bias": torch.zeros(4)}, ValueError, r"bias: expected shape \[V\] with V=5"),
    ((H, W, IDS), {"bias": torch.full((5,), math.nan)}, ValueError, "bias: must be finite, or -inf"),
    ((H, W, IDS), {"bias": torch.full((5,), math.inf)}, ValueError, "bias: must be finite, or -inf"),
    ((H, W, IDS), {"bias": torch.full((5,), -math.inf)}, ValueError, "bias: .* one finite entry"),
    ((H, W, IDS), {"temperature": 0.0}, ValueError, "temperature: must be finite and > 0"),
    ((H, W, IDS), {"temperature": math.nan}, ValueError, "temperature: must be finite and > 0"),
    ((H, W, IDS), {"chunk_bytes": 0}, ValueError, "chunk_bytes: must be > 0"),
    ((H, W, IDS), {"chunk_bytes": 1e6}, TypeError, "chunk_bytes: expected an int"),
    ((H, W, IDS), {"impl": "fused"}, ValueError, "impl: must be one of 'auto', 'triton', 'native'"),
]


@pytest.mark.parametrize(("operands", "options", "error", "message"), BAD)
def test_a_bad_argument_is_named_with_its_remedy(operands, options, error, message):
    with pytest.raises(error, match=message):
        linear_logprob(*operands, **options)
