# SPDX-License-Identifier: MIT
"""Train Mythos on a laptop, and see whether looping helps.

    python train_tiny.py                  pointer chasing; ends in PASS or FAIL
    python train_tiny.py --task text      language modelling on the bytes of Python's own library

Chains. A sequence lists the edges of a few chains in random order, then asks about every node.
After T loops the answer is the node T hops further on; the last node of a chain points to itself:

    0→4  3→1  4→3  1→1  2→2 | 0 1 2 3 4        T = 1 loop:   4 1 2 1 3
                                               T = 3 loops:  1 1 2 1 1   (chain 0→4→3→1 has ended)

In training no answer is ever more than 5 hops away. The test asks for up to 10 hops and runs up to
32 loops: a model that has learned *one hop per loop*, and to stand still at the end of a chain,
gets all of it right. How many loops a question needs is known exactly: a fair test of halting.

Text. Bytes of Python source, a random loop count per step, gradient through the last 4 loops.

Both write a checkpoint and a JSON with every number to --out; chains also draw a picture.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import platform
import signal
import sys
import sysconfig
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mythos import MythosConfig, RecurrentDepthTransformer, expect, get_model_config

# ------------------------------------------------------------------------------------------------
# Chains
# ------------------------------------------------------------------------------------------------


class Chains:
    """Where is a node after T hops? Tokens: node i is i, edge i→j is n + n·i + j.

    A sequence is n edges, then n queries (every node once). An edge is scored, too: whatever T is,
    its answer is j, the node it points to. That keeps the edges' states still while queries walk.
    """

    name, steps, batch_size, grad_loops = "chains", 600, 48, None
    n_nodes = 20
    train_hops, train_loops = 5, 12  # no training answer is further away, no training loop deeper
    lr_scale, prelude_lr = 1.0, 0.05  # all learning rates; and the prelude's, see `prepare`
    data_crc = None  # made, not read
    test_size = 500  # sequences
    longest = 11  # nodes of the chain that the test asks about: its end is 0 … 10 hops away
    decoys = (2, 2, 2, 2, 1)  # nodes of the other chains of a test sequence
    halt_threshold = 0.3
    frontier = 1  # the largest loop count drawn so far: the curriculum's only state

    def config(self, attention_type: str) -> MythosConfig:
        return replace(get_model_config("tiny"), attention_type=attention_type)

    @torch.no_grad()
    def prepare(self, model: RecurrentDepthTransformer) -> None:
        """Start the prelude as the identity; it also learns 20 times slower (prelude_lr).

        Otherwise the prelude's own attention learns the first hop before the loop does, and the
        loop, left with nothing to do at T = 1, is late to learn hopping or never does.
        """
        for block in model.prelude:
            block.attention.out_proj.weight.zero_()
            block.ffn.down_proj.weight.zero_()

    def draw_loops(self, generator: torch.Generator) -> int:
        """While climbing: half of the steps at the frontier. After: 3 of 4 at most 5 loops deep."""

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        if self.frontier < self.train_loops:
            return self.frontier if draw(0, 1) else draw(1, self.frontier)
        hops = self.train_hops
        return draw(1, hops) if draw(1, 4) <= 3 else draw(hops + 1, self.train_loops)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
        """tokens and targets (B, 2n), the answers after T loops, and T.

        Only queries whose answer is at most 5 hops away are scored; the others are −100. With
        T > 5 that leaves the nodes near the end of their chain: they have to stand still there.
        """
        n, B, n_loops = self.n_nodes, self.batch_size, self.draw_loops(generator)
        longest = torch.randint(2, n + 1, (B, 1), generator=generator)
        lengths = 1 + (torch.rand(B, n, generator=generator) * longest).long()
        tokens, queries, successors, _ = self.sequences(lengths, generator)
        path = [queries]
        for _ in range(n_loops):
            path.append(successors.gather(1, path[-1]))
        near = path[-1] == path[min(n_loops, self.train_hops)]
        answers = torch.where(near, path[-1], -100)
        pointed_to = (tokens[:, :n] - n) % n
        return tokens, torch.cat([pointed_to, answers], dim=1), n_loops

    def learned(self, n_loops: int, loss: float) -> None:
        """Curriculum: once the largest loop count so far is mastered, allow one more."""
        if n_loops == self.frontier < self.train_loops and loss < 0.2:
            self.frontier += 1

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
        """tokens (S, 2n); for the queries (S, n) their chain's end and its distance (−1: decoy)."""
        generator, size = torch.Generator().manual_seed(12345), self.test_size
        lengths = torch.tensor([(self.longest, *self.decoys)]).expand(size, -1)
        tokens, queries, _, order = self.sequences(lengths, generator)
        main = order[:, : self.longest]
        hops = torch.arange(self.longest - 1, -1, -1).expand(size, -1)
        distance = torch.full_like(order, -1).scatter(1, main, hops)
        return tokens, main[:, -1:].expand_as(queries), distance.gather(1, queries)

    def measure(
        self, model: RecurrentDepthTransformer, loops: list[int], threshold: float | None = None
    ) -> tuple[dict[int, list[float]], list[float]]:
        """Both by hops to the end: accuracy after each of `loops` loops, and the loops used."""
        tokens, ends, distance = self.test_set()
        right, used = {L: [] for L in loops}, []
        for part in tokens.to(model.head.weight.device).split(125):
            logits, part_used = logits_per_loop(model, part, loops, threshold)
            for L in loops:
                right[L].append(logits[L][:, self.n_nodes :].argmax(dim=-1).cpu())
            used.append(part_used[:, self.n_nodes :].cpu())

        def by_hops(values: Tensor) -> list[float]:
            return [values[distance == k].float().mean().item() for k in range(self.longest)]

        right = {L: by_hops(torch.cat(answers) == ends) for L, answers in right.items()}
        return right, by_hops(torch.cat(used))

    def report(self, model: RecurrentDepthTransformer) -> dict:
        """Measure and print; returns every number, and under "checks" what PASS means."""
        trained, last, deep = self.train_hops, self.longest - 1, (20, 24, 28, 32)
        accuracy, _ = self.measure(model, [*range(1, 17), *deep])
        best = max(accuracy, key=lambda L: mean(accuracy[L]))
        halting = {}
        for threshold in (0.5, self.halt_threshold, 0.1):
            right, used = self.measure(model, [32], threshold)
            halting[threshold] = {"accuracy": right[32], "loops": used}

        others = len(self.decoys)
        guess = 1 / (1 + others)
        head = "".join(f"{k:5d}" for k in range(self.longest))
        print(f"\nTest: {self.test_size} sequences, each a chain of {self.longest} nodes", end=" ")
        print(f"and {others} others. Naming the end of any chain would score {guess:.0%}.")
        print("\nAccuracy (%) after so many loops (rows) by hops to the end of the chain (columns)")
        print(f"loops {head}")
        for L in (1, 2, 4, 5, 6, 8, 10, 12, 16, *deep):
            print(f"{L:5d} " + "".join(f"{100 * a:5.0f}" for a in accuracy[L]))
        print("\nHalting when the state changes by less than: loops used by hops, and on average")
        print(f"      {head}   loops accuracy")
        for threshold, h in halting.items():
            print(f"{threshold:5.2f} " + "".join(f"{used:5.1f}" for used in h["loops"]), end="")
            print(f"  {mean(h['loops']):6.1f} {100 * mean(h['accuracy']):7.1f}%")
        print(f"The best fixed number of loops, {best}: {100 * mean(accuracy[best]):28.1f}%\n")

        at = accuracy[self.train_loops]
        drift = max(accuracy[16][k] - accuracy[L][k] for L in deep for k in range(self.longest))
        lost = mean(accuracy[best]) - mean(halting[self.halt_threshold]["accuracy"])
        checks = [
            (f"right up to {trained} hops, 12 loops", min(at[: trained + 1]), ">=", 0.99),
            (f"right at {last} hops, 12 loops", at[last], ">=", 0.90),
            ("lost from 16 to 32 loops, at any hops", drift, "<=", 0.05),
            (f"lost by halting below {self.halt_threshold}", lost, "<=", 0.01),
        ]
        return {"accuracy": accuracy, "halting": halting, "guess": guess, "checks": checks}

    def draw(self, results: dict, path: Path) -> None:
        """Left: the staircase, accuracy by loops and hops. Right: the loops that halting spends."""
        from matplotlib import figure  # without pyplot it needs no display

        accuracy, h = results["accuracy"], results["halting"][self.halt_threshold]
        hops = range(self.longest)
        picture = figure.Figure(figsize=(11, 4.2), layout="constrained")
        left, right = picture.subplots(1, 2)
        grid = [[100 * a for a in accuracy[L]] for L in range(1, 17)]
        extent = (-0.5, self.longest - 0.5, 0.5, 16.5)
        image = left.imshow(grid, origin="lower", aspect="auto", extent=extent, vmin=0, vmax=100)
        picture.colorbar(image, ax=left, label="accuracy (%)")
        left.axvline(self.train_hops + 0.5, color="white", linestyle="--")
        left.text(self.train_hops + 0.7, 1, "in no training answer →", color="white")
        left.set(xlabel="hops to the end of the chain", ylabel="loops", title="One hop per loop")
        right.plot(hops, h["loops"], "o-", label=f"halting when change < {self.halt_threshold}")
        right.plot(hops, hops, "k:", label="the least possible: one per hop")
        title = f"Harder questions get more loops ({100 * mean(h['accuracy']):.1f}% right)"
        right.set(xlabel="hops to the end of the chain", ylabel="loops used", title=title)
        right.legend()
        picture.savefig(path, dpi=120)


# ------------------------------------------------------------------------------------------------
# Text
# ------------------------------------------------------------------------------------------------


class Text:
    """Next-byte prediction on files, some of which are held out whole. A token is a byte."""

    name, steps, batch_size, grad_loops = "text", 900, 5, 4
    lr_scale, prelude_lr = 1.0, 1.0
    frontier = 0  # no curriculum
    draw = None  # no picture: five numbers are better read in a table
    context = 256  # bytes that the model sees
    held_out = 40  # every 40th file is held out,
    test_bytes = 150_000  # and so many of their bytes are scored: more take too long
    test_loops = (1, 2, 4, 8, 16)
    mean_loops, loop_spread, most_loops, deep_share = 4, 0.5, 16, 0.1  # see `draw_loops`

    def __init__(self, data: Path | None = None) -> None:
        pieces = read_pieces(data)
        test = b"".join(pieces[:: self.held_out])[: self.test_bytes]
        train = b"".join(p for i, p in enumerate(pieces) if i % self.held_out)
        got, least = (len(train), len(test)), self.context + 2
        expect(min(got) >= least, "--data", got, f"{least} bytes or more to train and to test")
        self.test, self.train_data = test, torch.frombuffer(bytearray(train), dtype=torch.uint8)
        self.data_crc = zlib.crc32(test + train)  # resuming with other files would mix two runs

    def config(self, attention_type: str) -> MythosConfig:
        tiny = replace(get_model_config("tiny"), attention_type=attention_type, vocab_size=256)
        return replace(tiny, max_seq_len=512, max_loop_iters=4, d_expert=128)

    def prepare(self, model: RecurrentDepthTransformer) -> None:
        """Nothing: here the prelude learns from the first step on, like every other block."""

    def learned(self, n_loops: int, loss: float) -> None:
        """No curriculum."""

    def draw_loops(self, generator: torch.Generator) -> int:
        """T ~ Poisson(λ), λ log-normal with mean 4 (Geiping et al. 2025), cut to 1 … 16; in every
        tenth step 16.

        Most steps are cheap, and the few deep ones teach the state to settle: without the tenth
        step, 16 loops of one seed in three were more than 0.05 bits worse than 4.
        """
        if torch.rand((), generator=generator) < self.deep_share:
            return self.most_loops
        log_mean = math.log(self.mean_loops) - self.loop_spread**2 / 2
        rate = torch.exp(log_mean + self.loop_spread * torch.randn((), generator=generator))
        return min(max(int(torch.poisson(rate, generator=generator)), 1), self.most_loops)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
        """tokens and targets, (B, context) each and one byte apart, and T."""
        places = len(self.train_data) - self.context
        starts = torch.randint(places, (self.batch_size, 1), generator=generator)
        window = self.train_data[starts + torch.arange(self.context + 1)].long()
        return window[:, :-1], window[:, 1:], self.draw_loops(generator)

    def test_set(self) -> Tensor:
        """The held-out bytes, (S, context + 1); rows overlap by a byte: all but one are scored."""
        data = torch.frombuffer(bytearray(self.test), dtype=torch.uint8).long()
        return data.unfold(0, self.context + 1, self.context)

    def measure(self, model: RecurrentDepthTransformer, loops: list[int]) -> dict[int, float]:
        """Held-out bits per byte after each of `loops` loops."""
        windows, bits = self.test_set(), dict.fromkeys(loops, 0.0)
        for part in windows.to(model.head.weight.device).split(32):
            logits, _ = logits_per_loop(model, part[:, :-1], loops)
            for L in loops:
                nats = F.cross_entropy(logits[L].mT.float(), part[:, 1:], reduction="sum").item()
                bits[L] += nats / math.log(2) / windows[:, 1:].numel()
        return bits

    def report(self, model: RecurrentDepthTransformer) -> dict:
        """Held-out bits per byte for each loop count, beside two compressors, and a sample."""
        C, device = self.context, model.head.weight.device
        bits = self.measure(model, self.test_loops)

        def packed(compress: Callable, size: int, **options) -> float:
            parts = [self.test[i : i + size] for i in range(0, len(self.test), size)]
            return 8 * sum(len(compress(part, **options)) for part in parts) / len(self.test)

        others = {}
        for size, given in ((len(self.test), "whole files"), (C, f"{C} bytes at a time")):
            others[f"zlib -9, {given}"] = packed(zlib.compress, size, level=9)
            others[f"lzma, {given}"] = packed(lzma.compress, size, format=lzma.FORMAT_ALONE)
        print(f"\nBits per byte of {len(self.test):,} held-out bytes, from files not trained on")
        for name, value in ({f"Mythos, {L} loops": b for L, b in bits.items()} | others).items():
            print(f"{name:>28} {value:6.3f}")

        rng = torch.Generator(device).manual_seed(0)
        prompt = torch.tensor([list(b"def ")], device=device)
        sample = model.generate(prompt, C, temperature=0.7, top_p=0.95, generator=rng)
        text = bytes(sample[0].tolist()).decode(errors="replace")
        print(f"\nA sample (temperature 0.7, top_p 0.95):\n{text}\n")

        best, goal = min(bits.values()), others["lzma, whole files"]
        settled = [b for L, b in bits.items() if L >= 2]
        print(f"The stretch goal, lzma over whole files, is {best - goal:+.3f} bits per byte away.")
        checks = [
            ("bits per byte, wanted below zlib's", best, "<=", others["zlib -9, whole files"]),
            ("largest difference from 2 to 16 loops", max(settled) - min(settled), "<=", 0.05),
        ]
        return {"bits_per_byte": bits, "compressors": others, "sample": text, "checks": checks}


def read_pieces(data: Path | None) -> list[bytes]:
    """The standard library's source files, a folder's files, or one file cut into 20 pieces."""
    root = data or Path(sysconfig.get_paths()["stdlib"])
    with refusing(f"--data: got {str(root)!r}, expected readable files"):
        if not root.is_dir():
            text = root.read_bytes()
            size = 1 + len(text) // 20
            return [text[i : i + size] for i in range(0, len(text), size)]
        # Not from the library: tests, what pip installed, generated tables that repeat each other.
        skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}
        files = sorted(p for p in root.rglob("*" if data else "*.py") if p.is_file())
        return [p.read_bytes() for p in files if data or not skip & set(p.relative_to(root).parts)]


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@torch.no_grad()
def logits_per_loop(
    model: RecurrentDepthTransformer, tokens: Tensor, loops: list[int],
    halt_threshold: float | None = None,
) -> tuple[dict[int, Tensor], Tensor]:  # fmt: skip
    """Logits (B, T, V) after each of `loops` loops, from one run, and the loops used (B, T)."""
    most = max(loops)
    cache = None if halt_threshold is None else model.new_cache(*tokens.shape, most)
    e, place = model.run_prelude(tokens, cache)
    states = [e]  # after 0 loops the coda reads e
    _, used = model.run_loop(e, place, most, None, halt_threshold, cache, states)
    states += states[-1:] * (most + 1 - len(states))  # all have halted: nothing moves any more
    return {L: model.run_coda(states[L], place, cache) for L in loops}, used


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan 2024), for matrices and stacks of them.

    Each matrix G of the update, U·S·Vᵀ, is replaced by about U·Vᵀ: all directions learn at one
    pace. torch.optim.Muon, which a test compares with this, does it in bf16: most of a training
    step's time on a CPU that has to emulate bf16. And it refuses stacks.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - momentum)
                update = self.orthogonal(p.grad.lerp(average, momentum))  # Nesterov's look-ahead
                p.mul_(1 - lr * group["weight_decay"])
                # An orthogonal matrix has small entries; this gives them the size of Adam's.
                p.add_(update, alpha=-lr * 0.2 * max(p.shape[-2:]) ** 0.5)

    @staticmethod
    def orthogonal(G: Tensor) -> Tensor:
        """About U·Vᵀ for G = U·S·Vᵀ, (..., m, n): five Newton–Schulz steps, X ← a·X + b·X³ + c·X⁵.

        In terms of singular values s ← a·s + b·s³ + c·s⁵ drives every s in (0, 1] to about 1.
        """
        X = G / G.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
        if G.shape[-2] > G.shape[-1]:
            X = X.mT
        for _ in range(5):
            XXt = X @ X.mT
            X = 3.4445 * X + (-4.7750 * XXt + 2.0315 * XXt @ XXt) @ X
        return X.mT if G.shape[-2] > G.shape[-1] else X


def make_optimizers(model: RecurrentDepthTransformer, prelude_lr: float = 1.0) -> list:
    """Muon for the matrices inside blocks, AdamW for the vocabulary and all vectors.

    Vectors, that is A, B and the norms, are not decayed: pulling A to 0 would erase the memory.
    """
    groups = {"blocks": [], "prelude": [], "vocabulary": [], "vectors": []}
    for name, p in model.named_parameters():
        kind = "prelude" if name.startswith("prelude.") else "blocks"
        kind = "vocabulary" if name in ("embed.weight", "head.weight") else kind
        groups["vectors" if p.dim() == 1 else kind].append(p)

    def group(name: str, lr: float, **options) -> list[dict]:
        some = groups[name]  # peak_lr: `train` sets lr = peak_lr · schedule in each step
        return [{"params": some, "lr": lr, "peak_lr": lr, **options}] if some else []

    muon = group("blocks", 6e-3) + group("prelude", 6e-3 * prelude_lr)
    adamw = group("vocabulary", 1e-2, weight_decay=0.05) + group("vectors", 3e-3, weight_decay=0.0)
    return [Muon(muon, 6e-3), torch.optim.AdamW(adamw, betas=(0.9, 0.99))]


def schedule(step: int, steps: int, warmup: int = 50) -> float:
    """Share of the peak learning rate: linear warm-up times linear decay to 0."""
    return min(1.0, (step + 1) / warmup) * (1 - step / steps)


SAVE_EVERY = 50  # steps from one checkpoint to the next


def train(
    model: RecurrentDepthTransformer, task: Chains | Text, *, steps: int, seed: int,
    checkpoint: Path, resume: bool = False, stop: Callable[[], bool] = lambda: False,
) -> bool:  # fmt: skip
    """Train in place, saving to `checkpoint` every 50 steps; False if `stop` ended it early.

    A resumed run draws the batches that the interrupted one would have drawn. Raises
    FloatingPointError once a number is no longer finite, and ValueError for a checkpoint that does
    not fit. A save that fails costs a warning; if it was the last, OSError, with the model trained.
    """
    device = model.head.weight.device
    optimizers = make_optimizers(model, task.prelude_lr)
    generator = torch.Generator().manual_seed(seed)
    run = {"task": task.name, "config": asdict(model.config), "steps": steps, "seed": seed}
    run["data_crc"] = task.data_crc
    first = total_loops = 0
    if resume:
        first, total_loops = restore(checkpoint, run, model, optimizers, generator, task)
    # Only now: restore has replaced the groups that the optimizers were made with.
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    model.train()
    started = time.perf_counter()
    for done in range(first + 1, steps + 1):  # once this step is
        tokens, targets, n_loops = task.batch(generator)
        tokens, targets = tokens.to(device), targets.to(device)
        for group in groups:
            group["lr"] = task.lr_scale * group["peak_lr"] * schedule(done - 1, steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            _, loss = model(tokens, targets, n_loops=n_loops, grad_loops=task.grad_loops)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        loss, norm = torch.stack([loss.detach(), norm]).tolist()  # the one wait for the device
        numbers = {"loss": loss, "gradient norm": norm}
        expect_finite(numbers, done, model, tokens, n_loops, checkpoint)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        load = model.update_router_bias(speed=0.01)
        task.learned(n_loops, loss)

        total_loops, stopped = total_loops + n_loops, stop()
        if done % 25 == 0 or done == steps:
            pace = (time.perf_counter() - started) / (done - first)  # seconds for a step
            print(f"step {done:4d}/{steps}  loops {n_loops:2d}  loss {loss:6.3f}", end="")
            print(f"{vitals(model, load)}  {tokens.numel() / pace:6,.0f} tokens/s", end="")
            print(f"  {pace * (steps - done):4.0f} s left", flush=True)
        if done % SAVE_EVERY == 0 or done == steps or stopped:
            numbers = {"parameter norm": torch.nn.utils.get_total_norm(model.parameters()).item()}
            expect_finite(numbers, done, model, tokens, n_loops, checkpoint)
            state = {"run": run, "step": done, "loops": total_loops, "frontier": task.frontier}
            state |= {"model": model.state_dict(), "generator": generator.get_state()}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            save(state, checkpoint, must_succeed=done == steps or stopped)
        if stopped:
            return done == steps
    return True


def vitals(model: RecurrentDepthTransformer, load: Tensor) -> str:
    """rho(A), and how uneven the experts' load (layers, E) is, for the progress line."""
    text = f"  rho(A) {model.spectral_radius():.3f}" if model.recurrent else ""
    if load.numel():
        text += f"  busiest expert {(load.amax(-1) / load.float().mean(-1)).max():.2f}× mean"
    return text


def save(state: dict, checkpoint: Path, must_succeed: bool) -> None:
    """Write a checkpoint. A full disk costs a warning, or, if nothing follows, raises OSError."""
    try:
        write_atomically(checkpoint, partial(torch.save, state))
    except OSError as error:
        if must_succeed:
            raise
        print(f"warning: step {state['step']}: {error}; training goes on", flush=True)


def restore(
    checkpoint: Path, run: dict, model: RecurrentDepthTransformer, optimizers: list,
    generator: torch.Generator, task: Chains | Text,
) -> tuple[int, int]:  # fmt: skip
    """Go back to where `checkpoint` was saved, if it is of this run: the steps and loops so far."""
    saved = load_checkpoint(checkpoint)
    for key, value in run.items():
        wanted = saved["run"].get(key)
        expect(value == wanted, f"--resume, {key}", value, f"the checkpoint's {wanted!r}")
    with refusing(f"--resume: {checkpoint} is no checkpoint of this run"):
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        generator.set_state(saved["generator"])
        step, loops, task.frontier = (int(saved[key]) for key in ("step", "loops", "frontier"))
        expect(0 < step <= run["steps"], "step", step, f"1 … {run['steps']}")
    return step, loops


def expect_finite(
    numbers: dict[str, float], step: int, model: RecurrentDepthTransformer, tokens: Tensor,
    n_loops: int, checkpoint: Path,
) -> None:  # fmt: skip
    """Stop at the first inf or nan, while the checkpoint is good, and tell how the loop behaves."""
    if all(map(math.isfinite, numbers.values())):
        return
    if model.recurrent:
        gain = model.loop_gain(tokens, n_loops=n_loops, iterations=10)
        numbers = numbers | {"rho(A)": model.spectral_radius(), "gain of the loop": gain}
    told = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
    kept = f"{checkpoint} is kept" if checkpoint.exists() else "nothing is saved yet"
    raise FloatingPointError(f"Stopped in step {step}, at {n_loops} loops: {told}; {kept}.")


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Whatever fails inside becomes a ValueError of one line that names the flag: exit code 2."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {one_line(error)}") from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path`, then rename: whatever interrupts the write leaves the old file whole.

    Raises OSError that names the file, whatever `write` failed with: torch.save reports a full disk
    as a RuntimeError, and drawing needs matplotlib.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"tmp-{os.getpid()}-{path.name}")  # two runs may share a folder
    try:
        write(temporary)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())  # else a power cut may leave the new name without its bytes
        os.replace(temporary, path)
    except Exception as error:
        raise OSError(f"{path} could not be written: {one_line(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict:
    """A plain dict; nothing is unpickled. Raises ValueError if `path` is no checkpoint of ours."""
    expect(path.is_file(), "--resume", str(path), "a checkpoint that an earlier run saved")
    with refusing(f"--resume: {path} is no checkpoint of this run"):
        damaged = zipfile.ZipFile(path).testzip()  # torch.load does not look at the checksums
        expect(damaged is None, "checksum", damaged, "the bytes that were written")
        saved = dict(torch.load(path, map_location="cpu", weights_only=True))
        dict(saved["run"]), saved["model"]  # KeyError: somebody else's checkpoint
    return saved


def main(arguments: list[str] | None = None) -> int:
    """Train, report, save. Returns 0 for PASS, 1 for FAIL, 2 for bad arguments, 3 if a number was
    no longer finite, 4 if a file could not be written (the rest was), 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description="Train Mythos on a laptop.")
    parser.add_argument("--task", choices=("chains", "text"), default="chains")
    parser.add_argument("--attention", choices=("mla", "gqa"), default="mla")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help=f"{Chains.steps}, or {Text.steps} for text")
    parser.add_argument("--data", help="text: a file or folder (default: Python's own)")
    parser.add_argument("--out", default="runs", help="folder for the results")
    parser.add_argument("--resume", action="store_true", help="continue from --out's checkpoint")
    parser.add_argument("--device", help="default: cuda, mps or cpu, whichever is there first")
    args = parser.parse_args(arguments)
    try:
        expect("" not in (args.data, args.out), "--data or --out", "", "a path")  # Path(""): here
        expect(args.data is None or args.task == "text", "--data", args.data, "--task text")
        expect(args.steps is None or args.steps > 0, "--steps", args.steps, "a number above 0")
        expect(0 <= args.seed < 2**64, "--seed", args.seed, "a number from 0 to 2^64 − 1")
        return run(args, Chains() if args.task == "chains" else Text(args.data and Path(args.data)))
    except ValueError as error:
        parser.error(str(error))
    except FloatingPointError as error:
        print(error, file=sys.stderr)
        return 3


def find_device(name: str | None) -> torch.device:
    """The device of that name, or the fastest there is. Raises ValueError if it cannot be used."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
    name = best if name is None else name
    expect(name.split(":")[0] in ("cpu", "cuda", "mps"), "--device", name, "cpu, cuda or mps")
    with refusing(f"--device: got {name!r}, expected a device of this machine"):
        return torch.empty(0, device=name).device


def run(args: argparse.Namespace, task: Chains | Text) -> int:
    """What the command line does, with the task made."""
    device, steps, out = find_device(args.device), args.steps or task.steps, Path(args.out)
    # Refuse now, and not after the training.
    with refusing(f"--out: got {args.out!r}, expected a writable folder"):
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    stem = out / f"{task.name}-{args.attention}-seed{args.seed}"
    checkpoint = stem.with_suffix(".pt")
    torch.manual_seed(args.seed)
    model = RecurrentDepthTransformer(task.config(args.attention))
    task.prepare(model)
    model.to(device)
    print(f"{stem.name}: {model.num_params():,} parameters, {steps} steps on {device}")

    started, pressed, failed = time.perf_counter(), [], []
    handler = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))  # stop after the step
    try:
        finished = train(
            model, task, steps=steps, seed=args.seed, checkpoint=checkpoint,
            resume=args.resume, stop=lambda: bool(pressed),
        )  # fmt: skip
    except OSError as error:  # the last checkpoint; the model is trained all the same
        finished = not pressed
        failed.append(str(error))
    finally:
        signal.signal(signal.SIGINT, handler)
    if not finished:
        saved = f"{checkpoint} is saved. The same command with --resume continues."
        print(f"Stopped; {failed[0] if failed else saved}")
        return 4 if failed else 130
    trained = time.perf_counter() - started

    results, passed = task.report(model.eval()), True
    for what, got, sign, bound in results["checks"]:
        ok = got >= bound if sign == ">=" else got <= bound
        passed = passed and ok
        print(f"{'ok' if ok else 'NO':>4}  {what}: {got:.3f} (wanted {sign} {bound:.3f})")
    seconds = time.perf_counter() - started
    results |= {"passed": passed, "seconds": seconds, "train_seconds": trained, "steps": steps}
    results |= {"seed": args.seed, "attention": args.attention, "torch": torch.__version__}
    machine = platform.processor() or platform.machine()
    results |= {"device": str(device), "machine": machine, "threads": torch.get_num_threads()}
    files = {".json": lambda path: path.write_text(json.dumps(results, indent=1), "utf-8")}
    if task.draw:
        files[".png"] = partial(task.draw, results)
    for suffix, write in files.items():
        try:
            write_atomically(stem.with_suffix(suffix), write)
        except OSError as error:  # a full disk, no matplotlib: no reason to lose the other file
            failed.append(str(error))
    for problem in failed:
        print(f"warning: {problem}")
    print(f"{seconds:.0f} s, {trained:.0f} s of it training; results in {stem}.*")
    print("PASS" if passed else "FAIL")
    return 4 if failed else 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
