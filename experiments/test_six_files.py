# SPDX-License-Identifier: MIT
"""More tests of mythos.py and train_tiny.py, on the small models of test_mythos.py: what readers
change and add, odd inputs, the report of the chains, files and flags."""

import copy
import dataclasses
import functools
import io
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import mythos
import train_tiny
from mythos import MixtureOfExperts, MythosConfig, RecurrentDepthTransformer, diagnostics
from test_mythos import (
    SMALL,
    Tiny,
    both,
    cpu,
    edges_of,
    experts,
    ids,
    make,
    on_each_device,
    same,
    seeded,
    spy,
    start,
    walk,
)
from train_tiny import Chains, Muon, train

__all__ = ["cpu", "on_each_device"]  # fixtures


@both
@torch.no_grad()
def test_another_attend_is_used_on_every_path(kind, monkeypatch):
    """A kernel, here a sliding window, that one pass, a chunk or a decoded token does not have; a
    T×T mask for the usual one: 1,863 GiB at a million tokens (flaw 16)."""
    model, tokens = make(attention_type=kind, prelude_layers=0, coda_layers=0), ids(1, 9)
    with monkeypatch.context() as patch:
        calls = spy(patch, F, "scaled_dot_product_attention")
        model.generate(tokens, 3, halt_threshold=0.1)
    assert calls and all(k.get("attn_mask") is None for _, k in calls)

    def last_three(q, k, v, scale=None):
        distance = torch.arange(k.shape[2])[-q.shape[2] :, None] - torch.arange(k.shape[2])
        seen = (distance >= 0) & (distance < 3)
        return F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)

    model.recurrent[0].attention.attend = last_three
    changed = torch.where(torch.arange(9) == 0, (tokens + 1) % 37, tokens)
    want, other = (model(x, n_loops=1)[0] for x in (tokens, changed))
    assert_close(want[:, 3:], other[:, 3:])
    assert ((want - other)[:, :3].abs().amax(dim=-1) > 1e-4).all()
    cache = model.new_cache(1, 9, 1)
    chunks = [model(x, n_loops=1, cache=cache)[0] for x in tokens.split([4, 1, 3, 1], dim=1)]
    assert_close(torch.cat(chunks, dim=1), want)


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Quantised(torch.Tensor):
    """A weight of which only its own layer may make use."""


CHANGES = dict(  # ways to change what a layer computes
    subclass=lambda layer: setattr(layer, "__class__", Shifted),
    bias=lambda layer: setattr(layer, "bias", nn.Parameter(torch.ones(layer.out_features))),
    forward=lambda layer: setattr(layer, "forward", lambda x: F.linear(x, layer.weight) + 1),
    hook=lambda layer: layer.register_forward_hook(lambda _, inputs, output: output + 1),
    pre_hook=lambda layer: layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1,)),
    parametrization=nn.utils.parametrizations.spectral_norm,
    quantised=lambda layer: setattr(
        layer, "weight", nn.Parameter(layer.weight.detach().as_subclass(Quantised))
    ),
)


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_no_way_around_a_changed_module(change):
    """Decoding that reads a weight past its module: an adapter is silently ignored, a quantised
    layer crashes."""
    model, tokens = make(), ids(1, 6)
    layer = model.recurrent[0].attention.kv_up_proj
    assert mythos.is_plain_linear(layer)
    CHANGES[change](layer)
    assert not mythos.is_plain_linear(layer)
    want, cache = model(tokens)[0], model.new_cache(1, 6)
    steps = [model(token, cache=cache)[0] for token in tokens.split(1, dim=1)]
    assert_close(torch.cat(steps, dim=1), want)


class Curious(RecurrentDepthTransformer):
    """What a reader adds first: a learned h_0, a look at t, a halting rule, experts in the coda."""

    def __init__(self, **fields):
        super().__init__(**fields)
        self.h_0 = nn.Parameter(torch.ones(self.config.d_model))
        self.coda[0].ffn, self.loops = MixtureOfExperts(self.config.d_model, 16, 6, 3), []

    def initial_state(self, e):
        return self.h_0.expand_as(e)

    def step(self, h, e, rope, t, *more):
        self.loops.append((t, h[0, 0, 0].item()))
        return super().step(h, e, rope, t, *more)

    def has_settled(self, h_next, h, halt_threshold):
        first = torch.arange(h.shape[1]).expand(h.shape[:2]) == 0  # halts once, the others later
        return torch.where(first, len(self.loops) == 2, len(self.loops) == 4)


def test_what_a_subclass_adds_is_used_everywhere():
    """A second place that starts at zeros, counts loops, measures a change or looks for experts; a
    token that halts and, by a rule that says so once, goes on."""
    model, tokens = Curious(**SMALL).eval(), ids(2, 4)
    seen = diagnostics(model, tokens, n_loops=3)
    assert [t for t, _ in model.loops] == [0, 1, 2] and model.loops[0][1] == 1.0
    e, rope = model.run_prelude(tokens)
    h = model.step(torch.ones_like(e), e, rope, 0)
    assert_close(seen["change"][0], (h - 1).norm(dim=-1) / h.norm(dim=-1))
    assert seen["expert_load"].shape == (3, 1, 4)  # of the looped layer, not of the coda
    for n_loops in (0, 2):
        model.loops.clear()
        mythos.loop_gain(model, tokens, n_loops=n_loops, iterations=2)
        assert [t for t, _ in model.loops] == [*range(n_loops + 1)] and model.loops[0][1] == 1.0
    for call in (model, functools.partial(diagnostics, model)):
        model.loops.clear()
        out = call(tokens, n_loops=9, halt_threshold=0.1)
        assert len(model.loops) == 4
    assert out["loops_used"].tolist() == [[2, 4, 4, 4]] * 2


class Gate(nn.Module):
    """Starts as nothing, whatever rule its inner layer has."""

    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.zeros_(self.up.weight)


def test_what_is_added_is_initialised_too():
    """A zero start that is undone a moment later; a parameter that nobody initialises; a part
    lifted out that cannot be trained as it comes."""
    model = make()
    model.gate, model.extra = Gate(32), nn.Linear(32, 8)
    for p in (*model.gate.parameters(), *model.extra.parameters()):
        p.data.fill_(7)
    model.init_weights()
    assert not model.gate.up.weight.any() and not model.extra.bias.any()
    assert 0.1 < model.extra.weight.std() < 0.2
    model.h_0 = nn.Parameter(torch.ones(32))
    with pytest.raises(ValueError, match=r"^init_weights: got \['h_0'\], expected"):
        model.init_weights()
    assert abs(experts().down_proj.std().item() * 24**0.5 / 0.8 - 1) < 0.06
    assert (mythos.StateUpdate(4).b == 0.5).all() and (mythos.StateUpdate(4).a == 0).all()


def test_mode_is_restored(monkeypatch):
    """Generating in training mode; another mode, or a list that grows, left behind by an error."""
    model, modes = make().train(), []
    model.recurrent[0].register_forward_pre_hook(lambda m, args: modes.append(m.training))
    model.coda.eval()  # a part that the user keeps in another mode
    for call in (lambda: model.generate(ids(1, 3), 2), lambda: diagnostics(model, ids(1, 3))):
        call()
        assert model.training and modes and not any(modes)
        with monkeypatch.context() as broken, pytest.raises(TypeError):
            broken.setattr(model, "run_prelude", None)
            call()
        assert model.training and model.recurrent[0].training and not model.coda.training
        assert all(moe.load_per_call is None for moe in mythos.expert_layers(model))


def test_dispatch_is_two_matrix_products(monkeypatch):
    """A Python loop over the experts with a synchronisation each, 7 times slower (flaw 13)."""
    calls = spy(monkeypatch, F, "grouped_mm")
    experts()(torch.randn(1, 5, 16))
    assert len(calls) == 2


@both
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(kind, autocast, monkeypatch):
    """fp32 numbers that meet bf16 layers crash outside autocast, bf16 ones inside (flaw 8); the
    experts' products, which autocast does not know, left in slow fp32."""
    model, tokens = make(attention_type=kind, num_experts_per_token=4), ids(2, 8)
    want, want_loss = model(tokens, tokens)
    model = model.train() if autocast else model.train().bfloat16()
    products = spy(monkeypatch, F, "grouped_mm")
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=autocast):
        logits, loss = model(tokens, tokens)
        assert model.generate(tokens, 3, halt_threshold=0.2).shape == (2, 11)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert {x.dtype for (x, _), _ in products} == {torch.bfloat16}
    assert (logits.float() - want).norm() < 0.03 * want.norm() and abs(loss - want_loss) < 0.05
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.abs().sum() > 0, name
    assert 0 < mythos.loop_gain(model, tokens) < 10


def test_copies_and_checkpoints():
    """A function stored on a module makes deepcopy share its weights, a pickled config fails the
    default torch.load (flaw 24); a table lost in to_empty (flaw 7)."""
    model, tokens, file = make(), ids(1, 6), io.BytesIO()
    want, twin = model(tokens)[0], copy.deepcopy(model)
    torch.save(dict(config=dataclasses.asdict(model.config), model=model.state_dict()), file)
    for p in model.parameters():
        p.data.zero_()
    assert torch.equal(twin(tokens)[0], want) and not torch.equal(model(tokens)[0], want)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    with torch.device("meta"):
        other = RecurrentDepthTransformer(MythosConfig(**loaded["config"]))
        assert other(tokens.to("meta"), n_loops=2)[0].shape == (1, 6, 37)  # shapes alone
    other.to_empty(device=tokens.device).init_weights()
    assert other(tokens)[0].isfinite().all()
    other.load_state_dict(loaded["model"])
    assert torch.equal(other(tokens)[0], want)


def main(tmp_path, *flags):
    return train_tiny.main(["--out", str(tmp_path / "new"), "--device", "cpu", *flags])


def test_command_line(cpu, tmp_path, monkeypatch, capsys):
    """Flags that are ignored; a run that loses its checkpoint, numbers or picture; one that another
    run overwrites; a seed that changes nothing."""
    monkeypatch.setattr(train_tiny, "Chains", Tiny)
    assert main(tmp_path, "--steps", "2", "--attention", "gqa", "--seed", "7") == 1
    stem, out = tmp_path / "new" / "chains-gqa-seed7-steps2", capsys.readouterr().out
    numbers = json.loads(stem.with_suffix(".json").read_text())
    assert (numbers["seed"], numbers["steps"], numbers["attention"]) == (7, 2, "gqa")
    assert numbers["passed"] is False and len(numbers["history"]["loss"]) == 2
    assert numbers.keys() >= {"device", "threads", "torch", "accuracy", "halting"}
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    saved = train_tiny.load_checkpoint(stem.with_suffix(".pt"))
    assert saved["recipe"]["config"]["attention_type"] == "gqa"
    assert re.search(r"step +1/2 loops +1 frontier +2 loss \d\.\d{3} rho\(A\) 0\.4.* s left\n", out)
    ask = f'python -m experiments.ask "0-4 3-1 4-3 1-1 2-2" --checkpoint {stem}.pt'
    assert out.endswith(f"FAIL\nAsk it: {ask}\n")
    before = stem.with_suffix(".pt").read_bytes()
    with pytest.raises(SystemExit):
        main(tmp_path, "--steps", "2", "--attention", "gqa", "--seed", "7")
    assert (
        "steps2.pt exists: add --resume, or choose another --seed or --out"
        in capsys.readouterr().err
    )
    assert main(tmp_path, "--steps", "2", "--attention", "gqa", "--seed", "7", "--resume") == 1
    assert stem.with_suffix(".pt").read_bytes() == before
    main(tmp_path, "--steps", "2", "--attention", "gqa", "--seed", "8")
    other = train_tiny.load_checkpoint(tmp_path / "new" / "chains-gqa-seed8-steps2.pt")
    assert not torch.equal(other["model"]["embed.weight"], saved["model"]["embed.weight"])


def test_verdict_and_order(cpu, tmp_path, monkeypatch, capsys):
    """The verdict of the last check alone, a swapped sign, a model measured as in training; results
    lost because a table or a picture fails."""
    good, bad = [("a", 0.5, ">=", 0.4), ("b", 0.5, "<=", 0.6)], ("a", 0.3, ">=", 0.4)
    monkeypatch.setattr(train_tiny, "Chains", Tiny)
    monkeypatch.setattr(Tiny, "describe", lambda *_: "")
    for i, checks in enumerate((good, [bad, good[1]], [good[0], ("b", 0.7, "<=", 0.6)])):

        def evaluate(task, model, checks=checks):
            assert not model.training
            return {"checks": checks}

        monkeypatch.setattr(Tiny, "evaluate", evaluate)
        monkeypatch.setattr(
            Tiny, "draw", lambda *_: (_ for _ in ()).throw(ImportError("matplotlib"))
        )
        assert main(tmp_path / str(i), "--steps", "1") == (i > 0)
        out = capsys.readouterr().out
        assert "\nFAIL\n" in out if i else "\nPASS\n" in out
        assert not list((tmp_path / str(i) / "new").glob("*.png"))
    monkeypatch.setattr(Tiny, "describe", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(tmp_path / "last", "--steps", "1")
    assert {p.suffix for p in (tmp_path / "last" / "new").iterdir()} == {".pt", ".json"}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--steps", "0"], "--steps of at least 1"), (["--steps", "1.5"], "invalid int value"),
        (["--seed", "-1"], "--seed from 0"), (["--device", "abacus"], "invalid choice: 'abacus'"),
        (["--attention", "mha"], "invalid choice: 'mha'"), (["--faster"], "unrecognized arguments"),
        (["--resume"], "seed0.pt is not there"),
    ],
)  # fmt: skip
def test_bad_flags_are_refused(cpu, flags, message, tmp_path, capsys):
    """A flag that is misread silently, or refused only after the training."""
    with pytest.raises(SystemExit) as stop:
        main(tmp_path, *flags)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (3, 16, 24)])
def test_muon_equals_torch_muon(cpu, shape):
    """Another momentum, scale, decay or polynomial; a stack treated as one matrix; a crash where a
    parameter has no gradient."""
    start, frozen = torch.randn(shape), nn.Parameter(torch.ones(2, 2))
    ours = nn.Parameter(start.clone())
    theirs = [nn.Parameter(m.clone()) for m in start.view(-1, *shape[-2:])]
    settings = dict(lr=0.01, momentum=0.95, weight_decay=0.1)
    muon = Muon([ours, frozen], lr=0.01, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(4):
        ours.grad = torch.randn(shape)
        for p, g in zip(theirs, ours.grad.view(-1, *shape[-2:]), strict=True):
            p.grad = g.clone()
        muon.step()
        reference.step()
    moved, wanted = ours - start, torch.stack([*theirs]).view(shape) - start
    assert (moved - wanted).norm() < 0.02 * wanted.norm()  # theirs is computed in bf16
    s = torch.linalg.svdvals(Muon.orthogonal(torch.diag(torch.logspace(-2, 1, 16))))
    assert 0.6 < s[:-5].min() and s.max() < 1.3 and (frozen == 1).all()


def oracle(most_hops=99, halts=True, lasts=99):
    """A stand-in for logits_per_loop that hops perfectly, but only so far, or only so long."""

    def answer(model, tokens, loops, halt_threshold=None):
        logits = {L: torch.zeros(*tokens.shape, 20) for L in loops}
        for b, row in enumerate(tokens.tolist()):
            successor = edges_of(row, 20)
            for t, query in enumerate(row[20:], start=20):
                for L in loops:
                    hops = min(L, most_hops) if L <= lasts else 0
                    if halt_threshold is not None:  # halting ends before the drift, or too early
                        hops = most_hops if halts else round(halt_threshold * 10)
                    logits[L][b, t, walk(successor, query, min(hops, most_hops))] = 1.0
        used = torch.ones(tokens.shape)
        used[:, 20:] = round(10 / (halt_threshold or 1))
        return logits, used

    return answer


@pytest.mark.parametrize(
    "hops, failed",
    [({}, []), ({"most_hops": 9}, [1]), ({"most_hops": 4}, [0, 1]), ({"lasts": 20}, [2])]
    + [({"halts": False}, [3])],
)
def test_chains_report_fails_what_should_fail(cpu, hops, failed, monkeypatch):
    """A report that passes a model that cannot go beyond its training, falls apart at more loops
    (flaw 1) or halts too early, or fails a perfect one; a question whose answer can be guessed; one
    threshold's loops, or those of edges, in each row."""
    task = Chains()
    task.test_size = 12
    tokens, ends, distance = task.test_set()
    for row, end, k in zip(tokens.tolist(), ends[:, 0].tolist(), distance.tolist(), strict=True):
        successor = edges_of(row, 20)
        assert sum(node == following for node, following in successor.items()) == 6
        assert sorted(k) == [-1] * 9 + [*range(11)]
        for query, far in zip(row[20:], k, strict=True):
            steps = [walk(successor, query, i) == end for i in range(11)]
            assert steps == [0 <= far <= i for i in range(11)]
    monkeypatch.setattr(train_tiny, "logits_per_loop", oracle(**hops))
    results = task.evaluate(make())
    verdict = [g >= b if sign == ">=" else g <= b for _, g, sign, b in results["checks"]]
    assert verdict == [k not in failed for k in range(4)]
    assert [c[2:] for c in results["checks"]] == [
        (">=", 0.99),
        (">=", 0.9),
        ("<=", 0.05),
        ("<=", 0.01),
    ]
    assert results["accuracy"][4][:6] == [1, 1, 1, 1, 1, 0], "4 loops reach 4 hops, not 5"
    assert {k: h["loops"][0] for k, h in results["halting"].items()} == {0.5: 20, 0.2: 50, 0.1: 100}
    assert "would score 17%" in task.describe(results)


def test_loop_gain_without_block_is_rho():
    """A gain that is not in the units of rho(A), off by a factor or a square; nan once J is 0; a
    radius that a negative A does not have."""
    model = make()
    model.loop_norm.weight.data.zero_()  # R = 0
    gain = functools.partial(mythos.loop_gain, model, ids(1, 4))
    assert abs(gain() / mythos.spectral_radius(model) - 1) < 0.01
    model.state_update.a.data.fill_(-1e30)  # A = 0, too: the state forgets at once
    assert gain(iterations=4) == 0
    free = make(spectral_radius_target=None)
    free.state_update.a.data[3] = -2.0
    assert mythos.spectral_radius(free) == pytest.approx(2 - 0.475)


def test_sampling_at_the_edges():
    """One id too many where the mass is p exactly; small bf16 numbers whose sum stops growing; a
    temperature near 0 that overflows; argmax that takes nan for the largest number."""
    assert mythos.sample(torch.zeros(500, 4), top_p=0.5, generator=seeded()).max() == 1
    many = torch.zeros(20_000, 512, dtype=torch.bfloat16)
    assert mythos.sample(many, top_p=0.9, generator=seeded()).max() == 460
    logits = torch.randn(3, 9, generator=seeded())
    for temperature in (1e-40, 1e-46, 1e-300):  # the last two are 0 in fp32
        assert torch.equal(mythos.sample(logits, temperature), logits.argmax(dim=-1, keepdim=True))
    for broken in (math.nan, math.inf):
        model = make()
        model.head.weight.data[3] = broken
        with pytest.raises(ValueError, match="^logits: got 'inf or nan', expected finite"):
            model.generate(ids(1, 3), 1, temperature=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The bytes of a checkpoint after 2 steps of 2."""
    path = tmp_path_factory.mktemp("checkpoint") / "a.pt"
    with torch.device("cpu"):
        train(*start(), steps=2, seed=0, checkpoint=path)
    return path.read_bytes()


def test_a_checkpoint_belongs_to_its_run(cpu, checkpoint, tmp_path):
    """Two recipes mixed in one training; a subclass of the model that comes back as another model
    with the same weights; a loaded model in training mode."""
    path = tmp_path / "a.pt"
    path.write_bytes(checkpoint)
    model = train_tiny.load_model(path)
    assert not model.training and same(
        model.state_dict(), train_tiny.load_checkpoint(path)["model"]
    )
    for name in ("batch_size", "lr_scale", "state_noise", "prelude_lr", "train_hops", "grad_loops"):
        other = Tiny()
        setattr(other, name, 7)
        with pytest.raises(ValueError, match=rf"a\.pt is of another run: {name} was"):
            train(*start(other), steps=2, seed=0, checkpoint=path, resume=True)
    for key, how in (("steps", dict(steps=3, seed=0)), ("seed", dict(steps=2, seed=1))):
        with pytest.raises(ValueError, match=rf"a\.pt is of another run: {key} was"):
            train(*start(), **how, checkpoint=path, resume=True)
    with pytest.raises(ValueError, match=r"a\.pt is of another run: config was"):
        train(*start(kind="gqa"), steps=2, seed=0, checkpoint=path, resume=True)
    Mine = type("Mine", (RecurrentDepthTransformer,), {})
    train(Mine(model.config), Tiny(), steps=1, seed=0, checkpoint=path)
    with pytest.raises(ValueError, match="model: got 'Mine'"):
        train_tiny.load_model(path)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)  # what unpickling would run


def test_damaged_and_foreign_checkpoints_are_refused(cpu, checkpoint, tmp_path):
    """A file cut short; a flipped bit in the weights, which torch.load does not notice; somebody
    else's file, or code in it that unpickling runs."""
    path, trap, middle = tmp_path / "a.pt", tmp_path / "trap", len(checkpoint) // 2
    path.write_bytes(checkpoint)
    saved = torch.load(path, weights_only=True)
    flipped = bytes([checkpoint[middle] ^ 1])
    torch.save(saved | {"extra": Malicious(trap)}, tmp_path / "trap.pt")
    torch.save({"state_dict": saved["model"], "epoch": 3}, tmp_path / "theirs.pt")
    for bad in (
        checkpoint[:middle], checkpoint[:middle] + flipped + checkpoint[middle + 1 :], b"text",
        (tmp_path / "trap.pt").read_bytes(), (tmp_path / "theirs.pt").read_bytes(),
    ):  # fmt: skip
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="is damaged, or not a checkpoint of this program$"):
            train_tiny.load_model(path)
    assert not trap.exists()
    torch.load(tmp_path / "trap.pt", weights_only=False)
    assert trap.exists(), "the trap would not have caught anything"


def test_checks_stop_nobody_else():
    """Fewer heads for a 1B model with MLA, refused because of GQA's key/value heads; a subclass
    whose own fields, with types that are only names, are taken for ours."""
    fewer = dataclasses.replace(mythos.get_model_config("1B"), n_heads=12)
    with pytest.raises(ValueError, match="^n_kv_heads: got 8"):
        dataclasses.replace(fewer, attention_type="gqa")
    extra = [("dropout", float, 0.0), ("window", "Window | None", None), ("note", str, "")]
    Wider = dataclasses.make_dataclass("Wider", extra, bases=(MythosConfig,), frozen=True)
    assert mythos.derive_widths(Wider(note="mine", window=7)).window == 7
