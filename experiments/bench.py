# SPDX-License-Identifier: MIT
"""How fast is Mythos on this machine, and how close to what the machine can do?

Each row goes to the screen and at once to runs/speed-DEVICE.json; at the end runs/SPEED.md has the
tables. Other programs take part where Python finds them, such as an older mythos.py:

    pip install --no-deps open-mythos==0.5.0       pip install transformers
    git show f1b2acf:mythos.py > old_mythos.py     python -m experiments.bench --only decoding
"""

import argparse
import gc
import json
import os
import platform
import statistics
import time
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mythos
from mythos import MythosConfig, RecurrentDepthTransformer
from train_tiny import write_atomically

HERE, RUNS = Path(__file__).resolve().parent, Path("runs")
ROUNDS, TOKENS, SEQUENCES = 5, 4, 3  # one call decodes TOKENS tokens for each of SEQUENCES
LLAMA, OPEN, GQA = "a Llama of equal FLOPs (transformers)", "OpenMythos 0.5.0", "GQA"
COMPILED, GRAPH, OLD = "compiled", "from a CUDA graph", "an older mythos.py"
LLAMA_COMPILED = f"{LLAMA}, compiled"
NEEDS = {LLAMA: "transformers", LLAMA_COMPILED: "transformers"}
NEEDS |= {OPEN: "open_mythos", OLD: "old_mythos"}

SMALL = MythosConfig(  # the shapes at which OpenMythos was measured: 1 + 1×8 + 1 layers
    vocab_size=1024, d_model=256, max_seq_len=2048, n_heads=8, kv_lora_rank=64, q_lora_rank=64,
    d_ff=344, max_loop_iters=8, num_experts=8, num_experts_per_token=2, d_expert=128,
)  # fmt: skip
MANY = replace(SMALL, num_experts=64, num_experts_per_token=4, d_expert=64)
PLAIN = replace(SMALL, attention_type="gqa", n_kv_heads=8, num_experts=0)  # a Llama, looped
TOY, LARGE = map(mythos.get_model_config, ("tiny", "1B"))
LARGE_GQA = replace(LARGE, attention_type="gqa")
SETTINGS = dict(
    cpu=SimpleNamespace(
        dtype=torch.float32, product=2048,
        training=[  # name, config, batch, and what takes turns with it
            ("8 experts", SMALL, (8, 256), [LLAMA, OPEN]), ("64 experts", MANY, (8, 256), [OPEN]),
            ("no experts, no MLA", PLAIN, (8, 256), [LLAMA]),
        ],
        decoding=[("8 experts", SMALL, [GQA, OPEN]), ("64 experts", MANY, [OPEN])],
        contexts=(64, 768),
    ),
    cuda=SimpleNamespace(
        dtype=torch.bfloat16, product=8192,
        training=[
            ("the toy", TOY, (32, 40), [COMPILED]),
            ("1B", LARGE, (16, 1024), [COMPILED, LLAMA, LLAMA_COMPILED]),
            ("1B, GQA", LARGE_GQA, (16, 1024), [COMPILED]),
            ("1B, GQA, no experts", replace(LARGE_GQA, num_experts=0), (16, 1024), [COMPILED]),
        ],
        decoding=[("1B", LARGE, [GRAPH]), ("1B, GQA", LARGE_GQA, [GRAPH])],
        contexts=(64, 1024),
    ),
)  # fmt: skip


def seconds(*calls) -> list[float]:
    """The median time of each call. They take turns, so a slow minute hits all of them alike."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(1 + ROUNDS):
        for call, kept in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            wait()
            kept.append(time.perf_counter() - started)
    return [statistics.median(kept[1:]) for kept in times]  # the first call initialises


def race(s, what: str, rivals: list[str], make, amount: int, unit: str, limit=0.0):
    """Rows: the rate of our program, then of its rivals; `make` builds each from its name. limit:
    the rate that the machine allows."""
    names = [what, *rivals, OLD, *[COMPILED] * s.compile]
    names = [who for who in names if who not in NEEDS or find_spec(NEEDS[who])]
    # A GPU's memory is too small for all at once; there, nothing else disturbs.
    groups = [names] if s.device == "cpu" else [[who] for who in names]
    took = [t for group in groups for t in seconds(*map(make, group))]
    for who, t in zip(names, took, strict=True):
        text = f"{amount / t:,.1f} {unit}/s"
        if limit and who != OPEN:  # whose FLOPs are others
            text += f", {amount / t / limit:.1%} of the product's rate"
        text += f": {took[0] / t:.2f} times as fast" * (who != what)
        yield "  " * (who != what) + who, text


def build(s, c: MythosConfig, who: str, length: int = 1) -> nn.Module:
    """The program of that name; any other name is ours."""
    gc.collect()
    torch.cuda.empty_cache()  # the program before had it
    torch.compiler.reset()  # it counts the graphs of all models so far, and stops after 8
    with torch.device(s.device):
        if who == OPEN:
            return open_mythos(c)
        if who in (LLAMA, LLAMA_COMPILED):
            return llama(c, length)
        package = import_module("old_mythos") if who == OLD else mythos
        c = replace(c, attention_type="gqa") if who == GQA else c
        return package.RecurrentDepthTransformer(package.MythosConfig(**vars(c)))


def open_mythos(c: MythosConfig) -> nn.Module:
    """OpenMythos at our shapes. Its early exit is off: all loops run, as in ours."""
    package, w = import_module("open_mythos.main"), mythos.derive_widths(c)
    config = package.MythosConfig(
        vocab_size=c.vocab_size, dim=c.d_model, n_heads=c.n_heads, max_seq_len=c.max_seq_len,
        max_loop_iters=c.max_loop_iters, prelude_layers=1, coda_layers=1, kv_lora_rank=64,
        q_lora_rank=c.q_lora_rank, qk_rope_head_dim=w.rope_dim, qk_nope_head_dim=w.head_dim,
        v_head_dim=w.head_dim, n_experts=c.num_experts, n_shared_experts=c.num_shared_experts,
        n_experts_per_tok=c.num_experts_per_token, expert_dim=w.d_expert, act_threshold=1e9,
    )  # fmt: skip
    return package.OpenMythos(config)


def llama(c: MythosConfig, length: int) -> nn.Module:
    """A Llama of as many layers as ours runs, so wide that it has as many FLOPs per token."""
    package, D = import_module("transformers"), c.d_model
    layers = c.prelude_layers + c.max_loop_iters * c.recurrent_layers + c.coda_layers
    per_layer = (flops(c, length) - 2 * D * c.vocab_size) / layers
    attention = 2 * 4 * D * D + 2 * 2 * D * (length // 2)  # q, k, v, out; scores and values
    config = package.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=D, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_heads, num_hidden_layers=layers, use_cache=False,
        intermediate_size=round((per_layer - attention) / (2 * 3 * D) / 8) * 8,
        max_position_embeddings=c.max_seq_len,
    )  # fmt: skip
    return package.LlamaForCausalLM(config)


def flops(c: MythosConfig, length: int) -> int:
    with torch.device("meta"):
        return mythos.flops_per_token(RecurrentDepthTransformer(c), context=length // 2)


def trainer(s, c: MythosConfig, batch: tuple[int, int], who: str):
    """A call that trains one step; on a GPU in bf16 where autocast puts it."""
    model = build(s, c, who, batch[1]).train()
    if who in (COMPILED, LLAMA_COMPILED):
        for stack in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
            for block in stack:
                block.compile()  # one graph serves all blocks of a kind, and all loops
    tokens = torch.randint(c.vocab_size, batch, device=s.device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(s.device, torch.bfloat16, enabled=s.device == "cuda"):
            out = model(tokens)
            logits = out if isinstance(out, Tensor) else out[0]
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
        loss.backward()
        optimizer.step()
        if who not in (LLAMA, LLAMA_COMPILED, OPEN):
            model.update_router_bias()

    return step


def decoder(s, c: MythosConfig, context: int, who: str):
    """A call that decodes TOKENS tokens behind `context` cached ones; it can be repeated."""
    model = build(s, c, who).eval()
    prompt = torch.randint(c.vocab_size, (SEQUENCES, context), device=s.device)
    token = prompt[:, :1]
    if who == OPEN:  # its cache is a dict that grows
        full: dict = {}
        model(prompt, kv_cache=full)

        def theirs() -> None:
            cache = {key: dict(value) for key, value in full.items()}
            for i in range(TOKENS):
                model(token, kv_cache=cache, start_pos=context + i)

        return theirs
    if who == COMPILED:
        model.compile(fullgraph=True)
    cache = model.to(s.dtype).new_cache(SEQUENCES, context + TOKENS)
    model(prompt, cache=cache)
    run = step = partial(model, n_loops=c.max_loop_iters, cache=cache)
    if who == GRAPH:  # as in generate(cuda_graph=True)
        cache.n_tokens = torch.tensor([context], device=s.device)
        step = torch.cuda.make_graphed_callables(lambda x: run(x)[0], (token,), num_warmup_iters=1)

    def ours() -> None:
        cache.n_tokens -= cache.n_tokens - context  # forget the call before; a graph's: in place
        for _ in range(TOKENS):
            step(token)

    return ours


def training(s):
    """Whole steps: forward, backward, AdamW; beside the rate of one large matrix product."""
    a, b = torch.randn(2, s.product, s.product, device=s.device).to(s.dtype)
    limit = 2 * s.product**3 / seconds(lambda: a @ b)[0]
    yield f"a matrix product of {s.product}³", f"{limit / 1e9:,.0f} GFLOP/s"
    for name, c, (N, T), rivals in s.training:
        make, best = partial(trainer, s, c, (N, T)), limit / (3 * flops(c, T))
        yield from race(s, f"{name}, {N} × {T} tokens", rivals, make, N * T, "tokens", best)


@torch.no_grad()
def decoding(s):
    """One new token for each of the sequences, behind so many cached ones."""
    for name, c, rivals in s.decoding:
        for context in s.contexts:
            make = partial(decoder, s, c, context)
            yield from race(s, f"{name}, {context} tokens cached", rivals, make, TOKENS, "steps")


def by_part(s):
    """Forward and backward of each part of the looped block with 8 experts, and of a Llama's, in
    fp32. Indented once: what a part consists of; twice: another way to the same numbers."""
    N, T, c = 8, 256, mythos.derive_widths(SMALL)
    D, H, C, R = c.d_model, c.n_heads, c.head_dim, c.rope_dim
    block, plain = (RecurrentDepthTransformer(config).recurrent[0] for config in (SMALL, PLAIN))
    block, plain = block.to(s.device), plain.to(s.device)
    mla, moe, positions = block.attention, block.ffn, torch.arange(T, device=s.device)
    some, all_ = (mythos.rope_angles(positions, width) for width in (R, C))

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=s.device, requires_grad=True)

    def heads(width: int) -> Tensor:  # in memory as a product makes them
        return leaf(N, T, H, width).transpose(1, 2)

    x, tokens, k, v, k_rope = leaf(N, T, D), leaf(N * T, D), heads(C), heads(C), leaf(N, 1, T, R)
    wide, narrow = [heads(C + R) for _ in range(3)], [heads(C) for _ in range(3)]
    chosen, shares = moe.route(tokens)
    pair = chosen.flatten().sort(stable=True).indices
    ends = chosen.flatten().bincount(minlength=c.num_experts).cumsum(0).int()
    pairs, hidden, gates = (leaf(len(pair), n) for n in (D, c.d_expert, 2 * c.d_expert))

    def turn(q: Tensor) -> Tensor:
        q, q_rope = q.split([C, R], dim=-1)
        return torch.cat([q, mythos.apply_rope(q_rope, some)], dim=-1)

    def gated(gates: Tensor, shares: Tensor) -> Tensor:
        gate, up = gates.chunk(2, dim=-1)
        return F.silu(gate) * up * shares.flatten().index_select(0, pair)[:, None]

    rows = [
        ("MLA", mla, x, some), ("  queries: two products, a norm", mla.q_proj, x),
        ("  latent and rotated key", mla.kv_down_proj, x),
        ("  keys and values rebuilt", mla.kv_up_proj, leaf(N, T, c.kv_lora_rank)),
        ("  queries split, rotated, joined", turn, wide[0]),
        ("  keys joined", lambda k, r: torch.cat([k, r.expand(-1, H, -1, -1)], -1), k, k_rope),
        ("  values padded to the keys' width", lambda v: F.pad(v, (0, R)), v),
        ("  attend", mythos.causal_attention, *wide),
        ("    values not padded", mythos.causal_attention, *wide[:2], v),
        ("  out", mla.out_proj, x), ("a Llama's attention", plain.attention, x, all_),
        ("  attend", mythos.causal_attention, *narrow),
        ("experts", moe, x), ("  router and choice", lambda x: moe.route(x)[1], tokens),
        ("  sort", lambda: chosen.flatten().sort(stable=True).values * 1.0),
        ("  gather", lambda x: x.index_select(0, pair // 2), tokens),
        ("  gate and up, 8 products", mythos.grouped_mm, pairs, moe.gate_up_proj, ends),
        ("  gating and shares", gated, gates, shares.detach().requires_grad_()),
        ("  down, 8 products", mythos.grouped_mm, hidden, moe.down_proj, ends),
        ("  sum", lambda y: torch.zeros_like(tokens).index_add(0, pair // 2, y), pairs),
        ("  shared expert", moe.shared, x), ("a Llama's feed-forward", plain.ffn, x),
    ]  # fmt: skip

    def there_and_back(call, *inputs) -> None:
        out = call(*inputs)
        if out.requires_grad:
            out.backward(torch.ones_like(out, memory_format=torch.contiguous_format))

    times = seconds(*(partial(there_and_back, *row[1:]) for row in rows))
    for (what, *_), t in zip(rows, times, strict=True):
        yield what, f"{1e3 * t:.1f} ms"


PARTS = {"training": training, "by-part": by_part, "decoding": decoding}


def tables(parts: dict) -> str:
    lines = []
    for part, numbers in parts.items():
        lines += [f"### {part.capitalize()}: {numbers['machine']}", "", "| what | measured |"]
        lines += ["|---|---|", *(f"| {what} | {value} |" for what, value in numbers["rows"]), ""]
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def main(arguments: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--device", choices=SETTINGS, default="cpu", help="where to measure (default: cpu)")
    add("--only", nargs="+", choices=PARTS, default=[*PARTS], help="some parts (default: all)")
    add("--compile", action="store_true", help="torch.compile takes part, for minutes")
    add("--report", action="store_true", help="measure nothing, only write SPEED.md")
    add("--publish", action="store_true", help="write to experiments/ (default: to runs/)")
    args = parser.parse_args(arguments)
    s, machine = SETTINGS[args.device], f"{platform.machine()}, {os.cpu_count()} cores"
    s.device, s.compile = args.device, args.compile
    if s.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got 'cuda', expected a device of this machine")
    machine = torch.cuda.get_device_name() if s.device == "cuda" else machine
    machine += f", {torch.get_num_threads()} threads, torch {torch.__version__}"
    files = {device: HERE / "results" / f"speed-{device}.json" for device in SETTINGS}
    shown = {device: json.loads(path.read_text("utf-8")) for device, path in files.items()}
    torch.manual_seed(0)
    measured = {}
    for part in [] if args.report else args.only:
        print(f"\n{part}")
        measured[part] = {"machine": machine, "rows": []}
        for what, value in PARTS[part](s):
            measured[part]["rows"].append((what, value))
            write(RUNS / files[s.device].name, json.dumps(measured, indent=1, ensure_ascii=False))
            print(f"{what:<64} {value}", flush=True)
    shown[s.device] |= measured  # whole parts only
    if args.publish:
        write(files[s.device], json.dumps(shown[s.device], indent=1, ensure_ascii=False) + "\n")
    text = (HERE / "SPEED.md").read_text("utf-8")
    for device, parts in shown.items():
        before, rest = text.split(f"<!-- {device} -->\n")
        after = rest.split(f"<!-- /{device} -->")[1]
        text = f"{before}<!-- {device} -->\n{tables(parts)}<!-- /{device} -->{after}"
    write((HERE if args.publish else RUNS) / "SPEED.md", text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
