# SPDX-License-Identifier: MIT
"""A second task, where depth is no walk along one path: Boolean circuits.

    python -m experiments.circuits          about 5 minutes; ends in PASS or FAIL

A circuit is written like a program of 16 variables, each after those it reads. A variable is an
input, 0 or 1, or the XOR (^) or NAND (!&) of two earlier ones. Then every variable is asked for:

    c=1 a=0 d=c^a b=c!&d | a b c d          answers: 0 0 1 1

A gate takes two tokens, one for each operand; an input takes the same token twice.

Depth: 0 for an input, 1 more than the deeper operand for a gate. (That is depth as written: a NAND
that reads a 0 is 1, whatever its other operand is.) The model is never told a depth, nor any value
on the way except the operands'. In training no circuit is more than 5 deep; the test asks for up to
10. A model that computes *one layer of gates per loop*, and then
stands still, gets all of it right.
"""

import sys
from dataclasses import replace

import torch
from torch import Tensor

from mythos import MythosConfig, get_model_config
from train_tiny import Chains, make_parser, run


class Circuits(Chains):
    """The values of a circuit's variables. Tokens, with n variables: i is variable i; n + 2·i + v
    says that input i is v; 3·n + (op·n + i)·n + j says that gate i reads j (op 0: XOR, 1: NAND).
    """

    name, example, steps, batch_size = "circuits", "a=1 b=0 c=a^b", 800, 32
    n_nodes = 16  # variables
    state_noise = 0.0  # 0.3, measured, slows the learning down here
    deep_loops = 12  # the deepest of training
    about = "each step draws its own number of loops; each time the loss falls, gates get deeper"
    difficulty, guess = "depth of the variable", 0.6  # the share of ones
    longest = 11  # the test asks for depths 0 … 10
    wanted = 0.95, 0.80
    halt_threshold = 0.02  # a gate that waits for its operands moves little, too
    near, input_share = 6, 0.2  # operands are among the last 6 variables; share of inputs, at least

    def config(self, attention_type: str) -> MythosConfig:
        n, tiny = self.n_nodes, get_model_config("tiny")
        return replace(tiny, attention_type=attention_type, vocab_size=3 * n + 2 * n * n)

    def draw_loops(self, generator: torch.Generator, frontier: int) -> int:
        """Enough for the deepest gates; or up to 3 more; or 12, so that the state learns to stand
        still: a third of the steps each."""

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        enough = frontier + 1
        return (enough, draw(enough, enough + 3), self.deep_loops)[draw(0, 2)]

    def batch(self, generator: torch.Generator, frontier: int) -> tuple[Tensor, Tensor, int]:
        """tokens and targets (B, 3n), and a number of loops."""
        n_loops = self.draw_loops(generator, frontier)
        tokens, values, _ = self.circuits(self.batch_size, frontier, generator)
        return tokens, values, n_loops

    def advance(self, frontier: int, n_loops: int, loss: float) -> int:
        """The frontier is the deepest circuits so far: once they are mastered, a layer more."""
        mastered = frontier < self.train_hops and loss < 0.15
        return frontier + 1 if mastered else frontier

    def circuits(self, B: int, deepest: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """tokens and values (B, 3n), and the depths (B, n) of the variables that are asked for."""
        n = self.n_nodes

        def random(*shape: int) -> Tensor:
            return torch.rand(B, *shape, generator=generator)

        names, tokens, values = random(n).argsort(dim=1), [], []
        value, depth = torch.zeros(2, B, n, dtype=torch.int64)
        for p in range(n):  # the variable in place p is called names[:, p]
            low, high = max(p - self.near, 0), max(p, 2)
            # Half of the gates read the two deepest variables near, or else few would be deep.
            rank = random(high - low) + depth[:, low:high] * (random(1) < 0.5)
            operands = low + rank.topk(2).indices  # (B, 2), two different places
            read, op = value.gather(1, operands), (random(1) < 0.5).long()
            d = 1 + depth.gather(1, operands).amax(dim=1, keepdim=True)
            is_input = (random(1) < self.input_share) | (d > deepest) | (p < 2)  # (B, 1)
            bit, i = (random(1) < 0.5).long(), names[:, p : p + 1]
            gate = 3 * n + (op * n + i) * n + names.gather(1, operands)
            tokens.append(torch.where(is_input, n + 2 * i + bit, gate))
            values.append(torch.where(is_input, bit, read))
            x, y = read.split(1, dim=1)
            out = torch.where(op == 0, x ^ y, 1 - (x & y))
            value[:, p : p + 1] = torch.where(is_input, bit, out)
            depth[:, p : p + 1] = d.masked_fill(is_input, 0)
        asked = random(n).argsort(dim=1)
        tokens, values = [*tokens, names.gather(1, asked)], [*values, value.gather(1, asked)]
        return torch.cat(tokens, dim=1), torch.cat(values, dim=1), depth.gather(1, asked)

    def test_set(self) -> tuple[Tensor, Tensor, Tensor]:
        """tokens (S, 3n); of the variables that are asked for (S, n) their values and depths."""
        generator = torch.Generator().manual_seed(12345)
        tokens, values, depth = self.circuits(self.test_size, self.longest - 1, generator)
        return tokens, values[:, -self.n_nodes :], depth


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("Train Mythos on Boolean circuits.", Circuits)
    return run(parser, arguments, lambda args: Circuits())


if __name__ == "__main__":
    sys.exit(main())
