# SPDX-License-Identifier: MIT
"""Mythos: a Recurrent-Depth Transformer in one readable file.

A language model that loops a few blocks instead of stacking many, so that the same weights can
think longer about harder input:

    e        = RMSNorm(Prelude(RMSNorm(embed(tokens))))   once
    h_0      = 0
    h_{t+1}  = A·h_t + B·e + R(h_t, e)                    in each loop t = 0 … L−1, same weights
    logits   = head(RMSNorm(Coda(RMSNorm(h_L))))          once; if L = 0, Coda(RMSNorm(e))

Prelude, Blocks and Coda are stacks of pre-norm transformer blocks; R(h, e) = Blocks(RMSNorm(h+e)).
A block returns its input plus what it computes, so R is RMSNorm(h + e) plus what the blocks add.
The state h is the scratch pad; the input e is offered again in every loop.

    model = RecurrentDepthTransformer(get_model_config("tiny"))
    logits, loss = model(tokens, targets, n_loops=8)     # depth is an argument, not a constant
    tokens = model.generate(tokens, 32, halt_threshold=0.3)

Read from the top: config, attention, feed-forward, block, state update, cache, sampling, model.
After the line END OF THE MODEL come sizes, plumbing and the checks of arguments: expect(ok, field,
got, expected) raises a ValueError unless ok. To look inside a model or count what it costs:
experiments/measure.py. Attentions, feed-forwards, Block and StateUpdate say under "To lift it" what
to copy with them into a file of yours, besides `import torch`.

Not here: training (train_tiny.py), tokenizers, dropout, multi-token prediction, multi-GPU code.
The architecture is speculation, after OpenMythos, a community's guess at how a looped model might
be built. Neither project is affiliated with Anthropic, and nobody has confirmed the architecture.

Letters in equations and shapes. A *row* is what the cache keeps of a token, per layer and loop.
    N  sequences in the batch     D  d_model              H  query heads
    T  new tokens in this call    C  head_dim             G  key/value heads (GQA)
    S  all tokens: past and new   Z  kv_lora_rank (MLA)   W  numbers in a row
    L  loops, t the current one   E  routed experts       K  experts chosen per token
    V  vocabulary

References: looped depth: Universal Transformer (arXiv 1807.03819), Huginn (2502.05171), Parcae
(2604.12946); GQA (2305.13245); MLA: DeepSeek-V2 (2405.04434); experts: DeepSeekMoE (2401.06066),
DeepSeek-V3 (2412.19437); loss-free balancing (2408.15664); RoPE (2104.09864); SwiGLU (2002.05202).
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Annotated, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------------
# Config
# ------------------------------------------------------------------------------------------------


# What a number may be: its type, in words, and a test. `check_numbers`, at the end of the file,
# reads these annotations: a config's, and those of the functions below.
NonNegInt = Annotated[int, "an integer >= 0", lambda x: x >= 0]
PosInt = Annotated[int, "an integer >= 1", lambda x: x >= 1]
NonNegFloat = Annotated[float, "a finite number >= 0", lambda x: x >= 0]
PosFloat = Annotated[float, "a finite number above 0", lambda x: x > 0]
Probability = Annotated[float, "a number in (0, 1]", lambda x: 0 < x <= 1]


@dataclass(frozen=True)
class MythosConfig:
    """Every number of the architecture. The defaults build in a moment on a laptop.

    A width that is None follows the rule in its comment: `derive_widths` has the number.
    Raises ValueError at construction if a field, or a combination of fields, is impossible. The
    checks read the types below. A field of yours may have one of them, or its own, such as
    Annotated[float, "a number in [0, 1)", lambda x: 0 <= x < 1]; a bare int or float is not
    checked. `make_block` gets all fields, with the widths filled in.
    """

    vocab_size: PosInt = 256  # V; 256: bytes
    d_model: PosInt = 128  # D, width of the residual stream
    max_seq_len: PosInt = 1024  # the longest sequence accepted, in tokens
    embed_norm: bool = True  # of the embedding (std 0.02), which else drowns in the blocks

    # The three stages. With recurrent_layers = 0 there is no loop: a plain transformer.
    prelude_layers: NonNegInt = 1  # blocks run once, before the loop
    recurrent_layers: NonNegInt = 1  # blocks inside the loop, run n_loops times
    coda_layers: NonNegInt = 1  # blocks run once, after the loop
    max_loop_iters: NonNegInt = 8  # the default L, not a limit: a call may ask for more
    spectral_radius_target: PosFloat | None = 0.95  # < 1; rho(A) stays below it; None: A is free

    # Attention. head_dim is the width of a query head; MLA adds head_dim / 2 numbers for RoPE.
    attention_type: str = "mla"  # "mla" or "gqa"
    n_heads: PosInt = 4  # H
    head_dim: PosInt | None = None  # C; None: d_model / n_heads
    n_kv_heads: PosInt | None = None  # G, GQA only; None: n_heads / 4 if whole, else n_heads
    kv_lora_rank: PosInt | None = None  # Z, MLA only; None: 4·head_dim, as in DeepSeek-V2
    q_lora_rank: PosInt | None = None  # MLA only; None: queries are not compressed
    rope_theta: PosFloat = 10_000.0  # base of RoPE's angles: larger means slower rotation

    # Feed-forward: dense SwiGLU in prelude and coda, experts in the loop (num_experts = 0: dense).
    d_ff: PosInt | None = None  # hidden width of a SwiGLU; None: 8/3·d_model, rounded up to 64·n
    num_experts: NonNegInt = 8  # E, routed
    num_experts_per_token: PosInt = 2  # K
    num_shared_experts: NonNegInt = 1  # experts that every token uses, besides its K
    d_expert: PosInt | None = None  # one expert's; None: d_ff / (K + shared), rounded up to 8·n

    norm_eps: PosFloat = 1e-6

    def __post_init__(self) -> None:
        check_config(self)


# ------------------------------------------------------------------------------------------------
# Attention: rotary positions, then GQA and MLA with one interface
# ------------------------------------------------------------------------------------------------


def rope_angles(positions: Tensor, width: int, theta: float = 10_000.0) -> Tensor:
    """cos and sin of RoPE's rotation angles, fp32, (2, T, width/2).

    Computed from integer positions (T,) on every call: a stored table would lose its precision in
    `.to(torch.bfloat16)` and its values in `to_empty`.
    """
    two_i = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32)
    # angle[position, i] = position · theta^(−2i / width)
    angles = positions.float()[:, None] * theta ** (-two_i / width)
    return torch.stack([angles.cos(), angles.sin()])


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + width/2}) of x (..., T, width) by its angle (RoFormer; the
    pairing is GPT-NeoX's). rope: from `rope_angles`."""
    cos, sin = rope
    x1, x2 = x.chunk(2, dim=-1)  # low-precision x meets fp32 cos: the product is fp32
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1).to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale·q·kᵀ)·v for the T newest of S tokens: (N, H, T, width of v).

    Query i is token S − T + i, and sees the keys 0 … S − T + i. q is (N, H, T, width); k and v
    (N, G, S, ..) may have fewer heads. scale: None is 1 / sqrt(width).
    """
    (N, H, T, _), (_, G, S, _) = q.shape, k.shape
    # One formula, three calls: the first two need no mask in memory.
    if T == S:  # all tokens are new: query i sees keys 0 … i, which is what is_causal means
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    if T == 1:  # it sees all keys. The H/G heads that share a key go as H/G queries of one head
        out = F.scaled_dot_product_attention(q.reshape(N, G, H // G, -1), k, v, scale=scale)
        return out.reshape(N, H, 1, -1)
    # New tokens behind a past: is_causal would let query 0 see key 0 alone. So the mask is written.
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


class GroupedQueryAttention(nn.Module):
    """Causal self-attention in which H / G query heads share one key/value head (Ainslie 2023).

    forward: x (N, T, D), rope = `rope_angles` of x's positions -> (N, T, D). A token's row, which
    later tokens need, holds its keys and values: W = 2·G·C numbers. `append`, given when there is a
    cache, stores the new rows (N, T, W) and returns the rows of all tokens so far, (N, S, W).
    attend: called as `causal_attention` is. For another, say a sliding window: see `make_block`.

    To lift it: `nn`, `F`, `Tensor`, `apply_rope`, `causal_attention`.
    """

    def __init__(self, *, d_model: int, n_heads: int, n_kv_heads: int, head_dim: int,
                 attend=causal_attention) -> None:  # fmt: skip
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.attend = attend
        self.q_proj = nn.Linear(d_model, n_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, n_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, n_kv_heads * head_dim, bias=False)
        self.out_proj = nn.Linear(n_heads * head_dim, d_model, bias=False)

    def forward(self, x: Tensor, rope: Tensor, append=None) -> Tensor:
        (N, T, _), C, G = x.shape, self.head_dim, self.n_kv_heads
        q = self.q_proj(x).view(N, T, -1, C).transpose(1, 2)  # (N, H, T, C)
        k = self.k_proj(x).view(N, T, G, C).transpose(1, 2)  # (N, G, T, C)
        v = self.v_proj(x).view(N, T, G, C).transpose(1, 2)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        if append is not None:
            rows = append(torch.cat([k, v], dim=1).transpose(1, 2).flatten(2))  # (N, S, 2·G·C)
            k, v = rows.view(N, -1, 2 * G, C).transpose(1, 2).chunk(2, dim=1)  # (N, G, S, C) each
        return self.out_proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


class MultiHeadLatentAttention(nn.Module):
    """Causal self-attention whose keys and values are rebuilt from one small latent (DeepSeek-V2).

    forward, rope, append and attend as in GroupedQueryAttention. A row is a latent of Z numbers and
    *one* rotated key of rope_dim numbers for all heads: W = Z + rope_dim, however many heads.

    Each head's score has a part without positions, C wide, and a rotated part:
        score(i, j) = (q_i·k_j + q_rope_i·k_rope_j) / sqrt(C + rope_dim)
        k_j = U_k·latent_j,   v_j = U_v·latent_j                     kv_up_proj holds U_k and U_v
    (k_j is DeepSeek's k_nope.) RoPE rotates by an angle that depends on j. If it rotated k_j too,
    that rotation would stand between q and U_k, and `absorbed` below could not apply U_k to the
    query instead. Hence the separate rotated key.

    To lift it: `nn`, `F`, `Tensor`, `apply_rope`, `causal_attention`, `is_plain_linear`.
    """

    def __init__(self, *, d_model: int, n_heads: int, head_dim: int, rope_dim: int,
                 kv_lora_rank: int, q_lora_rank: int | None = None, norm_eps: float = 1e-6,
                 attend=causal_attention) -> None:  # fmt: skip
        super().__init__()
        self.n_heads, self.head_dim, self.rope_dim = n_heads, head_dim, rope_dim
        self.kv_lora_rank, self.attend = kv_lora_rank, attend
        q_width = n_heads * (head_dim + rope_dim)
        if q_lora_rank is None:
            self.q_proj = nn.Linear(d_model, q_width, bias=False)
        else:
            self.q_proj = nn.Sequential(
                nn.Linear(d_model, q_lora_rank, bias=False),
                nn.RMSNorm(q_lora_rank, eps=norm_eps),
                nn.Linear(q_lora_rank, q_width, bias=False),
            )
        self.kv_down_proj = nn.Linear(d_model, kv_lora_rank + rope_dim, bias=False)
        self.kv_norm = nn.RMSNorm(kv_lora_rank, eps=norm_eps)
        self.kv_up_proj = nn.Linear(kv_lora_rank, n_heads * 2 * head_dim, bias=False)
        self.out_proj = nn.Linear(n_heads * head_dim, d_model, bias=False)

    def forward(self, x: Tensor, rope: Tensor, append=None) -> Tensor:
        N, T, _ = x.shape
        q = self.q_proj(x).view(N, T, self.n_heads, -1).transpose(1, 2)  # (N, H, T, C + rope_dim)
        q, q_rope = q.split([self.head_dim, self.rope_dim], dim=-1)
        latent, k_rope = self.kv_down_proj(x).split([self.kv_lora_rank, self.rope_dim], dim=-1)
        q_rope, k_rope = apply_rope(q_rope, rope), apply_rope(k_rope, rope)
        rows = torch.cat([self.kv_norm(latent), k_rope], dim=-1)  # (N, T, W)
        if append is not None:
            rows = append(rows)  # (N, S, W)
        # Two ways to one result. For one token after a past `absorbed` is far cheaper; for many its
        # products, W wide, cost more than rebuilding. `absorbed` reads a weight itself: not for an
        # adapter or a quantised layer, which must be called.
        absorb = T == 1 and rows.shape[1] > 1 and is_plain_linear(self.kv_up_proj)
        out = self.absorbed(q, q_rope, rows) if absorb else self.expanded(q, q_rope, rows)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def expanded(self, q: Tensor, q_rope: Tensor, rows: Tensor) -> Tensor:
        """Rebuild each head's keys and values from all S rows, then attend: (N, H, T, C)."""
        N, S, _ = rows.shape
        latent, k_rope = rows.split([self.kv_lora_rank, self.rope_dim], dim=-1)
        kv = self.kv_up_proj(latent).view(N, S, self.n_heads, -1).transpose(1, 2)
        k, v = kv.chunk(2, dim=-1)  # (N, H, S, C) each
        k_rope = k_rope[:, None].expand(-1, self.n_heads, -1, -1)  # the same key for every head
        q, k = torch.cat([q, q_rope], dim=-1), torch.cat([k, k_rope], dim=-1)
        v = F.pad(v, (0, self.rope_dim))  # the fast kernels want values as wide as keys
        return self.attend(q, k, v)[..., : self.head_dim]

    def absorbed(self, q: Tensor, q_rope: Tensor, rows: Tensor) -> Tensor:
        """Attend to the rows themselves: (N, H, T, C).

        q·(U_k·latent) = (U_kᵀ·q)·latent and Σ p·(U_v·latent) = U_v·(Σ p·latent): apply U_kᵀ to the
        query and U_v to the sum, and no key or value is ever rebuilt. One row then serves all
        heads, as key (all W numbers) and as value (the first Z).
        """
        U = self.kv_up_proj.weight.view(self.n_heads, 2 * self.head_dim, self.kv_lora_rank)
        U_k, U_v = U.chunk(2, dim=1)
        q = torch.cat([torch.einsum("nhtc,hcz->nhtz", q, U_k), q_rope], dim=-1)  # (N, H, T, W)
        rows = rows[:, None]  # (N, 1, S, W): one key/value head
        # q is W wide now, but the score is still that of C + rope_dim numbers: scale by those.
        out = self.attend(q, rows, rows, scale=(self.head_dim + self.rope_dim) ** -0.5)
        # As values, the rows' last rope_dim numbers, rotated keys, are averaged for nothing: cut.
        out = out[..., : self.kv_lora_rank]
        return torch.einsum("nhtz,hcz->nhtc", out, U_v)


# ------------------------------------------------------------------------------------------------
# Feed-forward: SwiGLU, and a mixture of such experts
# ------------------------------------------------------------------------------------------------


class SwiGLU(nn.Module):
    """Gated feed-forward (Shazeer 2020): down(silu(gate(x)) ⊙ up(x)), (..., D) -> (..., D).

    One product, gate_up_proj, computes gate(x) and up(x), in this order.

    To lift it: `nn`, `F`, `Tensor`.
    """

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(d_model, 2 * d_hidden, bias=False)
        self.down_proj = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class MixtureOfExperts(nn.Module):
    """Shared experts for every token plus K of E routed ones (DeepSeekMoE, DeepSeek-V3).

    forward: x (N, T, D) -> (N, T, D); not in fp64, which F.grouped_mm refuses.

        s      = sigmoid(x·W_router)                       one score per expert, in (0, 1)
        chosen = the K experts with the largest s + bias
        gate_i = s_i / Σ_chosen s                          without the bias; K = 1: s_i itself
        out    = shared(x) + Σ_chosen gate_i · expert_i(x)

    The bias only steers *which* experts are chosen. It is not learned: `update_router_bias` raises
    it for experts that got too few tokens and lowers it for those that got too many. So the load
    evens out without an auxiliary loss, whose gradients would interfere (Wang et al. 2024).

    To lift it: `nn`, `F`, `Tensor`, `SwiGLU`, `grouped_mm` (which says what it needs).
    """

    def __init__(self, d_model: int, d_expert: int, num_experts: int, num_experts_per_token: int,
                 num_shared_experts: int = 0) -> None:  # fmt: skip
        super().__init__()
        self.num_experts_per_token = num_experts_per_token
        self.router = nn.Linear(d_model, num_experts, bias=False)
        # Expert i is a SwiGLU whose products are x @ gate_up_proj[i] and hidden @ down_proj[i].
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, d_model, 2 * d_expert))
        self.down_proj = nn.Parameter(torch.empty(num_experts, d_expert, d_model))
        self.shared = SwiGLU(d_model, num_shared_experts * d_expert) if num_shared_experts else None
        # Train in fp32 (or autocast): in bf16 a step of 0.001 is lost once the bias exceeds 0.5.
        self.register_buffer("router_bias", torch.empty(num_experts))
        # Tokens sent to each expert since the last bias update. Integers: no cast can round them.
        self.register_buffer("load", torch.empty(num_experts, dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the stacks and buffers; router and shared experts are nn.Linear's business."""
        for stack in (self.gate_up_proj, self.down_proj):
            stack.normal_(std=0.8 / stack.shape[1] ** 0.5)  # (E, inputs, outputs)
        self.router_bias.zero_()
        self.load.zero_()

    def forward(self, x: Tensor) -> Tensor:
        shape, x = x.shape, x.flatten(0, -2)  # (N·T, D): experts do not care about positions
        out = self.dispatch(x, *self.route(x))
        if self.shared is not None:
            out = out + self.shared(x)
        return out.view(shape)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (N·T, D) -> the chosen experts and their gates, both (N·T, K)."""
        scores = self.router(x).float().sigmoid()  # (N·T, E)
        chosen = (scores + self.router_bias).topk(self.num_experts_per_token).indices
        gates = scores.gather(1, chosen)
        if self.num_experts_per_token > 1:  # K = 1: s/s = 1 would give the router no gradient
            gates = gates / (gates.sum(dim=-1, keepdim=True) + 1e-20)  # all scores may round to 0
        return chosen, gates.to(x.dtype)

    def dispatch(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """Σ_chosen gate_i · expert_i(x), (N·T, D), with two matrix products for all experts.

        Sorted by expert, the (token, expert) pairs of one expert lie next to each other;
        `grouped_mm` multiplies each such group with its expert's matrix.
        """
        E, K = self.router_bias.numel(), self.num_experts_per_token
        # Sorted pair j, of N·T·K: expert[j] is its expert, pair[j] its index before the sort.
        expert, pair = chosen.flatten().sort(stable=True)
        token = pair // K  # a row of `chosen` is a token
        # ends[i] counts the pairs whose expert is <= i: expert i owns those from ends[i−1] on.
        ids = torch.arange(E, device=x.device)
        ends = torch.searchsorted(expert, ids, right=True, out_int32=True)  # (E,)
        if self.training:
            # `+=` would also assign self.load, which torch.compile refuses under checkpointing.
            self.load.add_(ends.diff(prepend=ends.new_zeros(1)))
        inputs = x.index_select(0, token)  # (pairs, D); x[token] has a slow backward
        gate, up = grouped_mm(inputs, self.gate_up_proj, ends).chunk(2, dim=-1)
        # down_proj is linear: scaling its narrow input by the gate equals scaling its output.
        hidden = F.silu(gate) * up * gates.flatten()[pair, None]  # (pairs, d_expert)
        out = grouped_mm(hidden, self.down_proj, ends)  # (pairs, D)
        return torch.zeros_like(x).index_add(0, token, out.to(x.dtype))

    @torch.no_grad()
    def update_router_bias(self, speed: float = 1e-3) -> Tensor:
        """Move the bias against imbalance; returns the load since the last call, (E,) int64.

        bias_i += speed · sign(mean(load) − load_i). Call it once after each optimizer step. The
        load is counted in training mode, over all loops. Padding counts, and so does what
        activation checkpointing computes again (unless compiled). If you train with several
        processes, sum `load` over them before this call; DistributedDataParallel needs
        broadcast_buffers=False, or else each forward puts rank 0's load in place of the others'.
        """
        load = self.load.clone()
        self.router_bias += speed * (load.float().mean() - load).sign()
        self.load.zero_()
        return load


# ------------------------------------------------------------------------------------------------
# Block, state update, cache, sampling
# ------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + ffn(norm(x)), (N, T, D).

    To lift it: `nn`, `Tensor`, and an attention and a feed-forward to put in.
    """

    def __init__(self, d_model: int, attention: nn.Module, ffn: nn.Module, norm_eps: float = 1e-6):
        super().__init__()
        self.attention_norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.attention = attention
        self.ffn_norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.ffn = ffn

    def forward(self, x: Tensor, rope: Tensor, append=None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, append)
        return x + self.ffn(self.ffn_norm(x))


class StateUpdate(nn.Module):
    """The linear part of the loop: h_{t+1} = A·h_t + B·e + R(h_t, e), each (N, T, D).

    A and B are diagonal, D numbers each. A diagonal A loses little: a diagonalisable A is diagonal
    in some basis, and the layers around it, which can mix channels freely, can learn that basis.
    To rotate channels into one another is left to R. What a diagonal buys: the spectral radius,
    rho(A) = max|A_i|, costs nothing to know, and is *bounded* for every value of the parameter `a`
    (unless the target is None):

        A = target · (1 − 2^-8) · sigmoid(a)   hence rho(A) < target

    Rounding to bf16 can raise a number by up to 2^-8 of itself; the factor 1 − 2^-8 keeps A below
    the target even then.

    R reads a normalised input, so for given weights some r_max bounds |R|, however large h is, and
        |h_t| <= rho^t·|h_0| + (b_max + r_max) / (1 − rho),   b_max the largest |B·e|.
    A bounded h need not settle: that depends on the whole Jacobian A + dR/dh, whose spectral radius
    `loop_gain` in experiments/measure.py measures.

    To lift it: `nn`, `Tensor`.
    """

    def __init__(self, d_model: int, spectral_radius_target: float | None = 0.95) -> None:
        super().__init__()
        self.spectral_radius_target = spectral_radius_target
        self.a = nn.Parameter(torch.empty(d_model))
        self.b = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.a.zero_()  # A starts just below target / 2
        self.b.fill_(0.5)  # B·e starts comparable to R

    def diagonal_A(self) -> Tensor:
        """The diagonal of A, (D,), fp32."""
        a, target = self.a.float(), self.spectral_radius_target
        if target is None:  # no bound; it starts about where a target of 0.95 does
            return a + 0.475
        return target * (1 - 2**-8) * a.sigmoid()

    def forward(self, h: Tensor, e: Tensor, r: Tensor) -> Tensor:
        return self.diagonal_A().to(h.dtype) * h + self.b.to(h.dtype) * e + r


class Cache:
    """The rows of past tokens, allocated once. Create one with `model.new_cache`.

    Each layer application has a slot of its own, since a looped block sees another state in each
    loop: first the prelude's layers, then those of loop 0, of loop 1, …, then the coda's. `rows` is
    (slots, N, length, W). `n_tokens` counts the tokens held. `append` does not advance it: after
    all layers have run, the caller adds T, as `forward` does. Set it to 0 to start afresh.
    """

    def __init__(self, layout: dict, length: int, dtype: torch.dtype) -> None:
        """layout: n_loops, batch_size, the layers of each stage, …, as `cache_layout` has them.

        dtype: that of the weights, for now. The first append replaces it by that of its rows, since
        FSDP and autocast compute in another dtype than they keep the weights in.
        """
        self.layout, self.n_tokens = layout, 0
        n_slots = self.loop_slot(layout["n_loops"]) + layout["coda_layers"]
        shape = (n_slots, layout["batch_size"], length, layout["row_width"])
        self.rows = torch.zeros(shape, dtype=dtype, device=layout["device"])

    def loop_slot(self, t: int) -> int:
        """The slot of loop t's first layer; for t = n_loops, of the coda's first layer."""
        return self.layout["prelude_layers"] + t * self.layout["recurrent_layers"]

    def append(self, slot: int, active: Tensor | None, rows: Tensor) -> Tensor:
        """Put new rows (N, T, W) behind the n_tokens already in a slot; return all, (N, S, W).

        Where `active` (N, T) is False the token has halted, and its row of the loop before, which
        lies recurrent_layers slots earlier, takes the place of the new one (why: see `run_loop`).
        None: keep every new row, as in prelude, coda, and a loop that starts with no token halted,
        such as loop 0.
        Attention is given append(rows): `run_blocks` fixes slot and active.
        """
        new = slice(self.n_tokens, self.n_tokens + rows.shape[1])
        if self.n_tokens == 0 and slot == 0:  # the very first rows decide the dtype
            self.rows = self.rows.to(rows.dtype)
        expect(self.rows.dtype == rows.dtype, "cache, dtype", self.rows.dtype, rows.dtype)
        if active is not None:
            before = self.rows[slot - self.layout["recurrent_layers"], :, new]
            rows = torch.where(active[..., None], rows, before)
        self.rows[slot, :, new] = rows
        return self.rows[slot, :, : new.stop]

    def copy_to_remaining_loops(self, loops_run: int, n_new: int) -> None:
        """All n_new tokens have halted: loops that were not run get a copy of the last loop's rows.

        A later token may run those loops, and will read these rows.
        """
        new, n_loops = slice(self.n_tokens, self.n_tokens + n_new), self.layout["n_loops"]
        looped = self.rows[self.loop_slot(0) : self.loop_slot(n_loops), :, new]
        looped = looped.unflatten(0, (n_loops, -1))  # (n_loops, recurrent_layers, N, n_new, W)
        looped[loops_run:] = looped[loops_run - 1]


def sample(logits: Tensor, temperature: NonNegFloat = 1.0, top_k: PosInt | None = None,
           top_p: Probability | None = None, generator=None) -> Tensor:  # fmt: skip
    """One id per sequence, (N, 1), from logits (N, V). See `RecurrentDepthTransformer.generate`."""
    check_numbers(temperature=temperature, top_k=top_k, top_p=top_p)
    finite = bool(logits.amax(dim=-1).isfinite().all())
    expect(finite, "logits", "inf or nan", "finite numbers: the weights or the state overflowed")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    # Sorted, every rule keeps a prefix: sample in it, then look up which id that was.
    logits, ids = logits.float().sort(descending=True, stable=True)
    # The largest is now 0 and the divisor is never 0 in fp32: no quotient is nan or +inf.
    logits = (logits - logits[:, :1]) / max(temperature, 1e-30)
    if top_k is not None:
        logits[:, top_k:] = -math.inf
    p = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        mass_before = p.cumsum(dim=-1) - p
        p = p.masked_fill(mass_before >= max(top_p, 1e-30), 0.0)  # without it p is reached
    return ids.gather(1, p.multinomial(1, generator=generator))


# ------------------------------------------------------------------------------------------------
# The model
# ------------------------------------------------------------------------------------------------


def make_block(w: SimpleNamespace, experts: bool) -> Block:
    """A block with attention of the config's type, and with experts or a dense SwiGLU.

    To attend otherwise, add `attend` to `heads`, which both attentions get; it meets T = S, T = 1
    and T between, and G = H, G < H and, from `absorbed`, G = 1. For dropout on what attention and
    ffn add, give both a forward hook that returns F.dropout(out, p, module.training): hooks, unlike
    nn.Sequential, leave the weights' names as they are.
    w: the config's fields, yours included, widths filled in, from `derive_widths`.
    """
    heads = dict(d_model=w.d_model, n_heads=w.n_heads, head_dim=w.head_dim)
    if w.attention_type == "mla":
        heads |= dict(rope_dim=w.rope_dim, kv_lora_rank=w.kv_lora_rank, q_lora_rank=w.q_lora_rank)
        attention = MultiHeadLatentAttention(**heads, norm_eps=w.norm_eps)
    else:
        attention = GroupedQueryAttention(**heads, n_kv_heads=w.n_kv_heads)
    if experts:
        routed = w.num_experts, w.num_experts_per_token
        ffn = MixtureOfExperts(w.d_model, w.d_expert, *routed, w.num_shared_experts)
    else:
        ffn = SwiGLU(w.d_model, w.d_ff)
    return Block(w.d_model, attention, ffn, w.norm_eps)


def relative_change(h_next: Tensor, h: Tensor) -> Tensor:
    """|h_{t+1} − h_t| / |h_{t+1}| of each token, fp32: (..., D) -> (...). From h = 0: 1."""
    return (h_next.float() - h.float()).norm(dim=-1) / h_next.float().norm(dim=-1)


class RecurrentDepthTransformer(nn.Module):
    """Prelude once, recurrent blocks looped n_loops times, coda once (equations at the top).

    RecurrentDepthTransformer(config), RecurrentDepthTransformer(d_model=256, attention_type="gqa"),
    or both: keywords override fields of the config. `model.config` is the config in force.

    `model.compile()` traces one graph for each n_loops, and torch stops after 8. To train with many
    loop counts compile the blocks: `for block in model.recurrent: block.compile()`, one graph.
    """

    def __init__(self, config: MythosConfig | None = None, **overrides) -> None:
        super().__init__()
        expect(isinstance(config, MythosConfig | None), "config", config, "a MythosConfig or None")
        self.config = c = replace(config or MythosConfig(), **overrides)
        self.widths = w = derive_widths(c)
        D, eps, experts = c.d_model, c.norm_eps, c.num_experts > 0
        self.embed = nn.Embedding(c.vocab_size, D)
        norm = nn.RMSNorm(D, eps=eps, elementwise_affine=False)
        self.embed_norm = norm if c.embed_norm else nn.Identity()
        self.prelude = nn.ModuleList(make_block(w, False) for _ in range(c.prelude_layers))
        self.input_norm = nn.RMSNorm(D, eps=eps)
        self.recurrent = nn.ModuleList(make_block(w, experts) for _ in range(c.recurrent_layers))
        if c.recurrent_layers > 0:
            self.loop_norm = nn.RMSNorm(D, eps=eps)
            self.state_update = StateUpdate(D, c.spectral_radius_target)
        self.state_norm = nn.RMSNorm(D, eps=eps)
        self.coda = nn.ModuleList(make_block(w, False) for _ in range(c.coda_layers))
        self.output_norm = nn.RMSNorm(D, eps=eps)
        self.head = nn.Linear(D, c.vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """(Re)initialise everything; after `to_empty(device=...)` it makes a meta model a real one.

        embed, head               normal, std 0.02
        every other matrix        normal, std 0.8 / sqrt(inputs): measured to train well (toy)
        norms                     1
        A, B                      a = 0: A starts just below target / 2 (free: 0.475); b = 0.5
        router bias, load         0

        A module of yours is a matrix, as above, if it is an nn.Linear without bias. Else its method
        reset_parameters is called. nn.Embedding has one: std 1 (for another, set it below, as for
        embed). A parameter outside such modules, a Linear with a bias, and a subclass of Linear
        raise ValueError. A vector, such as a learned h_0, can go into StateUpdate.
        """
        for name, module in self.named_modules():
            if type(module) is nn.Linear and module.bias is None:
                module.weight.normal_(std=0.8 / module.in_features**0.5)
            elif isinstance(module, nn.Linear) or not hasattr(module, "reset_parameters"):
                own = [key for key, _ in module.named_parameters(name, recurse=False)]
                expect(not own, "init_weights", own, "parameters in modules with reset_parameters")
            else:
                module.reset_parameters()
        self.embed.weight.normal_(std=0.02)
        self.head.weight.normal_(std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, *,
                n_loops: NonNegInt | None = None, grad_loops: PosInt | None = None,
                halt_threshold: NonNegFloat | None = None, cache: Cache | None = None,
                logits_to_keep: NonNegInt = 0) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Token ids (N, T) -> logits (N, T, V) and, given targets (N, T), their mean cross-entropy.

        targets: the id wanted at each position (the caller shifts); −100 is not scored. When you
            accumulate gradients, weight each loss by its share of all scored targets.
        n_loops: None is config.max_loop_iters; more is allowed; 0: no loop, the coda reads e.
        grad_loops: only the last grad_loops loops carry gradient (truncated backpropagation
            through time); None: all. The prelude still learns, through the e of those loops (a
            learned h_0 would get no gradient).
        halt_threshold: a token halts once a loop's relative change of its state falls below it
            (`has_settled`); the loop ends when all tokens of the call have halted. See `run_loop`.
        cache: tokens continue the sequences that the cache holds.
        logits_to_keep: the logits of only so many last tokens, (N, logits_to_keep, V); 0: of all.
        Halting and caching are for inference: with either, no gradient is recorded, not a loss's.
        Raises ValueError naming the argument that is out of range.
        """
        n_loops = check_call(self, tokens, targets, cache, n_loops=n_loops, grad_loops=grad_loops,
                             halt_threshold=halt_threshold,
                             logits_to_keep=logits_to_keep)  # fmt: skip
        if halt_threshold is not None and cache is None:
            cache = self.new_cache(*tokens.shape, n_loops)  # it holds the rows of halted tokens
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            e, rope = self.run_prelude(tokens, cache)
            h = e
            if n_loops > 0:
                h, _ = self.run_loop(e, rope, n_loops, grad_loops, halt_threshold, cache)
            logits = self.run_coda(h, rope, cache, logits_to_keep)
        if cache is not None:
            cache.n_tokens += tokens.shape[1]
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().long())

    def run_prelude(self, tokens: Tensor, cache: Cache | None = None) -> tuple[Tensor, Tensor]:
        """e = RMSNorm(Prelude(RMSNorm(embed(tokens)))), (N, T, D), and the tokens' `rope`."""
        past = 0 if cache is None else cache.n_tokens
        positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)
        rope = rope_angles(positions, self.widths.rope_dim, self.config.rope_theta)
        x = self.run_blocks(self.prelude, self.embed_norm(self.embed(tokens)), rope, cache)
        return self.input_norm(x), rope

    def run_blocks(self, blocks, x: Tensor, rope: Tensor, cache=None, slot=0, active=None):
        """x (N, T, D) through the blocks, whose rows go to the cache's slots from `slot` on."""
        for i, block in enumerate(blocks):
            append = None if cache is None else partial(cache.append, slot + i, active)
            x = block(x, rope, append)
        return x

    def initial_state(self, e: Tensor) -> Tensor:
        """h_0 = 0."""
        return torch.zeros_like(e)

    def step(self, h: Tensor, e: Tensor, rope: Tensor, t: int, cache=None, active=None) -> Tensor:
        """Loop t: h_{t+1} = A·h_t + B·e + R(h_t, e), R = Blocks(RMSNorm(h + e)), (N, T, D).

        t has no upper limit: a call may ask for more loops than training ever used.
        """
        slot = 0 if cache is None else cache.loop_slot(t)
        r = self.run_blocks(self.recurrent, self.loop_norm(h + e), rope, cache, slot, active)
        return self.state_update(h, e, r)

    def has_settled(self, h_next: Tensor, h: Tensor, halt_threshold: float) -> Tensor:
        """The halting rule: which tokens (N, T) may halt with h_next, the state after this loop.
        With threshold 0 none may.

        A rule of your own may look at each token's own states, and at nothing else, or else
        decoding would not give the answer of one pass. Not at other tokens: in decoding, h holds
        the newest token alone. And not through a block, such as the coda, whose attention reads
        earlier tokens: in one pass those are at loop t, in decoding at their last loop. A rule
        that needs more than the two states here, say three loops in a row, goes into `run_loop`,
        which has them.
        """
        return relative_change(h_next, h) < halt_threshold  # nan, an exploded state: not settled

    def run_loop(self, e: Tensor, rope: Tensor, n_loops: int, grad_loops: int | None = None,
                 halt_threshold: float | None = None, cache: Cache | None = None,
                 states: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """h_L, the state after the last loop (N, T, D), and the loops that each token used (N, T).

        `states`, if given, collects h_1, h_2, … The answer is the *last* state: a weighted sum over
        loops may tie the model to the depth that it was trained at.

        Halting needs a cache. Say loop s is the last that a token runs. Its state stays h_{s+1},
        and the cache repeats its rows of loop s in the slots of all later loops (s = 2: those of
        loops 3, 4, … repeat loop 2's). So in loop t a later token reads this token's row of loop
        min(t, s), whether both are in one call or not; and as s depends on no later token, decoding
        token by token gives the answer of one pass (up to rounding, which may make a token halt a
        loop earlier or later). Halting saves work once *all* tokens of the call, in all N
        sequences, have halted; until then a halted token is computed like the others, and the
        result is discarded.
        """
        ok = halt_threshold is None or cache is not None
        expect(ok, "cache", cache, "a cache, which holds the rows of halted tokens")
        h = self.initial_state(e)
        active = torch.ones(e.shape[:2], dtype=torch.bool, device=e.device)  # False once halted
        loops_used, n_active = torch.zeros_like(active, dtype=torch.int64), active.numel()
        first_grad_loop = 0 if grad_loops is None else n_loops - grad_loops
        for t in range(n_loops):
            some_halted = n_active < active.numel()
            with torch.set_grad_enabled(torch.is_grad_enabled() and t >= first_grad_loop):
                h_next = self.step(h, e, rope, t, cache, active if some_halted else None)
            if some_halted:
                h_next = torch.where(active[..., None], h_next, h)
            loops_used = loops_used + active
            if halt_threshold is not None:
                active = active & ~self.has_settled(h_next, h, halt_threshold)
                n_active = int(active.sum())  # waits for the GPU once per loop
            h = h_next
            if states is not None:
                states.append(h)
            if n_active == 0:  # only with halting, hence with a cache
                cache.copy_to_remaining_loops(t + 1, e.shape[1])
                break
        return h, loops_used

    def run_coda(self, h: Tensor, rope: Tensor, cache=None, logits_to_keep: int = 0) -> Tensor:
        """logits = head(RMSNorm(Coda(RMSNorm(h)))), (N, T, V). logits_to_keep: see forward."""
        slot = 0 if cache is None else cache.loop_slot(cache.layout["n_loops"])
        x = self.run_blocks(self.coda, self.state_norm(h), rope, cache, slot)
        return self.head(self.output_norm(x[:, -logits_to_keep:]))  # 0: x[:, 0:] is all

    def new_cache(self, batch_size: PosInt, length: PosInt, n_loops: NonNegInt | None = None):
        """An empty cache for `length` tokens at exactly `n_loops` loops, on the model's device."""
        n_loops, most = check_loops(self, n_loops), self.config.max_seq_len
        check_numbers(batch_size=batch_size, length=length)
        expect(length <= most, "length", length, f"at most max_seq_len = {most}")
        return Cache(cache_layout(self, batch_size, n_loops), length, next(self.parameters()).dtype)

    @torch.no_grad()
    def generate(self, tokens: Tensor, max_new_tokens: NonNegInt, *, temperature: NonNegFloat = 1.0,
                 top_k: PosInt | None = None, top_p: Probability | None = None,
                 n_loops: NonNegInt | None = None, halt_threshold: NonNegFloat | None = None,
                 eos_token: NonNegInt | None = None, generator=None) -> Tensor:  # fmt: skip
        """Continue prompts (N, T), all of one length, with sampled ids: (N, T + max_new_tokens).

        No token is masked: padding would be read as part of the prompt, and change the answer. Call
        this once for each length.

        temperature 0 takes the likeliest id. top_k keeps the k likeliest; top_p the fewest ids
        whose probabilities reach p (nucleus sampling, arXiv 1904.09751). A sequence that has
        produced eos_token is padded with it; generation ends early when every one has. n_loops and
        halt_threshold are forward's. Raises ValueError for arguments out of range, if prompt and
        new tokens exceed config.max_seq_len, and if the logits contain +inf or nan.
        """
        how = dict(temperature=temperature, top_k=top_k, top_p=top_p)
        n_loops = check_call(self, tokens, n_loops=n_loops, halt_threshold=halt_threshold,
                             max_new_tokens=max_new_tokens, eos_token=eos_token, **how)  # fmt: skip
        N, T = tokens.shape
        cache, new = self.new_cache(N, T + max_new_tokens, n_loops), tokens
        done = torch.zeros(N, 1, dtype=torch.bool, device=tokens.device)
        with evaluation_mode(self):
            for _ in range(max_new_tokens):
                logits, _ = self(new, n_loops=n_loops, halt_threshold=halt_threshold, cache=cache,
                                 logits_to_keep=1)  # fmt: skip
                new = sample(logits[:, -1], **how, generator=generator).to(tokens.dtype)
                if eos_token is not None:
                    new = new.masked_fill(done, eos_token)
                    done = done | (new == eos_token)
                tokens = torch.cat([tokens, new], dim=1)
                if eos_token is not None and done.all():
                    break
        return tokens

    def update_router_bias(self, speed: NonNegFloat = 1e-3) -> Tensor:
        """Balance all experts (see MixtureOfExperts); returns the loads, (layers with experts, E).

        Call once after each optimizer step. A model without experts returns an empty tensor.
        """
        check_numbers(speed=speed)
        loads = [moe.update_router_bias(speed) for moe in expert_layers(self)]
        return torch.stack(loads) if loads else torch.empty(0)


# ================================================================================================
# END OF THE MODEL. Below: sizes, plumbing, checks of arguments.
# ================================================================================================


# ------------------------------------------------------------------------------------------------
# Sizes
# ------------------------------------------------------------------------------------------------

# Heads of 128 and a latent of 512 as in DeepSeek-V2/V3, one shared expert as in V3. Loops, experts
# and context grow with size. d_expert is chosen so that the total, vocabulary included, matches the
# name; if you change the architecture, choose it anew. rope_theta keeps its default: raise it when
# training at these lengths.
SIZE_FIELDS = """vocab_size max_seq_len d_model n_heads q_lora_rank prelude_layers recurrent_layers
    coda_layers max_loop_iters num_experts num_experts_per_token d_expert n_kv_heads kv_lora_rank
    head_dim""".split()
SIZES = {  # tiny: the toy of train_tiny.py; V = 20 nodes + 20² edges
    "tiny": (420, 64, 128, 4, None, 1, 1, 1, 12, 8, 2, 64, 2, 64, None),
    "1B": (65_536, 4_096, 1536, 16, None, 2, 4, 2, 8, 32, 4, 1040, 8, 512, 128),
    "3B": (65_536, 8_192, 2048, 16, None, 2, 6, 2, 8, 64, 4, 1024, 8, 512, 128),
    "7B": (131_072, 8_192, 2560, 24, None, 2, 8, 2, 12, 64, 6, 1456, 8, 512, 128),
    "10B": (131_072, 16_384, 3072, 24, None, 2, 8, 2, 12, 64, 6, 1784, 8, 512, 128),
    "50B": (131_072, 32_768, 4096, 32, 1536, 3, 12, 3, 16, 128, 6, 2496, 8, 512, 128),
    "70B": (131_072, 32_768, 5120, 40, 1536, 3, 14, 3, 16, 128, 8, 2384, 8, 512, 128),
    "100B": (131_072, 65_536, 5120, 40, 1536, 3, 16, 3, 20, 160, 8, 2432, 8, 512, 128),
    "500B": (131_072, 131_072, 7168, 56, 1536, 4, 24, 4, 24, 256, 8, 3712, 8, 512, 128),
    "1T": (131_072, 262_144, 8192, 64, 1536, 4, 32, 4, 32, 256, 8, 4896, 8, 512, 128),
}


def get_model_config(name: str) -> MythosConfig:
    """The config of a named size, "1B" to "1T", or of "tiny", the toy of train_tiny.py.

    The total parameter count is within 1% of the name. Case does not matter; an unknown name
    raises ValueError with the known ones. Change a field with `dataclasses.replace`, or in
    `RecurrentDepthTransformer(config, attention_type="gqa")`.
    """
    sizes = {size.lower(): numbers for size, numbers in SIZES.items()}
    numbers = sizes.get(str(name).lower())
    expect(numbers is not None, "name", name, f"one of {[*SIZES]}")
    toy = numbers is SIZES["tiny"]  # whose prelude train_tiny.py starts as the identity
    return MythosConfig(**dict(zip(SIZE_FIELDS, numbers, strict=True)), embed_norm=not toy)


# ------------------------------------------------------------------------------------------------
# Plumbing: widths by rule, modes, a module that may be bypassed, a matrix product per expert
# ------------------------------------------------------------------------------------------------


def derive_widths(c: MythosConfig) -> SimpleNamespace:
    """The fields of a config; a width that is None follows its rule (q_lora_rank has none).

    Also rope_dim, how many numbers of a head RoPE rotates (GQA: all C; MLA: C/2 in addition to C),
    and row = W, how many numbers a token adds to the cache per layer application.
    """
    w, mla = SimpleNamespace(**vars(c)), c.attention_type == "mla"
    w.head_dim = c.head_dim or c.d_model // c.n_heads
    w.n_kv_heads = c.n_kv_heads or (c.n_heads // 4 if c.n_heads % 4 == 0 else c.n_heads)
    w.kv_lora_rank = c.kv_lora_rank or 4 * w.head_dim
    w.d_ff = c.d_ff or 64 * math.ceil(c.d_model * 8 / 3 / 64)
    experts_used = c.num_experts_per_token + c.num_shared_experts
    w.d_expert = c.d_expert or 8 * math.ceil(w.d_ff / experts_used / 8)
    w.rope_dim = w.head_dim // 2 if mla else w.head_dim
    # MLA leaves a latent and one rotated key, GQA a key and a value per key/value head.
    w.row = w.kv_lora_rank + w.rope_dim if mla else 2 * w.n_kv_heads * w.head_dim
    return w


def evaluation_mode(model: nn.Module) -> ExitStack:
    """Switches to eval() now; on leaving `with …:`, each module gets its own mode back."""
    at_exit = ExitStack()
    for module in model.modules():
        at_exit.callback(setattr, module, "training", module.training)
    model.eval()
    return at_exit


def expert_layers(module: nn.Module) -> list[MixtureOfExperts]:
    return [m for m in module.modules() if isinstance(m, MixtureOfExperts)]


def is_plain_linear(module: nn.Module) -> bool:
    """Whether module(x) is provably x @ module.weight.T, so that the weight may be used directly.

    Adapters and parametrizations change the module's type, quantisation may change the weight's;
    pruning and old weight norms work by hooks, and some libraries replace `forward`.
    """
    hooks = len(module._forward_pre_hooks) + len(module._forward_hooks)
    plain = type(module) is nn.Linear and module.bias is None and hooks == 0
    return plain and type(module.weight) is nn.Parameter and "forward" not in module.__dict__


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows ends[i−1] up to ends[i] of x (pairs, in) times weight[i] (in, out): (pairs, out).

    F.grouped_mm with two additions. Autocast does not reach it, so x and weight get the dtype that
    autocast would choose. And torch.compile and the meta device support it only in bf16, so there
    `traceable_grouped_mm` stands in: to use either with a copied class, copy that operator and its
    three registrations, too.
    """
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    mm = traceable_grouped_mm if torch.compiler.is_compiling() or x.is_meta else F.grouped_mm
    return mm(x.to(dtype), weight.to(dtype), offs=ends)


@torch.library.custom_op("mythos::grouped_mm", mutates_args=())
def traceable_grouped_mm(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """F.grouped_mm as an operator whose shapes and gradient are written below.

    With two 2-D arguments it computes the gradient of the experts' weights: for each expert i,
    columns offs[i−1] up to offs[i] of x (in, pairs) times the same rows of `weight`, which is then
    the output's gradient (pairs, out).
    """
    return F.grouped_mm(x, weight, offs=offs)


@traceable_grouped_mm.register_fake
def grouped_mm_shape(x, weight, offs):
    shape = (x.shape[0], weight.shape[-1])
    return x.new_empty(shape if weight.dim() == 3 else (*offs.shape, *shape))


def grouped_mm_gradient(ctx, grad):
    (x, weight, offs), mm = ctx.saved_tensors, traceable_grouped_mm
    return mm(grad, weight.mT, offs), mm(x.mT, grad, offs), None


def grouped_mm_saves(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


traceable_grouped_mm.register_autograd(grouped_mm_gradient, setup_context=grouped_mm_saves)


# ------------------------------------------------------------------------------------------------
# Checks: bad input raises a ValueError that names the field, what it got and what it expected
# ------------------------------------------------------------------------------------------------


def expect(ok: bool, field: str, got: object, expected: object) -> None:
    if not ok:  # format only now: formatting a length makes torch.compile fix it for good
        raise ValueError(f"{field}: got {got!r}, expected {expected}")


def rules_of(*annotated: object) -> dict[str, tuple]:
    """name -> (type, in words, test, whether None will do), for each number that these functions
    and classes annotate: `top_k: PosInt | None` gives "top_k" -> (int, "an integer >= 1", …, True).
    Other annotations are passed over."""
    return {
        name: (*get_args(part), part is not kind)  # last: kind was `… | None`
        for source in annotated
        for name, kind in get_type_hints(source, include_extras=True).items()
        for part in (kind, *get_args(kind))  # `PosInt | None` has two parts
        if get_origin(part) is Annotated
    }


RULES = rules_of(sample, *filter(callable, vars(RecurrentDepthTransformer).values()))


def check_numbers(rules=RULES, /, **numbers) -> None:
    for name, got in numbers.items():
        kind, expected, holds, optional = rules[name]
        number = isinstance(got, int | kind) and not isinstance(got, bool) and abs(got) < 1e38
        expected += " or None" if optional else ""
        expect((optional and got is None) or (number and holds(got)), name, got, expected)


def check_config(c: MythosConfig) -> None:
    rules = rules_of(type(c))  # with those of a subclass
    check_numbers(rules, **{name: got for name, got in vars(c).items() if name in rules})
    H, K, E, kind = c.n_heads, c.num_experts_per_token, c.num_experts, c.attention_type
    expect(kind in ("mla", "gqa"), "attention_type", kind, "'mla' or 'gqa'")
    expect(isinstance(c.embed_norm, bool), "embed_norm", c.embed_norm, "True or False")
    rho = c.spectral_radius_target
    expect(rho is None or rho < 1, "spectral_radius_target", rho, "a number in (0, 1) or None")
    expect(c.rope_theta >= 1, "rope_theta", c.rope_theta, "1 or more, or angles can overflow")
    whole, w = c.head_dim is not None or c.d_model % H == 0, derive_widths(c)
    expect(whole, "n_heads", H, f"a divisor of d_model = {c.d_model}, or head_dim given")
    divisor = 4 if kind == "mla" else 2  # for pairs: rope_dim is even (MLA: head_dim / 2)
    expect(w.head_dim % divisor == 0, "head_dim", w.head_dim, f"a multiple of {divisor}, for RoPE")
    divides = kind == "mla" or H % w.n_kv_heads == 0
    expect(divides, "n_kv_heads", w.n_kv_heads, f"a divisor of n_heads = {H}")
    if E > 0:
        expect(K <= E, "num_experts_per_token", K, f"at most num_experts = {E}")
        for name, width in (("d_model", c.d_model), ("d_expert", w.d_expert)):
            expect(width % 8 == 0, name, width, "a multiple of 8 (F.grouped_mm: 16-byte rows)")


def check_loops(model: RecurrentDepthTransformer, n_loops: int | None) -> int:
    """None becomes the default; a model without recurrent layers has none and takes none."""
    check_numbers(n_loops=n_loops)
    has_loop = len(model.recurrent) > 0
    expect(has_loop or not n_loops, "n_loops", n_loops, "0: the model has no recurrent layers")
    default = model.config.max_loop_iters if has_loop else 0
    return default if n_loops is None else n_loops


def check_call(model, tokens, targets=None, cache=None, *, n_loops, **numbers) -> int:
    """Check the arguments of forward and of all that calls it; returns the number of loops.

    numbers: the remaining arguments, by name.
    """
    c, n_loops = model.config, check_loops(model, n_loops)
    check_numbers(**numbers)
    grad_loops, eos_token = numbers.get("grad_loops"), numbers.get("eos_token")
    with_gradient = cache is None and numbers.get("halt_threshold") is None
    ok = grad_loops is None or with_gradient
    expect(ok, "grad_loops", grad_loops, "None with a cache or halting: no gradient is recorded")
    ok = eos_token is None or eos_token < c.vocab_size
    expect(ok, "eos_token", eos_token, f"an id below vocab_size = {c.vocab_size}, or None")
    check_ids(model, "tokens", tokens, tokens)
    if targets is not None:
        keep = numbers.get("logits_to_keep", 0)
        expect(keep == 0, "logits_to_keep", keep, "0 (all) when there are targets to score")
        check_ids(model, "targets", targets, tokens)
    if cache is not None:
        check_cache(model, cache, tokens, n_loops)
    T = tokens.shape[1] + numbers.get("max_new_tokens", 0)
    expect(T <= c.max_seq_len, "tokens", T, f"at most {c.max_seq_len}, new ones included")
    return n_loops


def check_ids(model: RecurrentDepthTransformer, name: str, x: Tensor, tokens: Tensor) -> None:
    device, top = next(model.parameters()).device, model.config.vocab_size - 1
    ok = isinstance(x, Tensor) and x.dtype in (torch.int32, torch.int64) and x.device == device
    ok = ok and x.dim() == 2 and x.numel() > 0 and x.shape == tokens.shape
    got = (x.dtype, tuple(x.shape), x.device) if isinstance(x, Tensor) else type(x)
    expect(ok, name, got, f"int64 or int32 (N, T) on {device}, not empty, targets as tokens")
    if torch.compiler.is_compiling() or x.is_meta:  # there are no values to look at
        return
    ids = x[x != -100] if name == "targets" else x
    expect(ids.numel() > 0, name, "all −100", "at least one target to score")
    low, high = ids.min().item(), ids.max().item()
    expect(low >= 0 and high <= top, f"{name}, ids", (low, high), f"within 0 … {top}")


def cache_layout(model: RecurrentDepthTransformer, batch_size: int, n_loops: int) -> dict:
    c, device = model.config, next(model.parameters()).device
    return dict(n_loops=n_loops, batch_size=batch_size, prelude_layers=c.prelude_layers,
                recurrent_layers=c.recurrent_layers, coda_layers=c.coda_layers,
                row_width=model.widths.row, device=device)  # fmt: skip


def check_cache(model: RecurrentDepthTransformer, cache: Cache, tokens: Tensor, n_loops: int):
    expect(isinstance(cache, Cache), "cache", type(cache), "one from new_cache, or None")
    for name, wanted in cache_layout(model, len(tokens), n_loops).items():
        expect(cache.layout[name] == wanted, f"cache, {name}", cache.layout[name], wanted)
    S, length = cache.n_tokens + tokens.shape[1], cache.rows.shape[2]
    expect(S <= length, "cached + new tokens", S, f"at most the cache's length, {length}")


if __name__ == "__main__":
    from experiments.sizes import print_sizes

    print_sizes()
