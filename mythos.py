# SPDX-License-Identifier: MIT
"""Mythos: a Recurrent-Depth Transformer in one readable file.

A language model that loops a few blocks instead of stacking many, so that the same weights can
think longer about harder input:

    e        = RMSNorm(Prelude(embed(tokens)))               run once
    h_0      = 0
    h_{t+1}  = A·h_t + B·e + R(h_t, e)                       run L = n_loops times, same weights
    logits   = head(RMSNorm(Coda(RMSNorm(h_L))))             run once (L = 0: e stands in for h_0)

Prelude, R and Coda are stacks of pre-norm transformer blocks. R(h, e) = Blocks(RMSNorm(h + e)), the
blocks' skip paths included: h is the scratch pad, and the input e is offered again in every loop.

Read it top to bottom: config, attention (GQA and MLA), feed-forward (SwiGLU and experts), the
block, the state update (A and B), the cache, the model, the sizes from 1B to 1T.

    model = RecurrentDepthTransformer(get_model_config("tiny"))
    logits, loss = model(tokens, targets, n_loops=8)         # depth is an argument, not a constant
    tokens = model.generate(tokens, 32, temperature=0, halt_threshold=0.3)

Not here: training (train_tiny.py), tokenizers, dropout, multi-token prediction, multi-GPU code.
The architecture is speculation, after OpenMythos, a community's guess at how a looped model might
be built; not affiliated with or confirmed by Anthropic.

Letters in equations and shape comments (A, B, R, h, e as above; B is also the batch):
    B  sequences                  D  d_model, width of the residual stream
    T  new tokens in this call    H  query heads          G  key/value heads (GQA)
    N  tokens attended to         C  head_dim             F  hidden width of a feed-forward
    L  loops, t the current one   E  routed experts       K  experts chosen per token
    W  numbers in a cached row    Z  kv_lora_rank, width of MLA's shared latent
    V  vocabulary

References: looped depth — Universal Transformer (arXiv 1807.03819), Huginn (2502.05171), Parcae
(2604.12946); GQA (2305.13245); MLA — DeepSeek-V2 (2405.04434); experts — DeepSeekMoE (2401.06066)
and DeepSeek-V3 (2412.19437); loss-free balancing (2408.15664); RoPE (2104.09864); SwiGLU
(2002.05202).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def expect(ok: bool, field: str, got: object, expected: str) -> None:
    """Raise a ValueError unless `ok`: the way every value out of range ends."""
    if not ok:
        raise ValueError(f"{field}: got {got!r}, expected {expected}")


def expect_int(field: str, got: object, low: int, or_none: bool = False) -> None:
    ok = (or_none and got is None) or (type(got) is int and got >= low)
    expect(ok, field, got, f"an integer >= {low}" + " or None" * or_none)


def expect_number(field: str, got: object, or_none: bool = False) -> None:
    ok = isinstance(got, int | float) and not isinstance(got, bool) and 0 <= got < math.inf
    ok = ok or (or_none and got is None)
    expect(ok, field, got, "a finite number >= 0" + " or None" * or_none)


# ------------------------------------------------------------------------------------------------
# Config
# ------------------------------------------------------------------------------------------------


class Widths(NamedTuple):
    """These fields of a config as plain numbers, those that are None by their rule."""

    head_dim: int
    n_kv_heads: int
    kv_lora_rank: int
    d_ff: int
    d_expert: int


@dataclass(frozen=True)
class MythosConfig:
    """Every number of the architecture. The defaults build in a moment on a laptop.

    A width that is None follows the rule in its comment; `widths()` tells the number.
    Raises ValueError at construction if a field, or a combination of fields, is impossible.
    """

    vocab_size: int = 256  # bytes
    d_model: int = 128  # D
    max_seq_len: int = 1024  # longest sequence accepted, in tokens

    # The three stages. With recurrent_layers = 0 there is no loop: a plain transformer.
    prelude_layers: int = 1  # blocks run once before the loop
    recurrent_layers: int = 1  # blocks inside the loop, run n_loops times
    coda_layers: int = 1  # blocks run once after the loop
    max_loop_iters: int = 8  # L when a call does not say: a default, more is allowed
    spectral_radius_target: float | None = 0.95  # bound, rho(A) < it; None: unconstrained

    # Attention. head_dim is the width of a query head (MLA: of its part without RoPE).
    attention_type: str = "mla"  # "mla" or "gqa"
    n_heads: int = 4  # H
    head_dim: int | None = None  # C; None: d_model / n_heads
    n_kv_heads: int | None = None  # G, GQA only; None: n_heads / 4 if whole, else n_heads
    kv_lora_rank: int | None = None  # Z, MLA only; None: 4·head_dim, as in DeepSeek-V2
    q_lora_rank: int | None = None  # MLA only; None: queries are not compressed
    rope_theta: float = 10_000.0  # base of RoPE's angles: the larger, the slower they turn

    # Feed-forward: dense SwiGLU in prelude and coda, experts in the loop (num_experts = 0: dense).
    d_ff: int | None = None  # F of a dense SwiGLU; None: 8/3·d_model, rounded up to 64
    num_experts: int = 8  # E, routed
    num_experts_per_token: int = 2  # K
    num_shared_experts: int = 1  # experts that every token uses
    d_expert: int | None = None  # F of an expert; None: d_ff / (K + shared), up to a multiple of 8

    norm_eps: float = 1e-6

    def widths(self) -> Widths:
        head_dim = self.head_dim or self.d_model // self.n_heads
        d_ff = self.d_ff or 64 * math.ceil(self.d_model * 8 / 3 / 64)
        used = self.num_experts_per_token + self.num_shared_experts
        return Widths(
            head_dim=head_dim,
            n_kv_heads=self.n_kv_heads or self.n_heads // (1 if self.n_heads % 4 else 4),
            kv_lora_rank=self.kv_lora_rank or 4 * head_dim,
            d_ff=d_ff,
            d_expert=self.d_expert or 8 * math.ceil(d_ff / used / 8),
        )

    def rope_width(self) -> int:
        """How many numbers of a head RoPE rotates: GQA all C; MLA C/2 more, beside the C."""
        C = self.widths().head_dim
        return C // 2 if self.attention_type == "mla" else C

    def row_width(self) -> int:
        """W, the numbers that one token leaves in the cache per layer application."""
        w = self.widths()
        if self.attention_type == "mla":
            return w.kv_lora_rank + self.rope_width()  # one latent, one RoPE key
        return 2 * w.n_kv_heads * w.head_dim  # a key and a value per key/value head

    def __post_init__(self) -> None:
        may_be_zero = (
            "prelude_layers", "recurrent_layers", "coda_layers", "max_loop_iters",
            "num_experts", "num_shared_experts",
        )  # fmt: skip
        for f in fields(self):
            value, hint = getattr(self, f.name), str(f.type)  # "int", "float | None", …
            if "int" in hint:
                low = 0 if f.name in may_be_zero else 1
                expect_int(f.name, value, low, or_none="None" in hint)
            elif "float" in hint:
                expect_number(f.name, value, or_none="None" in hint)
                expect(value != 0, f.name, value, "a number above 0")
        theta, rho, kind = self.rope_theta, self.spectral_radius_target, self.attention_type
        expect(theta >= 1, "rope_theta", theta, "at least 1: below it, angles can overflow")
        expect(rho is None or rho < 1, "spectral_radius_target", rho, "below 1, or None")
        expect(kind in ("mla", "gqa"), "attention_type", kind, "'mla' or 'gqa'")

        H, K, E, w = self.n_heads, self.num_experts_per_token, self.num_experts, self.widths()
        ok = self.head_dim is not None or self.d_model % H == 0
        expect(ok, "n_heads", H, f"a divisor of d_model = {self.d_model}, or head_dim given")
        even = 4 if kind == "mla" else 2  # makes rope_width even: RoPE turns pairs
        expect(w.head_dim % even == 0, "head_dim", w.head_dim, f"a multiple of {even}, for RoPE")
        ok = kind == "mla" or H % w.n_kv_heads == 0
        expect(ok, "n_kv_heads", w.n_kv_heads, f"a divisor of n_heads = {H}")
        if E > 0:
            expect(K <= E, "num_experts_per_token", K, f"at most num_experts = {E}")
            for name, width in (("d_model", self.d_model), ("d_expert", w.d_expert)):
                expect(width % 8 == 0, name, width, "a multiple of 8 (F.grouped_mm: 16-byte rows)")


# ------------------------------------------------------------------------------------------------
# Attention: rotary positions, then GQA and MLA with one interface
# ------------------------------------------------------------------------------------------------


# (cos, sin, mask): where a call's tokens are and what they may see, the same for all layers. cos
# and sin are RoPE's. mask (T, N) is True where a query may look; it is None when nothing is cached
# (plain causal attention) and when T = 1 (a last token sees everything).
Place = tuple[Tensor, Tensor, Tensor | None]
# A way into the cache: stores a call's new rows (B, T, W), returns those of all tokens (B, N, W).
Update = Callable[[Tensor], Tensor]


def rope_angles(positions: Tensor, width: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """cos and sin, each fp32 of shape (T, width/2), of the angles that RoPE turns by.

    Computed from integer positions (T,) on every call: a stored table would lose its precision in
    `.to(torch.bfloat16)` and its values in `to_empty`.
    """
    two_i = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32)
    # angle[t, i] = position[t] · theta^(−2i / width)
    angles = positions.float()[:, None] * theta ** (-two_i / width)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + width/2}) of x (..., T, width) by their angle (RoFormer;
    the pairing is GPT-NeoX's)."""
    x1, x2 = x.chunk(2, dim=-1)  # low-precision x meets fp32 cos: the product is fp32
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1).to(x.dtype)


class GroupedQueryAttention(nn.Module):
    """Causal self-attention in which H / G query heads share one key/value head (Ainslie 2023).

    forward: x (B, T, D) -> (B, T, D). Copy it together with `apply_rope`. Its type hints name
    `Place` and `Update`; `rope_angles` makes the cos and sin of its `place`.

    Both attentions keep what a token leaves behind for later tokens in one *row* of W numbers:
    here its keys and values, W = 2·G·C. `update`, if given, is a cache: it stores the new rows
    and returns the rows of all tokens so far.
    """

    def __init__(self, *, d_model: int, n_heads: int, n_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.q_proj = nn.Linear(d_model, n_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, n_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, n_kv_heads * head_dim, bias=False)
        self.out_proj = nn.Linear(n_heads * head_dim, d_model, bias=False)

    def forward(self, x: Tensor, place: Place, update: Update | None = None) -> Tensor:
        B, T, _ = x.shape
        cos, sin, mask = place
        G, C = self.n_kv_heads, self.head_dim
        q = self.q_proj(x).view(B, T, -1, C).transpose(1, 2)  # (B, H, T, C)
        k = self.k_proj(x).view(B, T, G, C).transpose(1, 2)  # (B, G, T, C)
        v = self.v_proj(x).view(B, T, G, C).transpose(1, 2)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if update is not None:
            rows = update(torch.cat([k, v], dim=1).transpose(1, 2).flatten(2))  # (B, N, 2·G·C)
            k, v = rows.view(B, -1, 2 * G, C).transpose(1, 2).chunk(2, dim=1)  # (B, G, N, C) each
        # SDPA's own is_causal puts query 0 at key 0: right without a past, wrong with one.
        causal = True if mask is None and T > 1 else False  # compiled, `T > 1` alone is no bool
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
        )
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MultiHeadLatentAttention(nn.Module):
    """Causal self-attention whose keys and values are rebuilt from one small latent (DeepSeek-V2).

    A token's row is its latent (Z numbers) and *one* RoPE key for all heads (`rope` numbers):
    W = Z + rope, whatever the number of heads. forward and `update` as in GroupedQueryAttention.
    Copy it together with `apply_rope`.

    Each head's score has a part without positions and a rotated part:
        score(q, j) = (q_nope·k_nope_j + q_rope·k_rope_j) / sqrt(nope + rope),   k_nope = U_k·latent
    RoPE cannot pass through U_k, hence the separate rotated key.
    """

    def __init__(
        self, *, d_model: int, n_heads: int, kv_lora_rank: int, qk_nope_head_dim: int,
        qk_rope_head_dim: int, v_head_dim: int, q_lora_rank: int | None = None,
        norm_eps: float = 1e-6,
    ) -> None:  # fmt: skip
        super().__init__()
        self.n_heads, self.kv_lora_rank, self.v_head_dim = n_heads, kv_lora_rank, v_head_dim
        self.qk_nope_head_dim, self.qk_rope_head_dim = qk_nope_head_dim, qk_rope_head_dim
        q_width = n_heads * (qk_nope_head_dim + qk_rope_head_dim)
        if q_lora_rank is None:
            self.q_proj = nn.Linear(d_model, q_width, bias=False)
        else:
            self.q_proj = nn.Sequential(
                nn.Linear(d_model, q_lora_rank, bias=False),
                nn.RMSNorm(q_lora_rank, eps=norm_eps),
                nn.Linear(q_lora_rank, q_width, bias=False),
            )
        self.kv_down_proj = nn.Linear(d_model, kv_lora_rank + qk_rope_head_dim, bias=False)
        self.kv_norm = nn.RMSNorm(kv_lora_rank, eps=norm_eps)
        kv_width = n_heads * (qk_nope_head_dim + v_head_dim)
        self.kv_up_proj = nn.Linear(kv_lora_rank, kv_width, bias=False)
        self.out_proj = nn.Linear(n_heads * v_head_dim, d_model, bias=False)

    def forward(self, x: Tensor, place: Place, update: Update | None = None) -> Tensor:
        B, T, _ = x.shape
        cos, sin, mask = place
        Z, nope, rope = self.kv_lora_rank, self.qk_nope_head_dim, self.qk_rope_head_dim
        q = self.q_proj(x).view(B, T, self.n_heads, nope + rope).transpose(1, 2)  # (B, H, T, ..)
        q_nope, q_rope = q.split([nope, rope], dim=-1)
        q_rope = apply_rope(q_rope, cos, sin)
        latent, k_rope = self.kv_down_proj(x).split([Z, rope], dim=-1)
        rows = torch.cat([self.kv_norm(latent), apply_rope(k_rope, cos, sin)], dim=-1)  # (B, T, W)
        if update is not None:
            rows = update(rows)  # (B, N, W)
        # Two ways to one result. Multiplications per head and batch row, roughly: many new tokens
        # (training, a prompt) want `expanded`, one behind a long past wants `absorbed`.
        N, value = rows.shape[1], self.v_head_dim
        cost_expanded = N * Z * (nope + value) + T * N * (nope + rope + value)
        cost_absorbed = T * Z * (nope + value) + T * N * (Z + rope + Z)
        cheaper = N > T and cost_absorbed < cost_expanded  # N = T, no past: only one is causal
        attend = self.absorbed if cheaper else self.expanded
        return self.out_proj(attend(q_nope, q_rope, rows, mask).transpose(1, 2).flatten(2))

    def expanded(self, q_nope: Tensor, q_rope: Tensor, rows: Tensor, mask: Tensor | None) -> Tensor:
        """Rebuild each head's keys and values from the rows, then attend: (B, H, T, v_head_dim)."""
        B, N, _ = rows.shape
        latent, k_rope = rows.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        kv = self.kv_up_proj(latent).view(B, N, self.n_heads, -1).transpose(1, 2)
        k_nope, v = kv.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        k_rope = k_rope[:, None].expand(-1, self.n_heads, -1, -1)  # the same key for every head
        q, k = torch.cat([q_nope, q_rope], dim=-1), torch.cat([k_nope, k_rope], dim=-1)
        # The fast kernels want values as wide as keys: zeros make them so.
        v = F.pad(v, (0, max(0, q.shape[-1] - self.v_head_dim)))
        causal = True if mask is None and q.shape[2] > 1 else False  # as in GQA
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return out[..., : self.v_head_dim]

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, rows: Tensor, mask: Tensor | None) -> Tensor:
        """Attend to the rows themselves, never rebuilding a key or value: (B, H, T, v_head_dim).

        q·(U_k·latent) = (U_kᵀ·q)·latent and Σ p·(U_v·latent) = U_v·(Σ p·latent): apply U_kᵀ to the
        query and U_v after the sum. One row then serves every head, as key (all W numbers) and as
        value (the first Z), so to the kernel the H heads are one head with H·T queries. Without a
        mask (T = 1) each query sees every row.
        """
        (B, H, T, nope), Z = q_nope.shape, self.kv_lora_rank
        U_k, U_v = self.kv_up_proj.weight.view(H, -1, Z).split([nope, self.v_head_dim], dim=1)
        q = torch.cat([torch.einsum("bhtn,hnz->bhtz", q_nope, U_k), q_rope], dim=-1)  # (.., T, W)
        mask = None if mask is None else mask.repeat(H, 1)  # (H·T, N)
        # The score is still one of nope + rope numbers, though q and k are now W wide.
        scale = (nope + q_rope.shape[-1]) ** -0.5
        q, rows = q.view(B, 1, H * T, -1), rows[:, None]  # (B, 1, H·T, W), (B, 1, N, W)
        out = F.scaled_dot_product_attention(q, rows, rows, attn_mask=mask, scale=scale)
        out = out.view(B, H, T, -1)[..., :Z]  # a row's last numbers are its RoPE key: no value
        return torch.einsum("bhtz,hvz->bhtv", out, U_v)


# ------------------------------------------------------------------------------------------------
# Feed-forward: SwiGLU, and a mixture of such experts
# ------------------------------------------------------------------------------------------------


class SwiGLU(nn.Module):
    """Gated feed-forward (Shazeer 2020): down(silu(gate(x)) ⊙ up(x)), (..., D) -> (..., D)."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_hidden, bias=False)
        self.up_proj = nn.Linear(d_model, d_hidden, bias=False)
        self.down_proj = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@torch.library.custom_op("mythos::grouped_mm", mutates_args=())
def traceable_grouped_mm(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """F.grouped_mm that torch.compile and the meta device can trace (as it is: in bf16 only).

    Forward (3-D weight): rows offs[i−1] up to offs[i] of x (n, D), times weight[i]: (n, F).
    Its gradient (2-D weight): such columns of x (D, n) times such rows of weight (n, F): (E, D, F).
    """
    return F.grouped_mm(x, weight, offs=offs)


@traceable_grouped_mm.register_fake
def _(x, weight, offs):
    shape = (x.shape[0], weight.shape[-1])
    return x.new_empty(shape if weight.dim() == 3 else (*offs.shape, *shape))


def _grouped_mm_backward(ctx, grad):
    x, weight, offs = ctx.saved_tensors
    mm = traceable_grouped_mm
    return mm(grad, weight.mT, offs), mm(x.mT, grad, offs), None


traceable_grouped_mm.register_autograd(
    _grouped_mm_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


class MixtureOfExperts(nn.Module):
    """Shared experts for every token plus K of E routed ones (DeepSeekMoE, DeepSeek-V3).

    forward: x (B, T, D) -> (B, T, D), not in fp64. Copy it together with `SwiGLU`. To compile it,
    or to try shapes on the meta device, copy `traceable_grouped_mm` and what registers its parts.

        s      = sigmoid(x·W_router)                       one score per expert, in (0, 1)
        chosen = the K experts with the largest s + bias
        gate_i = s_i / Σ_chosen s                          without the bias; K = 1: s_i itself
        out    = shared(x) + Σ_chosen gate_i · expert_i(x)

    The bias only steers *which* experts are chosen. It is not learned: `update_router_bias` raises
    it for experts that got too few tokens and lowers it for those that got too many, so the load
    evens out without an auxiliary loss pulling at the gradients (Wang et al. 2024).
    """

    def __init__(
        self, *, d_model: int, d_expert: int, num_experts: int, num_experts_per_token: int,
        num_shared_experts: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        E, D = num_experts, d_model
        self.num_experts_per_token = num_experts_per_token
        self.router = nn.Linear(D, E, bias=False)
        # Expert i computes x @ gate_proj[i]. Initialised for use on its own; init_weights of the
        # model sets everything anew.
        self.gate_proj = nn.Parameter(torch.randn(E, D, d_expert) / D**0.5)
        self.up_proj = nn.Parameter(torch.randn(E, D, d_expert) / D**0.5)
        self.down_proj = nn.Parameter(torch.randn(E, d_expert, D) / d_expert**0.5)
        self.shared = SwiGLU(D, num_shared_experts * d_expert) if num_shared_experts else None
        # Train in fp32 (or autocast): in a bf16 bias, steps of 0.001 round away beyond 0.5.
        self.register_buffer("router_bias", torch.zeros(E))
        # Tokens sent to each expert since the last bias update. Integers: no cast can round them.
        self.register_buffer("load", torch.zeros(E, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        shape, x = x.shape, x.flatten(0, -2)  # (B·T, D); experts do not care about positions
        chosen, gates = self.route(x)
        out = self.dispatch(x, chosen, gates)
        if self.shared is not None:
            out = out + self.shared(x)
        return out.view(shape)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (n, D) -> the chosen experts and their gates, both (n, K)."""
        scores = self.router(x).float().sigmoid()  # (n, E)
        chosen = (scores + self.router_bias).topk(self.num_experts_per_token).indices
        gates = scores.gather(1, chosen)
        if self.num_experts_per_token > 1:  # K = 1: it would be 1, and the router learn nothing
            gates = gates / (gates.sum(dim=-1, keepdim=True) + 1e-20)  # all scores may round to 0
        return chosen, gates.to(x.dtype)

    def dispatch(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """Σ_chosen gate_i · expert_i(x), (n, D), with three matrix products for all experts.

        Sorted by expert, the (token, expert) pairs of one expert lie next to each other;
        `F.grouped_mm` multiplies each such group with its expert's matrix.
        """
        E, K = self.router_bias.numel(), self.num_experts_per_token
        expert, pair = chosen.flatten().sort(stable=True)  # (n·K,) each
        token = pair // K
        # Expert i owns the sorted pairs from ends[i−1] up to ends[i].
        ids = torch.arange(E, device=x.device)
        ends = torch.searchsorted(expert, ids, right=True, out_int32=True)  # (E,)
        if self.training:
            self.load += ends.diff(prepend=ends.new_zeros(1))
        # Autocast does not reach F.grouped_mm; hand it the dtype that autocast would choose.
        kind = x.device.type
        autocast = not x.is_meta and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
        gate_proj, up_proj = self.gate_proj.to(dtype), self.up_proj.to(dtype)
        traced = torch.compiler.is_compiling() or x.is_meta
        mm = traceable_grouped_mm if traced else F.grouped_mm
        rows = x.index_select(0, token).to(dtype)  # (n·K, D); x[token] has a slow backward
        hidden = F.silu(mm(rows, gate_proj, offs=ends)) * mm(rows, up_proj, offs=ends)  # (n·K, F)
        # down_proj is linear: a gate on its input does what one on its output would, for less.
        hidden = (hidden * gates.flatten()[pair, None]).to(dtype)
        out = mm(hidden, self.down_proj.to(dtype), offs=ends)  # (n·K, D)
        return torch.zeros_like(x).index_add(0, token, out.to(x.dtype))

    @torch.no_grad()
    def update_router_bias(self, speed: float = 1e-3) -> Tensor:
        """Move the bias against the imbalance since the last call; returns that load, (E,) int64.

        bias_i += speed · sign(mean(load) − load_i). Call it once after each optimizer step; the
        load is counted in training mode, over all loops.
        """
        load = self.load.clone()
        self.router_bias += speed * (load.float().mean() - load).sign()
        self.load.zero_()
        return load


# ------------------------------------------------------------------------------------------------
# Block, state update, cache
# ------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + ffn(norm(x)), (B, T, D)."""

    def __init__(self, d_model: int, attention: nn.Module, ffn: nn.Module, norm_eps: float = 1e-6):
        super().__init__()
        self.attention_norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.attention = attention
        self.ffn_norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.ffn = ffn

    def forward(self, x: Tensor, place: Place, update: Update | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), place, update)
        return x + self.ffn(self.ffn_norm(x))


class StateUpdate(nn.Module):
    """The linear part of the loop: h_{t+1} = A·h_t + B·e + R(h_t, e), each (B, T, D).

    A and B are diagonal, D numbers each. Little is lost: a diagonalisable A is diagonal in some
    basis, and mixing, rotating or flipping channels is left to R and the learned layers around. It
    makes the spectral radius rho(A) = max|A_i| exact and free, so we *bound* it:

        A = target · (1 − 2^-8) · sigmoid(a)     rho(A) < target for every a; also in bf16, fp16

    R reads a normalised input, so |R| <= M however large h is, and the state stays within
        |h_t| <= rho^t·|h_0| + (max|B·e| + M) / (1 − rho).
    Bounded is not settled: whether h stops moving depends on the whole Jacobian, A + dR/dh. See
    `RecurrentDepthTransformer.loop_gain`.
    """

    def __init__(self, d_model: int, spectral_radius_target: float | None = 0.95) -> None:
        super().__init__()
        self.target = spectral_radius_target
        self.a = nn.Parameter(torch.zeros(d_model))
        self.b = nn.Parameter(torch.full((d_model,), 0.5))  # B·e starts comparable to R

    def A(self) -> Tensor:
        """The diagonal of A, (D,), fp32."""
        if self.target is None:
            return self.a.float() + 0.475  # starts about where target = 0.95 does; free to explode
        # Rounding to bf16 raises a number by at most 2^-8 of itself. Aiming 2^-8 below the target
        # keeps rho(A) < target after the cast, too.
        return self.target * (1 - 2**-8) * self.a.float().sigmoid()

    def forward(self, h: Tensor, e: Tensor, r: Tensor) -> Tensor:
        return self.A().to(h.dtype) * h + self.b.to(h.dtype) * e + r

    @torch.no_grad()
    def spectral_radius(self) -> float:
        """rho(A) = max |A_i| since A is diagonal; exact, up to the rounding of A to h's dtype."""
        return self.A().abs().max().item()


class Cache:
    """What past tokens left behind: one slot of rows per layer application, allocated once.

    A looped block sees a different state in each loop, so each loop has slots of its own:
    prelude_layers + n_loops·recurrent_layers + coda_layers slots of (B, length, W). Make one with
    `model.new_cache`. `n_tokens` counts the tokens it holds; set it to 0 to start afresh.
    """

    def __init__(
        self, *, prelude: int, recurrent: int, coda: int, n_loops: int,
        batch_size: int, length: int, width: int, device=None, dtype=None,
    ) -> None:  # fmt: skip
        self.prelude, self.recurrent, self.n_loops, self.n_tokens = prelude, recurrent, n_loops, 0
        slots = prelude + n_loops * recurrent + coda
        self.rows = torch.zeros(slots, batch_size, length, width, device=device, dtype=dtype)

    def slot(self, i: int, active: Tensor | None = None) -> Update:
        """The `update` for the layer that owns slot i (negative: from the end, as in a list).

        It puts new rows (B, T, W) behind the n_tokens in the slot and returns all of it, (B, N, W).
        Where `active` (B, T) is False the token has halted: it keeps its row of the loop before,
        which lies `recurrent` slots earlier.
        """

        def update(rows: Tensor) -> Tensor:
            new = slice(self.n_tokens, self.n_tokens + rows.shape[1])
            if active is not None:
                rows = torch.where(active[..., None], rows, self.rows[i - self.recurrent, :, new])
            self.rows[i, :, new] = rows
            return self.rows[i, :, : new.stop]

        return update

    def loop_slots(self, t: int, active: Tensor | None) -> list[Update]:
        """The `update` of each recurrent layer in loop t; `active` None: no token has halted."""
        first = self.prelude + t * self.recurrent
        return [self.slot(first + i, active) for i in range(self.recurrent)]

    def stand_still(self, loops_run: int, n_new: int) -> None:
        """All n_new tokens have halted: copy their last rows into the loops that were not run.

        Later tokens may loop longer, and then read there what these tokens left behind.
        """
        loops = self.rows[self.prelude : self.prelude + self.n_loops * self.recurrent]
        loops = loops.unflatten(0, (self.n_loops, self.recurrent))  # (loops, layers, B, length, W)
        new = loops[:, :, :, self.n_tokens : self.n_tokens + n_new]
        new[loops_run:] = new[loops_run - 1]


# ------------------------------------------------------------------------------------------------
# The model
# ------------------------------------------------------------------------------------------------


class RecurrentDepthTransformer(nn.Module):
    """Prelude once, recurrent blocks looped n_loops times, coda once (equations at the top).

    RecurrentDepthTransformer(config), RecurrentDepthTransformer(d_model=256, attention_type="gqa"),
    or both: keywords override fields of the config. `model.config` is the config in force.
    """

    def __init__(self, config: MythosConfig | None = None, **overrides) -> None:
        super().__init__()
        ok = config is None or isinstance(config, MythosConfig)
        expect(ok, "config", config, "a MythosConfig or None")
        self.config = c = replace(config or MythosConfig(), **overrides)
        D, eps = c.d_model, c.norm_eps
        self.embed = nn.Embedding(c.vocab_size, D)
        self.prelude = nn.ModuleList(self._block(False) for _ in range(c.prelude_layers))
        self.input_norm = nn.RMSNorm(D, eps=eps)
        self.recurrent = nn.ModuleList(self._block(True) for _ in range(c.recurrent_layers))
        if c.recurrent_layers > 0:
            self.loop_norm = nn.RMSNorm(D, eps=eps)
            self.state_update = StateUpdate(D, c.spectral_radius_target)
        self.state_norm = nn.RMSNorm(D, eps=eps)
        self.coda = nn.ModuleList(self._block(False) for _ in range(c.coda_layers))
        self.output_norm = nn.RMSNorm(D, eps=eps)
        self.head = nn.Linear(D, c.vocab_size, bias=False)
        self.init_weights()

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, *, n_loops: int | None = None,
        grad_loops: int | None = None, halt_threshold: float | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Token ids (B, T) -> logits (B, T, V) and, given targets (B, T), their mean cross-entropy.

        targets[b, t] is the id wanted at position t (the caller shifts); −100 is not scored.
        n_loops: None is config.max_loop_iters; more is allowed; 0: no loop, the coda reads e.
        grad_loops: only the last grad_loops loops carry gradient (truncated backpropagation
            through time); None: all. The prelude still learns, through the e of those loops.
        halt_threshold: a token halts once |h_{t+1} − h_t| / |h_{t+1}| falls below it (in the first
            loop it is 1); when all tokens of the call have halted, the loop ends. See run_loop.
        cache: tokens continue the sequence that the cache holds.
        Halting and caching are for inference: with either, no gradient is recorded.
        Raises ValueError naming the argument that is out of range.
        """
        n_loops = self._check(tokens, targets, n_loops, grad_loops, halt_threshold, cache)
        if halt_threshold is not None and cache is None:
            cache = self.new_cache(*tokens.shape, n_loops)  # halted tokens' rows must stand still
        with torch.no_grad() if cache is not None else nullcontext():
            e, place = self.run_prelude(tokens, cache)
            h, _ = self.run_loop(e, place, n_loops, grad_loops, halt_threshold, cache)
            logits = self.run_coda(h, place, cache)
        if cache is not None:
            cache.n_tokens += tokens.shape[1]
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().long())

    # ---- the three stages ----

    def run_prelude(self, tokens: Tensor, cache: Cache | None = None) -> tuple[Tensor, Place]:
        """e = RMSNorm(Prelude(embed(tokens))), (B, T, D), and the tokens' `place`."""
        c, T, past = self.config, tokens.shape[1], 0 if cache is None else cache.n_tokens
        positions = torch.arange(past + T, device=tokens.device)
        new = positions[past:]
        # No T×T mask without a past. With one, query t sits at past + t and may see 0 … past + t.
        mask = positions <= new[:, None] if past > 0 and T > 1 else None  # (T, N)
        place = (*rope_angles(new, c.rope_width(), c.rope_theta), mask)
        x = self.embed(tokens)  # (B, T, D)
        for i, block in enumerate(self.prelude):
            x = block(x, place, cache and cache.slot(i))
        return self.input_norm(x), place

    def step(
        self, h: Tensor, e: Tensor, place: Place, updates: list[Update] | None = None
    ) -> Tensor:
        """One loop: h_{t+1} = A·h_t + B·e + R(h_t, e), R = Blocks(RMSNorm(h + e)), (B, T, D)."""
        updates = updates or [None] * len(self.recurrent)
        r = self.loop_norm(h + e)
        for block, update in zip(self.recurrent, updates, strict=True):
            r = block(r, place, update)
        return self.state_update(h, e, r)

    def run_loop(
        self, e: Tensor, place: Place, n_loops: int, grad_loops: int | None = None,
        halt_threshold: float | None = None, cache: Cache | None = None,
        states: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The state after the last loop (B, T, D) and the loops each token used (B, T).

        `states`, if given, collects h_1, h_2, ... The answer is the *last* state, not a weighted
        sum over loops: in OpenMythos the weights tied the model to the depth it was trained at.

        Halting. Let s be the first loop that changes a token's state by less than the threshold.
        From then on its state stays what loop s made of it, h_{s+1}, and the cache slots of each
        later loop get a copy of the rows that it wrote in loop s. So in loop t every token reads
        its row of loop min(t, s), whether they share a call or not; and since s depends only on the
        token and those before it, decoding token by token gives the answer of one pass (up to
        rounding, which in bf16 may shift an s). Work is saved when *all* tokens of a call, in the
        whole batch, have halted; until then a halted token is still computed, in vain.
        """
        ok = halt_threshold is None or cache is not None
        expect(ok, "cache", cache, "a cache, where halted tokens' rows can stand still")
        if n_loops == 0:
            return e, e.new_zeros(e.shape[:2], dtype=torch.int64)
        h = torch.zeros_like(e)
        used = torch.zeros(e.shape[:2], dtype=torch.int64, device=e.device)
        active = torch.ones_like(used, dtype=torch.bool)  # (B, T), False: the token has halted
        n_active = n_tokens = active.numel()
        first_grad_loop = 0 if grad_loops is None else n_loops - grad_loops
        for t in range(n_loops):
            updates = cache and cache.loop_slots(t, active if n_active < n_tokens else None)
            with torch.set_grad_enabled(torch.is_grad_enabled() and t >= first_grad_loop):
                h_next = self.step(h, e, place, updates)
            used = used + active
            if halt_threshold is not None:
                if n_active < n_tokens:
                    h_next = torch.where(active[..., None], h_next, h)
                change = (h_next.float() - h.float()).norm(dim=-1) / h_next.float().norm(dim=-1)
                active = active & ~(change < halt_threshold)  # nan: exploded, not settled
                n_active = int(active.sum())  # waits for the GPU once per loop
            h = h_next
            if states is not None:
                states.append(h)
            if n_active == 0:
                cache.stand_still(t + 1, e.shape[1])
                break
        return h, used

    def run_coda(self, h: Tensor, place: Place, cache: Cache | None = None) -> Tensor:
        """logits = head(RMSNorm(Coda(RMSNorm(h)))), (B, T, V)."""
        x = self.state_norm(h)
        for i, block in enumerate(self.coda, start=-len(self.coda)):  # the cache's last slots
            x = block(x, place, cache and cache.slot(i))
        return self.head(self.output_norm(x))

    # ---- using it ----

    def new_cache(self, batch_size: int, length: int, n_loops: int | None = None) -> Cache:
        """An empty cache for `length` tokens at exactly `n_loops` loops, on the model's device."""
        c, n_loops = self.config, self._resolve_loops(n_loops)
        expect_int("batch_size", batch_size, 1)
        expect_int("length", length, 1)
        expect(length <= c.max_seq_len, "length", length, f"at most max_seq_len = {c.max_seq_len}")
        w = self.head.weight
        return Cache(
            prelude=c.prelude_layers, recurrent=c.recurrent_layers, coda=c.coda_layers,
            n_loops=n_loops, batch_size=batch_size, length=length, width=c.row_width(),
            device=w.device, dtype=w.dtype,
        )  # fmt: skip

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, max_new_tokens: int, *, temperature: float = 1.0,
        top_k: int | None = None, top_p: float | None = None, n_loops: int | None = None,
        halt_threshold: float | None = None, eos_token: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Continue prompts (B, T) by up to max_new_tokens sampled ids: (B, T + new).

        temperature 0 takes the likeliest id. top_k keeps the k likeliest; top_p the fewest ids
        whose probabilities reach p (nucleus sampling, arXiv 1904.09751). A sequence that has
        produced eos_token is padded with it; generation ends when every one has. n_loops and
        halt_threshold are forward's. Raises ValueError for arguments out of range, if prompt and
        new tokens exceed config.max_seq_len, and if the model answers inf or nan.
        """
        c = self.config
        expect_int("max_new_tokens", max_new_tokens, 0)
        check_sampling(temperature, top_k, top_p)
        expect_int("eos_token", eos_token, 0, or_none=True)
        ok = eos_token is None or eos_token < c.vocab_size
        expect(ok, "eos_token", eos_token, f"an id below vocab_size = {c.vocab_size}, or None")
        n_loops = self._check(tokens, None, n_loops, None, halt_threshold, None)
        B, T = tokens.shape
        ok = T + max_new_tokens <= c.max_seq_len
        expect(ok, "tokens + max_new_tokens", T + max_new_tokens, f"at most {c.max_seq_len} tokens")

        cache, chunk = self.new_cache(B, T + max_new_tokens, n_loops), tokens
        done = torch.zeros(B, 1, dtype=torch.bool, device=tokens.device)
        with self._eval_mode():
            for _ in range(max_new_tokens):
                logits, _ = self(chunk, n_loops=n_loops, halt_threshold=halt_threshold, cache=cache)
                chunk = sample(logits[:, -1], temperature, top_k, top_p, generator).to(tokens.dtype)
                if eos_token is not None:
                    chunk = chunk.masked_fill(done, eos_token)
                    done = done | (chunk == eos_token)
                tokens = torch.cat([tokens, chunk], dim=1)
                if eos_token is not None and done.all():
                    break
        return tokens

    def update_router_bias(self, speed: float = 1e-3) -> Tensor:
        """Balance all experts (see MixtureOfExperts); returns the loads, (recurrent_layers, E).

        Call once after each optimizer step. A model without experts returns an empty tensor.
        """
        expect_number("speed", speed)
        loads = [moe.update_router_bias(speed) for moe in self._experts()]
        return torch.stack(loads) if loads else torch.empty(0)

    # ---- looking inside ----

    @torch.no_grad()
    def diagnostics(
        self, tokens: Tensor, *, n_loops: int | None = None, halt_threshold: float | None = None
    ) -> dict[str, Tensor]:
        """What happens in each of the L loops that were run (fewer than n_loops if all halt early).

        Entry t is about the state h_{t+1} that loop t produced.

        state_norm   (L, B, T)          |h_{t+1}|, Euclidean
        change       (L, B, T)          |h_{t+1} − h_t| / |h_{t+1}|, what halting looks at
        logits       (L, B, T, V)       the answer if the loop ended here
        expert_load  (L, layers, E)     tokens that each recurrent layer sends to each expert;
                                        halted ones are still computed, and counted
        loops_used   (B, T)             loops until the token halted, or all L
        """
        n_loops = self._check(tokens, None, n_loops, None, halt_threshold, None)
        expect(n_loops > 0, "n_loops", n_loops, "at least 1 loop to look at")
        loads: list[Tensor] = []

        def count(moe: MixtureOfExperts, inputs: tuple[Tensor]) -> None:
            chosen, _ = moe.route(inputs[0].flatten(0, -2))
            loads.append(chosen.flatten().bincount(minlength=self.config.num_experts))

        hooks = [moe.register_forward_pre_hook(count) for moe in self._experts()]
        cache = None if halt_threshold is None else self.new_cache(*tokens.shape, n_loops)
        states: list[Tensor] = []
        try:
            with self._eval_mode():
                e, place = self.run_prelude(tokens, cache)
                _, used = self.run_loop(e, place, n_loops, None, halt_threshold, cache, states)
                logits = [self.run_coda(h, place, cache) for h in states]
        finally:
            for hook in hooks:
                hook.remove()
        load_shape = (len(states), len(hooks), self.config.num_experts)
        h = torch.stack(states).float()  # (L, B, T, D)
        moved = torch.diff(h, dim=0, prepend=torch.zeros_like(h[:1])).norm(dim=-1)
        return {
            "state_norm": h.norm(dim=-1),
            "change": moved / h.norm(dim=-1),
            "logits": torch.stack(logits),
            "expert_load": torch.cat([used.new_empty(0), *loads]).view(load_shape),
            "loops_used": used,
        }

    def spectral_radius(self) -> float:
        """rho(A), which bounds the state if it is below 1 (see StateUpdate)."""
        expect(len(self.recurrent) > 0, "recurrent_layers", 0, "a model with a loop")
        return self.state_update.spectral_radius()

    def loop_gain(
        self, tokens: Tensor, *, n_loops: int | None = None, iterations: int = 100,
        generator: torch.Generator | None = None,
    ) -> float:  # fmt: skip
        """Spectral radius of the Jacobian J = d h_{t+1} / d h_t at the state after n_loops loops.

        Near a fixed point it tells whether the loop settles, which rho(A) does not: above 1 some
        small disturbance grows from loop to loop, below 1 all die out in the end. n_loops = 0 is
        the first loop, at h_0 = 0 (where forward would skip the loop). The largest over the batch.
        Power iteration v ← Jᵀv / |Jᵀv| with vector-Jacobian products, J never formed; Jᵀ and J
        share eigenvalues. The growth |Jᵀv| is averaged (geometric mean) over the later half of the
        iterations, since it oscillates when the leading eigenvalues are a complex pair. More
        iterations are more exact: take 1000 for a verdict near 1.
        """
        n_loops = self._check(tokens, None, n_loops, None, None, None)
        expect(len(self.recurrent) > 0, "recurrent_layers", 0, "a model with a loop")
        expect_int("iterations", iterations, 2)
        with self._eval_mode(), torch.inference_mode(False):
            with torch.no_grad():
                e, place = self.run_prelude(tokens)
                h = self.run_loop(e, place, n_loops)[0] if n_loops > 0 else torch.zeros_like(e)
            with torch.enable_grad():
                h = h.requires_grad_()
                h_next = self.step(h, e, place)
        v = torch.randn(h.shape, generator=generator, device=h.device).to(h.dtype)
        v, log_growth = v / v.norm(), []
        for _ in range(iterations):
            (v,) = torch.autograd.grad(h_next, h, v, retain_graph=True)
            v = v.float()  # bf16 would round the growth
            log_growth.append(v.norm().log())
            v = (v / v.norm().clamp_min(1e-30)).to(h.dtype)  # J may be 0
        return torch.stack(log_growth[iterations // 2 :]).mean().exp().item()

    # ---- counting ----

    def num_params(self, *, active: bool = False) -> int:
        """Parameters and router biases; `active`: with K instead of E routed experts, so what one
        token uses (the embedding table counted whole, as is the custom)."""
        return count_params(self, active)

    def executed_params(self, n_loops: int | None = None) -> int:
        """Active parameters, those of the loop counted n_loops times: the work for one token."""
        n_loops = self._resolve_loops(n_loops)
        if not self.recurrent:
            return self.num_params(active=True)
        parts = (self.recurrent, self.loop_norm, self.state_update)
        loop = sum(count_params(part, active=True) for part in parts)
        return self.num_params(active=True) + (n_loops - 1) * loop

    def flops_per_token(self, n_loops: int | None = None, context: int = 0) -> int:
        """Forward FLOPs for one token of a full pass: 2 per executed parameter, and attention to
        `context` keys.

        Training costs three times as much (forward, and a backward of twice the forward). In
        causal attention over T tokens the average context is T / 2.
        """
        expect_int("context", context, 0)
        c, C = self.config, self.config.widths().head_dim
        matrices = self.executed_params(n_loops) - self.embed.weight.numel()  # a lookup costs none
        per_key = 2 * C + (c.rope_width() if c.attention_type == "mla" else 0)  # score, value
        return 2 * matrices + 2 * self._applications(n_loops) * c.n_heads * per_key * context

    def kv_bytes_per_token(self, n_loops: int | None = None, bytes_per_number: int = 2) -> int:
        """Cache bytes for one token: row width × layer applications × bytes (2: bf16)."""
        expect_int("bytes_per_number", bytes_per_number, 1)
        return self.config.row_width() * self._applications(n_loops) * bytes_per_number

    def _applications(self, n_loops: int | None) -> int:
        c = self.config
        return c.prelude_layers + self._resolve_loops(n_loops) * c.recurrent_layers + c.coda_layers

    # ---- building and checking ----

    def _block(self, in_loop: bool) -> Block:
        """A block of either kind, from plain numbers, so that every part can be lifted out."""
        c, w = self.config, self.config.widths()
        if c.attention_type == "mla":
            attention = MultiHeadLatentAttention(
                d_model=c.d_model, n_heads=c.n_heads, q_lora_rank=c.q_lora_rank,
                kv_lora_rank=w.kv_lora_rank, qk_nope_head_dim=w.head_dim,
                qk_rope_head_dim=c.rope_width(), v_head_dim=w.head_dim, norm_eps=c.norm_eps,
            )  # fmt: skip
        else:
            attention = GroupedQueryAttention(
                d_model=c.d_model, n_heads=c.n_heads, n_kv_heads=w.n_kv_heads, head_dim=w.head_dim
            )
        if in_loop and c.num_experts > 0:
            ffn = MixtureOfExperts(
                d_model=c.d_model, d_expert=w.d_expert, num_experts=c.num_experts,
                num_experts_per_token=c.num_experts_per_token,
                num_shared_experts=c.num_shared_experts,
            )  # fmt: skip
        else:
            ffn = SwiGLU(c.d_model, w.d_ff)
        return Block(c.d_model, attention, ffn, c.norm_eps)

    @torch.no_grad()
    def init_weights(self) -> None:
        """(Re)set everything; after `to_empty(device=...)` it makes a meta model a real one.

        embed, head               normal, std 0.02
        every other matrix        normal, std 0.8 / sqrt(inputs): measured to train well (toy)
        norms                     1
        A, B                      a = 0: A is just under target / 2 (None: 0.475); b = 0.5
        router bias, load         0
        """
        for name, p in self.named_parameters():
            if name in ("embed.weight", "head.weight"):
                p.normal_(std=0.02)
            elif name == "state_update.a":
                p.zero_()
            elif name == "state_update.b":
                p.fill_(0.5)
            elif p.dim() == 1:
                p.fill_(1.0)
            else:  # a Linear is stored (out, in), an expert stack (E, in, out): inputs at dim 1
                p.normal_(std=0.8 / p.shape[1] ** 0.5)
        for buffer in self.buffers():
            buffer.zero_()

    def _resolve_loops(self, n_loops: int | None) -> int:
        """None becomes the default; a model without recurrent layers has none and takes none."""
        has_loop = self.config.recurrent_layers > 0
        if n_loops is None:
            return self.config.max_loop_iters if has_loop else 0
        expect_int("n_loops", n_loops, 0)
        expect(has_loop or n_loops == 0, "n_loops", n_loops, "0, there being no recurrent_layers")
        return n_loops

    @contextmanager
    def _eval_mode(self):
        """Evaluation mode inside, each module's own mode afterwards: looking must not train."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode

    def _experts(self) -> list[MixtureOfExperts]:
        return [m for m in self.modules() if isinstance(m, MixtureOfExperts)]

    def _check(self, tokens, targets, n_loops, grad_loops, halt_threshold, cache) -> int:
        """Refuse whatever forward could not do right; returns the number of loops."""
        n_loops, c, here = self._resolve_loops(n_loops), self.config, self.head.weight.device
        expect_int("grad_loops", grad_loops, 1, or_none=True)
        expect_number("halt_threshold", halt_threshold, or_none=True)
        ok = grad_loops is None or (cache is None and halt_threshold is None)
        expect(ok, "grad_loops", grad_loops, "None where a cache or halting records no gradient")
        named = [("tokens", tokens)] + [("targets", targets)] * (targets is not None)
        for name, x in named:
            got = x.dtype if isinstance(x, Tensor) else type(x)
            expect(got in (torch.int32, torch.int64), name, got, "a tensor of int64 or int32")
            ok = x.dim() == 2 and x.numel() > 0 and x.shape == tokens.shape
            expect(ok, f"{name}.shape", tuple(x.shape), "(B, T), not empty, targets like tokens")
            expect(x.device == here, f"{name}.device", x.device, f"the model's, {here}")
            if not (torch.compiler.is_compiling() or x.is_meta):  # there are no values to look at
                ids = x[x != -100] if name == "targets" else x
                expect(ids.numel() > 0, name, "all −100", "at least one target to score")
                got, top = (ids.min().item(), ids.max().item()), c.vocab_size - 1
                expect(got[0] >= 0 and got[1] <= top, f"{name} ids", got, f"within 0 … {top}")
        B, T = tokens.shape
        if cache is not None:
            expect(isinstance(cache, Cache), "cache", type(cache), "one from new_cache, or None")
            slots, batch, length, width = cache.rows.shape
            expect(cache.n_loops == n_loops, "n_loops", n_loops, f"the cache's {cache.n_loops}")
            expect(B == batch, "tokens.shape[0]", B, f"the cache's batch size, {batch}")
            N = cache.n_tokens + T
            expect(N <= length, "cached + new tokens", N, f"at most the cache's length, {length}")
            got = (cache.prelude, cache.recurrent, slots, width)
            n_slots = self._applications(n_loops)
            want = (c.prelude_layers, c.recurrent_layers, n_slots, c.row_width())
            what = "cache (prelude, recurrent, slots, width)"
            expect(got == want, what, got, f"this model's {want}")
            got, want = (cache.rows.dtype, cache.rows.device), (self.head.weight.dtype, here)
            expect(got == want, "cache (dtype, device)", got, f"this model's {want}")
        expect(T <= c.max_seq_len, "tokens.shape[1]", T, f"at most max_seq_len = {c.max_seq_len}")
        return n_loops


def count_params(module: nn.Module, active: bool = False) -> int:
    """Parameters and router biases of a module; `active` counts K instead of E routed experts."""
    total = sum(p.numel() for p in module.parameters())
    for moe in (m for m in module.modules() if isinstance(m, MixtureOfExperts)):
        E, K = moe.router_bias.numel(), moe.num_experts_per_token
        total += E
        if active:
            total -= (E - K) * 3 * moe.gate_proj[0].numel()
    return total


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    expect_number("temperature", temperature)
    expect_int("top_k", top_k, 1, or_none=True)
    expect_number("top_p", top_p, or_none=True)
    expect(top_p is None or 0 < top_p <= 1, "top_p", top_p, "a number in (0, 1] or None")


def sample(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """One id per row of logits (B, V): (B, 1). See `RecurrentDepthTransformer.generate`."""
    check_sampling(temperature, top_k, top_p)
    ok = bool(logits.amax(dim=-1).isfinite().all())
    expect(ok, "logits", "inf or nan", "finite numbers: the weights or the state overflowed")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    # Sorted, every rule keeps a prefix: sample in it, then look up which id that was.
    logits, ids = logits.float().sort(descending=True, stable=True)
    # At most 0, and the divisor not 0 even in fp32: a quotient may be −inf, but not inf or nan.
    logits = (logits - logits[:, :1]) / max(temperature, 1e-30)
    if top_k is not None:
        logits[:, top_k:] = -math.inf
    p = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        p = p.masked_fill(p.cumsum(dim=-1) - p >= top_p, 0.0)  # mass before this id suffices
    return ids.gather(1, p.multinomial(1, generator=generator))


# ------------------------------------------------------------------------------------------------
# Sizes
# ------------------------------------------------------------------------------------------------

# Heads of 128 and a latent of 512 as in DeepSeek-V2/V3, one shared expert as in V3. Loops, experts
# and context grow with size. d_expert is chosen so that the total, vocabulary included, matches the
# name. The columns are _SIZE_FIELDS; P, R, C here: layers of prelude, loop and coda. rope_theta is
# left at its default: for training at these lengths one would raise it.
_SIZE_FIELDS = (
    "vocab_size", "max_seq_len", "d_model", "n_heads", "q_lora_rank", "prelude_layers",
    "recurrent_layers", "coda_layers", "max_loop_iters", "num_experts", "num_experts_per_token",
    "d_expert",
)  # fmt: skip
_SIZES = {
    #        vocab,   context,    D,  H, q_rank, P,  R, C, loops,  E, K, F
    "1B": (65_536, 4_096, 1536, 16, None, 2, 4, 2, 8, 32, 4, 1040),
    "3B": (65_536, 8_192, 2048, 16, None, 2, 6, 2, 8, 64, 4, 1024),
    "7B": (131_072, 8_192, 2560, 24, None, 2, 8, 2, 12, 64, 6, 1456),
    "10B": (131_072, 16_384, 3072, 24, None, 2, 8, 2, 12, 64, 6, 1784),
    "50B": (131_072, 32_768, 4096, 32, 1536, 3, 12, 3, 16, 128, 6, 2496),
    "70B": (131_072, 32_768, 5120, 40, 1536, 3, 14, 3, 16, 128, 8, 2384),
    "100B": (131_072, 65_536, 5120, 40, 1536, 3, 16, 3, 20, 160, 8, 2432),
    "500B": (131_072, 131_072, 7168, 56, 1536, 4, 24, 4, 24, 256, 8, 3712),
    "1T": (131_072, 262_144, 8192, 64, 1536, 4, 32, 4, 32, 256, 8, 4896),
}


def get_model_config(name: str) -> MythosConfig:
    """The config of a named size, "1B" to "1T", or of "tiny", the toy of train_tiny.py.

    The total parameter count is within 1% of the name. Case does not matter; an unknown name
    raises ValueError with the known ones. Change a field with `dataclasses.replace`, or in
    `RecurrentDepthTransformer(config, attention_type="gqa")`.
    """
    known = ("tiny", *_SIZES)
    found = {k.lower(): k for k in known}.get(str(name).lower())
    expect(found is not None, "name", name, f"one of {known}")
    if found == "tiny":  # vocabulary: 20 nodes and the 20² edges between them
        small = {"n_kv_heads": 2, "kv_lora_rank": 64, "d_expert": 64}
        return MythosConfig(vocab_size=420, max_seq_len=64, max_loop_iters=12, **small)
    size = dict(zip(_SIZE_FIELDS, _SIZES[found], strict=True))
    return MythosConfig(**size, head_dim=128, n_kv_heads=8)


def print_sizes() -> None:
    """The table of `python mythos.py`. Models are built on the meta device: shapes, no memory."""
    print(
        "Mythos sizes. P+R×L+C: prelude layers + recurrent layers × max loops + coda layers.\n"
        "active: parameters that one token uses; executed: with the loop's counted L times.\n"
        "cache: bytes per token at L loops in bf16. tokens: 20 per active parameter (Chinchilla);\n"
        "FLOPs: to train on them. Extrapolated: Parcae fitted its laws below 1.3e20 FLOPs.\n"
    )
    line = "{:>5} {:>8} {:>7} {:>9}  {:<10} {:<11} {:>8} {:>10} {:>10} {:>7} {:>8}".format
    print(line("size", "total", "active", "executed", "P+R×L+C", "experts", "context",
               "cache MLA", "cache GQA", "tokens", "FLOPs"))  # fmt: skip
    for name in ("tiny", *_SIZES):
        c = get_model_config(name)
        with torch.device("meta"):
            model = RecurrentDepthTransformer(c)
        active = model.num_params(active=True)
        counts = (model.num_params(), active, model.executed_params())
        scale, unit = (1e6, "M") if name == "tiny" else (1e9, "B")
        layers = f"{c.prelude_layers}+{c.recurrent_layers}×{c.max_loop_iters}+{c.coda_layers}"
        experts = f"{c.num_experts_per_token}/{c.num_experts} + {c.num_shared_experts}"
        mla = model.kv_bytes_per_token()
        gqa = mla * replace(c, attention_type="gqa").row_width() // c.row_width()
        flops = 3 * model.flops_per_token(context=c.max_seq_len // 2) * 20 * active
        cells = (f"{count / scale:.2f}{unit}" for count in counts)
        print(line(name, *cells, layers, experts, f"{c.max_seq_len:,}", f"{mla:,}", f"{gqa:,}",
                   f"{20 * active / 1e9:.3g}B", f"{flops:.1e}"))  # fmt: skip


if __name__ == "__main__":
    print_sizes()
