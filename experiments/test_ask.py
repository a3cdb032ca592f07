# SPDX-License-Identifier: MIT
"""Tests of ask.py and show.py. Docstrings name the mistakes."""

import pytest
import torch
from PIL import Image  # matplotlib brings it

from experiments import ask, show
from experiments.circuits import Circuits
from experiments.test_circuits import compute
from experiments.text import Text
from mythos import RecurrentDepthTransformer
from test_mythos import edges_of, walk
from train_tiny import Chains, train

torch.set_num_threads(1)


def test_a_question_is_written_as_in_training():
    """Tokens of other edges or gates; a wrong truth; a task's example that cannot be read."""
    tokens, nodes, ends, hops = ask.read_chains("0-4, 3→1 4->3,1-1 2-2", 7)
    edges = {0: 4, 3: 1, 4: 3, 1: 1, 2: 2, 5: 5, 6: 6}
    assert edges_of(tokens, 7) == edges and tokens[7:] == [*nodes, 5, 6] and hops == 3
    assert ends == [walk(edges, node, 7) for node in nodes]
    assert ask.read_chains("0-1 1-0", 20)[2] == ["ring"] * 2 and ask.read_chains(Chains.example, 20)
    tokens, names, values, loops = ask.read_circuit("a=0, b=0 c=xor(a, b) d=nand(a,c)", 7)
    value, depth = compute(tokens, 7)
    assert values == [value[i] for i in range(4)] == [0, 0, 0, 1] and names == [*"abcd"]
    assert tokens[14:] == [*range(7)]
    assert loops == 1 + max(depth.values()) == 3 and ask.read_circuit(Circuits.example, 16)


def test_what_is_said(tmp_path, monkeypatch, capsys):
    """Answers of other loops or nodes; more nodes than the model has; other loops than are needed,
    and two; another threshold. A text that ignores its prompt or a flag."""

    def said(question, task, vocab_size, *flags):
        torch.manual_seed(0)
        model = RecurrentDepthTransformer(task.config("mla"), d_model=32, vocab_size=vocab_size)
        train(model, task, steps=1, seed=0, checkpoint=tmp_path / "a.pt")
        capsys.readouterr()
        ask.main([question, "--checkpoint", str(tmp_path / "a.pt"), *flags])
        return capsys.readouterr().out

    def answers(model, tokens, loops, halt=0):
        assert tokens.shape == (1, 14)
        return {L: torch.eye(9)[(tokens + L) % 7] for L in loops}, tokens + int(10 * halt)

    monkeypatch.setattr(ask, "logits_per_loop", answers)
    monkeypatch.setattr(Chains, "n_nodes", 7)
    rows = said("1-0 0-0", Chains(), 56).splitlines()  # 32 % 7 is 4; the threshold is 0.2
    wanted = "1 0, 2 1, 3 2, 4 3, 5 4, 3 2, 0 0".split(", ")
    assert [" ".join(row.split()[-2:]) for row in rows] == wanted
    assert "\n          loops used    6    5\n" in said("1-0 0-0", Chains(), 56, "--halt=0.5")
    monkeypatch.setattr(Text, "context", 32)
    (tmp_path / "a").write_bytes(b"abcd" * 400)
    flags = "--bytes=30 --bytes=20 --seed=1 --temperature=0 --loops=9 --halt=9".split()
    texts = [said("abc", Text(tmp_path / "a"), 256, "--bytes=30", flag) for flag in flags]
    assert len({*texts}) == 6 and all(text.startswith("abc") for text in texts)
    with pytest.raises(SystemExit, match="2"):
        said("abc", Text(tmp_path / "a"), 256, "--bytes=510")
    assert "--bytes: got 510, expected at most 512" in capsys.readouterr().err


def test_what_cannot_be_asked_is_refused(capsys):
    """A traceback, or an answer to a question that is none."""
    for question in "", "0 4", "0-20 20-20", "0-1 0-2 1-1 2-2", "0-1":
        with pytest.raises(
            ValueError, match="chains: got .* one edge out of each node from 0 to 19"
        ):
            ask.read_chains(question, 20)
    for question in "", "a=2", "a=1 a=0", "a=1 b=xor(a,c)", "a=1 b=xor(a,a)", "a=1 b=1 c=0":
        with pytest.raises(ValueError, match="circuit: got "):
            ask.read_circuit(question, 2)
    for flag in "halt=nan halt=-1.0 loops=0 bytes=0 temperature=-1.0 seed=-1".split():
        with pytest.raises(SystemExit, match="2"):
            ask.main(["a", f"--{flag}"])
        assert f"--{flag}, ".replace("=", ": got ") in capsys.readouterr().err


def test_the_moving_picture_has_a_frame_for_each_loop(tmp_path, monkeypatch):
    """A picture that does not move, or that replaces README's without being told."""
    monkeypatch.chdir(tmp_path)
    model = RecurrentDepthTransformer(Chains().config("mla"), d_model=32, num_experts=0).eval()
    monkeypatch.setattr(show, "load_model", lambda path: model)
    monkeypatch.setattr(show.draw_moving, "__defaults__", (3,))  # frames; the full 14 take long
    show.main(["any.pt"])
    assert Image.open("runs/chains.gif").n_frames >= 3
