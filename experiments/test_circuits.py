# SPDX-License-Identifier: MIT
"""Tests of circuits.py. Docstrings name the mistakes."""

import torch

from experiments.circuits import Circuits


def compute(row: list[int], n: int) -> tuple[dict[int, int], dict[int, int]]:
    """Value and depth of each variable, from the tokens alone, one variable at a time."""
    value, depth = {}, {}
    for first, second in zip(row[: 2 * n : 2], row[1 : 2 * n : 2], strict=True):
        gate, x, y = (first - 3 * n) // n, first % n, second % n
        i = (first - n) // 2 if first < 3 * n else gate % n
        assert i not in value
        if first < 3 * n:
            assert first == second, "an input is one token, twice"
            value[i], depth[i] = (first - n) % 2, 0
        else:
            assert gate == (second - 3 * n) // n and x != y and {x, y} <= {*[*value][-6:]}
            value[i] = int(value[x] != value[y]) if gate < n else int(not (value[x] and value[y]))
            depth[i] = 1 + max(depth[x], depth[y])
    return value, depth


def test_circuits_are_what_they_say():
    """A wrong value or depth; a gate too far from its operands; none as deep as the curriculum
    allows, or a deeper one; answers easy to guess; too few inputs, loops, or deep tests."""
    task, rng, n = Circuits(), torch.Generator().manual_seed(0), Circuits.n_nodes
    for deepest in (1, 5, 10):
        tokens, values, depths = task.circuits(30, deepest, rng)
        for row, said, deep in zip(tokens.tolist(), values.tolist(), depths.tolist(), strict=True):
            (value, depth), asked = compute(row, n), row[2 * n :]
            read = [value[(t - n) // 2 if t < 3 * n else t % n] for t in row[: 2 * n]]
            assert sorted(asked) == [*range(n)] and said == read + [value[i] for i in asked]
            assert deep == [depth[i] for i in asked]
        assert depths.max() == deepest and tokens.max() < task.config("mla").vocab_size
    assert {task.draw_loops(rng, 5) for _ in range(300)} == {6, 7, 8, 9, 12}
    _, values, depth = task.test_set()
    assert len(depth) == 500 and depth.amax(dim=1).tolist() == [10] * 500
    shares = [values[depth == k].float().mean() for k in range(task.longest)]
    assert 0.35 < min(shares) and max(shares) < 0.7 and abs(values.float().mean() - 0.6) < 0.03
    assert [task.advance(k, 3, x) for k, x in ((1, 0.16), (1, 0.1), (4, 0), (5, 0))] == [1, 2, 5, 5]
