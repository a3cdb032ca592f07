# SPDX-License-Identifier: MIT
"""Tests of variants.py, compare.py and report.py. Docstrings name the mistakes."""

import dataclasses
import itertools
import json
import math
import re
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes

import train_tiny
from experiments import compare, report, test_results, text, variants
from experiments.circuits import Circuits
from experiments.test_ask import edges_of, walk
from experiments.text import Text
from mythos import RecurrentDepthTransformer, flops_per_token, num_params, spectral_radius

torch.set_num_threads(1)

ROOT = Path(train_tiny.__file__).parent


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def small(monkeypatch):
    """All tasks shrunk to what a test can train."""
    for task in (train_tiny.Chains, Circuits, Text):
        full = task.config
        monkeypatch.setattr(
            task,
            "config",
            lambda self, a, f=full: dataclasses.replace(
                f(self, a), d_model=32, n_heads=2, num_experts=4
            ),
        )
        monkeypatch.setattr(task, "batch_size", 4)
    for task in (train_tiny.Chains, Circuits):
        monkeypatch.setattr(task, "test_size", 8)
    monkeypatch.setattr(Text, "context", 32)
    monkeypatch.setattr(Text, "test_bytes", 2000)
    monkeypatch.setattr(variants.ManyBytes, "test_bytes", 2000)
    monkeypatch.setattr(variants, "NORM_LOOPS", (1, 4, 16))
    monkeypatch.setattr(variants, "RING_HOPS", (2, 4))
    monkeypatch.setattr(variants, "MOST_LOOPS", 12)
    monkeypatch.setattr(text, "read_pieces", cache(text.read_pieces))
    for name, less in (("loop_gain", dict(iterations=4)), ("shape_set", dict(size=4))):
        monkeypatch.setattr(compare, name, partial(getattr(compare, name), **less))


def build(name: str, kind: str = "chains") -> RecurrentDepthTransformer:
    """An untrained variant whose zero-initialised parameters are not zero any more."""
    variant = variants.VARIANTS[kind][name]
    new = partial(object.__new__, variant.task) if issubclass(variant.task, Text) else variant.task
    task = new()  # of text without reading the data, which its config does not need
    config = dataclasses.replace(task.config("mla"), **variant.config)
    model = variant.model(config).eval()
    for p in model.parameters():
        if p.requires_grad and not p.is_meta and not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model


def states(model: RecurrentDepthTransformer, tokens: torch.Tensor, n_loops: int) -> list:
    """h_1, h_2, ..."""
    e, rope = model.run_prelude(tokens)
    found = []
    model.run_loop(e, rope, n_loops, states=found)
    return found


SOME = {  # one of a kind; the slow test takes all
    "chains": ["loop", "ends", "flat-flops", "untied-deep-long", "act"],
    "text": ["loop", "twice", "one-loop", "flat-flops"],
    "shells": ["loop", "once-told", "coda"],
    "rates": ["twice-3", "flat-params-6"],
    "stack-rates": ["flat-flops-0.5"],
}


FAST = "chains", "circuits", "shells", "text"  # the other kinds do what text does
SLOW = [
    *(f"all {kind}" for kind in FAST if kind in SOME),
    *(kind for kind in variants.VARIANTS if kind not in FAST),
]


@pytest.mark.parametrize("kind", [*FAST, *(pytest.param(k, marks=pytest.mark.slow) for k in SLOW)])
def test_quick_trains_measures_and_reports_every_variant(kind, small, tmp_path, capsys):
    """A variant that crashes or is missing from the tables; a JSON or picture that is not kept."""
    results, names = tmp_path / "new" / "results", SOME.get(kind)
    kind = kind.removeprefix("all ")
    names = names or list(variants.VARIANTS[kind])
    flags = ["--task", kind, "--results", str(results), "--runs", str(tmp_path / "runs")]
    flags += ["--only", *names]
    assert compare.main([*flags, "--quick", "--seeds", "0"]) == 0
    assert capsys.readouterr().out.count(", seed 0: ") == len(names)
    written = (tmp_path / "new" / "RESULTS.md").read_text("utf-8")
    for name in names:
        numbers = json.loads((results / kind / f"{name}-seed0.json").read_text())
        assert (numbers["variant"], numbers["seed"], numbers["steps"]) == (name, 0, 2)
        assert f"| {name} |" in written
    picture = tmp_path / "new" / f"compare-{kind}.png"
    assert picture.is_file() == (kind in report.DRAW)

    for path in (tmp_path / "runs").rglob("*.pt"):
        path.unlink()
    again = ["--report"] if kind in report.DRAW else ["--quick", "--seeds", "0"]
    assert compare.main([*flags, *again]) == 0  # nothing is trained for a report, or twice
    assert "step" not in capsys.readouterr().out
    assert (tmp_path / "new" / "RESULTS.md").read_text("utf-8") == written


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--only", "flat"], "--only: got 'flat'"),
        (["--quick"], "--quick: got 'no --results'"),
        (["--task", "text", "--only", "dense"], "--only: got 'dense'"),
        (["--report", "--results", str(report.RESULTS.parent / "new")], "--results: got"),
    ],
)
def test_refuses_bad_flags(flags, complaint, capsys, monkeypatch):
    """A misspelt variant that trains nothing; two steps kept beside the real results; a report of
    other results in the place of the real one."""
    monkeypatch.setattr(compare, "run", lambda *args: None)
    monkeypatch.setattr(report, "write", lambda results: [])
    with pytest.raises(SystemExit):
        compare.main(flags)
    assert complaint in capsys.readouterr().err


def test_interrupted_variant_goes_on_from_its_checkpoint(small, tmp_path, monkeypatch):
    """Starting again, or losing the curriculum's state, after a run was cut off; FLOPs of other
    loops than were run, parameters that are all called active."""

    def flags(name):
        return ["loop", 0, tmp_path / name, tmp_path / f"{name}-runs", 12]

    calls = []

    def climb(self, frontier, n_loops, loss):
        calls.append(n_loops)
        if len(calls) == 12 + 11:  # of the second run, a step after the checkpoint
            raise KeyboardInterrupt
        return min(frontier + 1, 3)

    monkeypatch.setattr(train_tiny, "SAVE_EVERY", 10)
    monkeypatch.setattr(train_tiny.Chains, "advance", climb)  # else each step has one loop
    compare.run("chains", *flags("whole"))
    with pytest.raises(KeyboardInterrupt):
        compare.run("chains", *flags("cut"))
    compare.run("chains", *flags("cut"))
    assert len(calls) == 12 + 11 + 2
    whole, cut = (
        json.loads((tmp_path / name / "chains" / "loop-seed0.json").read_text())
        for name in ("whole", "cut")
    )
    for numbers in (whole, cut):
        del numbers["train_seconds"]
    assert whole == cut and whole["frontier"] == 3
    task, loops = train_tiny.Chains(), sum(calls[:12])
    model = RecurrentDepthTransformer(task.config("mla"))
    assert loops > 12 and whole["train_flops"] == compare.training_flops(model, task, 12, loops)
    assert whole["active_parameters"] == num_params(model, active=True) < whole["parameters"]


def test_flat_models_are_as_large_or_as_expensive_as_the_loop():
    """A comparison between models of unequal size: more than 2% apart."""
    shapes = {"chains": (12, 20), "circuits": (12, 24), "text": (2, 128)}  # loops, context
    shapes["shells"] = (12, 18)
    shapes |= {"few-bytes": (2, 128), "layers": (2, 128)}
    for kind, (n_loops, context) in shapes.items():
        with torch.device("meta"):
            found = {name: build(name, kind) for name in variants.VARIANTS[kind]}
        for name in (name for name in found if name.startswith("flat")):
            loop = found[{"few-bytes": "twice", "layers": "all"}.get(kind, "loop")]
            flat, count = found[name], num_params
            by_flops = {"flops", "slow", "short", "shorter"} & {*name.split("-")}
            if kind == "shells" or by_flops and "params" not in name:
                count = lambda m: flops_per_token(m, n_loops * bool(m.recurrent), context)  # noqa
            assert count(flat) == pytest.approx(count(loop), rel=0.03), name
            assert not flat.recurrent


def test_flat_models_learn_the_end_within_reach():
    """Targets that need a T, which a flat model is not told; a curriculum that never climbs."""
    task, rng = variants.Flat(), torch.Generator().manual_seed(0)
    task.share_at = lambda frontier: 1.0
    for frontier in range(1, 6):
        tokens, targets, n_loops = task.batch(rng, frontier)
        n = task.n_nodes
        edges, queries, answers = tokens[:, :n] - n, tokens[:, n:], targets[:, n:]
        after = torch.zeros_like(edges).scatter(1, edges // n, edges % n)
        at, hops = queries, torch.zeros_like(queries)
        for _ in range(n):
            hops += at != after.gather(1, at)
            at = after.gather(1, at)
        scored = hops <= frontier
        assert n_loops == 0 and torch.equal(answers, torch.where(scored, at, -100))
        assert task.advance(frontier, n_loops, 0.1) == min(frontier + 1, 5)


def hops_to_end(successor, node):
    return next(
        k for k in range(len(successor)) if walk(successor, node, k + 1) == walk(successor, node, k)
    )


@pytest.mark.parametrize("frontier", [1, 3, 5])
def test_ends_ask_what_they_say(frontier):
    """A node short of the end, an edge scored as something else than where it points, and the
    mistake that would void the experiment: a training answer more than 5 hops away."""
    task, rng = variants.Ends(), torch.Generator().manual_seed(0)
    n, far = task.n_nodes, 0
    for _ in range(4):
        tokens, targets, _ = task.batch(rng, frontier)
        assert sorted(tokens[0, n:].tolist()) == [*range(n)]
        for row, wanted in zip(tokens[:4].tolist(), targets[:4].tolist(), strict=True):
            successor = edges_of(row, n)
            assert wanted[:n] == [(token - n) % n for token in row[:n]]
            for query, target in zip(row[n:], wanted[n:], strict=True):
                hops = hops_to_end(successor, query)
                far += hops > frontier
                assert target == (walk(successor, query, n) if hops <= frontier else -100)
    assert far > 0


def test_ends_curriculum_climbs_only_when_mastered():
    """A curriculum that skips ahead of learning, or asks for more than 5 hops."""
    task = variants.Ends()
    for loss, share, expected in [(0.21, 1.0, 1), (0.01, 0.85, 1), (0.01, 0.95, 2)]:
        task.share_at = lambda frontier, share=share: share
        assert task.advance(1, 1, loss) == expected
    assert [task.advance(frontier, 1, 0.0) for frontier in (4, 5)] == [5, 5]


def test_mastery_is_that_of_the_farthest_queries():
    """A share that nearer queries, edges, or the model's mode change; another batch each time."""

    class Knows(torch.nn.Module):
        """Right at these distances, and nowhere else."""

        def forward(self, tokens, n_loops):
            assert not self.training
            hops, ends = torch.zeros_like(tokens), torch.zeros_like(tokens)
            for i, row in enumerate(tokens.tolist()):
                after = edges_of(row, 20)
                for k, query in enumerate(row[20:]):
                    hops[i, 20 + k] = hops_to_end(after, query)
                    ends[i, 20 + k] = walk(after, query, 20)
            self.seen.append(tokens)
            return torch.nn.functional.one_hot(torch.where(hops == self.hops, ends, 21)), None

    task = variants.Ends()
    task.model, Knows.seen = Knows(), []
    for Knows.hops, share in ((3, 1.0), (2, 0.0), (4, 0.0)):
        assert task.share_at(3) == share and task.model.training
    assert all(torch.equal(tokens, Knows.seen[0]) for tokens in Knows.seen)


@pytest.mark.parametrize("kinds", ["Ends Flat OneLoop", "Circuits FlatCircuits OneLoopCircuits"])
def test_arms_with_one_supervision_get_the_same_batches(kinds):
    """A pairing by seed of arms that saw other sequences."""
    batches = []
    for kind in (getattr(variants, name) for name in kinds.split()):
        task, rng = kind(), torch.Generator().manual_seed(0)
        batches.append([task.batch(rng, 4)[:2] for _ in range(3)])
    for other in batches[1:]:
        for mine, theirs in zip(batches[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_ends_train_deep_and_on_long_chains():
    """Never just as many loops as hops, or never deep; short chains."""
    task, rng = variants.Ends(), torch.Generator().manual_seed(0)
    loops = [task.draw_loops(rng, 5) for _ in range(600)]
    assert {*loops} == {5, 6, 7, 8, task.deep_loops}
    assert 0.27 < loops.count(task.deep_loops) / 600 < 0.4 < (loops.count(5) + 30) / 600 < 0.6
    n, lengths = task.n_nodes, []
    for row in task.batch(rng, 5)[0].tolist():
        successor = edges_of(row, n)
        lengths.append(max(hops_to_end(successor, i) for i in range(n)))
    assert max(lengths) > 12


def test_told_model_gets_what_the_loop_gets(monkeypatch):
    """A flat model that is asked something else than the loop, or in training or test told a
    wrong T, or one it never met in training; one that hears T and does not feel it."""
    task, loop, rng = variants.ToldHops(), train_tiny.Chains(), torch.Generator()
    model = build("flat-flops-told-long")
    task.prepare(model)
    for seed in range(6):
        tokens, targets, T = loop.batch(rng.manual_seed(seed), 12)
        got = task.batch(rng.manual_seed(seed), 12)
        assert torch.equal(got[0], tokens) and torch.equal(got[1], targets)
        assert got[2] == 0 and task.embed.T == T
    for task.embed.T, frontier in ((2, 3), (3, 4)):  # 2 hops mastered: the frontier was not
        assert task.advance(3, 0, 0.1) == frontier

    def told(self, model, loops):
        return {0: [(self.embed.T, k) for k in range(11)]}, [0.0] * 11

    monkeypatch.setattr(train_tiny.Chains, "measure", told)
    assert task.measure(model, [0])[0] == {0: [(max(k, 1), k) for k in range(11)]}
    with torch.no_grad():
        task.embed.weight[-13:].normal_()
        far, _ = model(tokens)
        task.embed.T = 1
        near, _ = model(tokens)
    assert not torch.allclose(far, near)
    named = {
        id(p)
        for o in train_tiny.make_optimizers(model)
        for g in o.param_groups
        for p in g["params"]
    }
    assert {id(p) for p in model.parameters()} == named
    assert len(task.embed.weight) == 420 + 13  # rows of one table: T learns as fast as a token


@pytest.mark.parametrize("kind", [variants.Shells, variants.ThreeCups, variants.ToldShells])
def test_balls_are_where_swaps_bring_them(kind):
    """A swap of another node or other cups, or made twice; an answer from further away than told;
    a test of other chains; a model that is told another T; a hop more before places are right."""
    task, n, k = kind(), 12, kind.cups
    task.embed, task.test_size = SimpleNamespace(T=1), 50
    for loss, frontier in ((0.11, 1), (0.09, 2)):
        assert task.advance(1, 1, loss) == frontier
    task.embed.T = None
    pairs = [(0, 0), *itertools.combinations(range(k), 2)]
    played = set()

    def play(row: list[int], T: int) -> list[tuple[int, int]]:
        """For each query its answer's token, and how many hops that took."""
        leads, swap, found = {}, {}, []
        for token in row[:n]:
            i, leads[i] = divmod(token - n * k, n)
        for token in row[n : 2 * n]:
            i, s = divmod(token - n * k - n * n, len(pairs))
            swap[i] = pairs[s]
            assert leads[i] != i or s == 0, "the end of a chain swaps none"
        played.update(swap.values())
        for token in row[2 * n :]:
            (place, node), hops = divmod(token, n), 0
            for _ in range(T):
                i, j = swap[node]
                place = {i: j, j: i}.get(place, place)
                hops += leads[node] != node
                node = leads[node]
            found.append((place * n + node, hops))
        return found

    for seed in range(8):
        tokens, targets, T = task.batch(torch.Generator().manual_seed(seed), (3, 12)[seed % 2])
        T = task.embed.T or T
        for row, want in zip(tokens.tolist(), targets.tolist(), strict=True):
            assert want[:n] == [(token - n * k) % n for token in row[:n]]
            answers = [answer if hops <= 5 else -100 for answer, hops in play(row, T)]
            assert want[n:] == [-100] * n + answers
    assert played == {*pairs} and tokens.max() < task.config("mla").vocab_size
    tokens, answers, distance = task.test_set()
    for row, want, far in zip(tokens.tolist(), answers.tolist(), distance.tolist(), strict=True):
        game = play(row, n)
        assert want == [answer for answer, _ in game] and sorted(far) == [*range(-1, 11)]
        assert all(hops == max(d, 0) for d, (_, hops) in zip(far, game, strict=True))
        ends = [token % n for token in want]
        assert ends.count(ends[far.index(-1)]) == 1  # the chain of one node


def test_long_variants_train_for_longer(tmp_path, monkeypatch):
    """A variant that is called long, and trains for as many steps as the others; seeds that share
    their weights or their batches."""
    seen, weights = [], []

    def train(model, *args, steps, seed, **kwargs):
        seen.append((steps, seed))
        weights.append(model.head.weight[0, 0].item())
        raise InterruptedError

    monkeypatch.setattr(compare, "train", train)
    for seed, name in enumerate(("untied-deep-long", "flat-flops", "ends", "ends")):
        with pytest.raises(InterruptedError):
            compare.run("chains", name, seed, tmp_path, tmp_path)
    assert seen == [(3 * train_tiny.Chains.steps, 0), (1200, 1), (1200, 2), (1200, 3)]
    assert weights[2] != weights[3]
    few = variants.VARIANTS["few-bytes"].values()
    assert [arm.task.steps for arm in few] == [1000] * 4 + [500] * 4 + [250] * 2


def test_loop_counts_of_the_tasks():
    """A fixed count that varies, and a flat model that is asked to loop."""
    rng = torch.Generator().manual_seed(0)
    tasks = [variants.OneLoop(), variants.TwiceText(), variants.FlatText()]
    counts = [{task.batch(rng, 1)[2] for _ in range(20)} for task in tasks]
    assert counts == [{1}, {2}, {0}]


def test_untied_blocks_are_run_one_in_each_loop():
    """A stack whose layers share weights after all, or that runs all of them in each loop."""
    model, tied = build("untied-deep-long"), build("loop")
    with torch.no_grad():
        e, rope = model.run_prelude(torch.arange(6)[None])
    for t in range(14):
        model.zero_grad()
        model.step(torch.randn_like(e), e, rope, t).sum().backward()
        used = [block.ffn.router.weight.grad is not None for block in model.recurrent]
        assert used == [i == min(t, 11) for i in range(12)]
    block = num_params(tied.recurrent[0])
    assert num_params(model) == num_params(tied) + 11 * block
    costs = [compare.training_flops(m, train_tiny.Chains(), 2, 6) for m in (model, tied)]
    assert costs[0] == costs[1]
    own = variants.VARIANTS["chains"]["untied-deep-long"].model(train_tiny.Chains().config("mla"))
    spread = own.recurrent[7].attention.out_proj.weight.std().item()
    assert spread == pytest.approx(0.8 / 128**0.5, rel=0.05), "blocks with torch's initialisation"


@pytest.mark.parametrize(
    "p, weights", [(0.3, [0.3, 0.3, 0.3, 0.1, 0.0]), (0.497, [0.497, 0.503, 0, 0, 0])]
)
def test_weighted_output_by_hand(p, weights):
    """Weights that do not add up to 1, or that go on after the last loop that counts; a training
    without the noise that the loop gets."""
    model, tokens = build("act"), torch.arange(6)[None]
    torch.nn.init.zeros_(model.halt_head.weight)
    model.halt_head.bias.data.fill_(torch.tensor(p).logit().item())
    e, rope = model.run_prelude(tokens)
    found, plain = [], states(build_as("loop", model), tokens, 5)
    out = model.run_loop(e, rope, 5, states=found)
    want = sum(w * h for w, h in zip(weights, plain, strict=True))
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(found[1], weights[0] * plain[0] + (1 - weights[0]) * plain[1])
    assert torch.equal(found[4], out) and torch.equal(found[0], plain[0])
    assert not torch.equal(model.run_loop(e, rope, 5, state_noise=0.3), out)
    halted, used = model.run_halting_loop(e, rope, 5, model.new_cache(1, 6, 5), 0.2)
    torch.testing.assert_close(halted, want)
    assert (used == 5 - weights.count(0)).all()


def build_as(name: str, other: RecurrentDepthTransformer) -> RecurrentDepthTransformer:
    """An untrained variant with the weights of another one, as far as it has them."""
    model = build(name)
    model.load_state_dict(other.state_dict(), strict=False)
    return model


def test_random_exit_spends_what_halting_spends(small, monkeypatch):
    """A control that is given fewer loops: with accuracy = loops / 100 it scores the mean; others
    that are not at the loops of their names."""

    class Counts(train_tiny.Chains):
        test_size = 8

        def measure(self, model, loops, threshold=None):
            right, used = super().measure(model, loops, threshold)
            return {L: [L / 100] * self.longest for L in loops}, used

    monkeypatch.setattr(variants, "MOST_LOOPS", 14)
    monkeypatch.setattr(train_tiny.Chains, "halt_threshold", 0.05)  # no whole number of loops
    numbers = compare.measure_chains(build("loop"), Counts())["halting"]
    assert 1 < train_tiny.mean(numbers["loops"]) < variants.MOST_LOOPS
    assert numbers["random exit"] == pytest.approx(train_tiny.mean(numbers["loops"]) / 100)
    assert 0 < numbers["fixed at the mean"] - numbers["random exit"] < 0.01
    assert numbers["none halts"] == pytest.approx(0.14)


def test_some_positions_halt_and_others_do_not(small, monkeypatch):
    """Edges taken for queries: whoever may halt is still soon, the others move on."""
    seen, real = [], train_tiny.Chains.measure

    def spy(self, model, loops, threshold=None):
        if isinstance(threshold, torch.Tensor):
            tokens = self.test_set()[0]
            seen.append(train_tiny.logits_per_loop(model, tokens, loops, threshold)[1])
        return real(self, model, loops, threshold)

    monkeypatch.setattr(train_tiny.Chains, "measure", spy)
    # Whoever may, halts after its second loop.
    monkeypatch.setattr(train_tiny.Chains, "halt_threshold", 1e9)
    numbers = compare.measure_chains(build("loop"), train_tiny.Chains())["halting"]
    edges, queries = seen
    assert (edges[:, :20] < 3).all() and (edges[:, 20:] == 12).all()
    assert (queries[:, 20:] < 3).all() and (queries[:, :20] == 12).all()
    assert {*report.HALTING_CONTROLS} <= {*numbers}


def test_what_lies_further_on_is_asked_for_by_name(monkeypatch):
    """The wrong hop count, a walk of another length, or edges that move on where they may halt."""
    _, queries, successors = compare.shape_set("ring")

    def measured(self, model, loops, threshold=None):
        return {L: [k / 100 + (threshold or 0) for k in range(15)] for L in loops}, None

    def answers(model, tokens, loops, threshold):
        """Right up to 16 hops; if edges, and only they, halt, after all loops."""
        halts = [] if threshold is None else (threshold > 0).tolist()
        far = halts == [True] * 20 + [False] * 20
        said = {T: compare.walk(queries, successors, T if far or T <= 16 else T - 1) for T in loops}
        return {T: F.one_hot(torch.cat([queries, x], dim=1), 20) for T, x in said.items()}, None

    monkeypatch.setattr(variants.Far, "measure", measured)
    monkeypatch.setattr(compare, "logits_per_loop", answers)
    found = compare.measure_further(None)
    rings = dict(zip((8, 16, 32, 64), (1, 1, 0, 0), strict=True))
    assert found == pytest.approx(
        {"14 hops": 0.14, "14 hops, halting": 0.34}
        | {f"ring, {T} hops": right for T, right in rings.items()}
        | {f"ring, edges halt, {T} hops": 1.0 for T in rings}
    )


def test_how_the_state_moves_is_measured_after_so_many_loops(small):
    """Norms of other loops than the table says; one gain shown twice."""
    model, tokens = build("loop"), torch.arange(12).view(2, 6)
    found, rng = compare.dynamics(model, tokens), torch.Generator().manual_seed(0)
    norms = [h.norm(dim=-1).mean().item() for h in states(model, tokens, variants.NORM_LOOPS[-1])]
    assert found["state_norm"] == pytest.approx({L: norms[L - 1] for L in found["state_norm"]})
    assert {1, variants.NORM_LOOPS[-1]} < {*found["state_norm"]}
    gains = (0, variants.MOST_LOOPS)
    gains = {n: compare.loop_gain(model, tokens, n_loops=n, generator=rng) for n in gains}
    assert found["gain"] == gains and found["rho"] == spectral_radius(model)


def test_texts_halting_is_measured_in_bits_and_against_surprise(monkeypatch):
    """Nats; one threshold's numbers in three rows; surprise after other loops than the most."""
    windows = torch.randint(256, (16, 9), generator=torch.Generator().manual_seed(0))

    def answers(model, tokens, loops, threshold=None):
        rng = torch.Generator().manual_seed(int(100 * (threshold or 0)))
        logits = {L: torch.randn(*tokens.shape, 256, generator=rng) for L in loops}
        return logits, torch.randint(1, 8, tokens.shape, generator=rng)

    class Stub:
        n_loops, test_set = 2, staticmethod(lambda: windows)
        measure = staticmethod(lambda model, loops: {L: L / 10 for L in loops})

    monkeypatch.setattr(compare, "logits_per_loop", answers)
    monkeypatch.setattr(compare, "dynamics", lambda *_: {})
    found = compare.measure_text(build("twice", "text"), Stub())
    tokens, targets = windows[::8, :-1], windows[::8, 1:]
    cost = lambda logits: F.cross_entropy(logits.mT, targets, reduction="none") / math.log(2)  # noqa: E731
    plain, _ = answers(None, tokens, [2, 8])
    assert found["bits_per_byte"] == {L: L / 10 for L in (1, 2, 3, 4, 8)}
    for L in (2, 8):
        bits = found["halting"][f"never, {L} loops"]["bits_per_byte"]
        assert bits == pytest.approx(cost(plain[L]).mean().item())
    for threshold in (0.3, 0.1, 0.03):
        logits, used = answers(None, tokens, [8], threshold)
        pair = torch.stack([used.flatten().float(), cost(plain[8]).flatten()])
        assert found["halting"][threshold] == pytest.approx({
            "bits_per_byte": cost(logits[8]).mean().item(),
            "loops": used.float().mean().item(),
            "correlation with surprise": torch.corrcoef(pair)[0, 1].item(),
        })  # fmt: skip


def test_bits_are_measured_at_the_loops_of_training(monkeypatch):
    """A loop judged after one loop, a stack that is asked to loop."""
    monkeypatch.setattr(compare, "dynamics", lambda *_: {"rho": 0.5})
    measured = lambda model, loops: {L: L / 10 for L in loops}  # noqa: E731
    for name, n_loops, found in (
        ("twice", 2, {"bits_per_byte": {2: 0.2}, "rho": 0.5}),
        ("one-loop", 1, {"bits_per_byte": {1: 0.1}}),
        ("flat-params", 0, {"bits_per_byte": {0: 0.0}}),
    ):
        test = lambda: torch.zeros(2, 9)  # noqa: E731
        task = SimpleNamespace(n_loops=n_loops, measure=measured, test_set=test)
        assert compare.measure_bits(build(name, "text"), task) == found


def test_a_task_halts_at_its_own_threshold(monkeypatch):
    """Circuits that halt like chains."""
    monkeypatch.setattr(compare, "dynamics", lambda *_: {})
    asked = []

    def measured(self, model, loops, threshold=None):
        asked.append(threshold)
        return {L: [1.0] for L in loops}, [2.0]

    task = type("Stub", (variants.Circuits,), {"measure": measured, "test_size": 2})()
    found = compare.measure_by_difficulty(build("loop", "circuits"), task)
    assert asked == [None, 0.02] and found["halting"] == {"accuracy": [1.0], "loops": [2.0]}


@pytest.mark.parametrize(
    "kind, name, differs",
    [
        ("chains", "no-noise", {"state_noise": 0.0}),
        ("chains", "ends", {"state_noise": 0.0}),
        ("chains", "one-loop", {"prelude_lr": 1.0, "state_noise": 0.0}),
        ("chains", "flat-slow", {"lr_scale": 0.5}),
        ("chains", "untied-deep-long", {"train_hops": 10, "state_noise": 0.0}),
        ("chains", "free-a", {"spectral_radius_target": None}),
        ("circuits", "one-loop", {"prelude_lr": 1.0}),
        ("circuits", "flat-slow", {"lr_scale": 0.5}),
        ("text", "flat-fast", {"lr_scale": 6.0}),
        ("text", "no-embed-norm", {"embed_norm": False}),
        ("text", "twice", {"most_of_one": 1_000_000, "test_bytes": 1_000_000}),
        ("layers", "all", {"prelude_layers": 0, "recurrent_layers": 3, "coda_layers": 0}),
        ("experts", "one-loop", {"num_experts": 4, "num_experts_per_token": 1}),
    ],
)
def test_a_variant_differs_as_its_row_says(kind, name, differs):
    """A row of the tables that changes nothing."""
    task, config = variants.VARIANTS[kind][name].task, build(name, kind).config
    assert {key: getattr(config, key, getattr(task, key, "")) for key in differs} == differs
    if name == "one-loop" and kind in ("chains", "circuits"):
        model = build(name, kind)
        task().prepare(model)  # not as the identity: two blocks would be left to do the work
        assert model.prelude[0].attention.out_proj.weight.any()


def test_rates_change_nothing_but_the_rate():
    """A row whose rate is not what it says, or that changes something else, too."""
    for kind, name, rate in (("text", "twice", 6.0), ("chains", "flat-flops-told-long", 0.5)):
        rates = variants.VARIANTS["rates" if kind == "text" else "stack-rates"]
        new, old = rates[f"{name}-{rate:g}"], variants.VARIANTS[kind][name]
        assert new.task.lr_scale == rate != old.task.lr_scale and issubclass(new.task, old.task)
        assert {*vars(new.task)} - {"__module__", "__doc__"} == {"lr_scale"}
        assert new.config == old.config and new.model == old.model


def test_a_grown_loop_starts_with_one():
    """A second loop from the start, a step too late, or never; other batches."""
    task, plain = (object.__new__(t) for t in (variants.GrownText, variants.TwiceText))
    rngs, loops, frontier = [torch.Generator().manual_seed(0) for _ in range(2)], [], 1
    for _ in range(task.steps):
        loops.append(task.draw_loops(rngs[0], frontier))
        plain.draw_loops(rngs[1], frontier)
        frontier = task.advance(frontier, loops[-1], 1.0)
    assert loops == [1] * 400 + [2] * 600
    assert torch.equal(rngs[0].get_state(), rngs[1].get_state())


def test_few_bytes_are_few_and_from_everywhere(monkeypatch):
    """More bytes than it says, the first files alone, held-out bytes, another test."""
    every = bytes(range(250))
    pieces = [bytes([i]) * 40_000 if i % 10 else every * 40 for i in range(50)]
    monkeypatch.setattr(text, "read_pieces", lambda data: pieces)
    few, all_of_it = variants.FewBytes(), variants.TwiceText()
    assert len(few.train_data) == 250_000 and len({*few.train_data.tolist()}) > 20
    assert few.test == all_of_it.test and few.data_crc != all_of_it.data_crc
    assert not {*few.train_data.tolist()} & {i for i in range(0, 50, 10)}
    assert variants.OneLoopFewBytes().data_crc == variants.FlatFewBytes().data_crc == few.data_crc


def test_far_questions_are_14_hops_away():
    """A "further" that is no further than the test of train_tiny.py."""
    task = variants.Far()
    tokens, ends, distance = task.test_set()
    assert sum(task.decoys) + task.longest == task.n_nodes
    assert distance.max() == 14 and (ends[distance == 0] == tokens[:, 20:][distance == 0]).all()


@pytest.mark.parametrize("shape", variants.SHAPES)
def test_shapes_are_what_they_are_called_and_answers_walk(shape):
    """A "ring" with an end, a "forest" that is only chains, answers that are a hop off."""
    tokens, queries, successors = compare.shape_set(shape, size=30)
    after = [dict(divmod(edge - 20, 20) for edge in row[:20]) for row in tokens.tolist()]
    for row, successor in enumerate(after):
        assert tokens[row, 20:].tolist() == queries[row].tolist()
        for T in (0, 1, 3, 21):
            at = queries[row].tolist()
            for _ in range(T):
                at = [successor[i] for i in at]
            assert compare.walk(queries, successors, T)[row].tolist() == at
        for _ in range(21):
            at = [successor[i] for i in at]
        ends, targets = {i for i in successor if successor[i] == i}, {*successor.values()}
        on_rings, found = {*at}, (len(ends), len(targets))  # after 42 hops nobody is on the way
        if shape == "forest":
            assert len(ends) == 3 and on_rings == ends and len(targets) < 17
        elif shape == "random function":
            assert on_rings <= targets and len(targets) < 19
        else:
            assert found == {
                "ring": (0, 20), "two rings": (0, 20), "star": (1, 1), "two chains": (2, 18),
            }[shape]  # fmt: skip
        if "ring" in shape:
            ring = [0]
            while (following := successor[ring[-1]]) != 0:
                ring.append(following)
            assert len(ring) == (20 if shape == "ring" else 10)
    assert len({*map(str, after)}) == 30 and (shape != "random function" or on_rings > ends)


def test_shapes_are_measured_against_the_walk(monkeypatch):
    """Accuracy against the chain's end, or at another loop count; edges that count, too."""

    def answers(model, tokens, loops):
        """Right after T hops up to 5 loops, then one hop too few."""
        _, queries, successors = compare.shape_set(shapes.pop(0))
        said = {T: compare.walk(queries, successors, min(T, 5)) for T in loops}
        edges = torch.zeros_like(queries)
        both = {T: torch.cat([edges, nodes], dim=1) for T, nodes in said.items()}
        return {T: F.one_hot(x, 420) for T, x in both.items()}, None

    shapes = [*variants.SHAPES]
    monkeypatch.setattr(compare, "logits_per_loop", answers)
    found = compare.measure_shapes(None)
    assert [*found] == [*variants.SHAPES] and all(
        [*x] == [2, 5, 10, 16, 32] for x in found.values()
    )
    assert all(x[2] == x[5] == 1 for x in found.values())
    assert found["star"][32] == 1 and found["ring"][10] == found["ring"][16] == 0


def test_training_flops_by_hand():
    """FLOPs that forget the loops, the backward pass, or the batch."""
    loop, flat = build("loop"), build("flat-flops")
    task, tokens = train_tiny.Chains(), 32 * 40
    once, more = flops_per_token(loop, 1, 20), flops_per_token(loop, 5, 20)
    assert compare.training_flops(loop, task, 1, 1) == pytest.approx(3 * tokens * once)
    assert compare.training_flops(loop, task, 2, 6) == pytest.approx(3 * tokens * (once + more))
    assert compare.training_flops(flat, variants.Flat(), 2, 0) == pytest.approx(
        3 * 2 * tokens * flops_per_token(flat, 0, 20)
    )


def test_reach_size_and_spread():
    """Off-by-one in the largest hop count answered; a spread that hides a seed; a sparse model that
    passes for a dense one."""
    assert report.size({"parameters": 2000, "active_parameters": 1000}) == "2,000 (1,000)"
    assert report.size({"parameters": 2000, "active_parameters": 2000}) == "2,000"

    def numbers(*accuracy):
        return {"accuracy": {"12": list(accuracy)}}

    assert report.reach(numbers(1.0, 0.95, 0.91, 0.2, 1.0)) == 2
    assert report.reach(numbers(0.5, 1.0)) == -1 and report.reach(numbers(1.0, 0.9)) == 1
    untied = {"variant": "untied-deep-long", "accuracy": {"6": [0.9], "12": [0.1]}}
    for frontier, share in ((6, 0.9), (12, 0.1)):  # blocks never trained answer nothing
        assert report.accuracy_at(untied | {"frontier": frontier}, 12) == [share]
    assert report.spread([1.0, 3.0, 2.0]) == "2.0 ± 2.5"  # 4.30 · 1 / √3
    assert report.spread([2.0, 2.0]) == "2.0" and report.spread([]) == "–"
    assert report.T95 == test_results.T95  # typed twice
    assert report.by_seed([[1, 5], [3, 0], [2, 1]]) == ([2, 2], [1, 0], [3, 5])


def test_leads_are_paired_by_seed():
    """A difference of means over different seeds, or one with the wrong sign."""
    runs = [{"seed": s, "x": x} for s, x in ((1, 0.9), (2, 0.7), (3, 0.5))]
    others = [{"seed": s, "x": x} for s, x in ((2, 0.6), (3, 0.4))]
    lead = report.lead_of("ends", {"ends": runs}, ["flat-flops"], lambda n: n["x"])
    assert lead("flat-flops", others) == "+10.0"
    assert lead("ends", runs) == lead("loop", others) == "–"


def test_bits_saved_are_those_of_two_loops():
    """The wrong sign; a loop judged after one loop or after eight; one loop asked for two."""

    def run(variant, bits, task="text", **more):
        return {"variant": variant, "task": task, "seed": 10, "bits_per_byte": bits, **more}

    bits = {"1": 2.0, "2": 1.5, "3": 1.75, "8": 3.0}
    found = {
        "twice": [run("twice", bits, rho=0.5)],
        "loop": [run("loop", bits | {"2": 1.6}, rho=0.5)],
        "one-loop": [run("one-loop", {"1": 1.75})],
        "flat-params": [run("flat-params", {"0": 1.7})],
        "flat-flops": [run("flat-flops", {"0": 1.25})],
        "flat-long": [run("flat-long", {"0": 1.8})],
        "thrice": [run("thrice", bits, rho=0.5)],
    }
    saved = report.saved_by_looping("text", found)
    cells = [saved(name, runs) for name, runs in found.items()]
    assert cells == ["–", "+0.100", "+0.250", "+0.200", "-0.250", "+0.300", "+0.250"]
    sizes = dict(parameters=2, active_parameters=2, train_flops=1e12)
    layers = {
        "flat-three": [run("flat-three", {"0": 1.75}, "layers", **sizes)],
        "one": [run("one", {"2": 1.5, "8": 1.0}, "layers", rho=0.5, **sizes)],
        "all": [run("all", {"2": 2.0, "8": 1.0}, "layers", rho=0.5, **sizes)],
    }
    (section,) = report.layers_sections(layers, found)
    ends = [row.split(" | ")[-3:] for row in section.table.splitlines()[2:]]
    assert ends[0] == ["1.750", "–", "-0.500 |"]
    assert ends[1:] == [["1.500", "+0.250", "-0.250 |"], ["2.000", "-0.250", "-0.750 |"]]
    loop = {"halting": {"accuracy": [0.5, 1.0], "loops": [2.0, 4.0]}}
    loop |= {"accuracy": {"12": [0.625] * 11, "2": [0.25] * 11}}
    plain, worse = {"accuracy": {"0": [0.5] * 11}}, {"accuracy": {"12": [0.375] * 11}}
    deeper = {"accuracy": {"12": [0.375] * 10 + [0.125]}}
    once = {"variant": "one-loop", "accuracy": {"1": [0.25] * 11, "12": [0.9] * 11}}
    circuits = {"loop": [loop], "one-loop": [once], "flat-slow": [deeper]}
    told = {"task": "shells", "frontier": 4, "accuracy": {"0": [0.5] * 3 + [0.75] + [0.0] * 7}}
    shells = {"loop": [loop], "coda": [worse], "flat-told-slow": [told]}
    chains = {"loop": [loop], "flat-slow": [plain], "flat-flops-told-long": [worse]}
    few = {name: [n | {"task": "few-bytes"} for n in runs] for name, runs in found.items()}
    few |= {"twice-short": few["twice"], "flat-short": few["flat-flops"]}
    few |= {"one-loop-short": few["one-loop"]}
    told = report.readme_points(chains, circuits, shells, found, layers, few)
    told = " ".join(told.split())
    assert "little more (at 6: 50.0%; told T: 37.5%)" in told
    assert "Right at 5 / 10: the loop 62.5 / 62.5%; guessing 62/56%; one loop 25.0 / 25.0%" in told
    assert (
        "14 layers 37.5 / 12.5%. A ball under five cups, T told, 10 hops, taught 5: 62.5%" in told
    )
    assert "62.5%, with a coda 37.5%; 13 layers, at 3: 75.0%." in told
    assert "Chains (`loop`): 75.0% in 3.0 loops (best fixed, 12 to 12: 62.5%)." in told
    assert "saves none on circuits (75.0% in 3.0; 12: 62.5%) or text." in told
    assert "over one loop +0.250; over 4 layers +0.200; over 6 (equal FLOPs) -0.250." in told
    assert "All of 3 twice: over 3 -0.250; over 6 -0.750. On 250 kB" in told
    assert told.endswith("8 reads, 2 of 4: over one loop +0.250; over 6 -0.250.")


def test_pictures_show_what_the_tables_say(monkeypatch, tmp_path):
    """Marks at other loops or hops than the axis says; answers that a told model was never asked
    for; means alone, where the worst and the best seed are shaded."""
    drawn, shaded, plot = [], [], Axes.plot

    def spy_plot(self, x, y, *args, **kwargs):
        drawn.append((kwargs.get("label"), *([*map(float, np.atleast_1d(v))] for v in (x, y))))
        return plot(self, x, y, *args, **kwargs)

    def spy_fill(self, x, low, high, **kwargs):
        shaded.append((low[-1], high[-1]))

    def run(task, variant, accuracy, **more):
        return {"task": task, "variant": variant, "frontier": 12, "accuracy": accuracy, **more}

    monkeypatch.setattr(Axes, "plot", spy_plot)
    monkeypatch.setattr(Axes, "fill_between", spy_fill)
    by_loops = {f"{L}": [(L + k) / 100 for k in range(11)] for L in (1, 2, 4, 6, 8, 12, 32)}
    better = {L: [a + 0.2 for a in shares] for L, shares in by_loops.items()}
    flat = {"0": [0.5] * 11}
    chains = {
        "loop": [run("chains", "loop", a, rho=0.5) for a in (by_loops, better)],
        "flat-flops-told-long": [run("chains", "flat-flops-told-long", flat, frontier=5)],
    }
    report.draw_chains(chains, tmp_path / "a.png")
    loop, told, after_12, after_32 = drawn
    assert loop[0].startswith("the loop of") and told[1] == [0, 1, 2, 3, 4, 5]
    assert loop[2] == pytest.approx([22 + k for k in range(11)])
    assert shaded[0] == pytest.approx((22, 42))
    assert (after_12[0], after_32[0]) == ("after 12 loops", "after 32 loops")
    assert after_12[1] == pytest.approx([22, 42]) and after_32[1] == pytest.approx([42, 62])

    drawn.clear()
    bits = {"1": 3.0, "2": 2.0, "3": 2.5, "4": 2.25, "8": 4.0}
    text = {
        "twice": [{"bits_per_byte": bits, "rho": 0.5}],
        "flat-params": [{"bits_per_byte": {"0": 1.5}}],
    }
    for name, (numbers,) in text.items():
        numbers |= {"task": "text", "variant": name}
    report.draw_text(text, tmp_path / "b.png")
    assert [x for _, x, _ in drawn] == [[2.0], [2.0], [1, 2, 3, 4, 8], [1.5], [1.5]]
    assert drawn[2][2] == [3.0, 2.0, 2.5, 2.25, 4.0]

    drawn.clear()
    circuits = {"loop": [run("circuits", "loop", by_loops, rho=0.5)]}
    circuits |= {"flat-slow": [run("circuits", "flat-slow", flat)]}
    report.draw_circuits(circuits, tmp_path / "c.png")
    assert [y[0] for _, _, y in drawn] == pytest.approx([1, 2, 4, 6, 8, 12, 50])
    assert drawn[0][0] == "the loop, 1 loop" and drawn[5][0] == "the loop, 12 loops"


def test_results_md_and_readme_are_what_the_program_writes():
    """A number typed by hand, or one that outlived the run it came from."""
    kept = (report.RESULTS.parent / "RESULTS.md").read_text("utf-8")
    assert report.results_text(report.RESULTS) == kept
    readme = (ROOT / "README.md").read_text("utf-8")
    assert report.with_summary(readme, report.RESULTS) == readme and "| ends |" in readme
    assert f"[{len([*report.RESULTS.glob('chains-*.json')])} runs]" in readme
    points = readme.split("points -->")[1].splitlines()[1:-1]
    assert 0 < len(points) <= 10 and max(map(len, points)) <= 120


def test_each_table_says_what_its_arms_were_given():
    """A table that nobody can judge or read; a remark with a number that a new run would belie."""
    results = report.RESULTS
    sections = report.trainer_sections(results)
    for kind in report.SECTIONS:
        made = report.sections_of(kind, results)
        assert not any(c.isdigit() for section in made for c in section.note)
        sections += made
    for section in sections:
        head, rule, *rows = section.table.splitlines()
        assert section.given.startswith("Given") and section.given.endswith(".")
        assert rows and {line.count("|") for line in [head, rule, *rows]} == {head.count("|")}
        assert head.count("|") <= 10, section.title
    taught = {name: report.supervision(name) for name in variants.VARIANTS["chains"]}
    assert taught["loop"] == taught["flat-flops-told-long"] == "every hop"
    assert taught["ends"] == taught["flat-flops"] == taught["one-loop"] == "ends"


def test_kept_results_have_enough_seeds_and_all_steps():
    """A row of one seed, of a training that was cut short, of seeds that were tuned on, or of text
    that other rows did not read."""
    for kind in variants.VARIANTS:
        read = set()
        for name, runs in report.load_results(kind, report.RESULTS).items():
            task = variants.VARIANTS[kind][name].task
            assert all(n["steps"] == task.steps for n in runs), name
            read |= {n.get("data_crc") for n in runs} - {None}  # older files do not say
            seeds = {n["seed"] for n in runs}
            usual = {15, 16, 17, 18, 19} if kind == "fresh" else {10, 11, 12, 13, 14}
            assert seeds == {5} if kind.endswith("rates") else seeds >= usual, name
        assert len(read) <= 1
    for path in report.RESULTS.glob("*-seed*.json"):
        numbers = json.loads(path.read_text("utf-8"))
        task = Text if path.name.startswith("text") else train_tiny.Chains
        assert numbers["passed"] and numbers["steps"] == task.steps, path.name


def test_the_command_beside_a_table_trains_its_rows(monkeypatch, tmp_path):
    """A command that takes other seeds than the rows have, or does not know a row."""
    trained, kept = set(), {f"{p.parent.name}/{p.name}" for p in report.RESULTS.glob("*/*.json")}
    monkeypatch.setattr(compare, "run", lambda *a: trained.add("{}/{}-seed{}.json".format(*a)))
    monkeypatch.setattr(report, "write", lambda results: [])
    page = (report.RESULTS.parent / "RESULTS.md").read_text("utf-8").split("## The comparison")[1]
    readme = (ROOT / "README.md").read_text("utf-8").partition("<!-- summary -->")[2]
    for section in [*page.split("\n### ")[1:], readme.partition("<!-- points -->")[0]]:
        if found := re.search("`python -m experiments.compare (.*)`", section):
            command = found[1].replace("FOLDER", str(tmp_path))  # else as above
        rows = re.findall(r"^\| ([a-z\d.-]+) \|", section.split("--- |\n")[-1], re.M)
        for row in rows:
            assert compare.main(command.replace("VARIANT", row).split()) == 0
    assert rows and trained == kept


def test_the_trainers_own_runs_stand_in_order_with_their_verdicts(tmp_path):
    """A FAIL that the page calls PASS; seed 10 before seed 2."""
    kept = json.loads((report.RESULTS / "text-mla-seed0.json").read_text("utf-8"))
    for seed in (10, 2):
        kept |= {"seed": seed, "passed": seed == 10}
        (tmp_path / f"text-mla-seed{seed}.json").write_text(json.dumps(kept), "utf-8")
    (section,) = report.trainer_sections(tmp_path)
    rows = [row.split(" | ") for row in section.table.splitlines()[2:]]
    assert [(row[0], row[-2]) for row in rows] == [("| 2", "FAIL"), ("| 10", "PASS")]


def test_a_dash_where_a_model_was_never_asked():
    """A told model whose curriculum ended at 5 hops, blamed for 6."""
    accuracy = {"0": [1.0] * 6 + [0.1] * 5}
    for name, frontier, cells in (
        ("flat-flops-told-long", 12, "| 100.0 | 10.0 | 10.0 |"),
        ("flat-flops-told-long", 5, "| 100.0 | – | – |"),
        ("flat-flops", 5, "| 100.0 | 10.0 | 10.0 |"),
    ):
        numbers = dict(task="chains", accuracy=accuracy, train_flops=1e12, frontier=frontier)
        numbers |= dict(parameters=1, active_parameters=1)
        columns = {f"{k}": report.at_hops(k) for k in (5, 6, 10)}
        runs = [numbers | {"frontier": 12}, numbers]  # the worst decides
        assert report.table({name: runs}, columns).endswith(cells), name


def test_readmes_table_compares_what_was_taught_alike():
    """A lead over a model that was taught otherwise, or that was never asked."""
    numbers = {"seed": 10, "accuracy": {"12": [0.9] * 11, "0": [0.5] * 11}, "parameters": 2}
    numbers |= {"task": "chains", "active_parameters": 1}
    numbers |= {"train_flops": 1e12, "frontier": 12, "rho": 0.5}
    numbers |= {"halting": {"accuracy": [0.8] * 11}}
    flat = {k: v for k, v in numbers.items() if k != "rho"} | {"accuracy": {"0": [0.5] * 11}}
    once = numbers | {"variant": "one-loop", "accuracy": {"12": [0.9] * 11, "1": [0.2] * 11}}
    better = numbers | {"accuracy": {"12": [0.95] * 11}}
    found = {
        "loop": [better],
        "flat-flops-told-long": [flat],
        "ends": [numbers],
        "one-loop": [once],
    }
    loop, one, flat, taught, told = report.readme_summary(
        found | {"flat-slow": [flat]}
    ).splitlines()[2:]
    assert "| every hop |" in taught and taught.endswith("| 95.0 | 80.0 | – |")
    assert "| every hop |" in told and told.endswith("| 50.0 | – | +45.0 |")
    assert one.endswith("| 20.0 | – | +70.0 |"), "the model that ran once, asked to run 12 times"
    assert "| ends |" in loop and loop.endswith("| 90.0 | 80.0 | – |")
    assert "| ends |" in flat and flat.endswith("| 50.0 | – | +40.0 |")
    found["flat-flops-told-long"][0]["frontier"] = 5
    assert report.readme_summary(found).splitlines()[-1].endswith("| 50.0 | – | – | – |")
