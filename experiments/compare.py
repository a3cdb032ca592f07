# SPDX-License-Identifier: MIT
"""What looping buys, and what it does not: variants of Mythos, trained alike and compared.

    python -m experiments.compare                    chains: pointer chasing
    python -m experiments.compare --task circuits
    python -m experiments.compare --task shells      composing permutations
    python -m experiments.compare --task text        the bytes of Python's own library
    python -m experiments.compare --report           no training: RESULTS.md and pictures

variants.py says what is trained, report.py writes RESULTS.md. A run with a JSON in
experiments/results is not repeated; an interrupted one resumes. Every call rewrites RESULTS.md, the
pictures, and README's table and points.
"""

import argparse
import json
import math
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments import report, variants
from experiments.report import RESULTS
from mythos import (
    RecurrentDepthTransformer,
    diagnostics,
    expect,
    flops_per_token,
    loop_gain,
    num_params,
    spectral_radius,
)
from train_tiny import Chains, load_checkpoint, logits_per_loop, mean, train, write_atomically

# ------------------------------------------------------------------------------------------------
# Measuring a trained variant
# ------------------------------------------------------------------------------------------------


def measure_chains(model: RecurrentDepthTransformer, task: Chains) -> dict:
    """Accuracy by hops for each loop count; with a loop also how it moves, and how it halts."""
    if not model.recurrent:
        return {"accuracy": task.measure(model, [0])[0]}
    most = variants.MOST_LOOPS
    loops = list(range(1, most + 1))
    accuracy, _ = task.measure(model, loops)
    halted, used = task.measure(model, [most], Chains.halt_threshold)

    # Random exit: as many queries leave after L loops as with halting, but not those that are done.
    tokens, _, distance = task.test_set()
    parts = tokens.split(125)
    exits = [logits_per_loop(model, part, [most], Chains.halt_threshold)[1] for part in parts]
    exits = torch.cat(exits)[:, task.n_nodes :][distance >= 0]
    share = (exits.bincount(minlength=most + 1) / len(exits)).tolist()

    def some_halt(edges: float, queries: float) -> float:
        """Accuracy after 32 loops with a threshold for each position: at 0 nothing halts."""
        n = task.n_nodes
        thresholds = torch.tensor([edges] * n + [queries] * n)
        return mean(task.measure(model, [most], thresholds)[0][most])

    halting = {
        "accuracy": halted[most],
        "loops": used,
        "random exit": sum(share[L] * mean(accuracy[L]) for L in loops),
        "fixed at the mean": mean(accuracy[math.ceil(mean(used))]),  # rounding up favours it
        "only edges halt": some_halt(Chains.halt_threshold, 0.0),
        "only queries halt": some_halt(0.0, Chains.halt_threshold),
        "none halts": mean(accuracy[most]),
    }
    numbers = {"accuracy": accuracy, "halting": halting, "further": measure_further(model)}
    numbers |= {"shapes": measure_shapes(model)}
    return numbers | dynamics(model, tokens[:8])


def measure_further(model: RecurrentDepthTransformer) -> dict:
    """14 hops to the end of a chain; then 8 to 64 hops on a ring, which has no end.

    Training knows no rings: a walk never stands still here, and T hops need exactly T loops.
    """
    far, most = variants.Far(), variants.MOST_LOOPS
    fixed, _ = far.measure(model, [far.longest + 1])
    halting, _ = far.measure(model, [most], Chains.halt_threshold)
    tokens, queries, successors = shape_set("ring")
    numbers = {"14 hops": fixed[far.longest + 1][-1], "14 hops, halting": halting[most][-1]}
    n = far.n_nodes
    only_edges = torch.tensor([Chains.halt_threshold] * n + [0.0] * n)
    for what, threshold in (("ring", None), ("ring, edges halt", only_edges)):
        logits, _ = logits_per_loop(model, tokens, list(variants.RING_HOPS), threshold)
        for T in variants.RING_HOPS:
            right = logits[T][:, n:].argmax(dim=-1) == walk(queries, successors, T)
            numbers[f"{what}, {T} hops"] = right.float().mean().item()
    return numbers


def measure_shapes(model: RecurrentDepthTransformer) -> dict:
    """For graphs of shapes that training does not know: the share of all nodes for which, after T
    loops, the answer is the node T hops further on."""
    found, loops = {}, list(variants.SHAPE_LOOPS)
    for shape in variants.SHAPES:
        tokens, queries, successors = shape_set(shape)
        logits, _ = logits_per_loop(model, tokens, loops)
        answers = {T: logits[T][:, Chains.n_nodes :].argmax(dim=-1) for T in loops}
        right = {T: answers[T] == walk(queries, successors, T) for T in loops}
        found[shape] = {T: right[T].float().mean().item() for T in loops}
    return found


def shape_set(shape: str, size: int = 100, seed: int = 12345) -> tuple[Tensor, Tensor, Tensor]:
    """tokens (S, 2n), queries (S, n) and the successor of each node (S, n).

    "ring": one of all n nodes. "two rings": of n/2 each. "star": all point at one end. "two
    chains": of n/2 nodes each. "forest": three trees, in which many edges may lead to one node.
    "random function": each node points anywhere, itself included: trees that lead into rings.
    """
    n, rng = Chains.n_nodes, torch.Generator().manual_seed(seed)

    def shuffled() -> Tensor:
        return torch.rand(size, n, generator=rng).argsort(dim=1)

    # `order` numbers the nodes anew, and the k-th points at the one with number target[k].
    order, queries, k, half = shuffled(), shuffled(), torch.arange(n), n // 2
    anywhere = torch.rand(size, n, generator=torch.Generator().manual_seed(seed + 1))
    target = {
        "ring": (k + 1) % n,
        "two rings": (k + 1) % half + half * (k // half),
        "star": torch.zeros_like(k),
        "two chains": torch.minimum(k + 1, half * (k // half + 1) - 1),
        "forest": torch.where(k < 3, k, (anywhere * k).long()),  # a node before it
        "random function": (anywhere * n).long(),
    }[shape]
    successors = torch.zeros_like(order).scatter(1, order, order.gather(1, target.expand(size, n)))
    edges = (n + n * k + successors).gather(1, shuffled())
    return torch.cat([edges, queries], dim=1), queries, successors


def walk(nodes: Tensor, successors: Tensor, hops: int) -> Tensor:
    for _ in range(hops):
        nodes = successors.gather(1, nodes)
    return nodes


def dynamics(model: RecurrentDepthTransformer, tokens: Tensor) -> dict:
    """Mean state norm after 1, 2, 4 … loops; rho(A); the gain of the first and a settled loop."""
    most, settled = variants.NORM_LOOPS[-1], variants.MOST_LOOPS
    norms = diagnostics(model, tokens, n_loops=most)["state_norm"].mean(dim=(1, 2))
    rng = torch.Generator().manual_seed(0)
    return {
        "state_norm": {2**i: norms[2**i - 1].item() for i in range(most.bit_length())},
        "rho": spectral_radius(model),
        "gain": {n: loop_gain(model, tokens, n_loops=n, generator=rng) for n in (0, settled)},
    }


@torch.no_grad()
def measure_text(model: RecurrentDepthTransformer, task: variants.ManyBytes) -> dict:
    """Bits per byte for each loop count; with a loop also whether halting follows surprise."""
    n_loops = task.n_loops if model.recurrent else 0
    if n_loops in (0, 1):
        return {"bits_per_byte": task.measure(model, [n_loops])}
    most = max(variants.TEXT_LOOPS)
    bits = task.measure(model, variants.TEXT_LOOPS)
    windows, halting = task.test_set()[::8], {}
    full, _ = logits_per_loop(model, windows[:, :-1], [2, most])
    for L, logits in full.items():
        surprise = F.cross_entropy(logits.mT, windows[:, 1:], reduction="none") / math.log(2)
        halting[f"never, {L} loops"] = {"bits_per_byte": surprise.mean().item(), "loops": L}
    for threshold in (0.3, 0.1, 0.03):
        logits, used = logits_per_loop(model, windows[:, :-1], [most], threshold)
        cost = F.cross_entropy(logits[most].mT, windows[:, 1:]) / math.log(2)
        pair = torch.stack([used.flatten().float(), surprise.flatten()])
        halting[threshold] = {
            "bits_per_byte": cost.item(),
            "loops": pair[0].mean().item(),
            "correlation with surprise": torch.corrcoef(pair)[0, 1].item(),
        }
    return {"bits_per_byte": bits, "halting": halting} | dynamics(model, windows[:2, :-1])


@torch.no_grad()
def measure_bits(model: RecurrentDepthTransformer, task: variants.TwiceText) -> dict:
    """Bits per byte at the loops of its training; with a loop also how it moves."""
    n_loops = task.n_loops if model.recurrent else 0
    bits = {"bits_per_byte": task.measure(model, [n_loops])}
    return bits | dynamics(model, task.test_set()[:2, :-1]) if n_loops > 1 else bits


def measure_by_difficulty(model: RecurrentDepthTransformer, task: Chains) -> dict:
    """Accuracy by hops or depth, for each loop count; of a loop also how it halts, and moves."""
    if not model.recurrent:
        return {"accuracy": task.measure(model, [0])[0]}
    most = variants.MOST_LOOPS
    accuracy, _ = task.measure(model, list(range(1, most + 1)))
    halted, used = task.measure(model, [most], task.halt_threshold)
    halting = {"accuracy": halted[most], "loops": used}
    return {"accuracy": accuracy, "halting": halting} | dynamics(model, task.test_set()[0][:8])


MEASURES = {
    "chains": measure_chains,
    "circuits": measure_by_difficulty,
    "shells": measure_by_difficulty,
    "fresh": measure_by_difficulty,
    "stack-rates": measure_by_difficulty,
    "text": measure_text,
    **dict.fromkeys(("layers", "experts", "few-bytes", "rates"), measure_bits),
}


def training_flops(model: RecurrentDepthTransformer, task, steps: int, total_loops: int) -> float:
    """Forward and backward FLOPs of a whole training, the backward being twice the forward.

    Counted for the plain model with this config, since `Untied` runs one of its blocks in a loop.
    Truncated backpropagation costs less than this.
    """
    tokens, _, _ = task.batch(torch.Generator().manual_seed(0), 1)
    context, plain = tokens.shape[1] // 2, RecurrentDepthTransformer(model.config)
    once = flops_per_token(plain, 0, context)
    loop = flops_per_token(plain, 1, context) - once if plain.recurrent else 0
    return 3.0 * tokens.numel() * (steps * once + total_loops * loop)


def run(kind: str, name: str, seed: int, results: Path, runs: Path, steps: int | None = None):
    """Train and measure one variant with one seed, unless its JSON is there.

    steps: None are those of the variant's task.
    """
    path = results / kind / f"{name}-seed{seed}.json"
    if path.exists():
        return
    variant, checkpoint = variants.VARIANTS[kind][name], runs / kind / f"{name}-seed{seed}.pt"
    print(f"\n{kind} {name}, seed {seed}: {variant.what}")
    torch.manual_seed(seed)
    task = variant.task()
    steps = steps or task.steps
    model = variant.model(replace(task.config("mla"), **variant.config))
    task.prepare(model)
    numbers = {"task": kind, "variant": name, "seed": seed, "steps": steps}
    numbers |= {"parameters": num_params(model), "data_crc": getattr(task, "data_crc", None)}
    numbers |= {"active_parameters": num_params(model, active=True)}
    resume = checkpoint.exists()
    history = train(model, task, steps=steps, seed=seed, checkpoint=checkpoint, resume=resume)
    numbers |= {"train_seconds": history["seconds"], "device": "cpu", "torch": torch.__version__}
    machine = platform.processor() or platform.machine()
    numbers |= {"machine": machine, "threads": torch.get_num_threads()}
    numbers |= {"train_flops": training_flops(model, task, steps, sum(history["loops"]))}
    numbers |= {"frontier": load_checkpoint(checkpoint)["frontier"]}  # how far the curriculum came
    measuring = time.perf_counter()
    numbers |= MEASURES[kind](model.eval(), task)
    text = json.dumps(numbers, indent=1)
    write_atomically(path, lambda path: path.write_text(text, "utf-8"))
    print(f"measured in {time.perf_counter() - measuring:.0f} s: {path.name}")


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    known = variants.VARIANTS
    parser = argparse.ArgumentParser(description="Train and compare variants of Mythos.")
    parser.add_argument("--task", choices=tuple(known), default="chains")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: those of RESULTS.md")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="train these (default: all)")
    parser.add_argument("--quick", action="store_true", help="2 steps each: does everything run?")
    parser.add_argument("--report", action="store_true", help="train nothing, write RESULTS.md")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"), help="checkpoints")
    args = parser.parse_args(arguments)
    results = args.results.resolve()
    try:
        for name in args.only or []:
            expect(name in known[args.task], "--only", name, f"one of {[*known[args.task]]}")
        ok = not args.quick or results != RESULTS
        expect(ok, "--quick", "no --results", "another folder than the one of the real results")
        ok = results == RESULTS or results.parent != RESULTS.parent
        elsewhere = "a folder elsewhere: beside it RESULTS.md and the pictures are written"
        expect(ok, "--results", str(args.results), elsewhere)
    except ValueError as error:
        parser.error(str(error))
    if not args.report:
        steps = 2 if args.quick else None
        for seed in args.seeds or variants.seeds_of(args.task):
            for name in args.only or known[args.task]:
                run(args.task, name, seed, results, args.runs, steps)
    for path in report.write(results):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
