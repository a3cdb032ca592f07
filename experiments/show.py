# SPDX-License-Identifier: MIT
"""Draw the moving picture of README: python -m experiments.show runs/chains-mla-seed0.pt"""

import argparse
from pathlib import Path

from mythos import expect
from train_tiny import Chains, draw_staircase, load_checkpoint, load_model, logits_per_loop


def draw_moving(task, model, path: Path, last: int = 14) -> None:
    """A GIF, one frame a loop. Left: the staircase fills. Right: the queries on one test chain,
    each at its current answer: on the way, at the end of the chain, or elsewhere."""
    from matplotlib import figure
    from matplotlib.animation import PillowWriter

    loops, n = [*range(1, last + 1)], task.n_nodes
    accuracy, _ = task.measure(model, loops)
    tokens, _, distance = (x[:1] for x in task.test_set())
    logits, _ = logits_per_loop(model, tokens, loops)
    hops = dict(zip(tokens[0, n:].tolist(), distance[0].tolist(), strict=True))
    left, right = figure.Figure(figsize=(9.6, 3.8), dpi=100, layout="constrained").subplots(1, 2)
    writer = PillowWriter(fps=1)
    with writer.saving(left.figure, path, dpi=100):
        for t in [*loops, last, last]:
            left.clear()
            right.clear()
            draw_staircase(left, accuracy, task, rows=last, shown=t)
            left.set_title(f"after {t} loop{'s' * (t > 1)}: share of right answers", pad=18)
            for start, named in zip(hops.values(), logits[t][0, n:].argmax(dim=-1), strict=True):
                now = hops.get(int(named), -1)
                if start >= 0:  # −1: a node of another chain
                    right.plot([start, max(now, 0)], [start, start], "-", color="0.8")
                    mark = "C1x" if now < 0 else "C0s" if now == 0 else "C0o"
                    right.plot(now if now >= 0 else -2, start, mark)
            right.set(xlim=(task.longest - 0.5, -2.8), ylim=(-0.6, task.longest - 0.4))
            right.set_xticks([10, 5, 0, -2], ["10 hops before", "5", "end", "elsewhere"])
            right.set(yticks=range(task.longest), ylabel="hops to go")
            right.set_xlabel("the node that is named")
            right.set_title("one sequence: ○ on the way, ■ at the end", pad=18)
            writer.grab_frame()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(epilog=__doc__)
    parser.add_argument("checkpoint", help="of python train_tiny.py")
    told = "write experiments/chains.gif (default: runs/chains.gif)"
    parser.add_argument("--publish", action="store_true", help=told)
    args = parser.parse_args(arguments)
    try:
        name = load_checkpoint(Path(args.checkpoint))["recipe"]["name"]
        expect(name == "chains", "checkpoint", f"one of {name}", "one of chains")
        model = load_model(args.checkpoint)
    except ValueError as error:
        parser.error(str(error))
    folder = Path(__file__).parent if args.publish else Path("runs")
    folder.mkdir(exist_ok=True)
    draw_moving(Chains(), model, folder / "chains.tmp.gif")
    print((folder / "chains.tmp.gif").replace(folder / "chains.gif"))


if __name__ == "__main__":
    main()
