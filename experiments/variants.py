# SPDX-License-Identifier: MIT
"""What is compared: the models of train_tiny.py, circuits.py and text.py, slightly changed, and
another project's benchmark.

VARIANTS, at the end, has a row for each. To add a variant, add a row:

    "loop-gqa": Variant("the loop with GQA", config=dict(attention_type="gqa")),

With one seed, all that are taught alike get the same batches, until their curricula part.
"""

import re
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from experiments.circuits import Circuits
from experiments.text import Text
from mythos import MythosConfig, RecurrentDepthTransformer, add_noise, evaluation_mode, expect
from train_tiny import Chains, Task, logits_per_loop

# ---- Tasks, and a model ----


class Counted:
    """Put before a task: each step has `n_loops` loops. None: as many as the task draws."""

    n_loops = None

    def draw_loops(self, generator: torch.Generator, frontier: int) -> int:
        drawn = super().draw_loops(generator, frontier)  # always, so that the batches stay the same
        return drawn if self.n_loops is None else self.n_loops

    def prepare(self, model: RecurrentDepthTransformer) -> None:
        """A prelude that starts as the identity helps a loop. A model of one loop needs all its
        blocks, so its prelude starts like any block, and its row says prelude_lr=1.0."""
        if self.n_loops is None:
            super().prepare(model)


class Ends(Counted, Chains):
    """Taught only the ends of chains. Nobody tells the model how many hops, or where a query is
    half-way.

    The curriculum counts hops: at first only queries whose end is at most 1 hop away are scored;
    each time those farthest away are mastered, a hop more, up to 5.
    """

    # The threshold: it takes two loops or more for a hop, so a state on its way may move little.
    steps, deep_loops, halt_threshold = 1200, 16, 0.2
    state_noise = 0.0  # 0.3, measured, is too much here: seed 5 got stuck

    def prepare(self, model: RecurrentDepthTransformer) -> None:
        self.model = model
        super().prepare(model)

    def draw_loops(self, generator: torch.Generator, frontier: int) -> int:
        """As many loops as hops asked for; or up to 3 more; or 16, so that the state learns to
        stand still: a third of the steps each."""

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        drawn = (frontier, draw(frontier, frontier + 3), self.deep_loops)[draw(0, 2)]
        return drawn if self.n_loops is None else self.n_loops

    def batch(self, generator: torch.Generator, frontier: int) -> tuple[Tensor, Tensor, int]:
        """tokens and targets (B, 2n), the ends of the chains, and a number of loops.

        Scored are only queries at most `frontier` hops from their end; the others are −100.
        """
        n_loops = self.draw_loops(generator, frontier)
        tokens, ends, hops = self.chains(generator)
        n = self.n_nodes
        pointed_to = (tokens[:, :n] - n) % n
        targets = torch.cat([pointed_to, torch.where(hops <= frontier, ends, -100)], dim=1)
        return tokens, targets, n_loops

    def chains(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """tokens (B, 2n); for each query (B, n) its chain's end, and how many hops away that is."""
        n, B = self.n_nodes, self.batch_size
        longest = torch.randint(2, n + 1, (B, 1), generator=generator)
        lengths = 1 + (torch.rand(B, n, generator=generator) * longest).long()
        tokens, node, successors, _ = self.sequences(lengths, generator)
        hops = torch.zeros_like(node)
        for _ in range(n):
            before, node = node, successors.gather(1, node)
            hops += before != node
        return tokens, node, hops

    def advance(self, frontier: int, n_loops: int, loss: float) -> int:
        """Curriculum. A small loss is not enough: most of it is about edges and nearer ends."""
        mastered = frontier < self.train_hops and loss < 0.2
        return frontier + 1 if mastered and self.share_at(frontier) >= 0.9 else frontier

    @torch.no_grad()
    def share_at(self, frontier: int) -> float:
        """Of the queries that are `frontier` hops from their end, how many are answered: in one
        batch, the same in each step, so that a resumed run climbs as an uninterrupted one."""
        generator = torch.Generator().manual_seed(frontier)
        n_loops = self.draw_loops(generator, frontier)
        tokens, ends, hops = self.chains(generator)
        with evaluation_mode(self.model):
            logits, _ = self.model(tokens, n_loops=n_loops)
        right = logits[:, self.n_nodes :].argmax(dim=-1) == ends
        return right[hops == frontier].float().mean().item()


class OneHop(Counted, Chains):
    """Taught single hops, in one loop."""

    n_loops, steps = 1, 300


class HopEmbedding(nn.Embedding):
    """An embedding that adds to every token a learned vector for T: how far to go.

    These vectors are rows of the table, behind the vocabulary's, so they learn as fast.
    """

    def __init__(self, vocab_size: int, d_model: int, most_hops: int):
        super().__init__(vocab_size + most_hops + 1, d_model)
        self.vocab_size, self.T = vocab_size, most_hops

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + self.weight[self.vocab_size + self.T]


class ToldHops(Chains):
    """For a model that is told T, and does not loop: taught every hop, as the loop is."""

    n_loops = 0  # 1: of `Injected`

    def prepare(self, model: RecurrentDepthTransformer) -> None:
        vocab_size, d_model = model.embed.weight.shape
        self.embed = HopEmbedding(vocab_size, d_model, self.train_loops)
        nn.init.normal_(self.embed.weight, std=0.02)  # as in init_weights
        model.embed = self.embed

    def batch(self, generator: torch.Generator, frontier: int) -> tuple[Tensor, Tensor, int]:
        tokens, targets, self.embed.T = super().batch(generator, frontier)
        return tokens, targets, self.n_loops

    def advance(self, frontier: int, n_loops: int, loss: float) -> int:
        return super().advance(frontier, self.embed.T, loss)

    def measure(self, *args) -> tuple[dict[int, list[float]], list[float]]:
        """Told, for each query, exactly how many hops its end is away (of 0 hops: 1)."""
        right, used = [], []
        for k in range(self.longest):
            self.embed.T = max(k, 1)
            found, loops = super().measure(*args)
            right.append(found[self.n_loops][k])
            used.append(loops[k])
        return {self.n_loops: right}, used


class Table(Chains):
    """Another project's benchmark (github.com/duongtrongnguyen123/recurrent-depth-ttc).

    Twelve tokens are the table of a random function f: the i-th says what f(i) is. A last one says
    where to start; after T loops its answer is f applied T times. In an eighth of the sequences
    the table's tokens are scored, too: their answer is themselves, whatever T is. (In all, they
    outvote it: a start symbol may never be learned.) In training T is at most `train_loops`.
    """

    name, n_nodes, batch_size, steps, train_loops = "table", 12, 96, 2000, 8
    lr_scale = 0.5  # at 1 the loss jumps as loops grow many, and some answers never come back
    prelude_lr = 1.0  # the prelude has to tell each token of the table where it stands
    halt_threshold = 0.5

    def config(self, attention_type: str) -> MythosConfig:
        """A value has to find the place of the same number: RoPE turns whole heads (GQA), and fast
        enough for 13 places. The state forgets faster, as in `forgets` below."""
        places = dict(n_kv_heads=4, rope_theta=20.0, embed_norm=True)
        other = dict(vocab_size=self.n_nodes, spectral_radius_target=0.5)
        return replace(super().config("gqa"), **places, **other)

    def draw_loops(self, generator: torch.Generator, frontier: int) -> int:
        """Half of the steps use as many loops as the curriculum allows, the rest 1 to as many."""
        drawn = int(torch.randint(1 - frontier, frontier + 1, (), generator=generator))
        return drawn if drawn > 0 else frontier

    def batch(self, generator: torch.Generator, frontier: int) -> tuple[Tensor, Tensor, int]:
        n, T = self.n_nodes, self.draw_loops(generator, frontier)
        tokens = torch.randint(n, (self.batch_size, n + 1), generator=generator)
        table, node = tokens.split([n, 1], dim=1)
        for _ in range(T):
            node = table.gather(1, node)
        scored = torch.rand(self.batch_size, 1, generator=generator) < 1 / 8
        return tokens, torch.cat([table.where(scored, -100), node], dim=1), T

    def advance(self, frontier: int, n_loops: int, loss: float) -> int:
        """Curriculum. A start symbol of twelve that is never learned costs about 0.08."""
        mastered = n_loops == frontier < self.train_loops and loss < 0.05
        return frontier + 1 if mastered else frontier

    def walk(self, model: RecurrentDepthTransformer, threshold: float | None) -> list[float]:
        """For 1 to 64·n hops, the share of 500 starts for which the answer is right after as many
        loops."""
        loops, n, right = range(1, 64 * self.train_loops + 1), self.n_nodes, []
        generator = torch.Generator().manual_seed(12345)
        for tokens in torch.randint(n, (5, 100, n + 1), generator=generator):
            logits, _ = logits_per_loop(model, tokens, loops, threshold)
            table, node = tokens.split([n, 1], dim=1)
            path = [node := table.gather(1, node) for _ in loops]
            answers = [logits[T][:, n:].argmax(dim=-1) for T in loops]
            right.append((torch.cat(answers, dim=1) == torch.cat(path, dim=1)).float().mean(dim=0))
        return torch.stack(right).mean(dim=0).tolist()


class Gates(Counted, Circuits):
    """Circuits for a model of one loop, or of none."""


class Bytes(Counted, Text):
    """Scored on more bytes than text.py takes the time for."""

    test_bytes = most_of_one = 1_000_000  # whole files


class InputOnce(RecurrentDepthTransformer):
    """The loop starts at the input, h_0 = e, and is not offered it again."""

    def initial_state(self, e: Tensor) -> Tensor:
        return e

    def step(self, h: Tensor, e: Tensor, *args) -> Tensor:
        return super().step(h, torch.zeros_like(e), *args)


class Injected(RecurrentDepthTransformer):
    """Different blocks instead of the loop's, each once, with all else that a loop has: each gets
    the input, A and B, and noise on its state. One "loop" is all of them."""

    def run_loop(self, e, rope, n_loops, cache=None, grad_loops=None, state_noise=0.0, states=None):
        h = self.initial_state(e)
        for block in self.recurrent:
            r = self.run_blocks([block], self.loop_norm(h + e), rope)
            h = add_noise(self.state_update(h, e, r), state_noise)
        if states is not None:
            states.append(h)
        return h


class Written(RecurrentDepthTransformer):
    """Each loop writes its answers down as tokens; the next one has these as its queries. Nothing
    else is carried on: no state."""

    def step(self, h: Tensor, e: Tensor, rope: Tensor, t: int, cache=None, halted=None) -> Tensor:
        edges, queries = e.chunk(2, dim=1)
        if t > 0:
            answers = self.run_coda(h, rope)[:, queries.shape[1] :].argmax(dim=-1)
            queries, _ = self.run_prelude(answers)
        x, slot = torch.cat([edges, queries], dim=1), cache.first_slot(t) if cache else 0
        return self.run_blocks(self.recurrent, x, rope, cache, slot, halted)


# ---- The variants ----


class Variant(NamedTuple):
    """What makes it, and what differs from the task's own model and training."""

    what: str
    task: type[Task] = Chains
    config: dict = {}  # fields of the config
    settings: dict = {}  # attributes of the task
    model: type[RecurrentDepthTransformer] = RecurrentDepthTransformer
    seeds: tuple = (10, 11, 12, 13, 14)  # rates were tuned on seed 5, which no row has

    def build(self) -> tuple[RecurrentDepthTransformer, Task]:
        task = self.task()
        for name, value in self.settings.items():
            setattr(task, name, value)
        model = self.model(replace(task.config("mla"), **self.config))
        task.prepare(model)
        return model, task


def stack(layers: int, **more) -> dict:
    """A config's fields: a transformer of so many layers, without a loop."""
    return dict(prelude_layers=0, recurrent_layers=0, coda_layers=layers, **more)


# With this d_ff, 3 dense layers have as many parameters as the model with the loop, and 14 as many
# FLOPs as its 12 loops (a test compares).
SAME_PARAMS, SAME_FLOPS = stack(3, d_ff=448), stack(14, d_ff=222)
ALL_IN_LOOP = dict(prelude_layers=0, recurrent_layers=3, coda_layers=0)

FRESH, NEW = tuple(range(25, 35)), tuple(range(40, 45))  # no recipe was tuned on these seeds
NONE, ONCE = dict(n_loops=0), dict(n_loops=1)
PLAIN_ONCE = ONCE | dict(prelude_lr=1.0)  # see `Counted`
SLOW = NONE | dict(lr_scale=0.5)  # the rate that suits deep stacks better (seed 5)
# Ten hops need three times the steps, at half the rate.
TEN = dict(steps=1200, train_hops=10, lr_scale=0.5)
TWELVE, ALL = dict(recurrent_layers=12), dict(steps=800, n_loops=1, prelude_lr=1.0)
FORGETS, BOLD = dict(spectral_radius_target=0.5), dict(halt_threshold=0.5)
LONG = BOLD | dict(steps=1200)
NEAR = ONCE | dict(train_hops=1)
ONE_LAYER = dict(prelude_layers=0, coda_layers=0, num_experts=0)

VARIANTS = {
    "chains": {
        "loop": Variant("the loop of train_tiny.py"),
        "loop-fresh": Variant("the same, on fresh seeds", seeds=FRESH),
        "forgets": Variant("A up to 0.5, not 0.95", Chains, FORGETS, BOLD, seeds=FRESH),
        "forgets-long": Variant("A up to 0.5, 1,200 steps", Chains, FORGETS, LONG, seeds=FRESH),
        "ends": Variant("the loop, taught ends only", Ends),
        "ends-fresh": Variant("the same, on fresh seeds", Ends, seeds=tuple(range(15, 20))),
        "one-loop": Variant("the model once, prelude like any block", Ends, {}, PLAIN_ONCE),
        "flat-slow": Variant("14 layers, half the learning rate", Ends, SAME_FLOPS, SLOW),
        "flat-told": Variant("14 layers, told T, 800 steps", ToldHops, SAME_FLOPS, dict(steps=800)),
        "flat-told-ten": Variant("14 layers, told T, taught 10 hops", ToldHops, SAME_FLOPS, TEN),
        "injected": Variant("14 blocks, told T, as in a loop", ToldHops, TWELVE, ALL, Injected),
        "written": Variant("1 layer, each hop written down", OneHop, ONE_LAYER, {}, Written),
        "written-ends": Variant("1 layer, ends written down", Ends, ONE_LAYER, ONCE, Written),
        "written-near": Variant("the same, ends 1 hop away", Ends, ONE_LAYER, NEAR, Written),
        "input-once": Variant("the loop, its input given once", model=InputOnce),
    },
    "circuits": {
        "loop": Variant("the loop of circuits.py", Gates),
        "one-loop": Variant("the model once, prelude like any block", Gates, {}, PLAIN_ONCE),
        "flat-params": Variant("3 layers, same parameters", Gates, SAME_PARAMS, NONE),
        "flat-slow": Variant("14 layers, half the learning rate", Gates, SAME_FLOPS, SLOW),
    },
    "table": {
        "loop-4": Variant("up to 4 hops", Table, {}, dict(train_loops=4), seeds=NEW),
        "loop-8": Variant("up to 8 hops", Table, seeds=NEW),
        "loop-16": Variant("up to 16 hops", Table, {}, dict(train_loops=16), seeds=NEW),
    },
    "text": {
        **{f"flat-{n}": Variant(f"{n} layers", Bytes, stack(n), NONE) for n in (3, 4, 6)},
        "flat-12": Variant("12 layers", Bytes, stack(12), NONE | dict(lr_scale=1.5)),
        "loop-2": Variant("3 layers, run 2 times", Bytes, ALL_IN_LOOP, dict(n_loops=2)),
        "loop-3": Variant("3 layers, run 3 times", Bytes, ALL_IN_LOOP, dict(n_loops=3)),
        "loop-4": Variant("3 layers, run 4 times", Bytes, ALL_IN_LOOP, dict(n_loops=4)),
    },
}


def find(kind: str, name: str) -> Variant:
    """Of this name. Any name may end in a learning rate: flat-slow@0.5 is flat-slow with half the
    rate of train_tiny.py."""
    name, _, rate = name.partition("@")
    expect(name in VARIANTS[kind], f"variant of {kind}", name, f"one of {[*VARIANTS[kind]]}")
    row, ok = VARIANTS[kind][name], re.fullmatch(r"(\d*\.?\d+)?", rate)
    expect(ok, f"rate of {name}", rate, "a number such as 0.5")
    return row._replace(settings=row.settings | dict(lr_scale=float(rate))) if rate else row


# What is measured of those that have a loop.
MOST_LOOPS = 32
SHAPES = ("deep tree", "repeated queries", "random function", "two rings", "ring")
WALKS = (1, 2, 5, 8, 10, 16, 32, 64)  # hops, on those shapes
FAR = (*WALKS, 128, 256, 512)  # on rings, and with halting on all
NORM_LOOPS = (1, 16, 256)  # where the tables show the norm of the state
