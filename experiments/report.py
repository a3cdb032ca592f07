# SPDX-License-Identifier: MIT
"""The tables of RESULTS.md, README's table and the picture, from the runs in results/ alone.

    python -m experiments.report                     writes them to runs/, to look at
    python -m experiments.report --publish           writes them in place
    python -m experiments.report --publish runs/chains-mla-seed25.json      adds a training first

Each line of a file in results/ is a run, as JSON: what one variant scored with one seed. A table
stands between <!-- table: TASK --> and <!-- end -->. Its head and its first column are written by
hand, like the sentences around it; this program fills in the cells. A dash: not measured.
"""

import argparse
import json
import math
import re
from functools import partial
from pathlib import Path
from statistics import fmean as mean
from statistics import linear_regression, stdev

from experiments.variants import VARIANTS, Ends, find
from mythos import expect
from train_tiny import Chains, write_atomically

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
NEAR, LAST = Chains.train_hops, Chains.longest - 1  # hops: the most in training, and in the test

# ---- Runs ----

Runs = dict[str, list[dict]]  # of each variant, by seed


def read_runs(path: Path) -> list[dict]:
    """Raises ValueError, if a line is no run."""
    runs = []
    for i, line in enumerate(path.read_text("utf-8").splitlines() if path.exists() else [], 1):
        try:
            runs.append(json.loads(line))
            name_of(runs[-1])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {i}: not a run: {error}") from None
    return runs


def name_of(run: dict) -> tuple[str, str, int]:
    """Task, variant and seed; the trainer's own runs have instead of a variant an attention."""
    variant = run.get("variant") or "{attention}, {steps} steps".format(**run)
    return run["task"], variant, run["seed"]


def add_run(path: Path, run: dict) -> None:
    """Write a run into such a file, sorted, with six digits; it replaces one of the same name."""
    run = json.loads(json.dumps(run, default=str), parse_float=lambda x: float(f"{float(x):.6g}"))
    others = [other for other in read_runs(path) if name_of(other) != name_of(run)]
    lines = [json.dumps(r, ensure_ascii=False) for r in sorted([*others, run], key=name_of)]
    write_atomically(path, lambda path: path.write_text("\n".join(lines) + "\n", "utf-8"))


def load(folder: Path) -> dict[str, Runs]:
    """Of each task the runs of each row of its tables."""
    results: dict[str, Runs] = {"chains-shapes": {}, "trainer": {}}
    for task in VARIANTS:
        results[task] = {}
        for run in read_runs(folder / f"{task}.jsonl"):
            results[task].setdefault(run["variant"], []).append(run)
    for run in results["chains"].get("loop", []):  # a table with a row for each shape
        for shape, numbers in run["shapes"].items():
            results["chains-shapes"].setdefault(shape, []).append(numbers)
    for run in read_runs(folder / "trainer.jsonl"):
        results["trainer"]["{}, {}, seed {}".format(*name_of(run))] = [run]
    chains = results["chains"]
    readme = {row: chains[name] for row, name in README_ROWS.items() if name in chains}
    return results | {"readme": readme}


README_ROWS = {  # the loop and its strongest opponents, for a reader with two minutes
    "the loop, taught ends": "ends",
    "the same model, run once, taught ends": "one-loop",
    "14 different layers, taught ends": "flat-slow",
    "the loop, taught every hop": "loop",
    "14 different layers, taught every hop": "flat-told",
    "one layer, its steps written": "written",
}


def supervision(run: dict) -> str:
    """What a variant of the chains is taught: the answer after T hops, for all T, with T given (as
    the number of loops, or as a vector); or the ends of chains alone, with T unknown."""
    return "ends" if issubclass(find("chains", run["variant"]).task, Ends) else "every hop"


def accuracy(run: dict, loops: str | None = None) -> list[float]:
    """In %, by hops or depth; nan where it was not asked. None: after 12 loops, or the only answer
    of a model that has but one."""
    by_loops = run["accuracy"]
    (usual,) = by_loops if len(by_loops) == 1 else [f"{Chains.test_loops}"]
    shares = by_loops[loops or usual]
    return [float("nan") if share is None else 100 * share for share in shares]


def bits(run: dict) -> float:
    """Bits per byte, at the loops of its training."""
    (value,) = run["bits_per_byte"].values()
    return value


def worth(run: dict, results: dict[str, Runs]) -> float:
    """How many different layers reach the bits of this run. They lie on a line, bits against the
    logarithm of the layers, which is fitted to the stacks with the same seed (nan: too few)."""
    points = [
        (math.log(int(name[5:])), bits(other))
        for name in results["text"]
        for other in results["text"][name]
        if re.fullmatch(r"flat-\d+", name) and other["seed"] == run["seed"]
    ]
    if len(points) < 2:
        return math.nan
    slope, one_layer = linear_regression(*zip(*points, strict=True))
    return math.exp((bits(run) - one_layer) / slope)


def phi(run: dict, results: dict[str, Runs]) -> float:
    """r passes through 3 layers are worth 3·r^φ different layers."""
    return math.log(worth(run, results) / 3, int(run["variant"][5:].partition("@")[0]))


# ---- Cells ----

# Student's t: with n values, the 95% interval of their mean is ± T95[n] · deviation / √n.
T95 = {2: 12.7062, 3: 4.3027, 4: 3.1824, 5: 2.7764, 6: 2.5706, 7: 2.4469, 8: 2.3646, 9: 2.3060}
T95 |= {10: 2.2622, 11: 2.2281, 12: 2.2010, 13: 2.1788, 14: 2.1604, 15: 2.1448, 16: 2.1314}


def spread(values: list[float], form: str = ".1f", percent=False) -> str:
    """Mean ± half of its 95% t interval; lowest to highest, where that leaves 0 to 100%."""
    if not values or any(value != value for value in values):
        return "–"
    half = T95[len(values)] * stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0
    if percent and not half <= mean(values) <= 100 - half:
        return " to ".join(dict.fromkeys(f"{end:{form}}" for end in (min(values), max(values))))
    return f"{mean(values):{form}}" + (f" ± {half:{form.lstrip('+')}}" if half else "")


def parameters(runs: list[dict]) -> str:
    """All, and in brackets how many of them a token uses, where experts make a difference."""
    every, active = runs[0]["parameters"], runs[0]["active_parameters"]
    return f"{every:,}" + (f" ({active:,})" if active < every else "")


def taught_alike(run: dict) -> tuple[str, str]:
    """Task and name of the loop that is taught like this run."""
    chains = run["task"] == "chains"
    return run["task"], "ends" if chains and supervision(run) == "ends" else "loop"


WORDS = {  # column -> what it says of a row's runs
    "what differs": lambda runs: find(runs[0]["task"], runs[0]["variant"]).what,
    "supervision": lambda runs: supervision(runs[0]),
    "seeds": lambda runs: f"{len(runs)}",
    "parameters (active)": parameters,
    "verdict": lambda runs: "PASS" if runs[0]["passed"] else "FAIL",
}
LAW = {"worth so many layers": worth, "φ": phi}  # columns of rows with a loop
LEAD = "the loop's lead at 10 hops"
SHARES = {  # column, as a pattern -> what it says of one run, in %; circuits: depth, not hops
    r"(?:at )?(\d|10) hops(?: \(.*\))?": lambda run, k: accuracy(run)[int(k)],
    r"10 hops, (\d+) loops": lambda run, L: accuracy(run, L)[LAST],
    r"10 hops, halting": lambda run: 100 * run["halting"]["accuracy"][LAST],
    r"worst of 0–5 hops": lambda run: min(accuracy(run)[: NEAR + 1]),
    r"0–10 hops, 12 loops": lambda run: mean(accuracy(run)),
    r"0–10 hops, halting": lambda run: 100 * mean(run["halting"]["accuracy"]),
    r"0–10 hops, best fixed loop count": lambda run: max(
        mean(accuracy(run, L)) for L in run["accuracy"]
    ),
    r"(\D+), 0–10 hops": lambda run, control: 100 * run["halting"][control],
    r"(.*(?:ring|function).*), (\d+) hops": lambda run, what, T: 100 * run["shapes"][what][T],
    r"after (\d+) loops": lambda shares, T: 100 * shares[T],
    r"(edges|queries) that rest": lambda run, which: 100 * run["rest"][f"{which} rest"],
    r"n hops, (none halts|halting)": lambda run, how: (
        100 * run["walk"][how][len(run["walk"][how]) // 64 - 1]
    ),
    r"64·n hops, (none halts|halting)": lambda run, how: 100 * run["walk"][how][-1],
    r"worst of all hops, (none halts|halting)": lambda run, how: 100 * min(run["walk"][how]),
    r"walks rings": lambda run: 100 * run["checks"][4][1],
    r"most lost by more loops": lambda run: 100 * run["checks"][2][1],
}
ONE_DIGIT = {
    r"training TFLOPs": lambda run: run["train_flops"] / 1e12,
    r"curriculum's end": lambda run: run["frontier"],
    r"loops spent on 0–10 hops": lambda run: mean(run["halting"]["loops"]),
    r"loops run, (\d+) at a time": lambda run, size: run["halting"]["loops run"][size],
    r"more loops for 10 hops than for 0": lambda run: (
        run["halting"]["loops"][LAST] - run["halting"]["loops"][0]
    ),
    r"state norm, loop (\d+)": lambda run, L: run["state_norm"][L],
    r"loops until an edge rests": lambda run: run["rest"]["loops of edges"],
}
TWO_DIGITS = {
    r"rho\(A\)": lambda run: run["rho"],
    r"gain, first loop": lambda run: run["gain"]["0"],
    r"gain, after 32 loops": lambda run: run["gain"]["32"],
}
THREE_DIGITS = {
    r"bits per byte": bits,
    r"bits, loops: (\d+)": lambda run, L: run["bits_per_byte"][L],
    r"most apart from 2 loops on": lambda run: run["checks"][1][1],
}
NO_DIGIT = {  # nan: a finished training was only measured again
    r"seconds": lambda run: run["train_seconds"] if run["train_seconds"] > 1 else float("nan")
}
DIGITS = NO_DIGIT, ONE_DIGIT, TWO_DIGITS, THREE_DIGITS


def cell(column: str, runs: list[dict], results: dict[str, Runs]) -> str:
    if column in WORDS:
        return WORDS[column](runs)
    if column in LAW:
        looped = [run for run in runs if run["variant"].startswith("loop")]
        return spread([LAW[column](run, results) for run in looped], ".2f")
    if column == LEAD:  # differences within each seed
        task, name = taught_alike(runs[0])
        best = {run["seed"]: accuracy(run)[LAST] for run in results[task].get(name, [])}
        others = [run for run in runs if run["variant"] != name and run["seed"] in best]
        return spread([best[run["seed"]] - accuracy(run)[LAST] for run in others], "+.1f")
    for digits, measures in [(1, SHARES), *enumerate(DIGITS)]:
        for pattern, measure in measures.items():
            if match := re.fullmatch(pattern, column):
                try:
                    values = [measure(run, *match.groups()) for run in runs]
                except KeyError:
                    return "–"
                return spread(values, f".{digits}f", measures is SHARES)
    known = [*WORDS, *LAW, LEAD, *SHARES, *(column for measures in DIGITS for column in measures)]
    raise ValueError(f"column: got {column!r}, expected one of {known}")


# ---- Tables ----


def tables(page: str, results: dict[str, Runs], partial=False) -> list[tuple[str, str, str]]:
    """Of each table of a page: as it stands there, its task, and as it has to be. partial: only the
    rows that have runs, and new ones; else a row without a run is a ValueError."""
    found, on_page = [], re.findall(r"(?s)(<!-- table: ([\w-]+) -->\n.*?)<!-- end -->", page)
    for old, task in on_page:
        mark, head, rule, *rows = old.splitlines()
        columns = [re.sub(r"depth ([\d–]+)", r"\1 hops", c.strip()) for c in head.split("|")[2:-1]]
        names, lines = [row.split("|")[1].strip() for row in rows], [mark, head, rule]
        if partial:
            shown = "".join(table for table, of in on_page if of == task)
            new = [name for name in results[task] if f"\n| {name} |" not in shown]
            names = [name for name in names if name in results[task]] + new
        for name in names:
            expect(name in results[task], f"row of {task}", name, "a variant with runs")
            cells = [cell(column, results[task][name], results) for column in columns]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        found.append((old, task, "\n".join(lines) + "\n"))
    return found


# ---- The picture ----


def draw(results: dict[str, Runs], path: Path) -> None:
    """Means of all seeds, shaded from the lowest to the highest. Left: accuracy by hops, 1 to 512,
    of loops on rings, where a walk has no end; of stacks, which know no more than 12 hops, on
    chains. Right: bits per byte of text by layers run, all different or the same three again."""
    from matplotlib import figure

    picture = figure.Figure(figsize=(11, 5), layout="constrained")
    left, right = picture.subplots(1, 2, width_ratios=(3, 2))

    def plot(axes, x: list[int], values: list[list[float]], style: str, label: str) -> None:
        axes.plot(x, [*map(mean, values)], style, label=label)
        axes.fill_between(x, [*map(min, values)], [*map(max, values)], color=style[:2], alpha=0.2)

    for name, shape, style, label in (
        ("loop-fresh", "ring, halting", "C0o-", "the loop, halting"),
        ("loop-fresh", "ring", "C0^--", "the same, none halts"),
        ("forgets-long", "ring", "C1s--", "none halts; A up to 0.5, 1,200 steps"),
        ("written", "ring, halting", "C2d:", "one layer, each hop written down"),
        ("flat-told", None, "C3v-", "14 layers, told T, taught 5 hops"),
        ("flat-told-ten", None, "C7x-", "14 layers, told T, taught 10 hops"),
    ):
        curves = [
            run["shapes"][shape] if shape else dict(enumerate(run["accuracy"]["0"][1:], 1))
            for run in results["chains"][name]
        ]
        values = [[100 * curve[T] for curve in curves] for T in curves[0]]
        plot(left, [*map(int, curves[0])], values, style, label)
    for names, style, label in (
        ({n: f"flat-{n}" for n in (3, 4, 6, 12)}, "C3v-", "different layers"),
        ({3: "flat-3", 6: "loop-2", 9: "loop-3", 12: "loop-4"}, "C0o-", "3 layers, run again"),
    ):
        values = [[bits(run) for run in results["text"][name]] for name in names.values()]
        plot(right, [*names], values, style, label)
    left.axvline(NEAR + 0.5, color="black", linestyle="--", label="left of it: hops taught")
    left.set(title="Loops on rings, stacks on chains", xlabel="hops", ylabel="accuracy (%)")
    right.set(title="Text", ylabel="bits per byte", xlabel="layers run")
    for axes, ticks in ((left, [1, 2, 5, 10, 32, 64, 128, 256, 512]), (right, [3, 4, 6, 9, 12])):
        axes.set_xscale("log")
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    picture.savefig(path, dpi=120, format="png")


# ---- Writing ----


def write(publish: bool) -> list[Path]:
    """The pages and the picture: in place, or to runs/. Returns where they are."""
    results, made = load(RESULTS), {}
    for path in (HERE / "RESULTS.md", HERE.parent / "README.md"):
        page = path.read_text("utf-8")
        for old, _, new in tables(page, results):
            page = page.replace(old, new)
        made[path] = lambda path, page=page: path.write_text(page, "utf-8")
    made[HERE / "compare.png"] = partial(draw, results)
    made = {path if publish else Path("runs", path.name): save for path, save in made.items()}
    for path, save in made.items():
        write_atomically(path, save)
    return [*made]


def main(arguments: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    about = "JSON of train_tiny.py or experiments/text.py, to be added to those published"
    parser.add_argument("trainings", nargs="*", type=Path, help=about)
    about = "write into the repository (default: everything goes to runs/)"
    parser.add_argument("--publish", action="store_true", help=about)
    args = parser.parse_args(arguments)
    try:
        expect(args.publish or not args.trainings, "trainings", args.trainings, "--publish, too")
        for path in args.trainings:  # of another task, or with other steps, they have other names
            run = {"task": path.stem.split("-")[0]} | json.loads(path.read_text("utf-8"))
            known = "those of chains, circuits, text"
            expect(run["task"] in VARIANTS, "trainings", path.name, known)
            expect(not run.get("set"), "trainings", run.get("set"), "those without --set")
            run["train_seconds"] = run["history"]["seconds"]
            left_out = ("history", "out", "resume", "data", "guess", "set")
            run = {key: value for key, value in run.items() if key not in left_out}
            add_run(RESULTS / "trainer.jsonl", run)
        print(*write(args.publish), sep="\n")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
