# SPDX-License-Identifier: MIT
"""How fast is Mythos on this machine, and how close to what the machine can do?

    python -m experiments.bench                                          2 minutes on 2 cores
    python -m experiments.bench --checkpoint runs/chains-mla-seed0.pt    and halting, on that toy
    python -m experiments.bench --compile                                and torch.compile: minutes
    python -m experiments.bench --report                                 SPEED.md from the JSON

Beside it, in the same run, two other packages if they are installed (neither is needed):
    pip install --no-deps open-mythos==0.5.0       pip install transformers
Programs that are compared take turns, round by round, and the ratio of the medians is shown: on a
busy machine a ratio means more than a rate. Each row goes to the screen and at once to a JSON file:
an interrupted run keeps what it measured. SPEED.md has them as tables; with --results it lies
beside that JSON. For a GPU: experiments/gpu.py.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import textwrap
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mythos
from mythos import MixtureOfExperts, MythosConfig, RecurrentDepthTransformer, expect
from train_tiny import Chains, load_model, write_atomically

HERE = Path(__file__).resolve().parent
RESULTS, SPEED = HERE / "results" / "bench.json", HERE / "SPEED.md"
RESULTS_GPU = RESULTS.with_name("gpu.json")  # of experiments/gpu.py

# The shapes at which OpenMythos was measured: 1 + 1×8 + 1 layers, 8 × 256 tokens.
SHAPE = MythosConfig(
    vocab_size=1024, d_model=256, max_seq_len=2048, n_heads=8, kv_lora_rank=64, q_lora_rank=64,
    d_ff=344, max_loop_iters=8, num_experts=8, num_experts_per_token=2, d_expert=128,
)  # fmt: skip
MANY_EXPERTS = dict(num_experts=64, num_experts_per_token=4, d_expert=64)
PLAIN = dict(attention_type="gqa", n_kv_heads=8, num_experts=0)  # what a Llama has, looped
BATCH, LENGTH, DECODE_BATCH = 8, 256, 3
CONTEXTS = (64, 256, 768, 1024)
LOOPS = (1, 2, 4, 8, 16)
ROUNDS = 5
PRODUCT = 2048
TOKENS = 4  # decoded in one call
SEQUENCES = 25  # of the toy's test, for halting


# ------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------


def seconds(*calls: Callable[[], object], rounds: int | None = None) -> list[float]:
    """The median time of each call. They take turns, so a slow minute hits all of them alike."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()  # the first call allocates and initialises
    for _ in range(rounds or ROUNDS):
        for call, kept in zip(calls, times, strict=True):
            synchronize()
            started = time.perf_counter()
            call()
            synchronize()
            kept.append(time.perf_counter() - started)
    return [statistics.median(kept) for kept in times]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def precision(weight: Tensor):
    """For fp32 weights on a GPU, bf16 where autocast puts it, as in train_tiny.py; else nothing."""
    on = weight.is_cuda and weight.dtype == torch.float32
    return torch.autocast(weight.device.type, torch.bfloat16, enabled=on)


def products(device: torch.device, config: MythosConfig) -> tuple[Callable[[], object], int]:
    """Bare matrix products at the shapes of one looped block's weights, a yardstick for training: a
    call that does them, and its FLOPs."""
    model = RecurrentDepthTransformer(config)
    n, shapes = BATCH * LENGTH, []
    for p in model.recurrent[0].parameters():  # norms, of one dimension, multiply nothing
        if p.dim() == 2:
            shapes.append((n, p.shape[1], p.shape[0]))  # a Linear, (out, in)
        elif p.dim() == 3:  # each expert gets its share of the tokens
            rows = n * config.num_experts_per_token // config.num_experts
            shapes += [(rows, *p.shape[1:])] * config.num_experts
    pairs = [(normal(device, m, k), normal(device, k, n)) for m, k, n in shapes]
    return lambda: [a @ b for a, b in pairs], sum(2 * m * k * n for m, k, n in shapes)


def normal(device: torch.device, *shape: int) -> Tensor:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.randn(shape, device=device).to(dtype)


def train_step(model: torch.nn.Module, tokens: Tensor, loss: Callable) -> None:
    """Forward and backward, no optimizer."""
    model.zero_grad()
    with precision(next(model.parameters())):
        value = loss(model, tokens)
    value.backward()


def our_loss(model: RecurrentDepthTransformer, tokens: Tensor) -> Tensor:
    return model(tokens, tokens)[1]


def their_loss(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Of a model that returns logits, or (transformers) an object that has them."""
    out = model(tokens)
    return F.cross_entropy(getattr(out, "logits", out).flatten(0, 1).float(), tokens.flatten())


def decoder(model: RecurrentDepthTransformer, context: int) -> Callable[[], None]:
    """A call that decodes TOKENS tokens with `context` cached ones; it can be repeated."""
    device = model.head.weight.device
    cache = model.new_cache(DECODE_BATCH, context + TOKENS)
    prompt = torch.randint(model.config.vocab_size, (DECODE_BATCH, context), device=device)

    def decode(tokens: Tensor) -> None:
        with precision(model.head.weight):
            model(tokens, cache=cache)

    decode(prompt)

    def call() -> None:
        cache.n_tokens = context  # forget the tokens of the call before
        for _ in range(TOKENS):
            decode(prompt[:, :1])

    return call


def loop_over_experts(moe: MixtureOfExperts, x: Tensor) -> Tensor:
    """MixtureOfExperts.dispatch and route, one expert after the other; x (n, D) -> (n, D).

    unbind, since the backward of gate_up_proj[i] would fill a gradient as large as all experts.
    """
    chosen, mix = moe.route(x)
    out = torch.zeros_like(x)
    experts = zip(moe.gate_up_proj.unbind(0), moe.down_proj.unbind(0), strict=True)
    for i, (gate_up, down) in enumerate(experts):
        token, k = (chosen == i).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up).chunk(2, dim=-1)
        hidden = F.silu(gate) * up
        out = out.index_add(0, token, mix[token, k, None] * (hidden @ down))
    return out


def bytes_kept(model: RecurrentDepthTransformer, tokens: Tensor, grad_loops: int | None) -> int:
    """Bytes that autograd keeps for the backward pass, the weights themselves left out."""
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, []

    def note(x: Tensor) -> Tensor:
        x = x.detach()  # an object that only the graph holds
        kept.append(weakref.ref(x))
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        _, loss = model(tokens, tokens, grad_loops=grad_loops)
    assert loss is not None  # alive until here, and so is its graph
    storages = [x.untyped_storage() for x in (ref() for ref in kept) if x is not None]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(size for place, size in sizes.items() if place not in weights)


# ------------------------------------------------------------------------------------------------
# Other packages
# ------------------------------------------------------------------------------------------------


def open_mythos(config: MythosConfig, device: torch.device):
    """OpenMythos 0.5.0 at our shapes, or None. Its early exit is off: all loops run, as in ours."""
    if None in map(importlib.util.find_spec, ("open_mythos", "transformers")):  # it needs both
        return None
    package = importlib.import_module("open_mythos.main")

    c, w = config, mythos.derive_widths(config)
    theirs = package.MythosConfig(
        vocab_size=c.vocab_size, dim=c.d_model, n_heads=c.n_heads, max_seq_len=c.max_seq_len,
        max_loop_iters=c.max_loop_iters, prelude_layers=1, coda_layers=1, kv_lora_rank=64,
        q_lora_rank=c.q_lora_rank, qk_rope_head_dim=w.rope_dim, qk_nope_head_dim=w.head_dim,
        v_head_dim=w.head_dim, n_experts=c.num_experts, n_shared_experts=c.num_shared_experts,
        n_experts_per_tok=c.num_experts_per_token, expert_dim=w.d_expert, dropout=0.0,
        act_threshold=1e9,
    )  # fmt: skip
    return package.OpenMythos(theirs).to(device)


def their_decoder(model, context: int, vocab_size: int) -> Callable[[], None]:
    """`decoder` for OpenMythos, whose cache is a dict that grows."""
    device = next(model.parameters()).device
    prompt = torch.randint(vocab_size, (DECODE_BATCH, context), device=device)
    full: dict = {}
    model(prompt, kv_cache=full)

    def call() -> None:
        cache = {key: dict(value) for key, value in full.items()}
        for i in range(TOKENS):
            model(prompt[:, :1], kv_cache=cache, start_pos=context + i)

    return call


def llama_width(flops: int, layers: int, c: MythosConfig, length: int) -> int:
    """The intermediate_size with which a Llama of so many layers costs `flops` per token."""
    D, per_layer = c.d_model, (flops - 2 * c.d_model * c.vocab_size) / layers
    attention = 2 * 4 * D * D + 2 * 2 * D * (length // 2)  # q, k, v, out; scores and values
    return round((per_layer - attention) / (2 * 3 * D) / 8) * 8


def llama(flops: int, c: MythosConfig, device: torch.device, length: int = LENGTH):
    """A plain Llama from `transformers` with the same FLOPs per token, or None."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = c.prelude_layers + c.max_loop_iters * c.recurrent_layers + c.coda_layers
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_heads, num_hidden_layers=layers,
        intermediate_size=llama_width(flops, layers, c, length), use_cache=False,
        max_position_embeddings=c.max_seq_len,
    )  # fmt: skip
    with device:
        return LlamaForCausalLM(config)


# ------------------------------------------------------------------------------------------------
# The rows, (what, value), that each part yields; and the report
# ------------------------------------------------------------------------------------------------

Rows = Iterator[tuple[str, str]]


def training(device: torch.device) -> Rows:
    """Tokens/s, FLOP/s and share of the limit; beside the other packages where installed."""
    a, b = normal(device, 2, PRODUCT, PRODUCT)
    (took,) = seconds(lambda: a @ b)
    yield f"a matrix product of {PRODUCT}³", rate(2 * PRODUCT**3 / took)
    tokens = torch.randint(SHAPE.vocab_size, (BATCH, LENGTH), device=device)
    for options in ({}, MANY_EXPERTS, PLAIN):
        config, others = replace(SHAPE, **options), {}
        model = RecurrentDepthTransformer(config).to(device).train()
        flops = mythos.flops_per_token(model, context=LENGTH // 2)
        name = f"{config.num_experts} experts" if config.num_experts else "no experts, no MLA"
        if options is not MANY_EXPERTS:
            others["a Llama of equal FLOPs (transformers)"] = llama(flops, config, device)
        if options is not PLAIN:
            others["OpenMythos 0.5.0"] = open_mythos(config, device)
        others = {who: other.train() for who, other in others.items() if other is not None}
        bare, bare_flops = products(device, config)
        calls = [bare, partial(train_step, model, tokens, our_loss)]
        calls += [partial(train_step, other, tokens, their_loss) for other in others.values()]
        took, ours, *theirs = seconds(*calls)
        limit, speed = bare_flops / took, 3 * flops * tokens.numel() / ours
        yield f"bare matrix products at the block's shapes, {name}", rate(limit)
        yield f"training, {name}", f"{tokens.numel() / ours:,.0f} tokens/s"
        yield "  its FLOPs", f"{rate(speed)}, {speed / limit:.0%} of the products' rate"
        for who, other in zip(others, theirs, strict=True):
            yield f"  {who}", beside(tokens.numel() / other, other / ours, "tokens")


def beside(theirs: float, ratio: float, what: str) -> str:
    return f"{theirs:,.0f} {what}/s: ours is {ratio:.2f} times as fast"


def rate(flops: float) -> str:
    return f"{flops / 1e9:,.0f} GFLOP/s" if flops < 1e13 else f"{flops / 1e12:,.0f} TFLOP/s"


def where_time_goes(device: torch.device) -> Rows:
    """What the CPU does in a training step."""
    model = RecurrentDepthTransformer(SHAPE).to(device)
    tokens = torch.randint(SHAPE.vocab_size, (BATCH, LENGTH), device=device)
    step = partial(train_step, model, tokens, our_loss)
    step()
    kinds = {"matrix products": 0.0, "attention kernel": 0.0, "all else": 0.0}
    for event in operators(step):
        product = event.key in ("aten::mm", "aten::bmm", "aten::addmm", "aten::_grouped_mm")
        kind = "matrix products" if product else "all else"
        kind = "attention kernel" if "scaled_dot_product" in event.key else kind
        kinds[kind] += event.self_cpu_time_total
    total = sum(kinds.values())
    shares = ", ".join(f"{kind} {t / total:.0%}" for kind, t in kinds.items())
    yield "where a training step's CPU time goes, 8 experts", shares


def operators(call: Callable[[], object]):
    """The operators that a call runs, by name. What the profiler says on stderr is dropped."""
    stderr = os.dup(2)  # it speaks from C++: no setting of Python's reaches it
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            call()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
    return seen.key_averages()


@torch.no_grad()
def forward_by_loops(device: torch.device) -> Rows:
    """Forward time should be a straight line in the loops: least squares, worst residual."""
    model = RecurrentDepthTransformer(SHAPE).to(device).eval()
    tokens = torch.randint(SHAPE.vocab_size, (2, LENGTH), device=device)
    ms = [1e3 * took for took in seconds(*[partial(model, tokens, n_loops=L) for L in LOOPS])]
    measured = ", ".join(f"{t:.0f}" for t in ms)
    yield f"forward of 2 × {LENGTH} tokens at {', '.join(map(str, LOOPS))} loops", f"{measured} ms"
    slope, start = statistics.linear_regression(LOOPS, ms)
    worst = max(abs(start + slope * L - t) / t for L, t in zip(LOOPS, ms, strict=True))
    line = f"{start:.1f} + {slope:.1f}·loops ms, at most {worst:.0%} off"
    yield "  a straight line through them", line


@torch.no_grad()
def decoding(device: torch.device) -> Rows:
    """Steps/s (one new token for each of the sequences) with a cache, by context and by experts."""
    mla = RecurrentDepthTransformer(SHAPE).to(device).eval()
    gqa = RecurrentDepthTransformer(SHAPE, attention_type="gqa").to(device).eval()
    many = RecurrentDepthTransformer(SHAPE, **MANY_EXPERTS).to(device).eval()
    MLA = mythos.MultiHeadLatentAttention
    expanded = mock.patch.object(MLA, "absorbed", MLA.expanded)
    for context in CONTEXTS:
        absorbed = decoder(mla, context)
        times = seconds(absorbed, expanded(absorbed), decoder(gqa, context))
        a, e, g = (f"{TOKENS / t:.0f}" for t in times)
        what = f"decoding, {context} tokens cached, steps/s"
        yield what, f"MLA {a}, MLA expanded {e}, GQA {g}"
    for model in (mla, many):
        theirs = open_mythos(model.config, device)
        for context in (64, 768) if theirs is not None else ():
            other = their_decoder(theirs.eval(), context, SHAPE.vocab_size)
            mine, its = seconds(decoder(model, context), other)
            what = f"decoding, {model.config.num_experts} experts, {context} tokens cached"
            yield what, f"{TOKENS / mine:.0f} steps/s"
            yield "  OpenMythos 0.5.0", beside(TOKENS / its, its / mine, "steps")
    by_experts = [RecurrentDepthTransformer(many.config, num_experts=E) for E in (8, 64, 256)]
    times = seconds(*[decoder(m.to(device).eval(), 64) for m in by_experts])
    text = ", ".join(f"{TOKENS / t:.0f}" for t in times)
    yield "decoding, 4 of 8, 64, 256 experts of width 64, steps/s", text
    token = decoder(mla, CONTEXTS[0])
    calls = count_operators(token)
    with mock.patch.object(mythos, "grouped_mm", lambda x, w, _: x.new_empty(len(x), w.shape[-1])):
        inside = calls - count_operators(token)
    text = f"{calls // TOKENS:,}; {inside // TOKENS:,} of them within F.grouped_mm"
    yield "operators called to decode one token, 8 experts", text
    for model in (mla, many):
        shares = where(decoder(model, CONTEXTS[0])).items()
        text = ", ".join(f"{cause} {share:.0%}" for cause, share in shares)
        yield f"  where its time goes, {model.config.num_experts} experts", text


CAUSES = {
    "linear layers": (nn.Linear, "forward"), "norms": (nn.RMSNorm, "forward"),
    "experts' products": (mythos, "grouped_mm"), "routing": (MixtureOfExperts, "route"),
    "the rest of dispatch": (MixtureOfExperts, "dispatch"), "RoPE": (mythos, "apply_rope"),
    "the attention kernel": (F, "scaled_dot_product_attention"), "cache": (mythos.Cache, "append"),
    "einsum": (torch, "einsum"), "A·h + B·e + r": (mythos.StateUpdate, "forward"),
}  # fmt: skip


def where(call: Callable[[], object]) -> dict[str, float]:
    """Each cause's share of the time of a call, largest first. Nested time counts for the inner
    cause only, and what the clock itself takes for the outer one."""
    spent, inner = dict.fromkeys([*CAUSES, "all else"], 0.0), [0.0]

    def timed(cause: str, real: Callable) -> Callable:
        def run(*args, **kwargs):
            started = time.perf_counter()
            inner.append(0.0)
            out = real(*args, **kwargs)
            took = time.perf_counter() - started
            spent[cause] += took - inner.pop()
            inner[-1] += took
            return out

        return run

    call()
    with ExitStack() as patched:
        for cause, (owner, name) in CAUSES.items():
            new = timed(cause, getattr(owner, name))
            patched.enter_context(mock.patch.object(owner, name, new))
        for _ in range(4 * ROUNDS):
            timed("all else", call)()
    shares = {cause: took / sum(spent.values()) for cause, took in spent.items()}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def count_operators(call: Callable[[], object]) -> int:
    return sum(e.count for e in operators(call) if e.key.startswith("aten::"))


@torch.no_grad()
def halting(checkpoint: Path, device: torch.device) -> Rows:
    """One query after the other on the trained toy: 12 loops for all, against halting."""
    model, task = load_model(checkpoint).to(device), Chains()
    n, L, right = task.n_nodes, task.test_loops, {}
    tokens, ends, distance = task.test_set()
    tokens = tokens[:SEQUENCES].to(device)

    def ask(threshold: float | None) -> None:
        right[threshold] = []
        for i, sequence in enumerate(tokens.split(1)):
            cache = model.new_cache(1, 2 * n, L)
            model(sequence[:, :n], n_loops=L, halt_threshold=threshold, cache=cache)
            for q in range(n, 2 * n):
                query = sequence[:, q : q + 1]
                logits, _ = model(query, n_loops=L, halt_threshold=threshold, cache=cache)
                if distance[i, q - n] >= 0:
                    right[threshold].append(logits.argmax().item() == ends[i, q - n].item())

    thresholds = (0.5, task.halt_threshold)
    fixed, *halted = seconds(*[partial(ask, threshold) for threshold in (None, *thresholds)])
    for threshold, took in zip(thresholds, halted, strict=True):
        seen = mythos.diagnostics(model, tokens, n_loops=L, halt_threshold=threshold)
        loops = seen["loops_used"][:, n:].float().mean().item()
        halts, never = (statistics.fmean(right[key]) for key in (threshold, None))
        text = f"{fixed / took:.2f} times as fast as {L} loops for all; {loops:.1f} loops a query"
        text += f"; of {len(right[None])} answers {halts:.1%} right, without halting {never:.1%}"
        yield f"the toy's {n} queries one by one, halting below {threshold}", text


def experts(device: torch.device) -> Rows:
    """Forward and backward of the expert layer: grouped, and one expert after the other."""
    for E in (8, 64, 256):
        moe = MixtureOfExperts(SHAPE.d_model, 64, E, 4).to(device)
        x = torch.randn(1, BATCH * LENGTH, SHAPE.d_model, device=device)

        def run(layer: Callable, moe=moe) -> None:
            moe.zero_grad()
            layer().sum().backward()

        layers = partial(moe, x), partial(loop_over_experts, moe, x[0])
        grouped, loop = seconds(*[partial(run, layer) for layer in layers])
        text = f"{1e3 * grouped:.0f} ms, as a loop {1e3 * loop:.0f} ms"
        text += f": {loop / grouped:.1f} times as fast"
        yield f"4 of {E} experts of width 64, forward and backward", text
    eight, few, many = (normal(device, *shape) for shape in ((8, 64), (8, 64, 64), (256, 64, 64)))
    ends = torch.full((256,), 8, dtype=torch.int32, device=device)  # the first gets all 8 rows
    calls = [partial(F.grouped_mm, eight, w, offs=ends[: len(w)]) for w in (few, many)]
    short, long = seconds(*calls)
    yield "an expert that gets no token, per product", f"{1e6 * (long - short) / (256 - 8):.1f} µs"


def memory(device: torch.device) -> Rows:
    """What is kept for the backward pass; the cache as allocated; the largest model's shapes."""
    model = RecurrentDepthTransformer(SHAPE).to(device)
    tokens = torch.randint(SHAPE.vocab_size, (2, LENGTH), device=device)
    some = [*(k for k in LOOPS if k < SHAPE.max_loop_iters), None]
    kept = ", ".join(f"{bytes_kept(model, tokens, k) / 2**20:.0f}" for k in some)
    names = ", ".join("all" if k is None else str(k) for k in some)
    what = f"kept for the backward pass of 2 × {LENGTH} tokens, grad_loops {names}"
    yield what, f"{kept} MiB"
    for kind in ("mla", "gqa"):
        model = RecurrentDepthTransformer(SHAPE, attention_type=kind).to(device)
        n = min(1000, SHAPE.max_seq_len)
        cache = model.new_cache(1, n)
        model(tokens[:1, :1], cache=cache)  # the first token allocates the rows of all
        size, allocated = cache.rows.element_size(), cache.rows.untyped_storage().nbytes()
        formula = n * mythos.kv_bytes_per_token(model, bytes_per_number=size)
        what = f"cache of {n:,} tokens, {kind.upper()}, {model.config.max_loop_iters} loops"
        yield what, f"{allocated:,} bytes allocated, {formula:,} by kv_bytes_per_token"
    config = mythos.get_model_config("1T")
    with torch.device("meta"):
        (took,) = seconds(partial(RecurrentDepthTransformer, config), rounds=3)
    yield "building 1T on the meta device", f"{took:.2f} s"


def compiled(device: torch.device) -> Rows:
    """torch.compile of the whole model, loop included; fullgraph: a graph break is an error."""
    model, other = (RecurrentDepthTransformer(SHAPE).to(device).train() for _ in range(2))
    other.compile(fullgraph=True)
    tokens = torch.randint(SHAPE.vocab_size, (BATCH, LENGTH), device=device)
    started = time.perf_counter()
    train_step(other, tokens, our_loss)
    yield "compiling the training", f"{time.perf_counter() - started:.0f} s"
    eager, fast = seconds(*(partial(train_step, m, tokens, our_loss) for m in (model, other)))
    text = f"{tokens.numel() / fast:,.0f} tokens/s: {eager / fast:.2f} times as fast as eager"
    yield "training, 8 experts, compiled", text
    yield from compiled_decoding(model.eval(), other.eval(), device)


@torch.no_grad()
def compiled_decoding(model, other, device: torch.device) -> Rows:
    theirs = open_mythos(SHAPE, device)
    for context in (64, 768):
        started = time.perf_counter()
        calls = [decoder(m, context) for m in (model, other)]
        calls[1]()  # compiles: the prompt, one token, and one token behind any number
        if context == 64:
            yield "compiling the decoding", f"{time.perf_counter() - started:.0f} s"
        if theirs is not None:
            calls.append(their_decoder(theirs.eval(), context, SHAPE.vocab_size))
        eager, fast, *its = seconds(*calls)
        text = f"{TOKENS / fast:.0f} steps/s: {eager / fast:.2f} times as fast as eager"
        yield f"decoding, 8 experts, compiled, {context} tokens cached", text
        for took in its:
            yield "  OpenMythos 0.5.0, not compiled", beside(TOKENS / took, took / fast, "steps")


HOW_TO_READ = f"""Made by `python -m experiments.bench{{flags}}`, {{threads}} threads.

**Read the ratios, not the rates**: programs that are compared take turns in one run, and the ratio
of the medians is given. Training is forward and backward, without an optimizer. The model has
{SHAPE.prelude_layers} prelude layer, {SHAPE.recurrent_layers} layer looped {SHAPE.max_loop_iters}
times and {SHAPE.coda_layers} coda layer, width {SHAPE.d_model}, with MLA; the batch is
{BATCH} × {LENGTH} tokens; decoding is one step for {DECODE_BATCH} sequences. OpenMythos has its own
layers, of other FLOPs; its early exit is off: untrained, it would leave before the last loop.

A yardstick for training: bare products at the shapes of the block's weights. (Without experts and
MLA the same looped code has the layers of a Llama: those rows show what the two cost.) What limits
decoding with a short cache at this size is calling operators, whose number does not depend on the
width; with many experts, that `F.grouped_mm` visits those without a token, too."""


def write_report(path: Path) -> Path:
    """SPEED.md from the JSON alone. The project's own is about each JSON kept, in this order."""
    own = path in (RESULTS, RESULTS_GPU)
    files = [f for f in (RESULTS, RESULTS_GPU) if f.is_file()] if own else [path]
    speed, lines = SPEED if own else path.with_name("SPEED.md"), ["# Speed"]
    for numbers in (json.loads(f.read_text("utf-8")) for f in files):
        lines += ["", "## {machine}, torch {torch}".format(**numbers), "", numbers["about"]]
        for heading, rows in numbers["parts"].items():
            lines += ["", f"### {heading.capitalize()}", "", "| what | measured |", "|---|---|"]
            lines += [f"| {what} | {value} |" for what, value in rows]
    write_text(speed, "\n".join(lines) + "\n")
    return speed


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def run_parts(parts: dict, device: torch.device, path: Path, about: str, keep=False) -> list:
    """Each row to the screen and at once to the JSON, each part to SPEED.md; returns these rows.

    keep: the parts that the JSON has and that are not measured now stay in it.
    """
    torch.manual_seed(0)
    old = json.loads(path.read_text("utf-8")) if keep and path.is_file() else {}
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    numbers = dict(device=str(device), machine=machine, threads=torch.get_num_threads(),
                   torch=torch.__version__, about=about, seconds=0.0)  # fmt: skip
    for key in ("machine", "torch"):  # one table, one machine
        got = old.get(key, numbers[key])
        expect(got == numbers[key], f"{path.name}, {key}", got, f"{numbers[key]}, as now")
    numbers["parts"] = old.get("parts", {})
    started = time.perf_counter()
    for heading, measures in parts.items():
        print(f"\n{heading}")
        numbers["parts"][heading] = rows = []
        for what, value in (row for part in measures for row in part(device)):
            rows.append((what, value))
            numbers["seconds"] = time.perf_counter() - started
            write_text(path, json.dumps(numbers, indent=1, ensure_ascii=False))
            line = textwrap.fill(f"{what:<64} {value}", 100, subsequent_indent=" " * 8)
            print(line, flush=True)
        speed = write_report(path)
    print(f"\n{numbers['seconds']:.0f} s on {numbers['machine']}\n{path}\n{speed}")
    return [row for heading in parts for row in numbers["parts"][heading]]


def results_path(given: Path) -> Path:
    """--results, refused where the SPEED.md beside it would be the project's own."""
    path = given.resolve()
    ok = path in (RESULTS, RESULTS_GPU) or path.with_name("SPEED.md") != SPEED
    expect(ok, "--results", str(given), "a folder without the project's own SPEED.md")
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the speed of Mythos on this machine.")
    parser.add_argument("--checkpoint", type=Path, help="of `train_tiny.py`: measure halting on it")
    parser.add_argument("--compile", action="store_true", help="also torch.compile (minutes)")
    parser.add_argument("--report", action="store_true", help="only write SPEED.md from the JSON")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON; SPEED.md beside it")
    args = parser.parse_args(arguments)
    try:
        path = results_path(args.results)
        ok = args.checkpoint is None or args.checkpoint.is_file()
        expect(ok, "--checkpoint", str(args.checkpoint), "a checkpoint of train_tiny.py")
        ok = path.is_file() or not args.report
        expect(ok, "--results", str(args.results), "a JSON file that an earlier run wrote")
    except ValueError as error:
        parser.error(str(error))
    if args.report:
        write_report(path)
        return 0
    parts = {"Training": [training, where_time_goes, forward_by_loops], "Decoding": [decoding]}
    parts |= {"Experts": [experts], "Memory": [memory]}
    flags = " --checkpoint CHECKPOINT" * bool(args.checkpoint) + " --compile" * args.compile
    if args.checkpoint:
        parts["Halting"] = [partial(halting, args.checkpoint)]
    if args.compile:
        parts["Compiled"] = [compiled]
    about = HOW_TO_READ.format(flags=flags, threads=torch.get_num_threads())
    run_parts(parts, torch.device("cpu"), path, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
