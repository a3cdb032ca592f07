# SPDX-License-Identifier: MIT
"""Tests of bench.py: that it measures what it says. None asserts a time."""

import dataclasses
import json
import re

import pytest
import torch
from torch.testing import assert_close

import train_tiny
from experiments import bench
from mythos import MixtureOfExperts, MythosConfig, RecurrentDepthTransformer

torch.set_num_threads(1)
README = (bench.RESULTS.parents[2] / "README.md").read_text("utf-8")
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
    monkeypatch.setattr(bench, "get_model_config", lambda name: shape)


def test_prints_and_keeps_every_row(small, tmp_path, monkeypatch, capsys):
    """A part that crashes, a row that is lost, a checkpoint that is not looked at."""
    tiny = dataclasses.replace(train_tiny.get_model_config("tiny"), d_model=32, n_heads=2)
    monkeypatch.setattr(train_tiny.Chains, "config", lambda self, kind: tiny)
    monkeypatch.setattr(train_tiny.Chains, "test_size", 25)
    monkeypatch.setattr(train_tiny.Chains, "batch_size", 2)
    monkeypatch.setattr(bench, "decoder", lambda *_: lambda: None)
    train_tiny.main(["--steps", "1", "--out", str(tmp_path), "--device", "cpu"])
    capsys.readouterr()
    flags = ["--device", "cpu", "--results", str(tmp_path / "bench.json")]
    assert bench.main([*flags, "--checkpoint", str(tmp_path / "chains-mla-seed0.pt")]) == 0
    numbers, printed = json.loads((tmp_path / "bench.json").read_text()), capsys.readouterr().out
    for start in (
        "a matrix product", "bare matrix", "training, 8", "training, 16", "training, no experts",
        "an expert that gets no",
        "where a training", "operators called", "forward", "decoding, 4 tokens cached",
        "decoding, 4 of", "4 of 256 experts", "kept for", "cache of 32 tokens, GQA",
        "building", "the toy's 20 queries",
    ):  # fmt: skip
        assert any(what.startswith(start) for what, _ in numbers["rows"]), start
    assert all(what in printed and value in printed for what, value in numbers["rows"])


def test_a_decoder_can_be_repeated():
    """A second round that decodes with a longer context than the first, or past the cache."""
    model = RecurrentDepthTransformer(**SMALL, max_loop_iters=2).eval()
    lengths, real = [], model.forward
    model.forward = lambda *a, cache, **k: (lengths.append(cache.n_tokens), real(*a, cache=cache))[
        1
    ]
    with torch.no_grad():
        call = bench.decoder(model, 9)
        call(), call()
    assert lengths == [0, *[9, 10, 11, 12] * 2]


def test_readable_loop_over_experts_is_the_layer():
    """A race between two layers that compute different things."""
    torch.manual_seed(0)
    moe = MixtureOfExperts(d_model=16, d_expert=8, num_experts=6, num_experts_per_token=3)
    x = torch.randn(1, 20, 16)
    assert_close(bench.loop_over_experts(moe, x[0]), moe(x)[0])


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
    flops = RecurrentDepthTransformer(c).flops_per_token(context=bench.LENGTH // 2)
    plain = RecurrentDepthTransformer(
        c, attention_type="gqa", n_kv_heads=c.n_heads, recurrent_layers=0, prelude_layers=0,
        coda_layers=10, d_ff=bench.llama_width(flops, 10, c), num_experts=0,
    )  # fmt: skip
    assert plain.flops_per_token(context=bench.LENGTH // 2) == pytest.approx(flops, rel=0.01)


def test_refuses_a_checkpoint_that_is_not_there(tmp_path, capsys):
    """A benchmark that quietly leaves out what it was asked for."""
    with pytest.raises(SystemExit):
        bench.main(["--checkpoint", str(tmp_path / "nothing.pt")])
    assert "--checkpoint: got" in capsys.readouterr().err


def test_readme_has_the_rows_kept():
    """Speeds typed by hand, or of an earlier run than the one that is kept."""
    numbers = json.loads(bench.RESULTS.read_text("utf-8"))
    assert bench.table(numbers["rows"]) in README
    assert re.search(rf"{numbers['threads']} threads", README)
