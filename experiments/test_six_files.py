# SPDX-License-Identifier: MIT
"""What readers change and add in mythos.py and train_tiny.py; odd inputs, verdicts, files."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import mythos
import train_tiny
from mythos import RecurrentDepthTransformer, diagnostics
from test_mythos import SMALL, Tiny, cpu, experts, ids, make, on_each_device, seeded, spy, start
from train_tiny import Chains, Muon, train

__all__ = ["cpu", "on_each_device"]  # fixtures


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Quantised(nn.Parameter):
    def view(self, *shape):
        raise TypeError("only my layer may use me")


CHANGES = dict(  # of an attention
    attend=lambda m: setattr(m, "attend", lambda *a, **how: 2 * mythos.causal_attention(*a, **how)),
    subclass=lambda m: setattr(m.kv_up_proj, "__class__", Shifted),
    bias=lambda m: setattr(m.kv_up_proj, "bias", nn.Parameter(torch.ones(64))),
    forward=lambda m: setattr(m.kv_up_proj, "forward", lambda x: x @ m.kv_up_proj.weight.T + 1),
    hook=lambda m: m.kv_up_proj.register_forward_hook(lambda _, inputs, out: out + 1),
    pre_hook=lambda m: m.kv_up_proj.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1,)),
    quantised=lambda m: setattr(m.kv_up_proj, "weight", Quantised(2 * m.kv_up_proj.weight)),
)


@pytest.mark.parametrize("kind, change", [("gqa", "attend"), *(("mla", name) for name in CHANGES)])
@torch.no_grad()
def test_what_is_changed_is_used_on_every_path(kind, change, monkeypatch):
    """A kernel that one pass, a chunk or a decoded token does not use; a T×T mask for the usual one
    (flaw 16). A weight read past its module: an adapter is ignored, a quantised layer crashes."""
    model, tokens = make(attention_type=kind), ids(1, 9)
    calls = spy(monkeypatch, F, "scaled_dot_product_attention")
    usual = model(tokens)[0]
    assert all(len(args) == 3 and how.get("attn_mask") is None for args, how in calls)
    CHANGES[change](model.recurrent[0].attention)
    want, cache = model(tokens)[0], model.new_cache(1, 9)
    chunks = [model(x, cache=cache)[0] for x in tokens.split([4, 1, 3, 1], dim=1)]
    assert_close(torch.cat(chunks, dim=1), want)
    assert (want - usual).abs().max() > 0.01


class Curious(RecurrentDepthTransformer):
    """What a reader adds first: another h_0, a look at t, a halting rule."""

    def initial_state(self, e):
        return torch.ones_like(e)

    def step(self, h, e, rope, t, *more):
        self.loops[t] = h[0, 0, 0].item()
        return super().step(h, e, rope, t, *more)

    def has_settled(self, h_next, h, halt_threshold):
        first = torch.arange(h.shape[1]).expand(h.shape[:2]) == 0  # halts once, the others later
        return torch.where(first, len(self.loops) == 2, len(self.loops) == 4)


def test_what_a_subclass_adds_is_used_everywhere():
    """A second place that starts at zeros, counts loops, measures a change or looks for experts; a
    token that halts and, by a rule that says so once, goes on."""
    model, tokens = Curious(**SMALL).eval(), ids(2, 4)
    model.coda[0].ffn, model.loops = mythos.MixtureOfExperts(32, 16, 6, 3), {}
    seen = diagnostics(model, tokens, n_loops=9, halt_threshold=0.1)
    assert [*model.loops] == [0, 1, 2, 3] and model.loops[0] == 1.0
    assert seen["loops_used"].tolist() == [[2, 4, 4, 4]] * 2
    assert seen["expert_load"].shape == (4, 1, 4)  # of the looped layer, not of the coda's
    (e, rope), h = model.run_prelude(tokens), torch.ones(2, 4, 32)
    assert_close(seen["change"][0], mythos.relative_change(model.step(h, e, rope, 0), h))
    model.loops = {}
    mythos.loop_gain(model, tokens, n_loops=2, iterations=2)
    assert [*model.loops] == [0, 1, 2] and model.loops[0] == 1.0


def test_what_is_added_is_initialised_too():
    """A zero start that is undone a moment later; a parameter that nobody initialises; a part
    lifted out that cannot be trained as it comes."""
    model = make()
    model.gate = gate = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 8))
    gate.reset_parameters = lambda: [nn.init.zeros_(part.weight) for part in gate[:2]]
    model.init_weights()
    assert not any(x.any() for x in (gate[0].weight, gate[1].weight, gate[2].bias))
    assert 0.12 < gate[2].weight.std() < 0.16
    model.h_0 = nn.Parameter(torch.ones(32))
    with pytest.raises(ValueError, match=r"^init_weights: got \['h_0'\], expected"):
        model.init_weights()
    assert abs(experts().down_proj.std().item() * 24**0.5 / 0.8 - 1) < 0.06
    assert (mythos.StateUpdate(4).b == 0.5).all()


def test_mode_is_restored(monkeypatch):
    """Generating in training mode; another mode, or a list that grows, left behind by an error."""
    model, modes = make().train(), []
    model.recurrent[0].register_forward_pre_hook(lambda m, args: modes.append(m.training))
    model.coda.eval()  # a part that the user keeps in another mode
    for call in (lambda: model.generate(ids(1, 3), 2), lambda: diagnostics(model, ids(1, 3))):
        call()
        with monkeypatch.context() as broken, pytest.raises(TypeError):
            broken.setattr(model, "run_prelude", None)
            call()
        assert model.training and model.recurrent[0].training and not model.coda.training
    assert modes and not any(modes) and model.recurrent[0].ffn.load_per_call is None


def test_gain_and_sampling_at_the_edges():
    """A gain that is not in the units of rho(A); nan once J is 0; a radius that a negative A does
    not have. One id too many where the mass is p exactly; small bf16 numbers whose sum stops
    growing; a temperature near 0 that overflows; argmax that takes nan for the largest number."""
    model, logits = make(spectral_radius_target=None), torch.randn(3, 9, generator=seeded())
    model.loop_norm.weight.data.zero_()  # R = 0
    for A in (-2.0, 0.0):
        model.state_update.a.data.fill_(A - 0.475)
        assert mythos.spectral_radius(model) == pytest.approx(-A)
        assert mythos.loop_gain(model, ids(1, 4), iterations=4) == pytest.approx(-A)
    assert mythos.sample(torch.zeros(500, 4), top_p=0.5, generator=seeded()).max() == 1
    many = torch.zeros(20_000, 512, dtype=torch.bfloat16)
    assert mythos.sample(many, top_p=0.9, generator=seeded()).max() == 460
    for temperature in (1e-40, 1e-300):  # the last is 0 in fp32
        assert torch.equal(mythos.sample(logits, temperature), logits.argmax(dim=-1, keepdim=True))
    for logits[0, 3] in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="^logits: got 'inf or nan', expected finite"):
            mythos.sample(logits, temperature=0)


@pytest.mark.parametrize("shape", [(2, 24, 16), (2, 16, 24)])
def test_muon_equals_torch_muon(cpu, shape):
    """Another momentum, scale, decay or polynomial; a stack treated as one matrix; a crash where a
    parameter has no gradient. (torch's computes in bf16.)"""
    before, frozen = torch.randn(shape), nn.Parameter(torch.ones(2, 2))
    ours, theirs = nn.Parameter(before.clone()), [nn.Parameter(m.clone()) for m in before]
    reference = torch.optim.Muon(theirs, lr=0.01, adjust_lr_fn="match_rms_adamw")
    muon = Muon([ours, frozen], lr=0.01)
    for _ in range(4):
        ours.grad = torch.randn(shape)
        for p, grad in zip(theirs, ours.grad, strict=True):
            p.grad = grad.clone()
        muon.step()
        reference.step()
    moved, wanted = ours - before, torch.stack(theirs) - before
    assert (moved - wanted).norm() < 0.02 * wanted.norm() and (frozen == 1).all()


@pytest.mark.parametrize(
    "most, lasts, halting, far, failed",
    [(10, 99, 10, 64, []), (9, 99, 9, 64, [1]), (4, 99, 4, 64, [0, 1]), (10, 20, 10, 64, [2]),
     (10, 99, 2, 64, [3]), (10, 99, 10, 63, [4])],
)  # fmt: skip
def test_chains_report_fails_what_should_fail(cpu, most, lasts, halting, far, failed, monkeypatch):
    """A report that passes a model that cannot go beyond its training, falls apart at more loops
    (flaw 1), halts too early, or stops on a ring; ends that can be guessed; a "ring" with an end;
    the loops of another threshold, or of edges."""

    def hop(model, tokens, loops, threshold=None):  # perfectly, but only so far, or only so long
        edges, path, logits = tokens[:, :20], [tokens[:, 20:]], {}
        successors = torch.zeros_like(edges).scatter(1, edges // 20 - 1, edges % 20)
        for _ in range(64):
            path.append(successors.gather(1, path[-1]))
        for L in loops:
            hops = halting if threshold else min(L, most) if L <= lasts else 0
            if L == 64:
                assert threshold == 0.3 and (path[20] == path[0]).all()
                assert not any((path[k] == path[0]).any() for k in range(1, 20))
                hops = far
            logits[L] = F.one_hot(torch.cat([0 * edges, path[hops]], dim=1), 20)
        used = torch.full_like(edges, round(10 / (threshold or 1)))
        return logits, torch.cat([0 * edges, used], dim=1)

    monkeypatch.setattr(train_tiny, "logits_per_loop", hop)
    task = Chains()
    task.test_size = 12
    edges = task.test_set()[0][:, :20]
    assert ((edges // 20 - 1 == edges % 20).sum(dim=1) == 6).all()  # each sequence has 6 ends
    results = task.evaluate(make())
    verdicts = [g >= b if sign == ">=" else g <= b for _, g, sign, b in results["checks"]]
    assert verdicts == [k not in failed for k in range(5)]
    assert [check[3] for check in results["checks"]] == [0.99, 0.9, 0.05, 0.01, 0.95]
    assert results["accuracy"][4] == [k <= 4 for k in range(11)]
    assert results["halting"]["loops"] == [33] * 11 and "score 17%" in task.describe(results)


def main(folder, *flags):
    return train_tiny.main(["--out", str(folder), "--device", "cpu", *flags])


def test_command_line(cpu, tmp_path, monkeypatch, capsys):
    """Flags that are ignored; a run that loses its checkpoint, numbers or picture, or that another
    run overwrites; a seed that changes nothing; a flag that is refused only after the training."""
    monkeypatch.setattr(train_tiny, "Chains", Tiny)
    flags = ["--steps", "2", "--attention", "gqa", "--seed"]
    path, made = tmp_path / "chains-gqa-seed7-steps2.pt", {}
    for seed in ("7", "8"):
        assert main(tmp_path, *flags, seed) == 1
        made[seed] = train_tiny.load_model(tmp_path / f"chains-gqa-seed{seed}-steps2.pt")
        assert made[seed].config.attention_type == "gqa"
        assert made[seed].prelude[0].ffn.down_proj.weight.abs().max() < 0.01  # `prepare` has run
    assert (made["7"].embed.weight != made["8"].embed.weight).any(dim=1).all()  # all first weights
    assert "FAIL\n" in capsys.readouterr().out
    told = path.with_suffix(".json").read_text()
    assert all(part in told for part in ('"passed": false', '"seed": 7', '"attention": "gqa"'))
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    before = path.read_bytes()
    assert main(tmp_path, *flags, "7", "--resume") == 1 and path.read_bytes() == before
    main(tmp_path, *flags, "7", "--set", "batch_size=3", "norm_eps=1e-5")
    changed = tmp_path / "chains-gqa-seed7-steps2-batch_size=3-norm_eps=1e-5.pt"
    assert train_tiny.load_model(changed).config.norm_eps == 1e-5
    assert train_tiny.load_checkpoint(changed)["recipe"]["batch_size"] == 3
    for wrong, message in (
        ([*flags, "7"], "--out: got 'chains-gqa-seed7-steps2', expected a new name, or --resume"),
        (["--steps", "0"], "--steps: got 0, expected at least"), (["--seed", "-1"], "seed: got -1"),
        (["--attention", "mha"], "invalid choice: 'mha'"), (["--resume"], "seed0.pt is not there"),
        (["--set", "d_modle=8"], "--set: got 'd_modle', expected one of"),
        (["--set", "steps=8"], "--set: got 'steps'"), (["--set", "n_heads=5"], "n_heads: got 5"),
        (["--set", "lr_scale=.5"], "--set lr_scale: got '.5', expected a number"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main(tmp_path, *wrong)
        assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("a, b, code", [(0.5, 0.5, 0), (0.3, 0.5, 1), (0.5, 0.7, 1)])
def test_verdict(cpu, a, b, code, tmp_path, monkeypatch, capsys):
    """A swapped sign, the last check's verdict alone, a model in training mode, lost numbers."""

    def evaluate(task, model):
        assert not model.training
        return {"checks": [("a", a, ">=", 0.4), ("b", b, "<=", 0.6)]}

    monkeypatch.setattr(train_tiny, "Chains", Tiny)
    monkeypatch.setattr(Tiny, "evaluate", evaluate)
    monkeypatch.setattr(Tiny, "describe", lambda *_: next(tmp_path.glob("*.json")).name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # not installed: no picture
    assert main(tmp_path, "--steps", "1") == code
    assert ("\nPASS\n", "\nFAIL\n")[code] in capsys.readouterr().out


def test_a_checkpoint_belongs_to_its_run(cpu, tmp_path):
    """Two recipes mixed in one training; another class of model, or a model in training mode; a cut
    file, a flipped bit, which torch.load does not notice, a foreign file, code that would run."""
    path, task = tmp_path / "a.pt", Tiny()
    train(*start(), steps=2, seed=0, checkpoint=path)
    whole, saved, task.grad_loops = path.read_bytes(), train_tiny.load_checkpoint(path), 7
    model = train_tiny.load_model(path)
    assert not model.training and torch.equal(model.embed.weight, saved["model"]["embed.weight"])
    others = dict(grad_loops=(start(task), 0), config=(start(kind="gqa"), 0), seed=(start(), 1))
    for key, (pair, seed) in others.items():
        with pytest.raises(ValueError, match=rf"a\.pt, its {key}: got"):
            train(*pair, steps=2, seed=seed, checkpoint=path, resume=True)
    middle = len(whole) // 2
    bad = [whole[:middle], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]]
    for theirs in (saved | {"code": nn.Linear(1, 1)}, {"state_dict": saved["model"]}):
        torch.save(theirs, path)
        bad.append(path.read_bytes())
    for content in bad:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged, or not ours$"):
            train_tiny.load_model(path)
    config = saved["recipe"]["config"] | {"window": 4}  # of a subclass of MythosConfig
    for other in (dict(model="Mine"), dict(config=config)):
        torch.save(saved | {"recipe": saved["recipe"] | other}, path)
        with pytest.raises(ValueError, match="model: got .*('Mine'|'window')"):
            train_tiny.load_model(path)
    task.lr_scale = torch.ones(1).double().numpy()[0]
    train(start(task)[0], task, steps=1, seed=0, checkpoint=path)
    assert train_tiny.load_model(path)
