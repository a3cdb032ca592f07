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

Both write NAME.pt (checkpoint), NAME.json (every number printed) and NAME.png to --out.
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
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, replace
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

    A sequence is n edges, then n queries (every node once); only the queries are scored.
    """

    name = "chains"
    n_nodes = 20
    train_hops, train_loops = 5, 12  # no training answer is further away, no training loop deeper
    test_size = 1000
    longest = 11  # nodes of the chain that the test asks about: its end is 0 … 10 hops away
    decoys = (2, 2, 2, 2, 1)  # nodes of the other chains of a test sequence
    halt_threshold = 0.3
    steps, batch_size, grad_loops = 600, 64, None
    prelude_lr = 0.05  # see `prepare`

    def __init__(self) -> None:
        self.frontier = 1  # the largest loop count drawn so far: the curriculum's only state

    def config(self, attention_type: str) -> MythosConfig:
        return replace(get_model_config("tiny"), attention_type=attention_type)

    @torch.no_grad()
    def prepare(self, model: RecurrentDepthTransformer) -> None:
        """Start the prelude as the identity; it also learns 20 times slower (prelude_lr).

        Otherwise the prelude's own attention learns the first hop before the loop does, and the
        loop, left with nothing to do at T = 1, never learns to hop.
        """
        for block in model.prelude:
            block.attention.out_proj.weight.zero_()
            block.ffn.down_proj.weight.zero_()

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
        """tokens (B, 2n), targets (B, 2n) after T loops, −100 at the edges, and T.

        Up to 5 loops are trained on chains of any length. More loops are trained on chains of at
        most 6 nodes, where they teach the state to stand still.
        """
        n, B, first = self.n_nodes, self.batch_size, self.train_hops + 1

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        if self.frontier < self.train_loops:  # still climbing: half of the steps at the top
            n_loops = self.frontier if draw(0, 1) else draw(1, self.frontier)
        else:
            n_loops = draw(1, self.train_hops) if draw(1, 5) <= 3 else draw(first, self.frontier)
        longest = torch.full((B, 1), first)
        if n_loops <= self.train_hops:
            longest = torch.randint(2, n + 1, (B, 1), generator=generator)
        lengths = 1 + (torch.rand(B, n, generator=generator) * longest).long()
        tokens, queries, successor, _ = self.sequences(lengths, generator)
        answers = queries
        for _ in range(n_loops):
            answers = successor.gather(1, answers)
        return tokens, torch.cat([torch.full_like(answers, -100), answers], dim=1), n_loops

    def learned(self, n_loops: int, loss: float) -> None:
        """Curriculum: once the largest loop count so far is mastered, allow one more."""
        if n_loops == self.frontier < self.train_loops and loss < 0.5:
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

    def test_set(self, seed: int = 12345) -> tuple[Tensor, Tensor, Tensor]:
        """tokens (S, 2n); for the queries (S, n) their chain's end and its distance (−1: decoy)."""
        generator, size = torch.Generator().manual_seed(seed), self.test_size
        lengths = torch.tensor([(self.longest, *self.decoys)]).expand(size, -1)
        tokens, queries, _, order = self.sequences(lengths, generator)
        main = order[:, : self.longest]
        hops = torch.arange(self.longest - 1, -1, -1).expand(size, -1)
        distance = torch.full_like(order, -1).scatter(1, main, hops)
        return tokens, main[:, -1:].expand_as(queries), distance.gather(1, queries)

    def report(self, model: RecurrentDepthTransformer) -> dict:
        """Measure and print; returns every number, and under "checks" what PASS means."""
        tokens, ends, distance = self.test_set()
        hops, device = range(self.longest), model.embed.weight.device

        def measure(loops: list[int], threshold: float | None = None) -> tuple[dict, list[float]]:
            right, used = {L: [] for L in loops}, []
            for part in tokens.to(device).split(250):
                logits, part_used = logits_per_loop(model, part, loops, threshold)
                for L in loops:
                    right[L].append(logits[L][:, self.n_nodes :].argmax(dim=-1).cpu())
                used.append(part_used[:, self.n_nodes :].cpu())
            right = {L: by_hops(torch.cat(answers) == ends) for L, answers in right.items()}
            return right, by_hops(torch.cat(used))

        def by_hops(values: Tensor) -> list[float]:
            return [values[distance == k].float().mean().item() for k in hops]

        deep = [20, 24, 28, 32]
        accuracy, _ = measure([*range(1, 17), *deep])
        halting = {}
        for threshold in (0.4, 0.3, 0.2, 0.1):
            right, used = measure([32], threshold)
            halting[threshold] = {"accuracy": right[32], "loops": used}

        guess = 1 / (1 + len(self.decoys))
        print(f"\nTest: {len(tokens)} sequences with a chain of {self.longest} nodes and")
        print(f"{len(self.decoys)} others; naming any chain's end would score {guess:.0%}.")
        print("\nAccuracy (%), columns: hops to the end of the chain, rows: loops")
        print("loops " + "".join(f"{k:5d}" for k in hops))
        for L in (1, 2, 4, 5, 6, 8, 10, 12, 16, *deep):
            print(f"{L:5d} " + "".join(f"{100 * a:5.0f}" for a in accuracy[L]))
        print("\nHalting (at most 32 loops), columns: loops used by hops, then means over all hops")
        print("below " + "".join(f"{k:5d}" for k in hops) + "  loops  accuracy")
        for threshold, h in halting.items():
            line = "".join(f"{u:5.1f}" for u in h["loops"])
            print(
                f"{threshold:5.2f} {line}  {mean(h['loops']):5.1f}  {100 * mean(h['accuracy']):.1f}"
            )
        best = max(accuracy, key=lambda L: mean(accuracy[L]))
        print(f"fixed {best} loops, the best: accuracy {100 * mean(accuracy[best]):.1f}")

        near, far = accuracy[self.train_loops][: self.train_hops + 1], self.longest - 1
        drift = max(accuracy[16][k] - accuracy[L][k] for L in deep for k in hops)
        cost = mean(accuracy[best]) - mean(halting[self.halt_threshold]["accuracy"])
        checks = {
            f"accuracy at {self.train_loops} loops, every hop count trained on": (
                min(near),
                ">=",
                0.99,
            ),
            f"accuracy at {self.train_loops} loops, {far} hops": (accuracy[12][far], ">=", 0.90),
            "lost from 16 to 32 loops, worst hop count": (drift, "<=", 0.05),
            f"lost by halting below {self.halt_threshold}": (cost, "<=", 0.01),
        }
        return {"accuracy": accuracy, "halting": halting, "guess": guess, "checks": checks}

    def draw(self, results: dict, axes: list) -> None:
        """Left: the staircase, accuracy by loops and hops. Right: loops that halting spends."""
        accuracy, h = results["accuracy"], results["halting"][self.halt_threshold]
        loops, hops = range(1, 17), range(self.longest)
        grid = [[100 * a for a in accuracy[L]] for L in loops]
        image = axes[0].imshow(grid, origin="lower", aspect="auto", extent=(-0.5, 10.5, 0.5, 16.5))
        axes[0].figure.colorbar(image, ax=axes[0], label="accuracy (%)")
        axes[0].axvline(self.train_hops + 0.5, color="white", linestyle="--")
        axes[0].set(xlabel="hops to the end of the chain", ylabel="loops at test time")
        axes[0].set_title("One hop per loop (dashed: hops trained on)")
        axes[1].plot(hops, h["loops"], "o-", label=f"loops used, threshold {self.halt_threshold}")
        axes[1].plot(hops, hops, "k:", label="hops: the least possible")
        axes[1].set(xlabel="hops to the end of the chain", ylabel="loops before halting")
        axes[1].set_title(f"Halting: {100 * mean(h['accuracy']):.1f}% right on average")
        axes[1].legend()


# ------------------------------------------------------------------------------------------------
# Text
# ------------------------------------------------------------------------------------------------


class Text:
    """Next-byte prediction on files, some of which are held out whole. A token is a byte."""

    name = "text"
    context = 256  # bytes that the model sees
    test_bytes = 200_000  # at least so much is held out
    test_loops = (1, 2, 4, 8, 16)
    mean_loops, most_loops = 4, 12  # T ~ Poisson(4), cut to 1 … 12
    steps, batch_size, grad_loops = 400, 16, 4
    prelude_lr = 1.0
    frontier = 0  # no curriculum

    def __init__(self, data: Path | None = None) -> None:
        pieces = read_pieces(data)
        shuffle = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0)).tolist()
        total = sum(map(len, pieces))
        goal, test = min(self.test_bytes, total // 10), b""
        while len(test) < goal:
            test += pieces[shuffle.pop()]
        train = b"".join(pieces[i] for i in shuffle)
        got, least = min(len(train), len(test)), self.context + 1
        expect(got >= least, "data", f"{total} bytes", f"enough for two parts of {least} bytes")
        self.test = test
        self.train_bytes = torch.frombuffer(bytearray(train), dtype=torch.uint8)

    def config(self, attention_type: str) -> MythosConfig:
        return replace(
            get_model_config("tiny"), attention_type=attention_type, vocab_size=256,
            max_seq_len=2 * self.context, recurrent_layers=2, max_loop_iters=self.mean_loops,
            d_expert=128,
        )  # fmt: skip

    def prepare(self, model: RecurrentDepthTransformer) -> None:
        """Nothing: here the prelude learns from the first step on, like every other block."""

    def learned(self, n_loops: int, loss: float) -> None:
        """No curriculum."""

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
        """tokens and targets, (B, context) each, one byte apart, and T."""
        n_loops = int(torch.poisson(torch.tensor(float(self.mean_loops)), generator=generator))
        last_start = len(self.train_bytes) - self.context
        starts = torch.randint(last_start, (self.batch_size, 1), generator=generator)
        window = self.train_bytes[starts + torch.arange(self.context + 1)].long()
        return window[:, :-1], window[:, 1:], min(max(n_loops, 1), self.most_loops)

    def report(self, model: RecurrentDepthTransformer) -> dict:
        """Held-out bits per byte for each loop count, beside two compressors; prints a sample."""
        C, device = self.context, model.embed.weight.device
        data = torch.frombuffer(bytearray(self.test), dtype=torch.uint8).long()
        windows = data.unfold(0, C + 1, C)  # overlap by one byte: all but the first are predicted
        nats = dict.fromkeys(self.test_loops, 0.0)
        for part in windows.to(device).split(32):
            logits, _ = logits_per_loop(model, part[:, :-1], list(self.test_loops))
            for L in self.test_loops:
                flat = logits[L].flatten(0, 1).float()
                nats[L] += F.cross_entropy(flat, part[:, 1:].flatten(), reduction="sum").item()
        bits = {L: nats[L] / math.log(2) / (C * len(windows)) for L in self.test_loops}

        def packed(compress: Callable[[bytes], bytes], size: int) -> float:
            parts = [self.test[i : i + size] for i in range(0, len(self.test), size)]
            return 8 * sum(len(compress(part)) for part in parts) / len(self.test)

        whole, tools = len(self.test), {"zlib -9": zlib_9, "lzma -9e": lzma_9e}
        others = {k: {"whole": packed(f, whole), "context": packed(f, C)} for k, f in tools.items()}
        print(f"\nBits per byte on {len(self.test):,} held-out bytes (whole files never seen)")
        for L, b in bits.items():
            print(f"{L:9d} loops {b:6.3f}")
        for k, v in others.items():
            print(
                f"{k:>15} {v['whole']:6.3f}, given {C} bytes at a time like the model {v['context']:.3f}"
            )
        prompt = torch.tensor([list(b"def ")], device=device)
        sample = model.generate(
            prompt, C, temperature=0.7, top_p=0.95, generator=torch.Generator(device).manual_seed(0)
        )
        text = bytes(sample[0].tolist()).decode(errors="replace")
        print(f"\nA sample (temperature 0.7, top_p 0.95, {self.mean_loops} loops):\n{text}\n")

        best, spread = min(bits.values()), [bits[L] for L in self.test_loops if L >= 2]
        zlib_whole, lzma_whole = (others[k]["whole"] for k in tools)
        print(
            f"{best - lzma_whole:+.3f} bits per byte from lzma over whole files, the stretch goal"
        )
        checks = {
            "bits per byte, best loop count, below zlib's": (best, "<=", zlib_whole),
            "largest difference from 2 to 16 loops": (max(spread) - min(spread), "<=", 0.05),
        }
        return {"bits_per_byte": bits, "compressors": others, "sample": text, "checks": checks}

    def draw(self, results: dict, axes: list) -> None:
        """Bits per byte by loops, beside the compressors."""
        bits = results["bits_per_byte"]
        axes[0].plot(list(bits), list(bits.values()), "o-", label="Mythos")
        for (name, v), style in zip(results["compressors"].items(), ("--", ":"), strict=True):
            axes[0].axhline(v["whole"], color="gray", linestyle=style, label=f"{name}, whole files")
        axes[0].set(xlabel="loops at test time", ylabel="held-out bits per byte", xscale="log")
        axes[0].set_xticks(list(bits), [str(L) for L in bits])
        axes[0].legend()
        axes[1].axis("off")
        axes[1].text(0, 1, results["sample"][:400], va="top", family="monospace", fontsize=7)


def zlib_9(data: bytes) -> bytes:
    return zlib.compress(data, 9)


def lzma_9e(data: bytes) -> bytes:
    return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)


def read_pieces(data: Path | None) -> list[bytes]:
    """The files to learn from: the standard library's own source, a folder's files, or one file.

    One file is cut into 20 pieces, so that some can be held out.
    """
    if data is None:
        root, pattern, skip = Path(sysconfig.get_paths()["stdlib"]), "*.py", ("test", "tests")
    else:
        root, pattern, skip = data, "*", ()
    expect(root.exists(), "data", str(root), "a file or a folder that exists")
    if root.is_file():
        text = root.read_bytes()
        size = max(1, math.ceil(len(text) / 20))
        return [text[i : i + size] for i in range(0, len(text), size)]
    skip += ("site-packages", "dist-packages", "__pycache__")
    files = sorted(p for p in root.rglob(pattern) if p.is_file())
    return [p.read_bytes() for p in files if not set(skip) & set(p.relative_to(root).parts)]


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@torch.no_grad()
def logits_per_loop(
    model: RecurrentDepthTransformer,
    tokens: Tensor,
    loops: list[int],
    halt_threshold: float | None = None,
) -> tuple[dict[int, Tensor], Tensor]:
    """Logits (B, T, V) after each of `loops` loops, from one run, and the loops used (B, T)."""
    most, states = max(loops), []
    cache = None if halt_threshold is None else model.new_cache(*tokens.shape, most)
    e, place = model.run_prelude(tokens, cache)
    _, used = model.run_loop(e, place, most, None, halt_threshold, cache, states)
    last = len(states)  # fewer than `most` if every token halted
    return {L: model.run_coda(states[min(L, last) - 1], place, cache) for L in loops}, used


def make_optimizers(model: RecurrentDepthTransformer, prelude_lr: float = 1.0) -> list:
    """Muon (Jordan 2024) for the blocks' matrices, AdamW for all else.

    No weight decay on vectors: A, B and the norms. Expert stacks are 3-D; Muon wants 2-D.
    """
    prelude, matrices, stacks, ends, vectors = [], [], [], [], []
    for name, p in model.named_parameters():
        if name in ("embed.weight", "head.weight"):
            ends.append(p)
        elif p.dim() == 2:
            (prelude if name.startswith("prelude.") else matrices).append(p)
        else:
            (stacks if p.dim() == 3 else vectors).append(p)
    muon = [{"params": matrices, "lr": 6e-3}, {"params": prelude, "lr": 6e-3 * prelude_lr}]
    adamw = [
        {"params": ends, "lr": 1e-2, "weight_decay": 0.05},
        {"params": stacks, "lr": 3e-3, "weight_decay": 0.05},
        {"params": vectors, "lr": 3e-3, "weight_decay": 0.0},
    ]
    optimizers = [
        torch.optim.Muon(
            [g for g in muon if g["params"]], momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW([g for g in adamw if g["params"]], betas=(0.9, 0.95)),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def schedule(step: int, steps: int, warmup: int = 50) -> float:
    """Share of the peak learning rate: a linear warm-up times a linear decay to 5%."""
    return min(1.0, (step + 1) / warmup) * (1 - 0.95 * step / steps)


def train(
    model: RecurrentDepthTransformer,
    task: Chains | Text,
    *,
    steps: int,
    seed: int,
    checkpoint: Path,
    resume: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train in place, saving to `checkpoint` every 50 steps; False if `stop` ended it early.

    A resumed run draws the same batches as an uninterrupted one and ends with the same numbers.
    """
    device = model.embed.weight.device
    optimizers = make_optimizers(model, task.prelude_lr)
    generator = torch.Generator().manual_seed(seed)
    run = {"task": task.name, "config": asdict(model.config), "steps": steps, "seed": seed}
    step = 0
    if resume:
        saved = load_checkpoint(checkpoint)
        for key, value in run.items():
            expect(saved["run"][key] == value, f"resumed {key}", value, f"{saved['run'][key]}")
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        generator.set_state(saved["generator"])
        step, task.frontier = saved["step"], saved["frontier"]
    model.train()
    started, first, seen = time.perf_counter(), step, 0
    while step < steps and not stop():
        tokens, targets, n_loops = (x for x in task.batch(generator))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * schedule(step, steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            _, loss = model(
                tokens.to(device), targets.to(device), n_loops=n_loops, grad_loops=task.grad_loops
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        load = model.update_router_bias(speed=0.01).float()
        task.learned(n_loops, loss.item())
        step, seen = step + 1, seen + tokens.numel()
        if step % 25 == 0 or step == steps:
            rate = (time.perf_counter() - started) / (step - first)
            print(
                f"step {step:4d}/{steps}  loops {n_loops:2d}  loss {loss.item():6.3f}"
                f"  rho(A) {model.spectral_radius():.3f}"
                f"  busiest expert {(load.amax(-1) / load.mean(-1)).max():.2f}× mean"
                f"  {seen / (step - first) / rate:6,.0f} tokens/s"
                f"  {rate * (steps - step):4.0f} s left",
                flush=True,
            )
        if step % 50 == 0 or step == steps or stop():
            state = {
                "run": run, "step": step, "frontier": task.frontier, "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "generator": generator.get_state(),
            }  # fmt: skip
            write_atomically(checkpoint, lambda temporary: torch.save(state, temporary))
    return step == steps


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path`, then rename: an interrupted write leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp" + path.suffix)
    write(temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict:
    """A plain dict: nothing is unpickled (weights_only). Raises ValueError if it is not ours."""
    expect(path.is_file(), "resume", str(path), "a checkpoint that an earlier run saved")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        saved["run"], saved["model"], saved["step"]
    except Exception as error:
        raise ValueError(f"resume: {path} is not a checkpoint of this file ({error})") from error
    return saved


def main(arguments: list[str] | None = None) -> int:
    """Train, report, save; 0 for PASS, 1 for FAIL, 2 for bad arguments, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description="Train Mythos on a laptop.")
    parser.add_argument("--task", choices=("chains", "text"), default="chains")
    parser.add_argument("--attention", choices=("mla", "gqa"), default="mla")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: 600 for chains, 400 for text")
    parser.add_argument("--data", type=Path, help="text: a file or folder (default: Python's own)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for the results")
    parser.add_argument("--resume", action="store_true", help="continue from --out's checkpoint")
    parser.add_argument("--device", help="default: cuda, mps or cpu, whichever is there first")
    args = parser.parse_args(arguments)
    try:
        return run(args)
    except ValueError as error:
        parser.error(str(error))


def run(args: argparse.Namespace) -> int:
    expect(
        args.data is None or args.task == "text", "--data", str(args.data), "--task text with it"
    )
    expect(args.steps is None or args.steps >= 1, "--steps", args.steps, "at least 1")
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
    device = torch.device(args.device or best)
    task = Chains() if args.task == "chains" else Text(args.data)
    steps = args.steps or task.steps
    stem = args.out / f"{args.task}-{args.attention}-seed{args.seed}"
    checkpoint = stem.with_suffix(".pt")

    torch.manual_seed(args.seed)
    model = RecurrentDepthTransformer(task.config(args.attention))
    task.prepare(model)
    model.to(device)
    print(
        f"{args.task}: {model.num_params():,} parameters, {args.attention}, {device}, {steps} steps"
    )
    started, pressed = time.perf_counter(), []
    previous = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        finished = train(
            model, task, steps=steps, seed=args.seed, checkpoint=checkpoint,
            resume=args.resume, stop=lambda: bool(pressed),
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, previous)
    if not finished:
        print(f"stopped; {checkpoint} is saved: the same command with --resume continues")
        return 130
    trained = time.perf_counter() - started
    results = task.report(model.eval())
    ops = {"<=": float.__le__, ">=": float.__ge__}
    passed = True
    for what, (got, op, bound) in results["checks"].items():
        ok = ops[op](got, bound)
        passed = passed and ok
        print(f"{'ok  ' if ok else 'MISS'}  {what}: {got:.3f} (wanted {op} {bound:.3f})")
    results |= {
        "passed": passed, "seconds": time.perf_counter() - started, "train_seconds": trained,
        "steps": steps, "seed": args.seed, "attention": args.attention, "torch": torch.__version__,
        "device": str(device), "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    write_atomically(
        stem.with_suffix(".json"), lambda path: path.write_text(json.dumps(results, indent=1))
    )
    draw(task, results, stem.with_suffix(".png"))
    print(
        f"{stem}.pt, .json, .png written; {results['seconds']:.0f} s, {trained:.0f} s of it training"
    )
    print("PASS" if passed else "FAIL")
    return 0 if passed else 1


def draw(task: Chains | Text, results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    task.draw(results, list(axes))
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
