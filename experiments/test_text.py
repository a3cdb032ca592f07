# SPDX-License-Identifier: MIT
"""Tests of text.py. Docstrings name the mistakes."""

import json
import zlib

import pytest
import torch

from experiments import text
from experiments.text import Text
from mythos import RecurrentDepthTransformer


def test_the_data_are_files_with_text(tmp_path, monkeypatch, capsys):
    """Results of a run, hidden files or a folder among the data; --data that is not read, or holds
    nothing; a wrong size of compressed text; a verdict on data that may be anything."""
    monkeypatch.setattr(Text, "context", 32)
    (tmp_path / "a").write_bytes(b"abcd" * 1200)
    (tmp_path / ".DS_Store").write_bytes(bytes(6000))
    flags = ["--data", str(tmp_path), "--out", str(tmp_path / "runs"), "--steps", "1"]
    assert text.main(flags) == text.main([*flags, "--resume"]) == 0
    assert "; 4,318 bytes to train on, 482 to test" in capsys.readouterr().out
    numbers = json.loads(next(tmp_path.glob(f"runs/text-{tmp_path.name}-*.json")).read_text())
    zipped = 8 * len(zlib.compress(b"abcd" * 60 + b"a" + b"cdab" * 60 + b"c", 9)) / 482
    assert numbers["compressors"]["zlib -9, all at once"] == zipped and not numbers["checks"]
    (tmp_path / "b").mkdir()
    for name, told in ("b", "b: got (0, 0), expected 34 bytes"), ("c", "c', expected a file"):
        with pytest.raises(SystemExit, match="2"):
            text.main(["--data", str(tmp_path / name)])
        assert told in capsys.readouterr().err


def test_whole_files_are_held_out(tmp_path, monkeypatch):
    """Held-out bytes that were trained on, too; one table that is half of the test; the library's
    own tests, or a user's folder of that name left out."""
    (tmp_path / "test").mkdir()
    for i in range(60):
        (tmp_path / "test" / f"{i:02}.py").write_bytes(f"File {i:02}. ".encode() * 30)
    (tmp_path / "test" / "00.py").write_bytes(b"-" * 60_000 + b"Table" * 5_000 + b"-" * 60_000)
    task, names = Text(tmp_path), [f"File {i}. ".encode() for i in (10, 20, 30, 40, 50)]
    assert task.test == b"Table" * 5_000 + b"".join(30 * name for name in names)  # 150,000 / 6
    assert not any(name in bytes(task.train_data.tolist()) for name in names)
    (tmp_path / "x.py").write_bytes(b"y = 1")
    monkeypatch.setattr(text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert b"".join(text.read_pieces(None)) == b"y = 1"


def test_bits_and_verdicts(tmp_path, monkeypatch):
    """Nats called bits, a wrong mean, bits of other loops; a byte that is never scored or drawn; a
    checksum of the test alone; a PASS that is none; a sample that moves the cursor."""
    (tmp_path / "a").write_bytes(bytes(range(256)) * 20)
    monkeypatch.setattr(Text, "context", 32)
    task = Text(tmp_path / "a")
    model, windows = RecurrentDepthTransformer(task.config("gqa")).eval(), task.test_set()
    wanted = [model(windows[:, :-1], windows[:, 1:], n_loops=L)[1].exp().item() for L in (1, 3)]
    assert [2**bits for bits in task.measure(model, [1, 3]).values()] == pytest.approx(wanted, 1e-3)
    assert torch.equal(windows[1:, 0], windows[:-1, -1])
    (tmp_path / "b").write_bytes((tmp_path / "a").read_bytes()[:-1] + b"!")
    assert Text(tmp_path / "b").data_crc != task.data_crc
    task.name = "text"
    for bits, wanted in ({2: 0.2, 4: 0.1}, [True, False]), ({2: 9, 4: 9}, [False, True]):
        monkeypatch.setattr(task, "measure", lambda *_, bits=bits: bits, raising=False)
        assert [got <= most for _, got, _, most in task.evaluate(model)["checks"]] == wanted
    task.train_data, task.batch_size = torch.arange(task.context + 2), 99
    seen, targets, _ = task.batch(rng := torch.Generator().manual_seed(0), 1)
    assert {task.draw_loops(rng, 1) for _ in range(3000)} == {*range(1, 17)}
    assert {*seen[:, 0].tolist()} == {0, 1} and torch.equal(targets, seen + 1)  # the next byte
    assert text.readable(b"a\x1b[2J\tb\n\x00\xff\xc3\xa4") == "a·[2J\tb\n··ä"
