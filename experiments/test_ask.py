# SPDX-License-Identifier: MIT
"""Tests of ask.py and show.py. Docstrings name the mistakes."""

import pytest
import torch
from PIL import Image  # matplotlib brings it

from experiments import ask, show
from mythos import RecurrentDepthTransformer
from test_mythos import edges_of
from train_tiny import Chains


def test_a_question_is_written_as_in_training():
    """Other edges; a wrong truth; an unreadable example; an answer to no question."""
    tokens, nodes, ends, hops = ask.read_chains("0-4, 3→1 4->3,1-1 2-2", 7)
    assert edges_of(tokens, 7) == {0: 4, 3: 1, 4: 3, 1: 1, 2: 2, 5: 5, 6: 6} and hops == 3
    assert (nodes, ends) == ([0, 3, 4, 1, 2], [1, 1, 1, 1, 2]) and tokens[7:] == [*nodes, 5, 6]
    assert ask.read_chains("0-1 1-0", 20)[2] == ["ring"] * 2
    for question in "", "0 4", "0-20 20-20", "0-1 0-2 1-1 2-2", "0-1":
        with pytest.raises(ValueError, match="chains: got .* out of each node named, 0 to 19"):
            ask.read_chains(question, 20)


def test_what_is_said(monkeypatch, capsys):
    """Other loops or nodes; other loops than needed; another threshold or task; bad flags."""
    recipe = Chains().settings()
    saved = {"recipe": recipe, "history": {"loss": [0.1] * 400}}

    def said(*flags):
        ask.main(["1-0", "0-0", *flags])  # quoted or not
        return capsys.readouterr().out

    def answers(model, tokens, loops, halt=0):
        assert tokens.shape == (1, 40)
        return {L: torch.eye(9)[(tokens + L) % 7] for L in loops}, tokens + int(10 * halt)

    monkeypatch.setattr(ask, "load_checkpoint", lambda path: saved)
    monkeypatch.setattr(ask, "load_model", lambda path: None)
    monkeypatch.setattr(ask, "logits_per_loop", answers)
    rows = [row.split()[-2:] for row in said().splitlines()]
    assert [*map("".join, zip(*rows, strict=True))] == ["1234540", "0123430"]  # 32 % 7 is 4
    assert "\n          loops used    6    5\n" in said("--halt=0.5")
    saved["history"]["loss"].pop()
    assert said().startswith("(trained for 399 of 400 steps)\n")
    for flag in "halt=nan halt=-1.0 loops=0 checkpoint='text'".split():
        recipe["name"] = "text" if "text" in flag else "chains"
        with pytest.raises(SystemExit, match="2"):
            said(f"--{flag}")
        assert f"--{flag}, expected".replace("=", ": got ") in capsys.readouterr().err


def test_the_moving_picture_has_a_frame_for_each_loop(tmp_path, monkeypatch):
    """A picture that does not move, is of another task, or replaces README's without a word."""
    monkeypatch.chdir(tmp_path)
    model = RecurrentDepthTransformer(Chains().config("mla"), d_model=32, num_experts=0).eval()
    monkeypatch.setattr(show, "load_model", lambda path: model)
    recipe = {"name": "circuits"}
    monkeypatch.setattr(show, "load_checkpoint", lambda path: {"recipe": recipe})
    monkeypatch.setattr(show.draw_moving, "__defaults__", (3,))  # frames; the full 14 take long
    with pytest.raises(SystemExit, match="2"):
        show.main(["any.pt"])
    recipe["name"] = "chains"
    show.main(["any.pt"])
    assert Image.open("runs/chains.gif").n_frames >= 3
