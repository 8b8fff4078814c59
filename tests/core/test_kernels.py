"""The hand-written passes against their plain forms: derivatives of both orders, types, and the law of the dropout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import rankworks as rw
from rankworks.core.kernels import dropout, lowrank_linear, lowrank_row_norms, scale_rows
from rankworks.core.kernels.drop import draw, kept
from tiny import tiny_gpt2, tiny_llama, token_batch

P = 0.3


def operands(dtype=torch.float64, bias=True, shape=(2, 5, 7), out=6, rank=3):
    """x, W, b, A, B; x, A and B need gradients."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    x, A, B = normal(*shape), normal(rank, shape[-1]), normal(out, rank)
    for t in (x, A, B):
        t.requires_grad_()
    return x, normal(out, shape[-1]), normal(out) if bias else None, A, B


def plain(x, W, b, A, B, p=0.0):
    """What `lowrank_linear` is to compute, in ordinary operations on the same mask."""
    masked = x * kept(x, draw(x, p)) / (1 - p) if p else x
    return F.linear(x, W, b) + F.linear(F.linear(masked, A), B)


def seeded(function, *arguments):
    """Call with the generator at a fixed place, so that every call drops the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return function(*arguments)


def check_gradients(function, wanted):
    assert gradcheck(function, wanted)
    assert gradgradcheck(function, wanted)


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("bias", [True, False])
def test_lowrank_linear(p, bias):
    x, W, b, A, B = operands(bias=bias)
    torch.testing.assert_close(seeded(lowrank_linear, x, W, b, A, B, p), seeded(plain, x, W, b, A, B, p))
    check_gradients(lambda x, A, B: seeded(lowrank_linear, x, W, b, A, B, p), (x, A, B))


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_each_operand_may_be_frozen(p, frozen):
    """The first layer's input, A (as in LoRA-FA) or B needs no gradient: the others' are as before."""
    x, W, b, A, B = operands()
    trained = [t for i, t in enumerate((x, A, B)) if i != frozen]
    (x, A, B)[frozen].requires_grad_(False)
    mine = torch.autograd.grad(seeded(lowrank_linear, x, W, b, A, B, p).square().sum(), trained)
    theirs = torch.autograd.grad(seeded(plain, x, W, b, A, B, p).square().sum(), trained)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("p", [0.0, P])
def test_a_frozen_a_keeps_no_input_and_has_both_derivatives(p):
    x, W, b, A, B = operands()
    A.requires_grad_(False)
    kept_shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept_shapes.append(t.shape) or t, lambda t: t):
        lowrank_linear(x, W, b, A, B)
    assert x.shape not in kept_shapes
    check_gradients(lambda x, B: seeded(lowrank_linear, x, W, b, A, B, p), (x, B))


@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 2, 7), (0, 7)])
def test_shapes_of_the_input(shape):
    x, W, b, A, B = operands(shape=shape)
    y = lowrank_linear(x, W, b, A, B)
    torch.testing.assert_close(y, plain(x, W, b, A, B))
    grads = torch.autograd.grad(y.sum(), (x, A, B))
    torch.testing.assert_close(grads, torch.autograd.grad(plain(x, W, b, A, B).sum(), (x, A, B)))


@pytest.mark.parametrize("p", [0.0, P])
def test_strides_of_any_kind(p):
    """A transposed input, a transposed weight (as Conv1D stores it) and a broadcast gradient."""
    x, W, b, A, B = operands(shape=(5, 4, 7))
    strided, stored = x.detach().transpose(0, 1).requires_grad_(), W.t().contiguous().t()
    y = seeded(lowrank_linear, strided, stored, b, A, B, p)
    torch.testing.assert_close(y, seeded(plain, strided, W, b, A, B, p))
    mine = torch.autograd.grad(y.sum(), (strided, A, B))
    torch.testing.assert_close(mine, torch.autograd.grad(seeded(plain, strided, W, b, A, B, p).sum(), (strided, A, B)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_change_leaves_the_frozen_output_to_the_bit(dtype):
    x, W, b, A, B = operands(dtype, shape=(3, 11, 64), out=96)
    B = torch.zeros_like(B, requires_grad=True)
    assert torch.equal(lowrank_linear(x, W, b, A, B), F.linear(x, W, b))
    assert torch.equal(scale_rows(F.linear(x, W, b), torch.ones(96), b), F.linear(x, W, b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_wider_than_the_base(dtype):
    """16-bit inputs and base with float32 factors: the output is 16-bit, gradients are in each tensor's own type."""
    exact = operands(shape=(4, 64, 32), out=48)
    x, W, b = (t.detach().to(dtype) for t in exact[:3])
    x.requires_grad_()
    A, B = (t.detach().float().requires_grad_() for t in exact[3:])
    y = lowrank_linear(x, W, b, A, B)
    gradients = torch.autograd.grad(y.float().square().mean(), (x, A, B))
    assert [y.dtype, *(g.dtype for g in gradients)] == [dtype, dtype, torch.float32, torch.float32]
    wanted = torch.autograd.grad(plain(*exact).square().mean(), (exact[0], *exact[3:]))
    for mine, theirs in zip((y, *gradients), (plain(*exact), *wanted), strict=True):
        assert (mine - theirs).norm() < 0.02 * theirs.norm()


def test_autocast_computes_in_its_type_and_returns_gradients_in_their_own():
    x, W, b, A, B = operands(torch.float32, shape=(4, 64, 32), out=48)
    with torch.autocast("cpu", torch.bfloat16):
        y, theirs = lowrank_linear(x, W, b, A, B), plain(x, W, b, A, B)
        inside = torch.autograd.grad(y.float().square().sum(), (x, A, B), retain_graph=True)
    gradients = torch.autograd.grad(y.float().square().sum(), (x, A, B))
    assert y.dtype == theirs.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in gradients)
    torch.testing.assert_close(y, theirs, rtol=0.02, atol=0.2)
    torch.testing.assert_close(inside, gradients)


def test_without_autograd_the_numbers_are_the_same():
    x, W, b, A, B = operands()
    with torch.no_grad():
        quiet = lowrank_linear(x, W, b, A, B)
    assert not quiet.requires_grad
    assert torch.equal(quiet, lowrank_linear(x, W, b, A, B))
    with torch.inference_mode():
        assert torch.equal(quiet, lowrank_linear(x, W, b, A, B))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("zero", [False, True])
def test_scale_rows(bias, zero):
    """Also where a factor is zero, which leaves nothing of the output to divide."""
    z, _, b, _, _ = operands(bias=bias, shape=(2, 5, 6))
    c = torch.tensor([0.5, 0.0 if zero else -1.2, 1.0, 2.0, 0.9, 1.1], dtype=torch.float64, requires_grad=True)

    def wanted(z, c):
        return c * (z if b is None else z - b) + (0 if b is None else b)

    mine = torch.autograd.grad(scale_rows(z, c, b).square().sum(), (z, c))
    torch.testing.assert_close(scale_rows(z, c, b), wanted(z, c))
    torch.testing.assert_close(mine, torch.autograd.grad(wanted(z, c).square().sum(), (z, c)))
    if not zero:  # the stand-in for zero is exact to first order only
        check_gradients(lambda z, c: scale_rows(z, c, b), (z, c))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scale_rows_multiplies_in_the_wider_type(dtype):
    """1.001 would be 1 in bfloat16, and the scaled output the unscaled one."""
    z = torch.full((4, 3), 1 + 3 / 256, requires_grad=True, dtype=dtype)
    c = torch.tensor([1.0, 1.001, 1.003], requires_grad=True)
    y = scale_rows(z, c, None)
    assert torch.equal(y, (z.float() * c).to(dtype))
    gz, gc = torch.autograd.grad(y.sum(), (z, c))
    assert (gz.dtype, gc.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(gc, z.detach().float().sum(0), rtol=1e-2, atol=0)


def test_a_bias_in_training_gets_its_gradient_through_the_scaling():
    z, _, b, _, _ = operands(shape=(4, 6))
    c = torch.linspace(0.5, 1.5, 6, dtype=torch.float64, requires_grad=True)
    check_gradients(lambda z, c, b: scale_rows(z, c, b), (z, c, b.requires_grad_()))


@pytest.mark.parametrize("chunk", [1, 40, 10**6])
def test_lowrank_row_norms(chunk, monkeypatch):
    monkeypatch.setattr("rankworks.core.kernels.rows.CHUNK_NUMBERS", chunk)
    _, W, _, A, B = operands()
    torch.testing.assert_close(lowrank_row_norms(W, A, B), torch.linalg.vector_norm(W + B @ A, dim=1))
    check_gradients(lambda A, B: lowrank_row_norms(W, A, B), (A, B))
    narrow = lowrank_row_norms(W.bfloat16(), A, B)
    torch.testing.assert_close(narrow, torch.linalg.vector_norm(W.bfloat16().double() + B @ A, dim=1))


# ---- dropout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.01, 0.05, 0.5, 0.9])
def test_dropped_coordinates_fall_like_coins(p):
    """The share of dropped coordinates, and of neighbours dropped together, within five standard deviations."""
    torch.manual_seed(0)
    x = torch.empty(1000, 1000)
    dropped = 1 - kept(x, draw(x, p))
    n = x.numel()
    assert abs(dropped.sum().item() - n * p) < 5 * (n * p * (1 - p)) ** 0.5
    for distance in (1, 2, 1000):
        both = (dropped.view(-1)[distance:] * dropped.view(-1)[:-distance]).sum().item()
        spread = (n * p**2 * (1 - p**2) + 2 * n * p**3 * (1 - p)) ** 0.5  # pairs that share a coordinate go together
        assert abs(both - (n - distance) * p**2) < 5 * spread
    columns = dropped.sum(0)  # each Binomial(1000, p)
    assert columns.var().item() == pytest.approx(1000 * p * (1 - p), rel=0.25)
    assert (dropped[0].sum(), dropped[-1].sum()) != (0, 0)


def test_every_draw_is_new_and_follows_the_generator():
    x = torch.empty(64, 64)
    torch.manual_seed(1)
    first, second = draw(x, 0.1), draw(x, 0.1)
    state = torch.get_rng_state()
    third = draw(x, 0.1)
    torch.set_rng_state(state)
    assert torch.equal(third, draw(x, 0.1))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(first, draw(x, 0.1))


@pytest.mark.parametrize("size", [1, 2, 3, 17])
def test_few_coordinates_have_every_pattern(size):
    """Position by position, also the first and the last: how often each falls over many draws."""
    torch.manual_seed(0)
    times = 4000
    count = sum(1 - kept(x, draw(x, P)) for x in [torch.empty(size)] * times)
    assert (count - times * P).abs().max() < 5 * (times * P * (1 - P)) ** 0.5


def test_dropout_rescales_what_is_kept_and_its_gradient():
    torch.manual_seed(0)
    x = torch.rand(50, 40, dtype=torch.float64, requires_grad=True)
    y = dropout(x, P)
    alive = y != 0
    torch.testing.assert_close(y[alive], x[alive] / (1 - P), rtol=1e-14, atol=0)
    (g,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(g, alive.double() / (1 - P), rtol=1e-14, atol=0)
    assert torch.equal(seeded(dropout, x, P), seeded(dropout, x.detach(), P))
    small = x[:3, :4].detach().requires_grad_()
    check_gradients(lambda x: seeded(dropout, x, P), (small,))
    assert dropout(x, 0.0) is x
    assert not dropout(x, 1.0).any()
    assert dropout(x[:0], P).shape == (0, 40)


def test_only_the_low_rank_path_sees_the_dropped_input():
    x, W, b, A, B = operands()
    assert torch.equal(lowrank_linear(x, W, b, A, torch.zeros_like(B), P), F.linear(x, W, b))
    mean = sum(lowrank_linear(x, W, b, A, B, P).detach() for _ in range(3000)) / 3000
    torch.testing.assert_close(mean, plain(x, W, b, A, B).detach(), rtol=0.05, atol=0.5)


# ---- those who look through -----------------------------------------------------------------------------------------


def adapted(delta, **settings):
    model = rw.adapt(tiny_llama(), delta, rank=4, **settings)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        with torch.no_grad():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def gradients(model, call):
    model.zero_grad()
    ids = token_batch()
    call(input_ids=ids, labels=ids).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("delta", ["lora", "dora"])
def test_a_compiler_sees_one_graph_with_the_same_gradients(delta):
    model = adapted(delta)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(model, compiled), gradients(model, model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("delta", ["lora", "dora"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_the_same(delta, reentrant):
    model = adapted(delta, **({"dropout": 0.2} if delta == "lora" else {}))
    model.train()
    before = seeded(gradients, model, model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert len(before) == sum(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(seeded(gradients, model, model), before)


@pytest.mark.parametrize("delta", ["lora", "dora"])
def test_function_transforms_and_forward_derivatives(delta):
    """torch.func's gradients per example and Jacobian products, and forward-mode derivatives, agree with autograd."""
    model = adapted(delta, targets=["q_proj"]).double()
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    trained = {n: p.detach() for n, p in layer.named_parameters() if p.requires_grad}

    def loss(parameters, row):
        return torch.func.functional_call(layer, parameters, (row,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, x)
    layer(x).square().sum().backward()
    for name, per_example in each.items():
        torch.testing.assert_close(per_example.sum(0), layer.get_parameter(name).grad)
    _, forwards = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    torch.testing.assert_close(dual, forwards)
    torch.testing.assert_close(forwards, layer(x + 0.5) - layer(x - 0.5))


def test_hessian_vector_products_of_a_model():
    """The kernels' second derivatives through a whole model: symmetric, v (H u) = u (H v)."""
    model = adapted("lora").double()
    model.set_attn_implementation("eager")  # the fused attention has no second derivative
    parameters = [p for p in model.parameters() if p.requires_grad]
    ids = token_batch()
    first = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, parameters, create_graph=True)
    u, v = ([torch.randn_like(p) for p in parameters] for _ in range(2))
    products = [torch.autograd.grad(first, parameters, w, retain_graph=True) for w in (u, v)]
    crossed = [sum((a * b).sum() for a, b in zip(w, hw, strict=True)) for w, hw in zip((v, u), products, strict=True)]
    assert crossed[0].abs() > 1e-6
    torch.testing.assert_close(crossed[0], crossed[1], rtol=1e-5, atol=0)  # the model's norms compute in float32


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_a_base_in_training_takes_the_plain_form(build):
    """A weight that is itself trained gets its gradient, which the fused pass does not make."""
    model = rw.adapt(build(), "lora", rank=4)
    ids = token_batch()
    model.requires_grad_(True)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_replaces_the_branch_is_not_bypassed():
    class Doubled(type(adapted("lora").model.layers[0].self_attn.q_proj.adapters["default"]["weight"])):
        def branch(self, x):
            return 2 * super().branch(x)

    model = adapted("lora", targets=["q_proj"])
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    change = layer(x) - F.linear(x, layer.weight)
    layer.adapters["default"]["weight"].__class__ = Doubled
    torch.testing.assert_close(layer(x) - F.linear(x, layer.weight), 2 * change, rtol=1e-4, atol=1e-5)
