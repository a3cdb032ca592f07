# SPDX-License-Identifier: MIT
"""The moving picture of README: the staircase of accuracy, and queries on their way.

python -m experiments.show runs/chains-mla-seed0.pt      writes experiments/chains.gif
"""

import argparse
import sys
from pathlib import Path

import torch

from train_tiny import Chains, draw_staircase, load_model, logits_per_loop


def draw_moving(task, model, path: Path, last: int = 14) -> None:
    """A GIF, one frame a loop. Left: the staircase fills. Right: the queries on one test chain,
    each at its current answer: on the way, at the end of the chain, or elsewhere."""
    from matplotlib import figure
    from matplotlib.animation import PillowWriter

    accuracy, _ = task.measure(model, list(range(1, last + 1)))
    tokens, _, distance = (x[:1] for x in task.test_set())
    logits, _ = logits_per_loop(model, tokens, list(range(1, last + 1)))
    queries, hops = tokens[0, task.n_nodes :], distance[0]
    hops_of = torch.full((model.config.vocab_size,), -1)  # of a node; −1: in another chain
    hops_of[queries] = hops
    picture = figure.Figure(figsize=(9.6, 3.8), dpi=100, layout="constrained")
    left, right = picture.subplots(1, 2)
    writer = PillowWriter(fps=1)
    with writer.saving(picture, path, dpi=100):
        for t in [*range(1, last + 1), last, last]:
            left.clear()
            right.clear()
            draw_staircase(left, accuracy, task, rows=last, shown=t)
            left.set_title(f"after {t} loop{'s' * (t > 1)}: share of right answers", pad=18)
            named = hops_of[logits[t][0, task.n_nodes :].argmax(dim=-1)]
            for start, now in zip(hops.tolist(), named.tolist(), strict=True):
                if start < 0:
                    continue
                mark = "s" if now == 0 else "o" if now > 0 else "x"
                right.plot([start, max(now, 0)], [start, start], "-", color="0.8")
                right.plot(now if now >= 0 else -2, start, mark, color="C1" if now < 0 else "C0")
            right.set_xlim(task.longest - 0.5, -2.8)
            right.set_ylim(-0.6, task.longest - 0.4)
            right.set_xticks([10, 5, 0, -2], ["10 hops before", "5", "end", "elsewhere"])
            right.set_yticks(range(task.longest))
            right.set(xlabel="the node that is named", ylabel="hops to go")
            right.set_title("one sequence: ○ on the way, ■ at the end", pad=18)
            writer.grab_frame()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the moving picture of README.")
    parser.add_argument("checkpoint", help="of python train_tiny.py")
    path = Path(__file__).with_name("chains.gif")
    try:
        model = load_model(parser.parse_args(arguments).checkpoint)
    except ValueError as error:
        parser.error(str(error))
    draw_moving(Chains(), model, path)
    print(f"{path.name}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
