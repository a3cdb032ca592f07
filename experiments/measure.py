# SPDX-License-Identifier: MIT
"""Look inside a model, and count what it costs: functions that take a model of mythos.py.

diagnostics       what happens in each loop
spectral_radius   of A, exact
loop_gain         spectral radius of the whole loop's Jacobian
num_params, executed_params, flops_per_token, kv_bytes_per_token
"""

import torch
from torch import Tensor, nn

from mythos import (
    RULES,
    MixtureOfExperts,
    NonNegInt,
    PosInt,
    RecurrentDepthTransformer,
    check_call,
    check_loops,
    check_numbers,
    evaluation_mode,
    expect,
    expert_layers,
    relative_change,
    rules_of,
)

# ------------------------------------------------------------------------------------------------
# Looking inside
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def diagnostics(model: RecurrentDepthTransformer, tokens: Tensor, *, n_loops: int | None = None,
                halt_threshold: float | None = None) -> dict[str, Tensor]:  # fmt: skip
    """What happens in each of the L loops that were run (fewer than n_loops if all halt early).

    Entry t is about h_{t+1}, the state that loop t produced.

    state_norm   (L, N, T)          |h_{t+1}|, Euclidean
    change       (L, N, T)          |h_{t+1} − h_t| / |h_{t+1}|, what `has_settled` compares
    logits       (L, N, T, V)       the answer if the loop ended here
    expert_load  (L, layers, E)     tokens that each looped layer sends to each expert; halted ones
                                    are still computed, and counted
    loops_used   (N, T)             loops until the token halted, or all L
    """
    n_loops = check_call(model, tokens, n_loops=n_loops, halt_threshold=halt_threshold)
    expect(n_loops > 0, "n_loops", n_loops, "at least 1 loop to look at")
    check_parts(model)
    cache = None if halt_threshold is None else model.new_cache(*tokens.shape, n_loops)
    states, loads = [], []

    def count(moe: MixtureOfExperts, inputs: tuple[Tensor]) -> None:
        chosen, _ = moe.route(inputs[0].flatten(0, -2))
        loads.append(chosen.flatten().bincount(minlength=moe.router_bias.numel()))

    with evaluation_mode(model) as at_exit:
        for moe in expert_layers(model.recurrent):
            at_exit.callback(moe.register_forward_pre_hook(count).remove)
        e, rope = model.run_prelude(tokens, cache)
        _, used = model.run_loop(e, rope, n_loops, None, halt_threshold, cache, states)
        logits = torch.stack([model.run_coda(h, rope) for h in states])
    h = torch.stack([model.initial_state(e), *states])  # (L + 1, N, T, D)
    change, norm = relative_change(h[1:], h[:-1]), h[1:].float().norm(dim=-1)
    load = torch.cat([used.new_empty(0), *loads])  # without experts there are no loads
    load = load.view(len(states), len(loads) // len(states), model.config.num_experts)
    return dict(state_norm=norm, change=change, logits=logits, expert_load=load, loops_used=used)


@torch.no_grad()
def spectral_radius(model: RecurrentDepthTransformer) -> float:
    """rho(A) = max|A_i|, since A is diagonal. Below 1 it bounds the state (see StateUpdate)."""
    check_parts(model)
    return model.state_update.diagonal_A().abs().max().item()


def loop_gain(model: RecurrentDepthTransformer, tokens: Tensor, *, n_loops: int | None = None,
              iterations: PosInt = 100, generator=None) -> float:  # fmt: skip
    """Spectral radius of the Jacobian J = d h_{t+1} / d h_t at the state after n_loops loops.

    Near a fixed point it tells whether the loop settles, which rho(A) does not: above 1 some small
    disturbance grows from loop to loop, below 1 all die out in the end. n_loops = 0 measures the
    first loop, at h_0. For a batch, the result is the largest of its sequences.
    Power iteration v ← Jᵀv / |Jᵀv| with vector-Jacobian products: J is never formed, and Jᵀ has the
    same eigenvalues. |Jᵀv| oscillates when the leading eigenvalues are a complex pair, so it is
    averaged (geometric mean) over the later half of the iterations. More iterations are more
    exact: take 1000 for a verdict near 1.
    """
    n_loops = check_call(model, tokens, n_loops=n_loops, iterations=iterations)
    check_parts(model)
    with evaluation_mode(model), torch.inference_mode(False), torch.no_grad():
        e, rope = model.run_prelude(tokens)
        h, _ = model.run_loop(e, rope, n_loops)
        with torch.enable_grad():
            h_next = model.step(h.requires_grad_(), e, rope, n_loops)
    v = torch.randn(h.shape, generator=generator, device=h.device).to(h.dtype)
    v, log_growth = v / v.norm(), []
    for _ in range(iterations):
        # fp32: bf16 would round the growth
        v = torch.autograd.grad(h_next, h, v, retain_graph=True)[0].float()
        log_growth.append(v.norm().log())
        v = (v / v.norm().clamp_min(1e-30)).to(h.dtype)  # J may be 0
    return torch.stack(log_growth[iterations // 2 :]).mean().exp().item()


def check_parts(model: RecurrentDepthTransformer) -> None:
    """For what looks at the parts of a model without calling it: FSDP would not fetch the weights.

    A gradient taken twice would even read memory that FSDP has freed after the first.
    """
    expect(len(model.recurrent) > 0, "recurrent_layers", 0, "a model with a loop")
    sharded = any(hasattr(module, "unshard") for module in model.modules())
    expect(not sharded, "model", "weights sharded by FSDP", "a model with the gathered weights")


# ------------------------------------------------------------------------------------------------
# Counting
# ------------------------------------------------------------------------------------------------


def num_params(module: nn.Module, *, active: bool = False) -> int:
    """Parameters and router biases. active: with K instead of E routed experts, that is, what one
    token uses (the embedding table counted whole, as is customary)."""
    total = sum(p.numel() for p in module.parameters())
    for moe in expert_layers(module):
        E, K = moe.router_bias.numel(), moe.num_experts_per_token
        total += E  # the router bias
        if active:
            total -= (E - K) * (moe.gate_up_proj[0].numel() + moe.down_proj[0].numel())
    return total


def executed_params(model: RecurrentDepthTransformer, n_loops: int | None = None) -> int:
    """Active parameters, those of the loop counted n_loops times."""
    parts = (model.recurrent, model.loop_norm, model.state_update) if model.recurrent else ()
    loop = sum(num_params(part, active=True) for part in parts)
    # The first loop is counted already.
    return num_params(model, active=True) + (check_loops(model, n_loops) - 1) * loop


def flops_per_token(model: RecurrentDepthTransformer, n_loops: int | None = None,
                    context: NonNegInt = 0) -> int:  # fmt: skip
    """Forward FLOPs for one token: 2 per executed parameter, and attention to `context` keys.

    The embedding is a lookup and costs nothing. Training costs three times as much (forward, and a
    backward of twice the forward). In causal attention over T tokens the mean context is T / 2.
    """
    check_numbers(context=context)
    tied = model.head.weight is model.embed.weight  # then the one matrix is the head's product
    multiplied = executed_params(model, n_loops) - (0 if tied else model.embed.weight.numel())
    # For one head and key: a score and a value, C wide each. MLA scores its rotated part, too.
    rotated = model.widths.rope_dim if model.config.attention_type == "mla" else 0
    per_key = model.config.n_heads * (2 * model.widths.head_dim + rotated)
    return 2 * multiplied + 2 * layer_applications(model, n_loops) * per_key * context


def kv_bytes_per_token(model: RecurrentDepthTransformer, n_loops: int | None = None,
                       bytes_per_number: PosInt = 2) -> int:  # fmt: skip
    """Cache bytes for one token: row width × layer applications × bytes (2: bf16)."""
    check_numbers(bytes_per_number=bytes_per_number)
    return model.widths.row * layer_applications(model, n_loops) * bytes_per_number


def layer_applications(model: RecurrentDepthTransformer, n_loops: int | None) -> int:
    c = model.config
    return c.prelude_layers + check_loops(model, n_loops) * c.recurrent_layers + c.coda_layers


RULES |= rules_of(loop_gain, flops_per_token, kv_bytes_per_token)  # for `check_numbers`
