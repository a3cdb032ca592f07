# SPDX-License-Identifier: MIT
"""Tests of distributed.py: several processes train and answer like one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.testing import assert_close

from experiments import distributed


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text)]


@pytest.mark.slow
def test_two_ranks_are_like_one(capsys):
    """A mean of means, a gradient averaged, not summed, a router steered by its own rank's load, or
    by rank 0's; shards that lose the gradient of all loops, or micro-batches, but one; a message in
    each loop, for which a rank that has halted waits."""
    distributed.main([])
    wanted = numbers(capsys.readouterr().out)
    launch = "-m torch.distributed.run --nproc_per_node 2 -m experiments.distributed".split()
    how = dict(cwd=Path(__file__).parent.parent, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for flags in ([], ["--shard", "--parts=2"], ["--ddp", "--parts=2"], ["--shard", "--halt"]):
        command = [sys.executable, *launch, *flags]
        run = subprocess.run(command, **how, capture_output=True, text=True, timeout=500)
        if "--halt" in flags:
            assert run.stdout == "loops used on each rank: [1, 64]\n", run.stderr
        else:
            assert_close(numbers(run.stdout), wanted, rtol=1e-5, atol=0, msg=run.stderr)
