# SPDX-License-Identifier: MIT
"""Ask what train_tiny.py has trained: edges, one out of each node; an end points to itself.

python -m experiments.ask "0-4 3-1 4-3 1-1 2-2"
"""

import argparse
import re
from pathlib import Path

import torch

from mythos import expect
from train_tiny import load_checkpoint, load_model, logits_per_loop


def read_chains(text: str, n: int) -> tuple[list, list, list, int]:
    """Tokens, the nodes that are named, the ends of their chains, the hops to the farthest."""
    parts = [re.fullmatch(r"(\d+)(?:->?|→)(\d+)", p) for p in text.replace(",", " ").split()]
    edges = {int(part[1]): int(part[2]) for part in parts if part}
    ok = 0 < len(edges) == len(parts) and max(edges) < n and {*edges.values()} <= {*edges}
    wanted = f"one edge out of each node named, 0 to {n - 1}; an end points to itself: 0-4 4-4"
    expect(ok, "chains", text, wanted)
    ends, hops = [*edges], 0
    while hops < len(edges) and any(edges[end] != end for end in ends):
        ends, hops = [edges[end] for end in ends], hops + 1
    truth = [end if edges[end] == end else "ring" for end in ends]
    others = {node: node for node in range(n) if node not in edges}  # alone, as in training
    tokens = [n + n * i + j for i, j in (edges | others).items()]
    return [*tokens, *edges, *others], [*edges], truth, hops


def answer(args: argparse.Namespace) -> str:
    """A table: the nodes, the answers after each loop and with halting, the truth."""
    for flag, least in dict(loops=1, halt=0).items():
        got = vars(args)[flag]
        expect(got is None or least <= got <= 1000, f"--{flag}", got, f"{least} to 1000")
    saved, model = load_checkpoint(args.checkpoint), load_model(args.checkpoint)
    recipe, done = saved["recipe"], len(saved["history"]["loss"])
    expect(recipe["name"] == "chains", "--checkpoint", recipe["name"], "one of chains")
    n, halt = recipe["n_nodes"], recipe["halt_threshold"] if args.halt is None else args.halt
    tokens, names, truth, needed = read_chains(" ".join(args.question), n)
    loops, ids = args.loops or needed + 2, torch.tensor([tokens])
    most = max(loops, 32)
    logits, _ = logits_per_loop(model, ids, [*range(1, loops + 1)])
    halted, used = logits_per_loop(model, ids, [most], halt)
    said = {f"after loop {L}": logits[L] for L in logits} | {f"halting below {halt}": halted[most]}
    # The queries come last, first those that were asked.
    rows = {name: x[0, -n:].argmax(dim=-1).tolist() for name, x in said.items()}
    rows = {"asked": names} | rows | {"loops used": used[0, -n:].tolist(), "the truth": truth}
    cells = {name: "".join(f"{x:>5}" for x in row[: len(names)]) for name, row in rows.items()}
    told = f"(trained for {done} of {recipe['steps']} steps)\n" * (done < recipe["steps"])
    return told + "\n".join(f"{name:>20}{row}" for name, row in cells.items())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(epilog=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    path = "runs/chains-mla-seed0.pt"
    parser.add_argument("question", nargs="+", help="edges, such as 0-4")
    parser.add_argument("--checkpoint", type=Path, default=path, help=f"default: {path}")
    parser.add_argument("--loops", type=int, help="default: as many as needed, and 2 more")
    parser.add_argument("--halt", type=float, help="threshold (default: that of its training)")
    args = parser.parse_args(arguments)
    try:
        print(answer(args))
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
