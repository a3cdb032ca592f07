# SPDX-License-Identifier: MIT
"""Every number of RESULTS.md and README.md, recomputed from results/ without the report's code."""

import json
import re
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

from experiments.circuits import Circuits
from experiments.variants import find

HERE = Path(__file__).parent
PAGES = {name: (HERE / name).read_text("utf-8") for name in ("RESULTS.md", "../README.md")}
RUNS = {
    path.stem: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for path in (HERE / "results").glob("*.jsonl")
}
README = "ends one-loop flat-slow loop flat-told written".split()  # its table's rows
ENDS = {"ends", "ends-fresh", "one-loop", "flat-slow", "written-ends", "written-near"}
NO_SHARE = r"training|curr|loops|more loops|state|rho|gain|bits|most apart|worth|φ|the loop|seconds"
T95 = {5: 2.7764, 10: 2.2622}  # Student's t, two-sided 95%, by the number of seeds


def named(task, name):
    return [run for run in RUNS[task] if run.get("variant") == name]


def rows_of(task, labels):
    """label -> its runs, or parts of them."""
    if task == "readme":
        return {label: named("chains", name) for label, name in zip(labels, README, strict=True)}
    if task == "trainer":
        what = "{task}, {attention}, {steps} steps, seed {seed}"
        return {what.format(**run): [run] for run in RUNS[task]}
    if task == "chains-shapes":
        loop = named("chains", "loop")
        return {label: [run["shapes"][label] for run in loop] for label in labels}
    return {label: named(task, label) for label in labels}


def answer(run, loops=None):
    """In %; nan where a model was not asked. None: after 12 loops, or all that there is."""
    by_loops = run["accuracy"]
    loops = loops or (12 if len(by_loops) > 1 else [*by_loops][0])
    return 100 * np.array(by_loops[f"{loops}"], dtype=float)


def bits(run):
    (value,) = run["bits_per_byte"].values()
    return value


def worth(run):
    """So many layers; not asked of layers."""
    if "flat" in run["variant"]:
        raise KeyError
    stacks = [r for r in RUNS["text"] if re.fullmatch(r"flat-\d+", r["variant"])]
    same = [r for r in stacks if r["seed"] == run["seed"]]
    layers = np.log([int(r["variant"][5:]) for r in same])
    slope, start = np.polyfit(layers, [bits(r) for r in same], 1)
    return np.exp((bits(run) - start) / slope)


VALUES = {  # column -> what it says of one run
    r"training TFLOPs": lambda run: run["train_flops"] / 1e12,
    r"curriculum's end": lambda run: run["frontier"],
    r"(?:at )?(\d|10) hops(?: \(.*\))?": lambda run, k: answer(run)[k],
    r"10 hops, (\d+) loops": lambda run, L: answer(run, L)[10],
    r"10 hops, halting": lambda run: 100 * run["halting"]["accuracy"][10],
    r"0–10 hops, 12 loops": lambda run: answer(run).mean(),
    r"0–10 hops, halting": lambda run: 100 * fmean(run["halting"]["accuracy"]),
    r"0–10 hops, best fixed.*": lambda run: max(answer(run, L).mean() for L in run["accuracy"]),
    r"loops spent on 0–10 hops": lambda run: fmean(run["halting"]["loops"]),
    r"more loops.*": lambda run: run["halting"]["loops"][10] - run["halting"]["loops"][0],
    r"loops run, (\d+) at a time": lambda run, size: run["halting"]["loops run"][f"{size}"],
    r"worst of 0–5 hops": lambda run: answer(run)[:6].min(),
    r"most lost.*": lambda r: max(max(answer(r, 16) - answer(r, L)) for L in range(20, 33, 4)),
    r"seconds": lambda run: run["train_seconds"] if run["train_seconds"] > 1 else None,
    r"walks rings": lambda run: [100 * got for what, got, *_ in run["checks"] if "ring" in what][0],
    r"loops until an edge rests": lambda run: run["rest"]["loops of edges"],
    r"(edges|queries) that rest": lambda run, which: 100 * run["rest"][f"{which} rest"],
    r"(\D+), 0–10 hops": lambda run, which: 100 * run["halting"][which],
    r"(.*(?:ring|function).*), (\d+) hops": lambda run, what, T: 100 * run["shapes"][what][f"{T}"],
    r"after (\d+) loops": lambda shares, T: 100 * shares[f"{T}"],
    r"state norm, loop (\d+)": lambda run, L: run["state_norm"][f"{L}"],
    r"rho\(A\)": lambda run: run["rho"],
    r"gain, first loop": lambda run: run["gain"]["0"],
    r"gain, after 32 loops": lambda run: run["gain"]["32"],
    r"n hops, (.*)": lambda run, how: 100 * run["walk"][how][run["frontier"] - 1],
    r"64·n hops, (.*)": lambda run, how: 100 * run["walk"][how][-1],
    r"worst of all hops, (.*)": lambda run, how: 100 * min(run["walk"][how]),
    r"bits per byte": bits,
    r"worth so many layers": worth,
    r"φ": lambda run: np.log(worth(run) / 3) / np.log(int(run["variant"][5:])),
    r"bits, loops: (\d+)": lambda run, L: run["bits_per_byte"][f"{L}"],
    r"most apart from 2 loops on": lambda run: np.ptp([*run["bits_per_byte"].values()][1:]),
}


def values_of(column, runs):
    """Of each run; none where one does not have the number."""
    if "lead" in column:  # of the loop that is taught alike, at 10 hops
        task, ends = runs[0]["task"], runs[0]["variant"] in ENDS and runs[0]["task"] == "chains"
        name = "ends" if ends else "loop"
        best = {run["seed"]: answer(run)[10] for run in named(task, name)}
        runs = [run for run in runs if run["seed"] in best and run["variant"] != name]
        return [best[run["seed"]] - answer(run)[10] for run in runs]
    column = re.sub(r"depth ([\d–]+)", r"\1 hops", column)
    pattern = next(p for p in VALUES if re.fullmatch(p, column))
    groups = [int(g) if g.isdigit() else g for g in re.fullmatch(pattern, column).groups()]
    try:
        found = np.array([VALUES[pattern](run, *groups) for run in runs], dtype=float)
    except KeyError:
        return []
    return [] if np.isnan(found).any() else found.tolist()


def recomputed(cell, column, runs):
    """What a cell should say, with as many digits as it shows."""
    run = runs[0]
    if column == "what differs":
        return find(run["task"], run["variant"]).what
    if column == "supervision":
        return "ends" if run["variant"] in ENDS else "every hop"
    if column == "seeds":
        return f"{len(runs)}"
    if column == "verdict":
        met = [a <= b if sign == "<=" else a >= b for _, a, sign, b in run["checks"]]
        return "PASS" if all(met) else "FAIL"
    if column == "parameters (active)":
        every, active = run["parameters"], run["active_parameters"]
        return f"{every:,}" + f" ({active:,})" * (active < every)
    values = values_of(column, runs)
    if not values:
        return "–"
    half = T95[len(values)] * stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    digits, middle = len(cell.split()[0].partition(".")[2]), fmean(values)
    if (middle < half or middle > 100 - half) and not re.match(NO_SHARE, column):
        return " to ".join(dict.fromkeys(f"{x:.{digits}f}" for x in (min(values), max(values))))
    return f"{middle:.{digits}f}" + f" ± {half:.{digits}f}" * (half > 0)


def test_every_number():
    """A number that the runs do not have, also in README; a row without a run, or the reverse."""
    cells, shown = set(), set()
    tables = re.findall(r"(?s)<!-- table: (\S+) -->\n(.*?)<!-- end -->", "".join(PAGES.values()))
    for task, text in tables:
        head, _, *lines = ([c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines())
        labels = [line[0] for line in lines]
        assert len(head) <= (5 if task == "readme" else 10) and len({*labels}) == len(labels)
        rows = rows_of(task, labels)
        for label, *line in lines:
            runs = rows[label]
            assert runs, f"{task}: {label} has no run"
            shown |= {(r["task"], r.get("variant"), r["seed"]) for r in runs if "task" in r}
            for column, cell in zip(head[1:], line, strict=True):
                cells.add(cell.lstrip("+-"))
                assert cell.lstrip("+") == recomputed(cell, column, runs), (task, label, column)
    every = {(r["task"], r.get("variant"), r["seed"]) for runs in RUNS.values() for r in runs}
    assert every == shown and len(cells) > 275
    said = re.findall(r"\d+\.\d+ (?:±|to) \d+\.\d+", " ".join(PAGES["../README.md"].split()))
    assert len(said) > 27 and not {*said} - cells


def test_numbers_in_sentences():
    """A sentence that outlived its runs."""
    results, readme = (" ".join(page.split()) for page in PAGES.values())
    _, values, depths = Circuits().test_set()
    ones = [values[depths == k].float().mean().item() for k in (5, 8, 10)]
    likelier = ", ".join(f"{100 * max(share, 1 - share):.0f}" for share in ones)
    assert f"is right in {likelier}% at depth 5, 8, 10. Of depth 10 the test has " in results
    assert f" {(depths == 10).sum()} variables." in results
    assert f"guessing in {100 * max(ones[2], 1 - ones[2]):.0f}%" in readme
    best = [np.argmax([answer(run, L).mean() for L in range(1, 33)]) + 1
            for run in named("chains", "loop-fresh")]  # fmt: skip
    assert f"fixed count, {min(best)} to {max(best)}, gives" in readme
    assert all(f"{x:.3f}" in results for x in RUNS["trainer"][-1]["compressors"].values())
    assert f"[{sum(run['task'] == 'chains' for run in RUNS['trainer'])} runs]" in readme


def test_kept_runs_are_whole():
    """A row of one seed, a cut training, tuned seeds or other text; a FAIL; lines out of order."""
    for task, runs in RUNS.items():
        whose = [run.get("variant") or f"{run['attention']}, {run['steps']} steps" for run in runs]
        names = [(run["task"], who, run["seed"]) for run, who in zip(runs, whose, strict=True)]
        assert names == sorted({*names}) and all(run.get("passed", True) for run in runs)
        assert len({run["data_crc"] for run in runs if run.get("data_crc")}) <= 1
        for name in {run["variant"] for run in runs if "variant" in run}:
            seeds, steps = ({run[key] for run in named(task, name)} for key in ("seed", "steps"))
            row = find(task, name)
            assert seeds == ({5} if "@" in name else {*row.seeds}), name
            assert steps == {row.settings.get("steps", row.task.steps)}, name
