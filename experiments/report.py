# SPDX-License-Identifier: MIT
"""RESULTS.md, README's summary and the pictures, from the JSON files alone.

`python -m experiments.compare --report` writes them. Nothing in RESULTS.md is written by hand.
"""

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from statistics import fmean as mean
from statistics import stdev
from typing import NamedTuple

from experiments import variants
from experiments.circuits import Circuits
from experiments.text import Text
from experiments.variants import VARIANTS, Ends, Shells, ToldHops, supervision
from train_tiny import Chains, write_atomically

RESULTS = Path(__file__).resolve().parent / "results"
NEAR, LAST = Chains.train_hops, Chains.longest - 1  # hops: the most in training, and in the test

# ------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------

Runs = dict[str, list[dict]]  # the JSON of each variant, by seed


def load_runs(folder: Path, stem: str) -> list[dict]:
    """The kept JSON files whose name is `stem` (it may have a *) and a seed, by seed."""
    paths = folder.glob(f"{stem}-seed*.json")
    return sorted((json.loads(p.read_text("utf-8")) for p in paths), key=lambda n: n["seed"])


def load_results(kind: str, results: Path) -> Runs:
    """Of each variant that has any, in the order of VARIANTS."""
    found = {name: load_runs(results / kind, name) for name in VARIANTS[kind]}
    return {name: runs for name, runs in found.items() if runs}


def accuracy_at(numbers: dict, loops: int) -> list[float]:
    """Accuracy by hops after so many loops; a model without a loop, or of one, has one answer. An
    untied one is read before the blocks that its curriculum never came to."""
    if numbers.get("variant") == "one-loop":
        return numbers["accuracy"]["1"]
    if numbers.get("variant", "").startswith("untied"):
        loops = min(loops, numbers["frontier"])
    return numbers["accuracy"].get(str(loops)) or numbers["accuracy"]["0"]


def at_last(numbers: dict) -> float:
    """Accuracy at the most hops, or the largest depth, of the test."""
    return accuracy_at(numbers, Chains.test_loops)[LAST]


def halted(numbers: dict) -> float:
    """Accuracy in % with halting, over all hops or depths."""
    return 100 * mean(numbers["halting"]["accuracy"])


def fixed(numbers: dict) -> float:
    """The same without halting, after the best number of loops for all."""
    return 100 * max(map(mean, numbers["accuracy"].values()))


def best_count(numbers: dict) -> int:
    """The number of loops that `fixed` takes."""
    return max(map(int, numbers["accuracy"]), key=lambda L: mean(numbers["accuracy"][f"{L}"]))


def at_test_loops(numbers: dict) -> float:
    """Accuracy in %, over all hops or depths, after the usual number of loops."""
    return 100 * mean(accuracy_at(numbers, Chains.test_loops))


def loops_spent(numbers: dict) -> float:
    """With halting, the mean over all hops or depths."""
    return mean(numbers["halting"]["loops"])


def loops_more(numbers: dict) -> float:
    """With halting, for the hardest questions than for the easiest."""
    return numbers["halting"]["loops"][LAST] - numbers["halting"]["loops"][0]


def reach(numbers: dict) -> int:
    """The largest hop count up to which accuracy never falls below 90%; −1 if it has none."""
    accuracy = accuracy_at(numbers, Chains.test_loops)
    return next((k for k, a in enumerate(accuracy) if a < 0.9), len(accuracy)) - 1


def has_loop(runs: list[dict]) -> bool:
    return "rho" in runs[0] and not runs[0].get("variant", "").startswith("one-loop")


def variant_of(name: str, runs: list[dict]) -> variants.Variant:
    return VARIANTS[runs[0]["task"]][name]


def loops_freely(name: str, runs: list[dict]) -> bool:
    """Whether it has the model's own loop: any number of loops, the last state, no head to halt."""
    own = variant_of(name, runs).model in (variants.Untied, variants.WeightedOutput)
    return has_loop(runs) and not own


def was_asked(name: str, runs: list[dict], hops: int) -> bool:
    """The test asks a model that is told T for no more hops than its curriculum came to."""
    told = issubclass(variant_of(name, runs).task, ToldHops)
    return not told or hops <= min(n["frontier"] for n in runs)


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------

Column = Callable[[str, list[dict]], str]  # a variant's name and runs -> what the cell says


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(found: Runs, columns: dict[str, Column]) -> str:
    """A row for each variant."""
    rows = [[name, *(column(name, found[name]) for column in columns.values())] for name in found]
    return markdown(["variant", *columns], rows)


# Student's t: with n values, the 95% interval of their mean is ± T95[n] · deviation / √n.
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def spread(values: list[float], form: str = ".1f") -> str:
    """Mean ± half of its 95% t interval over the seeds. A dash: there are none."""
    if len(values) < 2:
        return f"{values[0]:{form}}" if values else "–"
    half = T95[len(values)] * stdev(values) / len(values) ** 0.5
    return f"{mean(values):{form}}" + (f" ± {half:{form.lstrip('+')}}" if half else "")


def lead_of(first: str, found: Runs, others: list[str], measure: Callable[[dict], float],
            scale: float = 100, form: str = "+.1f") -> Column:  # fmt: skip
    """What the first variant has more than each of the others, in points (or other units, by
    `scale`): differences within each seed."""
    best = {n["seed"]: measure(n) for n in found.get(first, [])}

    def column(name: str, runs: list[dict]) -> str:
        seeds = [n for n in runs if n["seed"] in best and name in others]
        return spread([scale * (best[n["seed"]] - measure(n)) for n in seeds], form)

    return column


def over(measure: Callable[[dict], float], form: str = ".1f") -> Column:
    return lambda name, runs: spread([measure(numbers) for numbers in runs], form)


def at_hops(hops: int, loops: int = Chains.test_loops) -> Column:
    """Accuracy in %; a dash where a model was never asked."""

    def column(name: str, runs: list[dict]) -> str:
        asked = was_asked(name, runs, hops)
        asked = asked and (loops_freely(name, runs) or loops == Chains.test_loops)
        return spread([100 * accuracy_at(n, loops)[hops] for n in runs if asked])

    return column


def size(numbers: dict) -> str:
    """All parameters, and in brackets how many of them a token uses, where experts make a
    difference."""
    every, active = numbers["parameters"], numbers["active_parameters"]
    return f"{every:,}" + (f" ({active:,})" if active < every else "")


PARAMETERS: dict[str, Column] = {
    "parameters (active)": lambda name, runs: size(runs[0]),
    "training TFLOPs": over(lambda n: n["train_flops"] / 1e12),
}
STACKS_REACH = 3  # the most swaps that stacks were all asked for
WORST = f"worst of 0–{NEAR} hops"
HALTING_CONTROLS = {
    "fixed at the mean": "fixed at the mean, rounded up",
    "random exit": "random exit",
    "only edges halt": "only edges halt",
    "only queries halt": "only queries halt",
    "none halts": f"none halts, {variants.MOST_LOOPS} loops",
}

# The loop and its strongest opponents, in README's summary and in the picture, with its lines.
PICTURED = {
    "ends": "C0o-",
    "one-loop": "C7x:",
    "flat-slow": "C1s-",
    "loop": "C2^-",
    "act": "C8P-",
    "flat-flops-told-long": "C3v-",
    "untied-deep-long": "C4D-",
}


def readme_summary(found: Runs) -> str:
    """The loop and its strongest opponents. found: what `load_results` has of the chains."""

    def at_last_halted(name: str, runs: list[dict]) -> str:
        act = variant_of(name, runs).model is variants.WeightedOutput  # it hardly halts
        asked = runs if has_loop(runs) and not act else []
        return spread([100 * n["halting"]["accuracy"][LAST] for n in asked])

    columns: dict[str, Column] = {
        "model": lambda name, runs: VARIANTS["chains"][name].what,
        "supervision": lambda name, runs: supervision(name),
    }
    columns |= PARAMETERS | {f"{k} hops": at_hops(k) for k in (NEAR, LAST)}
    columns |= {f"{LAST} hops, halting": at_last_halted}
    leads: dict[str, Column] = {}  # by supervision
    for first in ("loop", "ends"):
        how = supervision(first)
        alike = [n for n in found if supervision(n) == how and was_asked(n, found[n], LAST)]
        leads[how] = lead_of(first, found, [n for n in alike if n != first], at_last)
    title = f"the loop's lead at {LAST} hops"
    columns |= {title: lambda name, runs: leads[supervision(name)](name, runs)}
    return table({name: found[name] for name in PICTURED if name in found}, columns)


# ------------------------------------------------------------------------------------------------
# Sections: a title, what each arm was given, a table, and what to make of it
# ------------------------------------------------------------------------------------------------


class Section(NamedTuple):
    title: str
    given: str
    table: str
    note: str = ""  # holds whatever the numbers are: it has none of its own
    picture: str = ""  # what it shows; its file is named after the task
    only: str = "VARIANT"  # which of its rows can be trained again

    def page(self, kind: str) -> str:
        picture = self.picture and f"![{self.picture}](compare-{kind}.png)"
        again = f"`python -m experiments.compare --task {kind} --only {self.only} --results FOLDER`"
        again = f"To run a row again: {again}" if kind and self.given != AS_ABOVE else ""
        parts = [f"### {self.title}", self.given, again, picture, self.table, self.note]
        return "\n\n".join(part for part in parts if part)


GIVEN = (
    "Given to each arm that is taught ends: edges and the ends of chains at most 5 hops away, in "
    f"{Ends.steps} steps; its curriculum asks for a hop more once 90% of the farthest queries are "
    "answered, at a loss below 0.2. To the others: edges and the answer after every hop, none more "
    f"than 5 hops away (an arm `-deep`: 10), and how many hops are asked for, in {Chains.steps} "
    "steps; to those with a loop also noise on the state, unless its row says no. In the test a "
    "stack that is told T is told how far each query's end is; a loop gets as many loops for all. "
    "To an arm `-long`: more steps, as many as its row says. With one seed, all that are taught "
    f"alike get the same batches until their curricula part. Guessing an end: {Chains.guess:.0%}."
)
AS_ABOVE = "Given to each arm as above."


def chains_sections(found: Runs) -> list[Section]:
    loops = {name: runs for name, runs in found.items() if loops_freely(name, runs)}
    most = variants.MOST_LOOPS

    def halting(key: str) -> Column:
        return over(lambda n: 100 * n["halting"][key])

    def further(key: str) -> Column:
        """A dash on rings for those that were never taught that a loop is a hop."""

        def column(name: str, runs: list[dict]) -> str:
            asked = runs if "ring" not in key or supervision(name) == "every hop" else []
            return spread([100 * n["further"][key] for n in asked])

        return column

    what: dict[str, Column] = {
        "what differs": lambda name, runs: VARIANTS["chains"][name].what,
        "supervision": lambda name, runs: supervision(name),
        "seeds": lambda name, runs: f"{len(runs)}",
        "curriculum's end": over(lambda n: n["frontier"]),
    }
    quality = {WORST: over(lambda n: 100 * min(accuracy_at(n, Chains.test_loops)[: NEAR + 1]))}
    quality |= {f"{k} hops": at_hops(k) for k in (NEAR + 1, 8, LAST)}
    quality |= {f"{LAST} hops, {variants.MOST_LOOPS} loops": at_hops(LAST, variants.MOST_LOOPS)}
    quality |= {"reach": over(reach)}

    def worst(name: str, runs: list[dict]) -> str:
        asked = was_asked(name, runs, LAST)
        return f"{min(100 * at_last(n) for n in runs):.1f}" if asked else "–"

    quality |= {f"{LAST} hops, worst seed": worst}
    stopping = {
        "accuracy, 0–10 hops": over(halted),
        "mean loops, 0–10 hops": over(loops_spent),
        f"more loops for {LAST} hops than for 0": over(loops_more),
        "accuracy at the best fixed loop count": over(fixed),
    }
    chain = {
        "14 hops, 16 loops": further("14 hops"),
        "14 hops, halting": further("14 hops, halting"),
    }
    rings = {f"ring, {T} hops": further(f"ring, {T} hops") for T in variants.RING_HOPS}
    resting = {f"{T} hops": further(f"ring, edges halt, {T} hops") for T in variants.RING_HOPS}
    motion = {
        f"state norm, loop {L}": over(lambda n, L=L: n["state_norm"][str(L)])
        for L in variants.NORM_LOOPS
    }
    motion |= {"rho(A)": over(lambda n: n["rho"], ".2f")}
    for title, L in (("first loop", 0), (f"after {most} loops", most)):
        motion |= {f"gain, {title}": over(lambda n, L=L: n["gain"][str(L)], ".2f")}

    return [
        Section(
            "With a loop and without",
            GIVEN,
            readme_summary(found),
            "The lead: by how many points the loop with the same supervision is ahead of this "
            "model, paired by seed. Untied blocks are read after as many as their curriculum came "
            "to, or where they halt; the last of them repeats.",
            "Left: accuracy by hops, with and without a loop. Right: the loop, with changes.",
        ),
        Section(
            "All variants: what they are",
            AS_ABOVE,
            table(found, what | PARAMETERS),
            "The curriculum's end: the most hops (taught every hop: loops) that it came to.",
        ),
        Section(
            "All variants: how far they get",
            AS_ABOVE,
            table(found, quality),
        ),
        Section(
            f"Halting below {Chains.halt_threshold}",
            AS_ABOVE,
            table(loops, stopping),
            "No head was trained for it. What has halted cannot drift.",
        ),
        Section(
            "Halting: controls",
            AS_ABOVE,
            table(loops, {title: halting(key) for key, title in HALTING_CONTROLS.items()}),
            "Random exits spend as many loops, and a fixed count, rounded up, up to one more: it "
            "matters which token stops, and when.",
        ),
        Section(
            "Further: 14 hops, and rings",
            "Given to each arm as above. A ring gets as many loops as hops are asked for. In the "
            f"test of 14 hops, naming a random chain's end is right in {variants.Far.guess:.0%}.",
            table(loops, chain | rings),
            "Training knows no rings: there a walk never ends, and each hop needs a loop.",
        ),
        Section(
            "Rings whose edges may halt",
            AS_ABOVE,
            table({n: runs for n, runs in loops.items() if supervision(n) != "ends"}, resting),
            "The queries walk on. Resting edges keep them on the right way for longer.",
        ),
        Section(
            "Other shapes",
            "Given to the loop of train_tiny.py: chains of random lengths, the answer after every "
            "hop.",
            shapes_table(found.get("loop", [])),
            "The share of all nodes for which, after so many loops, the answer is the node as many "
            "hops further on. Star: all point at one end. Forest: three trees. Random function: "
            "each node points anywhere.",
            only="loop",
        ),
        Section(
            "How the state moves",
            AS_ABOVE,
            table(loops, motion),
            "rho(A) says little about the loop as a whole. The gain of its whole Jacobian may stay "
            "above one while the norm is bounded: small disturbances can still grow.",
        ),
    ]


def shapes_table(runs: list[dict]) -> str:
    runs = [n for n in runs if "shapes" in n]
    loops, rows = [f"{T}" for T in variants.SHAPE_LOOPS], []
    for shape in variants.SHAPES:
        cells = [spread([100 * n["shapes"][shape][T] for n in runs]) for T in loops]
        rows.append([shape, *cells])
    return markdown(["shape", *(f"{T} loops" for T in loops)], rows)


def likelier_value(depth: int) -> tuple[float, int]:
    """The share of the likelier value among the test's variables of this depth, and how many these
    are."""
    _, values, depths = Circuits().test_set()
    asked = values[depths == depth].float()
    ones = asked.mean().item()
    return max(ones, 1 - ones), len(asked)


def what_differs(kind: str) -> dict[str, Column]:
    return {
        "what differs": lambda name, runs: VARIANTS[kind][name].what,
        "seeds": lambda name, runs: f"{len(runs)}",
    } | PARAMETERS


def how_it_stops(difficulty: str) -> dict[str, Column]:
    """For a loop: accuracy on the hardest questions and on all, and loops used by difficulty.
    difficulty: a column's name, with {} for the number."""
    last, every = difficulty.format(LAST), difficulty.format(f"0–{LAST}")
    counts = (Chains.test_loops, variants.MOST_LOOPS)
    columns = {f"{last}, {L} loops": at_hops(LAST, L) for L in counts}
    return columns | {
        f"{last}, halting": over(lambda n: 100 * n["halting"]["accuracy"][LAST]),
        f"{every}, {Chains.test_loops} loops": over(at_test_loops),
        f"{every}, halting": over(halted),
        f"{every}, best fixed loop count": over(fixed),
        f"loops spent on {every}": over(loops_spent),
        f"more loops for {last} than for 0": over(loops_more),
    }


def circuits_sections(found: Runs) -> list[Section]:
    shares = ", ".join(f"{100 * likelier_value(k)[0]:.0f}" for k in (NEAR, 8, LAST))
    given = (
        "Given to each arm: the values of variables at most 5 gates deep, and those of their "
        f"operands; {Circuits.steps} steps. Nobody is told a depth. "
        f"Always naming the likelier value is right in {shares}% at depth "
        f"{NEAR}, 8, {LAST}. Of depth {LAST} the test has {likelier_value(LAST)[1]} variables."
    )
    quality = {f"depth {k}": at_hops(k) for k in (NEAR, 8, LAST)}
    others = [name for name in found if name != "loop"]
    quality |= {f"the loop's lead at {LAST}": lead_of("loop", found, others, at_last)}
    loop = {name: runs for name, runs in found.items() if name == "loop"}
    return [
        Section(
            "Circuits: depth that is no walk along one path",
            given,
            table(found, what_differs("circuits") | quality),
            "Far from the inputs, models without a loop do no better than always naming the "
            "likelier value.",
            "Accuracy by depth: the loop at several loop counts, and models without.",
        ),
        Section(
            f"Circuits: halting below {Circuits.halt_threshold}",
            AS_ABOVE,
            table(loop, how_it_stops("depth {}")),
            "The threshold is far smaller than that of the chains: the state of a gate that waits "
            "for its operands hardly moves either, and a larger threshold takes it for done. Means "
            "count each depth alike.",
        ),
    ]


def shells_sections(found: Runs) -> list[Section]:
    quality: dict[str, Column] = {"curriculum's end": over(lambda n: n["frontier"])}
    quality |= {f"{k} hops": at_hops(k) for k in (STACKS_REACH, NEAR, LAST)}
    looped = {name: runs for name, runs in found.items() if has_loop(runs)}
    return [
        Section(
            "Shells: composing permutations",
            "Given to each arm: a ball's place and node after T hops, each of which swaps any two "
            "of five cups (`three`: of three), or none, and T itself; no answer is more than "
            f"{NEAR} hops away; where each edge leads; {Shells.steps} steps; to a loop also noise "
            "on the state. Naming the right node and a random cup is right in 20% (`three`: 33%).",
            table(found, what_differs("shells") | quality),
            "The curriculum's end: the largest T that it came to. Without a coda the head reads "
            "the loop's state directly.",
        ),
        Section(
            f"Shells: halting below {Shells.halt_threshold}",
            AS_ABOVE,
            table(looped, how_it_stops("{} hops")),
            "A ball costs about as many loops as hops, and a few to see that it rests.",
        ),
    ]


def bits_at(numbers: dict, loops: int | None = None) -> float:
    """Bits per byte after so many loops. None: as many as in training, or two if that varied;
    without a loop, or with one, as it is."""
    if not has_loop([numbers]):
        return numbers["bits_per_byte"].get("0") or numbers["bits_per_byte"]["1"]
    own = VARIANTS[numbers["task"]][numbers["variant"]].task.n_loops or 2
    return numbers["bits_per_byte"][f"{loops or own}"]


def saved_by_looping(kind: str, found: Runs) -> Column:
    """Bits per byte that a loop saves over each of the variants it is compared with, paired by
    seed."""

    def column(name: str, runs: list[dict]) -> str:
        for first, others in variants.SAVED_OVER[kind].items():
            if name in others:
                return lead_of(first, found, others, lambda n: -bits_at(n), 1, "+.3f")(name, runs)
        return "–"

    return column


def readme_points(
    chains: Runs, circuits: Runs, shells: Runs, text: Runs, layers: Runs, few: Runs
) -> str:
    """README's points beside its table, with their numbers."""

    def percent(runs: list[dict], measure: Callable[[dict], float]) -> str:
        return spread([100 * measure(n) for n in runs])

    def halting(runs: list[dict]) -> str:
        return f"{spread([*map(halted, runs)])}% in {spread([*map(loops_spent, runs)])}"

    def a_hop_more(name: str) -> str:
        return percent(chains[name], lambda n: accuracy_at(n, Chains.test_loops)[NEAR + 1])

    def both(name: str) -> str:
        """Of circuits: accuracy at the largest depth in training, and in the test."""
        near, far = (
            percent(circuits[name], lambda n, k=k: accuracy_at(n, Chains.test_loops)[k])
            for k in (NEAR, LAST)
        )
        return f"{near} / {far}%"

    cups, coda = (percent(shells[name], at_last) for name in ("loop", "coda"))
    best = [*map(best_count, chains["loop"])]
    guess = "/".join(f"{100 * likelier_value(k)[0]:.0f}" for k in (NEAR, LAST))
    few_swaps = at_hops(STACKS_REACH)("flat-told-slow", shells["flat-told-slow"])
    saved = {name: saved_by_looping("text", text)(name, runs) for name, runs in text.items()}
    poor = {name: saved_by_looping("few-bytes", few)(name, runs) for name, runs in few.items()}
    whole = {first: saves("all", layers["all"]) for first, saves in saved_in(layers, text).items()}
    points = (
        "* **Reach.** Trained on at most 5 hops, the loop answers at 10; 14 layers learn 5 and "
        f"little more (at 6: {a_hop_more('flat-slow')}%; told T: "
        f"{a_hop_more('flat-flops-told-long')}%). Taught every hop, it walks trees that it never "
        "saw; on rings its errors add up.",
        "* **Not only walks.** Boolean circuits, taught 5 gates deep, depth untold. Right at "
        f"{NEAR} / {LAST}: the loop {both('loop')}; guessing {guess}%; one loop "
        f"{both('one-loop')}; 14 layers {both('flat-slow')}. A ball under five cups, T told, "
        f"{LAST} hops, taught {NEAR}: {cups}%, with a coda {coda}%; 13 layers, at {STACKS_REACH}: "
        f"{few_swaps}%.",
        f"* **Halting needs no head.** Chains (`loop`): {halting(chains['loop'])} loops (best "
        f"fixed, {min(best)} to {max(best)}: {spread([*map(fixed, chains['loop'])])}%). It saves "
        f"none on circuits ({halting(circuits['loop'])}; {Circuits.test_loops}: "
        f"{spread([*map(at_test_loops, circuits['loop'])])}%) or text.",
        "* **Language.** Bits per byte of Python code saved (minus: lost) by 2 of 4 layers twice: "
        f"over one loop {saved['one-loop']}; over 4 layers {saved['flat-params']}; over 6 (equal "
        f"FLOPs) {saved['flat-flops']}. All of 3 twice: over 3 {whole['flat-three']}; over 6 "
        f"{whole['flat-flops']}. On 250 kB, 8 reads, 2 of 4: over one loop "
        f"{poor['one-loop-short']}; over 6 {poor['flat-short']}.",
    )
    points = (point.replace(" ± ", "\u00a0±\u00a0") for point in points)  # no line breaks these
    lines = "\n".join(textwrap.fill(point, 120, subsequent_indent="  ") for point in points)
    return lines.replace("\u00a0", " ")


def saved_in(layers: Runs, text: Runs) -> dict[str, Column]:
    """Bits per byte that three layers with a loop save over three and over six without."""
    plain = {"flat-three": layers, "flat-flops": text}
    arms = ["flat-three", "one", "all"]
    return {
        first: lead_of(first, found, [n for n in arms if n != first], bits_at, 1, "+.3f")
        for first, found in plain.items()
    }


TEXT_GIVEN = (
    f"Given to each arm: the next byte, {Text.steps:,} steps, the same batches for one seed"
)


def text_sections(found: Runs) -> list[Section]:
    given = f"{TEXT_GIVEN}, dense layers, the same learning rates, unless the row says otherwise"

    def bits(L: int) -> Column:
        """A model without a loop, or of one, has one answer."""

        def column(name: str, runs: list[dict]) -> str:
            asked = runs if has_loop(runs) or L == 1 else []
            return spread([bits_at(n, L) for n in asked], ".3f")

        return column

    depths = {"1 loop, or none": bits(1)}
    depths |= {f"{L} loops": bits(L) for L in variants.TEXT_LOOPS[1:]}
    rows, columns = [], (("bits_per_byte", ".3f"), ("loops", ".1f"))
    columns += (("correlation with surprise", ".2f"),)
    for name, runs in found.items():
        random = VARIANTS["text"][name].task.n_loops is None  # else many loops were never trained
        for threshold in runs[0].get("halting", {}) if random else ():
            halting = [n["halting"][threshold] for n in runs]
            cells = [spread([h[k] for h in halting if k in h], form) for k, form in columns]
            rows.append([name, threshold, *cells])
    return [
        Section("Text: what the variants cost", f"{given}.", table(found, what_differs("text"))),
        Section(
            "Text: bits per byte",
            f"{given}; as many loops as the table before says.",
            table(found, depths | {SAVED: saved_by_looping("text", found)}),
            "Lower is better. Saved: how many bits fewer `twice` needs than this variant (a minus: "
            "more), paired by seed; each at the loops it was trained with, random ones at two.",
            "Left: bits per byte of each variant. Right: of those with a loop, by loops.",
        ),
        Section(
            "Text: halting",
            f"{given}; nothing was trained for halting.",
            markdown(
                ["variant", "halting below", "bits per byte", "mean loops", columns[-1][0]], rows
            ),
            "On every eighth test window. Surprise: the bits that the next byte costs at the most "
            "loops.",
        ),
    ]


SAVED = "bits that the loop saves"
BITS: dict[str, Column] = {"bits per byte": over(bits_at, ".3f")}
OWN_LOOPS = (
    "Lower is better; each at the loops it was trained with. Saved: how many bits fewer the loop "
    "needs than this variant (a minus: more), paired by seed"
)


def stack_rates_sections(found: Runs) -> list[Section]:
    quality = {"curriculum's end": over(lambda n: n["frontier"])}
    quality |= {f"{k} hops": at_hops(k) for k in (NEAR, LAST)}
    given = (
        "Given to each arm what it gets in its task's tables, but so many times the learning rate, "
    )
    given += "on seed 5, which only tables of rates have. Of circuits: depth instead of hops."
    columns = what_differs("stack-rates") | quality
    return [
        Section("Stacks: learning rates", given, table(found, columns), "The loop's rate is one.")
    ]


def saved_section(kind: str, title: str, given: str, found: Runs, note: str) -> list[Section]:
    """One question about text: bits per byte of each arm, and what the loop saves over it."""
    columns = what_differs(kind) | BITS | {SAVED: saved_by_looping(kind, found)}
    return [Section(title, f"{TEXT_GIVEN}{given}", table(found, columns), f"{OWN_LOOPS}{note}.")]


def layers_sections(found: Runs, text: Runs) -> list[Section]:
    saved = {f"bits saved over `{n}`": column for n, column in saved_in(found, text).items()}
    columns = what_differs("layers") | BITS | saved
    note = "Lower is better. Saved (a minus: lost): paired by seed. Of four layers the tables "
    note += "before have two in the loop; their `flat-flops`, six layers, has as many FLOPs as "
    note += "`all`. Run once, `all` is `flat-three`, but for A and B."
    title, given = "Text: how many layers in the loop", f"{TEXT_GIVEN}, dense layers."
    return [Section(title, given, table(found, columns), note)]


def experts_sections(found: Runs) -> list[Section]:
    given = "; the middle layers have four routed experts and a shared one, of which a token uses "
    given += "one and the shared one: together as wide as the dense layer."
    return saved_section("experts", "Text: experts in both arms", given, found, "")


def few_bytes_sections(found: Runs) -> list[Section]:
    task = variants.FewBytes
    size = task.pieces * task.piece
    times = task.steps * task.batch_size * task.context / size
    given = f", dense layers; {size:,} bytes, each read {times:.0f} times on average (`-short`: "
    given += f"{times / 2:.0f} times, in half of the steps, `-shorter`: {times / 4:.0f})."
    note = ". An arm that needs more bits after more steps overfits; README has the best length of "
    note += "those that were tried, picked on these same bytes"
    return saved_section("few-bytes", "Text: little data", given, found, note)


def rates_sections(found: Runs) -> list[Section]:
    given = f"{TEXT_GIVEN}, dense layers; so many times the learning rate of the chains. "
    given += "Seed 5, which only tables of rates have."
    note = "Lower is better; each at the loops it was trained with. The other tables of text have "
    note += "the rate in the middle."
    return [
        Section("Text: learning rates", given, table(found, what_differs("rates") | BITS), note)
    ]


def fresh_sections(found: Runs) -> list[Section]:
    quality = {f"{k} hops": at_hops(k) for k in (NEAR, LAST)}
    quality |= {f"{LAST} hops, {variants.MOST_LOOPS} loops": at_hops(LAST, variants.MOST_LOOPS)}
    quality |= {f"{LAST} hops, halting": over(lambda n: 100 * n["halting"]["accuracy"][LAST])}
    given = "Given to `ends` as above. An earlier recipe, of half the steps, left one of the seeds "
    given += "above behind. The seeds of this table no recipe saw."
    return [Section("Chains: fresh seeds", given, table(found, what_differs("fresh") | quality))]


SECTIONS = {
    "chains": chains_sections,
    "circuits": circuits_sections,
    "shells": shells_sections,
    "stack-rates": stack_rates_sections,
    "text": text_sections,
    "layers": layers_sections,
    "experts": experts_sections,
    "few-bytes": few_bytes_sections,
    "rates": rates_sections,
    "fresh": fresh_sections,
}


def sections_of(kind: str, results: Path) -> list[Section]:
    """None, if nothing of this kind was trained."""
    found = load_results(kind, results)
    more = [load_results("text", results)] if kind == "layers" else []
    return SECTIONS[kind](found, *more) if found else []


def trainer_sections(results: Path) -> list[Section]:
    """The runs of train_tiny.py and of experiments/text.py themselves."""
    sections = []
    runs = sorted(load_runs(results, "chains-*"), key=lambda n: n["attention"], reverse=True)
    if runs:
        head = ["attention", "seed", WORST, "8 hops", f"{LAST} hops", "most lost by more loops"]
        rows = []
        for n in runs:
            at, halting = accuracy_at(n, Chains.test_loops), n["halting"]
            halting = halting[str(Chains.halt_threshold)]
            (_, drift, _, _), accuracy = n["checks"][2], mean(halting["accuracy"])
            shares = [min(at[: NEAR + 1]), at[8], at[LAST], drift, accuracy]
            numbers = [f"{100 * share:.1f}" for share in shares]
            whole = n["train_seconds"] > 1  # else a finished training was only measured
            seconds = f"{n['seconds']:.0f}" if whole else "–"
            numbers += [f"{mean(halting['loops']):.1f}", seconds]
            rows.append([n["attention"].upper(), f"{n['seed']}", *numbers])
        given = (
            f"Given: the answer after every hop; none is more than {NEAR} hops away. MLA's seeds "
        )
        given += "10 to 14 are the models of the variant `loop` below."
        made = f"After {Chains.test_loops} loops, or halting below {Chains.halt_threshold}."
        made += " Lost: the most at any hops, from 16 loops to 20, 24, 28 or 32. Accuracy and mean"
        made += " loops with halting: over 0 to 10 hops."
        made += " The time depends on what else the machine did."
        rows = markdown([*head, "halting: accuracy", "mean loops", "seconds"], rows)
        sections.append(Section("python train_tiny.py", given, rows, made))
    if runs := load_runs(results, "text-mla"):
        head = ["seed", *(f"{L} loops" if L > 1 else "1 loop" for L in Text.test_loops)]
        rows = []
        for n in runs:
            bits = [f"{n['bits_per_byte'][str(L)]:.3f}" for L in Text.test_loops]
            (_, apart, _, _), verdict = n["checks"][1], "PASS" if n["passed"] else "FAIL"
            rows.append([f"{n['seed']}", *bits, f"{apart:.3f}", verdict, f"{n['seconds']:.0f}"])
        given = "Given: the next byte; a random number of loops in each step. Scored are 150,000 "
        given += "bytes; in the tables below 1,000,000."
        others = [f"{name} {bits:.3f}" for name, bits in runs[0]["compressors"].items()]
        made = f"Bits per byte. Compressors on the same bytes: {'; '.join(others)}."
        rows = markdown([*head, "most apart from 2 loops on", "verdict", "seconds"], rows)
        sections.append(Section("python -m experiments.text", given, rows, made))
    return sections


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------


def by_seed(values: list[list[float]]) -> tuple[list[float], list[float], list[float]]:
    """Mean, least and largest of the seeds, point by point."""
    points = [*zip(*values, strict=True)]
    return [*map(mean, points)], [*map(min, points)], [*map(max, points)]


def draw_chains(found: Runs, path: Path) -> None:
    """Left: accuracy by hops, with and without a loop. Right: the loop, with changes."""
    from matplotlib import figure

    picture = figure.Figure(figsize=(11, 5.2), layout="constrained")
    left, right = picture.subplots(1, 2)
    for name in (name for name in PICTURED if name in found):
        hops = [k for k in range(Chains.longest) if was_asked(name, found[name], k)]
        accuracy = [accuracy_at(n, Chains.test_loops) for n in found[name]]
        middle, low, high = by_seed([[100 * at[k] for k in hops] for at in accuracy])
        # shaded: from the worst seed to the best
        label = f"{VARIANTS['chains'][name].what} ({supervision(name)})"
        (line,) = left.plot(hops, middle, PICTURED[name], label=label)
        left.fill_between(hops, low, high, color=line.get_color(), alpha=0.2)
    guess = 100 / (1 + len(Chains.decoys))
    left.axhline(guess, color="grey", linewidth=1)
    left.text(0, guess - 1, "guessing", va="top", color="grey")
    left.axvline(NEAR + 0.5, color="black", linewidth=0.8, linestyle="--")
    left.text(NEAR + 0.9, 5, "beyond training →", fontsize="small")
    left.set(xlabel="hops to the end of the chain", ylabel="accuracy (%)", ylim=(0, 102))
    left.set_title("Looping against stacking")
    handles = left.get_legend_handles_labels()
    picture.legend(*handles, fontsize="small", loc="outside lower center", ncols=2, title="left:")

    names = [name for name in found if loops_freely(name, found[name])][::-1]
    for row, name in enumerate(names):
        for loops, mark in ((Chains.test_loops, "C0o"), (variants.MOST_LOOPS, "C3x")):
            points = [100 * accuracy_at(n, loops)[LAST] for n in found[name]]
            label = f"after {loops} loops" if row == 0 else None
            right.plot(points, [row] * len(points), mark, label=label, alpha=0.8)
    right.set_yticks(range(len(names)), [VARIANTS["chains"][name].what for name in names])
    right.set(xlabel=f"accuracy at {LAST} hops (%), one mark per seed")
    right.set_title("The loop, with changes")
    if names:
        right.legend(loc="center left")
    right.grid(axis="x", alpha=0.3)
    picture.savefig(path, dpi=120, format="png")


def draw_text(found: Runs, path: Path) -> None:
    """Left: bits per byte of each arm, one mark per seed. Right: of those with a loop, by loops."""
    from matplotlib import figure

    picture = figure.Figure(figsize=(11, 4.6), layout="constrained")
    left, right = picture.subplots(1, 2)
    colours = {name: f"C{i}" for i, name in enumerate(n for n in found if has_loop(found[n]))}
    for row, (name, runs) in enumerate(found.items()):
        colour, bits = colours.get(name, "0.4"), [bits_at(n) for n in runs]
        left.plot(bits, [row] * len(runs), "o", color=colour, alpha=0.5)
        left.plot(mean(bits), row, "|", color=colour, markersize=18, markeredgewidth=2)
        if name in colours:
            loops = [int(L) for L in runs[0]["bits_per_byte"]]
            middle, low, high = by_seed([[*n["bits_per_byte"].values()] for n in runs])
            right.plot(loops, middle, "o-", color=colour)
            right.fill_between(loops, low, high, color=colour, alpha=0.2)  # worst to best seed
    left.set_yticks(range(len(found)), [VARIANTS["text"][name].what for name in found])
    left.invert_yaxis()
    left.grid(axis="x", alpha=0.3)
    left.set(
        xlabel="held-out bits per byte (fewer: better)",
        title="At the loops of its training (line: mean)",
    )
    right.set_xscale("log", base=2)
    right.set_xticks(variants.TEXT_LOOPS, [f"{L}" for L in variants.TEXT_LOOPS], minor=False)
    right.set(xlabel="loops", ylabel="held-out bits per byte")
    right.set_title("At other loop counts (colours: as on the left)")
    picture.savefig(path, dpi=120, format="png")


def draw_circuits(found: Runs, path: Path) -> None:
    """Accuracy by depth: the loop after 1, 2, 4 … loops, and the models without."""
    from matplotlib import colormaps, figure

    picture = figure.Figure(figsize=(7.5, 4.6), layout="constrained")
    axes, depths = picture.subplots(), range(Circuits.longest)
    shown = (1, 2, 4, 6, 8, Circuits.test_loops)
    for name, runs in found.items():
        for i, loops in enumerate(shown if has_loop(runs) else [Circuits.test_loops]):
            middle, low, high = by_seed([[100 * a for a in accuracy_at(n, loops)] for n in runs])
            colour = colormaps["viridis"](i / len(shown)) if has_loop(runs) else "C3"
            style = {"one-loop": "x:", "flat-params": "s--", "flat-slow": "D-."}.get(name, "o-")
            label = f"the loop, {loops} loop{'s' * (loops > 1)}"
            label = label if has_loop(runs) else VARIANTS["circuits"][name].what
            axes.plot(depths, middle, style, color=colour, label=label)
            axes.fill_between(depths, low, high, color=colour, alpha=0.15)  # worst to best seed
    axes.axvline(NEAR + 0.5, color="black", linewidth=0.8, linestyle="--")
    axes.text(NEAR + 0.6, 101, "deeper than any in training →", fontsize="small")
    axes.set(xlabel=Circuits.difficulty, ylabel="accuracy (%)", ylim=(40, 105))
    picture.legend(loc="outside right center", fontsize="small")
    picture.savefig(path, dpi=120, format="png")


DRAW = {"chains": draw_chains, "circuits": draw_circuits, "text": draw_text}

# ------------------------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------------------------

INTRODUCTION = f"""# Results

Written by `python -m experiments.compare --report` from the JSON files in [results](results); a
test compares. Accuracy in %: the mean of the seeds ± half of its 95% t interval; after
{Chains.test_loops} loops where nothing else is said. *reach*: the hop count up to which accuracy
stays at 90% or more (the test ends at {LAST}). A dash: does not apply, or was not
measured. No ±: all seeds agree, or there is only one. ± is over seeds, which share one test. A
stack is a transformer without a loop."""


def results_text(results: Path) -> str:
    """RESULTS.md."""
    pages = [INTRODUCTION]
    if trainer := trainer_sections(results):
        pages += ["## The trainer's own runs", *(section.page("") for section in trainer)]
    pages += ["## The comparison"]
    for kind in VARIANTS:
        pages += [section.page(kind) for section in sections_of(kind, results)]
    return "\n\n".join(pages) + "\n"


README_KINDS = "chains", "circuits", "shells", "text", "layers", "few-bytes"


def with_summary(readme: str, results: Path) -> str:
    """README's text with what is written between its marks. Raises ValueError if they are gone."""
    written = {"summary": readme_summary(load_results("chains", results))}
    found = [load_results(kind, results) for kind in README_KINDS]
    written |= {"points": readme_points(*found)}
    for mark, text in written.items():
        before, rest = readme.split(f"<!-- {mark} -->", 1)
        _, after = rest.split(f"<!-- /{mark} -->", 1)
        readme = f"{before}<!-- {mark} -->\n{text}\n<!-- /{mark} -->{after}"
    return readme


def write(results: Path) -> list[Path]:
    """RESULTS.md and the pictures, beside the results; of the real ones also README's summary.

    Returns what was written.
    """
    texts = {results.parent / "RESULTS.md": results_text(results)}
    if results == RESULTS:
        readme = RESULTS.parent.parent / "README.md"
        texts[readme] = with_summary(readme.read_text("utf-8"), results)
    for path, text in texts.items():
        write_atomically(path, lambda path, text=text: path.write_text(text, "utf-8"))
    pictures = []
    for kind, draw in DRAW.items():
        if found := load_results(kind, results):
            pictures.append(results.parent / f"compare-{kind}.png")
            write_atomically(pictures[-1], lambda path, f=found, draw=draw: draw(f, path))
    return [*texts, *pictures]
