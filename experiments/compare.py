# SPDX-License-Identifier: MIT
"""What looping buys, and what it does not: variants of Mythos, trained alike and compared.

    python -m experiments.compare                    chains: pointer chasing
    python -m experiments.compare --task text        the bytes of Python's own library
    python -m experiments.compare --task stability   chains again, at other learning rates
    python -m experiments.compare --report           no training, only tables and pictures

A variant is the toy of train_tiny.py with a few values changed, on the same data, batch size, seeds
and, unless its name ends in "long", for as many steps. Each trained variant leaves one JSON in
experiments/results, and one that has its JSON is not trained again; an interrupted one goes on from
its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos import RecurrentDepthTransformer, expect
from train_tiny import (
    Chains,
    Text,
    load_checkpoint,
    logits_per_loop,
    mean,
    train,
    write_atomically,
)  # fmt: skip

RESULTS = Path(__file__).parent / "results"

# ------------------------------------------------------------------------------------------------
# Tasks and models that differ from train_tiny.py's
# ------------------------------------------------------------------------------------------------


class Ends(Chains):
    """Chains for a model without loops, which is not told T: the answer is the chain's end.

    The same curriculum, in hops instead of loops: at first only queries whose end is at most 1 hop
    away are scored; each time those are mastered, a hop more, up to `farthest`.
    """

    farthest = 5

    def draw_loops(self, generator: torch.Generator) -> int:
        return self.train_loops  # the targets' T. The model runs none.

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
        self.train_hops = self.frontier
        return *super().batch(generator)[:2], 0

    def learned(self, n_loops: int, loss: float) -> None:
        if self.frontier < self.farthest and loss < 0.2:
            self.frontier += 1


class DeepEnds(Ends):
    """Trained on all hop counts that the test asks for, so that nobody can say it was starved."""

    farthest = 10


class SlowEnds(Ends):
    """A third of the learning rates, which were found for the loop: 14 layers may want less."""

    lr_scale = 1 / 3


class FastEnds(Ends):
    """Or more."""

    lr_scale = 2.0


class LongEnds(Ends):
    """Three times the steps: 14 layers may only be slower to learn."""

    steps = 3 * Chains.steps


class HopEmbedding(nn.Embedding):
    """An embedding that adds to every token a learned vector for T: how far to go."""

    def __init__(self, vocab_size: int, d_model: int, most_hops: int):
        super().__init__(vocab_size, d_model)
        self.hops = nn.Parameter(torch.zeros(most_hops + 1, d_model))
        self.T = most_hops

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + self.hops[self.T]


class ToldHops(Chains):
    """For a model without loops that is told T: the loop's own batches, targets and curriculum.

    What the loop learns from f^T at every T, this model can learn, too.
    """

    def prepare(self, model: RecurrentDepthTransformer) -> None:
        vocab_size, d_model = model.embed.weight.shape
        self.embed = HopEmbedding(vocab_size, d_model, self.train_loops)
        nn.init.normal_(self.embed.weight, std=0.02)  # as in init_weights
        model.embed = self.embed

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
        tokens, targets, self.embed.T = super().batch(generator)
        return tokens, targets, 0

    def learned(self, n_loops: int, loss: float) -> None:
        super().learned(self.embed.T, loss)

    def measure(self, *args) -> tuple[dict[int, list[float]], list[float]]:
        """Asked to go all the way, or as far as the curriculum came: T beyond it means nothing."""
        self.embed.T = self.frontier
        return super().measure(*args)


class DeepToldHops(ToldHops):
    """Told T, and trained on all hop counts that the test asks for."""

    train_hops = 10


class LongDeepToldHops(DeepToldHops):
    """The strongest opponent: told T, trained on all hop counts of the test, thrice the steps."""

    steps = 3 * Chains.steps


class Far(Chains):
    """A test of 14 hops instead of 10: almost three times as far as any training answer."""

    longest, decoys = 15, (2, 2, 1)


class FixedLoops(Chains):
    """Always the same number of loops: no curriculum, nothing that rewards an early answer."""

    def draw_loops(self, generator: torch.Generator) -> int:
        return self.train_loops


class FlatText(Text):
    """Text for a model without loops."""

    def draw_loops(self, generator: torch.Generator) -> int:
        return 0


class FixedText(Text):
    """Always the mean number of loops, gradient through all of them."""

    def draw_loops(self, generator: torch.Generator) -> int:
        return self.mean_loops


class InputOnce(RecurrentDepthTransformer):
    """e is seen by the first loop only; afterwards the state has to remember it."""

    def step(self, h, e, place, updates=None):
        first = (h == 0).all(dim=-1, keepdim=True)  # h_0, and no later state
        return super().step(h, torch.where(first, e, 0.0), place, updates)


class NoInjection(RecurrentDepthTransformer):
    """B = 0: e enters through R(h, e) alone."""

    def __init__(self, config=None, **overrides):
        super().__init__(config, **overrides)
        self.state_update.b.requires_grad_(False).zero_()


class CountsLoops(RecurrentDepthTransformer):
    """Knows which loop it is in: `self.t`."""

    def run_prelude(self, tokens, cache=None):
        self.t = 0
        return super().run_prelude(tokens, cache)


class LoopIndexEmbedding(CountsLoops):
    """OpenMythos tells the block which loop it is in: a sinusoid of t on D / 8 of the channels."""

    def step(self, h, e, place, updates=None):
        width = self.config.d_model // 8
        two_i = torch.arange(0, width, 2, device=e.device)
        angles = self.t * 10_000.0 ** (-two_i / width)
        index = F.pad(torch.cat([angles.sin(), angles.cos()]), (0, e.shape[-1] - width))
        self.t += 1
        return super().step(h, e + index.to(e.dtype), place, updates)


class LoopLoRA(CountsLoops):
    """OpenMythos gives each loop a low-rank change of its own: R + (R·down ⊙ scale_t)·up.

    Loops beyond those trained use the last scale.
    """

    def __init__(self, config=None, rank: int = 8, **overrides):
        super().__init__(config, **overrides)
        D, loops = self.config.d_model, self.config.max_loop_iters
        self.lora_down = nn.Parameter(torch.randn(rank, D) / D**0.5)
        self.lora_scale = nn.Parameter(torch.ones(loops, rank))
        self.lora_up = nn.Parameter(torch.zeros(D, rank))

    def step(self, h, e, place, updates=None):
        r = self.loop_norm(h + e)
        for i, block in enumerate(self.recurrent):
            r = block(r, place, updates and updates[i])
        scale = self.lora_scale[min(self.t, len(self.lora_scale) - 1)]
        self.t += 1
        return self.state_update(
            h, e, r + F.linear(F.linear(r, self.lora_down) * scale, self.lora_up)
        )


# ------------------------------------------------------------------------------------------------
# Variants
# ------------------------------------------------------------------------------------------------


class Variant(NamedTuple):
    what: str
    config: dict = {}
    task: type = Chains
    model: type = RecurrentDepthTransformer


# Dense layers without a loop. d_ff is chosen so that 3 of them have as many parameters as the model
# with the loop, and 14 as many FLOPs as its 12 loops (a test compares).
SAME_PARAMS = dict(prelude_layers=0, recurrent_layers=0, coda_layers=3, d_ff=448)
SAME_FLOPS = dict(prelude_layers=0, recurrent_layers=0, coda_layers=14, d_ff=222)
TEXT_SAME_PARAMS = dict(prelude_layers=0, recurrent_layers=0, coda_layers=4, d_ff=436)
TEXT_SAME_FLOPS = dict(prelude_layers=0, recurrent_layers=0, coda_layers=6, d_ff=384)

VARIANTS = {
    "chains": {
        "loop": Variant("the loop of train_tiny.py"),
        "flat-params": Variant("3 layers, same parameters", SAME_PARAMS, Ends),
        "flat-flops": Variant("14 layers, same FLOPs as 12 loops", SAME_FLOPS, Ends),
        "flat-params-deep": Variant("3 layers, curriculum up to 10 hops", SAME_PARAMS, DeepEnds),
        "flat-flops-deep": Variant("14 layers, curriculum up to 10 hops", SAME_FLOPS, DeepEnds),
        "flat-flops-slow": Variant("14 layers, a third of the learning rate", SAME_FLOPS, SlowEnds),
        "flat-flops-fast": Variant("14 layers, twice the learning rate", SAME_FLOPS, FastEnds),
        "flat-params-told": Variant("3 layers, told how many hops", SAME_PARAMS, ToldHops),
        "flat-flops-told": Variant("14 layers, told how many hops", SAME_FLOPS, ToldHops),
        "flat-flops-told-deep": Variant(
            "14 layers, told, trained to 10 hops", SAME_FLOPS, DeepToldHops
        ),
        "flat-flops-long": Variant("14 layers, three times the steps", SAME_FLOPS, LongEnds),
        "flat-flops-told-deep-long": Variant(
            "14 layers, told, to 10 hops, three times the steps", SAME_FLOPS, LongDeepToldHops
        ),
        "fixed-loops": Variant("always 12 loops, so no curriculum", {}, FixedLoops),
        "no-injection": Variant("B = 0", model=NoInjection),
        "input-once": Variant("e in the first loop only", model=InputOnce),
        "free-a": Variant("A unconstrained", dict(spectral_radius_target=None)),
        "dense": Variant("dense feed-forward, no experts", dict(num_experts=0)),
        "gqa": Variant("GQA instead of MLA", dict(attention_type="gqa")),
        "no-prelude": Variant("no prelude", dict(prelude_layers=0)),
        "loop-index": Variant("with a loop-index embedding", model=LoopIndexEmbedding),
        "loop-lora": Variant("with a LoRA per loop", model=LoopLoRA),
    },
    "text": {
        "loop": Variant("random loop counts: the loop of train_tiny.py", task=Text),
        "flat-params": Variant("same parameters, no loop", TEXT_SAME_PARAMS, FlatText),
        "flat-flops": Variant("same FLOPs as 4 loops, no loop", TEXT_SAME_FLOPS, FlatText),
        "fixed-loops": Variant("always 4 loops in training", task=FixedText),
    },
}
# At the learning rate itself (lr1) they are those of the chains and not trained again.
LR_SCALES = ("0.33", "2", "4")
UNSTABLE = ("loop", "free-a", "no-injection")  # fixed-loops fails at the usual rate already
VARIANTS["stability"] = {
    f"{name}-lr{scale}": VARIANTS["chains"][name] for name in UNSTABLE for scale in LR_SCALES
}

# ------------------------------------------------------------------------------------------------
# Measuring a trained variant
# ------------------------------------------------------------------------------------------------

MOST_LOOPS = 32
HALT_THRESHOLD = Chains.halt_threshold
RING_HOPS = (8, 16, 32, 64)
NORM_LOOPS = (1, 16, 256)  # where the tables show the norm of the state
TEXT_LOOPS = [1, 2, 3, 4, 6, 8, 12, 16, 24, MOST_LOOPS]


def measure_chains(model: RecurrentDepthTransformer, task: Chains) -> dict:
    """Accuracy by hops for each loop count; with a loop also how it moves, and how it halts."""
    if not model.recurrent:
        return {"accuracy": task.measure(model, [0])[0]}
    loops = list(range(1, MOST_LOOPS + 1))
    accuracy, _ = task.measure(model, loops)
    halted, used = task.measure(model, [MOST_LOOPS], HALT_THRESHOLD)

    # Random exit: as many queries leave after L loops as with halting, but not those that are done.
    tokens, _, distance = task.test_set()
    exits = torch.cat(
        [logits_per_loop(model, t, [MOST_LOOPS], HALT_THRESHOLD)[1] for t in tokens.split(125)]
    )[:, task.n_nodes :][distance >= 0]
    share = (exits.bincount(minlength=MOST_LOOPS + 1) / len(exits)).tolist()

    def some_halt(edges: float, queries: float) -> float:
        """Accuracy after 32 loops with a threshold for each position: at 0 nothing halts."""
        n = task.n_nodes
        thresholds = torch.tensor([edges] * n + [queries] * n)
        return mean(task.measure(model, [MOST_LOOPS], thresholds)[0][MOST_LOOPS])

    halting = {
        "accuracy": halted[MOST_LOOPS],
        "loops": used,
        "random exit": sum(share[L] * mean(accuracy[L]) for L in loops),
        # rounded up, which favours it
        "fixed at the mean": mean(accuracy[math.ceil(mean(used))]),
        "only edges halt": some_halt(HALT_THRESHOLD, 0.0),
        "only queries halt": some_halt(0.0, HALT_THRESHOLD),
        "none halts": mean(accuracy[MOST_LOOPS]),
    }
    numbers = {"accuracy": accuracy, "halting": halting, "further": measure_further(model)}
    return numbers | dynamics(model, tokens[:8])


def measure_further(model: RecurrentDepthTransformer) -> dict:
    """14 hops to the end of a chain; then 8 to 64 hops on a ring, which has no end.

    Training knows no rings: a walk never stands still here, and T hops need exactly T loops.
    """
    far = Far()
    fixed, _ = far.measure(model, [far.longest + 1])
    halting, _ = far.measure(model, [MOST_LOOPS], HALT_THRESHOLD)
    tokens, answers = ring_set()
    numbers = {"14 hops": fixed[far.longest + 1][-1], "14 hops, halting": halting[MOST_LOOPS][-1]}
    n = far.n_nodes
    only_edges = torch.tensor([HALT_THRESHOLD] * n + [0.0] * n)
    for what, threshold in (("ring", None), ("ring, edges halt", only_edges)):
        logits, _ = logits_per_loop(model, tokens, list(RING_HOPS), threshold)
        for T in RING_HOPS:
            right = logits[T][:, n:].argmax(dim=-1) == answers[T]
            numbers[f"{what}, {T} hops"] = right.float().mean().item()
    return numbers


def ring_set(size: int = 100, seed: int = 12345) -> tuple[Tensor, dict[int, Tensor]]:
    """tokens (S, 2n), in each sequence one ring of all n nodes; the answers (S, n) after T hops."""
    n, rng = Chains.n_nodes, torch.Generator().manual_seed(seed)

    def shuffled() -> Tensor:
        return torch.rand(size, n, generator=rng).argsort(dim=1)

    ring, queries = shuffled(), shuffled()
    successors = torch.zeros_like(ring).scatter(1, ring, ring.roll(-1, dims=1))
    edges = (n + n * torch.arange(n) + successors).gather(1, shuffled())
    place = ring.argsort(dim=1).gather(1, queries)  # of each query on the ring
    answers = {T: ring.gather(1, (place + T) % n) for T in RING_HOPS}
    return torch.cat([edges, queries], dim=1), answers


def dynamics(model: RecurrentDepthTransformer, tokens: Tensor) -> dict:
    """Mean state norm after 1, 2, 4 … loops; rho(A); the gain of the first and a settled loop."""
    most = NORM_LOOPS[-1]
    norms = model.diagnostics(tokens, n_loops=most)["state_norm"].mean(dim=(1, 2))
    rng = torch.Generator().manual_seed(0)
    return {
        "state_norm": {2**i: norms[2**i - 1].item() for i in range(most.bit_length())},
        "rho": model.spectral_radius(),
        "gain": {n: model.loop_gain(tokens, n_loops=n, generator=rng) for n in (0, MOST_LOOPS)},
    }


@torch.no_grad()
def measure_text(model: RecurrentDepthTransformer, task: Text) -> dict:
    """Bits per byte for each loop count; with a loop also whether halting follows surprise."""
    if not model.recurrent:
        return {"bits_per_byte": task.measure(model, [0])}
    bits = task.measure(model, TEXT_LOOPS)
    windows, halting = task.test_set()[::8], {}
    full, _ = logits_per_loop(model, windows[:, :-1], [task.mean_loops, MOST_LOOPS])
    for L, logits in full.items():
        surprise = F.cross_entropy(logits.mT, windows[:, 1:], reduction="none") / math.log(2)
        halting[f"never, {L} loops"] = {"bits_per_byte": surprise.mean().item(), "loops": L}
    for threshold in (0.3, 0.1, 0.03):
        logits, used = logits_per_loop(model, windows[:, :-1], [MOST_LOOPS], threshold)
        cost = F.cross_entropy(logits[MOST_LOOPS].mT, windows[:, 1:]) / math.log(2)
        pair = torch.stack([used.flatten().float(), surprise.flatten()])
        halting[threshold] = {
            "bits_per_byte": cost.item(),
            "loops": pair[0].mean().item(),
            "correlation with surprise": torch.corrcoef(pair)[0, 1].item(),
        }
    return {"bits_per_byte": bits, "halting": halting} | dynamics(model, windows[:2, :-1])


def measure_stability(model: RecurrentDepthTransformer, task: Chains) -> dict:
    """Does it still answer, and how does the state move?"""
    accuracy, _ = task.measure(model, sorted({Chains.train_loops, MOST_LOOPS}))
    return {"accuracy": accuracy} | dynamics(model, task.test_set()[0][:8])


MEASURES = {"chains": measure_chains, "text": measure_text, "stability": measure_stability}


def training_flops(model: RecurrentDepthTransformer, task, steps: int, total_loops: int) -> float:
    """Forward and backward FLOPs of a whole training, the backward being twice the forward.

    Truncated backpropagation (text) costs less than this: loops before the last 4 have no backward.
    """
    tokens, _, _ = task.batch(torch.Generator().manual_seed(0))
    context = tokens.shape[1] // 2
    once = model.flops_per_token(0, context)
    loop = model.flops_per_token(1, context) - once if model.recurrent else 0
    return 3.0 * tokens.numel() * (steps * once + total_loops * loop)


def run(
    kind: str, name: str, seed: int, results: Path, runs: Path, steps: int | None = None
) -> None:
    """Train and measure one variant with one seed, unless its JSON is there.

    steps: None are those of the variant's task.
    """
    path = results / kind / f"{name}-seed{seed}.json"
    if path.exists():
        return
    print(f"\n{kind} {name}, seed {seed}: {VARIANTS[kind][name].what}", flush=True)
    variant, checkpoint = VARIANTS[kind][name], runs / kind / f"{name}-seed{seed}.pt"
    torch.manual_seed(seed)
    task = variant.task()
    steps = steps or task.steps
    if kind == "stability":
        task.lr_scale = float(name.rpartition("-lr")[2])
    model = variant.model(replace(task.config("mla"), **variant.config))
    task.prepare(model)
    started = time.perf_counter()
    numbers = {"task": kind, "variant": name, "seed": seed, "steps": steps}
    numbers |= {"parameters": model.num_params(), "torch": torch.__version__}
    try:
        train(
            model, task, steps=steps, seed=seed, checkpoint=checkpoint, resume=checkpoint.exists()
        )  # fmt: skip
    except FloatingPointError as error:
        if kind != "stability":
            raise
        numbers["diverged"] = str(error)  # the result that this task looks for
    seconds = time.perf_counter() - started
    numbers |= {"train_seconds": seconds, "threads": torch.get_num_threads()}
    if "diverged" not in numbers:
        saved = load_checkpoint(checkpoint)
        task.frontier = saved["frontier"]
        numbers |= {"train_flops": training_flops(model, task, steps, saved["loops"])}
        numbers |= {"frontier": task.frontier}  # how far the curriculum came
        numbers |= MEASURES[kind](model.eval(), task)
    text = json.dumps(numbers, indent=1)
    write_atomically(path, lambda path: path.write_text(text, "utf-8"))
    print(f"measured in {time.perf_counter() - started - seconds:.0f} s: {path.name}", flush=True)


# ------------------------------------------------------------------------------------------------
# Tables and figures, from the JSON files alone
# ------------------------------------------------------------------------------------------------


def load_results(kind: str, results: Path) -> dict[str, list[dict]]:
    """The kept JSON files of each variant that has any, by seed, in the order of VARIANTS."""

    def read(kind: str, name: str) -> list[dict]:
        paths = sorted((results / kind).glob(f"{name}-seed*"))
        return [json.loads(path.read_text("utf-8")) for path in paths]

    def rank(key: str) -> tuple[int, float]:
        name, _, scale = key.rpartition("-lr")
        return UNSTABLE.index(name), float(scale)

    found = {name: read(kind, name) for name in VARIANTS[kind]}
    if kind == "stability" and any(found.values()):
        found |= {f"{name}-lr1": read("chains", name) for name in UNSTABLE}
        found = {key: found[key] for key in sorted(found, key=rank)}
    return {name: runs for name, runs in found.items() if runs}


def spread(values: list[float], form: str = ".1f") -> str:
    """Mean, and in brackets the smallest and the largest of the seeds."""
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return f"{mean(values):{form}}" + (f" ({low} to {high})" if low != high else "")


def markdown(head: str, rows: list[list[str]]) -> str:
    lines = [head, "|".join(["", *["---"] * (head.count("|") - 1), ""])]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def accuracy_at(numbers: dict, loops: int) -> list[float]:
    """Accuracy by hops after so many loops; a model without a loop has one answer for all."""
    return numbers["accuracy"].get(str(loops)) or numbers["accuracy"]["0"]


def reach(numbers: dict) -> int:
    """The largest hop count up to which accuracy never falls below 90%; −1 if it has none."""
    accuracy = accuracy_at(numbers, Chains.train_loops)
    return next((k for k, a in enumerate(accuracy) if a < 0.9), len(accuracy)) - 1


# In the first table and in the picture, with its lines there: the loop and its strongest opponents.
PICTURED = {
    "loop": "C0o-",
    "flat-flops": "C1s:",
    "flat-flops-long": "C1s-",
    "flat-flops-told": "C2^:",
    "flat-flops-told-deep": "C3v:",
    "flat-flops-told-deep-long": "C3v-",
}
HALTING_CONTROLS = (
    "fixed at the mean", "random exit", "only edges halt", "only queries halt", "none halts",
)  # fmt: skip
NORM_HEAD = " | ".join(f"state norm, loop {L}" for L in NORM_LOOPS)


def chains_tables(found: dict[str, list[dict]]) -> list[str]:
    trained, deep, last = Chains.train_hops, Chains.train_loops, Chains.longest - 1
    summary, quality, motion, halting, further = [], [], [], [], []
    columns = ["14 hops", "14 hops, halting"]
    columns += [f"{w}, {T} hops" for w in ("ring", "ring, edges halt") for T in RING_HOPS]
    for name, runs in found.items():

        def over(measure, form=".1f", runs=runs):
            return spread([measure(n) for n in runs], form)

        if name in PICTURED:
            summary.append(
                [VARIANTS["chains"][name].what, over(lambda n: n["train_flops"] / 1e12)]
                + [over(lambda n, k=k: 100 * accuracy_at(n, deep)[k]) for k in (trained, 6, last)]
            )
        quality.append(
            [name, VARIANTS["chains"][name].what, f"{len(runs)}", f"{runs[0]['parameters']:,}"]
            + [over(lambda n: n["train_flops"] / 1e12)]
            + [over(lambda n: 100 * min(accuracy_at(n, deep)[: trained + 1]))]
            + [over(lambda n, k=k: 100 * accuracy_at(n, deep)[k]) for k in (6, 8, last)]
            + [over(lambda n: 100 * accuracy_at(n, MOST_LOOPS)[last]), over(reach, ".0f")]
        )
        if "rho" in runs[0]:
            motion.append(
                [name]
                + [over(lambda n, L=L: n["state_norm"][L]) for L in map(str, NORM_LOOPS)]
                + [over(lambda n: n["rho"], ".2f")]
                + [over(lambda n, L=L: n["gain"][L], ".2f") for L in ("0", str(MOST_LOOPS))]
            )
            halting.append(
                [name]
                + [over(lambda n: 100 * mean(n["halting"]["accuracy"]))]
                + [over(lambda n: mean(n["halting"]["loops"]))]
                + [over(lambda n: n["halting"]["loops"][last] - n["halting"]["loops"][0])]
                + [over(lambda n: 100 * max(mean(a) for a in n["accuracy"].values()))]
                + [over(lambda n, k=k: 100 * n["halting"][k]) for k in HALTING_CONTROLS]
            )
            further.append([name] + [over(lambda n, k=k: 100 * n["further"][k]) for k in columns])
    return [
        markdown("| model | training TFLOPs | 5 hops | 6 hops | 10 hops |", summary),
        markdown(
            "| variant | what differs | seeds | parameters | training TFLOPs"
            " | worst of 0–5 hops, 12 loops | 6 hops | 8 hops | 10 hops | 10 hops, 32 loops"
            " | reach |",
            quality,
        ),
        markdown(
            f"| variant | {NORM_HEAD} | rho(A) | gain, first loop | gain, after 32 loops |",
            motion,
        ),
        markdown(
            "| variant | halting below 0.3: accuracy | mean loops"
            " | more loops for 10 hops than for 0 | best fixed loop count"
            f" | {' | '.join(HALTING_CONTROLS)} |",
            halting,
        ),
        markdown(f"| variant | {' | '.join(columns)} |", further),
    ]


def text_tables(found: dict[str, list[dict]]) -> list[str]:
    def cells(runs: list[dict], L: int) -> str:
        bits = [n["bits_per_byte"].get(str(L)) for n in runs]
        if L == 1 and "0" in runs[0]["bits_per_byte"]:
            bits = [n["bits_per_byte"]["0"] for n in runs]
        return "–" if None in bits else spread(bits, ".3f")

    rows = [
        [name, VARIANTS["text"][name].what, f"{len(runs)}", f"{runs[0]['parameters']:,}"]
        + [spread([n["train_flops"] / 1e12 for n in runs])]
        + [cells(runs, L) for L in (1, 2, 4, 8, 16, 32)]
        for name, runs in found.items()
    ]
    halting, columns = [], (("bits_per_byte", ".3f"), ("loops", ".1f"))
    columns += (("correlation with surprise", ".2f"),)
    for name, runs in found.items():
        for threshold, first in runs[0].get("halting", {}).items():
            values = {k: [n["halting"][threshold][k] for n in runs] for k in first}
            row = [spread(values[k], form) if k in values else "–" for k, form in columns]
            halting.append([name, threshold, *row])
    return [
        markdown(
            "| variant | what differs | seeds | parameters | training TFLOPs"
            " | 1 loop, or none | 2 | 4 | 8 | 16 | 32 |",
            rows,
        ),
        markdown(
            "| variant | halting below | bits per byte | mean loops | correlation with surprise |",
            halting,
        ),
    ]


def stability_tables(found: dict[str, list[dict]]) -> list[str]:
    rows, last = [], Chains.longest - 1
    for name, all_runs in found.items():
        runs = [n for n in all_runs if "diverged" not in n]
        row = [name, f"{len(all_runs) - len(runs)} of {len(all_runs)}"]
        for loops in (Chains.train_loops, MOST_LOOPS):
            row.append(cell([100 * accuracy_at(n, loops)[last] for n in runs], ".1f"))
        row += [cell([n["state_norm"][L] for n in runs], ".3g") for L in map(str, NORM_LOOPS)]
        row += [cell([n["rho"] for n in runs], ".2f")]
        rows.append(row + [cell([n["gain"][str(MOST_LOOPS)] for n in runs], ".2f")])
    head = f"| variant | diverged | 10 hops, 12 loops | 10 hops, 32 loops | {NORM_HEAD}"
    return [markdown(f"{head} | rho(A) | gain, after 32 loops |", rows)]


def cell(values: list[float], form: str) -> str:
    return spread(values, form) if values else "–"


TABLES = {"chains": chains_tables, "text": text_tables, "stability": stability_tables}


def draw_chains(found: dict[str, list[dict]], path: Path) -> None:
    """Left: accuracy by hops, with and without a loop. Right: what each change costs."""
    from matplotlib import pyplot as plt

    hops, last = range(Chains.longest), Chains.longest - 1
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for name in (name for name in PICTURED if name in found):
        by_seed = torch.tensor([accuracy_at(n, Chains.train_loops) for n in found[name]]) * 100
        label = VARIANTS["chains"][name].what
        (line,) = left.plot(hops, by_seed.mean(0), PICTURED[name], label=label)
        left.fill_between(hops, by_seed.amin(0), by_seed.amax(0), color=line.get_color(), alpha=0.2)
    guess = 100 / (1 + len(Chains.decoys))
    left.axhline(guess, color="grey", linewidth=1)
    left.text(0, guess - 1, "guessing", va="top", color="grey")
    edge = Chains.train_hops + 0.5
    left.axvline(edge, color="black", linewidth=0.8, linestyle="--")
    left.text(edge + 0.1, 4, "no answer in training\n(unless “to 10 hops”) →", fontsize="small")
    left.set(xlabel="hops to the end of the chain", ylabel="accuracy (%)", ylim=(0, 102))
    left.set_title("Looping against stacking")
    handles = left.get_legend_handles_labels()
    figure.legend(*handles, fontsize="small", loc="outside lower center", ncols=3, title="left:")

    names = [name for name in found if not name.startswith("flat")][::-1]
    for row, name in enumerate(names):
        for loops, marker, colour in ((12, "o", "C0"), (MOST_LOOPS, "x", "C3")):
            points = [100 * accuracy_at(n, loops)[last] for n in found[name]]
            label = f"after {loops} loops" if row == 0 else None
            right.plot(points, [row] * len(points), marker, color=colour, label=label, alpha=0.8)
    right.set_yticks(range(len(names)), [VARIANTS["chains"][name].what for name in names])
    right.set(xlabel="accuracy at 10 hops (%), one mark per seed", xlim=(-2, 102))
    right.set_title("What each change costs")
    right.legend(loc="lower left")
    right.grid(axis="x", alpha=0.3)
    save(figure, path)


def draw_text(found: dict[str, list[dict]], path: Path) -> None:
    """Bits per byte by loops: random against fixed loop counts, and the models without a loop."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for i, (name, runs) in enumerate(found.items()):
        bits = [n["bits_per_byte"] for n in runs]
        if "0" in bits[0]:
            ys = torch.tensor([b["0"] for b in bits])
            axes.axhspan(ys.min(), ys.max(), color=f"C{i}", alpha=0.2)
            axes.axhline(
                ys.mean(), color=f"C{i}", linestyle="--", label=VARIANTS["text"][name].what
            )
        else:
            loops, ys = [int(L) for L in bits[0]], torch.tensor([list(b.values()) for b in bits])
            axes.plot(loops, ys.mean(0), "o-", color=f"C{i}", label=VARIANTS["text"][name].what)
            axes.fill_between(loops, ys.amin(0), ys.amax(0), color=f"C{i}", alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    axes.set(xlabel="loops", ylabel="held-out bits per byte", title="Text: lower is better")
    axes.legend()
    save(figure, path)


def save(figure, path: Path) -> None:
    from matplotlib import pyplot as plt

    write_atomically(path, partial(figure.savefig, dpi=120))
    plt.close(figure)
    print(f"\n{path}")


DRAW = {"chains": draw_chains, "text": draw_text}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train and compare variants of Mythos.")
    parser.add_argument("--task", choices=tuple(VARIANTS), default="chains")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="train these (default: all)")
    parser.add_argument("--quick", action="store_true", help="2 steps each: does everything run?")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"), help="checkpoints")
    args = parser.parse_args(arguments)
    known = list(VARIANTS[args.task])
    try:
        for name in args.only or []:
            expect(name in known, "--only", name, f"one of {known}")
        ok = not args.quick or args.results != RESULTS
        expect(ok, "--quick", "no --results", "another folder than the one of the real results")
    except ValueError as error:
        parser.error(str(error))
    if not args.report:
        steps = 2 if args.quick else None
        for seed in args.seeds:
            for name in args.only or known:
                run(args.task, name, seed, args.results, args.runs, steps)
    found = load_results(args.task, args.results)
    for table in TABLES[args.task](found) if found else []:
        print(f"\n{table}")
    if found and args.task in DRAW:
        import matplotlib

        matplotlib.use("Agg")  # needs no display
        DRAW[args.task](found, args.results.parent / f"compare-{args.task}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
