# SPDX-License-Identifier: MIT
"""Tests of bench.py: that it measures what it says, and what it writes. None asserts a time."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from experiments import bench

TINY = replace(bench.TOY, d_model=32, n_heads=2, max_loop_iters=2)


@pytest.mark.parametrize("settings", ["cpu", pytest.param("cuda", marks=pytest.mark.slow)])
def test_every_part_is_printed_and_kept(settings, tmp_path, capsys, monkeypatch):
    """A part or rival left out, a row lost; without --publish, a published file that changes, with
    it one that keeps old rows; Ctrl-C that empties a published file, or loses rows."""
    s = SimpleNamespace(**vars(bench.SETTINGS[settings]))  # a GPU's, too, on a processor
    s.product, s.contexts = 16, (4,)
    s.training = [(what, TINY, (2, 8), rivals) for what, _, _, rivals in s.training]
    s.decoding = [(what, TINY, rivals) for what, _, rivals in s.decoding]
    monkeypatch.setitem(bench.SETTINGS, "cpu", s)
    shutil.copytree(bench.HERE, tmp_path, dirs_exist_ok=True)
    other = torch.nn.Embedding(420, 420)  # stands in for another package's model
    other.forward = lambda tokens, **_: other.weight[tokens]
    monkeypatch.setattr(bench, "import_module", lambda name: bench.mythos)
    for name, value in dict(
        HERE=tmp_path, RUNS=tmp_path / "runs", ROUNDS=1, TOKENS=1, find_spec=lambda name: True,
        llama=lambda *_: other, open_mythos=lambda *_: other,
    ).items():  # fmt: skip
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda step, *_, **how: step)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: None)
    page, kept = tmp_path / "SPEED.md", tmp_path / "results/speed-cpu.json"
    before = page.read_text(), kept.read_text()
    bench.main(["--compile"])
    parts = json.loads((tmp_path / "runs/speed-cpu.json").read_text())
    rows = [len(parts[part]["rows"]) for part in bench.PARTS]
    assert rows == dict(cpu=[14, 22, 9], cuda=[19, 22, 8])[settings]
    written, printed = (tmp_path / "runs/SPEED.md").read_text(), capsys.readouterr().out
    for what, value in (row for part in parts.values() for row in part["rows"]):
        assert f"| {what} | {value} |" in written and f"{what:<64} {value}\n" in printed

    def interrupted(s):
        yield "a row", "its value"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(bench.PARTS, "decoding", interrupted)
        bench.main(["--publish", "--only", "decoding"])
    assert (page.read_text(), kept.read_text()) == before
    assert "its value" in (tmp_path / "runs/speed-cpu.json").read_text()
    bench.main(["--publish", "--only", "decoding"])
    wanted = json.loads(before[1]) | json.loads((tmp_path / "runs/speed-cpu.json").read_text())
    assert json.loads(kept.read_text()) == wanted and ", 4 tokens cached |" in page.read_text()


def test_speed_md_is_what_the_program_makes(tmp_path, monkeypatch, capsys):
    """Speeds typed by hand, or of another run; a benchmark that quietly measures the processor."""
    monkeypatch.setattr(bench, "RUNS", tmp_path)
    assert bench.main(["--report"]) == 0
    assert (tmp_path / "SPEED.md").read_bytes() == (bench.HERE / "SPEED.md").read_bytes()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--device", "cuda", "--report"])
    assert "--device: got 'cuda'" in capsys.readouterr().err


def test_calls_take_turns_and_the_median_counts(monkeypatch):
    """One program after the other; a mean; the first call, which initialises, counted."""
    clock, order, took = [0.0], [], dict(a=[99, 1, 2, 3, 4, 50], b=[99, 7, 7, 7, 7, 7])

    def call(name):
        order.append(name)
        clock[0] += took[name].pop(0)

    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    assert bench.seconds(lambda: call("a"), lambda: call("b")) == [3, 7]
    assert "".join(order) == "ab" * 6


def test_rounds_and_rivals_do_the_same_work(monkeypatch):
    """A second round behind a longer context; a Llama of other FLOPs."""
    package = SimpleNamespace(LlamaConfig=dict, LlamaForCausalLM=lambda config: config)
    monkeypatch.setattr(bench, "import_module", lambda name: package)
    theirs = bench.llama(bench.SMALL, 256)
    layers = dict(prelude_layers=0, recurrent_layers=0, coda_layers=theirs["num_hidden_layers"])
    plain = replace(bench.PLAIN, **layers, d_ff=theirs["intermediate_size"])
    assert bench.flops(plain, 256) == pytest.approx(bench.flops(bench.SMALL, 256), rel=0.01)
    lengths, real = [], bench.RecurrentDepthTransformer.forward

    def noted(model, tokens, **how):
        lengths.append(how["cache"].n_tokens)
        return real(model, tokens, **how)

    monkeypatch.setattr(bench.RecurrentDepthTransformer, "forward", noted)
    call = bench.decoder(bench.SETTINGS["cpu"], TINY, 9, "ours")
    call()
    call()
    assert lengths == [0, *range(9, 13), *range(9, 13)]
