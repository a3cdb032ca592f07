# SPDX-License-Identifier: MIT
"""What the trainer's results look like: tables, a picture, and a moving one.

python -m experiments.show runs/chains-mla-seed0.pt      writes experiments/chains.gif
"""

import argparse
from pathlib import Path
from statistics import fmean as mean

import torch

from experiments.command import run_as_program, say, write_atomically

NEVER = "beyond training →"


def tables_of_chains(task, results: dict) -> str:
    """What `evaluate` measured, as text."""
    accuracy, hops = results["accuracy"], "".join(f"{k:5d}" for k in range(task.longest))
    lines = [
        f"Test: {task.test_size} sequences. Guessing would score {results['guess']:.0%}.",
        f"\nAccuracy (%) after so many loops (rows) by {task.difficulty} (columns)",
        f"loops {hops}",
    ]
    for L in (1, 2, 4, 5, 6, 8, 10, 12, 16, 20, 24, 28, 32):
        lines.append(f"{L:5d} " + "".join(f"{100 * a:5.0f}" for a in accuracy[L]))
    lines.append("\nHalting threshold (rows): loops used, then mean loops and accuracy")
    lines.append(f"      {hops}   loops accuracy")
    for threshold, h in results["halting"].items():
        row = f"{threshold:5.2f} " + "".join(f"{used:5.1f}" for used in h["loops"])
        lines.append(f"{row}  {mean(h['loops']):6.1f} {100 * mean(h['accuracy']):7.1f}%")
    best = max(accuracy, key=lambda L: mean(accuracy[L]))
    lines.append(f"The best fixed number of loops, {best}: {100 * mean(accuracy[best]):28.1f}%")
    return "\n".join(lines)


def draw_staircase(axes, accuracy: dict, task, rows: int, shown: int):
    """Accuracy by hops (columns) after 1 … `rows` loops, of which only `shown` are drawn."""
    grid = [[100 * a for a in accuracy[L]] for L in range(1, shown + 1)]
    grid += [[float("nan")] * task.longest] * (rows - shown)
    extent = (-0.5, task.longest - 0.5, 0.5, rows + 0.5)
    how = dict(origin="lower", aspect="auto", vmin=0, vmax=100, cmap="Blues")
    image = axes.imshow(grid, extent=extent, **how)
    axes.axvline(task.train_hops + 0.5, color="C1", linestyle="--", linewidth=2)
    axes.text(task.train_hops + 0.6, rows + 0.7, NEVER, color="C1", fontsize="small")
    axes.set(xlabel=task.difficulty, ylabel="loops")
    axes.set_xticks(range(task.longest))
    return image


def draw_chains(task, results: dict, path: Path) -> None:
    """Left: the staircase, accuracy by loops and hops. Right: the loops that halting spends.

    task: train_tiny.Chains, results: what its `evaluate` returned.
    """
    from matplotlib import figure  # it needs no display

    h, hops = results["halting"][task.halt_threshold], range(task.longest)
    picture = figure.Figure(figsize=(11, 4.2), layout="constrained")
    left, right = picture.subplots(1, 2)
    image = draw_staircase(left, results["accuracy"], task, rows=16, shown=16)
    picture.colorbar(image, ax=left, label="accuracy (%)")
    left.set_title("Accuracy after so many loops", pad=18)
    right.plot(hops, h["loops"], "o-", color="C0")
    right.plot(hops, hops, ":", color="black")
    right.text(6.6, h["loops"][7], "spent by halting", ha="right", color="C0")
    right.text(6.6, 5.2, "the least possible:\none for each")
    right.set_title(f"Halting: {100 * mean(h['accuracy']):.1f}% right", pad=18)
    right.set(xlabel=task.difficulty, ylabel="loops")
    picture.savefig(path, dpi=120, format="png")


def draw_moving(task, model, path: Path, last: int = 14) -> None:
    """A GIF, one frame a loop. Left: the staircase fills. Right: the queries on one test chain,
    each at its current answer: on the way, at the end of the chain, or elsewhere."""
    from matplotlib import figure
    from matplotlib.animation import PillowWriter

    from train_tiny import logits_per_loop

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
    from train_tiny import Chains, load_model

    parser = argparse.ArgumentParser(description="Draw the moving picture of README.")
    parser.add_argument("checkpoint", help="of python train_tiny.py")
    checkpoint = parser.parse_args(arguments).checkpoint
    path, task = Path(__file__).with_name("chains.gif"), Chains()
    try:
        model = load_model(checkpoint)
    except ValueError as error:
        parser.error(str(error))
    write_atomically(path, lambda path: draw_moving(task, model, path))
    say(f"{path.name}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    run_as_program(main)
