# SPDX-License-Identifier: MIT
"""Tests of train_tiny.py: the chains, the optimizers, the training. Docstrings name the mistakes.

What files, disks, flags and kills can do to it is in test_trust.py.
"""

import dataclasses
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import train_tiny
from experiments.circuits import Circuits
from experiments.measure import num_params
from experiments.text import Text
from mythos import RecurrentDepthTransformer, get_model_config

torch.set_num_threads(1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def walk(successor, node, hops):
    """Plain pointer chasing, one query at a time: the reference for Chains."""
    for _ in range(hops):
        node = successor[node]
    return node


def edges_of(tokens, n):
    edges = [divmod(token - n, n) for token in tokens[:n]]
    assert len(dict(edges)) == n, "each node has exactly one edge out"
    return dict(edges)


@pytest.mark.parametrize("frontier", [1, 3, 12])
def test_chains_batch_asks_what_it_says(frontier):
    """An answer one hop off, an edge scored as something else than where it points, and the
    mistake that would void the experiment: a training answer more than 5 hops away."""
    task, rng = train_tiny.Chains(), torch.Generator().manual_seed(0)
    task.frontier, n, seen = frontier, task.n_nodes, set()
    for _ in range(8):
        tokens, targets, n_loops = task.batch(rng)
        seen.add(n_loops)
        assert sorted(tokens[0, n:].tolist()) == [*range(n)]
        for row, wanted in zip(tokens[:4].tolist(), targets[:4].tolist(), strict=True):
            successor = edges_of(row, n)
            assert wanted[:n] == [(token - n) % n for token in row[:n]]
            for query, target in zip(row[n:], wanted[n:], strict=True):
                answer = walk(successor, query, n_loops)
                near = answer == walk(successor, query, min(n_loops, 5))
                assert target == (answer if near else -100)
    assert max(seen) <= frontier and (frontier == 1 or len(seen) > 1)


def test_chains_curriculum_climbs_only_when_mastered():
    """A curriculum that skips ahead of learning, or runs past the deepest loop count."""
    task = train_tiny.Chains()
    for n_loops, loss, expected in [(1, 0.21, 1), (1, 0.19, 2), (1, 0.1, 2), (2, 0.1, 3)]:
        task.learned(n_loops, loss)
        assert task.frontier == expected
    for _ in range(20):
        task.learned(task.frontier, 0.0)
    assert task.frontier == task.train_loops


def test_chains_train_deep_and_on_long_chains():
    """No step beyond 5 loops after the climb, too few at the frontier before it; short chains."""
    task, rng = train_tiny.Chains(), seeded()
    task.frontier = 12
    loops = [task.draw_loops(rng) for _ in range(400)]
    assert 0.45 < loops.count(5) / 400 < 0.55 and {*loops} == {*range(5, 13)}
    task.frontier = 8
    assert 0.45 < sum(task.draw_loops(rng) == 8 for _ in range(400)) / 400 < 0.7
    n, lengths = task.n_nodes, []
    for row in task.batch(rng)[0].tolist():
        successor = edges_of(row, n)
        lengths.append(max(len({walk(successor, i, k) for k in range(n)}) for i in range(n)))
    assert max(lengths) > 13


def test_chains_test_set_cannot_be_guessed():
    """Decoys that are too few (the end of the only chain can be guessed without hopping),
    and wrong ends or distances."""
    task = train_tiny.Chains()
    assert len(task.decoys) >= 5 and 1 / (1 + len(task.decoys)) <= 0.2
    assert task.longest + sum(task.decoys) == task.n_nodes
    tokens, ends, distance = task.test_set()
    n = task.n_nodes
    for row, end, hops in zip(tokens[:20].tolist(), ends[:20, 0].tolist(), distance, strict=False):
        successor = edges_of(row, n)
        assert sum(node == following for node, following in successor.items()) == 6
        for query, k in zip(row[n:], hops.tolist(), strict=True):
            if k >= 0:
                assert walk(successor, query, k) == end
                assert k == 0 or walk(successor, query, k - 1) != end
        assert sorted(hops.tolist()) == [-1] * (n - 11) + [*range(11)]


def oracle(most_hops=99, halts=True, lasts=99):
    """A stand-in for logits_per_loop that hops perfectly, but only so far, or only so long."""

    def answer(model, tokens, loops, halt_threshold=None):
        n = train_tiny.Chains.n_nodes
        logits = {L: torch.zeros(*tokens.shape, n) for L in loops}
        for b, row in enumerate(tokens.tolist()):
            successor = edges_of(row, n)
            for t, query in enumerate(row[n:], start=n):
                for L in loops:
                    hops = min(L, most_hops)
                    if halt_threshold is not None:
                        hops = hops if halts else 1  # halting ends before the drift, or too early
                    elif lasts < L:
                        hops = 0
                    logits[L][b, t, walk(successor, query, hops)] = 1.0
        return logits, torch.full(tokens.shape, 7)

    return answer


@pytest.mark.parametrize(
    "oracle_is, failed",
    [({}, None), ({"most_hops": 5}, 1), ({"lasts": 20}, 2), ({"halts": False}, 3)],
)
def test_chains_report_fails_what_should_fail(oracle_is, failed, monkeypatch):
    """Passes a model that cannot go beyond its training, falls apart at more loops (flaw 1) or
    halts too early; or fails a perfect one."""
    task = train_tiny.Chains()
    task.test_size = 12
    monkeypatch.setattr(train_tiny, "logits_per_loop", oracle(**oracle_is))
    results = task.evaluate(tiny_model())
    verdict = [g >= b if sign == ">=" else g <= b for _, g, sign, b in results["checks"]]
    assert verdict == [k != failed for k in range(4)]
    assert results["accuracy"][4][:6] == [1, 1, 1, 1, 1, 0], "4 loops reach 4 hops, not 5"
    assert "would score 17%" in task.describe(results)


def test_chains_report_is_about_queries_and_the_threshold_it_names(monkeypatch):
    """Loops of edges instead of queries, one threshold's numbers in three rows, a check that looks
    at another row than it names, or asks an easier question: only the best hops, only up to 4."""

    def answer(model, tokens, loops, threshold=None):
        logits, _ = oracle(most_hops=0 if threshold == 0.2 else 4)(model, tokens, loops, None)
        used = torch.ones(tokens.shape)
        used[:, train_tiny.Chains.n_nodes :] = round(10 / (threshold or 1))
        return logits, used

    monkeypatch.setattr(train_tiny, "logits_per_loop", answer)
    monkeypatch.setattr(train_tiny.Chains, "test_size", 4)
    results = train_tiny.Chains().evaluate(tiny_model())
    assert {k: h["loops"][0] for k, h in results["halting"].items()} == {0.5: 20, 0.2: 50, 0.1: 100}
    checks = results["checks"]
    assert checks[0][1] == 0 and checks[3][1] > 0.3
    assert [c[2:] for c in checks] == [(">=", 0.99), (">=", 0.9), ("<=", 0.05), ("<=", 0.01)]


def test_checks_look_at_12_loops(monkeypatch):
    """A verdict at the number of loops that happens to be the best; what more loops or halting lose
    compared with other loops than it says: 16, and the best."""

    def measured(self, model, loops, threshold=None):
        return {L: [L / 100] * self.longest for L in loops}, [1.0] * self.longest

    monkeypatch.setattr(train_tiny.Chains, "measure", measured)
    checks = train_tiny.Chains().evaluate(tiny_model())["checks"]
    assert [c[1] for c in checks] == pytest.approx([0.12, 0.12, 0.16 - 0.20, 0.32 - 0.32])
    assert "12 loops" in checks[0][0]


def test_noise_has_its_size_is_for_training_and_returns_in_a_resumed_run(tmp_path):
    """Noise left in the model after a step, in a measurement, as large as the state or drawn anew
    by a resumed run; the same noise in each step, or with each seed; a gradient of its size."""
    training, other = (
        train_tiny.Training(
            tiny_model(), train_tiny.Chains(), steps=9, seed=seed, checkpoint=tmp_path / "a.pt"
        )
        for seed in (3, 4)
    )
    seen, disturb, h = [], training.disturb, 5 * torch.randn(4, 100, 32, generator=seeded())
    training.disturb = lambda *args: seen.append(disturb(None, (), h)) or args[-1]
    training.step()
    training.step()
    noise = [(x - h) / h.square().mean(-1, keepdim=True).sqrt() for x in seen]
    assert all(0.97 < n.std() / training.task.state_noise < 1.03 for n in noise)
    assert len(noise) == 2 and (noise[0] - noise[1]).abs().max() > 0.1, "one loop each, not alike"
    assert not training.model.state_update._forward_hooks
    again, training.done = list(seen), 1
    training.step()
    assert_close(seen[-1], again[1], rtol=0, atol=0)
    other.done = 1
    other.step()
    assert training.noise.initial_seed() != other.noise.initial_seed()
    disturb(None, (), h.requires_grad_()).sum().backward()
    assert_close(h.grad, torch.ones_like(h))


def tiny_model():
    torch.manual_seed(0)
    config = dataclasses.replace(
        get_model_config("tiny"), d_model=32, n_heads=2, d_expert=16, num_experts=4
    )
    return RecurrentDepthTransformer(config).eval()


@pytest.mark.parametrize("threshold", [None, 0.4])
def test_logits_per_loop_equal_forward(threshold):
    """A table whose row L is not what the model answers when asked for L loops."""
    model, tokens = tiny_model(), torch.randint(420, (2, 9))
    loops = [0, 1, 3, 6] if threshold is None else [6]
    logits, used = train_tiny.logits_per_loop(model, tokens, loops, threshold)
    for L in loops:
        wanted, _ = model(tokens, n_loops=L, halt_threshold=threshold)
        torch.testing.assert_close(logits[L], wanted, rtol=1e-5, atol=1e-5)
    assert (used == 6).all() if threshold is None else used.min() < 6


def test_optimizers_cover_every_parameter_once_and_decay_no_vector():
    """A parameter that is never updated, and weight decay on A, B or a norm."""
    model = tiny_model()
    optimizers = train_tiny.make_optimizers(model, prelude_lr=0.05)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    assert all(p.dim() > 1 or g["weight_decay"] == 0 for g in groups for p in g["params"])
    prelude = {id(p) for p in model.prelude.parameters() if p.dim() == 2}
    for group in optimizers[0].param_groups:
        slow = {id(p) in prelude for p in group["params"]}
        assert len(slow) == 1 and math.isclose(group["lr"], 6e-3 * (0.05 if slow == {True} else 1))


def test_optimizers_have_the_rates_that_the_results_were_made_with():
    """Another recipe than that of the README's numbers."""
    muon, adamw = train_tiny.make_optimizers(tiny_model(), prelude_lr=0.5)
    got = [(g["lr"], g["weight_decay"]) for g in (*muon.param_groups, *adamw.param_groups)]
    assert got == [(6e-3, 0.1), (3e-3, 0.1), (1e-2, 0.05), (3e-3, 0.0)]
    assert {g["betas"] for g in adamw.param_groups} == {(0.9, 0.99)}
    for task, recipe in ((train_tiny.Chains, (1.0, 0.05, 0.3)), (Circuits, (1.0, 0.05, 0.0)),
                         (Text, (3.0, 1.0, 0.0))):  # fmt: skip
        assert (task.lr_scale, task.prelude_lr, task.state_noise) == recipe


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (3, 16, 24)])
def test_muon_equals_torch_muon(shape):
    """Another momentum, scale, decay or polynomial; a stack treated as one matrix."""
    start = torch.randn(shape)
    ours = torch.nn.Parameter(start.clone())
    theirs = [torch.nn.Parameter(m.clone()) for m in start.view(-1, *shape[-2:])]
    settings = dict(lr=0.01, momentum=0.95, weight_decay=0.1)
    optimizers = [
        train_tiny.Muon([ours], lr=0.01, weight_decay=0.1),
        torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings),
    ]
    for _ in range(4):
        ours.grad = torch.randn(shape)
        for p, g in zip(theirs, ours.grad.view(-1, *shape[-2:]), strict=True):
            p.grad = g.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved, wanted = ours - start, torch.stack([*theirs]).view(shape) - start
    assert (moved - wanted).norm() < 0.02 * wanted.norm()  # theirs is computed in bf16


def test_muon_makes_every_direction_learn_at_one_pace():
    """A Newton–Schulz iteration that leaves the singular values as they were: 1 to 1000 here."""
    G = torch.diag(torch.logspace(-2, 1, 16)) @ torch.linalg.qr(torch.randn(16, 16))[0]
    s = torch.linalg.svdvals(train_tiny.Muon.orthogonal(torch.stack([G, 1e-3 * G])))
    assert 0.6 < s[:, :-5].min() and s.max() < 1.3


def test_the_toy_is_what_readme_says():
    """Another number of steps, or of parameters, than the results were made with."""
    readme = (Path(train_tiny.__file__).parent / "README.md").read_text("utf-8")
    parser = train_tiny.command.make_parser("", train_tiny.Chains.steps)
    assert f"(default {parser.parse_args([]).steps})" in readme and train_tiny.Chains.steps == 400
    assert f"of text {Text.steps:,};" in readme
    model = RecurrentDepthTransformer(train_tiny.Chains().config("mla"))
    assert f"{num_params(model):,} parameters" in readme


def test_schedule_warms_up_and_decays():
    """A first step at full rate, and a rate that reaches zero before the end."""
    rates = [train_tiny.schedule(step, 600) for step in range(600)]
    assert rates[0] < 0.03 and max(rates) > 0.9 and rates.index(max(rates)) == 49
    assert 0 < rates[-1] < 0.002 and all(
        a > b for a, b in zip(rates[49:], rates[50:], strict=False)
    )


def test_prepared_prelude_is_the_identity():
    """A prelude that can do the first hop before the loop has learned to."""
    model, tokens = tiny_model(), torch.randint(420, (1, 6))
    train_tiny.Chains().prepare(model)
    e, _ = model.run_prelude(tokens)
    torch.testing.assert_close(e, model.input_norm(model.embed_norm(model.embed(tokens))))


class AnySteps(int):
    """Steps that a run may differ from without another name for its files."""

    def __ne__(self, other):
        return False


@pytest.fixture
def small(monkeypatch):
    """Chains shrunk to what a test can train."""
    monkeypatch.setattr(train_tiny.Chains, "steps", AnySteps(600))
    full, tiny = train_tiny.Chains.config, dict(d_model=32, n_heads=2, num_experts=4)
    config = lambda self, kind: dataclasses.replace(full(self, kind), **tiny)  # noqa: E731
    monkeypatch.setattr(train_tiny.Chains, "config", config)
    monkeypatch.setattr(train_tiny.Chains, "batch_size", 4)
    monkeypatch.setattr(train_tiny.Chains, "test_size", 4)


@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_command_line_chains(attention, small, tmp_path, capsys):
    """Flags that are ignored, and a run that loses its checkpoint, numbers or picture."""
    flags = ["--steps", "2", "--out", str(tmp_path / "new" / "folder"), "--device", "cpu"]
    assert train_tiny.main([*flags, "--attention", attention, "--seed", "7"]) == 1
    stem = tmp_path / "new" / "folder" / f"chains-{attention}-seed7"
    numbers = json.loads(stem.with_suffix(".json").read_text())
    assert (numbers["seed"], numbers["steps"], numbers["attention"]) == (7, 2, attention)
    assert numbers["passed"] is False and len(numbers["checks"]) == 4
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    saved = train_tiny.load_checkpoint(stem.with_suffix(".pt"))
    assert saved["step"] == 2 and saved["run"]["config"]["attention_type"] == attention
    out = capsys.readouterr().out
    assert "rho(A) 0.4" in out and "s left" in out and out.endswith("FAIL\n")
    assert f'1-1 2-2" --checkpoint {stem}.pt\n' in out, "a hint that asks another model"


def test_training_uses_its_settings(small, monkeypatch, tmp_path):
    """A schedule, a learning rate, truncation, clipping or balancing that is not applied; a model
    in evaluation mode; a curriculum that hears of another loss, or of other loops."""
    torch.manual_seed(0)
    task, rates, norms, truncations = train_tiny.Chains(), [], [], []
    told, heard = [], []
    model = RecurrentDepthTransformer(task.config("mla")).eval()
    model.head.weight.data.mul_(30)  # gradients that need clipping
    step, forward = train_tiny.Muon.step, model.forward

    def spy_step(optimizer):
        rates.append([group["lr"] for group in optimizer.param_groups])
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
        step(optimizer)

    def spy_forward(*args, grad_loops, **kwargs):
        truncations.append(grad_loops)
        assert model.training
        logits, loss = forward(*args, grad_loops=grad_loops, **kwargs)
        told.append((kwargs["n_loops"], loss.item()))
        return logits, loss

    monkeypatch.setattr(train_tiny.Muon, "step", spy_step)
    monkeypatch.setattr(model, "forward", spy_forward)
    monkeypatch.setattr(task, "learned", lambda *args: heard.append(args))
    task.frontier = 12
    task.grad_loops, task.lr_scale = 3, 0.5
    train_tiny.train(model, task, steps=4, seed=0, checkpoint=tmp_path / "c")
    want = [0.5 * 6e-3 * train_tiny.schedule(done, 4) for done in range(4)]
    assert_close(torch.tensor(rates), torch.tensor([[lr, lr * task.prelude_lr] for lr in want]))
    assert truncations == [3] * 4 and max(norms) < 1.001 and heard == told
    assert model.recurrent[0].ffn.router_bias.abs().max() > 0.0099


def test_verdict_and_exit_code_follow_the_checks(small, monkeypatch, tmp_path, capsys):
    """An exit code that is never 0, the verdict of the last check alone, a swapped sign; a model
    that is measured as in training."""
    good, bad = [("a", 0.5, ">=", 0.4), ("b", 0.5, "<=", 0.6)], ("a", 0.3, ">=", 0.4)
    for checks, code in ((good, 0), ([bad, good[1]], 1), ([good[0], ("b", 0.7, "<=", 0.6)], 1)):

        def evaluate(task, model, checks=checks):
            assert not model.training
            return {"checks": checks}

        monkeypatch.setattr(train_tiny.Chains, "evaluate", evaluate)
        monkeypatch.setattr(train_tiny.Chains, "describe", lambda *_: "")
        monkeypatch.setattr(train_tiny.Chains, "draw", None)
        out = tmp_path / str(len([*tmp_path.iterdir()]))
        assert train_tiny.main(["--steps", "1", "--out", str(out)]) == code
        assert capsys.readouterr().out.endswith("FAIL\n" if code else "PASS\n")
        kept = json.loads((out / "chains-mla-seed0.json").read_text())
        assert kept["passed"] == (not code)


def test_loops_of_a_resumed_run_are_counted_from_its_start(small, tmp_path, monkeypatch):
    """A count, or a clock, that starts again at each resume; Ctrl-C still caught when the program
    is done."""
    loops, before = [], signal.getsignal(signal.SIGINT)

    def learned(task, n_loops, loss):
        loops.append(n_loops)
        if len(loops) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train_tiny.Chains, "learned", learned)
    flags = ["--steps", "4", "--out", str(tmp_path)]
    assert train_tiny.main(flags) == 130
    path = tmp_path / "chains-mla-seed0.pt"
    torch.save(train_tiny.load_checkpoint(path) | {"seconds": 1000.0}, path)
    assert train_tiny.main([*flags, "--resume"]) == 1
    assert signal.getsignal(signal.SIGINT) is before
    saved = train_tiny.load_checkpoint(tmp_path / "chains-mla-seed0.pt")
    assert len(loops) == 4 and saved["loops"] == sum(loops)
    kept = json.loads((tmp_path / "chains-mla-seed0.json").read_text())
    assert kept.keys() >= {"device", "machine", "threads", "torch"}
    assert 1000 < kept["train_seconds"] < kept["seconds"]


def test_resumed_run_ends_bit_identical(small, tmp_path, monkeypatch, capsys):
    """Anything that a checkpoint forgets: optimizer, generator, curriculum, router bias."""
    steps = []

    def learned(self, n_loops, loss):
        self.frontier = min(self.frontier + 1, 12)  # climb, so that the curriculum's state matters
        steps.append(n_loops)
        if len(steps) == 9:
            os.kill(os.getpid(), signal.SIGINT)  # what Ctrl-C sends

    monkeypatch.setattr(train_tiny.Chains, "learned", learned)
    flags = ["--steps", "6", "--out"]
    assert train_tiny.main([*flags, str(tmp_path / "straight")]) == 1
    assert train_tiny.main([*flags, str(tmp_path / "cut")]) == 130
    told = capsys.readouterr().out
    assert "--resume continues" in told and len(steps) == 9
    path = tmp_path / "straight" / "chains-mla-seed0.pt"
    asked = f'python -m experiments.ask "0-4 3-1 4-3 1-1 2-2" --checkpoint {path}'
    assert f"Ask it: {asked}\n" in told
    assert told.count("step    1/6") == 2  # a sign of life, long before step 25
    assert train_tiny.main([*flags, str(tmp_path / "cut"), "--resume"]) == 1
    assert steps[:6] == steps[6:]
    ends = [tmp_path / name / "chains-mla-seed0.pt" for name in ("straight", "cut")]
    straight, cut = (train_tiny.load_checkpoint(path) for path in ends)
    assert straight["frontier"] == cut["frontier"] == 7 and straight["step"] == cut["step"] == 6
    for name, value in straight["model"].items():
        assert torch.equal(value, cut["model"][name]), name


def test_seed_decides_weights_and_data(small, monkeypatch, tmp_path):
    """Seeds that share their weights or their batches: a spread that is too small."""
    seen = []

    def step(training):
        tokens, _, _ = training.task.batch(training.generator)
        seen.append((training.model.embed.weight.clone(), tokens))
        raise FloatingPointError

    monkeypatch.setattr(train_tiny.Training, "step", step)
    for run, seed in enumerate("010"):
        assert train_tiny.main(["--out", str(tmp_path / str(run)), "--seed", seed]) == 3
    for first, other, again in zip(*seen, strict=True):
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_progress_line_tells_the_busiest_expert(small, monkeypatch, tmp_path):
    """The idlest expert called the busiest."""
    model = RecurrentDepthTransformer(train_tiny.Chains().config("mla"))
    monkeypatch.setattr(model, "update_router_bias", lambda speed: torch.tensor([[1, 3, 2]]))
    task = train_tiny.Chains()
    training = train_tiny.Training(model, task, steps=2, seed=0, checkpoint=tmp_path / "c")
    assert training.step().endswith("busiest expert 1.50×")


class Wrapper(nn.Module):
    """What a compiler or a data-parallel wrapper does to names."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model


@pytest.mark.parametrize("wrap", [Wrapper, lambda m: torch.compile(m, backend="eager")])
def test_a_wrapped_model_gets_the_same_optimizers(wrap):
    """Groups by prefix of a name: a wrapped model's embedding gets Muon, its prelude full speed."""
    model = tiny_model()
    plain, wrapped = (train_tiny.make_optimizers(m, 0.05) for m in (model, wrap(model)))
    for a, b in zip(plain, wrapped, strict=True):
        for x, y in zip(a.param_groups, b.param_groups, strict=True):
            assert x["lr"] == y["lr"] and [*map(id, x["params"])] == [*map(id, y["params"])]


def test_muon_leaves_alone_what_has_no_gradient():
    """A frozen prelude, or a loop that was not run: a crash in the middle of the step."""
    model, tokens = tiny_model(), torch.zeros(1, 4, dtype=torch.int64)
    model.prelude.requires_grad_(False)
    muon, _ = train_tiny.make_optimizers(model)
    model(tokens, tokens, n_loops=0)[1].backward()
    before = {name: p.clone() for name, p in model.named_parameters()}
    muon.step()
    moved = {n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"coda"}


def test_muon_takes_a_closure():
    """A step that Lightning and others cannot call, that computes no gradient in the closure, steps
    before it has one, or loses the closure's loss."""
    model, tokens = tiny_model(), torch.zeros(1, 4, dtype=torch.int64)
    muon, adamw = train_tiny.make_optimizers(model)
    before = model.coda[0].ffn.down_proj.weight.clone()

    def closure():
        model.zero_grad()
        loss = model(tokens, tokens)[1]
        loss.backward()
        return loss

    for optimizer in (muon, adamw):
        assert optimizer.step(closure).requires_grad and optimizer.step() is None
    assert not torch.equal(model.coda[0].ffn.down_proj.weight, before)


def test_tied_weights_are_one_parameter():
    """A matrix that two groups hold, and that is stepped twice."""
    model = tiny_model()
    model.head.weight = model.embed.weight
    groups = [g["params"] for o in train_tiny.make_optimizers(model) for g in o.param_groups]
    ids = [id(p) for group in groups for p in group]
    assert len(ids) == len({*ids}) == len([*model.parameters()])


def test_a_model_comes_back_as_it_was_trained(small, tmp_path):
    """A loaded model that is in training mode, of another size, or not the one that was saved."""
    train_tiny.main(["--steps", "1", "--out", str(tmp_path), "--attention", "gqa"])
    path = tmp_path / "chains-gqa-seed0.pt"
    model = train_tiny.load_model(path)
    assert not model.training and model.config.attention_type == "gqa"
    saved = train_tiny.load_checkpoint(path)["model"]
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_results_are_written_before_they_are_printed(small, monkeypatch, tmp_path):
    """A table that fails, and takes the results of the training with it."""

    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(train_tiny.Chains, "describe", broken)
    with pytest.raises(ZeroDivisionError):
        train_tiny.main(["--steps", "1", "--out", str(tmp_path)])
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png", ".pt"}
