# SPDX-License-Identifier: MIT
"""Mythos: a Recurrent-Depth Transformer in one readable file.

A language model that loops a few blocks instead of stacking many, so that the same weights can
think longer about harder input:

    e        = input_norm(Prelude(embed_norm(embed(tokens))))   once
    h_0      = 0
    h_{t+1}  = A·h_t + B·e + R(h_t, e)                          L loops, t = 0 … L−1, same weights
    R(h, e)  = Blocks(loop_norm(h + e))
    logits   = head(output_norm(Coda(state_norm(h_L))))         once

The state h is the model's scratch pad; the input e is offered again in every loop. Prelude, Blocks
and Coda are ordinary pre-norm transformer blocks, and every norm is an RMSNorm. A block returns its
input plus what it adds, so R is loop_norm(h + e) plus what the blocks add: it knows the direction
of h + e, not its size. A and B, learned, one number per channel, carry h and e themselves.

    model = RecurrentDepthTransformer(get_model_config("tiny"))
    logits, loss = model(tokens, targets, n_loops=8)     # depth is an argument, not a constant
    tokens = model.generate(tokens, 32, halt_threshold=0.3)

Read from the top. First comes what is new: the state update, and the model with its loop and its
halting. Then what other transformers have, too: block, attention, feed-forward, experts, cache. If
you stop at the line END OF THE MODEL, you have seen the whole architecture. Below it: sampling and
other helpers, looking inside, counting, named sizes, and the checks of arguments. `check...` and
`expect` raise a ValueError that names the argument, what it got and what was expected.

To copy a part into a file of yours: its docstring says under "To lift it" what to take along.

Letters in equations and shapes. A *row* is what a token leaves in the cache when it passes a layer.
    N  sequences in the batch     D  d_model              H  query heads
    T  new tokens in this call    C  head_dim             G  key/value heads (GQA)
    S  all tokens, past and new   Z  kv_lora_rank (MLA)   W  numbers in a row
    L  loops, t the current one   E  routed experts       K  experts chosen per token
    V  vocabulary

Not here: training (train_tiny.py), tokenizers, dropout, multi-token prediction, multi-GPU code.
The architecture is speculation, after OpenMythos, a community's guess at how a looped model might
be built. Neither project is affiliated with Anthropic, and nobody has confirmed the architecture.
Looped depth in the literature: Universal Transformer (arXiv 1807.03819), Huginn (2502.05171),
Parcae (2604.12946). The parts name their papers.
"""

import math
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if not hasattr(F, "grouped_mm"):
    raise ImportError(f"mythos.py needs torch 2.10 or newer; this is {torch.__version__}")

# ------------------------------------------------------------------------------------------------
# Config
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MythosConfig:
    """Every number of the architecture. The defaults build in a moment on a laptop.

    Raises ValueError at construction if a field, or a combination of fields, is impossible. A width
    that is None follows the rule in its comment; `derive_widths` computes it.
    """

    vocab_size: int = 256  # V; 256: bytes
    d_model: int = 128  # D, width of the residual stream
    max_seq_len: int = 1024  # the longest sequence accepted, in tokens
    embed_norm: bool = True  # the embedding (std 0.02) is otherwise too small beside the blocks

    # The three stages. With recurrent_layers = 0 there is no loop: a plain transformer.
    prelude_layers: int = 1  # blocks run once, before the loop
    recurrent_layers: int = 1  # blocks inside the loop, run n_loops times
    coda_layers: int = 1  # blocks run once, after the loop
    max_loop_iters: int = 8  # the default L, not a limit: a call may ask for more
    spectral_radius_target: float | None = 0.95  # < 1; rho(A) stays below it; None: A is free

    # Attention. head_dim is the width of a query head; MLA adds head_dim / 2 numbers for RoPE.
    attention_type: str = "mla"  # "mla" or "gqa"
    n_heads: int = 4  # H
    head_dim: int | None = None  # C; None: d_model / n_heads
    n_kv_heads: int | None = None  # G, GQA only; None: n_heads / 4 if whole, else n_heads
    kv_lora_rank: int | None = None  # Z, MLA only; None: 4·head_dim, as in DeepSeek-V2
    q_lora_rank: int | None = None  # MLA only; None: queries are not compressed
    rope_theta: float = 10_000.0  # base of RoPE's angles: larger means slower rotation

    # Feed-forward: dense SwiGLU in prelude and coda, experts in the loop (num_experts = 0: dense).
    d_ff: int | None = None  # hidden width; None: 8/3·d_model, rounded up to a multiple of 64
    num_experts: int = 8  # E, routed
    num_experts_per_token: int = 2  # K
    num_shared_experts: int = 1  # experts that every token uses, besides its K
    d_expert: int | None = None  # width; None: d_ff / (K + shared), rounded up to a multiple of 8

    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_config(self)  # check your own fields there; give numbers a bound in LEAST


def derive_widths(config: MythosConfig) -> SimpleNamespace:
    """All fields of a config, yours included, with the widths filled in where they are None.

    Also rope_dim, how many numbers of a head RoPE rotates (GQA: all C; MLA: C/2 besides the C), and
    row_width = W, how many numbers a token leaves in the cache in each layer, for later tokens. The
    config itself stays as it is: a width written into it would go stale when another field changes.
    """
    c, mla = SimpleNamespace(**vars(config)), config.attention_type == "mla"
    c.head_dim = c.head_dim or c.d_model // c.n_heads
    c.n_kv_heads = c.n_kv_heads or (c.n_heads // 4 if c.n_heads % 4 == 0 else c.n_heads)
    c.kv_lora_rank = c.kv_lora_rank or 4 * c.head_dim
    c.d_ff = c.d_ff or 64 * math.ceil(c.d_model * 8 / 3 / 64)
    experts_used = c.num_experts_per_token + c.num_shared_experts
    c.d_expert = c.d_expert or 8 * math.ceil(c.d_ff / experts_used / 8)
    c.rope_dim = c.head_dim // 2 if mla else c.head_dim
    # MLA leaves a latent and one rotated key, GQA a key and a value per key/value head.
    c.row_width = c.kv_lora_rank + c.rope_dim if mla else 2 * c.n_kv_heads * c.head_dim
    return c


# ------------------------------------------------------------------------------------------------
# What is new: the state update, and the model that loops
# ------------------------------------------------------------------------------------------------


class StateUpdate(nn.Module):
    """h_{t+1} = A·h_t + B·e + r, each (N, T, D), where r = R(h_t, e) is what the blocks returned.

    A and B are diagonal, D numbers each. A diagonal A cannot mix channels, but mixing channels is
    R's job. What it buys: the spectral radius, rho(A) = max|A_i|, costs nothing to know, and is
    bounded for every value of the parameter `a` (unless the target is None):

        A = target · (1 − 2^-8) · sigmoid(a)   hence rho(A) < target

    Rounding to bf16 can raise a number by up to 2^-8 of itself; the factor 1 − 2^-8 keeps A below
    the target even then.

    R reads a normalised input, so for given weights some r_max bounds |R|, however large h is, and
        |h_t| <= rho^t·|h_0| + (b_max + r_max) / (1 − rho),   b_max the largest |B·e|.
    A bounded h need not settle: that depends on the whole Jacobian A + dR/dh, whose spectral radius
    `loop_gain` measures.

    To lift it: `torch`, `nn`, `Tensor`, `expect`.
    """

    def __init__(self, d_model: int, spectral_radius_target: float | None = 0.95) -> None:
        super().__init__()
        self.spectral_radius_target = rho = spectral_radius_target
        expect(rho is None or 0 < rho < 1, "spectral_radius_target", rho, "in (0, 1), or None")
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


def relative_change(h_next: Tensor, h: Tensor) -> Tensor:
    """|h_{t+1} − h_t| / |h_{t+1}| of each token, fp32: (..., D) -> (...). From h_t = 0 it is 1; a
    state that stays at 0 has not moved: 0."""
    return (h_next.float() - h.float()).norm(dim=-1) / h_next.float().norm(dim=-1).clamp_min(1e-30)


def add_noise(h: Tensor, share: float) -> Tensor:
    """h (N, T, D) with noise of `share` times its own size; share 0: h itself."""
    if share == 0:
        return h
    return h + share * torch.randn_like(h) * h.detach().square().mean(-1, True).sqrt()


class RecurrentDepthTransformer(nn.Module):
    """Prelude once, recurrent blocks looped n_loops times, coda once (equations at the top).

    RecurrentDepthTransformer(config), RecurrentDepthTransformer(d_model=256, attention_type="gqa"),
    or both: keywords override fields of the config. `model.config` is the config in force.

    `model.compile()` traces one graph for each n_loops, and torch gives up after 8 of them. To
    train with many loop counts, compile the blocks, one graph: `for block in model.recurrent:
    block.compile()`.
    """

    def __init__(self, config: MythosConfig | None = None, **overrides) -> None:
        super().__init__()
        expect(isinstance(config, MythosConfig | None), "config", config, "a MythosConfig or None")
        self.config = c = replace(config or MythosConfig(), **overrides)
        self.widths = widths = derive_widths(c)
        D, eps, moe = c.d_model, c.norm_eps, c.num_experts > 0
        self.embed = nn.Embedding(c.vocab_size, D)
        norm = nn.RMSNorm(D, eps=eps, elementwise_affine=False)
        self.embed_norm = norm if c.embed_norm else nn.Identity()
        self.prelude = nn.ModuleList(make_block(widths) for _ in range(c.prelude_layers))
        self.input_norm = nn.RMSNorm(D, eps=eps)
        self.recurrent = nn.ModuleList(make_block(widths, moe) for _ in range(c.recurrent_layers))
        if c.recurrent_layers > 0:
            self.loop_norm = nn.RMSNorm(D, eps=eps)
            self.state_update = StateUpdate(D, c.spectral_radius_target)
        self.state_norm = nn.RMSNorm(D, eps=eps)
        self.coda = nn.ModuleList(make_block(widths) for _ in range(c.coda_layers))
        self.output_norm = nn.RMSNorm(D, eps=eps)
        self.head = nn.Linear(D, c.vocab_size, bias=False)
        self.init_weights()

    def forward(self, tokens: Tensor, targets: Tensor | None = None, *, n_loops: int | None = None,
                grad_loops: int | None = None, state_noise: float = 0.0,
                halt_threshold: float | None = None, cache: "Cache | None" = None,
                logits_to_keep: int = 0) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Token ids (N, T) -> logits (N, T, V) and, given targets (N, T), their mean cross-entropy.

        targets: the id wanted at each position (the caller shifts); −100 is not scored. When you
            accumulate gradients, weight each loss by its share of all scored targets.
        n_loops: None is config.max_loop_iters; more is allowed; 0: no loop, the coda reads e.
        grad_loops, state_noise: for training, see `run_loop`.
        halt_threshold: a token halts once its relative change is below; see `run_halting_loop`.
        cache: tokens continue the sequences that the cache holds. It must have been made and filled
            by this model, with the weights that it has now.
        logits_to_keep: logits of only so many last tokens (no targets); 0: of all tokens.
        Halting and caching are for inference: with either, nothing records a gradient.
        Raises ValueError naming the argument that is out of range.
        """
        keep = logits_to_keep
        # In a CUDA graph, where n_tokens is a tensor (see `Cache`), nothing can be checked.
        if not isinstance(getattr(cache, "n_tokens", 0), Tensor):
            n_loops = check_call(self, tokens, targets, cache, n_loops=n_loops, logits_to_keep=keep,
                                 grad_loops=grad_loops, state_noise=state_noise,
                                 halt_threshold=halt_threshold)  # fmt: skip
        expect(targets is None or not keep, "logits_to_keep", keep, "0 when there are targets")
        inference = cache is not None or halt_threshold is not None
        expect(not (inference and grad_loops), "grad_loops", grad_loops, "None when inferring")
        expect(not (inference and state_noise), "state_noise", state_noise, "0 when inferring")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not inference):
            e, rope = self.run_prelude(tokens, cache)
            if n_loops == 0:
                h = e
            elif halt_threshold is None:
                h = self.run_loop(e, rope, n_loops, cache, grad_loops, state_noise)
            else:
                h, _ = self.run_halting_loop(e, rope, n_loops, cache, halt_threshold)
            logits = self.run_coda(h, rope, cache, logits_to_keep)
        if cache is not None:
            cache.n_tokens += tokens.shape[1]
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().long())

    def run_prelude(self, tokens: Tensor, cache=None) -> tuple[Tensor, Tensor]:
        """e = input_norm(Prelude(embed_norm(embed(tokens)))), (N, T, D), and the tokens' `rope`."""
        past = 0 if cache is None else cache.n_tokens
        positions = past + torch.arange(tokens.shape[1], device=tokens.device)
        rope = rope_angles(positions, self.widths.rope_dim, self.config.rope_theta)
        x = self.run_blocks(self.prelude, self.embed_norm(self.embed(tokens)), rope, cache)
        return self.input_norm(x), rope

    def run_blocks(self, blocks, x: Tensor, rope: Tensor, cache=None, slot=0, halted=None):
        """x (N, T, D) through the blocks, whose rows go to the cache's slots from `slot` on."""
        for i, block in enumerate(blocks):
            # recall(rows) is cache.append(slot + i, halted, rows): it stores a layer's new rows and
            # returns the rows of all tokens so far, and which of them each new token may see.
            recall = None if cache is None else partial(cache.append, slot + i, halted)
            x = block(x, rope, recall)
        return x

    def initial_state(self, e: Tensor) -> Tensor:
        """h_0 = 0, (N, T, D)."""
        return torch.zeros_like(e)

    def step(self, h: Tensor, e: Tensor, rope: Tensor, t: int, cache=None, halted=None) -> Tensor:
        """Loop t: h_{t+1} = A·h_t + B·e + R(h_t, e), R = Blocks(loop_norm(h + e)), (N, T, D).

        t has no upper limit: a call may ask for more loops than training ever used. To carry a
        second value from loop to loop, keep it in the two functions below and pass it to `step`,
        with a default, since `loop_gain` calls only `step`. Detach it wherever `run_loop` detaches
        h.
        """
        slot = 0 if cache is None else cache.first_slot(t)
        r = self.run_blocks(self.recurrent, self.loop_norm(h + e), rope, cache, slot, halted)
        return self.state_update(h, e, r)

    def run_loop(self, e, rope, n_loops, cache=None, grad_loops=None, state_noise=0.0, states=None):
        """The loop: h_L, the state after the last loop, (N, T, D).

        The answer is the *last* state: a weighted sum over loops may tie the model to the depth
        that it was trained at. `states`, if given, collects h_1, h_2, … h_L. For training:

        state_noise: noise on each new state, as a share of its size. The next loop, or the coda,
            learns to put it right (noise in recurrent networks: Jim, Giles and Horne 1996).
        grad_loops: only the last grad_loops loops carry gradient (truncated backpropagation through
            time); None: all. The prelude still learns, through the e of those loops; a learned h_0
            would not.
        """
        h = self.initial_state(e)
        for t in range(n_loops):
            h = add_noise(self.step(h, e, rope, t, cache), state_noise)
            if grad_loops is not None and t < n_loops - grad_loops:
                h = h.detach()
            if states is not None:
                states.append(h)
        return h

    def run_halting_loop(self, e, rope, n_loops, cache, halt_threshold, states=None):
        """The loop in which tokens stop by themselves: h_L and the loops that each used, (N, T).

        A token halts after the first loop that leaves its state settled (`has_settled`). From then
        on its state stays fixed, and so do its rows in the cache. Of 4 loops, say, a token halts
        after loop 1:

            loop                          0        1        2        3
            its state after the loop      h_1      h_2      h_2      h_2
            its row in the loop's slot    row 0    row 1    row 1    row 1

        (Loop t makes row t from h_t.) A later token reads, in its loop 3, row 1 of this token,
        whether both came in one call or the later one is decoded a day later. Since no token looks
        at later ones, decoding token by token gives the answer of one pass (up to rounding, which
        may tip a token over the threshold: in tests, choose one between the measured changes).

        Halting saves work once *all* tokens of the call, in all N sequences, have halted. Until
        then a halted token is computed like the others, and the result is discarded.
        """
        # Needed within one call, too: later tokens read the rows that are kept.
        cache = cache or self.new_cache(*e.shape[:2], n_loops)
        h = self.initial_state(e)
        halted = torch.zeros(e.shape[:2], dtype=torch.bool, device=e.device)
        loops_used = torch.zeros_like(halted, dtype=torch.int64)
        for t in range(n_loops):
            old, h = h, torch.where(halted[..., None], h, self.step(h, e, rope, t, cache, halted))
            loops_used = loops_used + ~halted
            halted = halted | self.has_settled(h, old, halt_threshold)
            if states is not None:
                states.append(h)
            # all() waits for the GPU. A CUDA graph (see `Cache`) cannot, and runs all loops.
            if not isinstance(cache.n_tokens, Tensor) and halted.all():
                cache.fill_later_loops(t, e.shape[1])
                break
        return h, loops_used

    def has_settled(self, h_next: Tensor, h: Tensor, halt_threshold: float) -> Tensor:
        """The halting rule: which tokens (N, T) may halt with h_next, the state after this loop.

        With threshold 0 none may, not even one that stands perfectly still. Your own rule
        may use only this token's states. Those of earlier tokens are at hand in one pass, but gone
        or final when decoding, so the two would differ. A rule that needs more than two states, say
        three loops in a row, goes into `run_halting_loop`.
        """
        return relative_change(h_next, h) < halt_threshold  # nan, an exploded state: not settled

    def run_coda(self, h: Tensor, rope: Tensor, cache=None, logits_to_keep: int = 0) -> Tensor:
        """logits = head(output_norm(Coda(state_norm(h)))), (N, T, V)."""
        slot = 0 if cache is None else cache.first_slot(cache.n_loops)
        x = self.run_blocks(self.coda, self.state_norm(h), rope, cache, slot)
        return self.head(self.output_norm(x[:, -logits_to_keep:]))  # 0: x[:, 0:] is all

    def new_cache(self, batch_size: int, length: int, n_loops: int | None = None) -> "Cache":
        """An empty cache for `length` tokens at exactly `n_loops` loops.

        It is allocated when it gets its first rows: they decide its device and dtype.
        """
        check(batch_size=batch_size, length=length)
        c, n_loops = self.config, loops_of_call(self.config, n_loops)
        expect(length <= c.max_seq_len, "length", length, f"at most max_seq_len = {c.max_seq_len}")
        shape = (layer_applications(self, n_loops), batch_size, length, self.widths.row_width)
        return Cache(shape, n_loops, c.prelude_layers, c.recurrent_layers)

    @torch.no_grad()
    def generate(self, tokens: Tensor, max_new_tokens: int, *, temperature: float = 1.0,
                 top_k: int | None = None, top_p: float | None = None, n_loops: int | None = None,
                 halt_threshold: float | None = None, eos_token: int | None = None,
                 generator=None, cuda_graph: bool = False) -> Tensor:  # fmt: skip
        """Continue prompts (N, T), all of one length, by max_new_tokens sampled ids or fewer.

        No token is masked: padding would be read as part of the prompt, and change the answer. Call
        this once for each length.

        temperature, top_k, top_p: see `sample`. A sequence that has produced eos_token is padded
        with it; generation ends early when every one has. n_loops and halt_threshold are forward's.
        cuda_graph: record the decoding step once, then replay it for each token. This skips the
        overhead of Python, which dominates small batches. All loops are run, whatever halts. The
        result is that of eager decoding up to rounding. Not under autocast; on the current device;
        with experts only in bf16 on a Hopper or B200 (elsewhere F.grouped_mm waits for the GPU).
        The recording itself has not been tried on a GPU yet.
        Raises ValueError for arguments out of range, if prompt and new tokens exceed
        config.max_seq_len, and if weights or logits are not finite.
        """
        # On a CPU torch's attention gives 0 where all scores are nan: the logits would not tell.
        expect(all(p.isfinite().all() for p in self.parameters()), "weights", "inf, nan", "finite")
        how = dict(temperature=temperature, top_k=top_k, top_p=top_p)
        n_loops = check_call(self, tokens, n_loops=n_loops, halt_threshold=halt_threshold,
                             max_new_tokens=max_new_tokens, eos_token=eos_token, **how)  # fmt: skip
        (N, T), eos = tokens.shape, -1 if eos_token is None else eos_token  # no id is −1
        expect(eos < self.config.vocab_size, "eos_token", eos, "an id below vocab_size")
        expect(not cuda_graph or tokens.is_cuda, "cuda_graph", cuda_graph, "False without CUDA")
        cache, new = self.new_cache(N, T + max_new_tokens, n_loops), tokens
        call = dict(n_loops=n_loops, halt_threshold=halt_threshold, cache=cache, logits_to_keep=1)

        def decode(new: Tensor) -> Tensor:  # logits (N, V) of the next token
            return self(new, **call)[0][:, -1]

        done = torch.zeros(N, 1, dtype=torch.bool, device=tokens.device)
        with evaluation_mode(self):
            for i in range(max_new_tokens):
                if cuda_graph and i == 1:  # after the prompt, whose shape differs
                    cache.n_tokens = torch.tensor([T], device=tokens.device)
                    decode = torch.cuda.make_graphed_callables(decode, (new,), num_warmup_iters=1)
                    cache.n_tokens.fill_(T)  # as before the warm-up
                new = sample(decode(new), **how, generator=generator).to(tokens.dtype)
                new = new.masked_fill(done, eos)
                done, tokens = done | (new == eos), torch.cat([tokens, new], dim=1)
                if eos_token is not None and done.all():
                    break
        return tokens

    def update_router_bias(self, speed: float = 1e-3) -> Tensor:
        """Balance all experts (see MixtureOfExperts); returns the loads, (layers with experts, E).

        Call once after each optimizer step. A model without experts returns an empty tensor.
        """
        check(speed=speed)
        loads = [moe.update_router_bias(speed) for moe in expert_layers(self)]
        return torch.stack(loads) if loads else torch.empty(0)

    @torch.no_grad()
    def init_weights(self) -> None:
        """(Re)initialise everything; after `to_empty(device=...)` it makes a meta model a real one.

        embed, head           normal, std 0.02
        every other matrix    normal, std 0.8 / sqrt(inputs): measured to train well (toy)
        norms                 1
        A, B                  a = 0: A starts just below target / 2 (free: 0.475); b = 0.5
        router bias, load     0

        What you add: an nn.Linear is a matrix as above (its bias 0); any other module with
        parameters needs a reset_parameters, which runs after those of the modules inside it
        (nn.Embedding's has std 1). A parameter outside of such modules raises ValueError: a
        learned h_0, say, can go into StateUpdate. To tie head and embedding, override this method
        and tie them in it, or `to_empty` unties them.
        """
        reset_modules(self)
        self.embed.weight.normal_(std=0.02)
        self.head.weight.normal_(std=0.02)


# ------------------------------------------------------------------------------------------------
# What other transformers have, too: the block
# ------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + ffn(norm(x)), (N, T, D).

    To lift it: `nn`, `Tensor`; an attention, called as attention(x, rope, recall) like the two
    below, and a feed-forward, called as ffn(x). Each returns (N, T, D).
    """

    def __init__(self, d_model: int, attention: nn.Module, ffn: nn.Module, norm_eps: float = 1e-6):
        super().__init__()
        self.attention_norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.attention = attention
        self.ffn_norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.ffn = ffn

    def forward(self, x: Tensor, rope: Tensor, recall=None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, recall)
        return x + self.ffn(self.ffn_norm(x))


def make_block(c: SimpleNamespace, moe: bool = False) -> Block:
    """A block with the config's attention, and with experts or a dense SwiGLU.

    c: the config's fields, yours included, with the widths filled in by `derive_widths`. For
    another attention kernel give attend=… to both attentions. It is called like `causal_attention`;
    `absorbed` adds a scale. It must handle T = S, T = 1, any mask (after a cached past, or in a
    CUDA graph), and G < H (`absorbed`: G = 1). Values are as wide as keys.
    """
    common = dict(d_model=c.d_model, n_heads=c.n_heads, head_dim=c.head_dim)
    if c.attention_type == "mla":
        common |= dict(rope_dim=c.rope_dim, kv_lora_rank=c.kv_lora_rank, q_lora_rank=c.q_lora_rank)
        attention = MultiHeadLatentAttention(**common, norm_eps=c.norm_eps)
    else:
        attention = GroupedQueryAttention(**common, n_kv_heads=c.n_kv_heads)
    experts = c.num_experts, c.num_experts_per_token, c.num_shared_experts
    ffn = MixtureOfExperts(c.d_model, c.d_expert, *experts) if moe else SwiGLU(c.d_model, c.d_ff)
    return Block(c.d_model, attention, ffn, c.norm_eps)


# ------------------------------------------------------------------------------------------------
# Attention: rotary positions, then GQA and MLA with one interface
# ------------------------------------------------------------------------------------------------


def rope_angles(positions: Tensor, width: int, theta: float = 10_000.0) -> Tensor:
    """cos and sin of RoPE's rotation angles (arXiv 2104.09864), fp32, (2, T, width/2).

    Computed from integer positions (T,) on every call: a stored table would lose its precision in
    `.to(torch.bfloat16)` and its values in `to_empty`.
    """
    two_i = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32)
    # angle[position, i] = position · theta^(−2i / width)
    angles = positions.float()[:, None] * theta ** (-two_i / width)
    return torch.stack([angles.cos(), angles.sin()])


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + width/2}) of x (..., T, width) by its angle in `rope`.

    (RoFormer pairs neighbours; this pairing is GPT-NeoX's.)
    """
    cos, sin = rope
    x1, x2 = x.chunk(2, dim=-1)  # low-precision x meets fp32 cos: the product is fp32
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1).to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask=None, scale=None) -> Tensor:
    """softmax(scale·q·kᵀ)·v, (N, H, T, width of v), of T new tokens that look at S.

    q is (N, H, T, width); k and v (N, G, S, ..) may have fewer heads. mask (T, S): which keys each
    query sees; None: all up to its own, if T = S or T = 1. scale: None is 1 / sqrt(width).
    """
    (N, H, T, _), G, how = q.shape, k.shape[1], dict(attn_mask=mask, scale=scale)
    if T == 1:  # the H/G heads that share a key go as H/G queries of one head
        out = F.scaled_dot_product_attention(q.reshape(N, G, H // G, -1), k, v, **how)
        return out.reshape(N, H, 1, -1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=mask is None, enable_gqa=True, **how)


class GroupedQueryAttention(nn.Module):
    """Causal self-attention; H / G query heads share one key/value head (arXiv 2305.13245).

    forward: x (N, T, D), rope = `rope_angles(positions, head_dim)` for x's positions -> (N, T, D).
    A token's *row*, all that later tokens need of it, is its keys and values: W = 2·G·C numbers.
    recall(rows), given when there is a cache, stores the new rows, (N, T, W), and returns those of
    all tokens so far, (N, S, W), and a mask for `attend`.

    To lift it: `torch`, `nn`, `F`, `Tensor`, `rope_angles`, `apply_rope`, `causal_attention`.
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

    def forward(self, x: Tensor, rope: Tensor, recall=None) -> Tensor:
        (N, T, _), C, G = x.shape, self.head_dim, self.n_kv_heads
        q = self.q_proj(x).view(N, T, -1, C).transpose(1, 2)  # (N, H, T, C)
        k = self.k_proj(x).view(N, T, G, C).transpose(1, 2)  # (N, G, T, C)
        v = self.v_proj(x).view(N, T, G, C).transpose(1, 2)
        q, k, mask = apply_rope(q, rope), apply_rope(k, rope), None
        if recall is not None:
            rows, mask = recall(torch.cat([k, v], dim=1).transpose(1, 2).flatten(2))
            k, v = rows.view(N, -1, 2 * G, C).transpose(1, 2).chunk(2, dim=1)  # (N, G, S, C) each
        return self.out_proj(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))


def is_plain_linear(module: nn.Module) -> bool:
    """Whether module(x) is provably x @ module.weight.T, so that the weight may be used directly.

    Adapters and parametrizations change the module's type, quantisation may change the weight's;
    pruning and old weight norms work by hooks, and some libraries replace `forward`.
    """
    hooks = len(module._forward_pre_hooks) + len(module._forward_hooks)
    plain = type(module) is nn.Linear and module.bias is None and hooks == 0
    return plain and type(module.weight) is nn.Parameter and "forward" not in module.__dict__


class MultiHeadLatentAttention(nn.Module):
    """Causal self-attention that rebuilds keys and values from one small latent (DeepSeek-V2, arXiv
    2405.04434).

    forward as in GroupedQueryAttention, with rope = `rope_angles(positions, rope_dim)`. A row is a
    latent of Z numbers and *one* rotated key of rope_dim numbers for all heads: W = Z + rope_dim,
    however many heads.

    Each head's score has a part without positions, C wide, and a rotated part:
        score(i, j) = (q_i·k_j + q_rope_i·k_rope_j) / sqrt(C + rope_dim)
        k_j = U_k·latent_j,   v_j = U_v·latent_j                     kv_up_proj holds U_k and U_v
    (k_j is DeepSeek's k_nope.) RoPE rotates by an angle that depends on j. If it rotated k_j too,
    that rotation would stand between q and U_k, and `absorbed` below could not apply U_k to the
    query instead. Hence the separate rotated key.

    To lift it: `torch`, `nn`, `F`, `Tensor`, `rope_angles`, `apply_rope`, `causal_attention`,
    `is_plain_linear`.
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
            down = nn.Linear(d_model, q_lora_rank, bias=False)
            up = nn.Linear(q_lora_rank, q_width, bias=False)
            self.q_proj = nn.Sequential(down, nn.RMSNorm(q_lora_rank, eps=norm_eps), up)
        self.kv_down_proj = nn.Linear(d_model, kv_lora_rank + rope_dim, bias=False)
        self.kv_norm = nn.RMSNorm(kv_lora_rank, eps=norm_eps)
        self.kv_up_proj = nn.Linear(kv_lora_rank, n_heads * 2 * head_dim, bias=False)
        self.out_proj = nn.Linear(n_heads * head_dim, d_model, bias=False)

    def forward(self, x: Tensor, rope: Tensor, recall=None) -> Tensor:
        N, T, _ = x.shape
        q = self.q_proj(x).view(N, T, self.n_heads, -1).transpose(1, 2)  # (N, H, T, C + rope_dim)
        q, q_rope = q.split([self.head_dim, self.rope_dim], dim=-1)
        latent, k_rope = self.kv_down_proj(x).split([self.kv_lora_rank, self.rope_dim], dim=-1)
        q_rope, k_rope = apply_rope(q_rope, rope), apply_rope(k_rope, rope)
        rows = torch.cat([self.kv_norm(latent), k_rope], dim=-1)  # (N, T, W)
        rows, mask = (rows, None) if recall is None else recall(rows)  # (N, S, W)
        # Two ways to one result. One new token after a past: `absorbed` is far cheaper. Many new
        # tokens: `expanded`. `absorbed` never builds k and v, so anything nonlinear between
        # kv_up_proj and the score, such as QK-norm, rules it out: then always take `expanded`.
        absorb = T == 1 and rows.shape[1] > 1 and is_plain_linear(self.kv_up_proj)
        out = (self.absorbed if absorb else self.expanded)(q, q_rope, rows, mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def expanded(self, q: Tensor, q_rope: Tensor, rows: Tensor, mask=None) -> Tensor:
        """Rebuild each head's keys and values from all S rows, then attend: (N, H, T, C)."""
        latent, k_rope = rows.split([self.kv_lora_rank, self.rope_dim], dim=-1)
        kv = self.kv_up_proj(latent).unflatten(-1, (self.n_heads, -1))
        k, v = kv.transpose(1, 2).chunk(2, dim=-1)  # (N, H, S, C) each
        k_rope = k_rope[:, None].expand(-1, self.n_heads, -1, -1)  # the same key for every head
        q, k = torch.cat([q, q_rope], dim=-1), torch.cat([k, k_rope], dim=-1)
        v = F.pad(v, (0, self.rope_dim))  # the fast kernels want values as wide as keys
        return self.attend(q, k, v, mask)[..., : self.head_dim]

    def absorbed(self, q: Tensor, q_rope: Tensor, rows: Tensor, mask=None) -> Tensor:
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
        out = self.attend(q, rows, rows, mask, scale=(self.head_dim + self.rope_dim) ** -0.5)
        out = out[..., : self.kv_lora_rank]  # drop the last rope_dim columns: rotated keys
        return torch.einsum("nhtz,hcz->nhtc", out, U_v)


# ------------------------------------------------------------------------------------------------
# Feed-forward: SwiGLU, and a mixture of such experts
# ------------------------------------------------------------------------------------------------


class SwiGLU(nn.Module):
    """Gated feed-forward (arXiv 2002.05202): down(silu(gate(x)) ⊙ up(x)), (..., D) -> (..., D).

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
    """Shared experts for every token plus K of E routed ones (DeepSeekMoE, arXiv 2401.06066, and
    DeepSeek-V3, 2412.19437).

    forward: x (N, T, D) -> (N, T, D). F.grouped_mm wants d_model and d_expert to be multiples of 8,
    and refuses fp64.

        score   = sigmoid(x·W_router)                      of each expert, in (0, 1)
        chosen  = the K experts with the largest score + bias
        mix_i   = score_i / Σ_chosen score                 without the bias; K = 1: score_i itself
        out     = shared(x) + Σ_chosen mix_i · expert_i(x)

    The bias only steers *which* experts are chosen. It is not learned: `update_router_bias` raises
    it for experts that got too few tokens and lowers it for those that got too many. So the load
    evens out without an auxiliary loss, whose gradients would interfere (arXiv 2408.15664).

    To lift it: `torch`, `nn`, `F`, `Tensor`, `SwiGLU`, `grouped_mm` (which says what it needs).
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
        self.load_per_call = None  # `diagnostics` puts a list here, to see the load of each loop
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Stacks and buffers; router and shared experts initialise themselves."""
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
        """Tokens (N·T, D) -> the chosen experts and the shares in which they mix, both (N·T, K)."""
        score = self.router(x).float().sigmoid()  # (N·T, E)
        chosen = (score + self.router_bias).topk(self.num_experts_per_token).indices
        mix = score.gather(1, chosen)
        if self.num_experts_per_token > 1:  # K = 1: s/s = 1 would give the router no gradient
            mix = mix / (mix.sum(dim=-1, keepdim=True) + 1e-20)  # all scores may round to 0
        return chosen, mix.to(x.dtype)

    def dispatch(self, x: Tensor, chosen: Tensor, mix: Tensor) -> Tensor:
        """Σ_chosen mix_i · expert_i(x), (N·T, D), with two matrix products for all experts.

        Sorted by expert, the (token, expert) pairs of one expert lie next to each other;
        `grouped_mm` multiplies each such group with its expert's matrix.
        """
        E, K = self.router_bias.numel(), self.num_experts_per_token
        # Sorted pair j, of N·T·K: expert[j] is its expert, pair[j] its index before the sort.
        expert, pair = chosen.flatten().sort(stable=True)
        token = pair // K  # before the sort, the K pairs of a token follow each other
        # ends[i] counts the pairs whose expert is <= i: expert i owns those from ends[i−1] on.
        ids = torch.arange(E, device=x.device)
        ends = torch.searchsorted(expert, ids, right=True, out_int32=True)  # (E,)
        load = ends.diff(prepend=ends.new_zeros(1))
        if self.training:
            # `+=` would also assign self.load, which torch.compile refuses under checkpointing.
            self.load.add_(load)
        if self.load_per_call is not None:
            self.load_per_call.append(load)
        inputs = x.index_select(0, token)  # (pairs, D); x[token] has a slow backward
        gate, up = grouped_mm(inputs, self.gate_up_proj, ends).chunk(2, dim=-1)
        # down_proj is linear: scaling its input, only d_expert wide, equals scaling its output.
        hidden = F.silu(gate) * up * mix.flatten().index_select(0, pair)[:, None]
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
# Cache
# ------------------------------------------------------------------------------------------------


class Cache:
    """The rows of past tokens, allocated once. Create one with `model.new_cache`.

    Each layer application has a slot of its own, since a looped block sees a different state in
    each loop: first the prelude's layers, then those of loop 0, of loop 1, …, then the coda's.
    `rows` is (slots, N, length, W). `n_tokens` counts the tokens held; set it to 0 to start afresh,
    and when the model's weights have changed.

    A CUDA graph repeats one call with the same shapes, and may not wait for a tensor's value. For
    it, `generate` makes n_tokens a tensor, (1,), which the graph itself counts up. Then attention
    gets all `length` rows, with a mask that hides the empty ones; arguments are not checked.
    """

    def __init__(self, shape: tuple, n_loops: int, prelude_layers: int, recurrent_layers: int):
        self.shape, self.n_loops, self.n_tokens, self.rows = shape, n_loops, 0, None
        self.prelude_layers, self.recurrent_layers = prelude_layers, recurrent_layers

    def first_slot(self, t: int) -> int:
        """The slot of loop t's first layer; for t = n_loops, of the coda's first layer."""
        return self.prelude_layers + t * self.recurrent_layers

    def append(self, slot: int, halted: Tensor | None, rows: Tensor):
        """Put new rows (N, T, W) after the n_tokens already in a slot. Returns all, (N, S, W), in
        a CUDA graph (N, length, W), and `causal_attention`'s mask.

        Attention is given recall(rows): `run_blocks` fixes slot and halted. n_tokens stays; forward
        adds T to it after all layers have run. halted (N, T): these tokens keep their row of the
        loop before, which lies recurrent_layers slots earlier. None: no token has halted; keep
        every row, as in prelude and coda.
        """
        if self.rows is None:  # only now: under FSDP or autocast, rows and weights differ in dtype
            self.rows = rows.new_zeros(self.shape)
        expect(self.rows.dtype == rows.dtype, "cache, dtype", self.rows.dtype, rows.dtype)
        T, n = rows.shape[1], self.n_tokens
        new = n + torch.arange(T, device=n.device) if isinstance(n, Tensor) else slice(n, n + T)
        if halted is not None:
            # In loop 0 this is an unrelated slot; no token has halted, so nothing of it is used.
            before = self.rows[slot - self.recurrent_layers][:, new]
            rows = torch.where(halted[..., None], before, rows)
        self.rows[slot][:, new] = rows
        if isinstance(n, Tensor):
            return self.rows[slot], torch.arange(self.shape[2], device=n.device) <= new[:, None]
        mask = rows.new_ones(T, n + T, dtype=torch.bool).tril(n) if n > 0 and T > 1 else None
        return self.rows[slot][:, : n + T], mask

    def fill_later_loops(self, t: int, n_new: int) -> None:
        """All n_new tokens have halted by the end of loop t: repeat their rows in the slots of the
        loops that are not run. A later token may run those, and will read them."""
        new = slice(self.n_tokens, self.n_tokens + n_new)
        for slot in range(self.first_slot(t + 1), self.first_slot(self.n_loops)):
            self.rows[slot][:, new] = self.rows[slot - self.recurrent_layers][:, new]


# ================================================================================================
# END OF THE MODEL. Below: helpers, looking inside, counting, named sizes, checks of arguments.
# ================================================================================================


# ------------------------------------------------------------------------------------------------
# Helpers: sampling, modes, a matrix product per expert
# ------------------------------------------------------------------------------------------------


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None,
           top_p: float | None = None, generator=None) -> Tensor:  # fmt: skip
    """One id per sequence, (N, 1), from logits (N, V).

    temperature 0 takes the likeliest id. top_k keeps the k likeliest; top_p the fewest ids whose
    probabilities reach p (nucleus sampling, arXiv 1904.09751).
    """
    check(temperature=temperature, top_k=top_k, top_p=top_p)
    expect(top_p is None or top_p <= 1, "top_p", top_p, "at most 1")
    # Otherwise the weights or the state have overflowed. (−inf is allowed: an id ruled out.)
    expect(logits.amax(dim=-1).isfinite().all(), "logits", "inf or nan", "finite numbers")
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
        # Drop each id whose predecessors reach top_p without it.
        p = p.masked_fill(p.cumsum(dim=-1) - p >= max(top_p, 1e-30), 0.0)
    return ids.gather(1, p.multinomial(1, generator=generator))


def reset_modules(model: nn.Module) -> None:
    """The rules of `init_weights`, module by module: first the matrices, then all others.

    Of the others, the inner ones come first, so that the outer one has the last word.
    """
    pairs = [*model.named_modules()]
    matrices = [p for p in pairs if isinstance(p[1], nn.Linear | nn.Embedding | MixtureOfExperts)]
    others = [p for p in reversed(pairs) if p not in matrices]
    for name, module in matrices + others:
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=0.8 / module.in_features**0.5)
            if module.bias is not None:
                module.bias.zero_()
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()
        else:
            own = [key for key, _ in module.named_parameters(name, recurse=False)]
            expect(not own, "init_weights", own, "parameters in modules with reset_parameters")


@contextmanager
def temporarily(modules, name: str, value: object):
    """`with temporarily(modules, "training", False):` sets an attribute of each module; then each
    gets its own value back, even after an error."""
    with ExitStack() as at_exit:
        for module in modules:
            at_exit.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield


def evaluation_mode(model: nn.Module):
    """`with evaluation_mode(model):` runs as after eval(); then each module gets its mode back."""
    return temporarily(model.modules(), "training", False)


def expert_layers(module: nn.Module) -> list[MixtureOfExperts]:
    return [m for m in module.modules() if isinstance(m, MixtureOfExperts)]


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The pairs ends[i−1] up to ends[i] of x (pairs, in) times weight[i] (in, out): (pairs, out).

    F.grouped_mm with two additions. Autocast does not reach it, so x and weight get the dtype that
    autocast would choose. And torch.compile and the meta device support it only in bf16, so there
    `traceable_grouped_mm` replaces it. To compile a copied class, also copy that operator and
    the code after it, up to register_autograd.
    """
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    mm = traceable_grouped_mm if torch.compiler.is_compiling() or x.is_meta else F.grouped_mm
    return mm(x.to(dtype), weight.to(dtype), offs=ends)


@torch.library.custom_op("mythos::grouped_mm", mutates_args=())
def traceable_grouped_mm(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """F.grouped_mm as an operator whose shapes and gradient are written below.

    With two 2-D arguments it computes the gradient of the experts' weights: for each expert i,
    columns offs[i−1] up to offs[i] of x (in, pairs) times the same pairs of `weight`, which is then
    the output's gradient (pairs, out).
    """
    return F.grouped_mm(x, weight, offs=offs)


@traceable_grouped_mm.register_fake
def grouped_mm_shape(x, weight, offs):
    shape = (x.shape[0], weight.shape[-1])  # (pairs, out); a gradient: (in, out) for each expert
    return x.new_empty(shape if weight.dim() == 3 else (*offs.shape, *shape))


def grouped_mm_gradient(ctx, grad):
    (x, weight, offs), mm = ctx.saved_tensors, traceable_grouped_mm
    return mm(grad, weight.mT, offs), mm(x.mT, grad, offs), None


traceable_grouped_mm.register_autograd(
    grouped_mm_gradient, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


# ------------------------------------------------------------------------------------------------
# Looking inside
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def run_every_loop(model, tokens: Tensor, n_loops: int, halt_threshold: float | None = None):
    """e, the states [h_1, h_2, …] of one pass, the loops that each token used (N, T), and rope.

    `model.run_coda(h, rope)` makes logits of any of these states, or of e, as forward does with
    n_loops = 0. There are fewer than n_loops states if all tokens halt before.
    """
    states, loops_used = [], torch.full_like(tokens, n_loops, dtype=torch.int64)
    e, rope = model.run_prelude(tokens)
    if halt_threshold is None:
        model.run_loop(e, rope, n_loops, states=states)
    else:
        _, loops_used = model.run_halting_loop(e, rope, n_loops, None, halt_threshold, states)
    return e, states, loops_used, rope


def diagnostics(model, tokens: Tensor, *, n_loops=None, halt_threshold=None) -> dict[str, Tensor]:
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
    layers, loads = expert_layers(model.recurrent), []  # all layers append to this one list
    # Compiled blocks run uncompiled here: torch.compile would compile anew for each list length.
    with (evaluation_mode(model), temporarily(layers, "load_per_call", loads), torch.no_grad(),
          torch.compiler.set_stance("force_eager")):  # fmt: skip
        e, states, used, rope = run_every_loop(model, tokens, n_loops, halt_threshold)
        logits = torch.stack([model.run_coda(h, rope) for h in states])
    h, L = torch.stack([model.initial_state(e), *states]), len(states)  # (L + 1, N, T, D)
    load = torch.stack(loads).long().unflatten(0, (L, -1)) if loads else used.new_empty(L, 0, 0)
    return dict(state_norm=h[1:].float().norm(dim=-1), change=relative_change(h[1:], h[:-1]),
                logits=logits, expert_load=load, loops_used=used)  # fmt: skip


def spectral_radius(model: RecurrentDepthTransformer) -> float:
    """rho(A) = max|A_i|, since A is diagonal. Below 1 it bounds the state (see StateUpdate)."""
    expect(len(model.recurrent) > 0, "recurrent_layers", 0, "a model with a loop")
    return model.state_update.diagonal_A().abs().max().item()


def loop_gain(model, tokens: Tensor, *, n_loops=None, iterations=100, generator=None) -> float:
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
    expect(len(model.recurrent) > 0, "recurrent_layers", 0, "a model with a loop")
    with evaluation_mode(model), torch.inference_mode(False), torch.no_grad():
        e, rope = model.run_prelude(tokens)
        h = model.run_loop(e, rope, n_loops)
        # The gradient of compiled blocks can be taken once only.
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            h_next = model.step(h.requires_grad_(), e, rope, n_loops)
    v = torch.randn(h.shape, generator=generator, device=h.device).to(h.dtype)
    v, log_growth = v / v.norm(), []
    for _ in range(iterations):
        # fp32: bf16 would round the growth
        v = torch.autograd.grad(h_next, h, v, retain_graph=True)[0].float()
        log_growth.append(v.norm().log())
        v = (v / v.norm().clamp_min(1e-30)).to(h.dtype)  # J may be 0
    return torch.stack(log_growth[iterations // 2 :]).mean().exp().item()


# ------------------------------------------------------------------------------------------------
# Counting
# ------------------------------------------------------------------------------------------------


def num_params(module: nn.Module, *, active: bool = False) -> int:
    """Parameters and router biases. active: with K instead of E routed experts, that is, what one
    token uses (the embedding table counted whole, as is customary)."""
    total = sum(p.numel() for p in module.parameters())
    for moe in expert_layers(module):
        E, K = moe.router_bias.numel(), moe.num_experts_per_token
        idle = E - K if active else 0
        total += E - idle * (moe.gate_up_proj[0].numel() + moe.down_proj[0].numel())
    return total


def loops_of_call(c: MythosConfig, n_loops: int | None) -> int:
    """None becomes the default; a model without recurrent layers has no loop and takes none."""
    check(n_loops=n_loops)
    expect(c.recurrent_layers > 0 or not n_loops, "n_loops", n_loops, "0: recurrent_layers is 0")
    default = c.max_loop_iters if c.recurrent_layers > 0 else 0
    return default if n_loops is None else n_loops


def executed_params(model: RecurrentDepthTransformer, n_loops: int | None = None) -> int:
    """Active parameters, those of the loop counted n_loops times."""
    parts = (model.recurrent, model.loop_norm, model.state_update) if model.recurrent else ()
    loop = sum(num_params(part, active=True) for part in parts)
    # The first loop is counted already.
    return num_params(model, active=True) + (loops_of_call(model.config, n_loops) - 1) * loop


def layer_applications(model: RecurrentDepthTransformer, n_loops: int | None = None) -> int:
    """Layers that a token passes, those of the loop counted n_loops times."""
    c = model.config
    return c.prelude_layers + loops_of_call(c, n_loops) * c.recurrent_layers + c.coda_layers


def flops_per_token(model, n_loops: int | None = None, context: int = 0) -> int:
    """Forward FLOPs for one token: 2 per executed parameter, and attention to `context` keys.

    The embedding is a lookup and costs nothing. Training costs three times as much (forward, and a
    backward of twice the forward). In causal attention over T tokens the mean context is T / 2.
    """
    check(context=context)
    tied = model.head.weight is model.embed.weight  # then the one matrix is the head's product
    multiplied = executed_params(model, n_loops) - (0 if tied else model.embed.weight.numel())
    # For one head and key: a score and a value, C wide each. MLA scores its rotated part, too.
    rotated = model.widths.rope_dim if model.config.attention_type == "mla" else 0
    per_key = model.config.n_heads * (2 * model.widths.head_dim + rotated)
    return 2 * multiplied + 2 * layer_applications(model, n_loops) * per_key * context


def kv_bytes_per_token(model, n_loops: int | None = None, bytes_per_number: int = 2) -> int:
    """Cache bytes for one token: row width × layer applications × bytes (2: bf16)."""
    check(bytes_per_number=bytes_per_number)
    return model.widths.row_width * layer_applications(model, n_loops) * bytes_per_number


# ------------------------------------------------------------------------------------------------
# Sizes
# ------------------------------------------------------------------------------------------------

# Heads of 128 and a latent of 512 as in DeepSeek-V2/V3, one shared expert as in V3. Loops, experts
# and context grow with size. d_expert is chosen so that the total, vocabulary included, matches the
# name; if you change the architecture, choose it anew. rope_theta keeps its default: raise it when
# training at these lengths.
SMALL = dict(prelude_layers=2, coda_layers=2, n_kv_heads=8, kv_lora_rank=512, head_dim=128)
LARGE = SMALL | dict(prelude_layers=3, coda_layers=3, q_lora_rank=1536)
HUGE = LARGE | dict(prelude_layers=4, coda_layers=4)
COLUMNS = """d_model n_heads recurrent_layers max_loop_iters num_experts num_experts_per_token
    d_expert vocab_size max_seq_len""".split()
ROWS = {
    "1B":   (SMALL, 1536, 16,  4,  8,  32, 4, 1040,  65_536,   4_096),
    "3B":   (SMALL, 2048, 16,  6,  8,  64, 4, 1024,  65_536,   8_192),
    "7B":   (SMALL, 2560, 24,  8, 12,  64, 6, 1456, 131_072,   8_192),
    "10B":  (SMALL, 3072, 24,  8, 12,  64, 6, 1784, 131_072,  16_384),
    "50B":  (LARGE, 4096, 32, 12, 16, 128, 6, 2496, 131_072,  32_768),
    "70B":  (LARGE, 5120, 40, 14, 16, 128, 8, 2384, 131_072,  32_768),
    "100B": (LARGE, 5120, 40, 16, 20, 160, 8, 2432, 131_072,  65_536),
    "500B": (HUGE,  7168, 56, 24, 24, 256, 8, 3712, 131_072, 131_072),
    "1T":   (HUGE,  8192, 64, 32, 32, 256, 8, 4896, 131_072, 262_144),
}  # fmt: skip
# The toy of train_tiny.py: 20 nodes, 20² edges. No embed_norm: there the prelude starts as the
# identity (`Chains.prepare`), so it cannot drown the embedding.
TINY = dict(d_model=128, n_heads=4, max_loop_iters=12, d_expert=64, max_seq_len=64, vocab_size=420,
            n_kv_heads=2, kv_lora_rank=64, embed_norm=False)  # fmt: skip
SIZES = {"tiny": TINY}
SIZES |= {size: more | dict(zip(COLUMNS, row, strict=True)) for size, (more, *row) in ROWS.items()}


def get_model_config(name: str) -> MythosConfig:
    """The config of a named size, "1B" to "1T", or of "tiny", the toy of train_tiny.py.

    The total parameter count is within 1% of the name. Case does not matter; an unknown name
    raises ValueError with the known ones. Change a field with `dataclasses.replace`, or in
    `RecurrentDepthTransformer(config, attention_type="gqa")`.
    """
    fields = {size.lower(): SIZES[size] for size in SIZES}.get(str(name).lower())
    expect(fields is not None, "name", name, f"one of {[*SIZES]}")
    return MythosConfig(**fields)


def print_sizes() -> None:
    """Mythos sizes. layers: prelude + recurrent × max loops + coda.

    active: parameters that one token uses; executed: with the loop's counted L times.
    MLA, GQA: cache bytes per token at L loops in bf16. tokens: 20 per active parameter
    (Chinchilla), an extrapolation: laws of looped models were fitted below 1.3e20 FLOPs (Parcae).
    FLOPs: to train on them.
    """
    print(*(line.strip() for line in print_sizes.__doc__.splitlines()), sep="\n")
    line = "{:>5} {:>9} {:>9} {:>11}  {:<10} {:<11} {:>8} {:>10} {:>10} {:>7} {:>8}".format
    print(line(*"size total active executed layers experts context MLA GQA tokens FLOPs".split()))
    for name, kw in SIZES.items():
        with torch.device("meta"):  # shapes without memory
            mla, gqa = (RecurrentDepthTransformer(**kw, attention_type=a) for a in ("mla", "gqa"))
        c, total, active = mla.config, num_params(mla), num_params(mla, active=True)
        scale, unit = (1e6, "M") if name == "tiny" else (1e9, "B")
        counts = [f"{n / scale:.2f}{unit}" for n in (total, active, executed_params(mla))]
        layers = f"{c.prelude_layers}+{c.recurrent_layers}×{c.max_loop_iters}+{c.coda_layers}"
        experts = f"{c.num_experts_per_token}/{c.num_experts} + {c.num_shared_experts}"
        numbers = [f"{n:,}" for n in (c.max_seq_len, *map(kv_bytes_per_token, (mla, gqa)))]
        flops = f"{3 * flops_per_token(mla, context=c.max_seq_len // 2) * 20 * active:.1e}"
        print(line(name, *counts, layers, experts, *numbers, f"{20 * active / 1e9:.3g}B", flops))


# ------------------------------------------------------------------------------------------------
# Checks: bad input raises a ValueError that names the field, what it got and what it expected
# ------------------------------------------------------------------------------------------------

# The minimum of each number, in the config and in the calls. Numbers of the first table may also be
# None; those of the second need not be whole.
# fmt: off
OR_NONE = dict(n_loops=0, eos_token=0, halt_threshold=0, top_p=0, spectral_radius_target=0, d_ff=1,
    head_dim=1, n_kv_heads=1, kv_lora_rank=1, q_lora_rank=1, d_expert=1, grad_loops=1, top_k=1)
FRACTIONS = dict(halt_threshold=0, top_p=0, spectral_radius_target=0, norm_eps=0, rope_theta=1,
    state_noise=0, temperature=0, speed=0)
LEAST = OR_NONE | FRACTIONS | dict(vocab_size=1, d_model=1, max_seq_len=1, prelude_layers=0,
    recurrent_layers=0, coda_layers=0, max_loop_iters=0, n_heads=1, num_experts=0,
    num_experts_per_token=1, num_shared_experts=0, logits_to_keep=0, max_new_tokens=0, context=0,
    batch_size=1, length=1, iterations=1, bytes_per_number=1)
# fmt: on


def expect(ok: bool, field: str, got: object, expected: object) -> None:
    if not ok:  # only now: once formatted, a length becomes a constant to torch.compile
        raise ValueError(f"{field}: got {got!r}, expected {expected}")


def check(**numbers: object) -> None:
    """Each number against the tables above. Other names are ignored: a subclass checks its own."""
    for name, got in numbers.items():
        if name in LEAST and not (got is None and name in OR_NONE):
            # Exactly these types: a bool is no number, and a checkpoint cannot hold NumPy's.
            ok = type(got) is int or (type(got) is float and name in FRACTIONS)
            words = "a finite number" if name in FRACTIONS else "an integer"
            expect(ok and LEAST[name] <= got < 1e38, name, got, f"{words} >= {LEAST[name]}")


def check_config(c: MythosConfig) -> None:
    check(**vars(c))
    kind, rho, D, H = c.attention_type, c.spectral_radius_target, c.d_model, c.n_heads
    expect(type(kind) is str and kind in ("mla", "gqa"), "attention_type", kind, "'mla' or 'gqa'")
    expect(type(c.embed_norm) is bool, "embed_norm", c.embed_norm, "True or False")
    expect(rho is None or 0 < rho < 1, "spectral_radius_target", rho, "a number in (0, 1) or None")
    expect(c.head_dim or D % H == 0, "n_heads", H, f"a divisor of d_model = {D}, or head_dim given")
    w, E, K, mla = derive_widths(c), c.num_experts, c.num_experts_per_token, kind == "mla"
    expect(w.head_dim % (4 if mla else 2) == 0, "head_dim", w.head_dim, "a multiple of 4 (GQA: 2)")
    expect(mla or H % w.n_kv_heads == 0, "n_kv_heads", w.n_kv_heads, f"a divisor of n_heads = {H}")
    expect(E == 0 or K <= E, "num_experts_per_token", K, f"at most num_experts = {E}")
    # F.grouped_mm wants rows of whole 16 bytes: 8 numbers in bf16.
    expect(E == 0 or D % 8 == 0, "d_model", D, "a multiple of 8 for grouped_mm")
    expect(E == 0 or w.d_expert % 8 == 0, "d_expert", w.d_expert, "a multiple of 8 for grouped_mm")


def check_call(model, tokens, targets=None, cache=None, *, n_loops, **numbers) -> int:
    """The arguments of forward and of all that calls it; returns the number of loops."""
    check(**numbers)
    check_ids(model, "tokens", tokens, tokens)
    if targets is not None:
        check_ids(model, "targets", targets, tokens)
    L, S, most = loops_of_call(model.config, n_loops), tokens.shape[1], model.config.max_seq_len
    if cache is not None:
        expect(isinstance(cache, Cache), "cache", cache, "one from new_cache, or None")
        S, most = S + cache.n_tokens, cache.shape[2]
        both = cache, model.new_cache(len(tokens), most, L)  # a fresh one, to compare
        got, wanted = ((x.n_loops, x.prelude_layers, x.recurrent_layers, x.shape) for x in both)
        expect(got == wanted, "cache, (loops, prelude, recurrent, shape)", got, wanted)
    expect(S <= most, "tokens", S, f"at most {most}, those in the cache included")
    return L


def check_ids(model: RecurrentDepthTransformer, name: str, ids: Tensor, tokens: Tensor) -> None:
    device, V = model.head.weight.device, model.config.vocab_size
    ok = isinstance(ids, Tensor) and ids.dtype in (torch.int32, torch.int64) and ids.dim() == 2
    ok = ok and ids.device == device and ids.numel() > 0 and ids.shape == tokens.shape
    expect(ok, name, ids, f"(N, T) int64 or int32 on {device}, not empty, shaped like tokens")
    if not (torch.compiler.is_compiling() or ids.is_meta):  # there are values to look at
        scored = ids[ids != -100] if name == "targets" else ids
        ok = scored.numel() > 0 and scored.min() >= 0 and scored.max() < V
        expect(ok, f"{name}, ids", scored, f"at least one, all within 0 … {V - 1}")


if __name__ == "__main__":
    print_sizes()
