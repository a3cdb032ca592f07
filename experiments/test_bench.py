# SPDX-License-Identifier: MIT
"""Tests of bench.py: that it measures what it says, and what it writes. None asserts a time."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from experiments import bench
from mythos import RecurrentDepthTransformer, get_model_config

torch.set_num_threads(1)
TINY = dataclasses.replace(get_model_config("tiny"), d_model=32, n_heads=2, max_loop_iters=2)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs bench.py in an empty folder, at shapes that take no time, all packages installed."""

    class Other(torch.nn.Embedding):
        """Stands in for another package's model."""

        def forward(self, tokens, kv_cache=None, start_pos=0):
            return super().forward(tokens)

    for device, s in bench.SETTINGS.items():
        tiny = dict(product=16, contexts=(4,), memory=(TINY, (2, 8)))
        tiny |= dict(training=[(name, TINY, (2, 8), rivals) for name, _, _, rivals in s.training])
        tiny |= dict(decoding=[(name, TINY, rivals) for name, _, rivals in s.decoding])
        monkeypatch.setitem(bench.SETTINGS, device, SimpleNamespace(**(vars(s) | tiny)))
        old = dict(training=dict(machine="m", rows=[("old", "1")]))
        bench.write(tmp_path / "results" / f"speed-{device}.json", json.dumps(old))
    marks = "".join(f"prose\n<!-- {name} -->\n<!-- /{name} -->\n" for name in bench.SETTINGS)
    bench.write(tmp_path / "SPEED.md", marks)
    for name, value in dict(
        HERE=tmp_path, RUNS=tmp_path / "runs", ROUNDS=1, TOKENS=1, find_spec=lambda name: True,
        llama=lambda c, length: Other(420, 420), open_mythos=lambda c: Other(420, 420),
        graphed=lambda model, token, cache: lambda: None,
    ).items():  # fmt: skip
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: None)
    return lambda flags: bench.main(flags.split())


ROWS = [("cpu", (11, 7, 4)), pytest.param("cuda", (15, 6, 4), marks=pytest.mark.slow)]


@pytest.mark.parametrize("settings, rows", ROWS)
def test_every_part_is_measured_printed_and_kept(
    settings, rows, run, tmp_path, capsys, monkeypatch
):
    """A part or rival left out, a row lost; without --publish, a published file that changes, with
    it one that keeps old rows; Ctrl-C that empties a published file, or loses rows."""
    monkeypatch.setitem(bench.SETTINGS, "cpu", bench.SETTINGS[settings])  # a GPU's, on a processor
    files = tmp_path / "SPEED.md", tmp_path / "results" / "speed-cpu.json"
    before = [path.read_text() for path in files]
    assert run("--compile") == 0 and [path.read_text() for path in files] == before
    parts, printed = (
        json.loads((tmp_path / "runs/speed-cpu.json").read_text()),
        capsys.readouterr().out,
    )
    counts = tuple(len(parts[part]["rows"]) for part in bench.PARTS)
    assert counts == rows
    written = (tmp_path / "runs" / "SPEED.md").read_text()
    for what, value in (row for part in parts.values() for row in part["rows"]):
        assert f"| {what} | {value} |" in written and what in printed and value in printed
    assert written.count("| old | 1 |") == 1  # of the other device

    def interrupted(s):
        yield "a row", "its value"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(bench.PARTS, "memory", interrupted)
        run("--publish")
    assert [path.read_text() for path in files] == before
    assert "its value" in (tmp_path / "runs/speed-cpu.json").read_text()
    assert run("--publish --only memory") == 0
    assert [*json.loads(files[1].read_text())] == ["training", "memory"]
    assert "gradient through 4 loops" in files[0].read_text()


def test_refuses_another_device(run, monkeypatch, capsys):
    """A benchmark that quietly measures the processor."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        run("--device cuda")
    assert end.value.code == 2 and "--device: got 'cuda'" in capsys.readouterr().err


def test_speed_md_is_what_the_program_makes(tmp_path, monkeypatch):
    """Speeds typed by hand, or of another run than those that are kept."""
    monkeypatch.setattr(bench, "RUNS", tmp_path)
    assert bench.main(["--report"]) == 0
    assert (tmp_path / "SPEED.md").read_bytes() == (bench.HERE / "SPEED.md").read_bytes()


def test_calls_take_turns_and_the_median_counts(monkeypatch):
    """One program after the other; a mean; the first call, which initialises, counted."""
    clock, order = [0.0], []
    took = dict(a=iter([99, 1, 2, 3, 4, 50]), b=iter([99, 7, 7, 7, 7, 7]))

    def call(name):
        order.append(name)
        clock[0] += next(took[name])

    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    assert bench.seconds(lambda: call("a"), lambda: call("b")) == [3, 7]
    assert "".join(order) == "ab" * 6


def test_rounds_and_rivals_do_the_same_work(run, monkeypatch):
    """A second round that decodes with a longer context than the first; memory counted twice; a
    Llama that is smaller or larger than the model it races."""
    lengths, real = [], RecurrentDepthTransformer.forward

    def noted(model, tokens, cache):
        lengths.append(cache.n_tokens)
        return real(model, tokens, cache=cache)

    with monkeypatch.context() as patch:
        patch.setattr(RecurrentDepthTransformer, "forward", noted)
        call = bench.decoder(bench.SETTINGS["cpu"], TINY, 9, "ours")
        call()
        call()
    assert lengths == [0, 9, 9]
    model = RecurrentDepthTransformer(TINY, max_loop_iters=6)
    kept = [bench.bytes_kept(model, torch.ones(2, 8).long(), k) for k in (1, 3, 6, None)]
    assert kept[0] < kept[1] < kept[2] == kept[3]
    monkeypatch.undo()
    package = SimpleNamespace(LlamaConfig=dict, LlamaForCausalLM=lambda config: config)
    monkeypatch.setattr(bench.importlib, "import_module", lambda name: package)
    c, theirs = bench.SMALL, bench.llama(bench.SMALL, 256)
    plain = dataclasses.replace(
        c, attention_type="gqa", n_kv_heads=c.n_heads, recurrent_layers=0, prelude_layers=0,
        coda_layers=theirs["num_hidden_layers"], d_ff=theirs["intermediate_size"], num_experts=0,
    )  # fmt: skip
    assert bench.flops(plain, 256) == pytest.approx(bench.flops(c, 256), rel=0.01)
