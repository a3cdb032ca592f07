# SPDX-License-Identifier: MIT
"""Play with what was trained.

    python -m experiments.ask "0-4 3-1 4-3 1-1 2-2"      the ends of these chains, loop by loop
    python -m experiments.ask "def " --checkpoint runs/text-mla-seed0.pt      a text, continued

Nodes are numbers from 0 to 19. Each node has one edge out; the end of a chain points to itself.
"""

import argparse
import re
from pathlib import Path

import torch

from experiments.command import run_as_program, say
from experiments.text import readable
from mythos import RecurrentDepthTransformer, expect
from train_tiny import Chains, load_checkpoint, load_model, logits_per_loop


def read_edges(text: str, n: int) -> dict[int, int]:
    """ "0-4 4→4" -> {0: 4, 4: 4}, one edge out of each node that is named."""
    parts = re.findall(r"\S+", text)
    pairs = [re.fullmatch(r"(\d+)(?:-|->|→)(\d+)", part) for part in parts]
    expect(parts and all(pairs), "edges", text, 'such as "0-4 3-1 4-3 1-1 2-2"')
    edges: dict[int, int] = {}
    for start, end in ([int(node) for node in pair.groups()] for pair in pairs):
        expect(max(start, end) < n, "edges", f"{start}-{end}", f"nodes from 0 to {n - 1}")
        expect(start not in edges, "edges", f"two out of {start}", "one out of each node")
        edges[start] = end
    for node in sorted({*edges.values()} - {*edges}):
        expect(False, "edges", f"none out of {node}", f"one; if a chain ends there, {node}-{node}")
    return edges


def ask_chains(model: RecurrentDepthTransformer, text: str, loops: int, halt: float) -> str:
    """The answers after 1, 2, … loops, those with halting, and the truth."""
    n, asked = Chains.n_nodes, read_edges(text, Chains.n_nodes)
    edges = {node: node for node in range(n)} | asked  # the others stand alone, as in training
    tokens = [n + n * start + end for start, end in edges.items()]
    tokens = torch.tensor([tokens + [*range(n)]])
    queries = sorted(asked)

    def row(name: str, values) -> str:
        return f"{name:>23}" + "".join(f"{value:4d}" for value in values)

    def answers(logits: torch.Tensor) -> list[int]:
        return logits[0, n:].argmax(dim=-1)[queries].tolist()

    logits, _ = logits_per_loop(model, tokens, list(range(1, loops + 1)))
    lines = [row("where ends the chain of", queries)]
    lines += [row(f"after {L} loop{'s' * (L > 1)}", answers(logits[L])) for L in logits]
    logits, used = logits_per_loop(model, tokens, [32], halt)
    lines.append(row(f"halting below {halt:g}", answers(logits[32])))
    lines.append(row("loops that it took", used[0, n:][queries].tolist()))
    truth = []
    for node in queries:
        for _ in range(n):
            node = asked[node]
        truth.append(f"{node:4d}" if asked[node] == node else "   –")  # a ring has no end
    lines.append(f"{'the truth':>23}" + "".join(truth))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Ask a trained model.")
    parser.add_argument("question", help='edges, "0-4 4-4", or the beginning of a text')
    default = Path("runs/chains-mla-seed0.pt")
    parser.add_argument("--checkpoint", type=Path, default=default, help=f"default: {default}")
    parser.add_argument("--loops", type=int, help="at most so many (chains: 8)")
    parser.add_argument("--halt", type=float, help="threshold (chains: 0.2; text: none)")
    parser.add_argument("--temperature", type=float, default=0.7, help="text: default 0.7")
    parser.add_argument("--bytes", type=int, default=256, help="text: how many to add (256)")
    parser.add_argument("--seed", type=int, default=0, help="text: another sample")
    args = parser.parse_args(arguments)
    try:
        saved, model = load_checkpoint(args.checkpoint), load_model(args.checkpoint)
        if saved["step"] < saved["run"]["steps"]:
            say(f"(not trained to its end: step {saved['step']} of {saved['run']['steps']})")
        if saved["run"]["task"] == Chains.name:
            halt = Chains.halt_threshold if args.halt is None else args.halt
            expect(args.loops is None or args.loops > 0, "--loops", args.loops, "1 or more")
            say(ask_chains(model, args.question, args.loops or 8, halt))
            return 0
        prompt = list(args.question.encode())
        expect(len(prompt) > 0, "question", "", "the beginning of a text")
        how = dict(n_loops=args.loops, halt_threshold=args.halt, temperature=args.temperature)
        rng = torch.Generator().manual_seed(args.seed)
        ids = model.generate(torch.tensor([prompt]), args.bytes, **how, top_p=0.95, generator=rng)
        say(readable(bytes(ids[0].tolist())))
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    run_as_program(main)
