# SPDX-License-Identifier: MIT
"""What is compared: the toy of train_tiny.py (and of text.py) with one thing or a few changed.

A variant is a config's fields, a task and a model. All get the same data, batch size and seeds; and
those that are taught alike get as many steps, unless their name ends in "long".
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.circuits import Circuits
from experiments.text import Text
from mythos import RecurrentDepthTransformer, make_block
from train_tiny import Chains

# ------------------------------------------------------------------------------------------------
# Tasks and models
# ------------------------------------------------------------------------------------------------


class Ends(Chains):
    """Taught less: the ends of chains alone. Nobody tells the model how many hops, or where a query
    is half-way: what a stack is taught.

    The curriculum counts hops: at first only queries whose end is at most 1 hop away are scored;
    each time those are mastered, a hop more, up to 5.
    """

    steps, deep_loops = 600, 16
    state_noise = 0.0  # 0.3, measured, is too much here: seed 5 got stuck

    def draw_loops(self, generator: torch.Generator) -> int:
        """As many loops as hops asked for; or up to 3 more; or 16, so that the state learns to
        stand still: a third of the steps each."""

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        hops = self.frontier
        return (hops, draw(hops, hops + 3), self.deep_loops)[draw(0, 2)]

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
        """tokens and targets (B, 2n), the ends of the chains, and a number of loops.

        Scored are only queries at most `frontier` hops from their end; the others are −100.
        """
        n, B, n_loops = self.n_nodes, self.batch_size, self.draw_loops(generator)
        longest = torch.randint(2, n + 1, (B, 1), generator=generator)
        lengths = 1 + (torch.rand(B, n, generator=generator) * longest).long()
        tokens, node, successors, _ = self.sequences(lengths, generator)
        for _ in range(self.frontier):
            node = successors.gather(1, node)
        is_end = successors.gather(1, node) == node
        pointed_to = (tokens[:, :n] - n) % n
        targets = torch.cat([pointed_to, torch.where(is_end, node, -100)], dim=1)
        return tokens, targets, n_loops

    def learned(self, n_loops: int, loss: float) -> None:
        """Curriculum: once so many hops are mastered, ask for one more."""
        if self.frontier < self.train_hops and loss < 0.2:
            self.frontier += 1


class Flat(Ends):
    """For a model without a loop: the same batches, targets and curriculum."""

    def draw_loops(self, generator: torch.Generator) -> int:
        return 0


class LongFlat(Flat):
    """Three times the steps: 14 layers may only be slower to learn."""

    steps = 3 * Ends.steps


class OneLoop(Ends):
    """The same model run once: what a loop has to beat first."""

    def draw_loops(self, generator: torch.Generator) -> int:
        return 1


class NoNoise(Chains):
    """What `Training.disturb` is for."""

    state_noise = 0.0


class HopEmbedding(nn.Embedding):
    """An embedding that adds to every token a learned vector for T: how far to go."""

    def __init__(self, vocab_size: int, d_model: int, most_hops: int):
        super().__init__(vocab_size, d_model)
        self.hops = nn.Parameter(torch.zeros(most_hops + 1, d_model))
        self.T = most_hops

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + self.hops[self.T]


class ToldHops(Chains):
    """For a model without loops that is told T: taught every hop, as the loop is.

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


class LongChains(Chains):
    """Three times the steps: 12 blocks have to learn what one block learns once."""

    steps = 3 * Chains.steps


class Far(Chains):
    """A test of 14 hops instead of 10: almost three times as far as any training answer."""

    longest, decoys, guess = 15, (2, 2, 1), 1 / 4


class OneLoopCircuits(Circuits):
    """Circuits for the same model run once."""

    def draw_loops(self, generator: torch.Generator) -> int:
        return 1


class FlatCircuits(Circuits):
    """Circuits for a model without loops."""

    def draw_loops(self, generator: torch.Generator) -> int:
        return 0


class ManyBytes(Text):
    """Scored on more bytes than text.py takes the time for."""

    held_out, test_bytes = 10, 1_000_000
    n_loops = None  # in each step; None: a random number


class TwiceText(ManyBytes):
    """Always two loops, on the batches that text.py's loop gets with the same seed."""

    n_loops = 2

    def draw_loops(self, generator: torch.Generator) -> int:
        super().draw_loops(generator)  # each arm has to draw as many numbers: see `batch`
        return self.n_loops


class OneLoopText(TwiceText):
    """The same model run once."""

    n_loops = 1


class FlatText(TwiceText):
    """Text for a model without loops."""

    n_loops = 0


class LongFlatText(FlatText):
    """As many FLOPs as four layers of which two are looped twice: half as many steps again."""

    steps = 3 * Text.steps // 2


class InputOnce(RecurrentDepthTransformer):
    """e is seen by the first loop only; afterwards the state has to remember it."""

    def step(self, h, e, rope, t, cache=None, active=None):
        e = e if t == 0 else torch.zeros_like(e)
        return super().step(h, e, rope, t, cache, active)


class NoInjection(RecurrentDepthTransformer):
    """B = 0: e enters through R(h, e) alone."""

    def __init__(self, config=None, **overrides):
        super().__init__(config, **overrides)
        self.state_update.b.requires_grad_(False).zero_()


class LoopIndexEmbedding(RecurrentDepthTransformer):
    """OpenMythos tells the block which loop it is in: a sinusoid of t on D / 8 of the channels."""

    def step(self, h, e, rope, t, cache=None, active=None):
        width = self.config.d_model // 8
        two_i = torch.arange(0, width, 2, device=e.device)
        angles = t * 10_000.0 ** (-two_i / width)
        index = F.pad(torch.cat([angles.sin(), angles.cos()]), (0, e.shape[-1] - width))
        return super().step(h, e + index.to(e.dtype), rope, t, cache, active)


class LoopLoRA(RecurrentDepthTransformer):
    """OpenMythos gives each loop a low-rank change of its own: R + (R·down ⊙ scale_t)·up.

    Loops beyond those trained use the last scale.
    """

    def __init__(self, config=None, rank: int = 8, **overrides):
        super().__init__(config, **overrides)
        D, loops = self.config.d_model, self.config.max_loop_iters
        self.lora_down = nn.Parameter(torch.randn(rank, D) / D**0.5)
        self.lora_scale = nn.Parameter(torch.ones(loops, rank))
        self.lora_up = nn.Parameter(torch.zeros(D, rank))

    def step(self, h, e, rope, t, cache=None, active=None):
        slot = 0 if cache is None else cache.loop_slot(t)
        r = self.run_blocks(self.recurrent, self.loop_norm(h + e), rope, cache, slot, active)
        scale = self.lora_scale[min(t, len(self.lora_scale) - 1)]
        change = F.linear(F.linear(r, self.lora_down) * scale, self.lora_up)
        return self.state_update(h, e, r + change)


class Untied(RecurrentDepthTransformer):
    """A block of its own for each loop: a stack that is given e, and read, as the loop is.

    It has max_loop_iters of them; beyond, the last one is run again.
    """

    def __init__(self, config=None, **overrides):
        super().__init__(config, **overrides)
        c = self.config
        blocks = [make_block(self.widths, c.num_experts > 0) for _ in range(c.max_loop_iters)]
        self.recurrent = nn.ModuleList(blocks)
        self.init_weights()

    def step(self, h, e, rope, t, cache=None, active=None):
        slot = 0 if cache is None else cache.loop_slot(t)
        block = self.recurrent[min(t, len(self.recurrent) - 1)]
        r = self.run_blocks([block], self.loop_norm(h + e), rope, cache, slot, active)
        return self.state_update(h, e, r)


class WeightedOutput(RecurrentDepthTransformer):
    """OpenMythos' output: not the last state, but a weighted sum of all (ACT, Graves 2016).

    A head gives the loop with state h the weight p = sigmoid(head(h)), until less than 0.01 of 1 is
    left. That loop, or the last one, gets all that is left.
    """

    def __init__(self, config=None, **overrides):
        super().__init__(config, **overrides)
        self.halt_head = nn.Linear(self.config.d_model, 1)

    def run_loop(self, e, rope, n_loops, grad_loops=None, halt_threshold=None, cache=None,
                 states=None):  # fmt: skip
        """As in the model; but with a halt_threshold a token's loops are those with a weight, and
        `states` collects what the coda would get if this loop were the last."""
        found = []
        _, loops_used = super().run_loop(e, rope, n_loops, grad_loops, None, cache, found)
        out = total = torch.zeros_like(e)
        left = torch.ones_like(e[..., :1])
        halted_at = loops_used  # for those that never halt
        for t, h in enumerate(found):
            out = total + left * h  # all that is left, if this is the last loop
            p = self.halt_head(h).sigmoid()
            ends = (left - p < 0.01) & (left > 0)
            weight = torch.where(ends, left, torch.minimum(p, left))
            total, left = total + weight * h, left - weight
            halted_at = torch.where(ends[..., 0], t + 1, halted_at)
            if states is not None:
                states.append(out)
        return out, loops_used if halt_threshold is None else halted_at


# ------------------------------------------------------------------------------------------------
# The variants
# ------------------------------------------------------------------------------------------------


class Variant(NamedTuple):
    what: str
    config: dict = {}
    task: type = Chains
    model: type = RecurrentDepthTransformer


def supervision(name: str) -> str:
    """What a variant of the chains is taught: the answer after T hops, for all T, with T given (as
    the number of loops, or as a vector); or the ends of chains alone, with T unknown."""
    return "ends" if issubclass(VARIANTS["chains"][name].task, Ends) else "every hop"


# Dense layers without a loop. d_ff is chosen so that 3 of them have as many parameters as the model
# with the loop, and 14 as many FLOPs as its 12 loops (a test compares).
SAME_PARAMS = dict(prelude_layers=0, recurrent_layers=0, coda_layers=3, d_ff=448)
SAME_FLOPS = dict(prelude_layers=0, recurrent_layers=0, coda_layers=14, d_ff=222)
TEXT_SAME_PARAMS = dict(prelude_layers=0, recurrent_layers=0, coda_layers=4)
TEXT_SAME_FLOPS = dict(prelude_layers=0, recurrent_layers=0, coda_layers=6)

VARIANTS = {
    "chains": {
        "loop": Variant("the loop of train_tiny.py"),
        "no-noise": Variant("no noise on the state in training", task=NoNoise),
        "ends": Variant("the loop, taught ends only", task=Ends),
        "one-loop": Variant("the same model, always one loop", task=OneLoop),
        "flat-params": Variant("3 layers, same parameters", SAME_PARAMS, Flat),
        "flat-flops": Variant("14 layers, same FLOPs as 12 loops", SAME_FLOPS, Flat),
        "flat-flops-long": Variant("14 layers, three times the steps", SAME_FLOPS, LongFlat),
        "flat-flops-told": Variant("14 layers, told how many hops", SAME_FLOPS, ToldHops),
        "untied-long": Variant(
            "12 blocks, one for each loop, three times the steps", task=LongChains, model=Untied
        ),
        "act": Variant("a weighted sum of all states", model=WeightedOutput),
        "no-injection": Variant("B = 0", model=NoInjection),
        "input-once": Variant("e in the first loop only", model=InputOnce),
        "free-a": Variant("A unconstrained", dict(spectral_radius_target=None)),
        "dense": Variant("dense feed-forward, no experts", dict(num_experts=0)),
        "gqa": Variant("GQA instead of MLA", dict(attention_type="gqa")),
        "loop-index": Variant("with a loop-index embedding", model=LoopIndexEmbedding),
        "loop-lora": Variant("with a LoRA per loop", model=LoopLoRA),
    },
    "circuits": {
        "loop": Variant("the loop of circuits.py", task=Circuits),
        "one-loop": Variant("the same model, always one loop", task=OneLoopCircuits),
        "flat-params": Variant("3 layers, same parameters", SAME_PARAMS, FlatCircuits),
        "flat-flops": Variant("14 layers, same FLOPs as 12 loops", SAME_FLOPS, FlatCircuits),
    },
    "text": {
        "one-loop": Variant("the same model, always one loop", task=OneLoopText),
        "twice": Variant("always two loops", task=TwiceText),
        "no-embed-norm": Variant(
            "two loops, embed_norm = False", dict(embed_norm=False), TwiceText
        ),
        "loop": Variant("random loop counts: the loop of text.py", task=ManyBytes),
        "flat-params": Variant("4 layers, same parameters", TEXT_SAME_PARAMS, FlatText),
        "flat-flops": Variant("6 layers, same FLOPs as two loops", TEXT_SAME_FLOPS, FlatText),
        "flat-long": Variant("4 layers, half as many steps again", TEXT_SAME_PARAMS, LongFlatText),
    },
}
# At the toy's own learning rate (lr1) they are those of the chains and not trained again.
LR_SCALES = ("0.33", "2", "4")
UNSTABLE = ("loop", "free-a", "no-injection")
VARIANTS["stability"] = {
    f"{name}-lr{scale}": VARIANTS["chains"][name] for name in UNSTABLE for scale in LR_SCALES
}


# ------------------------------------------------------------------------------------------------
# What is measured of those that have a loop
# ------------------------------------------------------------------------------------------------

MOST_LOOPS = 32
RING_HOPS = (8, 16, 32, 64)
SHAPES = ("star", "forest", "two chains", "random function", "two rings", "ring")
SHAPE_LOOPS = (2, 5, 10, 16, MOST_LOOPS)
NORM_LOOPS = (1, 16, 256)  # where the tables show the norm of the state
TEXT_LOOPS = [1, 2, 3, 4, 8]
