# SPDX-License-Identifier: MIT
"""Tests of ask.py and show.py: what one can do with a trained model."""

import pytest
import torch

import train_tiny
from experiments import ask, show, text
from experiments.circuits import Circuits
from experiments.test_circuits import compute
from experiments.test_circuits import small as small_circuits  # noqa: F401
from experiments.test_trainer import AnySteps, oracle, small, tiny_model  # noqa: F401
from mythos import RecurrentDepthTransformer
from train_tiny import Chains

torch.set_num_threads(1)
EDGES = "0-4 3→1 4->3 1-1 2-2"


def test_edges_are_read_as_written():
    """Another arrow than that of the docstring; an edge read backwards."""
    assert ask.read_edges(EDGES, 20) == {0: 4, 3: 1, 4: 3, 1: 1, 2: 2}


@pytest.mark.parametrize(
    "edges, told",
    [("", "expected such as"), ("0 4", "expected such as"), ("0-20", "nodes from 0 to 19"),
     ("0-1 0-2", "two out of 0"), ("0-1", "expected one; if a chain ends there, 1-1")],
)  # fmt: skip
def test_bad_edges_are_refused(edges, told):
    """A question that nobody can answer, answered; an end that is made up in silence."""
    with pytest.raises(ValueError, match="^edges: got ") as error:
        ask.read_edges(edges, 20)
    assert told in str(error.value).replace("'", "")


def test_answers_stand_under_their_questions(monkeypatch):
    """A row that belongs to other loops or other nodes; a wrong truth; halting that is not asked
    for, or that ends with the rows above it."""
    answer, asked = oracle(), []
    monkeypatch.setattr(ask, "logits_per_loop", lambda *a: asked.append(a[2:]) or answer(*a))
    said = ask.ask_chains(tiny_model(), EDGES, 3, 0.3).splitlines()
    assert said[0].split()[-5:] == ["0", "1", "2", "3", "4"]
    assert [line.split()[-5:] for line in said[1:4]] == [
        ["4", "1", "2", "1", "3"], ["3", "1", "2", "1", "1"], ["1", "1", "2", "1", "1"],
    ]  # fmt: skip
    assert said[-1].split()[-5:] == ["1", "1", "2", "1", "1"] and said[-2].split()[-5:] == ["7"] * 5
    assert asked == [([1, 2, 3],), ([32], 0.3)]
    ring = ask.ask_chains(tiny_model(), "0-1 1-0", 1, 0.3).splitlines()
    assert ring[-2].split()[-2:] == ["–", "–"] and ring[-1] == "(a ring has no end)"


@pytest.mark.parametrize(
    "circuit, told",
    [("", "1 to 16 variables"), ("a=2", "such as"), ("a=1 b=a&a", "such as"),
     ("a=1 a=0", "each variable once"), ("a=1 b=a^c", "defined before"),
     ("a=1 b=a^a", "two different"), (" ".join("abcdefghijklmnopq").replace(" ", "=1 ") + "=1",
      "1 to 16")],
)  # fmt: skip
def test_bad_circuits_are_refused(circuit, told):
    """A circuit that is not one, answered all the same."""
    with pytest.raises(ValueError, match="^circuit: got ") as error:
        ask.read_circuit(circuit, 16)
    assert told in str(error.value)


def test_a_circuit_is_asked_as_in_training(monkeypatch):
    """Tokens of other gates than were written, places of other variables, a wrong truth."""
    seen = []

    def answer(model, tokens, loops, halt_threshold=None):
        seen.append(tokens[0].tolist())
        logits = torch.zeros(*tokens.shape, 600)
        for place, token in enumerate(tokens[0].tolist()):
            logits[0, place, token] = 1.0
        return dict.fromkeys(loops, logits), torch.full(tokens.shape, 7)

    monkeypatch.setattr(ask, "logits_per_loop", answer)
    said = ask.ask_circuit(tiny_model(), "a=1 b=1 c=a^b d=a!&c", 2, 0.05).splitlines()
    value, depth = compute(seen[0], 16)
    assert [value[i] for i in range(12, 16)] == [1, 1, 0, 1] and depth[15] == 2
    assert said[0].split() == ["variable", "a", "b", "c", "d"]
    assert said[1].split()[-4:] == ["12", "13", "14", "15"]  # each place names its own variable
    assert said[-1].split()[-4:] == ["1", "1", "0", "1"] and len(said) == 6


def test_a_trained_model_answers(small, tmp_path, capsys):  # noqa: F811
    """A checkpoint that is not found, or of another task than the question; flags ignored."""
    train_tiny.main(["--steps", "1", "--out", str(tmp_path)])
    path = tmp_path / "chains-mla-seed0.pt"
    capsys.readouterr()
    assert ask.main([EDGES, "--checkpoint", str(path), "--loops", "2", "--halt", "0.4"]) == 0
    said = capsys.readouterr().out
    assert said.count("after") == 2 and "halting below 0.4" in said
    for flags in (
        ["--checkpoint", str(tmp_path / "no")],
        ["--checkpoint", str(path), "--loops", "0"],
    ):
        with pytest.raises(SystemExit) as stop:
            ask.main([EDGES, *flags])
        assert stop.value.code == 2
        said = capsys.readouterr().err  # which checkpoint was meant, if there is one
        assert f"expected a file saved by training, such as {path}" in said or "--loops" in flags
    with pytest.raises(SystemExit):
        ask.main(["def ", "--checkpoint", str(path)])
    assert "edges: got 'def '" in capsys.readouterr().err


@pytest.mark.usefixtures("small_circuits")
def test_a_trained_model_computes_a_circuit(tmp_path, capsys):
    """A circuit's checkpoint taken for one of text."""
    task, path = Circuits(), tmp_path / "any.pt"
    model = RecurrentDepthTransformer(task.config("mla"))
    train_tiny.train(model, task, steps=1, seed=0, checkpoint=path)
    capsys.readouterr()
    assert ask.main(["a=1 b=0 c=a^b", "--checkpoint", str(path)]) == 0
    said = capsys.readouterr().out
    assert "halting below 0.02" in said and said.split()[-3:] == ["1", "0", "1"]


def test_text_is_continued(monkeypatch, tmp_path, capsys):
    """A sample that ignores its prompt, its length, its seed or another flag."""
    monkeypatch.setattr(text.Text, "context", 32)
    (tmp_path / "data").write_bytes(b"abcd" * 400)
    flags = ["--steps", "1", "--out", str(tmp_path), "--data", str(tmp_path / "data")]
    assert text.main(flags) == 0
    capsys.readouterr()
    how = ["--checkpoint", str(tmp_path / "text-data-mla-seed0-steps1.pt"), "--bytes", "9"]
    said = []
    for more in ([], [], ["--seed", "1"], ["--temperature", "0", "--loops", "2", "--halt", "0.1"]):
        assert ask.main(["abc", *how, *more]) == 0
        said.append(capsys.readouterr().out)
    assert all(s.startswith("abc") for s in said) and said[0] == said[1] != said[2]
    asked, generate = [], RecurrentDepthTransformer.generate
    spy = lambda *args, **how: asked.append((args[2], how)) or generate(*args, **how)  # noqa: E731
    monkeypatch.setattr(RecurrentDepthTransformer, "generate", spy)
    assert ask.main(["abc", *how, "--temperature", "0.5", "--loops", "2", "--halt", "0.1"]) == 0
    ((length, options),) = asked
    del options["generator"]
    assert length == 9
    assert options == dict(n_loops=2, halt_threshold=0.1, temperature=0.5, top_p=0.95)
    with pytest.raises(SystemExit):
        ask.main(["abc", *how, "--halt", "-1"])
    assert "halt_threshold: got -1.0" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["nowhere.pt"]])
def test_the_moving_picture_needs_a_checkpoint(arguments, capsys):
    """A traceback instead of a line that says what is missing."""
    with pytest.raises(SystemExit) as end:
        show.main(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2 and "checkpoint" in said.splitlines()[-1]


def test_the_moving_picture_has_a_frame_for_each_loop(tmp_path, monkeypatch):
    """A picture that does not move."""
    from PIL import Image  # matplotlib brings it

    task = Chains()
    task.test_size = 4
    show.draw_moving(task, tiny_model(), tmp_path / "x.gif", last=3)
    with Image.open(tmp_path / "x.gif") as picture:
        assert picture.n_frames >= 3
