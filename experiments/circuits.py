# SPDX-License-Identifier: MIT
"""A second task, where depth is no walk along one path: Boolean circuits. About 5 minutes.

A circuit is written like a program of 16 variables, each after those it reads. A variable is an
input, 0 or 1, or the XOR or NAND of two earlier ones. Then every variable is asked for:

    c=1 a=0 d=xor(c,a) b=nand(c,d) | a b c d          answers: 0 0 1 1

Depth: 0 for an input, 1 more than the deeper operand for a gate, whatever their values. The model
is never told a depth, nor any value on the way except the operands'. Training goes 5 deep, the test
10. A model that computes *one layer of gates per loop*, and then stands still, gets all right.
"""

from dataclasses import replace

import torch
from torch import Tensor

from mythos import MythosConfig
from train_tiny import Chains, make_parser, run


class Circuits(Chains):
    """The values of a circuit's variables. Tokens, with n variables: i is variable i; n + 2·i + v
    says that input i is v; 3·n + (op·n + i)·n + j says that gate i reads j (op 0: XOR, 1: NAND).
    A gate takes two tokens, one for each operand; an input takes the same token twice."""

    name = "circuits"
    n_nodes, steps, batch_size = 16, 800, 32  # nodes: variables
    state_noise = 0.0  # 0.3, measured, slows the learning down here
    deep_loops = 12  # at most, in training
    about = "each step draws its own number of loops; each time the loss falls, gates get deeper"
    difficulty, guess = "depth of the variable", 0.6  # the share of ones
    longest, wanted, ring_hops = 11, (0.95, 0.80), 0  # the test asks for depths 0 … 10
    halt_threshold = 0.02  # a gate that waits for its operands moves little, too
    near, input_share = 6, 0.2  # operands are among the last 6 variables; share of inputs, at least

    def config(self, attention_type: str) -> MythosConfig:
        """A up to 0.5: with 0.95 some seeds learn XOR too late."""
        vocab_size = 3 * self.n_nodes + 2 * self.n_nodes**2
        other = dict(vocab_size=vocab_size, spectral_radius_target=0.5)
        return replace(super().config(attention_type), **other)

    def draw_loops(self, generator: torch.Generator, frontier: int) -> int:
        """Enough for the deepest gates; or up to 3 more; or 12, so that the state learns to stand
        still: a third of the steps each."""
        more = int(torch.randint(4, (), generator=generator))
        which = int(torch.randint(3, (), generator=generator))
        return (frontier + 1, frontier + 1 + more, self.deep_loops)[which]

    def batch(self, generator: torch.Generator, frontier: int) -> tuple[Tensor, Tensor, int]:
        """tokens and targets (B, 3n), and a number of loops."""
        n_loops = self.draw_loops(generator, frontier)
        return *self.circuits(self.batch_size, frontier, generator)[:2], n_loops

    def advance(self, frontier: int, n_loops: int, loss: float) -> int:
        """The frontier is the deepest circuits so far: once they are mastered, a layer more."""
        return frontier + 1 if frontier < self.train_hops and loss < 0.15 else frontier

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
            value[:, p : p + 1] = torch.where(op == 0, x ^ y, 1 - (x & y)).where(~is_input, bit)
            depth[:, p : p + 1] = d.masked_fill(is_input, 0)
        asked = random(n).argsort(dim=1)
        tokens, values = [*tokens, names.gather(1, asked)], [*values, value.gather(1, asked)]
        return torch.cat(tokens, dim=1), torch.cat(values, dim=1), depth.gather(1, asked)

    def test_set(self) -> tuple[Tensor, Tensor, Tensor]:
        """tokens (S, 3n); of the variables that are asked for (S, n) their values and depths. Each
        circuit is as deep as the test goes: else only one variable in 70 would be."""
        generator = torch.Generator().manual_seed(12345)
        tokens, values, depth = self.circuits(10 * self.test_size, self.longest - 1, generator)
        deep = (depth == self.longest - 1).any(dim=1).nonzero()[: self.test_size, 0]
        return tokens[deep], values[deep, -self.n_nodes :], depth[deep]


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("Train Mythos on Boolean circuits.", Circuits)
    return run(parser, arguments, lambda args: Circuits())


if __name__ == "__main__":
    raise SystemExit(main())
