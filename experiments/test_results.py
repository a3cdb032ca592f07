# SPDX-License-Identifier: MIT
"""Every number in the tables of RESULTS.md and README.md, recomputed from the runs in results/
without the report's code; and the numbers in the sentences beside them."""

import json
import re
from pathlib import Path

import numpy as np

from experiments.circuits import Circuits
from experiments.variants import find

HERE = Path(__file__).parent
PAGES = {name: (HERE / name).read_text("utf-8") for name in ("RESULTS.md", "../README.md")}
FILES = {path.stem: path for path in (HERE / "results").glob("*.jsonl")}
RUNS = {
    task: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for task, path in FILES.items()
}
README = "ends ends-fresh one-loop flat-slow loop flat-flops-told-long".split()  # its table's rows
ENDS = {"ends", "ends-fresh", "one-loop", "flat-slow", "flat-flops"}  # of the chains: taught ends
T95 = {5: 2.776445}  # Student's t, two-sided 95%, by the number of seeds


def named(task, name):
    return [run for run in RUNS[task] if run.get("variant") == name]


def rows_of(page, task, labels):
    """label -> its runs, or parts of them."""
    if task == "readme":
        return {label: named("chains", name) for label, name in zip(labels, README, strict=True)}
    if task == "trainer":
        name = "{task}, {attention}, seed {seed}".format
        return {name(**run): [run] for run in RUNS["trainer"]}
    if task in ("chains-shapes", "text-halting"):
        task, part = task.split("-")
        loops = [run[part] for run in named(task, "loop")]
        return {label: [run[label] for run in loops] for label in labels}
    return {label: named(task, label) for label in labels}


def answer(run, loops=None):
    """In %; nan where a model was not asked. Catches a stack that is read at other loops."""
    by_loops = {int(L): np.array(shares, dtype=float) for L, shares in run["accuracy"].items()}
    assert loops is None or min(by_loops) == 1, "a stack has no loops"
    loops = loops or (12 if len(by_loops) > 1 else min(by_loops))
    return 100 * by_loops[loops]


def stop(run):
    halting = run["halting"].get("0.2", run["halting"])
    return 100 * np.array(halting["accuracy"]), np.array(halting["loops"])


def bits(run):
    by_loops = run["bits_per_byte"]
    if len(by_loops) == 1:
        return [*by_loops.values()][0]
    return by_loops["2"]


def best_fixed(run):
    return max(answer(run, int(L)).mean() for L in run["accuracy"] if L != "0")


VALUES = {  # column -> what it says of one run
    r"training TFLOPs": lambda run: run["train_flops"] / 1e12,
    r"curriculum's end": lambda run: run["frontier"],
    r"(?:at )?(\d|10) hops(?: \(.*\)|, worst seed)?": lambda run, k: answer(run)[k],
    r"10 hops, (\d+) loops": lambda run, L: answer(run, L)[10],
    r"10 hops, halting": lambda run: stop(run)[0][10],
    r"0–10 hops, 12 loops": lambda run: answer(run).mean(),
    r"0–10 hops, halting": lambda run: stop(run)[0].mean(),
    r"0–10 hops, best fixed loop count": best_fixed,
    r"loops spent on 0–10 hops": lambda run: stop(run)[1].mean(),
    r"more loops for 10 hops than for 0": lambda run: stop(run)[1][10] - stop(run)[1][0],
    r"worst of 0–5 hops": lambda run: answer(run)[:6].min(),
    r"reach": lambda run: [*(answer(run) >= 90), False].index(False) - 1,
    r"most lost by more loops": lambda run: max(
        (answer(run, 16) - answer(run, L)).max() for L in (20, 24, 28, 32)
    ),
    r"seconds": lambda run: run["seconds"] if run["train_seconds"] > 1 else None,
    r"none halts, 0–10 hops": lambda run: answer(run, 32).mean(),
    r"(\D+), 0–10 hops": lambda run, which: 100 * run["halting"][which],
    r"(14 hops(?:, halting)?)": lambda run, what: 100 * run["further"][what],
    r"(ring.*), (\d+) hops": lambda run, what, T: 100 * run["shapes"][what][f"{T}"],
    r"after (\d+) loops": lambda shares, T: 100 * shares[f"{T}"],
    r"state norm, loop (\d+)": lambda run, L: run["state_norm"][f"{L}"],
    r"rho\(A\)": lambda run: run["rho"],
    r"gain, first loop": lambda run: run["gain"]["0"],
    r"gain, after 32 loops": lambda run: run["gain"]["32"],
    r"bits per byte": bits,
    r"1 loop, or none": lambda run: [*run["bits_per_byte"].values()][0],
    r"bits, loops: (\d+)": lambda run, L: run["bits_per_byte"][f"{L}"],
    r"most apart from 2 loops on": lambda run: np.ptp([*run["bits_per_byte"].values()][1:]),
    r"bits, halting": lambda part: part["bits_per_byte"],
    r"mean loops": lambda part: part["loops"],
    r"correlation with surprise": lambda part: part["correlation with surprise"],
}


def lead_of(column, run):
    """Whose lead a column shows over this run's row, and by what measure."""
    task, name = run["task"], run["variant"]
    if column.startswith("the loop's lead at"):
        return (
            task,
            "ends" if task == "chains" and name in ENDS else "loop",
            lambda r: answer(r)[10],
        )
    if column.startswith("bits saved over"):
        return "text", column.split("`")[1], bits
    first = "experts-twice" if "experts" in column else "twice"
    return "text", first, lambda run: -bits(run)


def values_of(column, runs):
    """Of each run; none where a run does not have the number."""
    if "lead" in column or "saved" in column or "saves" in column:
        task, name, measure = lead_of(column, runs[0])
        best = {run["seed"]: measure(run) for run in named(task, name)}
        return [] if name == runs[0]["variant"] else [best[r["seed"]] - measure(r) for r in runs]
    column = re.sub(r"depth ([\d–]+)", r"\1 hops", column)
    pattern = next(p for p in VALUES if re.fullmatch(p, column))
    groups = [int(g) if g.isdigit() else g for g in re.fullmatch(pattern, column).groups()]
    try:
        found = [VALUES[pattern](run, *groups) for run in runs]
    except (KeyError, AssertionError):
        return []
    return [] if any(value is None or np.isnan(value) for value in found) else found


def fault(cell, column, runs):
    """What a cell should say, or nothing. Catches a wrong mean, a wrong or missing interval, and a
    number where nothing was asked."""
    if column in ("what differs", "supervision"):
        taught = "ends" if runs[0]["variant"] in ENDS else "every hop"
        return "" if column == "what differs" or cell == taught else taught
    if column == "seeds":
        return "" if cell == f"{len(runs)}" else f"{len(runs)}"
    if column == "verdict":
        met = [a <= b if sign == "<=" else a >= b for _, a, sign, b in runs[0]["checks"]]
        return "" if cell == ("PASS" if all(met) else "FAIL") else f"{met}"
    if column.startswith("parameters"):
        every, active = (runs[0][key] for key in ("parameters", "active_parameters"))
        wanted = f"{every:,}" + f" ({active:,})" * (active < every and column != "parameters")
        return "" if cell == wanted else wanted
    values = values_of(column, runs)
    if not values:
        return "" if cell == "–" else "–"
    values = [min(values)] if column.endswith("worst seed") else values
    n, average = len(values), np.mean(values)
    half = T95[n] * np.std(values, ddof=1) / n**0.5 if n > 1 else 0.0
    parts = cell.split(" ± ")
    if not all(re.fullmatch(r"[+-]?\d+(\.\d+)?", part) for part in parts):
        return f"{average:.4f} ± {half:.4f}"
    units = [10.0 ** -len(part.partition(".")[2]) / 2 + 1e-9 for part in parts]
    right = abs(float(parts[0]) - average) <= units[0]
    right &= (
        abs(float(parts[1]) - half) <= units[1] + 1e-4 * half if len(parts) == 2 else half < 1e-9
    )
    return "" if right else f"{average:.4f} ± {half:.4f}"


def read_tables(page):
    for task, text in re.findall(r"<!-- table: (\S+) -->\n(.*?)<!-- end -->", page, re.DOTALL):
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
        yield task, lines[0], lines[2:]


def test_every_number():
    """A number that the runs do not have, a row without a run, a run without a row; a number in
    README that stands in no table."""
    wrong, cells, shown = [], set(), set()
    for page, text in PAGES.items():
        for task, head, lines in read_tables(text):
            labels = [line[0] for line in lines]
            rows = rows_of(page, task, labels)
            assert len(head) <= (5 if task == "readme" else 10) and len({*labels}) == len(labels)
            for label, *line in lines:
                runs = rows[label]
                assert runs, f"{task}: {label} has no run"
                shown |= {(r["task"], r.get("variant"), r["seed"]) for r in runs if "task" in r}
                for column, cell in zip(head[1:], line, strict=True):
                    cells.add(cell.lstrip("+-"))
                    if wanted := fault(cell, column, runs):
                        wrong.append(f"{task} / {label} / {column}: {cell}, recomputed {wanted}")
    assert not wrong, "\n".join(wrong)
    every = {(r["task"], r.get("variant"), r["seed"]) for runs in RUNS.values() for r in runs}
    assert every == shown and len(cells) > 350
    said = re.findall(r"\d+\.\d+ ± \d+\.\d+", " ".join(PAGES["../README.md"].split()))
    assert len(said) > 30 and not {*said} - cells


def test_numbers_in_sentences():
    """A sentence that outlived its runs."""
    results, readme = (" ".join(page.split()) for page in PAGES.values())
    _, values, depths = Circuits().test_set()
    ones = [values[depths == k].float().mean().item() for k in (5, 8, 10)]
    likelier = ", ".join(f"{100 * max(share, 1 - share):.0f}" for share in ones)
    assert f"is right in {likelier}% at depth 5, 8, 10. Of depth 10 the test has " in results
    assert f" {(depths == 10).sum()} variables." in results
    assert f"guessing in {100 * max(ones[2], 1 - ones[2]):.0f}%" in readme
    coda = [answer(run)[10] for run in named("shells", "coda")]
    assert f"in {min(coda):.0f} to {max(coda):.0f}%, by seed" in readme
    best = [max(run["accuracy"], key=lambda L, run=run: np.mean(run["accuracy"][L]))
            for run in named("chains", "loop")]  # fmt: skip
    assert {*best} == {"10", "11", "12"} and "for all, 10 to 12, gives" in readme
    others = [f"{x:.3f}" for x in RUNS["trainer"][-1]["compressors"].values()]
    assert [results.find(x) > 0 for x in others] == [True] * 4
    assert f"[{sum(run['task'] == 'chains' for run in RUNS['trainer'])} runs]" in readme


def test_kept_runs_are_whole():
    """A row of one seed, of a training that was cut short, of seeds that were tuned on, or of text
    that other rows did not read; a FAIL; a file that is not sorted."""
    for task, runs in RUNS.items():
        names = [(run["task"], run.get("variant") or run["attention"], run["seed"]) for run in runs]
        assert names == sorted({*names}) and all(run.get("passed", True) for run in runs)
        assert len({run["data_crc"] for run in runs if run.get("data_crc")}) <= 1
        for name in {run["variant"] for run in runs if "variant" in run}:
            seeds, steps = ({run[key] for run in named(task, name)} for key in ("seed", "steps"))
            usual = {*range(15, 20)} if "fresh" in name else {*range(10, 15)}
            row = find(task, name)
            assert seeds == ({5} if "@" in name else usual), name
            assert steps == {row.settings.get("steps", row.task.steps)}, name
