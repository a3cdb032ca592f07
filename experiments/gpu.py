# SPDX-License-Identifier: MIT
"""Does Mythos work on this GPU, and how fast is it there?

    python -m experiments.gpu                   about 4 minutes on one card of 80 GiB or more
    python -m experiments.gpu --only training   one part; the others are kept

The tests of the model on the GPU; the toy and the text task up to their verdicts; training in bf16,
from the toy to a model of 1B parameters; decoding, eager and from a CUDA graph; halting; memory.
Each row goes to the screen and at once to a JSON file; SPEED.md has them as tables. The command
ends with 1 if a test failed or a verdict was FAIL. It runs on a CPU, too, if you have the patience.
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

from experiments import bench, measure
from experiments.bench import Rows, our_loss, random, seconds, their_loss, train_step
from experiments.command import find_device, run_as_program
from mythos import MixtureOfExperts, MythosConfig, RecurrentDepthTransformer, get_model_config

ROOT = Path(__file__).resolve().parent.parent
TESTS = ["test_mythos.py", "experiments/test_measure.py", "experiments/test_composes.py"]
SEQUENCES = 3  # of the toy's test, for halting
PRODUCT = 8192
TOY, LARGE = "tiny", "1B"
TOY_BATCH, LARGE_BATCH = (32, 40), (8, 1024)  # sequences, tokens
CONTEXTS = (64, 1024)
LOOPS = (1, 2, 4, 8)


def tests(device: torch.device) -> Rows:
    """What equals what on the CPU, on this device."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", device.type, *TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or [done.stderr]
    told = lines[-1].strip("= ") + " (nothing ran: failed)" * (" passed" not in lines[-1])
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
            yield from bench.halting(checkpoint, device, SEQUENCES)


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
    a, b = random(device, 2, PRODUCT, PRODUCT)
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
        for compiled in (False, True):
            model = build(device, config).train()
            what = f"{name}: {describe(model, shape)}"
            yield from training_row(what, model, our_loss, forward_flops(model, shape),
                                    compiled, shape, card)  # fmt: skip
    flops = forward_flops(build(torch.device("meta"), large), batch)
    for compiled in (False, True):
        other = bench.llama(flops, large, device, batch[1])
        if other is not None:
            what = f"a Llama with the FLOPs of {LARGE} (transformers)"
            yield from training_row(what, other.train(), their_loss, flops, compiled, batch, card)
    with one_process(device):
        model = build(device, large).train()
        what = f"{LARGE}, weights cast once a step (FSDP's mixed precision)"
        policy = MixedPrecisionPolicy(param_dtype=random(device, 1).dtype)
        mesh = init_device_mesh(device.type, (1,))
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        yield from training_row(what, model, our_loss, flops, True, batch, card)


def training_row(what: str, model, loss: Callable, flops: int, compiled: bool, batch, card) -> Rows:
    """Measures, and frees the memory; flops: of a forward, per token."""
    layers = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    torch.compiler.reset()  # it counts the graphs of all models so far, and stops after 8
    for block in (block for stack in layers for block in stack if compiled):
        block.compile()  # one graph serves all blocks of a kind, and any number of loops
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    tokens = torch.randint(100, batch, device=device)
    try:
        (took,) = seconds(partial(whole_step, model, optimizer, tokens, loss))
        speed = 3 * flops * tokens.numel() / took
        text = f"{tokens.numel() / took:,.0f} tokens/s, {bench.rate(speed)}"
        text += f", {100 * speed / card:.3g}% of the product's"
    except torch.OutOfMemoryError:
        text = "more memory than there is"
    yield f"{what}, {'blocks compiled' if compiled else 'eager'}", text
    del model, optimizer, layers
    clear(device)


def large_batch(device: torch.device) -> tuple[int, int]:
    """Sequences and tokens: the more the better for the card, as far as its memory goes."""
    N, T = LARGE_BATCH
    roomy = device.type == "cuda" and torch.cuda.mem_get_info()[1] > 120 * 2**30
    return (2 * N if roomy else N), T


@contextmanager
def one_process(device: torch.device):
    """FSDP wants a process group; this is one of a single process."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def describe(model: RecurrentDepthTransformer, batch: tuple[int, int]) -> str:
    size, loops = measure.num_params(model), model.config.max_loop_iters
    return f"{size:,} parameters, {loops} loops, {batch[0]} × {batch[1]} tokens"


def forward_flops(model: RecurrentDepthTransformer, batch) -> int:
    return measure.flops_per_token(model, context=batch[1] // 2)


def clear(device: torch.device) -> None:
    """Free what the last model has left: the next one needs the room."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def experts(device: torch.device) -> Rows:
    """The expert layer of the large model, forward and backward in bf16, with other numbers E."""
    c = get_model_config(LARGE)
    x = random(device, 1, LARGE_BATCH[0] * LARGE_BATCH[1], c.d_model)
    for E in (8, 64, 256):
        with device:
            moe = MixtureOfExperts(c.d_model, c.d_expert, E, c.num_experts_per_token)
        moe = moe.to(x.dtype)

        def run(layer: Callable, moe=moe) -> None:
            moe.zero_grad()
            layer().sum().backward()

        layers = partial(moe, x), partial(bench.loop_over_experts, moe, x[0])
        grouped, loop = seconds(*[partial(run, layer) for layer in layers])
        text = f"{1e3 * grouped:.1f} ms, as a loop {1e3 * loop:.1f} ms"
        what = (
            f"{c.num_experts_per_token} of {E} experts of width {c.d_expert}, {x.shape[1]} tokens"
        )
        yield what, f"{text}: {loop / grouped:.1f} times as fast"
        del moe, layers
        clear(device)


def memory(device: torch.device) -> Rows:
    """The most that one forward and backward of the large model needs, weights included."""
    if device.type != "cuda":
        return
    model = build(device, get_model_config(LARGE)).train()
    tokens = torch.randint(100, LARGE_BATCH, device=device)
    for k in LOOPS:
        torch.cuda.reset_peak_memory_stats()
        train_step(model, tokens, lambda m, x, k=k: m(x, x, grad_loops=k)[1])
        most = torch.cuda.max_memory_allocated() / 2**30
        yield f"{LARGE}, forward and backward, grad_loops {k}", f"{most:.1f} GiB at most"
        clear(device)


# ------------------------------------------------------------------------------------------------
# Decoding
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def decoding(device: torch.device) -> Rows:
    """Steps/s of a large bf16 model: one new token for each of the sequences."""
    large = get_model_config(LARGE)
    for name, options in (
        ("MLA", {}), ("GQA", dict(attention_type="gqa")),
        *((f"one looped layer, {E} experts", dict(num_experts=E, recurrent_layers=1))
          for E in (8, 64, 256)),
    ):  # fmt: skip
        model = build(device, replace(large, **options)).eval().to(random(device, 1).dtype)
        for context in CONTEXTS if not options.get("num_experts") else CONTEXTS[:1]:
            calls = [bench.decoder(model, context)]
            if device.type == "cuda":
                calls.append(graphed(model, context))
            eager, *replayed = (4 / t for t in seconds(*calls))
            text = f"{eager:.1f} steps/s"
            text += "".join(f", from a CUDA graph {r:.1f}: {r / eager:.1f} times" for r in replayed)
            yield f"{LARGE}, {name}, {context} tokens cached", text
        del model, calls
        clear(device)


def graphed(model: RecurrentDepthTransformer, context: int) -> Callable[[], None]:
    """A call that decodes one token 4 times from a CUDA graph, which does not wait for Python.

    A graph is of one length only; what it shows is what the kernels alone need.
    """
    device = model.head.weight.device
    cache = model.new_cache(bench.DECODE_BATCH, context + 1)
    prompt = torch.randint(100, (bench.DECODE_BATCH, context), device=device)
    model(prompt, cache=cache)

    def step() -> None:  # without forward's look at the ids, which waits for the GPU
        e, rope = model.run_prelude(prompt[:, :1], cache)
        h, _ = model.run_loop(e, rope, model.config.max_loop_iters, cache=cache)
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
    return lambda keep=step: [graph.replay() for _ in range(4)]


PARTS = dict(
    tests=[tests], verdicts=[verdicts], training=[training], experts=[experts], memory=[memory],
    decoding=[decoding],
)  # fmt: skip


def how_to_read() -> str:
    config = get_model_config(LARGE)
    layers = f"{config.prelude_layers} + {config.recurrent_layers} × {config.max_loop_iters}"
    return f"""Made by `python -m experiments.gpu`.

Training is in bf16 where autocast puts it, with fp32 weights; a step is forward, backward, fused
AdamW and the router's bias. Its FLOPs are 3 times the forward's, as usual, and are compared with
one large bf16 product on the same card. {LARGE} has {layers} + {config.coda_layers} layers.
Decoding is one step for {bench.DECODE_BATCH} sequences, in bf16; a CUDA graph fits one length only,
and shows what is left once Python need not call each operator. All are medians of {bench.ROUNDS}
rounds."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Try and measure Mythos on a GPU.")
    parser.add_argument("--only", choices=PARTS, help="one part; the others stay as they are")
    parser.add_argument("--device", help="default: cuda, mps or cpu, whichever is there first")
    parser.add_argument(
        "--results", type=Path, default=bench.RESULTS_GPU, help="JSON; SPEED.md beside it"
    )
    args = parser.parse_args(arguments)
    try:
        path, device = bench.results_path(args.results), find_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    parts = {args.only: PARTS[args.only]} if args.only else PARTS
    rows = bench.run_parts(parts, device, path, how_to_read(), keep=args.only is not None)
    return int(any("FAIL" in value or " failed" in value for _, value in rows))


if __name__ == "__main__":
    run_as_program(main)
