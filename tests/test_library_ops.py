"""The kernels as ``torch.library`` operators: schemas, fakes, autograd, ``torch.compile``; and sharded weights."""

import pytest
import torch

from arft_fast.kernels import linear_logprob, policy_loss
from arft_fast.kernels.objective import Objective

WIDTH, VOCABULARY = 6, 37
FUSED = pytest.mark.parametrize("every_impl", ["native", "triton"], indirect=True)


def problem(lengths):
    generator = torch.Generator().manual_seed(len(lengths))
    rows = sum(lengths)
    hidden = torch.randn(rows, WIDTH, generator=generator, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, requires_grad=True)
    bias = torch.randn(VOCABULARY, generator=generator, requires_grad=True)
    ids = torch.randint(VOCABULARY, (rows,), generator=generator)
    now = linear_logprob(hidden, weight, ids, bias=bias)[0].detach()
    old = now + 0.3 * torch.randn(rows, generator=generator)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    return hidden, weight, bias, ids, torch.randn(len(lengths), generator=generator), cu_seqlens, old


@FUSED
@pytest.mark.parametrize("stash_bytes", [0, 2000, 10**6])
def test_linear_logprob_passes_opcheck(stash_bytes, every_impl):
    hidden, weight, bias, ids, *_ = problem([3, 4])
    arguments = (hidden, weight, ids, bias, [0.9, 5.0, 1.0], 500, stash_bytes, every_impl)
    torch.library.opcheck(torch.ops.arft_fast.linear_logprob, arguments)


@FUSED
@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False], [False, False, False]])
def test_policy_loss_passes_opcheck(needs, every_impl):
    hidden, weight, bias, ids, _, _, old = problem([3, 4])
    hidden, weight, bias = (
        x.detach().requires_grad_(need) for x, need in zip((hidden, weight, bias), needs, strict=True)
    )
    rows = (torch.randn(7), torch.ones(7) / 7, torch.zeros(7, dtype=torch.int64), torch.full((1,), 7.0), old)
    settings = ([1.0, 0.0, 1.0], Objective().to_numbers(), False, needs, 500, every_impl)
    torch.library.opcheck(
        torch.ops.arft_fast.policy_loss, (hidden, weight, ids, bias, *rows, None, None, None, *settings)
    )


@FUSED
@pytest.mark.parametrize("options", [{}, {"loss": "gspo"}, {"loss": "dapo", "top_entropy_quantile": 0.5}])
def test_the_loss_compiles_without_a_graph_break_and_for_any_length(options, every_impl):
    def step(hidden, weight, bias, ids, advantages, cu_seqlens, old):
        rows = {"cu_seqlens": cu_seqlens, "old_logprobs": old, "bias": bias}
        loss, stats = policy_loss(hidden, weight, ids, advantages, impl=every_impl, **rows, **options)
        return 2 * loss, stats["entropy"]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for lengths in ([3, 1, 4, 7], [5, 6, 1, 9, 2]):
        operands = problem(lengths)
        (eager, eager_entropy), (loss, entropy) = step(*operands), compiled(*operands)
        torch.testing.assert_close((loss, entropy), (eager, eager_entropy))
        expected = torch.autograd.grad(eager, operands[:3])
        torch.testing.assert_close(torch.autograd.grad(loss, operands[:3]), expected)


@FUSED
def test_log_probs_compile_together_with_a_loss_that_follows(every_impl):
    def step(hidden, weight, ids):
        logprobs, entropy = linear_logprob(hidden, weight, ids, impl=every_impl)
        return (logprobs * entropy).sum()

    hidden, weight, _, ids, *_ = problem([8, 3])
    eager = step(hidden, weight, ids)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(hidden, weight, ids)
    torch.testing.assert_close(compiled, eager)
    gradients = (torch.autograd.grad(value, (hidden, weight)) for value in (compiled, eager))
    torch.testing.assert_close(*gradients)


def test_an_id_out_of_range_is_refused_inside_a_compiled_graph_too():
    hidden, weight, _, ids, *_ = problem([3, 4])
    compiled = torch.compile(lambda h, w, i: linear_logprob(h, w, i, impl="native")[0], backend="aot_eager")
    with pytest.raises(ValueError, match=r"token_ids: ids must lie in 0 \.\. 36"):
        compiled(hidden, weight, ids + VOCABULARY)


def test_a_sharded_weight_is_refused_with_its_remedy():
    mesh_tensor = pytest.importorskip("torch.distributed.tensor")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        hidden, weight, _, ids, *_ = problem([3, 4])
        sharded = mesh_tensor.distribute_tensor(weight.detach(), mesh, [mesh_tensor.Shard(0)]).requires_grad_()
        with pytest.raises(ValueError, match="weight: is a DTensor, sharded over ranks"):
            linear_logprob(hidden, sharded, ids)
        gathered = sharded.full_tensor(grad_placements=[mesh_tensor.Partial()])  # the remedy that the error names
        linear_logprob(hidden, gathered, ids)[0].sum().backward()
        linear_logprob(hidden, weight, ids)[0].sum().backward()
        torch.testing.assert_close(sharded.grad.full_tensor(), weight.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_a_weight_that_deepspeed_has_partitioned_is_refused_with_its_remedy():
    hidden, _, _, ids, *_ = problem([3, 4])
    partitioned = torch.nn.Parameter(torch.empty(0))
    partitioned.ds_id = 3
    with pytest.raises(ValueError, match="weight: is partitioned by DeepSpeed ZeRO-3"):
        linear_logprob(hidden, partitioned, ids)
