# SPDX-License-Identifier: MIT
"""Tests of bench.py: that it measures what it says. None asserts a time."""

import dataclasses
import json
import time

import pytest
import torch
from torch.testing import assert_close

import train_tiny
from experiments import bench
from mythos import (
    MixtureOfExperts,
    MythosConfig,
    RecurrentDepthTransformer,
    flops_per_token,
    get_model_config,
)

torch.set_num_threads(1)
SMALL = dict(vocab_size=37, d_model=32, max_seq_len=32, n_heads=2, d_ff=40, d_expert=16)


@pytest.fixture
def small(monkeypatch):
    """Shapes that take no time, one round, and no package of somebody else's."""
    shape = MythosConfig(**SMALL, max_loop_iters=2, kv_lora_rank=64, q_lora_rank=8)
    for name, value in dict(
        SHAPE=shape, MANY_EXPERTS=dict(num_experts=16, num_experts_per_token=4, d_expert=8),
        PLAIN=dict(attention_type="gqa", n_kv_heads=2, num_experts=0),
        BATCH=2, LENGTH=8, CONTEXTS=(4, 16), LOOPS=(1, 2, 4), ROUNDS=1, SEQUENCES=1, PRODUCT=16,
        open_mythos=lambda *_: None, llama=lambda *_: None,
    ).items():  # fmt: skip
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench.mythos, "get_model_config", lambda name: shape)


def test_prints_and_keeps_every_row(small, tmp_path, monkeypatch, capfd):
    """A part that crashes, a row that is lost or under another heading, a checkpoint that is not
    looked at, lines too wide for a screen, the profiler's own lines between ours."""
    tiny = dataclasses.replace(get_model_config("tiny"), d_model=32, n_heads=2)
    monkeypatch.setattr(train_tiny.Chains, "config", lambda self, kind: tiny)
    monkeypatch.setattr(train_tiny.Chains, "test_size", 25)
    monkeypatch.setattr(train_tiny.Chains, "batch_size", 2)
    monkeypatch.setattr(bench, "decoder", lambda *_: lambda: None)
    train_tiny.main(["--steps", "1", "--out", str(tmp_path), "--device", "cpu"])
    capfd.readouterr()
    path = tmp_path / "bench.json"
    flags = ["--results", str(path)]
    assert bench.main([*flags, "--checkpoint", str(tmp_path / "chains-mla-seed0-steps1.pt")]) == 0
    parts, (printed, errors) = json.loads(path.read_text())["parts"], capfd.readouterr()
    assert list(parts) == ["Training", "Decoding", "Experts", "Memory", "Halting"] and not errors
    assert parts["Decoding"][-3][0].startswith("operators called to decode")
    rows = [tuple(row) for part in parts.values() for row in part]
    for start in (
        "a matrix product", "bare matrix", "training, 8", "training, 16", "training, no experts",
        "an expert that gets no",
        "where a training", "operators called", "forward", "decoding, 4 tokens cached",
        "decoding, 4 of", "4 of 256 experts", "kept for", "cache of 32 tokens, GQA",
        "building", "the toy's 20 queries",
    ):  # fmt: skip
        assert any(what.startswith(start) for what, _ in rows), start
    table, _, last = printed.rpartition("\n\n")
    assert max(map(len, table.splitlines())) <= 100 and str(path) in last
    printed = " ".join(table.split())
    assert all(f"{' '.join(what.split())} {value}" in printed for what, value in rows)
    written = (tmp_path / "SPEED.md").read_text()
    assert all(f"| {what} | {value} |" in written for what, value in rows)
    assert [line[4:] for line in written.splitlines() if line[:4] == "### "] == list(parts)
    assert "`python -m experiments.bench --checkpoint CHECKPOINT`" in written
    (tmp_path / "SPEED.md").unlink()
    assert bench.main([*flags, "--report"]) == 0 and (tmp_path / "SPEED.md").read_text() == written


def test_an_interrupted_run_keeps_what_was_measured(small, tmp_path, monkeypatch):
    """A JSON that is written at the end only: Ctrl-C in the last part loses minutes."""

    def interrupt(device):
        yield "a row", "its value"
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "decoding", interrupt)
    path = tmp_path / "bench.json"
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--results", str(path)])
    numbers = json.loads(path.read_text())
    assert len(numbers["parts"]["Training"]) > 5
    assert numbers["parts"]["Decoding"] == [["a row", "its value"]]


def test_speed_md_of_a_user_is_not_the_kept_one(tmp_path, monkeypatch, capsys):
    """A run with --results that rewrites the project's SPEED.md, or a file in the folder above."""
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results" / "bench.json")
    monkeypatch.setattr(bench, "SPEED", tmp_path / "SPEED.md")
    (tmp_path / "results").mkdir()
    for path in (bench.RESULTS.with_name("mine.json"), tmp_path / "mine.json"):
        path.write_text(json.dumps(dict(machine="m", torch="t", about="a", parts={})))
    flags = ["--report", "--results"]
    assert bench.main([*flags, str(bench.RESULTS.with_name("mine.json"))]) == 0
    assert bench.RESULTS.with_name("SPEED.md").is_file() and not bench.SPEED.exists()
    with pytest.raises(SystemExit):  # there it would have to be the project's own
        bench.main([*flags, str(tmp_path / "mine.json")])
    assert "--results: got" in capsys.readouterr().err and not bench.SPEED.exists()


def test_a_decoder_can_be_repeated():
    """A second round that decodes with a longer context than the first, or past the cache."""
    model = RecurrentDepthTransformer(**SMALL, max_loop_iters=2).eval()
    lengths, real = [], model.forward

    def noted(tokens, cache):
        lengths.append(cache.n_tokens)
        return real(tokens, cache=cache)

    model.forward = noted
    with torch.no_grad():
        call = bench.decoder(model, 9)
        call()
        call()
    assert lengths == [0, *[9, 10, 11, 12] * 2]


def test_time_is_counted_once():
    """Time of an inner cause that its outer one gets, too; a name that is never called."""

    def slow(seconds: float):
        return time.sleep(seconds)

    class Owner:
        inner = staticmethod(lambda: slow(0.02))
        outer = staticmethod(lambda: (Owner.inner(), slow(0.01)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "CAUSES", {"in": (Owner, "inner"), "out": (Owner, "outer")})
        patch.setattr(bench, "ROUNDS", 1)
        found = bench.where(lambda: (Owner.outer(), slow(0.01)))
    assert list(found)[0] == "in" and sum(found.values()) == pytest.approx(1)
    assert found["in"] > found["out"]
    model = RecurrentDepthTransformer(**SMALL, max_loop_iters=2).eval()
    with torch.no_grad():
        assert min(bench.where(bench.decoder(model, 9)).values()) > 0


def test_readable_loop_over_experts_is_the_layer():
    """A race between two layers that compute different things."""
    torch.manual_seed(0)
    moe = MixtureOfExperts(d_model=16, d_expert=8, num_experts=6, num_experts_per_token=3)
    x = torch.randn(1, 20, 16)
    assert_close(bench.loop_over_experts(moe, x[0]), moe(x)[0])


def test_a_cpu_is_measured_in_the_precision_of_its_weights():
    """fp32 that is rounded to bf16, which a CPU may have to emulate."""
    with bench.precision(torch.ones(1)):
        assert not torch.is_autocast_enabled("cpu")


def test_bytes_kept_by_hand():
    """Memory counted twice, or with the weights: x·W keeps x for W, and W is a weight."""

    class Product(torch.nn.Linear):
        def forward(self, x, targets, grad_loops=None):
            return None, (super().forward(x) ** 2).sum()

    x = torch.randn(5, 8)
    product = Product(8, 3, bias=False)  # keeps x and, for the square, x·W
    assert bench.bytes_kept(product, x, None) == 4 * (5 * 8 + 5 * 3)


def test_truncation_keeps_less():
    """grad_loops that is ignored when memory is counted."""
    model, tokens = RecurrentDepthTransformer(**SMALL, max_loop_iters=6), torch.ones(2, 8).long()
    kept = [bench.bytes_kept(model, tokens, k) for k in (1, 3, 6, None)]
    assert kept[0] < kept[1] < kept[2] == kept[3]
    assert (kept[1] - kept[0]) / 2 == pytest.approx((kept[2] - kept[1]) / 3, rel=0.02)


def test_llama_has_our_flops():
    """An opponent that is smaller or larger than the model it races."""
    c = bench.SHAPE
    flops = flops_per_token(RecurrentDepthTransformer(c), context=bench.LENGTH // 2)
    plain = RecurrentDepthTransformer(
        c, attention_type="gqa", n_kv_heads=c.n_heads, recurrent_layers=0, prelude_layers=0,
        coda_layers=10, d_ff=bench.llama_width(flops, 10, c, bench.LENGTH), num_experts=0,
    )  # fmt: skip
    assert flops_per_token(plain, context=bench.LENGTH // 2) == pytest.approx(flops, rel=0.01)


def test_refuses_a_checkpoint_that_is_not_there(tmp_path, capsys):
    """A benchmark that quietly leaves out what it was asked for."""
    with pytest.raises(SystemExit):
        bench.main(["--checkpoint", str(tmp_path / "nothing.pt")])
    assert "--checkpoint: got" in capsys.readouterr().err


def test_speed_md_is_what_the_program_writes(tmp_path, monkeypatch):
    """Speeds typed by hand, or of an earlier run than those that are kept; one long table."""
    numbers, kept = json.loads(bench.RESULTS.read_text("utf-8")), bench.SPEED.read_text("utf-8")
    assert list(numbers["parts"])[:4] == ["Training", "Decoding", "Experts", "Memory"]
    monkeypatch.setattr(bench, "SPEED", tmp_path / "SPEED.md")
    bench.write_report(bench.RESULTS)
    assert bench.SPEED.read_text("utf-8") == kept
