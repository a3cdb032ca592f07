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

The run leaves a checkpoint, a picture and a JSON with every number in --out. To change its size or
settings:

    from train_tiny import *

    class Mine(Chains):
        batch_size, lr_scale, train_loops = 16, 0.7, 8

    task = Mine()
    model = RecurrentDepthTransformer(task.config("gqa"), d_model=96)
    task.prepare(model)
    train(model, task, steps=400, seed=0, checkpoint=Path("runs/mine.pt"))
    print(task.measure(model.eval(), [4, 8, 12])[0])  # accuracy by hops, after 4, 8 and 12 loops

`train` takes any task with the attributes that it uses of `Chains`: see experiments/text.py.
"""

import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean as mean

import torch
from torch import Tensor

from experiments import command, measure, show
from experiments.command import find_device, load_checkpoint, refusing, say, write_atomically
from mythos import MythosConfig, RecurrentDepthTransformer, expect, get_model_config

# ------------------------------------------------------------------------------------------------
# The task
# ------------------------------------------------------------------------------------------------


class Chains:
    """Where is a node after T hops? Tokens: node i is i, edge i→j is n + n·i + j.

    A sequence is n edges, then n queries (every node once). An edge is scored, too: whatever T is,
    its answer is j, the node it points to. That keeps the edges' states still while queries walk.
    """

    name, n_nodes, steps, batch_size = "chains", 20, 400, 32
    train_hops, train_loops = 5, 12  # no training answer is further away, no training loop deeper
    grad_loops = None  # the gradient goes through all loops
    lr_scale, prelude_lr = 1.0, 0.05  # all learning rates; and the prelude's, see `prepare`
    state_noise = 0.3  # in training, of each state's size, see `Training.disturb`
    data_crc = None  # made, not read
    about = "each step draws its own number of loops, so the loss jumps"
    test_size = 500  # sequences
    longest = 11  # nodes of the chain that the test asks about: its end is 0 … 10 hops away
    decoys = (2, 2, 2, 2, 1)  # nodes of the other chains of a test sequence
    difficulty, guess = "hops to the end of the chain", 1 / 6  # six chains: one of their ends
    test_loops, halt_threshold = 12, 0.2
    wanted = 0.99, 0.90  # of the answers: at what was trained, and at the hardest of the test
    frontier = 1  # the largest loop count allowed so far: the curriculum's only state

    def config(self, attention_type: str) -> MythosConfig:
        return replace(get_model_config("tiny"), attention_type=attention_type)

    @torch.no_grad()
    def prepare(self, model: RecurrentDepthTransformer) -> None:
        """Start the prelude as the identity; its matrices learn 20 times slower (prelude_lr).

        Otherwise the prelude's own attention learns the first hop before the loop does, and the
        loop, left with nothing to do at T = 1, is late to learn hopping or never does.
        """
        for block in model.prelude:
            block.attention.out_proj.weight.zero_()
            block.ffn.down_proj.weight.zero_()

    def draw_loops(self, generator: torch.Generator) -> int:
        """While climbing, most steps at the frontier; then half at 5 loops, half with more.

        By then 1 to 4 loops are mastered. (A smaller model forgets them: tutorial.ipynb, 4.1.)
        """

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        if self.frontier < self.train_loops:
            return self.frontier if draw(0, 1) else draw(1, self.frontier)
        return self.train_hops if draw(0, 1) else draw(self.train_hops + 1, self.train_loops)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
        """tokens and targets (B, 2n), the answers after T hops, and T.

        Only queries whose answer is at most 5 hops away are scored; the others are −100. With
        T > 5 that leaves the nodes near the end of their chain: they have to stand still there.
        """
        n, B, T = self.n_nodes, self.batch_size, self.draw_loops(generator)
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
        """tokens (S, 2n); (S, n) each: the long chain's end, and how far it is from each query
        (−1: the query is on another chain)."""
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
        """All numbers of the test; "checks" is what PASS means: (what, got, sign, bound)."""
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
        return show.tables_of_chains(self, results)

    def draw(self, results: dict, path: Path) -> None:
        show.draw_chains(self, results, path)


@torch.no_grad()
def logits_per_loop(
    model: RecurrentDepthTransformer, tokens: Tensor, loops: list[int], halt_threshold=None
) -> tuple[dict[int, Tensor], Tensor]:
    """Logits (N, T, V) after each of `loops` loops, from one run, and the loops used (N, T)."""
    most = max(loops)
    cache = None if halt_threshold is None else model.new_cache(*tokens.shape, most)
    e, rope = model.run_prelude(tokens, cache)
    states = [e]  # after 0 loops the coda reads e
    _, used = model.run_loop(e, rope, most, None, halt_threshold, cache, states)
    states += states[-1:] * (most + 1 - len(states))  # all have halted: nothing moves any more
    return {L: model.run_coda(states[L], rope, cache) for L in loops}, used


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


def make_optimizers(model: torch.nn.Module, prelude_lr: float = 1.0) -> list:
    """Muon for the matrices inside blocks, AdamW for the vocabulary and all vectors.

    Vectors, that is A, B and the norms, are not decayed: pulling A to 0 would erase the memory.
    The model may be compiled or wrapped.
    """
    core = next(m for m in model.modules() if isinstance(m, RecurrentDepthTransformer))
    prelude = {*core.prelude.parameters()}
    vocabulary = dict.fromkeys([core.embed.weight, core.head.weight])  # in order; one, if tied
    blocks = [p for p in core.parameters() if p.dim() > 1 and p not in vocabulary]
    vectors = [p for p in core.parameters() if p.dim() == 1]

    def group(parameters: list, lr: float, **options) -> dict:
        return {"params": parameters, "lr": lr, "peak_lr": lr, **options}  # Training moves lr

    muon = [group([p for p in blocks if p not in prelude], 6e-3)]
    muon.append(group([p for p in blocks if p in prelude], 6e-3 * prelude_lr))
    adamw = [group([*vocabulary], 1e-2, weight_decay=0.05), group(vectors, 3e-3, weight_decay=0.0)]
    return [Muon(muon, 6e-3), torch.optim.AdamW(adamw, betas=(0.9, 0.99))]


def schedule(step: int, steps: int, warmup: int = 50) -> float:
    """Share of the peak learning rate: linear warm-up times linear decay to 0."""
    return min(1.0, (step + 1) / warmup) * (1 - step / steps)


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------

SAVE_EVERY = 50  # steps from one checkpoint to the next


class Training:
    """A model, what trains it, and how far it has come; `save` and `restore` keep all of it."""

    def __init__(self, model, task, *, steps: int, seed: int, checkpoint: Path) -> None:
        self.model, self.task, self.steps, self.checkpoint = model, task, steps, checkpoint
        self.optimizers = make_optimizers(model, task.prelude_lr)
        self.generator = torch.Generator().manual_seed(seed)
        self.done = self.loops = self.seconds = 0  # steps so far, their loops, their time
        self.unsaved = ""  # why the newest checkpoint could not be written
        self.run = {"task": task.name, "config": asdict(model.config), "steps": steps, "seed": seed}
        self.run["data_crc"] = task.data_crc  # to resume with other data would mix two runs

    def step(self) -> str:
        """One update; returns what there is to say about it."""
        model, task, device = self.model, self.task, self.model.head.weight.device
        tokens, targets, n_loops = task.batch(self.generator)
        tokens, targets = tokens.to(device), targets.to(device)
        rate = task.lr_scale * schedule(self.done, self.steps)
        for group in (g for optimizer in self.optimizers for g in optimizer.param_groups):
            group["lr"] = rate * group["peak_lr"]
        noise_seed = (100_003 * self.run["seed"] + self.done) % 2**32  # a resumed run has the same
        self.noise = torch.Generator(device).manual_seed(noise_seed)
        bf16 = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
        with bf16, ExitStack() as after:
            if model.recurrent and task.state_noise:
                after.callback(model.state_update.register_forward_hook(self.disturb).remove)
            _, loss = model(tokens, targets, n_loops=n_loops, grad_loops=task.grad_loops)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        loss, norm = torch.stack([loss.detach(), norm]).tolist()  # one wait for both numbers
        self.done, self.loops, self.last = self.done + 1, self.loops + n_loops, (tokens, n_loops)
        self.expect_finite({"loss": loss, "gradient norm": norm})
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        load = model.update_router_bias(speed=0.01)
        task.learned(n_loops, loss)
        told = f"loops {n_loops:2d}  loss {loss:.3f}"
        if model.recurrent:
            told += f"  rho(A) {measure.spectral_radius(model):.3f}"
        if load.numel():  # (layers, E)
            told += f"  busiest expert {(load.amax(-1) / load.float().mean(-1)).max():.2f}×"
        return told

    def disturb(self, module: torch.nn.Module, inputs: tuple, h: Tensor) -> Tensor:
        """Add noise to each new state, (N, T, D), which the next loop has to put right (noise in
        recurrent networks: Jim, Giles and Horne 1996).

        Without noise, training stops improving answers that are barely right. A query that stands
        still may then drift towards a wrong node, loop by loop, until its answer flips.
        """
        noise = torch.randn(h.shape, generator=self.noise, device=h.device, dtype=h.dtype)
        return h + self.task.state_noise * noise * h.detach().square().mean(-1, True).sqrt()

    def train(self, stop: Callable[[], bool]) -> bool:
        """Train to the end, or until `stop` says so (then False)."""
        self.model.train()
        before, first, stopped = self.seconds, self.done, False
        if self.done == 0:
            self.save()  # a full disk shows now, and no other run takes the name
        while self.done < self.steps and not stopped:
            started = time.perf_counter()
            told, stopped = self.step(), stop()
            self.seconds += time.perf_counter() - started
            ends = stopped or self.done == self.steps
            if self.done % SAVE_EVERY == 0 or ends:
                self.save()
            if self.done % 25 == 0 or self.done == 1 or ends:
                pace = (self.seconds - before) / (self.done - first)  # seconds a step
                speed, left = self.last[0].numel() / pace, pace * (self.steps - self.done)
                line = f"step {self.done:4d}/{self.steps}  {told}  {speed:6,.0f} tokens/s"
                say(f"{line}  {left:4.0f} s left")
                before, first = self.seconds, self.done  # deeper steps take longer
        return self.done == self.steps

    def expect_finite(self, numbers: dict[str, float]) -> None:
        """Stop at the first inf or nan, while the checkpoint is good, and tell how the loop is."""
        if all(map(math.isfinite, numbers.values())):
            return
        tokens, n_loops = self.last
        if self.model.recurrent:
            gain = measure.loop_gain(self.model, tokens, n_loops=n_loops, iterations=10)
            numbers |= {"rho(A)": measure.spectral_radius(self.model), "gain of the loop": gain}
        told = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
        kept = f"{self.checkpoint} is kept" if self.checkpoint.exists() else "nothing is saved yet"
        where = f"Stopped in step {self.done}, at {n_loops} loops"
        raise FloatingPointError(f"{where}: {told}; {kept}.")

    def save(self) -> None:
        """Write the checkpoint. A full disk costs a warning, which is kept in `unsaved`."""
        norm = torch.nn.utils.get_total_norm(self.model.parameters())
        self.expect_finite({"parameter norm": norm.item()})
        state = {"run": self.run, "step": self.done, "loops": self.loops, "seconds": self.seconds}
        state |= {"frontier": self.task.frontier, "generator": self.generator.get_state()}
        state["model"] = self.model.state_dict()
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        self.unsaved = ""
        try:
            write_atomically(self.checkpoint, lambda path: torch.save(state, path))
        except OSError as error:
            self.unsaved = str(error)
            say(f"warning: step {self.done}: {error}")

    def restore(self) -> None:
        """Go back to where the checkpoint was saved. Raises ValueError if it is not of this run."""
        saved = load_checkpoint(self.checkpoint)
        for key, value in self.run.items():
            wanted = saved["run"].get(key)
            expect(value == wanted, f"--resume, {key}", value, f"the checkpoint's {wanted!r}")
        with refusing(f"--resume: {self.checkpoint} is no checkpoint of this run"):
            self.model.load_state_dict(saved["model"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.generator.set_state(saved["generator"])
            self.done, self.loops, self.seconds = (saved[k] for k in ("step", "loops", "seconds"))
            self.task.frontier = int(saved["frontier"])
            expect(0 <= self.done <= self.steps, "step", self.done, f"0 … {self.steps}")


def train(model: RecurrentDepthTransformer, task, *, steps: int, seed: int, checkpoint: Path,
          resume: bool = False, stop: Callable[[], bool] = lambda: False) -> bool:  # fmt: skip
    """Train in place, saving to `checkpoint` every 50 steps; False if `stop` ended it early.

    Without `resume` an older file of that name is replaced, which the command line refuses to do.
    A resumed run draws the batches that the interrupted one would have drawn. Raises
    FloatingPointError once a number is no longer finite, and ValueError for a checkpoint that does
    not fit. A save that fails costs a warning; if it was the last, OSError, with the model trained.
    """
    training = Training(model, task, steps=steps, seed=seed, checkpoint=checkpoint)
    if resume:
        training.restore()
    finished = training.train(stop)
    if training.unsaved:
        raise OSError(training.unsaved)
    return finished


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def load_model(path: str | Path) -> RecurrentDepthTransformer:
    """The model of a checkpoint, in evaluation mode, on the CPU; of an unfinished training, too."""
    saved = load_checkpoint(Path(path))
    model = RecurrentDepthTransformer(MythosConfig(**saved["run"]["config"]))
    model.load_state_dict(saved["model"])
    return model.eval()


def main(arguments: list[str] | None = None) -> int:
    parser = command.make_parser("Train Mythos on chains.", Chains.steps)
    return launch(parser, arguments, lambda args: Chains())


def launch(parser, arguments: list[str] | None, make_task: Callable) -> int:
    """Train, evaluate, save, print. Returns 1 for FAIL, 2 for bad flags, 3 if a number was not
    finite, 4 if a file could not be written (the rest was), 130 after Ctrl-C, otherwise 0.
    """
    args = parser.parse_args(arguments)
    try:  # until the training is set up, a ValueError means a bad flag
        expect(args.out != "", "--out", "", "a path")  # Path(""): here
        expect(args.steps > 0, "--steps", args.steps, "a number above 0")
        expect(0 <= args.seed < 2**64, "--seed", args.seed, "a number from 0 to 2^64 − 1")
        training = prepare(args, make_task(args))
    except ValueError as error:
        parser.error(str(error))
    try:
        return run(args, training)
    except FloatingPointError as error:
        print(error, file=sys.stderr)
        return 3
    except KeyboardInterrupt:  # while measuring: the trained model is saved
        say(f"Stopped. The same command with --resume measures {training.checkpoint}.")
        return 130


def prepare(args, task) -> Training:
    """The training that the flags describe, with its model on the device."""
    device, folder = find_device(args.device), command.writable_folder(args.out)
    shorter = f"-steps{args.steps}" if args.steps != task.steps else ""  # a try, or a longer run
    name = f"{task.name}-{args.attention}-seed{args.seed}{shorter}"
    checkpoint = folder / f"{name}.pt"
    free = args.resume or not checkpoint.is_file()
    expect(free, "--out", str(checkpoint), "no such file yet: --resume goes on; or another --seed")
    torch.manual_seed(args.seed)
    model = RecurrentDepthTransformer(task.config(args.attention))
    task.prepare(model)
    model.to(device)
    training = Training(model, task, steps=args.steps, seed=args.seed, checkpoint=checkpoint)
    if args.resume:
        there = checkpoint.is_file()
        expect(there, "--resume", str(checkpoint), "a checkpoint; to start, leave --resume out")
        training.restore()
    say(f"{name}: {measure.num_params(model):,} parameters, {args.steps} steps on {device}")
    say(f"({task.about})")
    return training


def run(args, training: Training) -> int:
    """Train, evaluate, save, print."""
    task, checkpoint, pressed = training.task, training.checkpoint, []
    stem, started = checkpoint.with_suffix(""), time.perf_counter() - training.seconds
    with command.ctrl_c(lambda: pressed.append(True)):  # stop after the step
        finished = training.train(stop=lambda: bool(pressed))
    if not finished:
        saved = f"{checkpoint} is saved. The same command with --resume continues."
        say(f"Stopped; {training.unsaved or saved}")
        return 4 if training.unsaved else 130
    say("\nMeasuring, up to a minute …")
    results = task.evaluate(training.model.eval())
    verdicts = [g >= b if sign == ">=" else g <= b for _, g, sign, b in results["checks"]]
    passed, seconds = all(verdicts) if verdicts else None, time.perf_counter() - started
    results |= dict(passed=passed, seconds=seconds, train_seconds=training.seconds)
    results |= dict(attention=args.attention, seed=args.seed, steps=args.steps)
    results |= command.describe_machine(next(training.model.parameters()).device)
    failed = command.write_all(stem, results, task.draw)  # before printing, which could fail
    say(f"\n{task.describe(results)}\n")
    for (what, got, sign, bound), ok in zip(results["checks"], verdicts, strict=True):
        say(f"{'ok' if ok else 'NO':>4}  {what}: {got:.3f} (wanted {sign} {bound:.3f})")
    for problem in failed:
        say(f"warning: {problem}")
    say(f"{seconds:.0f} s, {training.seconds:.0f} s of it training; results in {stem}.*")
    say(f"Ask it: {command.ask(task.name, checkpoint)}")
    verdict = "PASS" if passed else "FAIL"
    say(verdict if verdicts else "No verdict: PASS and FAIL are about the default data.")
    return 4 if failed or training.unsaved else 1 if passed is False else 0


if __name__ == "__main__":
    command.run_as_program(main)
