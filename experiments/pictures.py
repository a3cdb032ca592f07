# SPDX-License-Identifier: MIT
"""Pictures of the trainer's results. They need matplotlib, and no display."""

from pathlib import Path

from matplotlib import figure


def draw_chains(task, results: dict, path: Path) -> None:
    """Left: the staircase, accuracy by loops and hops. Right: the loops that halting spends.

    task: train_tiny.Chains, results: what its `evaluate` returned.
    """
    accuracy, h = results["accuracy"], results["halting"][task.halt_threshold]
    hops, x = range(task.longest), "hops to the end of the chain"
    right_share = 100 * sum(h["accuracy"]) / len(h["accuracy"])
    picture = figure.Figure(figsize=(11, 4.2), layout="constrained")
    left, right = picture.subplots(1, 2)
    grid = [[100 * a for a in accuracy[L]] for L in range(1, 17)]
    extent = (-0.5, task.longest - 0.5, 0.5, 16.5)
    image = left.imshow(grid, origin="lower", aspect="auto", extent=extent, vmin=0, vmax=100)
    picture.colorbar(image, ax=left, label="accuracy (%)")
    left.axvline(task.train_hops + 0.5, color="white", linestyle="--")
    left.text(task.train_hops + 0.7, 1, "in no training answer →", color="white")
    left.set(xlabel=x, ylabel="loops", title="One hop per loop")
    right.plot(hops, h["loops"], "o-", label=f"halting when change < {task.halt_threshold}")
    right.plot(hops, hops, "k:", label="the least possible: one per hop")
    title = f"Harder questions get more loops ({right_share:.1f}% right)"
    right.set(xlabel=x, ylabel="loops used", title=title)
    right.legend()
    picture.savefig(path, dpi=120, format="png")
