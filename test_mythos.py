# SPDX-License-Identifier: MIT
"""Tests of mythos.py; no network, nothing is skipped. Where there is a GPU, all run there, too.

The first part is a model of its own: the same equations for one token, one head and one expert at a
time, so slow and plain that they can be checked by reading. The rest compares mythos.py with it, in
the order of that file, and checks what mythos.py promises. Each docstring names the mistake that
its test catches; "flaw n" is the n-th of the 24 flaws that were measured in OpenMythos and its kin.
"""

import contextlib
import copy
import dataclasses
import functools
import io
import math
import re
import types
from collections import defaultdict
from typing import Annotated

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close  # float32: 1e-5 absolute + 1.3e-6 relative

import mythos
from experiments.measure import (
    diagnostics,
    executed_params,
    flops_per_token,
    kv_bytes_per_token,
    loop_gain,
    num_params,
    spectral_radius,
)
from mythos import GroupedQueryAttention as GQA
from mythos import (
    MixtureOfExperts,
    MythosConfig,
    RecurrentDepthTransformer,
    StateUpdate,
    SwiGLU,
    apply_rope,
    get_model_config,
    rope_angles,
    sample,
)
from mythos import MultiHeadLatentAttention as MLA

torch.set_num_threads(1)  # in models this small threads only wait for each other
settings.register_profile("mythos", max_examples=25, deadline=None, derandomize=True, database=None)
settings.load_profile("mythos")
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
both = pytest.mark.parametrize("kind", ["gqa", "mla"])
with_and_without_halting = pytest.mark.parametrize("halted", [False, True])
SMALL = dict(vocab_size=37, d_model=32, max_seq_len=48, max_loop_iters=3, n_heads=4, n_kv_heads=2)
SMALL |= dict(d_ff=48, num_experts=4, d_expert=16)


@pytest.fixture(params=DEVICES, scope="module", autouse=True)
def on_each_device(request):
    """What a test makes, it makes on this device; on the CPU without being told, which is slow."""
    with torch.device(request.param) if request.param != "cpu" else contextlib.nullcontext():
        yield


def make(seed=0, fresh=False, **fields):
    """A small model in eval mode; unless fresh, with uneven vectors and a lively loop."""
    torch.manual_seed(seed)
    model = RecurrentDepthTransformer(MythosConfig(**SMALL), **fields).eval()
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()] * (not fresh):
            if p.dim() > 1:
                p.mul_(3 if "head" in name else 1.5 if "recurrent" in name else 1)
            elif p.is_floating_point():
                p.add_(torch.randn_like(p), alpha=0.1 if "bias" in name else 0.3)
    return model


def ids(*shape):
    return torch.randint(37, shape)


def spy(monkeypatch, owner, name):
    """Let owner.name do its work, and note the arguments of each call in the list returned."""
    calls, real = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: (calls.append((a, k)), real(*a, **k))[1])
    return calls


def seeded(seed=0):
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


# ---- the reference: one token, one head, one expert at a time ----


def norm(m, x):
    return x / (x.square().mean() + m.eps).sqrt() * (1 if m.weight is None else m.weight)


def turn(x, position, theta=10_000.0):
    """RoPE of x (..., width): (x_i, x_{i + width/2}) is a complex number, turned by its angle."""
    half = x.shape[-1] // 2
    angle = position * theta ** (-torch.arange(half) / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones(half), angle)
    return torch.cat([z.real, z.imag], dim=-1)


def queries_keys_values(m, x, position, theta):
    """What a token x (D,) asks, offers and gives in each head, (H, ·) each."""
    if isinstance(m, GQA):
        q, k, v = ((p.weight @ x).view(-1, m.head_dim) for p in (m.q_proj, m.k_proj, m.v_proj))
        k, v = (kv.repeat_interleave(m.n_heads // m.n_kv_heads, dim=0) for kv in (k, v))
        return turn(q, position, theta), turn(k, position, theta), v
    H, C, R = m.n_heads, m.head_dim, m.rope_dim  # DeepSeek-V2, section 2.1
    if isinstance(m.q_proj, nn.Sequential):
        q = m.q_proj[2].weight @ norm(m.q_proj[1], m.q_proj[0].weight @ x)
    else:
        q = m.q_proj.weight @ x
    q_nope, q_rope = q.view(H, C + R).tensor_split([C], dim=1)
    latent, k_rope = (m.kv_down_proj.weight @ x).tensor_split([m.kv_lora_rank])
    k_nope, v = (m.kv_up_proj.weight @ norm(m.kv_norm, latent)).view(H, -1).tensor_split([C], 1)
    k_rope = turn(k_rope, position, theta).expand(H, R)
    return torch.cat([q_nope, turn(q_rope, position, theta)], 1), torch.cat([k_nope, k_rope], 1), v


def attend(m, x, past, theta=10_000.0):
    """The attention's output for x (D,) after the `past` tokens' (k, v), and x's own (k, v)."""
    q, k, v = queries_keys_values(m, x, len(past), theta)
    seen, heads = [*past, (k, v)], []
    for h in range(m.n_heads):
        keys, values = (torch.stack([pair[i][h] for pair in seen]) for i in (0, 1))
        heads.append((keys @ q[h] / q.shape[1] ** 0.5).softmax(dim=0) @ values)
    return m.out_proj.weight @ torch.cat(heads), (k, v)


def feed_forward(m, x):
    """SwiGLU or mixture of experts for one token x (D,)."""
    if isinstance(m, SwiGLU):
        gate, up = (m.gate_up_proj.weight @ x).tensor_split(2)
        return m.down_proj.weight @ (F.silu(gate) * up)
    score, K = (m.router.weight @ x).sigmoid(), m.num_experts_per_token
    chosen = (score + m.router_bias).topk(K).indices.tolist()
    total = sum(score[i] for i in chosen) if K > 1 else 1.0
    out = torch.zeros_like(x) if m.shared is None else feed_forward(m.shared, x)
    for i in chosen:
        gate, up = (x @ m.gate_up_proj[i]).tensor_split(2)
        out = out + score[i] / total * (F.silu(gate) * up @ m.down_proj[i])
    return out


def run_blocks(blocks, x, position, t, left, theta):
    """Blocks for one token in loop t. left[block][position][loop] is the (k, v) left behind."""
    for block in blocks:
        past = [left[block][j][: t + 1][-1] for j in range(position)]  # of loop min(t, its last)
        y, mine = attend(block.attention, norm(block.attention_norm, x), past, theta)
        left[block][position].append(mine)
        x = x + y
        x = x + feed_forward(block.ffn, norm(block.ffn_norm, x))
    return x


@torch.no_grad()
def reference(model, tokens, n_loops, threshold=0.0):
    """Logits (N, T, V) and loops used (N, T), strictly one token after the other.

    A token loops until its state moves by less than the threshold. A later token reads in its loop
    t what this one left in loop min(t, its last).
    """
    theta, logits, used = model.config.rope_theta, [], []
    for row in tokens.tolist():
        left = defaultdict(lambda: defaultdict(list))
        for position, token in enumerate(row):
            x = norm(model.embed_norm, model.embed.weight[token])
            x = run_blocks(model.prelude, x, position, 0, left, theta)
            h = e = norm(model.input_norm, x)
            used.append(0)
            for t in range(n_loops):
                used[-1], old = t + 1, h if t > 0 else torch.zeros_like(e)
                r = norm(model.loop_norm, old + e)
                r = run_blocks(model.recurrent, r, position, t, left, theta)
                h = model.state_update.diagonal_A() * old + model.state_update.b * e + r
                if (h - old).norm() / h.norm() < threshold:
                    break
            x = run_blocks(model.coda, norm(model.state_norm, h), position, 0, left, theta)
            logits.append(model.head.weight @ norm(model.output_norm, x))
    return torch.stack(logits).view(*tokens.shape, -1), torch.tensor(used).view(tokens.shape)


def clear_threshold(model, tokens, n_loops, quantile=0.5):
    """A threshold amid the changes of these tokens, so clear of each that rounding decides none."""
    changes = diagnostics(model, tokens, n_loops=n_loops)["change"].flatten()
    for i in range(200):
        threshold = changes.quantile(quantile).item() * 1.002**i
        seen = diagnostics(model, tokens, n_loops=n_loops, halt_threshold=threshold)["change"]
        if ((seen[seen > 0] / threshold - 1).abs() > 3e-4).all():  # a halted token's change is 0
            return threshold
    raise AssertionError("no clear threshold")


# ---- attention ----


def attention(kind, G=2, q_rank=None, **widths):
    """Attention of 4 heads whose widths all differ, with sharp scores and norms that are not 1."""
    torch.manual_seed(G)
    if kind == "gqa":
        m = GQA(d_model=32, n_heads=4, n_kv_heads=G, head_dim=10)
    else:
        widths = dict(head_dim=8, rope_dim=4, kv_lora_rank=20) | widths
        m = MLA(d_model=32, n_heads=4, **widths, q_lora_rank=q_rank)
    for p in m.parameters():
        nn.init.normal_(p, std=0.3)
    return m


@pytest.mark.parametrize(
    "kind, G, widths",
    [("gqa", 1, {}), ("gqa", 2, {}), ("gqa", 4, {}), ("mla", 2, {}), ("mla", 2, dict(q_rank=12))]
    + [("mla", 2, dict(kv_lora_rank=3, head_dim=64))],
)
def test_attention_equals_plain_equations(kind, G, widths):
    """A wrong scale, mask, grouping of heads or split of a projection, a missing norm or RoPE; a
    latent so narrow that absorbing would pay even without a past."""
    m, x = attention(kind, G, **widths), torch.randn(2, 9, 32)
    out = m(x, rope_angles(torch.arange(9), 10 if isinstance(m, GQA) else 4))
    for b in range(2):
        past = []
        for t in range(9):
            want, mine = attend(m, x[b, t], past)
            assert_close(out[b, t], want, atol=1e-5, rtol=1e-5)
            past.append(mine)


def test_mla_absorbed_equals_expanded():
    """Folding the up-projections wrongly: a transpose, the scale, a wrong half of the row."""
    m = attention("mla")
    q, q_rope, rows = torch.randn(2, 4, 1, 8), torch.randn(2, 4, 1, 4), torch.randn(2, 9, 24)
    assert_close(m.absorbed(q, q_rope, rows), m.expanded(q, q_rope, rows), atol=1e-5, rtol=1e-5)


def test_mla_decodes_absorbed(monkeypatch):
    """Rebuilding the keys and values of the whole past for each new token (flaw 15)."""
    model, m = make(), MLA
    absorbed, expanded = spy(monkeypatch, m, "absorbed"), spy(monkeypatch, m, "expanded")
    cache = model.new_cache(1, 21)
    model(ids(1, 20), cache=cache)
    assert (len(absorbed), len(expanded)) == (0, 5)  # prelude, 3 loops, coda
    model(ids(1, 1), cache=cache)
    assert (len(absorbed), len(expanded)) == (5, 5)


@both
@torch.no_grad()
def test_another_attend_is_used_on_every_path(kind):
    """A sliding window that one pass, a chunk or a decoded token does not have."""

    def last_three(q, k, v, scale=None):
        distance = torch.arange(k.shape[2])[-q.shape[2] :, None] - torch.arange(k.shape[2])
        seen = (distance >= 0) & (distance < 3)
        return F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)

    model, tokens = make(attention_type=kind, prelude_layers=0, coda_layers=0), ids(1, 9)
    model.recurrent[0].attention.attend = last_three
    changed = torch.where(torch.arange(9) == 0, (tokens + 1) % 37, tokens)
    want, other = (model(x, n_loops=1)[0] for x in (tokens, changed))
    assert_close(want[:, 3:], other[:, 3:])
    assert ((want - other)[:, :3].abs().amax(dim=-1) > 1e-4).all()
    cache = model.new_cache(1, 9, 1)
    chunks = [model(x, n_loops=1, cache=cache)[0] for x in tokens.split([4, 1, 3, 1], dim=1)]
    assert_close(torch.cat(chunks, dim=1), want)


@both
@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_dropout_by_hooks(kind, part):
    """make_block's hint: a path that goes around a hook; weights renamed; dropout in decoding."""

    def drop(module, _, out):
        return F.dropout(out, 0.5, module.training)

    plain, dropped, tokens = make(attention_type=kind), make(attention_type=kind), ids(1, 6)
    for block in (*dropped.prelude, *dropped.recurrent, *dropped.coda):
        getattr(block, part).register_forward_hook(drop)
    dropped.load_state_dict(plain.state_dict())
    decode = dict(temperature=0, n_loops=2)
    new = dropped.train().generate(tokens, 20, **decode)
    assert torch.equal(new, plain.generate(tokens, 20, **decode))
    logits, again = (dropped(tokens)[0] for _ in range(2))
    assert (logits - again).abs().max() > 1e-3
    assert torch.equal(dropped.eval()(tokens)[0], plain(tokens)[0])


class Adapter(nn.Module):
    """A low-rank change around a layer, with a .weight, as the usual adapter libraries have it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight = base, base.weight
        self.change = nn.Parameter(torch.randn(base.out_features, base.in_features) * 0.3)

    def forward(self, x):
        return self.base(x) + x @ self.change.T


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Quantised(torch.Tensor):
    """A weight of which only its own layer may make use."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert function is not torch.Tensor.view, "looked into the weight"
        out = super().__torch_function__(function, types, args, kwargs or {})
        return out.as_subclass(torch.Tensor) if function is F.linear else out


CHANGES = dict(  # ways to change what a layer computes; the last two change nothing
    adapter=Adapter,
    bias=lambda layer: setattr(layer, "bias", nn.Parameter(torch.ones(layer.out_features))),
    subclass=lambda layer: setattr(layer, "__class__", Shifted),
    forward=lambda layer: setattr(layer, "forward", lambda x: F.linear(x, layer.weight) + 1),
    hook=lambda layer: layer.register_forward_hook(lambda _, inputs, output: output + 1),
    pre_hook=lambda layer: layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1,)),
    parametrization=nn.utils.parametrizations.spectral_norm,
    quantised=lambda layer: setattr(
        layer, "weight", nn.Parameter(layer.weight.detach().as_subclass(Quantised))
    ),
    copy=copy.deepcopy,
)


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_no_way_around_a_changed_module(change):
    """Decoding that reads a weight past its module: an adapter is silently ignored, a quantised
    layer crashes."""
    model, tokens = make(), ids(1, 6)
    plain = model(tokens)[0]
    for block in [*model.prelude, *model.recurrent, *model.coda]:
        layer = block.attention.kv_up_proj
        new = CHANGES[change](layer)
        block.attention.kv_up_proj = new if isinstance(new, nn.Module) else layer
    want, cache = model(tokens)[0], model.new_cache(1, 6)
    steps = [model(token, cache=cache)[0] for token in tokens.split(1, dim=1)]
    assert_close(torch.cat(steps, dim=1), want)
    assert ((want - plain).abs().max() < 1e-4) == (change in ("quantised", "copy"))


@given(st.integers(0, 400), st.integers(0, 400), st.integers(0, 400))
def test_rope_scores_depend_on_distance_only(i, j, shift):
    """Turning q and k differently, or by something else than their position; a changed length."""
    q, k = torch.randn(2, 1, 16, generator=seeded(i))
    at = lambda x, position: apply_rope(x, rope_angles(torch.tensor([position]), 16))  # noqa: E731
    assert_close(at(q, i) @ at(k, j).T, at(q, i + shift) @ at(k, j + shift).T, atol=5e-4, rtol=0)
    assert_close(at(q, i).norm(), q.norm())
    assert_close(at(q, i), turn(q, i), atol=1e-4, rtol=0)


def test_rope_is_fp32_in_a_bf16_model():
    """Angles in bf16, by `.to(torch.bfloat16)` or by the input, lose the position (flaw 7)."""
    model, x = make(attention_type="gqa").bfloat16(), torch.randn(300, 8).bfloat16()
    _, rope = model.run_prelude(ids(1, 40))
    angles = torch.arange(40.0)[:, None] * 10_000.0 ** (-torch.arange(4) / 4)
    assert_close(rope, torch.stack([angles.cos(), angles.sin()]))  # of dtype float32
    rope = rope_angles(torch.arange(300), 8)
    assert torch.equal(apply_rope(x, rope), apply_rope(x.float(), rope).bfloat16())
    assert {name.split(".")[-1] for name, _ in model.named_buffers()} == {"router_bias", "load"}


# ---- experts ----


def experts(seed=0, E=8, K=2, shared=0):
    torch.manual_seed(seed)
    m = dict(num_experts=E, num_experts_per_token=K, num_shared_experts=shared)
    return MixtureOfExperts(d_model=16, d_expert=24, **m)


@given(n=st.integers(1, 12), E=st.integers(1, 6), K=st.integers(1, 6), shared=st.integers(0, 2))
def test_dispatch_equals_loop_over_experts(n, E, K, shared):
    """A token sent to a wrong expert, a wrong gate, an expert without tokens, a lost gradient."""
    m = experts(n, E, min(K, E), shared)
    m.router_bias.normal_()
    x, w = torch.randn(1, n, 16, requires_grad=True), torch.randn(1, n, 16)
    got, want = m(x), torch.stack([feed_forward(m, x_t) for x_t in x[0]])[None]
    assert_close(got, want)
    grads = (torch.autograd.grad((out * w).sum(), [x, *m.parameters()]) for out in (got, want))
    assert_close(*grads)


def test_dispatch_is_two_matrix_products(monkeypatch):
    """A Python loop over the experts with a synchronisation each, 7 times slower (flaw 13)."""
    calls = spy(monkeypatch, F, "grouped_mm")
    experts()(torch.randn(1, 5, 16))
    assert len(calls) == 2


def test_gates_sum_to_one_or_teach_the_router():
    """Renormalising a single gate makes it 1, and the router learns nothing (flaw 14)."""
    m, x = experts(K=1), torch.randn(10, 16)
    assert_close(experts(K=3).route(x)[1].sum(dim=-1), torch.ones(10))
    chosen, gates = m.route(x)
    assert_close(gates, m.router(x).sigmoid().gather(1, chosen))
    m(x[None]).square().mean().backward()
    assert m.router.weight.grad.norm() > 1e-2  # the flaw: 7e-6


def test_gates_of_a_router_that_wants_nobody_are_finite():
    """0/0: below −104 a sigmoid is 0 in fp32, and so is the sum of the chosen scores."""
    m = experts(K=2)
    m.router.weight.data.fill_(-100.0)
    assert m(torch.ones(1, 3, 16)).isfinite().all()


def test_router_scores_are_fp32_in_a_bf16_model():
    """Scores near 1 that bf16 rounds to the same number: the choice among them is an accident."""
    m, x = experts(K=1).bfloat16(), torch.zeros(1, 16, dtype=torch.bfloat16)
    x[0, 0] = 1
    with torch.no_grad():
        m.router.weight.zero_()
        m.router.weight[:, 0] = torch.linspace(6, 6.5, 8)  # sigmoid 0.9975 … 0.9985
    assert m.route(x)[0].item() == 7


def test_router_bias_steers_the_choice_only():
    """A bias within the gates bends the output; one with a gradient is learned, not steered."""
    m, x = experts(K=2), torch.randn(10, 16)
    before, _ = m.route(x)
    m.router_bias[3] = 100.0
    chosen, gates = m.route(x)
    assert not (before == 3).any(dim=1).all() and (chosen == 3).any(dim=1).all()
    score = m.router(x).sigmoid().gather(1, chosen)
    assert_close(gates, score / score.sum(dim=-1, keepdim=True))
    m(x[None]).sum().backward()
    assert not m.router_bias.requires_grad and "router_bias" in dict(m.named_buffers())


def test_bias_update_balances_a_skewed_router():
    """A bias that is never updated, or pushed the wrong way, leaves experts idle (flaw 12)."""
    m, x, loads = experts(K=2), torch.randn(1, 200, 16) + 1.0, []
    for _ in range(300):
        m(x)
        loads.append(m.update_router_bias(0.01))
    assert all(load.sum() == 200 * 2 for load in loads)
    imbalance = [(load.max() / load.float().mean()).item() for load in loads]
    assert imbalance[0] > 2 and max(imbalance[-10:]) < 1.3


@pytest.mark.slow
@torch.no_grad()
def test_balance_holds_for_twenty_thousand_updates():
    """A slow drift apart. (All biases together do drift: that changes no choice.)"""
    m, x = experts(K=2), torch.randn(4096, 16) + 0.5
    E, loads = m.router_bias.numel(), []
    for _ in range(20_000):
        chosen, _ = m.route(x[torch.randint(4096, (64,))])
        m.load += chosen.flatten().bincount(minlength=E)
        loads.append(m.update_router_bias(0.01))
    assert m.router_bias.max() - m.router_bias.min() < 1  # no further than scores can be
    late = torch.stack(loads[-1000:]).sum(dim=0)
    assert late.max() / late.float().mean() < 1.1


def test_bias_moves_by_the_promised_default_towards_the_mean():
    """Another default speed than documented; a mean rounded to a whole load."""
    model = make(fresh=True)
    model.recurrent[0].ffn.load += torch.tensor([3, 3, 2, 2])
    model.update_router_bias()
    assert_close(model.recurrent[0].ffn.router_bias, 1e-3 * torch.tensor([-1.0, -1, 1, 1]))


def test_load_counts_all_loops_of_training():
    """Counting only the loops with gradient, or what is not training, or never starting again."""
    model = make(recurrent_layers=2).train()
    model(ids(2, 5), n_loops=3, grad_loops=1)
    model.generate(ids(1, 3), 2)
    diagnostics(model, ids(1, 3))
    loop_gain(model, ids(1, 3), iterations=2)
    model.eval()(ids(2, 5))
    before = [block.ffn.router_bias.clone() for block in model.recurrent]
    loads = model.update_router_bias(0.5)
    assert loads.shape == (2, 4) and loads.sum(dim=1).tolist() == [3 * 2 * 5 * 2] * 2
    for block, load, bias in zip(model.recurrent, loads, before, strict=True):
        assert_close(block.ffn.router_bias - bias, 0.5 * (load.float().mean() - load).sign())
        assert block.ffn.load.sum() == 0
    assert make(num_experts=0).update_router_bias().numel() == 0


# ---- state update ----


@given(
    target=st.floats(1e-3, 1.0, exclude_max=True),
    a=st.lists(st.floats(-1e30, 1e30) | st.floats(-20, 20), min_size=1, max_size=8),
)
@example(0.999, [1e30])
@example(0.95, [8.0, -1e30])
def test_spectral_radius_below_target(target, a):
    """An A that reaches 1, rounded up by fp32, bf16 or fp16, or not bounded at all (flaw 6)."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        u = StateUpdate(len(a), target)
        u.a.data = torch.tensor(a)
        u, one, zero = u.to(dtype), torch.ones(len(a), dtype=dtype), torch.zeros(len(a))
        used = u(one, zero.to(dtype), zero.to(dtype)).double()  # A as forward uses it
        rho = u.diagonal_A().abs().max().item()
        assert rho <= target and 0 <= used.min() and used.max() <= target
        assert_close(rho, used.max().item(), rtol=2**-8, atol=1e-7)
        assert max(a) < 30 or rho > 0.99 * target  # the bound can be used up


def test_state_update_equation_and_free_A():
    """A, B or R swapped; spectral_radius_target=None that still bounds A and so shows nothing."""
    u = make(spectral_radius_target=None).state_update
    u.a.data[0] = -5.0
    h, e, r = torch.randn(3, 2, 4, 32)
    assert_close(u(h, e, r), (u.a + 0.475) * h + u.b * e + r)
    assert_close(u.diagonal_A().abs().max().item(), 5.0 - 0.475)


def bound_on_R(model):
    """An upper bound of |R(h, e)| for all h and e, from the weights of a GQA model with experts."""
    largest = functools.partial(torch.linalg.matrix_norm, ord=2)  # singular value
    after = lambda norm: norm.weight.abs().max() * norm.weight.numel() ** 0.5  # noqa: E731
    M = after(model.loop_norm)
    for block in model.recurrent:
        m, ffn = block.attention, block.ffn
        heads = m.n_heads**0.5 * largest(m.v_proj.weight)  # a head's output is a mean of values
        M += largest(m.out_proj.weight) * heads * after(block.attention_norm)
        shared = [*ffn.shared.gate_up_proj.weight.chunk(2), ffn.shared.down_proj.weight]
        swiglu = math.prod(largest(m) for m in (*ffn.gate_up_proj.chunk(2, -1), ffn.down_proj))
        swiglu = swiglu.max() + math.prod(map(largest, shared))
        M += swiglu * after(block.ffn_norm) ** 2  # |silu(g) ⊙ u| <= |g|·|u|; gates sum to 1
    return M.item()


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1])
def test_state_stays_within_its_bound(seed, monkeypatch):
    """R of an unnormalised state, or A above its target, and the state explodes."""
    model = make(seed, attention_type="gqa", recurrent_layers=2)
    for p in model.recurrent.parameters():
        p.mul_(2)
    model.state_update.a.mul_(20)
    updates = spy(monkeypatch, model.state_update, "forward")
    e, rope = model.run_prelude(ids(2, 6))
    norms, h = [], 100 * torch.randn_like(e)
    for _ in range(201):
        norms.append(h.norm(dim=-1).max().item())
        h = model.step(h, e, rope, 0)
    rho, be = spectral_radius(model), (model.state_update.b * e).norm(dim=-1).max().item()
    measured = max(r.norm(dim=-1).max().item() for (_, _, r), _ in updates)
    assert 0.8 < rho < 0.95 and measured <= bound_on_R(model)
    for t, size in enumerate(norms):
        assert size <= (rho**t * norms[0] + (be + measured) / (1 - rho)) * (1 + 1e-5)


@both
def test_input_is_as_loud_as_the_block(kind, monkeypatch):
    """B·e 150 times smaller than R at initialisation does nothing (flaw 4)."""
    model = make(fresh=True, d_model=64, attention_type=kind)
    updates = spy(monkeypatch, model.state_update, "forward")
    model(ids(2, 12), n_loops=4)
    ratios = [((model.state_update.b * e).norm() / r.norm()).item() for (_, e, r), _ in updates]
    assert len(ratios) == 4 and all(0.2 < ratio < 1 for ratio in ratios)


@both
def test_what_enters_a_stage_is_as_loud_as_its_blocks(kind, capsys):
    """An embedding of size 0.02, which the prelude's blocks drown: in one run it cost 0.09 bits per
    byte of text."""
    model = make(fresh=True, d_model=64, attention_type=kind)
    for name in ("prelude", "recurrent", "coda"):

        def look(block, inputs, output, name=name):
            x, added = inputs[0], output - inputs[0]
            sizes = [y.square().mean().sqrt().item() for y in (x, added)]
            print(f"{name:>9}: enters {sizes[0]:.2f}, adds {sizes[1]:.2f}")

        getattr(model, name)[0].register_forward_hook(look)
    model(ids(4, 12), n_loops=3)
    lines = capsys.readouterr().out.splitlines()
    found = [[float(x) for x in re.findall(r"\d\.\d\d", line)] for line in lines]
    assert len(found) == 1 + 3 + 1 and all(0.9 < x < 1.1 for x, _ in found), lines
    assert all(0.1 < added < 1 for _, added in found), lines


# ---- the model: loops ----


@both
@pytest.mark.parametrize("P, R, C, n_loops", [(1, 1, 1, 3), (0, 2, 1, 2), (2, 1, 0, 5)])
def test_loops_are_steps_and_an_unrolled_stack(kind, P, R, C, n_loops):
    """A loop unlike its equation; an output that weights loops, not the last state (flaw 2)."""
    model = make(attention_type=kind, prelude_layers=P, recurrent_layers=R, coda_layers=C)
    tokens = ids(2, 6)
    logits, loss = model(tokens, n_loops=n_loops)
    assert loss is None and logits.shape == (2, 6, 37)
    e, rope = model.run_prelude(tokens)
    h = torch.zeros_like(e)
    for _ in range(n_loops):
        h = model.step(h, e, rope, 0)
    assert_close(logits, model.run_coda(h, rope))
    assert_close(logits, reference(model, tokens, n_loops)[0])


@both
def test_flat_model_is_a_plain_transformer(kind):
    """Without recurrent layers something of the loop remains, or n_loops is quietly ignored."""
    model = make(attention_type=kind, prelude_layers=2, recurrent_layers=0, q_lora_rank=12)
    tokens = ids(2, 6)
    assert not any("state_update" in name or "loop" in name for name, _ in model.named_modules())
    assert_close(model(tokens)[0], reference(model, tokens, 0)[0])
    assert torch.equal(model(tokens)[0], model(tokens, n_loops=0)[0])
    assert model.generate(tokens, 3, halt_threshold=0.1).shape == (2, 9)
    for call in (lambda: spectral_radius(model), lambda: loop_gain(model, tokens)):
        with pytest.raises(ValueError, match="^recurrent_layers: got 0"):
            call()


def test_n_loops_zero_none_and_many():
    """`n_loops or default` makes 0 the maximum; a second default; a limit on depth (flaw 11)."""
    model, tokens = make(), ids(2, 5)
    for n_loops, loops in ((None, 3), (0, 0), (1, 1), (7, 7)):
        want, _ = reference(model, tokens, loops)
        assert_close(model(tokens, n_loops=n_loops)[0], want)
        new = model.generate(tokens, 1, temperature=0, n_loops=n_loops)[:, -1]
        assert torch.equal(new, want[:, -1].argmax(dim=-1))
        assert model.new_cache(1, 4, n_loops).layout["n_loops"] == loops
        assert executed_params(model, n_loops) == executed_params(model, loops)


def test_loss_is_mean_cross_entropy():
    """A loss that shifts targets, scores −100, or sums; int32 ids refused."""
    model, tokens, targets = make(), ids(2, 5), ids(2, 5)
    targets[0, :3] = -100
    logits, loss = model(tokens, targets)
    scored = [(b, t) for b in (0, 1) for t in range(5) if targets[b, t] >= 0]
    log_p = torch.stack([logits[b, t].log_softmax(dim=0)[targets[b, t]] for b, t in scored])
    assert_close(loss, -log_p.mean())
    assert_close(model(tokens.int(), targets.int())[1], loss)


@both
@with_and_without_halting
def test_causal_and_rows_independent(kind, halted):
    """A mask off by one, or anything shared between rows, halted tokens included."""
    model, tokens = make(attention_type=kind), ids(1, 10).repeat(3, 1)
    tokens[1, 6], tokens[2] = (tokens[1, 6] + 1) % 37, ids(10)
    threshold = clear_threshold(model, tokens, 5) if halted else None
    logits, _ = model(tokens, n_loops=5, halt_threshold=threshold)
    assert_close(logits[0, :6], logits[1, :6])
    assert ((logits[0, 6:] - logits[1, 6:]).abs().amax(dim=-1) > 1e-4).all()
    for row in range(3):
        alone, _ = model(tokens[row : row + 1], n_loops=5, halt_threshold=threshold)
        assert_close(alone[0], logits[row])


@both
@pytest.mark.parametrize("n_loops", [0, 1, 2, 3, 4])
def test_grad_loops(kind, n_loops):
    """Truncation that cuts a loop too many or too few, or that switches learning off."""
    model, tokens, targets = make(attention_type=kind), ids(2, 12), ids(2, 12)

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    full = gradients(model(tokens, targets, n_loops=n_loops)[1])
    for k in (1, 2, 3, 4):
        got = gradients(model(tokens, targets, n_loops=n_loops, grad_loops=k)[1])
        e, rope = model.run_prelude(tokens)
        h = torch.zeros_like(e) if n_loops > 0 else e
        for t in range(n_loops):
            h = model.step(h.detach() if t == n_loops - k else h, e, rope, t)
        loss = F.cross_entropy(model.run_coda(h, rope).flatten(0, 1), targets.flatten())
        assert_close(got, gradients(loss))
        if k >= n_loops:
            assert_close(got, full, rtol=0, atol=0)
        for name, grad in got.items():
            if n_loops == 0 and name.startswith(("recurrent", "loop_norm", "state_update")):
                assert grad is None, name
            else:  # h_0 = 0, so a single loop has nothing to tell A
                assert grad.abs().sum() > 0 or (name == "state_update.a" and n_loops == 1), name


# ---- cache and halting ----


@with_and_without_halting
@given(
    kind=st.sampled_from(["gqa", "mla"]),
    layers=st.tuples(st.integers(0, 1), st.integers(1, 2), st.integers(0, 1)),
    n_loops=st.integers(1, 4),
    quantile=st.floats(0.05, 0.95),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8),
)
@example(kind="mla", layers=(1, 2, 1), n_loops=4, quantile=0.4, sizes=[1] * 8)
@example(kind="gqa", layers=(1, 2, 1), n_loops=4, quantile=0.4, sizes=[4, 1, 3])
def test_any_chunks_equal_one_pass(halted, kind, layers, n_loops, quantile, sizes):
    """A chunk that sees too much or too little (flaw 9), or halts otherwise with a cache (3)."""
    T, (P, R, C) = sum(sizes), layers
    model = make(T, attention_type=kind, prelude_layers=P, recurrent_layers=R, coda_layers=C)
    tokens = ids(2, T)
    how = dict(n_loops=n_loops)
    if halted:
        how["halt_threshold"] = clear_threshold(model, tokens, n_loops, quantile)
    cache = model.new_cache(2, T, n_loops)
    model(ids(2, T), **how, cache=cache)
    cache.n_tokens = 0  # what it held before must not show
    chunks = [model(chunk, **how, cache=cache)[0] for chunk in tokens.split(sizes, dim=1)]
    assert cache.n_tokens == T
    logits, _ = model(tokens, **how)
    assert_close(torch.cat(chunks, dim=1), logits)
    assert_close(model(tokens, **how, logits_to_keep=1)[0], logits[:, -1:])


@both
@pytest.mark.parametrize("seed, R, quantile", [(0, 1, 0.3), (1, 2, 0.5), (2, 1, 0.7)])
def test_halted_pass_equals_reference(kind, seed, R, quantile):
    """A halted token whose state or rows still move, or that halts one loop early or late."""
    model, tokens, n_loops = make(seed, attention_type=kind, recurrent_layers=R), ids(2, 7), 6
    threshold = clear_threshold(model, tokens, n_loops, quantile)
    want, loops = reference(model, tokens, n_loops, threshold)
    assert loops.min() < loops.max()  # otherwise nothing is tested
    assert_close(model(tokens, n_loops=n_loops, halt_threshold=threshold)[0], want)
    seen = diagnostics(model, tokens, n_loops=n_loops, halt_threshold=threshold)
    assert torch.equal(seen["loops_used"], loops)
    assert (model(tokens, n_loops=n_loops)[0] - want).abs().max() > 1e-3


def test_loop_ends_when_all_have_halted(monkeypatch):
    """Halting that computes every loop all the same, or is off with a cache (flaw 3); a gradient
    through a cache that the next call overwrites."""
    model, tokens = make(fresh=True), ids(2, 6)
    some = clear_threshold(model, tokens, 12, 0.8)
    for threshold, fewest, most in ((2.0, 1, 1), (some, 2, 11), (0.0, 12, 12)):
        _, loops = reference(model, tokens, 12, threshold)
        for cache in (None, model.new_cache(2, 6, 12)):
            steps = spy(monkeypatch, model, "step")
            logits, _ = model(tokens, n_loops=12, halt_threshold=threshold, cache=cache)
            assert not logits.requires_grad
            assert len(steps) == loops.max() and fewest <= len(steps) <= most
            monkeypatch.undo()


BAD_CACHES = [
    ("cached + new tokens", lambda m, c: m(ids(2, 4), cache=c)),  # flaw 9
    ("cache, n_loops", lambda m, c: m(ids(2, 1), n_loops=2, cache=c)),  # flaw 10
    ("cache, batch_size", lambda m, c: m(ids(1, 1), cache=c)),
    ("cache, row_width", lambda m, c: make(attention_type="gqa")(ids(2, 1), cache=c)),
    ("cache, coda_layers", lambda m, c: make(coda_layers=2)(ids(2, 1), cache=c)),
    ("cache, recurrent_layers", lambda m, c: make(recurrent_layers=2)(ids(2, 1), cache=c)),
    ("cache, prelude_layers", lambda m, c: make(prelude_layers=2)(ids(2, 1), cache=c)),
    ("cache, dtype", lambda m, c: make().double()(ids(2, 1), cache=c)),
    ("cache", lambda m, c: m(ids(2, 1), cache="mine")),
]


@pytest.mark.parametrize("field, call", BAD_CACHES)
def test_cache_refuses(field, call):
    """Another depth, batch or model, or a sequence past the end: accepted and silently wrong."""
    model = make()
    cache = model.new_cache(2, 8)
    model(ids(2, 5), cache=cache)
    with pytest.raises(ValueError, match="^" + re.escape(field) + ": got"):
        call(model, cache)
    model(ids(2, 3), cache=cache)  # nothing has happened to it, and it can be filled to the end
    assert cache.n_tokens == 8


@both
def test_cache_is_one_tensor_of_the_promised_size(kind):
    """A cache that grows by copying, or that holds the RoPE key once per head (flaw 15)."""
    model = make(attention_type=kind, recurrent_layers=2)
    cache = model.new_cache(2, 12, n_loops=3)
    (tensor,) = [v for v in vars(cache).values() if isinstance(v, torch.Tensor)]
    pointer, row = tensor.data_ptr(), 2 * 2 * 8 if kind == "gqa" else 32 + 4
    for _ in range(12):
        model(ids(2, 1), n_loops=3, cache=cache)
    assert cache.rows.data_ptr() == pointer and (tensor != 0).any(dim=-1).all()
    assert tensor.numel() == 2 * 12 * row * (1 + 3 * 2 + 1)
    assert tensor.numel() == 2 * 12 * kv_bytes_per_token(model, 3, bytes_per_number=1)


@both
def test_no_square_mask_on_the_causal_path(kind, monkeypatch):
    """A T×T mask: 1,863 GiB at a million tokens (flaw 16)."""
    model, calls = make(attention_type=kind), spy(monkeypatch, F, "scaled_dot_product_attention")
    model(ids(2, 9), ids(2, 9))[1].backward()
    model(ids(2, 9), halt_threshold=0.1)
    model.generate(ids(2, 9), 3)
    assert len(calls) > 9 and all(k.get("attn_mask") is None for _, k in calls)


# ---- generate ----


@both
@with_and_without_halting
def test_greedy_is_argmax_of_one_pass(kind, halted):
    """A cached or halted decoder with another answer; a crash at temperature 0 (flaw 18)."""
    model, tokens = make(3, attention_type=kind), ids(2, 5)
    how = dict(n_loops=5, halt_threshold=clear_threshold(model, ids(2, 13), 5) if halted else None)
    seen, prompt = [], tokens
    model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    out = model.generate(tokens, 8, temperature=0, **how)
    assert seen == [1] * 8  # the prompt's logits would be memory and time for nothing
    for _ in range(8):
        new = model(tokens, **how)[0][:, -1].argmax(dim=-1, keepdim=True)
        tokens = torch.cat([tokens, new], dim=1)
    assert torch.equal(out, tokens)
    assert torch.equal(model.generate(prompt, 8, top_k=1, **how), out)
    assert torch.equal(model.generate(prompt, 0, **how), prompt)
    assert model.generate(prompt.int(), 1, **how).dtype == torch.int32


@pytest.mark.parametrize(
    "how, kept, power",
    [
        (dict(), 4, 1), (dict(temperature=0.5), 4, 2), (dict(top_k=2), 2, 1),
        (dict(top_k=99), 4, 1), (dict(top_p=0.4), 1, 1), (dict(top_p=0.55), 2, 1),
        (dict(top_p=0.85), 3, 1), (dict(top_p=1.0), 4, 1), (dict(top_k=2, top_p=0.6), 1, 1),
        (dict(top_p=0.75, temperature=0.5), 2, 2),
    ],
)  # fmt: skip
def test_sample_keeps_the_right_ids(how, kept, power):
    """A nucleus one id off, top_k past the vocabulary, temperature upside down (flaw 18)."""
    p, order, n = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([2, 0, 3, 1]), 20_000
    logits = torch.empty(4).scatter(0, order, p.log() + 7)  # id order[i] has probability p[i]
    drawn = sample(logits.expand(n, 4), **how, generator=seeded())
    share = torch.bincount(drawn.flatten(), minlength=4)[order] / n
    p = (p**power)[:kept] / (p**power)[:kept].sum()
    assert drawn.shape == (n, 1) and share[kept:].sum() == 0
    assert_close(share[:kept], p, atol=5 * 0.5 / n**0.5, rtol=0)  # five standard errors


def test_nucleus_ends_where_p_is_reached():
    """One id too many where the mass is p exactly; small bf16 numbers whose sum stops growing."""
    assert sample(torch.zeros(500, 4), top_p=0.5, generator=seeded()).max() == 1
    many = torch.zeros(20_000, 512, dtype=torch.bfloat16)
    assert sample(many, top_p=0.9, generator=seeded()).max() == 460
    assert sample(torch.arange(4.0)[None], top_p=1e-46).item() == 3  # 0 in fp32


def test_eos_stops_and_pads():
    """No stop, a row that goes on after its end, or one whose end changes the others (flaw 18)."""
    model, prompt = make(vocab_size=6), torch.randint(6, (3, 4))
    new = model.generate(prompt, 10, generator=seeded())[:, 4:].tolist()
    lengths = set()
    for eos in range(6):
        out = model.generate(prompt, 10, eos_token=eos, generator=seeded())
        ends = [[*row, eos].index(eos) + 1 for row in new]  # 11: not within the 10
        T = min(max(ends), 10)
        want = [(row[:end] + [eos] * 10)[:T] for row, end in zip(new, ends, strict=True)]
        assert out[:, 4:].tolist() == want
        lengths |= {*ends, T}
    assert len(lengths) > 3 and min(lengths) < 10


def test_tiny_temperature_is_nearly_greedy():
    """Logits divided by a temperature near 0 overflow to inf, and sampling crashes."""
    logits = torch.randn(3, 9, generator=seeded())
    for temperature in (1e-40, 1e-46, 1e-300):  # the last two are 0 in fp32
        assert torch.equal(sample(logits, temperature), logits.argmax(dim=-1, keepdim=True))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_model_that_diverged_says_so(temperature):
    """argmax takes nan for the largest number: text that looks sampled, from weights that are not
    finite any more."""
    for broken in (math.nan, math.inf):
        model = make()
        model.head.weight.data[3] = broken
        with pytest.raises(ValueError, match="^logits: got 'inf or nan', expected finite"):
            model.generate(ids(1, 3), 1, temperature=temperature)


def test_same_seed_same_text():
    """Sampling that ignores its generator, or that draws from the global one."""
    model, prompt = make(), ids(2, 4)
    first, state = model.generate(prompt, 8, generator=seeded()), torch.get_rng_state()
    assert torch.equal(model.generate(prompt, 8, generator=seeded()), first)
    assert not torch.equal(model.generate(prompt, 8, generator=seeded(1)), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_mode_is_restored(monkeypatch):
    """Generating in training mode; another mode, or hooks, left behind by an error (flaw 18)."""
    model, modes = make().train(), []
    model.recurrent[0].register_forward_pre_hook(lambda m, args: modes.append(m.training))
    for call in (lambda: model.generate(ids(1, 3), 2), lambda: diagnostics(model, ids(1, 3))):
        call()
        assert model.training and modes and not any(modes)
        with monkeypatch.context() as broken, pytest.raises(TypeError):
            broken.setattr(model, "run_coda", None)
            call()
        assert model.training and model.recurrent[0].training
        assert not any(moe._forward_pre_hooks for moe in mythos.expert_layers(model))
    model.eval().generate(ids(1, 3), 1)
    assert not model.training
    model.train().recurrent.eval()  # a part that the user keeps in another mode
    diagnostics(model, ids(1, 3))
    assert model.training and model.coda.training and not model.recurrent[0].training


# ---- precision, copies, checkpoints ----


@both
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(kind, autocast, monkeypatch):
    """fp32 numbers that meet bf16 layers crash outside autocast, bf16 ones inside (flaw 8); the
    experts' products, which autocast does not know, left in slow fp32."""
    model, tokens = make(attention_type=kind, num_experts_per_token=4), ids(2, 8)
    want, want_loss = model(tokens, tokens)
    model = model.train() if autocast else model.train().bfloat16()
    products = spy(monkeypatch, F, "grouped_mm")
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=autocast):
        logits, loss = model(tokens, tokens)
        assert model.generate(tokens, 3, halt_threshold=0.2).shape == (2, 11)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert {x.dtype for (x, _), _ in products} == {torch.bfloat16}
    assert (logits.float() - want).norm() < 0.03 * want.norm() and abs(loss - want_loss) < 0.05
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.abs().sum() > 0, name
    assert model.update_router_bias().sum() == 2 * 8 * 3 * 4 and 0 < loop_gain(model, tokens) < 10


def test_copies_are_independent():
    """A function stored on a module makes deepcopy share its weights (flaw 24)."""
    model, tokens = make(), ids(1, 6)
    want, other = model(tokens)[0], copy.deepcopy(model)
    for p in model.parameters():
        p.data.zero_()
    assert torch.equal(other(tokens)[0], want) and not torch.equal(model(tokens)[0], want)
    for module in other.modules():  # a function of mythos.py itself (`attend`) holds no weights
        stored = [v for v in vars(module).values() if isinstance(v, types.FunctionType)]
        assert all(getattr(mythos, f.__name__, None) is f for f in stored)


def test_checkpoint_round_trip():
    """A pickled config fails the default torch.load (24); a table lost in to_empty (flaw 7)."""
    model, tokens, file = make(), ids(1, 6), io.BytesIO()
    torch.save(dict(config=dataclasses.asdict(model.config), model=model.state_dict()), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    with torch.device("meta"):
        other = RecurrentDepthTransformer(MythosConfig(**loaded["config"]))
    other.to_empty(device=tokens.device).init_weights()
    assert other(tokens)[0].isfinite().all()
    other.load_state_dict(loaded["model"])
    assert torch.equal(other(tokens)[0], model(tokens)[0])
    with torch.device("meta"):  # shapes alone, without looking at ids
        assert make(num_experts=0)(tokens.to("meta"))[0].shape == (1, 6, 37)


@both
def test_initialisation_table(kind):
    """An initialisation from a wrong width, or a rule that misses or mistakes a name (flaw 21)."""
    model = make(fresh=True, d_model=64, d_ff=80, d_expert=24, attention_type=kind, q_lora_rank=24)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(7)
    model.init_weights()  # must reset everything
    inputs = {"embed": None, "head": None}
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear) and name != "head":
            inputs[name] = m.in_features
        if isinstance(m, MixtureOfExperts):
            inputs |= {f"{name}.gate_up_proj": 64, f"{name}.down_proj": 24}
    roles = "(embed|head|router|(q|k|v|kv_down|kv_up|out|gate_up|down)_proj)"
    for name, p in model.named_parameters():
        name = name.removesuffix(".weight")
        if p.dim() > 1:
            n = inputs.pop(name)
            std, sigma = 0.8 / n**0.5 if n else 0.02, p.numel() ** -0.5
            assert re.fullmatch(rf"(.*\.)?{roles}(\.[02])?", name), name
            assert abs(p.std().item() / std - 1) < 5 * sigma / 2**0.5, name  # standard errors
            assert abs(p.mean().item()) < 5 * sigma * std, name
        elif name != "state_update.a":
            assert (p == (0.5 if name == "state_update.b" else 1.0)).all(), name
    assert not inputs and all((buffer == 0).all() for buffer in model.buffers())
    assert_close(model.state_update.diagonal_A(), torch.full((64,), 0.475), atol=0.002, rtol=0)


def test_parts_start_at_a_sensible_scale():
    """A part lifted out whose own initialisation is off: it cannot be trained as it comes."""
    m = experts()
    for name, n in (("gate_up_proj", 16), ("down_proj", 24)):
        assert abs(getattr(m, name).std().item() * n**0.5 / 0.8 - 1) < 0.06
    assert (StateUpdate(4).b == 0.5).all() and (StateUpdate(4).a == 0).all()


# ---- when a token has settled; what a subclass adds ----


def test_halting_compares_fp32_changes_in_a_bf16_model():
    """A change that is rounded to 8 bits before it meets the threshold."""
    h = torch.randn(2, 5, 32).bfloat16()
    assert torch.equal(mythos.relative_change(*h), mythos.relative_change(*h.float()))
    model, tokens, tried = make().bfloat16(), ids(1, 1), 0
    changes = diagnostics(model, tokens, n_loops=8)["change"].flatten().tolist()
    for t, change in enumerate(changes[:-1], start=1):
        if change == min(changes[:t]):
            for factor, used in ((1 + 1e-4, t), (1 - 1e-4, t + 1)):
                info = diagnostics(model, tokens, n_loops=8, halt_threshold=change * factor)
                assert info["loops_used"].item() == t if used == t else info["loops_used"] > t
            tried += 1
    assert tried > 2


def test_a_state_that_explodes_does_not_count_as_settled():
    """inf/inf = nan is not below the threshold: halting that calls an explosion a fixed point."""
    model = make(spectral_radius_target=None)
    model.state_update.a.data.fill_(30.0)
    used = diagnostics(model, ids(1, 4), n_loops=60, halt_threshold=0.01)["loops_used"]
    assert (used == 60).all()


class Curious(RecurrentDepthTransformer):
    """What a reader adds first: a learned h_0, a look at t, a halting rule, experts in the coda."""

    def __init__(self, **fields):
        super().__init__(**fields)
        self.h_0 = nn.Parameter(torch.ones(self.config.d_model))
        D, self.loops = self.config.d_model, []
        self.coda[0].ffn = MixtureOfExperts(D, 16, 6, 3)

    def initial_state(self, e):
        return self.h_0.expand_as(e)

    def step(self, h, e, rope, t, *more):
        self.loops.append((t, h[0, 0, 0].item()))
        return super().step(h, e, rope, t, *more)

    def has_settled(self, h_next, h, halt_threshold):
        return torch.full(h.shape[:2], len(self.loops) == 2)


def test_what_a_subclass_adds_is_used_everywhere():
    """A second place that starts at zeros, counts loops, measures a change or looks for experts."""
    torch.manual_seed(0)
    model, tokens = Curious(**SMALL).eval(), ids(2, 4)
    seen = diagnostics(model, tokens, n_loops=3)
    assert [t for t, _ in model.loops] == [0, 1, 2] and model.loops[0][1] == 1.0
    e, rope = model.run_prelude(tokens)
    h = model.step(torch.ones_like(e), e, rope, 0)
    assert_close(seen["change"][0], (h - 1).norm(dim=-1) / h.norm(dim=-1))
    assert seen["expert_load"].shape == (3, 1, 4)  # of the looped layer, not of the coda
    for n_loops in (0, 2):
        model.loops.clear()
        loop_gain(model, tokens, n_loops=n_loops, iterations=2)
        assert [t for t, _ in model.loops] == [*range(n_loops + 1)] and model.loops[0][1] == 1.0
    generate = functools.partial(model.generate, max_new_tokens=1)
    for call in (model, functools.partial(diagnostics, model), generate):
        model.loops.clear()
        call(tokens, n_loops=9, halt_threshold=0.1)
        assert len(model.loops) == 2
    biased = make()
    biased.head.bias = nn.Parameter(torch.ones(37))
    for refusing, name in ((model, "h_0"), (biased, "head.bias")):
        with pytest.raises(ValueError, match=rf"^init_weights: got \[.*'{name}'\], expected"):
            refusing.init_weights()
    del model.h_0  # a parameter belongs into a module that can reset it
    model.start = nn.LayerNorm(32)
    model.start.weight.data.fill_(7)
    model.init_weights()
    assert (model.start.weight == 1).all()


# ---- sizes ----

SIZES = ("1B", "3B", "7B", "10B", "50B", "70B", "100B", "500B", "1T")


@functools.cache
def named(name):
    with torch.device("meta"):
        return RecurrentDepthTransformer(get_model_config(name))


@pytest.mark.parametrize("name", SIZES)
def test_named_size(name):
    """A name that is true for a placeholder vocabulary only; shared experts dominate (flaw 19)."""
    model, c = named(name), get_model_config(name)
    want = float(name[:-1]) * (1e12 if name.endswith("T") else 1e9)
    assert abs(num_params(model) / want - 1) < 0.01 and c.vocab_size >= 65_536
    shared = sum(p.numel() for key, p in model.named_parameters() if ".shared." in key)
    routed = c.recurrent_layers * c.num_experts_per_token * 3 * c.d_model * c.d_expert
    assert 0 < shared < routed / 3 and shared < num_params(model, active=True) / 5
    gqa = mythos.derive_widths(dataclasses.replace(c, attention_type="gqa"))
    assert 3.5 < gqa.row / model.widths.row < 3.8  # flaw 15: cache numbers per token


def test_sizes_grow_and_names_are_forgiving():
    """Loops, experts or context that do not grow with size; a name with only one spelling."""
    configs = [get_model_config(name) for name in SIZES]
    for field in ("max_loop_iters", "num_experts", "max_seq_len"):
        numbers = [getattr(c, field) for c in configs]
        assert numbers == sorted(numbers) and numbers[0] < numbers[-1]
    assert (configs[0].max_loop_iters, configs[-1].max_loop_iters) == (8, 32)
    assert configs[SIZES.index("70B")].max_seq_len == 32_768
    tiny = get_model_config("TINY")
    assert get_model_config("1t") == configs[-1] and tiny.d_model <= 128
    assert all(c.embed_norm for c in configs) and not tiny.embed_norm  # see there
    for wrong in ("8B", "", None, 7, []):
        with pytest.raises(ValueError, match="^name: got .*" + ".*".join(("tiny", *SIZES))):
            get_model_config(wrong)


def test_a_large_model_runs_on_the_meta_device():
    """A 7B model that can be built without memory but not called: its shapes stay unknown."""
    with torch.device("meta"):
        model = RecurrentDepthTransformer(get_model_config("7B"))
        logits, loss = model(torch.zeros(1, 3, dtype=torch.int64), n_loops=2)
    assert logits.shape == (1, 3, 131_072) and logits.is_meta and loss is None


# ---- config and bad calls ----

BAD_FIELDS = dict(
    attention_type=("mal", None), vocab_size=(0,), d_model=(32.0,), n_heads=(True, None, 3, 0),
    n_kv_heads=(0,), head_dim=(6, 0), d_ff=(-1,), max_seq_len=("64",), prelude_layers=(-1,),
    recurrent_layers=(None,), coda_layers=(True,), max_loop_iters=(1.5,), num_experts=(-1,),
    num_experts_per_token=(5, 0), num_shared_experts=(-1,), d_expert=(12,), kv_lora_rank=(0,),
    q_lora_rank=(0,), spectral_radius_target=(1, 1.5, 0.0, True, math.nan, "0.9"),
    rope_theta=(math.inf, None, 0, 0.5), norm_eps=(-1e-6, "0"), embed_norm=(1, None),
)  # fmt: skip


@pytest.mark.parametrize(
    "field, fields",
    [(field, {field: bad}) for field, bads in BAD_FIELDS.items() for bad in bads]
    + [("head_dim", dict(head_dim=7, attention_type="gqa"))]
    + [("n_kv_heads", dict(n_kv_heads=3, attention_type="gqa"))]
    + [("d_model", dict(d_model=36, head_dim=8))],
    ids=str,
)
def test_bad_config_is_refused(field, fields):
    """A typo that means another attention; widths that fail late or never (flaw 17)."""
    expected = "'mla' or 'gqa'" if field == "attention_type" else "."
    with pytest.raises(ValueError, match=f"^{field}: got {fields[field]!r}, expected .*{expected}"):
        MythosConfig(**(SMALL | fields))


def test_a_width_that_is_not_used_stops_nobody():
    """Fewer heads for a 1B model with MLA, refused because of GQA's key/value heads."""
    fewer = dataclasses.replace(get_model_config("1B"), n_heads=12)
    with pytest.raises(ValueError, match="^n_kv_heads: got 8"):
        dataclasses.replace(fewer, attention_type="gqa")


def test_config_is_frozen_and_never_rewritten():
    """A width filled in at construction goes stale when another field is replaced."""
    config = MythosConfig(d_model=64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 32
    mla, gqa = RecurrentDepthTransformer(config), RecurrentDepthTransformer(d_model=64)
    assert mla.config == gqa.config == config and config.head_dim is None
    assert mythos.derive_widths(dataclasses.replace(config, d_model=128)).head_dim == 32
    gqa = RecurrentDepthTransformer(config, attention_type="gqa")
    assert gqa.config == dataclasses.replace(config, attention_type="gqa")
    assert type(gqa.recurrent[0].attention) is GQA and type(mla.recurrent[0].attention) is MLA


def test_default_widths_follow_their_rules():
    """A rule that is one thing in the comment and another in the code."""
    w = mythos.derive_widths(MythosConfig(d_model=160, n_heads=10, num_experts_per_token=4))
    want = dict(head_dim=16, n_kv_heads=10, kv_lora_rank=64, d_ff=448, d_expert=96, d_model=160)
    assert vars(w).items() >= (want | dict(rope_dim=8, row=72)).items()
    w = mythos.derive_widths(MythosConfig(n_heads=16, attention_type="gqa"))
    assert (w.n_kv_heads, w.rope_dim, w.row) == (4, 8, 64)


def test_a_config_can_be_extended():
    """A field whose own bounds nobody reads; a rule for one kind of number that refuses another."""
    dropout = Annotated[float, "a number in [0, 1)", lambda x: 0 <= x < 1]
    extra = [("dropout", dropout, 0.0), ("window", mythos.PosInt | None, None), ("note", str, "")]
    Wider = dataclasses.make_dataclass("Wider", extra, bases=(MythosConfig,), frozen=True)
    assert Wider().dropout == 0.0 and Wider(window=3).window == 3
    later = """from __future__ import annotations\nclass Later(MythosConfig):
        window: mythos.PosInt | None = None"""
    exec(later, space := {**globals()})  # annotations are strings there
    with pytest.raises(ValueError, match="^window: got 0, expected an integer >= 1 or None$"):
        dataclasses.dataclass(space["Later"], frozen=True)(window=0)
    for field, bad, expected in (
        ("dropout", 1.0, r"a number in \[0, 1\)"), ("dropout", None, r"a number in \[0, 1\)"),
        ("window", 0, "an integer >= 1 or None"), ("d_model", -1, "an integer >= 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{field}: got {bad}, expected {expected}$"):
            Wider(**{field: bad})


def test_every_number_of_a_config_states_its_bounds():
    """A number that nothing checks. (Of a call there is none: no rule for it is a KeyError.)"""
    kinds = MythosConfig.__annotations__
    numbers = {name for name, kind in kinds.items() if kind not in (bool, str)}
    assert mythos.rules_of(MythosConfig).keys() == numbers


@both
def test_every_norm_has_the_eps_of_the_config(kind):
    """norm_eps that does not reach one of the norms."""
    model = make(attention_type=kind, q_lora_rank=12, norm_eps=1e-3)
    assert {m.eps for m in model.modules() if isinstance(m, nn.RMSNorm)} == {1e-3}


def test_every_field_is_used():
    """An option that is accepted and ignored (flaw 22)."""
    tokens, base, tried = ids(1, 6), make(), {"max_seq_len", "n_kv_heads"}
    for name, value in dict(
        rope_theta=10.0, norm_eps=1.0, spectral_radius_target=0.5, max_loop_iters=5,
        num_experts_per_token=1, attention_type="gqa", n_heads=2, d_ff=40, d_expert=24,
        num_shared_experts=2, num_experts=5, head_dim=12, vocab_size=9, d_model=48, kv_lora_rank=9,
        q_lora_rank=9, prelude_layers=2, recurrent_layers=2, coda_layers=2,
        embed_norm=False,
    ).items():  # fmt: skip
        other = make(**{name: value})
        resized = num_params(other) != num_params(base)
        assert resized or not torch.allclose(other(tokens)[0], base(tokens)[0], atol=1e-3), name
        tried.add(name)
    assert tried == {field.name for field in dataclasses.fields(MythosConfig)}
    gqa = [num_params(make(attention_type="gqa", n_kv_heads=G)) for G in (1, None, 2)]
    assert gqa[0] == gqa[1] < gqa[2]


X = torch.ones(1, 4, dtype=torch.int64)
NaN, inf = math.nan, math.inf
BAD_CALLS = [  # a way to call the model, and arguments that it must refuse by name
    (lambda m, **bad: m(X, **bad), dict(
        n_loops=(-1, 1.0, True, "2"), grad_loops=(0, -1, 1.5, True),
        halt_threshold=(-0.1, NaN, inf, "0.3", True), targets=(X.float(), X * -100),
        logits_to_keep=(-1, 1.0, None),
    )),
    (lambda m, **bad: m(X, X, **bad), dict(logits_to_keep=(1,))),
    (lambda m, max_new_tokens=1, **bad: m.generate(X, max_new_tokens, **bad), dict(
        n_loops=(-1, 2.0), halt_threshold=(-1,), max_new_tokens=(-1, 1.5), top_k=(0, 2.0),
        temperature=(-1, inf, NaN, "1", True), top_p=(0, 1.5, NaN, "a"), eos_token=(37, -1, 1.0),
    )),
    (lambda m, **bad: sample(X.float(), **bad), dict(temperature=(-1,), top_k=(0,), top_p=(0,))),
    (lambda m, tokens: m(tokens), dict(tokens=(X.float(), [[1, 2]]))),
    (lambda m, batch_size=1, length=4: m.new_cache(batch_size, length),
     dict(batch_size=(0, True), length=(0, 4.0, 49))),
    (lambda m, **bad: diagnostics(m, X, **bad), dict(n_loops=(0, -1))),
    (lambda m, **bad: loop_gain(m, X, **bad), dict(n_loops=(-1,), iterations=(0, 2.5))),
    (lambda m, **bad: flops_per_token(m, **bad), dict(n_loops=(-1,), context=(-1, 1.5, NaN))),
    (lambda m, **bad: kv_bytes_per_token(m, 2, **bad), dict(bytes_per_number=(-2, 0, True))),
    (lambda m, **bad: m.update_router_bias(**bad), dict(speed=(-1, NaN, inf, "1", 10**400))),
    (lambda m, **bad: m(X, **bad, halt_threshold=0.1), dict(grad_loops=(1,))),
    (lambda m, **bad: m(X, **bad, cache=m.new_cache(1, 4)), dict(grad_loops=(1,))),
    (lambda m, n_loops: make(recurrent_layers=0)(X, n_loops=n_loops), dict(n_loops=(1,))),
    (lambda m, cache: m.run_loop(*m.run_prelude(X), 2, None, 0.1, cache), dict(cache=(None,))),
    (lambda m, config: RecurrentDepthTransformer(config), dict(config=(SMALL,))),
]  # fmt: skip
BAD_TENSORS = [
    *[("tokens, ids", lambda m, i=i: m(X * i)) for i in (37, -1)],
    *[("tokens", lambda m, x=x: m(x)) for x in (X[:, :0], X[:0], X[0], X.to("meta"))],
    ("tokens", lambda m: m(X.repeat(1, 13)[:, :49])),
    ("targets", lambda m: m(X, X[:, 1:])),
    *[("targets, ids", lambda m, i=i: m(X, X * i)) for i in (37, -1)],
    ("tokens", lambda m: m.generate(X, 45)),
    ("tokens, ids", lambda m: diagnostics(m, X * 37)),
]


@pytest.mark.parametrize(
    "field, call",
    [(k, functools.partial(f, **{k: v})) for f, bad in BAD_CALLS for k in bad for v in bad[k]]
    + BAD_TENSORS,
)
def test_bad_call_is_refused(field, call):
    """A mistake of the caller that crashes deep inside, or is silently taken for something else."""
    refused = pytest.raises(ValueError, match="^" + re.escape(field) + ": got (.|\n)*, expected ")
    with torch.device("cpu"), refused:  # X is there
        call(make())


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
