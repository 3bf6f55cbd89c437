"""The whole family of objectives: every ``impl`` gives the gradient of the reference, and pays only for live rows."""

from itertools import product

import pytest
import torch

from arft_fast.kernels import head, linear_logprob, policy_loss
from arft_fast.kernels.objective import FAMILY, Objective
from arft_fast.kernels.rows import RowObjective

LENGTHS = [3, 0, 1, 4, 7]
WIDTH, VOCABULARY = 6, 37


class Problem:
    """Fifteen tokens in fp64, off-policy by 0.4 nat, with a forbidden id and a masked fifth."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        rows = sum(LENGTHS)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden = normal(rows, WIDTH).requires_grad_()
        self.weight = normal(VOCABULARY, WIDTH).requires_grad_()
        bias = normal(VOCABULARY)
        bias[5] = -torch.inf
        self.bias = bias.requires_grad_()
        self.ids = torch.randint(6, VOCABULARY, (rows,), generator=generator)
        self.cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
        self.advantages = normal(len(LENGTHS))
        self.mask = torch.rand(rows, generator=generator) > 0.2
        now = linear_logprob(self.hidden, self.weight, self.ids, bias=self.bias, impl="reference")[0].detach()
        self.old, self.ref, self.sampler = (now + 0.4 * normal(rows) for _ in range(3))

    def loss(self, **options):
        chosen = {"cu_seqlens": self.cu_seqlens, "bias": self.bias} | options
        return policy_loss(self.hidden, self.weight, self.ids, chosen.pop("advantages", self.advantages), **chosen)

    def gradients(self, loss):
        return torch.autograd.grad(loss, (self.hidden, self.weight, self.bias))


def options(problem, loss, off_policy, beta, corrected, entropy_coef, quantile, sampler, masked, level):
    return {
        "loss": loss,
        "level": None if loss == "gmpo" else level,
        "old_logprobs": problem.old if off_policy else None,
        "ref_logprobs": problem.ref if beta else None,
        "beta": beta,
        "kl_correction": corrected,
        "entropy_coef": entropy_coef,
        "top_entropy_quantile": quantile,
        "sampler_logprobs": problem.sampler,
        "sampler_correction": sampler,
        "sampler_clip": (0.5, 1.5),
        "mask": problem.mask if masked else None,
        "denominator": 11.0 if loss == "dr_grpo" else None,
        "temperature": 0.9,
        "softcap": 5.0,
    }


CASES = list(
    product(
        (False, True),  # off-policy
        (0.0, 0.1),  # beta
        (False, True),  # KL correction
        (0.0, 0.05),  # entropy bonus
        (1.0, 0.5),  # top-entropy quantile
        ("none", "token_truncate", "token_mask", "sequence_mask"),
        (False, True),  # mask
        (None, "sequence"),
    )
)


@pytest.mark.parametrize("loss", FAMILY)
def test_every_objective_has_the_gradient_of_its_reference(loss, every_impl):
    problem = Problem()
    budgets = {"chunk_bytes": 3 * VOCABULARY * 8, "stash_bytes": 5 * VOCABULARY * 8}
    for case in CASES[:: {"native": 3, "triton": 131, "reference": 37}[every_impl]]:
        settings = options(problem, loss, *case)
        expected, expected_stats = problem.loss(impl="reference", **settings)
        actual, stats = problem.loss(impl=every_impl, measure_all=True, **budgets, **settings)
        wanted = {name: value for name, value in expected_stats.items() if name != "gradient_rows"}
        stats.pop("gradient_rows")
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12, msg=lambda m, case=case: f"{case}: {m}")
        torch.testing.assert_close(stats, wanted, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            problem.gradients(actual), problem.gradients(expected), rtol=1e-9, atol=1e-11,
            msg=lambda m, case=case: f"{case}: {m}",
        )  # fmt: skip


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("clip", [{}, {"delta": 1.1}, {"dual_clip": 1.2}, {"delta": 2.0, "dual_clip": 3.0}])
def test_kl_estimates_and_clips_have_the_gradient_of_the_reference(kl, clip, impl):
    problem = Problem(seed=1)
    settings = {"kl": kl, "beta": 0.3, "old_logprobs": problem.old - 0.3, "ref_logprobs": problem.ref, **clip}
    for corrected in (False, True):
        expected, _ = problem.loss(impl="reference", kl_correction=corrected, **settings)
        actual, _ = problem.loss(impl=impl, kl_correction=corrected, **settings)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(problem.gradients(actual), problem.gradients(expected))


@pytest.mark.parametrize("loss", FAMILY)
def test_gradcheck(loss, impl):
    problem = Problem(seed=2)
    settings = {"loss": loss, "old_logprobs": problem.old, "ref_logprobs": problem.ref, "beta": 0.1}
    settings |= {"entropy_coef": 0.1, "denominator": 7.0}
    if loss == "cispo":  # its ratio is a constant to autograd, and not to a finite difference
        settings |= {"old_logprobs": None, "level": None}
    bias = problem.bias.detach()

    def function(hidden, weight):
        arguments = {"cu_seqlens": problem.cu_seqlens, "bias": bias, "impl": impl, **settings}
        return policy_loss(hidden, weight, problem.ids, problem.advantages, **arguments)[0]

    assert torch.autograd.gradcheck(function, (problem.hidden, problem.weight))


def test_the_settings_pass_through_plain_numbers_unchanged():
    row = RowObjective(surrogate="sapo", kl="k2", kl_correction=True, sampler="mask", beta=0.25, delta=3.5)
    objective = Objective(row=row, gmpo=False, level="sequence", sampler_level="sequence", top_entropy_quantile=0.2)
    assert Objective.from_numbers(objective.to_numbers()) == objective
    assert Objective.from_numbers(Objective().to_numbers()) == Objective()


def test_single_tokens_need_no_sequences(impl):
    problem = Problem()
    per_token = problem.advantages.repeat_interleave(torch.tensor(LENGTHS))
    settings = {"loss": "dapo", "old_logprobs": problem.old, "impl": impl}
    alone, _ = problem.loss(cu_seqlens=None, advantages=per_token, **settings)
    torch.testing.assert_close(alone, problem.loss(**settings)[0])
    torch.testing.assert_close(alone, problem.loss(advantages=per_token, **settings)[0])


@pytest.fixture
def rows_multiplied(monkeypatch):
    """Counts rows that go through products: ``forward``, and ``backward`` for both gradients together."""
    counts = {"forward": 0, "backward": 0, "weight": 0}
    products, add, add_weight = head.Head.products, head.Gradients.add, head.Gradients._add_weight

    def count_products(self, rows, out):
        counts["forward"] += len(rows)
        return products(self, rows, out)

    def count_add(self, index, rows, gradient):
        counts["backward"] += len(rows)
        add(self, index, rows, gradient)

    def count_weight(self, gradient, rows):
        counts["weight"] += len(rows)
        add_weight(self, gradient, rows)

    monkeypatch.setattr(head.Head, "products", count_products)
    monkeypatch.setattr(head.Gradients, "add", count_add)
    monkeypatch.setattr(head.Gradients, "_add_weight", count_weight)
    return counts


SECOND_HALF = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])


def test_rows_without_an_advantage_are_not_even_scored(rows_multiplied):
    loss, stats = Problem().loss(advantages=SECOND_HALF, impl="native")
    assert rows_multiplied == {"forward": 7, "backward": 7, "weight": 7}
    assert stats["tokens"] == stats["gradient_rows"] == 7 and loss.requires_grad


def test_rows_without_an_advantage_are_scored_where_statistics_want_them(rows_multiplied):
    _, stats = Problem().loss(advantages=SECOND_HALF, impl="native", measure_all=True)
    assert rows_multiplied == {"forward": 15, "backward": 7, "weight": 7}
    assert stats["tokens"] == 15


def test_a_kl_term_keeps_rows_without_an_advantage(rows_multiplied):
    problem = Problem()
    problem.loss(advantages=SECOND_HALF, impl="native", ref_logprobs=problem.ref, beta=0.1)
    assert rows_multiplied["backward"] == 15


def test_clipped_rows_are_left_out_of_the_gradient_products(rows_multiplied):
    problem = Problem()
    above = problem.old - 1.5  # every ratio is far above the range
    loss, stats = problem.loss(advantages=torch.ones(5), old_logprobs=above, impl="native")
    assert rows_multiplied["forward"] == 15 and rows_multiplied["backward"] < 15
    assert stats["gradient_rows"] == rows_multiplied["backward"]
    expected, _ = problem.loss(advantages=torch.ones(5), old_logprobs=above, impl="reference")
    torch.testing.assert_close(problem.gradients(loss), problem.gradients(expected))


def test_masked_rows_take_no_part(rows_multiplied):
    problem = Problem()
    loss, _ = problem.loss(mask=problem.mask, impl="native")
    assert rows_multiplied["forward"] == rows_multiplied["backward"] == int(problem.mask.sum()) < 15
    gradient, *_ = problem.gradients(loss)
    assert torch.equal(gradient[~problem.mask], torch.zeros_like(gradient[~problem.mask]))


def test_a_frozen_head_saves_the_third_product(rows_multiplied):
    problem = Problem()
    problem.weight = problem.weight.detach()
    problem.loss(impl="native")
    assert rows_multiplied == {"forward": 15, "backward": 15, "weight": 0}


@torch.no_grad()
def test_without_gradients_there_is_one_product(rows_multiplied):
    Problem().loss(impl="native")
    assert rows_multiplied == {"forward": 15, "backward": 0, "weight": 0}


@pytest.mark.parametrize("stash_rows", [0, 7, 15])
def test_a_coupled_loss_computes_again_only_what_was_not_stashed(rows_multiplied, stash_rows):
    problem = Problem()
    loss, _ = problem.loss(
        loss="gspo", old_logprobs=problem.old, impl="native", stash_bytes=stash_rows * VOCABULARY * 8, epsilon_low=10.0
    )
    assert rows_multiplied["forward"] == 15
    problem.gradients(loss)
    assert rows_multiplied["forward"] == 15 + 15 - stash_rows and rows_multiplied["backward"] == 15


def test_the_top_entropy_quantile_pays_for_its_share_of_rows(rows_multiplied):
    problem = Problem()
    loss, _ = problem.loss(impl="native", top_entropy_quantile=0.2)
    problem.gradients(loss)
    assert rows_multiplied["backward"] == 3


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_a_second_backward_pass_adds_the_same_gradient(loss, every_impl):
    problem = Problem()
    total, _ = problem.loss(loss=loss, old_logprobs=problem.old, impl=every_impl)
    total.backward(retain_graph=True)
    once = problem.weight.grad.clone()
    (3 * total).backward()
    torch.testing.assert_close(problem.weight.grad, 4 * once)


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_two_runs_agree_to_the_last_bit(loss, every_impl):
    runs = []
    for _ in range(2):
        problem = Problem()
        total, _ = problem.loss(loss=loss, old_logprobs=problem.old, impl=every_impl, chunk_bytes=4 * VOCABULARY * 8)
        runs.append((total, *problem.gradients(total)))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
