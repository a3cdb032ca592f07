# SPDX-License-Identifier: MIT
"""Tests of measure.py. Docstrings name the mistakes."""

import pytest
import torch
from torch.testing import assert_close

from experiments.measure import (
    diagnostics,
    executed_params,
    flops_per_token,
    kv_bytes_per_token,
    loop_gain,
    num_params,
    spectral_radius,
)
from mythos import RecurrentDepthTransformer
from test_mythos import (
    both,
    clear_threshold,
    ids,
    make,
    on_each_device,
    seeded,
    with_and_without_halting,
)

__all__ = ["on_each_device"]  # a fixture


@both
@with_and_without_halting
def test_diagnostics(kind, halted):
    """A report about another computation than forward's, or one that changes the model."""
    model, tokens, n_loops = make(attention_type=kind, recurrent_layers=2), ids(2, 6), 5
    threshold = clear_threshold(model, tokens, n_loops, 0.7) if halted else None
    seen = diagnostics(model.train(), tokens, n_loops=n_loops, halt_threshold=threshold)
    assert model.training and not any(m._forward_pre_hooks for m in model.modules())
    used, L = seen["loops_used"], seen["loops_used"].max().item()
    assert {name: tuple(x.shape) for name, x in seen.items()} == dict(
        state_norm=(L, 2, 6), change=(L, 2, 6), logits=(L, 2, 6, 37), expert_load=(L, 2, 4),
        loops_used=(2, 6),
    )  # fmt: skip
    last, _ = model(tokens, n_loops=n_loops, halt_threshold=threshold)
    assert_close(seen["logits"][-1], last)
    assert torch.equal((seen["change"] > 0).sum(dim=0), used)
    assert torch.equal(seen["expert_load"].sum(dim=0), model.update_router_bias(0.0))
    if halted:
        last_change = seen["change"].gather(0, used[None] - 1)[0]
        assert used.min() < L and ((last_change < threshold) | (used == n_loops)).all()
        return
    e, rope = model.run_prelude(tokens)
    h = torch.zeros_like(e)
    for t in range(n_loops):
        old, h = h, model.step(h, e, rope, t)
        assert_close(seen["state_norm"][t], h.norm(dim=-1))
        assert_close(seen["change"][t], (h - old).norm(dim=-1) / h.norm(dim=-1))
        assert_close(seen["logits"][t], model(tokens, n_loops=t + 1)[0])


def test_looking_inside_under_inference_mode_and_without_experts():
    """A gain that cannot be asked for where one generates, or that counts loads; a load of another
    dtype if empty."""
    model, tokens = make(num_experts=0), ids(1, 4)
    want = loop_gain(model, tokens, iterations=4, generator=seeded())
    with torch.inference_mode():
        assert loop_gain(model, tokens, iterations=4, generator=seeded()) == want
    sparse = make().train()
    loop_gain(sparse, tokens, iterations=4)
    assert sparse.training and not sparse.recurrent[0].ffn.load.any()
    load = diagnostics(model, tokens, n_loops=2)["expert_load"]
    assert load.shape == (2, 0, 0) and load.dtype == torch.int64


@both
@pytest.mark.parametrize("n_loops", [0, 3])
def test_loop_gain_is_the_jacobians_spectral_radius(kind, n_loops):
    """rho(A) sold as the stability of the loop (flaw 5); a power iteration on something else."""
    model = make(1, d_model=16, n_heads=2, n_kv_heads=1, attention_type=kind)
    tokens = ids(1, 3)
    e, rope = model.run_prelude(tokens)
    h = model.run_loop(e, rope, n_loops)[0].detach()
    jacobian = torch.autograd.functional.jacobian(lambda h: model.step(h, e, rope, 0), h)
    want = torch.linalg.eigvals(jacobian.view(48, 48)).abs().max().item()
    gain = loop_gain(model, tokens, n_loops=n_loops, iterations=300, generator=seeded())
    assert abs(gain / want - 1) < 0.03 and abs(gain - spectral_radius(model)) > 0.1
    assert gain == loop_gain(model, tokens, n_loops=n_loops, iterations=300, generator=seeded())


def test_loop_gain_is_the_largest_over_the_batch():
    """The gain of the first sequence only."""
    model, tokens = make(2), ids(2, 3)
    gain = lambda x: loop_gain(model, x, n_loops=3, iterations=400, generator=seeded())  # noqa: E731
    alone = [gain(tokens[:1]), gain(tokens[1:])]
    assert abs(alone[0] / alone[1] - 1) > 0.02
    for x in (tokens, tokens.flip(0)):
        assert abs(gain(x) / max(alone) - 1) < 0.02


def test_loop_gain_without_block_is_rho():
    """A gain that is not in the units of rho(A), off by a factor or a square; nan once J is 0; a
    radius that a negative A does not have."""
    model = make()
    model.loop_norm.weight.data.zero_()  # R = 0
    assert abs(loop_gain(model, ids(1, 4)) / spectral_radius(model) - 1) < 0.01
    model.state_update.a.data.fill_(-1e30)  # A = 0, too: the state forgets at once
    assert loop_gain(model, ids(1, 4), iterations=4) == 0
    for p in model.recurrent.parameters():
        p.data.zero_()  # in fp16 their backward overflows on an input of 0
    assert loop_gain(model.half(), ids(1, 4), iterations=4) == 0
    free = make(spectral_radius_target=None)
    free.state_update.a.data[3] = -2.0
    assert spectral_radius(free) == pytest.approx(2 - 0.475)


def test_counts_agree_with_deepseek_v3():
    """Counting all experts as active, the router's bias not at all, or a cache row per head."""
    with torch.device("meta"):
        model = RecurrentDepthTransformer(
            vocab_size=129_280, d_model=7168, n_heads=128, head_dim=128, q_lora_rank=1536,
            kv_lora_rank=512, d_ff=18_432, prelude_layers=3, recurrent_layers=58, coda_layers=0,
            max_loop_iters=1, num_experts=256, num_experts_per_token=8, d_expert=2048,
        )  # fmt: skip
    extra = 5 * 7168  # what DeepSeek-V3 has no use for: A, B, and the norms of e, h + e and h
    assert num_params(model) - extra == 671_026_419_200
    assert num_params(model, active=True) - extra == 37_552_297_472
    assert executed_params(model) == num_params(model, active=True)
    assert kv_bytes_per_token(model, bytes_per_number=1) == 61 * 576 == 35_136


@pytest.mark.parametrize("n_loops", [0, 1, 5])
def test_flops_by_hand(n_loops):
    """Loops counted once, all experts, the embedding's lookup, or attention of a wrong width; the
    head's product forgotten where head and embedding are one matrix."""
    gqa = 2 * 32 * 32 + 2 * 32 * 16  # q and out; k and v
    dense = gqa + 3 * 32 * 48 + 2 * 32
    moe = gqa + 32 * 4 + 4 + (2 + 1) * 3 * 32 * 16 + 2 * 32  # router, bias, experts, norms
    run = 2 * dense + 3 * 32 + 32 * 37 + n_loops * (2 * moe + 3 * 32)  # norms, head; norm, A, B
    model, mla = make(attention_type="gqa", recurrent_layers=2), make(recurrent_layers=2)
    assert executed_params(model, n_loops) == 37 * 32 + run
    heads = (2 + 2 * n_loops) * 4  # each scores 100 keys and adds up 100 values
    assert flops_per_token(model, n_loops, context=100) == 2 * run + 2 * heads * (8 + 8) * 100
    scores = flops_per_token(mla, n_loops, context=100) - flops_per_token(mla, n_loops)
    assert scores == 2 * heads * (8 + 4 + 8) * 100
    assert kv_bytes_per_token(mla, n_loops) == 2 * (2 + 2 * n_loops) * (32 + 4)
    model.head.weight = model.embed.weight
    assert executed_params(model, n_loops) == flops_per_token(model, n_loops) / 2 == run
