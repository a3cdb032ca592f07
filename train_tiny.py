# SPDX-License-Identifier: MIT
"""Train Mythos on a laptop, and see whether looping helps.

    python train_tiny.py          pointer chasing, about 2 minutes; ends in PASS or FAIL

A sequence lists the edges of a few chains in random order, then asks about every node. After T
loops the answer is the node T hops further on; the last node of a chain points to itself:

    0→4  3→1  4→3  1→1  2→2 | 0 1 2 3 4        T = 1 loop:   4 1 2 1 3
                                               T = 3 loops:  1 1 2 1 1   (chain 0→4→3→1 has ended)

In training no scored answer is more than 5 hops away. The test asks for the *end* of a chain, up to
10 hops away, and runs up to 32 loops. A model that has learned one hop per loop, and to stand still
at the end, gets all of it right once it has as many loops as hops; with fewer it cannot have
arrived. How many loops a question needs is known exactly: a fair test of halting.

A second test has rings, which training never shows. There a walk has no end: after 64 loops with
halting, the edges have come to rest long ago, and each query should be 64 hops further on.

The run leaves a checkpoint, a JSON with every number and a picture in --out.

Read `train` first: it is the whole training, in the order in which it happens. Then come what a
task is, the task of chains, the optimizers, checkpoints, and the command line. To change a number,
add `--set batch_size=16 d_model=96`; from Python ("gqa": the kind of attention, see mythos.py):

    from train_tiny import *

    class Mine(Chains):
        batch_size, lr_scale, train_loops = 16, 0.7, 8

    torch.manual_seed(0)
    task = Mine()
    model = RecurrentDepthTransformer(task.config("gqa"), d_model=96)
    task.prepare(model)
    train(model, task, steps=800, seed=0, checkpoint=Path("runs/mine.pt"))
    for loops, accuracy in task.measure(model.eval(), [4, 8, 12])[0].items():
        print(loops, [f"{a:.0%}" for a in accuracy])  # at 0 … 10 hops

For a task of your own, see `Task`.
"""

import argparse
import json
import time
import zipfile
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean as mean

import torch
from torch import Tensor

import mythos
from mythos import MythosConfig, RecurrentDepthTransformer, expect

SAVE_EVERY = 25  # steps from one progress line, and checkpoint, to the next

# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def train(model: RecurrentDepthTransformer, task: "Task", *, steps: int, seed: int,
          checkpoint: Path, resume: bool = False) -> dict:  # fmt: skip
    """Train in place; returns the history: the loss and the number of loops of each step, seconds.

    After step 1, every 25th and the last, a new checkpoint takes the place of the old one: an
    interrupt loses at most 25 steps. resume: continue from it, to the same numbers as without the
    interrupt; otherwise a file of that name is replaced. seed: for data and noise; seed the weights
    yourself. Raises ValueError if the checkpoint is of another run, and
    FloatingPointError if loss or gradient becomes inf or nan (the last good checkpoint stays).
    """
    device, optimizers = model.head.weight.device, make_optimizers(model, task.prelude_lr)
    generator = torch.Generator().manual_seed(seed)  # draws all data
    # The recipe: what must not change when a run is resumed.
    recipe = task.settings() | dict(task=type(task).__name__, model=type(model).__name__,
        config=asdict(model.config), steps=int(steps), seed=int(seed))  # fmt: skip
    # frontier: how far the curriculum has come. For Chains, the largest number of loops so far.
    frontier, history = 1, dict(loss=[], loops=[], seconds=0.0)
    if resume:
        saved = load_checkpoint(checkpoint)
        for key, was in (dict.fromkeys(recipe) | saved["recipe"]).items():
            expect(recipe.get(key) == was, f"{checkpoint}, its {key}", was, recipe.get(key))
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        generator.set_state(saved["generator"])
        frontier, history = saved["frontier"], saved["history"]

    model.train()
    started = time.perf_counter() - history["seconds"]
    for step in range(len(history["loss"]), steps):
        tokens, targets, n_loops = task.batch(generator, frontier)

        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            # peak_lr: see `make_optimizers`. float: a checkpoint cannot hold a number of NumPy's.
            group["lr"] = float(task.lr_scale * schedule(step, steps) * group["peak_lr"])

        torch.manual_seed((100_003 * seed + step) % 2**32)  # noise: the same in a resumed run
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            _, loss = model(tokens.to(device), targets.to(device), n_loops=n_loops,
                            grad_loops=task.grad_loops, state_noise=task.state_noise)  # fmt: skip
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not torch.isfinite(loss + norm):  # before the update, so the checkpoint stays good
            raise FloatingPointError(f"step {step + 1} diverged: loss {loss}, gradient norm {norm}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        # In the last quarter balancing slows down to nothing: a model that hardly learns any more
        # cannot adapt when a token is sent to another expert. load: the tokens that each one got.
        load = model.update_router_bias(speed=0.01 * min(1, 4 * (1 - step / steps)))
        history["loss"].append(loss.item())
        history["loops"].append(n_loops)
        history["seconds"] = time.perf_counter() - started
        frontier = task.advance(frontier, n_loops, history["loss"][-1])

        if step == 0 or (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            print(progress(step, steps, frontier, history, load), flush=True)
            state = dict(recipe=recipe, frontier=frontier, history=history,
                         model=model.state_dict(), generator=generator.get_state(),
                         optimizers=[o.state_dict() for o in optimizers])  # fmt: skip
            write_atomically(checkpoint, partial(torch.save, state))
    return history


def progress(step: int, steps: int, frontier: int, history: dict, load: Tensor) -> str:
    """One line: how far, how deep, how far the curriculum has come, how well, how long to go."""
    n, loss, left = history["loops"][-1], history["loss"][-1], steps - step - 1
    busy = f"busiest expert {(load / load.float().mean(1, True)).max():.2f}× " if len(load) else ""
    told = f"step {step + 1}/{steps} loops {n:2d} frontier {frontier:2d} loss {loss:.3f} {busy}"
    return f"{told}{history['seconds'] / (step + 1) * left:.0f} s left"


class Task:
    """What `train` asks of a task. You write `batch` and usually `config`; the rest has a default:

        class Add(Task):  # two digits; the answer, at the second one, is their sum modulo 10
            def config(self, attention_type):
                return MythosConfig(vocab_size=10, d_model=32, attention_type=attention_type)

            def batch(self, generator, frontier):
                tokens = torch.randint(10, (self.batch_size, 2), generator=generator)
                answers = tokens.sum(dim=1, keepdim=True) % 10
                targets = torch.cat([torch.full_like(answers, -100), answers], dim=1)
                return tokens, targets, 2  # 2 loops

        torch.manual_seed(0)
        task = Add()
        model = RecurrentDepthTransformer(task.config("mla"))
        train(model, task, steps=150, seed=0, checkpoint=Path("runs/add.pt"))

    Attributes that are numbers, strings, tuples or None are part of the recipe that a checkpoint
    keeps: training resumes only if they are unchanged.

    The command line, `run(make_parser("What it is.", Add), None, lambda args: Add())`, also
    measures and prints. For that a task needs evaluate(model), which returns a dict of numbers
    with "checks", what PASS means, such as [("right", 0.97, ">=", 0.9)]; describe(results), which
    turns that dict into text; and, unless `draw` is None, draw(results, path).
    """

    name, about = "task", ""  # for file names; for the first line printed
    steps, batch_size = 400, 32
    lr_scale, prelude_lr = 1.0, 1.0  # factors on all learning rates, on the prelude's matrices
    state_noise, grad_loops = 0.0, None  # no noise, gradient through all loops: see `run_loop`
    draw = None  # else a method that writes a picture

    def config(self, attention_type: str) -> MythosConfig:
        """By default the toy, as for `Chains`."""
        return replace(mythos.get_model_config("tiny"), attention_type=attention_type)

    def batch(self, generator: torch.Generator, frontier: int) -> tuple[Tensor, Tensor, int]:
        """tokens and targets (batch_size, length), and a number of loops. A target is the answer
        wanted at its own position (nothing is shifted); −100 is not scored. `frontier` is how
        far the curriculum has come: 1 at first, see `advance`."""

    def prepare(self, model: RecurrentDepthTransformer) -> None:
        """Optional: other first weights. `run` calls it; before `train`, call it yourself."""

    def advance(self, frontier: int, n_loops: int, loss: float) -> int:
        """The curriculum: after a step, the frontier of the next one."""
        return frontier

    def settings(self) -> dict:
        """The part of the recipe that is the task's."""
        own = [(name, getattr(self, name)) for name in dir(self) if not name.startswith("_")]
        return {k: v for k, v in own if type(v) in (bool, int, float, str, tuple, type(None))}


# ------------------------------------------------------------------------------------------------
# The task of chains
# ------------------------------------------------------------------------------------------------


class Chains(Task):
    """Where is a node after T hops? Tokens: node i is i, edge i→j is n + n·i + j.

    A sequence is n edges, then n queries (every node once). An edge is scored, too: whatever T is,
    its answer is j, the node it points to. That keeps the edges' states still while queries walk.
    """

    name, n_nodes = "chains", 20
    about = "each step draws its own number of loops, so the loss jumps"
    train_hops, train_loops = 5, 12  # scored answers are at most 5 hops away; at most 12 loops
    # Without noise, training stops improving answers that are barely right. A query that stands
    # still may then drift towards a wrong node, loop by loop, until its answer flips. With 0.3 some
    # edges still drift, and walks on rings go astray; at 0.5, 400 steps are too few.
    prelude_lr, state_noise = 0.05, 0.4  # prelude_lr: see `prepare`
    test_size, test_loops, halt_threshold = 500, 12, 0.3  # sequences; loops that PASS is judged at
    # Chain lengths in a test sequence (the first is scored); hops on rings (0: no rings).
    longest, decoys, ring_hops = 11, (2, 2, 2, 2, 1), 64
    # Six chains in a test sequence, so guessing an end is right 1 time in 6.
    difficulty, guess = "hops to the end of the chain", 1 / 6
    wanted = 0.99, 0.90  # accuracy up to the trained hops, and at the most hops of the test

    def prepare(self, model: RecurrentDepthTransformer) -> None:
        """Start the prelude as the identity; its matrices learn 20 times slower (prelude_lr).

        Otherwise the prelude's own attention learns the first hop before the loop does, and the
        loop, left with nothing to do at T = 1, is late to learn hopping or never does.
        """
        for block in model.prelude:
            torch.nn.init.zeros_(block.attention.out_proj.weight)
            torch.nn.init.zeros_(block.ffn.down_proj.weight)

    def draw_loops(self, generator: torch.Generator, frontier: int) -> int:
        """Below frontier 12, half of the steps use `frontier` loops, the rest 1 to `frontier`.
        After that, half use 5 and the rest 6 to 12; 1 to 4 are mastered by then.

        (A smaller model forgets them: tutorial.ipynb, 4.1.)
        """

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        if frontier < self.train_loops:
            return frontier if draw(0, 1) else draw(1, frontier)
        return self.train_hops if draw(0, 1) else draw(self.train_hops + 1, self.train_loops)

    def batch(self, generator: torch.Generator, frontier: int) -> tuple[Tensor, Tensor, int]:
        """tokens and targets (B, 2n), the answers after T hops, and T.

        Only queries whose answer is at most 5 hops away are scored; the others are −100. With
        T > 5 that leaves the nodes near the end of their chain: they have to stand still there.
        Chains of all lengths, drawn at random, occur.
        """
        n, B, T = self.n_nodes, self.batch_size, self.draw_loops(generator, frontier)
        longest = torch.randint(2, n + 1, (B, 1), generator=generator)
        lengths = 1 + (torch.rand(B, n, generator=generator) * longest).long()
        tokens, queries, successors, _ = self.sequences(lengths, generator)
        path = [queries]
        for _ in range(T):
            path.append(successors.gather(1, path[-1]))
        answers = path[-1].where(path[-1] == path[min(T, self.train_hops)], -100)
        return tokens, torch.cat([tokens[:, :n] % n, answers], dim=1), T  # (n + n·i + j) % n is j

    def advance(self, frontier: int, n_loops: int, loss: float) -> int:
        """The frontier is the largest loop count so far: once it is mastered, allow one more."""
        mastered = n_loops == frontier < self.train_loops and loss < 0.2
        return frontier + 1 if mastered else frontier

    def sequences(self, lengths: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Chains of the given lengths (B, any; what exceeds n nodes is cut) over shuffled nodes.
        Without lengths, (B, 0), no chain ends: all nodes form a ring.

        Returns tokens (B, 2n), and (B, n) each: queries, successors, nodes in chain order.
        """
        n, B = self.n_nodes, len(lengths)
        # Three shuffles of the n nodes, for each sequence.
        order, queries, places = torch.rand(3, B, n, generator=generator).argsort(dim=-1)
        ends = (lengths.cumsum(dim=1) - 1).clamp(max=n - 1)
        # Each node points to the next, and the last of a chain to itself.
        following = order.roll(-1, dims=1).scatter(1, ends, order.gather(1, ends))
        successors = torch.zeros_like(order).scatter(1, order, following)
        edges = (n + n * torch.arange(n) + successors).gather(1, places)
        return torch.cat([edges, queries], dim=1), queries, successors, order

    def test_set(self) -> tuple[Tensor, Tensor, Tensor]:
        """tokens (S, 2n); (S, n) each: the long chain's end, and how far it is from each query
        (−1: the query is on another chain)."""
        lengths = torch.tensor([(self.longest, *self.decoys)]).expand(self.test_size, -1)
        tokens, queries, _, order = self.sequences(lengths, torch.Generator().manual_seed(12345))
        places = order.argsort(dim=1).gather(1, queries)  # in chain order; the long chain is first
        distance = (self.longest - 1 - places).clamp(min=-1)
        return tokens, order[:, [self.longest - 1]].expand_as(queries), distance

    def ring_set(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of 100 rings, as of `test_set`: tokens, the node that is `ring_hops` hops on, and, since
        a ring has no end, zeros in the place of the distances."""
        generator = torch.Generator().manual_seed(12345)
        tokens, node, successors, _ = self.sequences(torch.zeros(100, 0).long(), generator)
        for _ in range(self.ring_hops):
            node = successors.gather(1, node)
        return tokens, node, torch.zeros_like(node)

    def measure(self, model, loops: list[int], threshold: float | None = None, test_set=None):
        """By difficulty: accuracy after each loop count in `loops`, and the loops used. test_set:
        replaces `test_set()`."""
        (tokens, ends, distance), found = test_set or self.test_set(), []
        for part in tokens.to(model.head.weight.device).split(125):
            logits, used = logits_per_loop(model, part, loops, threshold)
            found.append(torch.stack([*(logits[L].argmax(dim=-1) for L in loops), used]).cpu())
        found = torch.cat(found, dim=1)[..., -self.n_nodes :]  # (len(loops) + 1, S, queries)

        def by_hops(values: Tensor) -> list[float]:
            return [values[distance == k].float().mean().item() for k in range(self.longest)]

        return {L: by_hops(found[i] == ends) for i, L in enumerate(loops)}, by_hops(found[-1])

    def evaluate(self, model: RecurrentDepthTransformer) -> dict:
        """Accuracy by loops and hops, with and without halting, and what PASS means."""
        deep, halt = (20, 24, 28, 32), self.halt_threshold
        accuracy, _ = self.measure(model, [*range(1, 17), *deep])
        right, used = self.measure(model, [32], halt)
        halting = {"threshold": halt, "accuracy": right[32], "loops": used}
        hops, at, wanted = self.train_hops, accuracy[self.test_loops], self.wanted
        drift = max(a - b for L in deep for a, b in zip(accuracy[16], accuracy[L], strict=True))
        lost = max(map(mean, accuracy.values())) - mean(right[32])
        checks = [
            (f"right up to {hops}, {self.test_loops} loops", min(at[: hops + 1]), ">=", wanted[0]),
            (f"right at {self.longest - 1}, {self.test_loops} loops", at[-1], ">=", wanted[1]),
            ("lost from 16 to 32 loops, anywhere", drift, "<=", 0.05),
            (f"lost by halting below {halt}", lost, "<=", 0.01),
        ]
        if (far := self.ring_hops) > 0:
            right, _ = self.measure(model, [far], halt, self.ring_set())
            checks.append((f"right on rings after {far} hops, halting", right[far][0], ">=", 0.95))
        return {"accuracy": accuracy, "halting": halting, "guess": self.guess, "checks": checks}

    def describe(self, results: dict) -> str:
        """A table: a row for each number of loops, and one for halting; a column for each hop."""
        rows = {f"loops: {L}": right for L, right in results["accuracy"].items()}
        h = results["halting"]
        rows[f"halting below {h['threshold']}, loops: {mean(h['loops']):.1f}"] = h["accuracy"]
        text = f"Right by {self.difficulty}, 0, 1 …; mean. Guessing would score {self.guess:.0%}."
        for name, right in rows.items():
            text += f"\n{name:>30}" + "".join(f"{a:5.0%}" for a in right) + f"{mean(right):7.1%}"
        return text

    def draw(self, results: dict, path: Path) -> None:
        """The staircase, accuracy by loops and hops; the loops that halting spends."""
        from matplotlib import figure  # it needs no display

        left, right = figure.Figure(figsize=(11, 4.2), layout="constrained").subplots(1, 2)
        draw_staircase(left, results["accuracy"], self, rows=16, shown=16)
        right.plot(results["halting"]["loops"], "o-")
        right.plot(range(self.longest), "k:")
        right.set(title="Halting (dotted: fewest loops)", xlabel=self.difficulty, ylabel="loops")
        left.figure.savefig(path, dpi=120, format="png")


def draw_staircase(axes, accuracy: dict, task: Chains, rows: int, shown: int):
    """Accuracy by hops (columns) after 1 … `rows` loops, of which only `shown` are drawn."""
    # A row that is not drawn yet is white, like one of zeros.
    grid = [accuracy[L] if L <= shown else [0] * task.longest for L in range(1, rows + 1)]
    axes.pcolormesh(range(task.longest), range(1, rows + 1), grid, vmin=0, vmax=1, cmap="Blues")
    axes.axvline(task.train_hops + 0.5, color="C1", linestyle="--", linewidth=2)
    axes.text(task.train_hops + 0.6, 0.8, "beyond training →", color="C1")
    axes.set(title="Accuracy: white 0, dark blue 100%", xlabel=task.difficulty, ylabel="loops")


@torch.no_grad()
def logits_per_loop(model, tokens: Tensor, loops: list[int], halt_threshold=None):
    """The logits (N, length, V) after each loop count in `loops`, from one run; the loops used."""
    e, states, used, rope = mythos.run_every_loop(model, tokens, max(loops), halt_threshold)
    # After 0 loops the coda reads e; once all have halted, nothing moves.
    return {L: model.run_coda([e, *states][min(L, len(states))], rope) for L in loops}, used


# ------------------------------------------------------------------------------------------------
# Optimizers
# ------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan 2024), for matrices and stacks of them.

    Each matrix G of the update, U·S·Vᵀ, is replaced by about U·Vᵀ: all directions learn at one
    pace. torch.optim.Muon works in bf16, which is slow on most CPUs, and refuses stacks; a test
    compares the two.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            # No gradient: frozen, or not used by this loss.
            for p in (p for p in group["params"] if p.grad is not None):
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                # Nesterov's look-ahead.
                update = self.orthogonal(p.grad.lerp(average, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # An orthogonal matrix has small entries; this gives them the size of Adam's.
                p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape[-2:]) ** 0.5)

    @staticmethod
    def orthogonal(G: Tensor) -> Tensor:
        """About U·Vᵀ for G = U·S·Vᵀ, (..., m, n): five Newton–Schulz steps, X ← a·X + b·X³ + c·X⁵.

        Each singular value s becomes a·s + b·s³ + c·s⁵, which drives all but tiny s to about 1.
        """
        X = G / G.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
        X = X.mT if G.shape[-2] > G.shape[-1] else X
        for _ in range(5):
            XXt = X @ X.mT
            X = 3.4445 * X + (-4.7750 * XXt + 2.0315 * XXt @ XXt) @ X
        return X.mT if G.shape[-2] > G.shape[-1] else X


def make_optimizers(model: RecurrentDepthTransformer, prelude_lr: float = 1.0) -> list:
    """Muon for the matrices inside blocks, AdamW for the vocabulary and for all the rest.

    The rest, A, B and the weights of norms, is not decayed: B, the input's weight, would go to 0.
    """
    # A list of modules names tied weights once.
    vocab = [p for p in torch.nn.ModuleList([model.embed, model.head]).parameters() if p.dim() > 1]
    slow = [p for p in model.prelude.parameters() if p.dim() > 1]
    fast = [p for p in model.parameters() if p.dim() > 1 and p not in {*slow, *vocab}]
    rest = [p for p in model.parameters() if p.dim() <= 1]

    def group(parameters: list, lr: float, **options) -> dict:
        return {"params": parameters, "lr": lr, "peak_lr": lr, **options}  # `train` moves lr

    muon = [group(fast, 6e-3), group(slow, 6e-3 * prelude_lr)]
    adamw = [group(vocab, 1e-2, weight_decay=0.05), group(rest, 3e-3, weight_decay=0.0)]
    return [Muon(muon, 6e-3), torch.optim.AdamW(adamw, betas=(0.9, 0.99))]


def schedule(step: int, steps: int, warmup: int = 50) -> float:
    """Share of the peak learning rate: linear warm-up times linear decay to 0."""
    return min(1.0, (step + 1) / warmup) * (1 - step / steps)


# ------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------


def write_atomically(path: Path, write) -> None:
    """Write beside `path`, then rename: whatever interrupts the write leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    write(unfinished)
    unfinished.replace(path)


def load_checkpoint(path: Path) -> dict:
    """A plain dict; no pickled code runs. Raises ValueError if `path` is not one of ours."""
    with suppress(Exception):  # any error here means: not our file
        damaged = zipfile.ZipFile(path).testzip()  # torch.load does not look at the checksums
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not damaged and {"recipe", "frontier", "history", "optimizers"} <= saved.keys():
            return saved
    raise ValueError(f"{path} is {'damaged, or not ours' if path.exists() else 'not there: train'}")


def load_model(path: str | Path) -> RecurrentDepthTransformer:
    """The model of a checkpoint, in evaluation mode, on the CPU. Unfinished runs load, too."""
    saved = load_checkpoint(Path(path))
    made = [saved["recipe"]["model"], *{*saved["recipe"]["config"]} - {*vars(MythosConfig())}]
    expect(made == ["RecurrentDepthTransformer"], f"{path}, model", made, "ours: build it yourself")
    model = RecurrentDepthTransformer(MythosConfig(**saved["recipe"]["config"]))
    model.load_state_dict(saved["model"])
    return model.eval()


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def make_parser(what: str, task: type[Task]) -> argparse.ArgumentParser:
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=what, epilog="Example: --seed 1 --steps 800")
    parser.add_argument("--attention", choices=("mla", "gqa"), default="mla", help="default: mla")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument("--steps", type=int, default=task.steps, help=f"default: {task.steps}")
    parser.add_argument("--out", default="runs", help="folder for the results (default: runs)")
    parser.add_argument("--resume", action="store_true", help="continue from --out's checkpoint")
    parser.add_argument("--device", default=best, choices={"cpu", best}, help=f"default: {best}")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=N", help="such as d_model=96")
    return parser


def run(parser: argparse.ArgumentParser, arguments: list[str] | None, make_task) -> int:
    """Train, evaluate, save, print. Returns 0 for PASS, 1 for FAIL; exits with 2 otherwise."""
    args = parser.parse_args(arguments)
    task, fields = make_task(args), {}
    other = [f"steps{args.steps}"] * (args.steps != task.steps) + args.set  # a try, or a longer run
    name = "-".join([task.name, args.attention, f"seed{args.seed}", *other])
    checkpoint, known = Path(args.out, name + ".pt"), task.settings() | vars(MythosConfig())
    try:
        expect(args.steps >= 1, "--steps", args.steps, "at least 1")
        expect(0 <= args.seed < 2**32, "--seed", args.seed, "0 to 2^32 − 1")
        expect(args.resume or not checkpoint.exists(), "--out", name, "a new name, or --resume")
        for key, _, number in (pair.partition("=") for pair in args.set):
            expect(key in known and key != "steps", "--set", key, f"one of {sorted(known)}")
            with suppress(ValueError):  # otherwise it stays a string
                number = json.loads(number)
            expect(isinstance(number, int | float | None), f"--set {key}", number, "a number")
            (vars(task) if key in task.settings() else fields)[key] = number
        torch.manual_seed(args.seed)
        model = RecurrentDepthTransformer(task.config(args.attention), **fields)
        task.prepare(model)
        print(f"{mythos.num_params(model):,} parameters on {args.device}; {task.about}", flush=True)
        history = train(model.to(args.device), task, steps=args.steps, seed=args.seed,
                        checkpoint=checkpoint, resume=args.resume)  # fmt: skip
        print("\nMeasuring, up to a minute …", flush=True)
        results = task.evaluate(model.eval()) | vars(args) | {"history": history}
    except (ValueError, OSError, FloatingPointError, KeyboardInterrupt) as error:
        parser.exit(2, f"{str(error) or 'Stopped; --resume goes on from the last checkpoint'}\n")
    verdicts = [g >= b if sign == ">=" else g <= b for _, g, sign, b in results["checks"]]
    passed = all(verdicts) if verdicts else None
    results |= dict(passed=passed, torch=torch.__version__, threads=torch.get_num_threads())
    text = json.dumps(results, indent=1, default=str)  # a Path among the flags
    write_atomically(checkpoint.with_suffix(".json"), lambda path: path.write_text(text))
    print(f"\n{task.describe(results)}\n")
    for (what, got, sign, bound), ok in zip(results["checks"], verdicts, strict=True):
        print(f"{'ok' if ok else 'NO':>4}  {what}: {got:.3f} (wanted {sign} {bound:.3f})")
    print(f"trained for {history['seconds']:.0f} s: {checkpoint}")
    if task.draw:
        with suppress(ImportError):  # without matplotlib: no picture
            write_atomically(checkpoint.with_suffix(".png"), partial(task.draw, results))
    print({True: "PASS", False: "FAIL", None: "No verdict"}[passed])
    return 1 if passed is False else 0


def main(arguments: list[str] | None = None) -> int:
    return run(make_parser("Train Mythos on chains.", Chains), arguments, lambda args: Chains())


if __name__ == "__main__":
    raise SystemExit(main())
