# SPDX-License-Identifier: MIT
"""Tests of text.py. Docstrings name the mistakes."""

import dataclasses
import json
import math
import zlib

import pytest
import torch

from experiments import text, variants
from experiments.text import Text
from mythos import RecurrentDepthTransformer, num_params

torch.set_num_threads(1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def small(monkeypatch):
    """The task shrunk to what a test can train."""
    full, tiny = Text.config, dict(d_model=32, n_heads=2)
    config = lambda self, kind: dataclasses.replace(full(self, kind), **tiny)  # noqa: E731
    monkeypatch.setattr(Text, "config", config)
    for name, value in dict(batch_size=4, context=32, most_loops=4, test_loops=(1, 2, 4)).items():
        monkeypatch.setattr(Text, name, value)


def test_command_line_text_learns_and_is_scored_in_bits(small, tmp_path, capsys):
    """Bits per byte with a wrong base or count: text of period 4 soon costs less than half
    of the 8 bits of an untrained guess; --data, file or folder, that is not read, or whose results
    overwrite those of other data; a verdict on data that may be anything."""
    (tmp_path / "data").mkdir()
    for name in ("a.txt", "b", "c"):
        (tmp_path / "data" / name).write_bytes(b"abcd" * 400)
    flags = ["--out", str(tmp_path), "--steps"]
    assert text.main([*flags, "40", "--data", str(tmp_path / "data")]) == 0
    stem = tmp_path / "text-data-mla-seed0-steps40"
    numbers = json.loads(stem.with_suffix(".json").read_text())
    assert max(numbers["bits_per_byte"].values()) < 4
    whole = numbers["compressors"]["zlib -9, all at once"]
    all_of_it = b"abcd" * 1200  # in 20 pieces of 241 bytes, of which each 10th is held out
    held_out = all_of_it[:241] + all_of_it[2410:2651]
    assert whole == 8 * len(zlib.compress(held_out, 9)) / len(held_out)
    out = capsys.readouterr().out
    assert numbers["sample"].startswith("def ") and "lzma" in out
    assert f'Ask it: python -m experiments.ask "def " --checkpoint {stem}.pt\n' in out
    assert "; data: 4,318 bytes to train on, 482 to test" in out
    assert numbers["checks"] == [] and not stem.with_suffix(".png").exists()
    assert text.main([*flags, "1", "--data", str(tmp_path / "data" / "a.txt")]) == 0
    assert (tmp_path / "text-a.txt-mla-seed0-steps1.json").is_file()


def test_bad_data_is_refused(small, tmp_path, capsys):
    """A traceback, or a training on nothing."""
    (tmp_path / "few").write_bytes(b"0123456789" * 4)
    for name, complaint in (("few", "--data: got (34, 6), expected 34"), ("no", "No such file")):
        with pytest.raises(SystemExit) as stop:
            text.main(["--out", str(tmp_path), "--data", str(tmp_path / name)])
        assert stop.value.code == 2 and complaint in capsys.readouterr().err


def test_a_sample_cannot_move_the_cursor():
    """Control bytes and undecodable ones that reach the terminal."""
    assert text.readable(b"a\x1b[2J\tb\n\x00\xff\xc3\xa4") == "a·[2J\tb\n··ä"


def test_hidden_files_are_no_text_and_few_files_are_cut_into_pieces(tmp_path):
    """A .DS_Store that becomes the test set; a folder of one file with nothing left to train on."""
    (tmp_path / ".DS_Store").write_bytes(bytes(6000))
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x").write_bytes(bytes(6000))
    for i in range(3):
        (tmp_path / f"{i}.txt").write_bytes(f"Chapter {i}. ".encode() * 3000)
    task = Text(tmp_path)
    assert task.test.startswith(b"Chapter 0. ") and len(task.test) == 2 * (1 + 3 * 33_000 // 20)
    assert bytes(task.train_data.numpy()).endswith(b"Chapter 2. ")
    for i in range(3):
        (tmp_path / f"{i}.txt").unlink()
    for i in range(60):  # now each 10th file is held out, and gives no more than its share
        (tmp_path / f"{i:02d}.txt").write_bytes(f"Chapter {i:02d}. ".encode() * 30)
    (tmp_path / "10.txt").write_bytes(b"-" * 60_000 + b"Table" * 5_000 + b"-" * 60_000)
    held_out = [f"Chapter {i:02d}. ".encode() * 30 for i in (0, 10, 20, 30, 40, 50)]
    held_out[1] = b"Table" * 5_000  # 150,000 / 6, from the middle
    assert Text(tmp_path).test == b"".join(held_out)


def test_the_librarys_tests_are_no_text(tmp_path, monkeypatch):
    """Bytes that repeat each other, or what pip installed; or a user's folder of that name left
    out."""
    for folder in ("test", "lib", "lib/site-packages"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.py").write_text(f"{folder};")
    monkeypatch.setattr(text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert b"".join(text.read_pieces(None)) == b"lib;"
    assert b"".join(text.read_pieces(tmp_path)) == b"lib/site-packages;lib;test;"


def test_text_of_an_untrained_uniform_model_costs_eight_bits(small, tmp_path):
    """Nats called bits, and a mean over the wrong number of bytes; bits of other loops than the row
    says; a byte between two windows that is never scored; a checksum of the test alone."""
    (tmp_path / "a").write_bytes(bytes(range(256)) * 20)
    task = Text(tmp_path / "a")
    model = RecurrentDepthTransformer(task.config("gqa")).eval()
    model.head.weight.data.zero_()
    bits = task.evaluate(model)["bits_per_byte"]
    assert all(math.isclose(b, 8.0, rel_tol=1e-5) for b in bits.values())
    model.init_weights()
    windows = task.test_set()
    for L, b in task.measure(model, [1, 3]).items():
        _, loss = model(windows[:, :-1], windows[:, 1:], n_loops=L)
        assert math.isclose(b, loss.item() / math.log(2), rel_tol=1e-4)
    assert torch.equal(windows[1:, 0], windows[:-1, -1])
    (tmp_path / "b").write_bytes((tmp_path / "a").read_bytes()[:-1] + b"!")
    other = Text(tmp_path / "b")
    assert other.test == task.test and other.data_crc != task.data_crc


def test_text_default_is_the_standard_library_with_whole_files_held_out():
    """Held-out bytes that were also trained on, and a task that needs a download."""
    task = Text()
    train = bytes(task.train_data.numpy())
    assert len(train) > 5_000_000 and len(task.test) > 100_000
    places = range(0, len(task.test) - 300, 5_000)
    seen = sum(task.test[i : i + 300] in train for i in places)
    assert seen == 0
    tokens, targets, n_loops = task.batch(seeded(), 1)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])


def test_text_windows_reach_the_last_byte_and_not_beyond():
    """A window that starts a byte too late: a crash once in a million draws."""
    task = Text.__new__(Text)
    task.train_data = torch.arange(task.context + 2)
    assert {int(x) for i in range(30) for x in task.batch(seeded(i), 1)[0][:, 0]} == {0, 1}


def test_text_loops_are_few_and_every_tenth_step_is_deep():
    """No deep steps, or many; a depth that is never trained."""
    task, rng = Text.__new__(Text), seeded()
    loops = [task.draw_loops(rng, 1) for _ in range(4000)]
    deep = [n for n in loops if n > 3]
    assert {*loops} == {*range(1, 17)} and 0.08 < len(deep) / 4000 < 0.12
    assert all(0.27 < loops.count(n) / 4000 < 0.33 for n in (1, 2, 3))
    assert 9.3 < sum(deep) / len(deep) < 10.7


def test_each_arm_of_the_comparison_gets_the_same_batches():
    """Arms that differ in how many random numbers their loop counts take: other data for each."""
    arms = [v.task.__new__(v.task) for v in variants.VARIANTS["text"].values()]
    batches = []
    for task in arms:
        task.train_data, rng = torch.arange(9000) % 256, seeded()
        batches.append([task.batch(rng, 1) for _ in range(40)])
    for tokens, *others in zip(*batches, strict=True):
        assert all(torch.equal(tokens[0], other[0]) for other in others)
    counts = [{n for _, _, n in steps} for steps in batches]
    counts = dict(zip(variants.VARIANTS["text"], counts, strict=True))
    assert len(counts.pop("loop")) > 3
    looped = {"one-loop": 1, "twice": 2, "no-embed-norm": 2, "thrice": 3, "grown": 1}  # at first
    assert counts == {name: {looped.get(name, 0)} for name in counts}
    assert all(name in looped or name.startswith("flat") for name in counts)


def test_text_sees_twenty_bytes_for_each_parameter():
    """A model too large for its data, which says nothing about looping."""
    task = Text.__new__(Text)
    model = RecurrentDepthTransformer(task.config("mla"))
    assert task.steps * task.batch_size * task.context >= 20 * num_params(model)


def test_text_report_fails_what_should_fail(small, monkeypatch, tmp_path):
    """A PASS for text that is worse than lzma, or not as good at 2 loops as at 4; compressors that
    get other pieces than the table says."""
    (tmp_path / "a").write_bytes(b"The quick brown fox, number %d. " * 300)
    task = Text(tmp_path / "a")
    task.default_data = True
    model = RecurrentDepthTransformer(task.config("gqa")).eval()
    for bits, verdicts in (
        ({1: 5, 2: 0.1, 4: 0.1}, [True, True]), ({1: 5, 2: 9, 4: 9}, [False, True]),
        ({1: 5, 2: 0.2, 4: 0.1}, [True, False]), ({1: 0.1, 2: 9, 4: 9}, [True, True]),
    ):  # fmt: skip
        monkeypatch.setattr(task, "measure", lambda *_, b=bits: b, raising=False)
        results = task.evaluate(model)
        assert [
            g >= b if sign == ">=" else g <= b for _, g, sign, b in results["checks"]
        ] == verdicts
    assert results["checks"][0][3] == results["compressors"]["lzma, all at once"]
    C, data = task.context, task.test
    packed = sum(len(zlib.compress(data[i : i + C], 9)) for i in range(0, len(data), C))
    assert results["compressors"][f"zlib -9, {C} bytes at a time"] == 8 * packed / len(data)
