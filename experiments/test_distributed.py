# SPDX-License-Identifier: MIT
"""Tests of distributed.py: several processes train and answer like one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from experiments import distributed

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent


def launched(ranks, *flags):
    """What experiments/distributed.py prints, run by so many processes; none may wait for ever."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "experiments.distributed", *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_one_process_trains_the_same_in_every_way(monkeypatch, capsys):
    """A trainer that distributed.py has not followed, found by slow tests only; a loss or gradient
    that micro-batches, DDP or FSDP change."""
    train, numbers = distributed.train, []
    one_step = lambda *args, steps, **how: train(*args, steps=1, **how)  # noqa: E731
    monkeypatch.setattr(distributed, "train", one_step)
    for flags in ([], ["--parts", "2"], ["--ddp"], ["--shard", "--parts", "2"]):
        distributed.main(flags)
        step, bias = capsys.readouterr().out.splitlines()
        numbers.append([float(step.split()[i]) for i in (2, 4)])
        assert "-0.01" in bias
    assert_close(numbers, [numbers[0]] * 4, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_two_ranks_train_like_one(capsys):
    """A mean of means, a gradient averaged instead of summed, a router steered by its own rank's
    load, or by rank 0's that DDP puts in its place; sharded weights that lose the gradient of all
    loops but one, or of all micro-batches but one."""
    wanted = launched(1)
    assert len(wanted) == 9
    for flags in ([], ["--shard", "--parts", "2"], ["--ddp", "--parts", "2"]):
        got = launched(2, *flags)
        worst = []
        for column in (2, 4):  # of the gradient norm, and of the loss
            pairs = [[float(x.split()[column]) for x in lines[:-1]] for lines in (wanted, got)]
            worst.append(max(abs(a / b - 1) for a, b in zip(*pairs, strict=True)))
        with capsys.disabled():
            print("\n2 ranks {}: norms and losses differ by {:.1e}, {:.1e}".format(flags, *worst))
        assert max(worst) < 1e-5 and got[-1] == wanted[-1] and "-0." in got[-1]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--shard"]])
def test_a_rank_that_halts_waits_for_nobody(flags):
    """A message in each loop: the rank that has halted and the one that has not both hang."""
    assert launched(2, "--halt", *flags) == ["loops used on each rank: [1, 64]"]
