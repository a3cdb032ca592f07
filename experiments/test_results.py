# SPDX-License-Identifier: MIT
"""Every number in RESULTS.md's tables, recomputed from the JSON files without the report's code;
and README's, which stand in these tables, too."""

import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

PAGE, FILES = Path(__file__).with_name("RESULTS.md"), Path(__file__).with_name("results")
README = Path(__file__).parent.with_name("README.md")
SELECTION, COST = "With a loop and without", "All variants: what they are"
RINGS = "Rings whose edges may halt"
TITLES = {  # of the tables with a row for each variant that has an answer
    "chains": f"{SELECTION}; {COST}; All variants: how far they get; Halting below 0.2; "
    f"Halting: controls; Further: 14 hops, and rings; {RINGS}; How the state moves",
    "circuits": "Circuits: depth that is no walk along one path; Circuits: halting below 0.02",
    "shells": "Shells: composing permutations; Shells: halting below 0.2",
    "stack-rates": "Stacks: learning rates",
    "text": "Text: what the variants cost; Text: bits per byte",
    "layers": "Text: how many layers in the loop",
    "experts": "Text: experts in both arms",
    "few-bytes": "Text: little data",
    "rates": "Text: learning rates",
    "fresh": "Chains: fresh seeds",
}
LEADS = {  # whose lead it is, what is compared, and the column
    "chains": ("loop ends", "10 hops", "the loop's lead at 10 hops"),
    "circuits": ("loop", "10 hops", "the loop's lead at 10"),
    "shells": ("", "", ""),
    "fresh": ("", "", ""),
    "text": ("twice", "bits saved", "bits that the loop saves"),
    "layers": ("flat-three", "bits per byte", "bits saved over `flat-three`"),
    "experts": ("twice", "bits saved", "bits that the loop saves"),
    "few-bytes": ("twice twice-short twice-shorter", "bits saved", "bits that the loop saves"),
    "rates": ("", "", ""),
    "stack-rates": ("", "", ""),
}
# Steps: compared with one another.
SHORT = {"twice-short": 500, "one-loop-short": 500, "flat-params-short": 500, "flat-short": 500}
SHORT |= {"twice-shorter": 250, "flat-shorter": 250}
UNTIED = "untied-deep-long"
OWN_LOOP = "act", UNTIED  # which no table about the loop itself is about
# Student's t, two-sided 95%, by the number of seeds.
T95 = dict(enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262), 2))
RENAMED = {
    "fixed at the mean, rounded up": "fixed at the mean",
    "none halts, 32 loops": "none halts",
    "14 hops, 16 loops": "14 hops",
}
READ = {FILES / "bench.json", FILES / "gpu.json"}  # of SPEED.md
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?( ± \d+(\.\d+)?)?")


def read_tables(text):
    """title -> head and rows. Catches a table outside a section, and two in one section."""
    before, *sections = text.split("\n### ")
    assert "|" not in before, "a table before the first section"
    tables = {}
    for title, *lines in map(str.splitlines, sections):
        rows = [line.strip().strip("|").split("|") for line in lines if "|" in line]
        assert rows, f"{title}: no table"
        head, *rows = [[cell.strip() for cell in row] for row in rows]
        assert [i for i, row in enumerate(rows) if set(row) == {"---"}] == [0], f"{title}: tables"
        assert len(set(head)) == len(head) and title not in tables, f"{title}: one name twice"
        tables[title] = head, rows[1:]
    return tables


def load(pattern, name):
    """The runs in such files. Catches a file whose name is not what is in it."""
    paths = sorted(FILES.glob(pattern))
    READ.update(paths)
    runs = [json.loads(path.read_text("utf-8")) for path in paths]
    assert [path.stem for path in paths] == [name.format(**run) for run in runs], pattern
    return runs


def accuracies(run, looped):
    """In %. Catches a stack, or a model of one loop, that is read at other loops."""
    by_loops = {int(L): 100 * np.array(shares) for L, shares in run["accuracy"].items()}
    trained = run["frontier"] if run.get("variant") == UNTIED else 12  # blocks, of 12
    after = by_loops[trained if looped else min(by_loops)]
    values = {f"{k} hops": share for k, share in enumerate(after)}
    values["worst of 0–5 hops"] = after[:6].min()
    values["reach"] = [*(after >= 90), False].index(False) - 1
    if looped:
        values |= {f"10 hops, {L} loops": by_loops[L][10] for L in by_loops}
        best = max(map(np.mean, by_loops.values()))
        values["accuracy at the best fixed loop count"] = best
        values["0–10 hops, best fixed loop count"] = best
        values["0–10 hops, 12 loops"] = after.mean()
        lost = [by_loops.get(16, after) - by_loops[L] for L in by_loops if L >= 16]
        values["most lost by more loops"] = np.max(lost)
    return values


def halting(run):
    """With halting, its controls, and further than the usual test."""
    numbers = dict(run["halting"].get("0.2", run["halting"]))
    shares, loops = 100 * np.array(numbers.pop("accuracy")), numbers.pop("loops")
    values = {"accuracy, 0–10 hops": shares.mean(), "halting: accuracy": shares.mean()}
    spent = ("mean loops", "mean loops, 0–10 hops", "loops spent on 0–10 hops")
    values |= dict.fromkeys(spent, np.mean(loops))
    values |= {"10 hops, halting": shares[10], "0–10 hops, halting": shares.mean()}
    values["more loops for 10 hops than for 0"] = loops[10] - loops[0]
    numbers |= run.get("further", {})
    for column, key in RENAMED.items():
        numbers |= {column: numbers[key]} if key in numbers else {}
    return values | {name: 100 * share for name, share in numbers.items()}


def bits(run, looped):
    """Catches a model without a loop, or of one, that has more than one answer."""
    by_loops = run["bits_per_byte"]
    first = by_loops.get("1")  # of some loops only the answer after two is kept
    if not looped:
        (first,) = by_loops.values()
    own = by_loops.get("3" if run.get("variant") == "thrice" else "2", first)  # as in training
    values = {"bits saved": -own, "bits per byte": own}
    values |= {"1 loop, or none": first, "1 loop": first} if first else {}
    if looped:
        values |= {f"{L} loops": value for L, value in by_loops.items()}
        values["most apart from 2 loops on"] = np.ptp([by_loops[L] for L in by_loops if L != "1"])
    return values


def said(run):
    """By column; what a run was never asked is left out."""
    answers = run.get("accuracy") or run["bits_per_byte"]
    looped = "0" not in answers and not run.get("variant", "").startswith("one-loop")
    values = (accuracies if "accuracy" in run else bits)(run, looped)
    if "accuracy" in run and "halting" in run and looped:
        values |= halting(run)
    if run.get("variant") in OWN_LOOP:
        shown = {f"{k} hops" for k in range(11)} | {"worst of 0–5 hops", "reach"}
        shown |= {"10 hops, halting"} if run["variant"] == UNTIED else set()
        values = {key: values[key] for key in shown}
    if run.get("variant") == "ends":  # never taught that a loop is a hop: rings ask it nothing
        values = {key: value for key, value in values.items() if "ring" not in key}
    if "variant" in run:
        values["curriculum's end"] = run["frontier"]
        values["parameters (active)"] = f"{run['parameters']:,}"
        if run["active_parameters"] != run["parameters"]:
            values["parameters (active)"] += f" ({run['active_parameters']:,})"
        values["training TFLOPs"] = run["train_flops"] / 1e12
    if "rho" in run and looped and run["variant"] not in OWN_LOOP:
        values |= {f"state norm, loop {L}": norm for L, norm in run["state_norm"].items()}
        values |= {"rho(A)": run["rho"], "gain, first loop": run["gain"]["0"]}
        values["gain, after 32 loops"] = run["gain"]["32"]
    if "checks" in run:
        met = [a <= b if sign == "<=" else a >= b for _, a, sign, b in run["checks"]]
        values["verdict"] = "PASS" if all(met) else "FAIL"
        if run["train_seconds"] > 1:  # else a finished training was only measured again
            values["seconds"] = run["seconds"]
    return values


def recompute(supervision):
    """title -> row -> what each of its runs says. Catches leads that are not within one seed."""
    pages = defaultdict(lambda: defaultdict(list))
    for run in load("chains-*.json", "chains-{attention}-seed{seed}"):
        row = run["attention"].upper(), f"{run['seed']}"
        pages["python train_tiny.py"][row].append(said(run))
    for run in load("text-mla-*.json", "text-{attention}-seed{seed}"):
        pages["python -m experiments.text"][f"{run['seed']}",].append(said(run))
    for kind, titles in TITLES.items():
        runs = load(f"{kind}/*.json", "{variant}-seed{seed}")
        taught = {"chains": supervision, "few-bytes": SHORT}.get(kind, {})
        firsts, measure, lead = LEADS[kind]
        best = {
            (taught.get(run["variant"]), run["seed"]): said(run)[measure]
            for run in runs
            if run["variant"] in firsts.split()
        }
        if kind == "text":
            six = {run["seed"]: run for run in runs if run["variant"] == "flat-flops"}
        told = {}  # the hops that all runs of a variant came to
        for run in (run for run in runs if "told" in run["variant"]):
            told[run["variant"]] = min(run["frontier"], told.get(run["variant"], 99))
        for run in runs:
            name, values = run["variant"], said(run)
            if "told" in name:  # never asked for more hops than it was ever told of
                far = {f"{k} hops{end}" for k in range(11) for end in ("", ", worst seed")}
                far -= {f"{k} hops" for k in range(told[name] + 1)}
                values = {key: value for key, value in values.items() if key not in far}
            alike = taught.get(name), run["seed"]
            if name not in firsts.split() and alike in best and measure in values:
                values[lead] = best[alike] - values[measure]
            if kind == "layers":
                over_six = said(six[run["seed"]])["bits per byte"] - values["bits per byte"]
                values["bits saved over `flat-flops`"] = over_six
            for title in titles.split("; "):
                pages[title][name,].append(values)
            for shape, shares in run.get("shapes", {}).items() if name == "loop" else ():
                shares = {f"{L} loops": 100 * share for L, share in shares.items()}
                pages["Other shapes"][shape,].append(shares)
            for below, stop in (
                run.get("halting", {}).items() if kind == "text" and name == "loop" else ()
            ):
                stop |= {"bits per byte": stop["bits_per_byte"], "mean loops": stop["loops"]}
                pages["Text: halting"][name, below].append(stop)
    return pages


def fault(cell, values):
    """What a cell should say, or nothing. Catches a wrong mean, a wrong or missing interval, and a
    number where nothing was asked."""
    if not values or isinstance(values[0], str):
        wanted = " or ".join(set(values)) or "–"
        return "" if cell == wanted else wanted
    n, mean = len(values), np.mean(values)
    half = T95[n] * np.std(values, ddof=1) / n**0.5 if n > 1 else 0.0
    wanted = f"{mean:.4f} ± {half:.4f}"
    if not NUMBER.fullmatch(cell):
        return wanted
    parts = cell.split(" ± ")
    units = [10.0 ** -len(part.partition(".")[2]) for part in parts]
    right = abs(float(parts[0]) - mean) <= units[0] / 2 + 1e-9
    right &= abs(float(parts[1]) - half) <= units[1] if len(parts) == 2 else half < 1e-9
    return "" if right else wanted


def faults_of(title, head, lines, rows):
    """What is wrong with a table, and how many cells were compared. rows: see `recompute`."""
    width, wrong, n = max(map(len, rows), default=1), [], 0
    keys = [re.sub(r"depth ([\d–]+)", r"\1 hops", column) for column in head]
    keys = ["ring, edges halt, " * (title == RINGS) + key for key in keys]
    asked = [row for row in rows if any(set(keys) & run.keys() for run in rows[row])]
    labels = [tuple(line[:width]) for line in lines]
    if title == SELECTION:  # the only table that may leave variants out
        asked = [row for row in asked if row in labels]
    if sorted(labels) != sorted(asked) or not lines:
        wrong.append(f"{title}: the table has rows {labels}, the JSON files {asked or [*rows]}")
    for label, line in zip(labels, lines, strict=True):
        runs = rows.get(label, [])
        for column, key, cell in list(zip(head, keys, line, strict=True))[width:]:
            what = key.removesuffix(", worst seed")
            values = [run[what] for run in runs if what in run]
            values = [min(values)] if what != key and values else values
            if column in ("what differs", "model", "supervision"):  # no JSON file has them
                continue
            if column == "seeds":
                values = [f"{len(runs)}"]
            n += 1
            if wanted := fault(cell, values):
                wrong.append(f"{title} / {label} / {column}: {cell}, but recomputed {wanted}")
    return wrong, n


def test_every_number():
    """A number that the JSON files do not have, a row without a run, a run without a row."""
    tables = read_tables(PAGE.read_text("utf-8"))
    costs = tables.get(COST, ([], []))[1]  # variant, what differs, supervision, …
    pages = recompute({row[0]: row[2] for row in costs})
    found = {t: faults_of(t, *tables.get(t, ([], [])), pages[t]) for t in tables.keys() | pages}
    wrong = [line for title in sorted(found) for line in found[title][0]]
    wrong += [f"no table has {path}" for path in sorted({*FILES.rglob("*.json")} - READ)]
    assert not wrong, f"{len(wrong)} faults\n" + "\n".join(wrong)
    print(f"{sum(n for _, n in found.values())} cells of {len(found)} tables")
    _, *parts = re.split("<!-- /?(?:summary|points) -->", README.read_text("utf-8"))
    cells = {cell for _, rows in tables.values() for row in rows for cell in row}
    said_there = re.findall(r"[+-]?\d+\.\d+ ± \d+\.\d+", "".join(parts))
    assert len(said_there) > 40 and not {*said_there} - cells
    assert found and all(n for _, n in found.values())
