# SPDX-License-Identifier: MIT
"""Tests of gpu.py, in its CPU form. None asserts a time."""

import dataclasses
import json
import subprocess
import types
from pathlib import Path

import pytest
import torch

import train_tiny
from experiments import bench, gpu
from mythos import get_model_config

torch.set_num_threads(1)
TINY = dataclasses.replace(get_model_config("tiny"), d_model=32, n_heads=2, max_loop_iters=2)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Shapes that take no time; trainings of one step, and tests that only say how they ended."""
    for name, value in dict(
        get_model_config=lambda name: TINY, PRODUCT=16, TOY_BATCH=(2, 8),
        LARGE_BATCH=(2, 8), CONTEXTS=(4,), EXPERTS=(8, 16),
    ).items():  # fmt: skip
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "SEQUENCES", 1)
    monkeypatch.setattr(bench, "llama", lambda *_: torch.nn.Embedding(420, 420))
    monkeypatch.setattr(train_tiny.Chains, "config", lambda self, kind: TINY)
    monkeypatch.setattr(train_tiny.Chains, "test_size", 25)
    monkeypatch.setattr(train_tiny.Chains, "batch_size", 2)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    outcome = types.SimpleNamespace(tests="3 passed in 1s", exit=0, text=True, commands=[])
    really_run = subprocess.run

    def run(command, **options):
        if gpu.sys.executable not in command:  # the name of the machine
            return really_run(command, **options)
        outcome.commands.append(command)
        if "train_tiny" in command:
            folder = command[command.index("--out") + 1]
            monkeypatch.setattr(train_tiny.Chains, "steps", 1)
            train_tiny.main(["--out", folder, "--device", "cpu"])
        if "experiments.text" in command and outcome.text:
            path, checks = Path(command[command.index("--out") + 1]), [["bits", 1.5, "<=", 2.0]]
            results = dict(passed=True, seconds=9.0, train_seconds=8.0, checks=checks)
            (path / "text-mla-seed0.json").write_text(json.dumps(results))
        return subprocess.CompletedProcess(command, outcome.exit, f"..\n{outcome.tests}\n", "")

    monkeypatch.setattr(gpu.subprocess, "run", run)
    return outcome


@pytest.mark.slow
def test_every_part_runs_and_is_kept(small, tmp_path, capsys):
    """A part that crashes, a row that is lost, a verdict that the exit status hides; one part anew
    that forgets the others; a run on the wrong device."""
    path = tmp_path / "gpu.json"
    flags = ["--device", "cpu", "--results", str(path)]
    assert gpu.main(flags) == 1  # after one step the toy is FAIL
    pytest_command, toy, _ = small.commands
    assert pytest_command[pytest_command.index("-k") + 1] == "cpu"
    assert toy[toy.index("--device") + 1] == "cpu"
    parts = json.loads(path.read_text())["parts"]
    assert list(parts) == list(gpu.PARTS)
    rows = {what: value for part in parts.values() for what, value in part}
    for start, value in {
        "`pytest -k cpu`": "3 passed in 1s", "`python -m train_tiny`": "FAIL",
        "`python -m experiments.text`": "PASS: 9 s, 8 s of it training",
        "  bits": "1.500 (wanted <= 2.000)", "the toy's 20 queries": "times as fast",
        "a matrix product of 16³": "GFLOP/s", "the toy: ": "% of the product's",
        "1B: ": "tokens/s", "1B, GQA: ": "tokens/s", "1B, GQA, no experts: ": "tokens/s",
        "1B, weights cast once": "tokens/s", "a Llama with": "tokens/s",
        "2 of 16 experts": "as a loop", "1B, MLA, 4 tokens cached": "steps/s",
        "1B, GQA, 4 tokens cached": "steps/s", "one looped layer, 16 experts": "steps/s",
    }.items():  # fmt: skip
        assert any(what.startswith(start) and value in got for what, got in rows.items()), start
    assert gpu.main([*flags, "--only", "tests"]) == 0 and len(small.commands) == 4
    assert {**json.loads(path.read_text())["parts"], "tests": 0} == {**parts, "tests": 0}
    small.text = False
    assert gpu.main([*flags, "--only", "verdicts"]) == 1
    assert "FAIL: it wrote no results" in path.read_text()
    numbers = json.loads(path.read_text())
    path.write_text(json.dumps(numbers | {"machine": "another"}))
    with pytest.raises(SystemExit):  # one table, one machine
        gpu.main([*flags, "--only", "tests"])
    assert "gpu.json, machine: got 'another', expected" in capsys.readouterr().err
    path.write_text(json.dumps(numbers))
    small.tests, small.exit = "7 deselected in 1s", 5
    assert gpu.main([*flags, "--only", "tests"]) == 1
    small.tests = "FAILED test_mythos.py::test_x[cuda] - AssertionError: no\n1 failed, 2 passed"
    assert gpu.main([*flags, "--only", "tests"]) == 1
    written = (tmp_path / "SPEED.md").read_text()
    assert (
        "| `pytest -k cpu` of what has a device | 1 failed, 2 passed (failed: exit 5) |" in written
    )
    assert "|   FAILED test_mythos.py::test_x[cuda] | AssertionError: no |" in written
    assert "### Decoding" in written and "`python -m experiments.gpu`" in written


def test_refuses_the_projects_own_speed_md(tmp_path, monkeypatch, capsys):
    """A JSON of a user's that rewrites the numbers that are kept."""
    monkeypatch.setattr(bench, "SPEED", tmp_path / "SPEED.md")
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--results", str(tmp_path / "mine.json")])
    assert "--results: got" in capsys.readouterr().err
