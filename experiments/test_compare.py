# SPDX-License-Identifier: MIT
"""Tests of variants.py, compare.py and report.py. Docstrings name the mistakes."""

import dataclasses
import itertools
import json
import math
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train_tiny
from experiments import compare, report, text, variants
from experiments.circuits import Circuits
from experiments.text import Text
from experiments.variants import VARIANTS
from mythos import (
    RecurrentDepthTransformer,
    flops_per_token,
    num_params,
)
from test_mythos import edges_of, walk
from train_tiny import Chains

torch.set_num_threads(1)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """All tasks shrunk to what a test can train; files go to an empty folder."""
    monkeypatch.chdir(tmp_path)
    for task in (Chains, Circuits, Text):
        full, less = task.config, dict(d_model=32, n_heads=2, num_experts=4)
        config = lambda self, a, f=full, less=less: dataclasses.replace(f(self, a), **less)  # noqa: E731
        monkeypatch.setattr(task, "config", config)
        monkeypatch.setattr(task, "batch_size", 4)
    for task in (Chains, Circuits):
        monkeypatch.setattr(task, "test_size", 8)
    monkeypatch.setattr(Text, "context", 32)
    monkeypatch.setattr(variants.Bytes, "test_bytes", 2000)
    monkeypatch.setattr(variants, "NORM_LOOPS", (1, 4))
    monkeypatch.setattr(compare, "shape_set", partial(compare.shape_set, size=4))
    monkeypatch.setattr(text, "read_pieces", cache(text.read_pieces))


def build(kind: str, name: str) -> RecurrentDepthTransformer:
    """An untrained variant, whose zero-initialised parameters are not zero any more."""
    row = VARIANTS[kind][name]
    config = row.task.config(object.__new__(row.task), "mla")  # without reading any text
    model = row.model(dataclasses.replace(config, **row.config)).eval()
    for p in model.parameters():
        if p.requires_grad and not p.is_meta and not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) for k in VARIANTS])
def test_every_variant_trains_and_is_measured(kind, small, tmp_path, capsys):
    """A variant that crashes; a run that is lost, repeated, or not in the tables; files of a quick
    try in the place of real ones."""
    flags = ["--task", kind, "--quick", "--seeds", "5"]
    assert compare.main(flags) == 0
    told = capsys.readouterr().out
    runs = report.read_runs(tmp_path / "runs/quick/results" / f"{kind}.jsonl")
    assert {run["variant"] for run in runs} == {*VARIANTS[kind]}
    assert all(run["steps"] == 2 for run in runs)
    assert not [run["variant"] for run in runs if f"\n| {run['variant']} |" not in told]
    assert compare.main(flags) == 0 and "step 1/2" not in capsys.readouterr().out
    assert [path.name for path in tmp_path.rglob("runs/*")] == ["quick"]


def test_runs_go_on_and_stay_apart(small, tmp_path, monkeypatch, capsys):
    """A quick try that blocks the real run; a start from the beginning, or a lost curriculum, after
    a run was cut off; FLOPs of other loops than were run; a tracked file that is overwritten."""
    flags, calls = ["--only", "loop", "--seeds", "3"], []

    def climb(self, frontier, n_loops, loss):
        calls.append(n_loops)
        if len(calls) == 2 + 8:
            raise KeyboardInterrupt
        return min(frontier + 1, 3)

    answers = {"accuracy": {"0": [0.1234567] * 11}, "shapes": {}}
    before = {path: path.stat().st_mtime_ns for path in report.HERE.rglob("*.*")}
    monkeypatch.setattr(train_tiny, "SAVE_EVERY", 6)
    monkeypatch.setattr(Chains, "steps", 12)
    monkeypatch.setattr(Chains, "advance", climb)  # else each step has one loop
    monkeypatch.setattr(compare, "measure", lambda kind, model, task, frontier: answers)
    assert compare.main([*flags, "--quick"]) == 0
    with pytest.raises(SystemExit) as stop:
        compare.main(flags)
    assert stop.value.code == 2 and "the same command continues" in capsys.readouterr().err
    assert compare.main(flags) == 0 and len(calls) == 2 + 8 + 6
    (run,) = report.read_runs(tmp_path / "runs/results/chains.jsonl")
    assert (run["frontier"], run["steps"], run["accuracy"]["0"][0]) == (3, 12, 0.123457)
    loops, plain = sum(calls[2:8] + calls[10:]), RecurrentDepthTransformer(Chains().config("mla"))
    flops = compare.training_flops(plain, Chains(), 12, loops)
    assert loops > 12 and run["train_flops"] == pytest.approx(flops, rel=1e-5)
    assert report.write(publish=False)
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("flags", [["--only", "flat"], ["--task", "text", "--only", "dense"]])
def test_misspelt_variants_are_refused_and_known_ones_listed(flags, capsys):
    """A misspelt variant that trains nothing; a name that nobody can look up."""
    with pytest.raises(SystemExit):
        compare.main(flags)
    assert f": got '{flags[-1]}', expected one of" in capsys.readouterr().err
    assert compare.main(["--list"]) == 0
    told = capsys.readouterr().out
    assert all(f" {name} " in told for rows in VARIANTS.values() for name in rows)


@pytest.mark.parametrize(
    "kind, n_loops, context",
    [("chains", 12, 20), ("circuits", 12, 24), ("text", 2, 128), ("shells", 12, 18)],
)
def test_flat_models_are_as_large_or_as_expensive_as_the_loop(kind, n_loops, context):
    """A comparison between models of unequal size; FLOPs without the backward pass."""
    with torch.device("meta"):
        found = {name: build(kind, name) for name in VARIANTS[kind]}

    def flops(model):
        return flops_per_token(model, n_loops * bool(model.recurrent), context)

    for name in (name for name in found if "flat" in name):
        loop = found["three-all" if "three" in name else "loop"]
        equal = flops if kind == "shells" or "flops" in name or "slow" in name else num_params
        assert equal(found[name]) == pytest.approx(equal(loop), rel=0.03), name
    task, loop = VARIANTS[kind]["loop"].task, build(kind, "loop")
    if kind == "chains":
        once, more = flops_per_token(loop, 1, 20), flops_per_token(loop, 5, 20)
        trained = compare.training_flops(loop, task(), 2, 6)
        assert trained == pytest.approx(3 * 32 * 40 * (once + more))


def hops_to_end(successor, node):
    return next(
        k
        for k in itertools.count()
        if successor[walk(successor, node, k)] == walk(successor, node, k)
    )


def test_ends_ask_what_they_say():
    """A node short of the end, an edge scored as something else than where it points, a training
    answer more than 5 hops away; a curriculum that skips ahead, or counts nearer queries; arms with
    one supervision that get other batches."""
    task, rng, far = variants.Ends(), torch.Generator().manual_seed(0), 0
    n = task.n_nodes
    for frontier in (1, 3, 5):
        tokens, targets, _ = task.batch(rng, frontier)
        for row, wanted in zip(tokens[:8].tolist(), targets[:8].tolist(), strict=True):
            successor = edges_of(row, n)
            assert wanted[:n] == [(token - n) % n for token in row[:n]]
            for query, target in zip(row[n:], wanted[n:], strict=True):
                hops = hops_to_end(successor, query)
                far += hops > frontier
                assert target == (walk(successor, query, n) if hops <= frontier else -100)
    assert far > 0 and {task.draw_loops(rng, 5) for _ in range(99)} == {5, 6, 7, 8, 16}

    class Knows(torch.nn.Module):
        """Right at these distances, and nowhere else."""

        def forward(self, tokens, n_loops):
            said = torch.full_like(tokens, 21)
            for i, row in enumerate(tokens.tolist()):
                after = edges_of(row, n)
                for k, query in enumerate(row[n:]):
                    if hops_to_end(after, query) == self.hops:
                        said[i, n + k] = walk(after, query, n)
            return F.one_hot(said), None

    task.model = Knows()
    for task.model.hops, loss, frontier in ((3, 0.1, 4), (2, 0.1, 3), (4, 0.1, 3), (3, 0.21, 3)):
        assert task.advance(3, 1, loss) == frontier
    task.model.hops = 5
    assert task.advance(5, 1, 0.0) == 5
    for kinds in ({"ends", "one-loop", "flat-slow"}, {"loop", "flat-flops-told-long", "act"}):
        batches = []
        for name in kinds:
            _, other = VARIANTS["chains"][name].build()
            rng = torch.Generator().manual_seed(0)
            batches.append([x for _ in range(3) for x in other.batch(rng, 4)[:2]])
        assert all(map(torch.equal, itertools.chain(*batches), itertools.cycle(batches[0])))


def test_told_model_gets_what_the_loop_gets():
    """In training or test told a wrong T, or one it never met; one that hears T and does not feel
    it; a score for hops that its curriculum never came to."""
    model, task = VARIANTS["chains"]["flat-flops-told-long"].build()
    task.test_size = 8
    for seed in range(6):
        tokens, _, T = Chains().batch(torch.Generator().manual_seed(seed), 12)
        assert task.batch(torch.Generator().manual_seed(seed), 12)[2] == 0 and task.embed.T == T
    for task.embed.T, frontier in ((2, 3), (3, 4)):  # 2 hops mastered: the frontier was not
        assert task.advance(3, 0, 0.1) == frontier
    near, task.embed.T = model(tokens)[0], 5
    assert not torch.allclose(near, model(tokens)[0])
    told, forward = [], task.embed.forward
    task.embed.forward = lambda tokens: told.append(task.embed.T) or forward(tokens)
    found = compare.measure("chains", model.eval(), task, 6)["accuracy"]
    assert told == [1, *range(1, 11)] and found[0][7:] == [None] * 4 and None not in found[0][:7]


@pytest.mark.parametrize("name", ["loop", "three", "flat-told"])
def test_balls_are_where_swaps_bring_them(name):
    """A swap of another node or other cups, or made twice; an answer from further away than told; a
    test of other chains; a hop more before places are right."""
    _, task = VARIANTS["shells"][name].build()
    n, k, task.test_size, played = 12, task.cups, 50, set()
    pairs = [(0, 0), *itertools.combinations(range(k), 2)]

    def play(row: list[int], T: int) -> list[tuple[int, int]]:
        """For each query its answer's token, and how many hops that took."""
        leads = dict(divmod(token - n * k, n) for token in row[:n])
        acts = dict(divmod(token - n * k - n * n, len(pairs)) for token in row[n : 2 * n])
        assert all(leads[i] != i or s == 0 for i, s in acts.items()), "an end swaps none"
        played.update(acts.values())
        found = []
        for token in row[2 * n :]:
            (place, node), hops = divmod(token, n), 0
            for _ in range(T):
                i, j = pairs[acts[node]]
                place = {i: j, j: i}.get(place, place)
                hops += leads[node] != node
                node = leads[node]
            found.append((place * n + node, hops))
        return found

    for seed in range(6):
        tokens, targets, T = task.batch(torch.Generator().manual_seed(seed), (3, 12)[seed % 2])
        T = T or task.embed.T
        for row, want in zip(tokens.tolist(), targets.tolist(), strict=True):
            answers = [answer if hops <= 5 else -100 for answer, hops in play(row, T)]
            assert want == [(token - n * k) % n for token in row[:n]] + [-100] * n + answers
    assert played == {*range(len(pairs))} and tokens.max() < task.config("mla").vocab_size
    tokens, answers, distance = task.test_set()
    for row, want, far in zip(tokens.tolist(), answers.tolist(), distance.tolist(), strict=True):
        game = play(row, n)
        assert want == [answer for answer, _ in game] and sorted(far) == [*range(-1, 11)]
        assert all(hops == max(d, 0) for d, (_, hops) in zip(far, game, strict=True))
    if name != "flat-told":
        assert [task.advance(1, 1, loss) for loss in (0.11, 0.09)] == [1, 2]


ACT = [(0.3, [0.3, 0.3, 0.3, 0.1, 0.0]), (0.497, [0.497, 0.503, 0, 0, 0])]


@pytest.mark.parametrize("p, weights", ACT)
def test_weighted_output_by_hand(p, weights):
    """Weights that do not add up to 1, or that go on after the last loop that counts; a training
    without the noise that the loop gets."""
    model, plain, tokens = build("chains", "act"), build("chains", "loop"), torch.arange(6)[None]
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.nn.init.zeros_(model.halt_head.weight)
    model.halt_head.bias.data.fill_(torch.tensor(p).logit().item())
    (e, rope), found, states = model.run_prelude(tokens), [], []
    plain.run_loop(e, rope, 5, states=states)
    out = model.run_loop(e, rope, 5, states=found)
    torch.testing.assert_close(out, sum(w * h for w, h in zip(weights, states, strict=True)))
    want = weights[0] * states[0] + (1 - weights[0]) * states[1]
    torch.testing.assert_close(found[1], want)
    assert not torch.equal(model.run_loop(e, rope, 5, state_noise=0.3), out)
    halted, used = model.run_halting_loop(e, rope, 5, model.new_cache(1, 6, 5), 0.2)
    assert torch.equal(halted, out) and (used == 5 - weights.count(0)).all()


def test_halting_controls_spend_what_halting_spends(small, monkeypatch):
    """A random exit that is given fewer loops: with accuracy = loops / 100 it scores the mean;
    edges taken for queries."""
    seen, real, task, model = [], Chains.measure, Chains(), build("chains", "loop")
    task.halt_threshold = 0.05  # no whole number of loops

    def measure(self, model, loops, threshold=None):
        right, used = real(self, model, loops, threshold)
        seen.append(threshold)
        return {L: [L / 100] * self.longest for L in loops}, used

    monkeypatch.setattr(Chains, "measure", measure)
    accuracy, _ = task.measure(model, [*range(1, 33)])
    _, used = task.measure(model, [32], 0.05)
    numbers = {"accuracy": accuracy, "halting": {"loops": used}}
    found, mean = compare.halting_controls(model, task, numbers), train_tiny.mean(used)
    assert 1 < mean < 32 and found["random exit"] == pytest.approx(mean / 100)
    assert 0 < found["fixed at the mean"] - found["random exit"] < 0.01
    edges, queries = (thresholds.gt(0).tolist() for thresholds in seen[2:])
    assert edges == [True] * 20 + [False] * 20 and queries == edges[::-1]


@pytest.mark.parametrize("shape", variants.SHAPES)
def test_shapes_are_what_they_are_called_and_answers_walk(shape, monkeypatch):
    """A "ring" with an end, a "forest" of chains, answers that are a hop off; accuracy after other
    loops than hops, or where queries halt, too."""
    tokens, queries, successors = compare.shape_set(shape)
    for row, query, leads in zip(*(x.tolist() for x in (tokens, queries, successors)), strict=True):
        after = edges_of(row, 20)
        assert [after[i] for i in range(20)] == leads and row[20:] == query
        ends, targets = {i for i in after if after[i] == i}, {*leads}
        rests, cycle = (
            {walk(after, i, 21) for i in after},
            walk(after, 0, 10 if "two" in shape else 20),
        )
        assert {
            "star": len(ends) == len(targets) == 1,
            "two chains": (len(ends), len(targets)) == (2, 18),
            "forest": len(ends) == 3 and rests == ends and len(targets) < 17,
            "random function": rests <= targets and len(targets) < 19,
        }.get(shape, not ends and len(targets) == 20 and cycle == 0)
    if shape == "ring":

        def answers(model, tokens, loops, threshold):
            """Right after T hops up to 8 loops, then a hop too few; always, if only edges halt."""
            far = threshold is not None and threshold.gt(0).tolist() == [True] * 20 + [False] * 20
            ends = {T: T if far or T <= 8 else T - 1 for T in loops}
            said = {T: compare.walk(queries, successors, end) for T, end in ends.items()}
            return {T: F.one_hot(torch.cat([queries, x], dim=1)) for T, x in said.items()}, None

        monkeypatch.setattr(variants, "SHAPES", (shape,))
        monkeypatch.setattr(compare, "logits_per_loop", answers)
        found = compare.measure_shapes(None)
        assert {*found["ring, edges halt"].values()} == {1.0}
        assert found["ring"] == {T: float(T <= 8) for T in (2, 5, 8, 10, 16, 32, 64)}


def test_text_is_measured_in_bits_and_against_surprise(monkeypatch):
    """Nats; one threshold's numbers in three rows; surprise after other loops than the most; a loop
    judged after other loops than in training."""
    windows = torch.randint(256, (16, 9), generator=torch.Generator().manual_seed(0))

    def answers(model, tokens, loops, threshold=None):
        rng = torch.Generator().manual_seed(int(100 * (threshold or 0)))
        logits = {L: torch.randn(*tokens.shape, 256, generator=rng) for L in loops}
        return logits, torch.randint(1, 8, tokens.shape, generator=rng)

    task = object.__new__(variants.Bytes)
    task.measure, task.test_set = lambda model, loops: {L: L / 10 for L in loops}, lambda: windows
    monkeypatch.setattr(compare, "logits_per_loop", answers)
    monkeypatch.setattr(compare, "dynamics", lambda *_: {})
    loop, flat = build("text", "loop"), build("text", "flat-params")
    found = compare.measure("text", loop, task, 1)
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
        assert [*found["halting"][threshold].values()] == pytest.approx(
            [
                cost(logits[8]).mean().item(),
                pair[0].mean().item(),
                torch.corrcoef(pair)[0, 1].item(),
            ]
        )
    for task.n_loops, model, kind, loops in (
        (1, loop, "text", 1),
        (0, flat, "text", 0),
    ):
        assert compare.measure(kind, model, task, 1) == {"bits_per_byte": {loops: loops / 10}}


@pytest.mark.parametrize("kind, name, differs", [
    ("chains", "no-noise", {"state_noise": 0.0}),
    ("chains", "one-loop", {"prelude_lr": 1.0, "state_noise": 0.0, "n_loops": 1}),
    ("chains", "flat-slow", {"lr_scale": 0.5, "n_loops": 0}),
    ("chains", "flat-flops-told-long", {"steps": 800}),
    ("chains", "free-a", {"spectral_radius_target": None}),
    ("chains", "flat-flops@2", {"lr_scale": 2.0, "n_loops": 0}),
    ("circuits", "one-loop", {"prelude_lr": 1.0, "n_loops": 1}),
    ("shells", "three", {"cups": 3}),
    ("text", "no-embed-norm", {"embed_norm": False}),
    ("text", "three-all", {"prelude_layers": 0, "recurrent_layers": 3, "coda_layers": 0}),
])  # fmt: skip
def test_a_variant_differs_as_its_row_says(kind, name, differs, small):
    """A row of the tables that changes nothing."""
    model, task = variants.find(kind, name).build()
    assert {key: getattr(model.config, key, getattr(task, key, "")) for key in differs} == differs
    if name == "one-loop":  # not as the identity: two blocks would be left to do the work
        assert model.prelude[0].attention.out_proj.weight.any()


# ---- report.py ----


def test_pages_are_what_the_program_writes(tmp_path, monkeypatch):
    """A number typed by hand, or one that outlived the run it came from; a column that nobody
    knows; a picture of runs that are not there."""
    monkeypatch.chdir(tmp_path)
    for path in report.write(publish=False):
        name = {"README.md": report.HERE.parent / "README.md"}.get(
            path.name, report.HERE / path.name
        )
        assert path.suffix == ".png" or path.read_bytes() == name.read_bytes(), path.name
        assert path.suffix == ".md" or path.read_bytes().startswith(b"\x89PNG")
    page = "<!-- table: chains -->\n| variant | hops |\n| --- | --- |\n| loop | |\n<!-- end -->"
    with pytest.raises(ValueError, match="^column: got 'hops', expected one of"):
        report.tables(page, {"chains": {"loop": [{}]}})


def test_a_training_is_added_to_those_published(tmp_path, monkeypatch):
    """A line at the end, one that stands there twice, 17 digits, or the loss of each step."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "write", lambda publish: [])
    run = {"accuracy": {"1": [1 / 3]}, "attention": "mla", "history": [1.0], "out": "runs"}
    for seed in (10, 2, 10):
        (tmp_path / "run.json").write_text(json.dumps(run | {"seed": seed}))
        assert report.main(["--publish", str(tmp_path / "run.json")]) == 0
    two, ten = (tmp_path / "trainer.jsonl").read_text().splitlines()
    wanted = '{"task": "chains", "accuracy": {"1": [0.333333]}, "attention": "mla", "seed": '
    assert (two, ten) == (f"{wanted}2}}", f"{wanted}10}}")


def test_cells_by_hand():
    """A spread that hides a seed; an off-by-one in the largest hop count; a dash for a number, or a
    number where one seed was not asked; leads of the wrong sign, or over other seeds."""
    assert report.spread([1.0, 3.0, 2.0]) == "2.0 ± 2.5"  # 4.30 · 1 / √3
    assert report.spread([2.0, 2.0]) == "2.0" and report.spread([]) == "–"
    for accuracy, reach in (([1.0, 0.95, 0.91, 0.2, 1.0], 2), ([0.5, 1.0], -1), ([1.0, 0.9], 1)):
        assert report.MEASURES["reach"]({"accuracy": {"0": accuracy}}) == reach
    asked = {"accuracy": {"0": [1.0] * 6 + [None] * 5}}, {"accuracy": {"0": [1.0] * 11}}
    cells = [report.cell(name, asked, {}) for name in ("5 hops", "6 hops", "10 hops, 32 loops")]
    assert cells == ["100.0", "–", "–"]

    def run(variant, seed, **numbers):
        return SimpleNamespace(variant=variant, seed=seed, task="text", **numbers).__dict__

    twice = [run("twice", seed, bits_per_byte={"2": seed / 10, "8": 9.0}) for seed in (1, 2, 3)]
    others = [run("flat-flops", seed, bits_per_byte={"0": seed / 10 + 0.25}) for seed in (2, 3)]
    saved = partial(report.cell, "bits that the loop saves")
    results = {"text": {"twice": twice, "flat-flops": others}}
    assert (saved(others, results), saved(twice, results)) == ("+0.250 ± 0.000", "–")
