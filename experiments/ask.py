# SPDX-License-Identifier: MIT
"""Play with what was trained.

    python -m experiments.ask "0-4 3-1 4-3 1-1 2-2"      the ends of these chains, loop by loop
    python -m experiments.ask "a=1 b=0 c=a^b" --checkpoint runs/circuits-mla-seed0.pt    a circuit
    python -m experiments.ask "def " --checkpoint runs/text-mla-seed0.pt      a text, continued

Nodes are numbers from 0 to 19. Each node has one edge out; the end of a chain points to itself.
A circuit has up to 16 variables, one letter each: an input (0 or 1), or the XOR (x^y) or NAND
(x!&y) of two that stand before it.
"""

import argparse
import re
import sys
from pathlib import Path

import torch

from experiments.circuits import Circuits
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


def read_circuit(text: str, n: int) -> dict[str, tuple]:
    """ "a=1 b=0 c=a^b" -> {"a": (1,), "b": (0,), "c": ("^", "a", "b")}: a value or a gate."""
    form = r"([^\W\d])=(?:([01])|([^\W\d])(\^|!&)([^\W\d]))"
    parts = [re.fullmatch(form, part) for part in re.findall(r"\S+", text)]
    expect(0 < len(parts) <= n, "circuit", text, f"1 to {n} variables")
    expect(all(parts), "circuit", text, 'such as "a=1 b=0 c=a^b d=c!&a"')
    circuit: dict[str, tuple] = {}
    for name, bit, x, op, y in (part.groups() for part in parts):
        expect(name not in circuit, "circuit", f"{name} twice", "each variable once")
        known = bit or {x, y} <= {*circuit}
        expect(known, "circuit", f"{name}={x}{op}{y}", "operands that are defined before")
        expect(bit or x != y, "circuit", f"{name}={x}{op}{y}", "two different operands")
        circuit[name] = (int(bit),) if bit else (op, x, y)
    return circuit


def table(model: RecurrentDepthTransformer, tokens: list[int], places: list[int], loops: int,
          halt: float, head: str, names: list, truth: list) -> str:  # fmt: skip
    """The answers at some places of a sequence after 1, 2, … loops, and with halting."""

    def row(name: str, values) -> str:
        return f"{name:>23}" + "".join(f"{value:>4}" for value in values)

    def answers(logits: torch.Tensor) -> list[int]:
        return logits[0].argmax(dim=-1)[places].tolist()

    logits, _ = logits_per_loop(model, torch.tensor([tokens]), list(range(1, loops + 1)))
    lines = [row(head, names)]
    lines += [row(f"after {L} loop{'s' * (L > 1)}", answers(logits[L])) for L in logits]
    logits, used = logits_per_loop(model, torch.tensor([tokens]), [32], halt)
    lines.append(row(f"halting below {halt:g}", answers(logits[32])))
    lines.append(row("loops used", used[0][places].tolist()))
    return "\n".join([*lines, row("the truth", truth)])


def ask_chains(model: RecurrentDepthTransformer, text: str, loops: int, halt: float) -> str:
    """Where each chain ends."""
    n, asked = Chains.n_nodes, read_edges(text, Chains.n_nodes)
    edges = {node: node for node in range(n)} | asked  # the others stand alone, as in training
    tokens, truth = [n + n * start + end for start, end in edges.items()], []
    for node in sorted(asked):
        for _ in range(n):
            node = asked[node]
        truth.append(node if asked[node] == node else "–")  # a ring has no end
    places, head = [n + node for node in sorted(asked)], "the end of the chain of"
    told = table(model, tokens + [*range(n)], places, loops, halt, head, sorted(asked), truth)
    return told + "\n(a ring has no end)" * ("–" in truth)


def ask_circuit(model: RecurrentDepthTransformer, text: str, loops: int, halt: float) -> str:
    """The value of each variable."""
    n, circuit = Circuits.n_nodes, read_circuit(text, Circuits.n_nodes)
    others = n - len(circuit)  # inputs that are 0, before the rest: all sequences have one length
    number = {name: others + i for i, name in enumerate(circuit)}
    tokens, value = [n + 2 * i for i in range(others) for _ in range(2)], {}
    for name, (op, *operands) in circuit.items():
        if operands:
            gate = 3 * n + (("^", "!&").index(op) * n + number[name]) * n
            tokens += [gate + number[x] for x in operands]
            x, y = (value[x] for x in operands)
            value[name] = x ^ y if op == "^" else 1 - (x & y)
        else:
            tokens += [n + 2 * number[name] + op] * 2
            value[name] = op
    places, names = [2 * n + i for i in number.values()], [*circuit]
    tokens += range(n)
    return table(model, tokens, places, loops, halt, "variable", names, [*value.values()])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Ask a trained model.")
    parser.add_argument("question", help='edges, "0-4 4-4", a circuit or a text')
    default = Path("runs/chains-mla-seed0.pt")
    parser.add_argument("--checkpoint", type=Path, default=default, help=f"default: {default}")
    parser.add_argument("--loops", type=int, help="answers after 1 … so many (8); text: loops")
    parser.add_argument(
        "--halt", type=float, help="threshold (chains: 0.2; circuits: 0.02; text: none)"
    )
    parser.add_argument("--temperature", type=float, default=0.7, help="text: default 0.7")
    parser.add_argument("--bytes", type=int, default=256, help="text: how many to add (256)")
    parser.add_argument("--seed", type=int, default=0, help="text: another sample")
    args = parser.parse_args(arguments)
    try:
        saved, model = load_checkpoint(args.checkpoint), load_model(args.checkpoint)
        done, steps = len(saved["history"]["loss"]), saved["recipe"]["steps"]
        if done < steps:
            print(f"(not trained to its end: step {done} of {steps})")
        asks = {Chains.name: (Chains, ask_chains), Circuits.name: (Circuits, ask_circuit)}
        name = saved["recipe"]["name"]
        if name in asks:
            task, ask = asks[name]
            halt = task.halt_threshold if args.halt is None else args.halt
            expect(args.loops is None or args.loops > 0, "--loops", args.loops, "1 or more")
            print(ask(model, args.question, args.loops or 8, halt))
            return 0
        prompt = list(args.question.encode())
        expect(len(prompt) > 0, "question", "", "the beginning of a text")
        how = dict(n_loops=args.loops, halt_threshold=args.halt, temperature=args.temperature)
        rng = torch.Generator().manual_seed(args.seed)
        ids = model.generate(torch.tensor([prompt]), args.bytes, **how, top_p=0.95, generator=rng)
        print(readable(bytes(ids[0].tolist())))
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
