# SPDX-License-Identifier: MIT
"""Train Mythos on a laptop, and see whether looping helps.

    python train_tiny.py          pointer chasing, about 2 minutes; ends in PASS or FAIL

A sequence lists the edges of a few chains in random order, then asks about every node. After T
loops the answer is the node T hops further on; the last node of a chain points to itself:

    0→4  3→1  4→3  1→1  2→2 | 0 1 2 3 4        T = 1 loop:   4 1 2 1 3
                                               T = 3 loops:  1 1 2 1 1   (chain 0→4→3→1 has ended)

In training no answer is ever more than 5 hops away. The test asks for up to 10 hops and runs up to
32 loops: a model that has learned *one hop per loop*, and to stand still at the end of a chain,
gets all of it right. How many loops a question needs is known exactly: a fair test of halting.

The run leaves a checkpoint, a JSON with every number and a picture in --out.

Read `train` first: it is the whole training, in the order in which it happens. Then come what a
task is, the task of chains, the optimizers, checkpoints, and the command line. To change the size
or the settings, from Python:

    from train_tiny import *

    class Mine(Chains):
        batch_size, lr_scale, train_loops = 16, 0.7, 8

    task = Mine()
    model = RecurrentDepthTransformer(task.config("gqa"), d_model=96)
    task.prepare(model)
    train(model, task, steps=400, seed=0, checkpoint=Path("runs/mine.pt"))
    print(task.measure(model.eval(), [4, 8, 12])[0])  # accuracy by hops, after 4, 8 and 12 loops

For a task of your own, see `Task`.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean as mean

import torch
from torch import Tensor

import mythos
from mythos import MythosConfig, RecurrentDepthTransformer, expect

SAVE_EVERY = 50  # steps from one checkpoint to the next

# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def train(model: RecurrentDepthTransformer, task: "Task", *, steps: int, seed: int,
          checkpoint: Path, resume: bool = False) -> dict:  # fmt: skip
    """Train in place; returns the history: the loss and the number of loops of each step, seconds.

    Every 50 steps, and at the end, a new checkpoint takes the place of the last: an interrupt loses
    at most 50 steps. resume: continue from it, to the same numbers as without the interrupt.
    Raises ValueError for a checkpoint that is not of this run, and FloatingPointError, with the
    last good checkpoint kept, once loss or gradient is inf or nan.
    """
    device, optimizers = model.head.weight.device, make_optimizers(model, task.prelude_lr)
    generator = torch.Generator().manual_seed(seed)  # draws all data
    recipe = dict(config=asdict(model.config), model=type(model).__name__, task=task.settings(),
                  steps=int(steps), seed=int(seed))  # fmt: skip
    frontier, history = 1, dict(loss=[], loops=[], seconds=0.0)
    if resume:
        saved = load_checkpoint(checkpoint)
        for key, value in recipe.items():
            expect(
                value == saved["recipe"][key], f"{checkpoint}, {key}", value, saved["recipe"][key]
            )
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        generator.set_state(saved["generator"])
        frontier, history = saved["frontier"], saved["history"]

    model.train()
    started = time.perf_counter() - history["seconds"]
    for step in range(len(history["loss"]), steps):
        tokens, targets, n_loops = task.batch(generator, frontier)
        tokens, targets = tokens.to(device), targets.to(device)

        rate = task.lr_scale * schedule(step, steps)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate * group["peak_lr"]

        torch.manual_seed((100_003 * seed + step) % 2**32)  # noise: the same in a resumed run
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            _, loss = model(tokens, targets, n_loops=n_loops, grad_loops=task.grad_loops,
                            state_noise=task.state_noise)  # fmt: skip
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        loss, norm = torch.stack([loss.detach(), norm]).tolist()  # one wait for both numbers
        if not math.isfinite(loss + norm):  # before the update, so the checkpoint stays good
            raise FloatingPointError(f"step {step + 1}: loss {loss}, gradient norm {norm}; stopped")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        load = model.update_router_bias(speed=0.01)
        history["loss"].append(loss)
        history["loops"].append(n_loops)
        history["seconds"] = time.perf_counter() - started

        last = step == steps - 1
        if step == 0 or step % 25 == 24 or last:
            print(progress(step, steps, frontier, history, tokens, model, load), flush=True)
        frontier = task.advance(frontier, n_loops, loss)
        if step % SAVE_EVERY == SAVE_EVERY - 1 or last:
            state = dict(recipe=recipe, frontier=frontier, history=history,
                         model=model.state_dict(), generator=generator.get_state(),
                         optimizers=[o.state_dict() for o in optimizers])  # fmt: skip
            write_atomically(checkpoint, partial(torch.save, state))
    return history


def progress(step, steps, frontier, history, tokens, model, load) -> str:
    """One line: how far, how deep (and the deepest allowed so far), how well, how fast."""
    pace = history["seconds"] / (step + 1)
    told = f"step {step + 1:4d}/{steps}  loops {history['loops'][-1]:2d} of {frontier:2d}"
    told += f"  loss {history['loss'][-1]:.3f}"
    if model.recurrent:
        told += f"  rho(A) {mythos.spectral_radius(model):.3f}"
    if load.numel():  # (layers, E)
        told += f"  busiest expert {(load.amax(-1) / load.float().mean(-1)).max():.2f}×"
    return (
        f"{told}  {tokens.numel() / pace:6,.0f} tokens/s  {pace * (steps - step - 1):4.0f} s left"
    )


class Task:
    """What `train` asks of a task. Yours is `config` and `batch`; all else has a default:

        class Add(Task):  # two digits; the answer, at the second one, is their sum modulo 10
            def config(self, attention_type):
                return MythosConfig(vocab_size=10, d_model=64, attention_type=attention_type)

            def batch(self, generator, frontier):
                tokens = torch.randint(10, (self.batch_size, 2), generator=generator)
                answers = tokens.sum(dim=1, keepdim=True) % 10
                return tokens, torch.cat([torch.full_like(answers, -100), answers], dim=1), 4

        task = Add()
        model = RecurrentDepthTransformer(task.config("mla"))
        train(model, task, steps=200, seed=0, checkpoint=Path("runs/add.pt"))

    Every attribute that is a number, a text or None belongs to the recipe that a checkpoint keeps:
    a training resumes with the same ones only.
    """

    name = "task"  # the first part of the names of a run's files
    about = "each step draws its own number of loops, so the loss jumps"  # printed at the start
    example = ""  # what experiments/ask.py may be asked
    steps, batch_size = 400, 32
    lr_scale = 1.0  # times the learning rates of `make_optimizers`
    prelude_lr = 1.0  # times those of the prelude's matrices
    state_noise = 0.0  # see mythos.py, `run_loop`
    grad_loops = None  # the gradient goes through all loops
    draw: Callable | None = None  # draw(results, path) writes a picture of what evaluate returned

    def config(self, attention_type: str) -> MythosConfig:
        raise NotImplementedError

    def batch(self, generator: torch.Generator, frontier: int) -> tuple[Tensor, Tensor, int]:
        """tokens and targets (batch_size, T), −100 where nothing is scored, and a number of loops.
        `frontier` is how far the curriculum has come: 1 at first, see `advance`."""
        raise NotImplementedError

    def prepare(self, model: RecurrentDepthTransformer) -> None:
        """Called once, before the training: another start than `init_weights`."""

    def advance(self, frontier: int, n_loops: int, loss: float) -> int:
        """The curriculum: after a step, the frontier of the next one."""
        return frontier

    def evaluate(self, model: RecurrentDepthTransformer) -> dict:
        """All numbers of the test; "checks" is what PASS means: (what, got, sign, bound)."""
        return {"checks": []}

    def describe(self, results: dict) -> str:
        """What evaluate returned, as text."""
        return ""

    def settings(self) -> dict:
        """The part of the recipe that is the task's."""
        values = {name: getattr(self, name) for name in dir(self) if not name.startswith("_")}
        plain = (bool, int, float, str, tuple, type(None))  # what a checkpoint can hold
        return {name: value for name, value in values.items() if type(value) in plain}


# ------------------------------------------------------------------------------------------------
# The task of chains
# ------------------------------------------------------------------------------------------------


class Chains(Task):
    """Where is a node after T hops? Tokens: node i is i, edge i→j is n + n·i + j.

    A sequence is n edges, then n queries (every node once). An edge is scored, too: whatever T is,
    its answer is j, the node it points to. That keeps the edges' states still while queries walk.
    """

    name, n_nodes, example = "chains", 20, "0-4 3-1 4-3 1-1 2-2"
    train_hops, train_loops = 5, 12  # no training answer is further away, no training loop deeper
    prelude_lr = 0.05  # see `prepare`
    # Without noise, training stops improving answers that are barely right. A query that stands
    # still may then drift towards a wrong node, loop by loop, until its answer flips.
    state_noise = 0.3
    test_size, test_loops, halt_threshold = 500, 12, 0.2  # sequences; loops that PASS is about
    longest = 11  # nodes of the chain that the test asks about: its end is 0 … 10 hops away
    decoys = (2, 2, 2, 2, 1)  # nodes of the other chains of a test sequence
    difficulty, guess = "hops to the end of the chain", 1 / 6  # six chains: one of their ends
    wanted = 0.99, 0.90  # of the answers: at what was trained, and at the hardest of the test

    def config(self, attention_type: str) -> MythosConfig:
        return replace(mythos.get_model_config("tiny"), attention_type=attention_type)

    @torch.no_grad()
    def prepare(self, model: RecurrentDepthTransformer) -> None:
        """Start the prelude as the identity; its matrices learn 20 times slower (prelude_lr).

        Otherwise the prelude's own attention learns the first hop before the loop does, and the
        loop, left with nothing to do at T = 1, is late to learn hopping or never does.
        """
        for block in model.prelude:
            block.attention.out_proj.weight.zero_()
            block.ffn.down_proj.weight.zero_()

    def draw_loops(self, generator: torch.Generator, frontier: int) -> int:
        """While climbing, most steps at the frontier; then half at 5 loops, half with more.

        By then 1 to 4 loops are mastered. (A smaller model forgets them: tutorial.ipynb, 4.1.)
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
        """
        n, B, T = self.n_nodes, self.batch_size, self.draw_loops(generator, frontier)
        longest = torch.randint(2, n + 1, (B, 1), generator=generator)
        lengths = 1 + (torch.rand(B, n, generator=generator) * longest).long()
        tokens, queries, successors, _ = self.sequences(lengths, generator)
        path = [queries]
        for _ in range(T):
            path.append(successors.gather(1, path[-1]))
        near = path[-1] == path[min(T, self.train_hops)]
        answers = torch.where(near, path[-1], -100)
        pointed_to = (tokens[:, :n] - n) % n
        return tokens, torch.cat([pointed_to, answers], dim=1), T

    def advance(self, frontier: int, n_loops: int, loss: float) -> int:
        """The frontier is the largest loop count so far: once it is mastered, allow one more."""
        mastered = n_loops == frontier < self.train_loops and loss < 0.2
        return frontier + 1 if mastered else frontier

    def sequences(self, lengths: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Chains of the given lengths (B, any; what exceeds n nodes is cut) over shuffled nodes.

        Returns tokens (B, 2n), and (B, n) each: queries, successors, nodes in chain order.
        """
        n, B = self.n_nodes, len(lengths)

        def shuffled() -> Tensor:
            return torch.rand(B, n, generator=generator).argsort(dim=1)

        order, queries = shuffled(), shuffled()
        ends = (lengths.cumsum(dim=1) - 1).clamp(max=n - 1)
        is_end = torch.zeros(B, n, dtype=torch.bool).scatter(1, ends, True)
        following = torch.where(is_end, order, order.roll(-1, dims=1))
        successors = torch.zeros_like(order).scatter(1, order, following)
        edges = (n + n * torch.arange(n) + successors).gather(1, shuffled())
        return torch.cat([edges, queries], dim=1), queries, successors, order

    def test_set(self) -> tuple[Tensor, Tensor, Tensor]:
        """tokens (S, 2n); (S, n) each: the long chain's end, and how far it is from each query
        (−1: the query is on another chain)."""
        generator, size = torch.Generator().manual_seed(12345), self.test_size
        lengths = torch.tensor([(self.longest, *self.decoys)]).expand(size, -1)
        tokens, queries, _, order = self.sequences(lengths, generator)
        main = order[:, : self.longest]
        hops = torch.arange(self.longest - 1, -1, -1).expand(size, -1)
        distance = torch.full_like(order, -1).scatter(1, main, hops)
        return tokens, main[:, -1:].expand_as(queries), distance.gather(1, queries)

    def measure(self, model, loops: list[int], threshold: float | None = None):
        """Both by difficulty: accuracy after each of `loops` loops, and the loops used."""
        tokens, ends, distance = self.test_set()
        right, used = {L: [] for L in loops}, []
        for part in tokens.to(model.head.weight.device).split(125):
            logits, part_used = logits_per_loop(model, part, loops, threshold)
            for L in loops:
                right[L].append(logits[L][:, -self.n_nodes :].argmax(dim=-1).cpu())
            used.append(part_used[:, -self.n_nodes :].cpu())

        def by_hops(values: Tensor) -> list[float]:
            return [values[distance == k].float().mean().item() for k in range(self.longest)]

        right = {L: by_hops(torch.cat(answers) == ends) for L, answers in right.items()}
        return right, by_hops(torch.cat(used))

    def evaluate(self, model: RecurrentDepthTransformer) -> dict:
        trained, last, deep, halting = self.train_hops, self.longest - 1, (20, 24, 28, 32), {}
        near, far = self.wanted
        accuracy, _ = self.measure(model, [*range(1, 17), *deep])
        for threshold in (0.5, self.halt_threshold, 0.1):
            right, used = self.measure(model, [32], threshold)
            halting[threshold] = {"accuracy": right[32], "loops": used}
        best, at = max(map(mean, accuracy.values())), accuracy[self.test_loops]
        drift = max(accuracy[16][k] - accuracy[L][k] for L in deep for k in range(self.longest))
        lost = best - mean(halting[self.halt_threshold]["accuracy"])
        checks = [
            (f"right up to {trained}, {self.test_loops} loops", min(at[: trained + 1]), ">=", near),
            (f"right at {last}, {self.test_loops} loops", at[last], ">=", far),
            ("lost from 16 to 32 loops, anywhere", drift, "<=", 0.05),
            (f"lost by halting below {self.halt_threshold}", lost, "<=", 0.01),
        ]
        return {"accuracy": accuracy, "halting": halting, "guess": self.guess, "checks": checks}

    def describe(self, results: dict) -> str:
        accuracy, hops = results["accuracy"], "".join(f"{k:5d}" for k in range(self.longest))
        lines = [f"Test: {self.test_size} sequences. Guessing would score {self.guess:.0%}.\n"]
        lines += [f"Accuracy (%) after so many loops (rows) by {self.difficulty} (columns)"]
        lines += [f"loops {hops}"]
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

    def draw(self, results: dict, path: Path) -> None:
        """The staircase, accuracy by loops and hops; the loops that halting spends; the loss."""
        from matplotlib import figure  # it needs no display

        h, hops = results["halting"][self.halt_threshold], range(self.longest)
        picture = figure.Figure(figsize=(15, 4.2), layout="constrained")
        left, middle, right = picture.subplots(1, 3)
        image = draw_staircase(left, results["accuracy"], self, rows=16, shown=16)
        picture.colorbar(image, ax=left, label="accuracy (%)")
        left.set_title("Accuracy after so many loops", pad=18)
        middle.plot(hops, h["loops"], "o-", label="spent by halting")
        middle.plot(hops, hops, "k:", label="the least possible: one for each hop")
        middle.legend(frameon=False)
        middle.set_title(f"Halting: {100 * mean(h['accuracy']):.1f}% right", pad=18)
        middle.set(xlabel=self.difficulty, ylabel="loops")
        right.plot(results["history"]["loss"], linewidth=1)
        right.set_title("Training: the loss jumps when a step has more loops", pad=18)
        right.set(xlabel="step", ylabel="loss")
        picture.savefig(path, dpi=120, format="png")


def draw_staircase(axes, accuracy: dict, task: Chains, rows: int, shown: int):
    """Accuracy by hops (columns) after 1 … `rows` loops, of which only `shown` are drawn."""
    grid = [[100 * a for a in accuracy[L]] for L in range(1, shown + 1)]
    grid += [[math.nan] * task.longest] * (rows - shown)
    image = axes.imshow(grid, extent=(-0.5, task.longest - 0.5, 0.5, rows + 0.5), origin="lower",
                        aspect="auto", vmin=0, vmax=100, cmap="Blues")  # fmt: skip
    edge = task.train_hops + 0.5
    axes.axvline(edge, color="C1", linestyle="--", linewidth=2)
    axes.text(edge + 0.1, rows + 0.7, "beyond training →", color="C1", fontsize="small")
    axes.set(xlabel=task.difficulty, ylabel="loops", xticks=range(task.longest))
    return image


@torch.no_grad()
def logits_per_loop(model, tokens: Tensor, loops: list[int], halt_threshold=None):
    """Logits (N, T, V) after each of `loops` loops, from one run, and the loops used (N, T)."""
    e, states, used, rope = mythos.run_every_loop(model, tokens, max(loops), halt_threshold)
    states = [e, *states]  # after 0 loops the coda reads e
    states += states[-1:] * (max(loops) + 1 - len(states))  # all have halted: nothing moves
    return {L: model.run_coda(states[L], rope) for L in loops}, used


# ------------------------------------------------------------------------------------------------
# Optimizers
# ------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan 2024), for matrices and stacks of them.

    Each matrix G of the update, U·S·Vᵀ, is replaced by about U·Vᵀ: all directions learn at one
    pace. torch.optim.Muon, which a test compares with this, uses bf16; on a CPU that emulates it,
    that would take most of a training step. It also refuses stacks.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            # No gradient: frozen, or not used by this loss.
            for p in (p for p in group["params"] if p.grad is not None):
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - momentum)
                update = self.orthogonal(p.grad.lerp(average, momentum))  # Nesterov's look-ahead
                p.mul_(1 - lr * group["weight_decay"])
                # An orthogonal matrix has small entries; this gives them the size of Adam's.
                p.add_(update, alpha=-lr * 0.2 * max(p.shape[-2:]) ** 0.5)
        return loss

    @staticmethod
    def orthogonal(G: Tensor) -> Tensor:
        """About U·Vᵀ for G = U·S·Vᵀ, (..., m, n): five Newton–Schulz steps, X ← a·X + b·X³ + c·X⁵.

        Each singular value s becomes a·s + b·s³ + c·s⁵, which drives all but tiny s to about 1.
        """
        X = G / G.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
        if G.shape[-2] > G.shape[-1]:
            X = X.mT
        for _ in range(5):
            XXt = X @ X.mT
            X = 3.4445 * X + (-4.7750 * XXt + 2.0315 * XXt @ XXt) @ X
        return X.mT if G.shape[-2] > G.shape[-1] else X


def make_optimizers(model: RecurrentDepthTransformer, prelude_lr: float = 1.0) -> list:
    """Muon for the matrices inside blocks, AdamW for the vocabulary and for all the rest.

    The rest are vectors, A, B and the norms. They are not decayed: pulling A to 0 would erase the
    memory.
    """
    prelude = {*model.prelude.parameters()}
    vocabulary = dict.fromkeys([model.embed.weight, model.head.weight])  # in order; one, if tied
    blocks = [p for p in model.parameters() if p.dim() > 1 and p not in vocabulary]
    rest = [p for p in model.parameters() if p.dim() <= 1]

    def group(parameters: list, lr: float, **options) -> dict:
        return {"params": parameters, "lr": lr, "peak_lr": lr, **options}  # `train` moves lr

    muon = [group([p for p in blocks if p not in prelude], 6e-3)]
    muon.append(group([p for p in blocks if p in prelude], 6e-3 * prelude_lr))
    adamw = [group([*vocabulary], 1e-2, weight_decay=0.05), group(rest, 3e-3, weight_decay=0.0)]
    return [Muon(muon, 6e-3), torch.optim.AdamW(adamw, betas=(0.9, 0.99))]


def schedule(step: int, steps: int, warmup: int = 50) -> float:
    """Share of the peak learning rate: linear warm-up times linear decay to 0."""
    return min(1.0, (step + 1) / warmup) * (1 - step / steps)


# ------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path`, then rename: whatever interrupts the write leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    write(unfinished)
    os.replace(unfinished, path)


def load_checkpoint(path: Path) -> dict:
    """A plain dict; no pickled code runs. Raises ValueError if `path` is no checkpoint of ours."""
    expect(path.is_file(), "checkpoint", str(path), "a file that training has saved")
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch.load does not look at the checksums
        saved = torch.load(path, map_location="cpu", weights_only=True)
        ours = damaged is None and {"recipe", "model", "optimizers", "history"} <= saved.keys()
    except Exception:  # whatever a file that is something else makes of these
        ours = False
    if not ours:
        raise ValueError(f"{path} is damaged, or not a checkpoint of this program")
    return saved


def load_model(path: str | Path) -> RecurrentDepthTransformer:
    """The model of a checkpoint, in evaluation mode, on the CPU; of an unfinished training, too."""
    saved = load_checkpoint(Path(path))
    made, own = saved["recipe"]["model"], RecurrentDepthTransformer.__name__
    expect(made == own, f"{path}, model", made, f"{own}; build yours, then load_state_dict")
    model = RecurrentDepthTransformer(MythosConfig(**saved["recipe"]["config"]))
    model.load_state_dict(saved["model"])
    return model.eval()


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def make_parser(what: str, task: type[Task]) -> argparse.ArgumentParser:
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--attention", choices=("mla", "gqa"), default="mla")
    parser.add_argument("--seed", type=int, default=0, help="another start, other batches")
    parser.add_argument("--steps", type=int, default=task.steps, help=f"default: {task.steps}")
    parser.add_argument("--out", default="runs", help="folder for the results (default: runs)")
    parser.add_argument("--resume", action="store_true", help="continue from --out's checkpoint")
    parser.add_argument("--device", default=best, choices=("cpu", "cuda", "mps"))
    return parser


def run(parser: argparse.ArgumentParser, arguments: list[str] | None, make_task: Callable) -> int:
    """Train, evaluate, save, print. Returns 0 for PASS, 1 for FAIL; exits with 2 for bad flags."""
    args = parser.parse_args(arguments)
    try:
        expect(args.steps > 0, "--steps", args.steps, "a number above 0")
        expect(0 <= args.seed < 2**32, "--seed", args.seed, "a number from 0 to 2^32 − 1")
        task = make_task(args)
        shorter = (
            f"-steps{args.steps}" if args.steps != task.steps else ""
        )  # a try, or a longer run
        stem = f"{args.out}/{task.name}-{args.attention}-seed{args.seed}{shorter}"
        checkpoint = Path(f"{stem}.pt")
        if checkpoint.exists() and not args.resume:
            raise ValueError(
                f"{checkpoint} exists: add --resume, or choose another --seed or --out"
            )
        torch.manual_seed(args.seed)
        model = RecurrentDepthTransformer(task.config(args.attention))
        task.prepare(model)
        print(
            f"{mythos.num_params(model):,} parameters, {args.steps} steps on {args.device}: {stem}"
        )
        print(f"({task.about})", flush=True)
        history = train(model.to(args.device), task, steps=args.steps, seed=args.seed,
                        checkpoint=checkpoint, resume=args.resume)  # fmt: skip
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except (FloatingPointError, KeyboardInterrupt) as error:
        sys.exit(f"{error or 'Stopped'}. With --resume this continues from {checkpoint}.")
    print("\nMeasuring, up to a minute …", flush=True)
    measuring = time.perf_counter()
    results = task.evaluate(model.eval()) | {"history": history}
    verdicts = [g >= b if sign == ">=" else g <= b for _, g, sign, b in results["checks"]]
    passed, seconds = all(verdicts), history["seconds"] + time.perf_counter() - measuring
    results |= dict(passed=passed, attention=args.attention, seed=args.seed, steps=args.steps,
                    seconds=seconds, train_seconds=history["seconds"], device=args.device,
                    machine=platform.processor() or platform.machine(), torch=torch.__version__,
                    threads=torch.get_num_threads())  # fmt: skip
    text = json.dumps(results, indent=1)
    write_atomically(Path(f"{stem}.json"), lambda path: path.write_text(text, "utf-8"))
    try:
        write_atomically(Path(f"{stem}.png"), partial(task.draw, results))
    except ImportError as error:
        print(f"no picture: {error}")
    print(f"\n{task.describe(results)}\n")
    for (what, got, sign, bound), ok in zip(results["checks"], verdicts, strict=True):
        print(f"{'ok' if ok else 'NO':>4}  {what}: {got:.3f} (wanted {sign} {bound:.3f})")
    print(f"{seconds:.0f} s, {history['seconds']:.0f} s of it training; results in {stem}.*")
    print("PASS" if passed else "FAIL")
    print(f'Ask it: python -m experiments.ask "{task.example}" --checkpoint {checkpoint}')
    return 0 if passed else 1


def main(arguments: list[str] | None = None) -> int:
    return run(make_parser("Train Mythos on chains.", Chains), arguments, lambda args: Chains())


if __name__ == "__main__":
    sys.exit(main())
