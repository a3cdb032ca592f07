# SPDX-License-Identifier: MIT
"""Does Mythos work on this GPU, and how fast is it there?

    python -m experiments.gpu                   6 to 10 minutes on an H200
    python -m experiments.gpu --only training   one part; the others are kept

The tests of the model on the GPU; the toy and the text task up to their verdicts; training in bf16,
from the toy to a model of 1B parameters; decoding, eager and from a CUDA graph; halting; memory.
Each row goes to the screen and at once to a JSON file; SPEED.md has them as tables. What a card's
memory is too small for, says so. The command ends with 1 if a test failed or a verdict was FAIL.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from experiments import bench
from experiments.bench import Rows, normal, our_loss, seconds, their_loss, train_step
from mythos import (
    MixtureOfExperts,
    MythosConfig,
    RecurrentDepthTransformer,
    expect,
    flops_per_token,
    get_model_config,
)

ROOT = Path(__file__).resolve().parent.parent
TESTS = ["test_mythos.py", "experiments/test_composes.py"]
PRODUCT = 8192
TOY, LARGE = "tiny", "1B"
TOY_BATCH, LARGE_BATCH = (32, 40), (8, 1024)  # sequences, tokens
CONTEXTS = (64, 1024)
EXPERTS = (8, 64, 256)
LOOPS = (1, 2, 4, 8)


def tests(device: torch.device) -> Rows:
    """The equality tests, on this device."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", device.type, *TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [*(done.stderr + done.stdout).strip().splitlines()] or ["no output"]
    told = lines[-1].strip("= ") + f" (failed: exit {done.returncode})" * (done.returncode != 0)
    yield f"`pytest -k {device.type}` of what has a device", told
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            yield "  " + line.split(" - ")[0], line.partition(" - ")[2]


def verdicts(device: torch.device) -> Rows:
    """Both trainings, as a user runs them; then halting on the toy that they left."""
    with tempfile.TemporaryDirectory() as folder:
        for module, name in (("train_tiny", "chains"), ("experiments.text", "text")):
            command = [sys.executable, "-m", module, "--device", str(device), "--out", folder]
            subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
            yield from verdict(module, Path(folder, f"{name}-mla-seed0.json"))
        checkpoint = Path(folder, "chains-mla-seed0.pt")
        if checkpoint.is_file():
            yield from bench.halting(checkpoint, device)


def verdict(module: str, path: Path) -> Rows:
    if not path.is_file():
        yield f"`python -m {module}`", "FAIL: it wrote no results"
        return
    results = json.loads(path.read_text("utf-8"))
    word, training = "PASS" if results["passed"] else "FAIL", results["train_seconds"]
    text = f"{word}: {results['seconds']:.0f} s, {training:.0f} s of it training"
    yield f"`python -m {module}`", text
    for what, got, sign, bound in results["checks"]:
        yield f"  {what}", f"{got:.3f} (wanted {sign} {bound:.3f})"


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def whole_step(model: nn.Module, optimizer, tokens: Tensor, loss: Callable) -> None:
    train_step(model, tokens, loss)
    optimizer.step()
    if isinstance(model, RecurrentDepthTransformer):
        model.update_router_bias()


def build(device: torch.device, config: MythosConfig) -> RecurrentDepthTransformer:
    with device:
        return RecurrentDepthTransformer(config)


def training(device: torch.device) -> Rows:
    """Whole steps: forward and backward with bf16 autocast, fused AdamW, router bias."""
    a, b = normal(device, 2, PRODUCT, PRODUCT)
    (took,) = seconds(partial(torch.matmul, a, b))
    card = 2 * PRODUCT**3 / took
    yield f"a matrix product of {PRODUCT}³", bench.rate(card)
    large, batch = get_model_config(LARGE), large_batch(device)
    dense = dict(attention_type="gqa", num_experts=0)
    for name, config, shape in (
        ("the toy", get_model_config(TOY), TOY_BATCH),
        (LARGE, large, batch),
        (f"{LARGE}, GQA", replace(large, attention_type="gqa"), batch),
        (f"{LARGE}, GQA, no experts", replace(large, **dense), batch),
    ):
        flops = forward_flops(config, shape)
        for compiled in (False, True):
            make = partial(build, device, config)
            yield training_row(name, make, our_loss, flops, compiled, shape, card)
    flops = forward_flops(large, batch)
    name = f"a Llama with the FLOPs of {LARGE} (transformers)"
    make = partial(bench.llama, flops, large, device, batch[1])
    for compiled in (False, True):
        yield training_row(name, make, their_loss, flops, compiled, batch, card)
    with one_process(device):
        name = f"{LARGE}, weights cast once a step (FSDP's mixed precision)"
        make = partial(sharded, device, large)
        yield training_row(name, make, our_loss, flops, True, batch, card)


def training_row(name: str, make: Callable, loss: Callable, flops: int, compiled: bool, batch,
                 card: float) -> tuple[str, str]:  # fmt: skip
    """Makes a model, measures it and lets go of it. flops: of a forward, per token."""
    torch.compiler.reset()  # it counts the graphs of all models so far, and stops after 8
    model = make()
    if model is None:
        return name, "not installed"
    size = sum(p.numel() for p in model.parameters())
    what = f"{name}: {size:,} parameters, {batch[0]} × {batch[1]} tokens"
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    for block in (block for stack in stacks for block in stack if compiled):
        block.compile()  # one graph serves all blocks of a kind, and any number of loops
    tokens = torch.randint(100, batch, device=next(model.parameters()).device)

    def measure() -> str:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
        (took,) = seconds(partial(whole_step, model.train(), optimizer, tokens, loss))
        speed = 3 * flops * tokens.numel() / took
        told = f"{tokens.numel() / took:,.0f} tokens/s of {flops / 1e9:.2f} GFLOP forward"
        return f"{told}: {bench.rate(speed)}, {100 * speed / card:.3g}% of the product's"

    return f"{what}, {'blocks compiled' if compiled else 'eager'}", if_it_fits(measure)


def if_it_fits(measure: Callable[[], str]) -> str:
    """What it measured, or that the GPU's memory is too small. Then the next one needs the room."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        return "more memory than there is"
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def large_batch(device: torch.device) -> tuple[int, int]:
    """Sequences and tokens: the more the better for the card, as far as its memory goes."""
    N, T = LARGE_BATCH
    roomy = device.type == "cuda" and torch.cuda.mem_get_info()[1] > 120 * 2**30
    return (2 * N if roomy else N), T


def sharded(device: torch.device, config: MythosConfig) -> nn.Module:
    policy = MixedPrecisionPolicy(param_dtype=normal(device, 1).dtype)
    mesh = init_device_mesh(device.type, (1,))
    model = build(device, config)
    return fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


@contextmanager
def one_process(device: torch.device):
    """FSDP wants a process group; this is one of a single process."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def forward_flops(config: MythosConfig, batch: tuple[int, int]) -> int:
    model = build(torch.device("meta"), config)
    return flops_per_token(model, context=batch[1] // 2)


def experts(device: torch.device) -> Rows:
    """The expert layer of the large model, forward and backward in bf16, with other numbers E."""
    c = get_model_config(LARGE)
    x = normal(device, 1, LARGE_BATCH[0] * LARGE_BATCH[1], c.d_model)
    for E in EXPERTS:

        def measure(E=E) -> str:
            with device:
                moe = MixtureOfExperts(c.d_model, c.d_expert, E, c.num_experts_per_token)
            moe = moe.to(x.dtype)

            def run(layer: Callable) -> None:
                moe.zero_grad()
                layer().sum().backward()

            layers = partial(moe, x), partial(bench.loop_over_experts, moe, x[0])
            grouped, loop = seconds(*[partial(run, layer) for layer in layers])
            text = f"{1e3 * grouped:.1f} ms, as a loop {1e3 * loop:.1f} ms"
            return f"{text}: {loop / grouped:.1f} times as fast"

        what = f"{c.num_experts_per_token} of {E} experts of width {c.d_expert}"
        yield f"{what}, {x.shape[1]:,} tokens, forward and backward", if_it_fits(measure)


def memory(device: torch.device) -> Rows:
    """The most that one forward and backward of the large model needs, weights included."""
    if device.type != "cuda":
        return
    model = build(device, get_model_config(LARGE)).train()
    tokens = torch.randint(100, LARGE_BATCH, device=device)
    for k in LOOPS:

        def measure(k=k) -> str:
            torch.cuda.reset_peak_memory_stats()
            train_step(model, tokens, lambda m, x: m(x, x, grad_loops=k)[1])
            return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most"

        N, T = LARGE_BATCH
        what = f"{LARGE}, {N} × {T} tokens, forward and backward, grad_loops {k}"
        yield what, if_it_fits(measure)


# ------------------------------------------------------------------------------------------------
# Decoding
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def decoding(device: torch.device) -> Rows:
    """Steps/s of a large bf16 model: one new token for each of the sequences."""
    one = dict(recurrent_layers=1)
    large, cases = get_model_config(LARGE), {f"{LARGE}, MLA": {}}
    cases |= {f"{LARGE}, GQA": dict(attention_type="gqa")}
    cases |= {f"one looped layer, {E} experts": dict(num_experts=E) | one for E in EXPERTS}
    for name, options in cases.items():
        for context in CONTEXTS[: 1 if "num_experts" in options else None]:

            def measure(options=options, context=context) -> str:
                config = replace(large, **options)
                model = build(device, config).eval().to(normal(device, 1).dtype)
                calls = [bench.decoder(model, context)]
                if device.type == "cuda":
                    calls.append(graphed(model, context))
                eager, *replayed = (bench.TOKENS / t for t in seconds(*calls))
                more = (f", from a CUDA graph {r:.1f}: {r / eager:.1f} times" for r in replayed)
                return f"{eager:.1f} steps/s" + "".join(more)

            yield f"{name}, {context} tokens cached", if_it_fits(measure)


def graphed(model: RecurrentDepthTransformer, context: int) -> Callable[[], None]:
    """A call that decodes one token TOKENS times from a CUDA graph, without Python's calls.

    A graph is of one length only; what it shows is what the kernels alone need.
    """
    device = model.head.weight.device
    cache = model.new_cache(bench.DECODE_BATCH, context + 1)
    prompt = torch.randint(100, (bench.DECODE_BATCH, context), device=device)
    model(prompt, cache=cache)

    def step() -> None:  # without forward's look at the ids, which waits for the GPU
        e, rope = model.run_prelude(prompt[:, :1], cache)
        h = model.run_loop(e, rope, model.config.max_loop_iters, cache)
        model.run_coda(h, rope, cache, 1)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # allocates and initialises, which a graph must not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    # A graph knows addresses only: `step` keeps alive what lies there.
    return lambda keep=step: [graph.replay() for _ in range(bench.TOKENS)]


PARTS = dict(
    tests=[tests], verdicts=[verdicts], training=[training], experts=[experts], memory=[memory],
    decoding=[decoding],
)  # fmt: skip


def how_to_read() -> str:
    config = get_model_config(LARGE)
    layers = f"{config.prelude_layers} + {config.recurrent_layers} × {config.max_loop_iters}"
    return f"""Made by `python -m experiments.gpu`.

Training is in bf16 where autocast puts it, with fp32 weights; a step is forward, backward, fused
AdamW and the router's bias, on one batch of random tokens. Its FLOPs are 3 times the forward's, as
usual, and are compared with one large bf16 product on the same card. That product's own rate
differed by 7% between runs on cards of one kind, the large models' tokens/s by about 1%, and
whatever waits for Python (the toy, eager decoding, a loop over experts) by up to a factor of two,
with the CPU beside the card.
{LARGE} has {layers} + {config.coda_layers} layers.
Decoding is one step for {bench.DECODE_BATCH} sequences, in bf16. A CUDA graph fits one length only,
and shows what is left without Python's calls and without the check of ids, which waits for the GPU.
Times in Training, Experts and Decoding are medians of {bench.ROUNDS} rounds."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Try and measure Mythos on a GPU.")
    parser.add_argument("--only", choices=PARTS, help="one part; the others stay as they are")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda", "mps"))
    parser.add_argument(
        "--results", type=Path, default=bench.RESULTS_GPU, help="JSON; SPEED.md beside it"
    )
    args = parser.parse_args(arguments)
    try:
        path, device = bench.results_path(args.results), torch.device(args.device)
        ok = device.type != "cuda" or torch.cuda.is_available()
        expect(ok, "--device", args.device, "a device of this machine")
        parts = {args.only: PARTS[args.only]} if args.only else PARTS
        rows = bench.run_parts(parts, device, path, how_to_read(), keep=args.only is not None)
    except ValueError as error:
        parser.error(str(error))
    return int(any("FAIL" in value or "failed" in value for _, value in rows))


if __name__ == "__main__":
    sys.exit(main())
