# SPDX-License-Identifier: MIT
"""Tests of circuits.py. Docstrings name the mistakes."""

import dataclasses
import json

import pytest
import torch

from experiments import circuits
from experiments.circuits import Circuits

torch.set_num_threads(1)


@pytest.fixture
def small(monkeypatch):
    """Circuits shrunk to what a test can train."""
    full, tiny = Circuits.config, dict(d_model=32, n_heads=2, num_experts=4)
    config = lambda self, kind: dataclasses.replace(full(self, kind), **tiny)  # noqa: E731
    for name, value in dict(config=config, steps=1, test_size=60, batch_size=2).items():
        monkeypatch.setattr(Circuits, name, value)


def compute(row: list[int], n: int) -> tuple[dict[int, int], dict[int, int]]:
    """Value and depth of each variable, from the tokens alone, one variable at a time."""
    value, depth = {}, {}
    for first, second in zip(row[: 2 * n : 2], row[1 : 2 * n : 2], strict=True):
        if first < 3 * n:
            assert first == second, "an input is one token, twice"
            i, bit = divmod(first - n, 2)
            value[i], depth[i] = bit, 0
            continue
        (op, i, x), (same_op, same_i, y) = (
            ((t - 3 * n) // n**2, (t - 3 * n) // n % n, (t - 3 * n) % n) for t in (first, second)
        )
        assert (op, i) == (same_op, same_i) and x != y
        assert i not in value and {x, y} <= {*value}, "a gate follows its operands"
        value[i] = int(value[x] != value[y]) if op == 0 else int(not (value[x] and value[y]))
        depth[i] = 1 + max(depth[x], depth[y])
    assert sorted(value) == [*range(n)]
    return value, depth


@pytest.mark.parametrize("deepest", [1, 5, 10])
def test_values_and_depths_are_those_of_the_circuit(deepest):
    """A wrong value, a gate before its operands, one deeper than the curriculum allows; operands
    from too far away; too few inputs."""
    task, generator = Circuits(), torch.Generator().manual_seed(deepest)
    tokens, values, depths = task.circuits(30, deepest, generator)
    n, seen, back = task.n_nodes, set(), set()
    for row, said, deep in zip(tokens.tolist(), values.tolist(), depths.tolist(), strict=True):
        value, depth = compute(row, n)
        asked = row[2 * n :]
        assert sorted(asked) == [*range(n)] and max(depth.values()) <= deepest
        assert said[2 * n :] == [value[i] for i in asked] and deep == [depth[i] for i in asked]
        for token, bit in zip(row[: 2 * n], said[: 2 * n], strict=True):
            own = token < 3 * n
            assert bit == value[(token - n) // 2 if own else (token - 3 * n) % n]
        place = {i: p for p, i in enumerate(value)}  # in the order of their definition
        gates = [(p // 2, t - 3 * n) for p, t in enumerate(row[: 2 * n]) if t >= 3 * n]
        back |= {p - place[operand % n] for p, operand in gates}
        seen |= {*deep}
    assert back == {*range(1, 7)} and (tokens[:, : 2 * n] < 3 * n).float().mean() > 0.2
    assert seen == {*range(deepest + 1)} and tokens.max() < task.config("mla").vocab_size


def test_training_circuits_are_at_most_five_deep_and_the_loops_reach():
    """A training answer as deep as those of the test, too few loops for it, no deep steps; a test
    that can be guessed."""
    task, generator = Circuits(), torch.Generator().manual_seed(0)
    drawn = [task.draw_loops(generator, 5) for _ in range(300)]
    assert {*drawn} == {6, 7, 8, 9, 12} and 60 < drawn.count(12)
    for _ in range(3):
        tokens, values, _ = task.batch(generator, 5)
        assert tokens.shape == values.shape == (task.batch_size, 3 * task.n_nodes)
        assert max(max(compute(row, task.n_nodes)[1].values()) for row in tokens.tolist()) == 5
    tokens, values, depth = task.test_set()
    for row, said in zip(tokens[:20].tolist(), values[:20].tolist(), strict=True):
        value, _ = compute(row, task.n_nodes)
        assert said == [value[i] for i in row[-task.n_nodes :]]
    assert abs(values.float().mean() - task.guess) < 0.03
    for k in range(task.longest):
        assert 0.35 < values[depth == k].float().mean() < 0.7 and (depth == k).sum() >= 100


def test_curriculum_waits_for_what_is_mastered():
    """Deeper circuits before these are learned; a training answer deeper than 5."""
    for frontier, loss, expected in ((1, 0.16, 1), (1, 0.14, 2), (4, 0.0, 5), (5, 0.0, 5)):
        assert Circuits().advance(frontier, 3, loss) == expected


def test_command_trains_measures_and_judges(small, tmp_path, capsys):
    """A command that does not run, or that passes an untrained model."""
    assert circuits.main(["--steps", "1", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "depth of the variable" in out and "Guessing would score 60%" in out
    numbers = json.loads((tmp_path / "circuits-mla-seed0.json").read_text())
    assert [c[2:] for c in numbers["checks"]][:2] == [[">=", 0.95], [">=", 0.80]]
    assert len(numbers["accuracy"]["12"]) == 11 and (tmp_path / "circuits-mla-seed0.png").exists()
