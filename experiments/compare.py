# SPDX-License-Identifier: MIT
"""What looping buys, and what it does not: variants of Mythos, trained alike and compared.

    python -m experiments.compare --task chains --only loop --seeds 10
    python -m experiments.compare --task chains --quick             does each variant run?

Each run becomes a line of JSON in runs/results/TASK.jsonl, and the tables of its task are printed,
to be held against experiments/RESULTS.md. A run that has a line there is not repeated; one that was
interrupted goes on from its checkpoint. variants.py says what is trained.
"""

import argparse
import math
import platform
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor

import mythos
from experiments import report, variants
from experiments.variants import Ends, Table, Text, ToldHops, Written
from mythos import RecurrentDepthTransformer, expect
from train_tiny import Chains, load_checkpoint, logits_per_loop, mean, train

# ---- Measuring a trained variant ----


def measure(kind: str, model: RecurrentDepthTransformer, task, frontier: int) -> dict:
    """What a run's line says about its quality. frontier: how far its curriculum came."""
    n_loops, most = getattr(task, "n_loops", None), variants.MOST_LOOPS
    if isinstance(task, Text):
        return {"bits_per_byte": task.measure(model, [n_loops])}
    if isinstance(task, Table):
        halts = {"none halts": None, "halting": task.halt_threshold}
        return {"walk": {how: task.walk(model, threshold) for how, threshold in halts.items()}}
    written = isinstance(model, Written)
    if not model.recurrent or n_loops == 1 and not written:
        accuracy = task.measure(model, [n_loops or 0])[0]
        if isinstance(task, ToldHops):  # of more hops it was never told
            accuracy[task.n_loops][frontier + 1 :] = [None] * (task.longest - frontier - 1)
        return {"accuracy": accuracy}
    halted, used = task.measure(model, [most], task.halt_threshold)
    numbers = {"halting": {"accuracy": halted[most], "loops": used}}
    numbers["accuracy"], _ = task.measure(model, list(range(1, most + 1)))
    if kind == "chains":
        numbers["halting"] |= halting_controls(model, task, numbers)
        if not isinstance(task, Ends):  # those were never taught that a loop is a hop
            numbers |= measure_shapes(model, task)
    return numbers if written else numbers | dynamics(model, task.test_set()[0][:8])


def halting_controls(model: RecurrentDepthTransformer, task: Chains, numbers: dict) -> dict:
    """Accuracy over all hops with as many loops, but other tokens that stop, or at other times; and
    the loops that are run until the last token of a call has stopped."""
    accuracy, used = numbers["accuracy"], numbers["halting"]["loops"]
    threshold, most, n = task.halt_threshold, variants.MOST_LOOPS, task.n_nodes
    # Random exit: as many queries leave after L loops as with halting, but not those that are done.
    tokens, _, distance = task.test_set()
    exits = [logits_per_loop(model, part, [most], threshold)[1] for part in tokens.split(125)]
    exits = torch.cat(exits)
    run = {size: [part.max().item() for part in exits.split(size)] for size in (1, 32)}
    exits = exits[:, n:][distance >= 0]
    share = (exits.bincount(minlength=most + 1) / len(exits)).tolist()

    def some_halt(edges: float, queries: float) -> float:
        """Accuracy after 32 loops with a threshold for each position: at 0 nothing halts."""
        thresholds = torch.tensor([edges] * n + [queries] * n)
        return mean(task.measure(model, [most], thresholds)[0][most])

    return {
        "random exit": sum(share[L] * mean(accuracy[L]) for L in accuracy),
        "fixed at the mean": mean(accuracy[math.ceil(mean(used))]),  # rounding up favours it
        "only edges halt": some_halt(threshold, 0.0),
        "only queries halt": some_halt(0.0, threshold),
        "none halts": mean(accuracy[most]),
        "loops run": {size: mean(longest) for size, longest in run.items()},
    }


def measure_shapes(model: RecurrentDepthTransformer, task: Chains) -> dict:
    """For graphs of shapes that training does not know: the share of all nodes for which, after T
    loops, the answer is the node T hops further on; on rings with halting also what rests."""
    found, n, threshold = {}, task.n_nodes, task.halt_threshold
    cases = dict.fromkeys(variants.SHAPES)  # none halts
    cases |= {"ring, edges halt": torch.tensor([threshold] * n + [0.0] * n)}
    cases |= {f"{shape}, halting": threshold for shape in variants.SHAPES}
    for what, halt in cases.items():
        tokens, queries, successors = shape_set(what.split(",")[0])
        far = what == "ring" or what.endswith("halting")
        loops = variants.FAR if far else variants.WALKS
        logits, used = logits_per_loop(model, tokens, list(loops), halt)
        answers = {T: logits[T][:, n:].argmax(dim=-1) for T in loops}
        right = {T: answers[T] == walk(queries, successors, T) for T in loops}
        found[what] = {T: right[T].float().mean().item() for T in loops}
    edges, queries = used.split(n, dim=1)  # of the last, rings with halting
    rest = {
        "loops of edges": edges,
        "edges rest": edges < loops[-1],
        "queries rest": queries < loops[-1],
    }
    return {"shapes": found, "rest": {what: x.float().mean().item() for what, x in rest.items()}}


def shape_set(shape: str, size: int = 100, seed: int = 12345) -> tuple[Tensor, Tensor, Tensor]:
    """tokens (S, 2n), queries (S, n) and the successor of each node (S, n).

    "ring": one of all n nodes. "two rings": of n/2 each. "random function": each node points
    anywhere, itself included: trees that lead into rings. "deep tree": one, about 13 hops deep.
    "repeated queries": two chains; some nodes are asked about several times, some never.
    """
    n, rng = Chains.n_nodes, torch.Generator().manual_seed(seed)

    def shuffled() -> Tensor:
        return torch.rand(size, n, generator=rng).argsort(dim=1)

    # `order` numbers the nodes anew, and the k-th points at the one with number target[k].
    order, queries, k, half = shuffled(), shuffled(), torch.arange(n), n // 2
    anywhere = torch.rand(size, n, generator=torch.Generator().manual_seed(seed + 1))
    if shape == "repeated queries":
        queries = torch.randint(n, (size, n), generator=rng)
    target = {
        "ring": (k + 1) % n,
        "two rings": (k + 1) % half + half * (k // half),
        "deep tree": (k - 1 - (anywhere * 2).long()).clamp(min=0),  # one of the two before it
        "repeated queries": torch.minimum(k + 1, half * (k // half + 1) - 1),
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
    """Mean state norm after NORM_LOOPS; rho(A); the gain of the first and of a settled loop."""
    most, settled = variants.NORM_LOOPS[-1], variants.MOST_LOOPS
    norms = mythos.diagnostics(model, tokens, n_loops=most)["state_norm"].mean(dim=(1, 2))
    rng = torch.Generator().manual_seed(0)
    return {
        "state_norm": {L: norms[L - 1].item() for L in variants.NORM_LOOPS},
        "rho": mythos.spectral_radius(model),
        "gain": {
            n: mythos.loop_gain(model, tokens, n_loops=n, generator=rng) for n in (0, settled)
        },
    }


def training_flops(model: RecurrentDepthTransformer, task, steps: int, total_loops: int) -> float:
    """Of a whole training: forward, and twice as many backward (fewer, if that is truncated)."""
    tokens, _, _ = task.batch(torch.Generator().manual_seed(0), 1)
    context, plain = tokens.shape[1] // 2, RecurrentDepthTransformer(model.config)
    once = mythos.flops_per_token(plain, 0, context)
    loop = mythos.flops_per_token(plain, 1, context) - once if plain.recurrent else 0
    return 3.0 * tokens.numel() * (steps * once + total_loops * loop)


# ---- Running ----


def run(kind: str, name: str, seed: int, results: Path, runs: Path, steps: int | None = None):
    """Train and measure one variant with one seed, unless the results have it. steps: None are the
    task's own."""
    path, checkpoint = results / f"{kind}.jsonl", runs / kind / f"{name}-seed{seed}.pt"
    if (kind, name, seed) in map(report.name_of, report.read_runs(path)):
        print(f"{path} has {name}, seed {seed}: delete its line, and {checkpoint}, to run it again")
        return
    variant = variants.find(kind, name)
    print(f"\n{kind} {name}, seed {seed}: {variant.what}")
    torch.manual_seed(seed)
    model, task = variant.build()
    steps, resume = steps or task.steps, checkpoint.exists()
    history = train(model, task, steps=steps, seed=seed, checkpoint=checkpoint, resume=resume)
    frontier = load_checkpoint(checkpoint)["frontier"]
    numbers = dict(task=kind, variant=name, seed=seed, steps=steps, frontier=frontier,
                   parameters=mythos.num_params(model),
                   active_parameters=mythos.num_params(model, active=True),
                   train_flops=training_flops(model, task, steps, sum(history["loops"])),
                   train_seconds=history["seconds"], data_crc=getattr(task, "data_crc", None),
                   machine=platform.processor() or platform.machine(), torch=torch.__version__,
                   threads=torch.get_num_threads())  # fmt: skip
    print("Measuring …", flush=True)
    report.add_run(path, numbers | measure(kind, model.eval(), task, frontier))


def show(kind: str, folder: Path) -> None:
    """The tables of the runs here, each above that of the published ones with the same seeds."""
    page, here = (report.HERE / "RESULTS.md").read_text("utf-8"), report.load(folder)
    names = {report.name_of(run) for runs in here[kind].values() for run in runs}
    published, same = report.load(report.RESULTS), {}
    for run in (run for runs in published[kind].values() for run in runs):
        if report.name_of(run) in names:
            same.setdefault(run["variant"], []).append(run)
    there = report.tables(page, published | {kind: same}, True)
    both = zip(report.tables(page, here, True), there, strict=True)
    for (_, task, ours), (_, _, theirs) in both:
        cells = "".join(row.split("|", 2)[2] for row in ours.splitlines()[3:])
        if task == kind and re.search(r"\d", cells):  # else it is not about these variants
            print(f"\nHere:\n{ours}Published, with the same seeds:\n{theirs}")


def main(arguments: list[str] | None = None) -> int:
    known, raw = variants.VARIANTS, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--task", choices=tuple(known), default="chains", help="default: chains")
    add("--only", nargs="+", metavar="VARIANT", help="train these (default: all of the task)")
    add("--seeds", type=int, nargs="+", help="default: those of RESULTS.md, mostly 10 to 14")
    add("--quick", action="store_true", help="one seed, 2 steps, under runs/quick/: a minute each")
    add("--publish", action="store_true", help="write to experiments/, RESULTS.md, README.md, too")
    args = parser.parse_args(arguments)
    runs = Path("runs/quick" if args.quick else "runs")
    results = report.RESULTS if args.publish else runs / "results"
    try:
        expect(not (args.quick and args.publish), "--quick", "--publish, too", "one of them")
        rows = {name: variants.find(args.task, name) for name in args.only or known[args.task]}
        if args.quick:  # a try of the code as it is now
            shutil.rmtree(runs, ignore_errors=True)
        for name, row in rows.items():
            for seed in args.seeds or row.seeds[: 1 if args.quick else None]:
                expect(0 <= seed < 2**32, "--seeds", seed, "0 to 2^32 − 1")
                run(args.task, name, seed, results, runs / "compare", 2 if args.quick else None)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(2, "Stopped; the same command continues\n")
    if args.publish:
        print(*report.write(publish=True), sep="\n")
    else:
        show(args.task, results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
