# SPDX-License-Identifier: MIT
"""Tests of ask.py and show.py: what one can do with a trained model."""

import pytest
import torch

from experiments import ask, show, text
from experiments.circuits import Circuits
from experiments.test_circuits import compute
from mythos import RecurrentDepthTransformer
from test_mythos import edges_of, walk
from train_tiny import Chains, load_checkpoint, train

torch.set_num_threads(1)
EDGES = "0-4 3→1 4->3 1-1 2-2"


def tiny_model(task=None):
    torch.manual_seed(0)
    config = (task or Chains()).config("mla")
    return RecurrentDepthTransformer(config, d_model=32, n_heads=2, d_expert=16, num_experts=4)


def oracle(model, tokens, loops, halt_threshold=None):
    """A stand-in for logits_per_loop that hops perfectly."""
    n = Chains.n_nodes
    logits = {L: torch.zeros(*tokens.shape, n) for L in loops}
    for b, row in enumerate(tokens.tolist()):
        successor = edges_of(row, n)
        for t, query in enumerate(row[n:], start=n):
            for L in loops:
                logits[L][b, t, walk(successor, query, L)] = 1.0
    return logits, torch.full(tokens.shape, 7)


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
    asked = []
    monkeypatch.setattr(ask, "logits_per_loop", lambda *a: asked.append(a[2:]) or oracle(*a))
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


def trained(task, path, capsys):
    """The checkpoint of one step."""
    train(tiny_model(task), task, steps=1, seed=0, checkpoint=path)
    capsys.readouterr()
    return path


def test_a_trained_model_answers(tmp_path, capsys, monkeypatch):
    """A checkpoint that is not found, or of another task than the question; flags ignored; an
    unfinished training that passes for a finished one."""
    monkeypatch.setattr(Chains, "batch_size", 4)
    path = trained(Chains(), tmp_path / "any.pt", capsys)
    assert ask.main([EDGES, "--checkpoint", str(path), "--loops", "2", "--halt", "0.4"]) == 0
    said = capsys.readouterr().out
    assert said.count("after") == 2 and "halting below 0.4" in said and "not trained" not in said
    for question, flags, complaint in (
        (EDGES, ["--checkpoint", str(tmp_path / "no")], "no is not there"),
        (EDGES, ["--checkpoint", str(path), "--loops", "0"], "--loops: got 0"),
        ("def ", ["--checkpoint", str(path)], "edges: got 'def '"),
    ):
        with pytest.raises(SystemExit) as stop:
            ask.main([question, *flags])
        assert stop.value.code == 2 and complaint in capsys.readouterr().err
    saved = load_checkpoint(path)
    saved["recipe"]["steps"] = 3
    torch.save(saved, path)
    assert ask.main([EDGES, "--checkpoint", str(path)]) == 0
    assert "step 1 of 3" in capsys.readouterr().out


def test_a_trained_model_computes_a_circuit(tmp_path, capsys, monkeypatch):
    """A circuit's checkpoint taken for one of text; an example that the task cannot read."""
    monkeypatch.setattr(Circuits, "batch_size", 2)
    path = trained(Circuits(), tmp_path / "any.pt", capsys)
    assert ask.main([Circuits.example, "--checkpoint", str(path)]) == 0
    said = capsys.readouterr().out
    assert "halting below 0.02" in said and said.split()[-3:] == ["1", "0", "1"]
    assert ask.read_edges(Chains.example, Chains.n_nodes)


def test_text_is_continued(monkeypatch, tmp_path, capsys):
    """A sample that ignores its prompt, its length, its seed or another flag."""
    monkeypatch.setattr(text.Text, "context", 32)
    (tmp_path / "data").write_bytes(b"abcd" * 400)
    path = trained(text.Text(tmp_path / "data"), tmp_path / "any.pt", capsys)
    how = ["--checkpoint", str(path), "--bytes", "9"]
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
    assert end.value.code == 2 and ("is not there" if arguments else "required: checkpoint") in said


def test_the_moving_picture_has_a_frame_for_each_loop(tmp_path, monkeypatch):
    """A picture that does not move."""
    from PIL import Image  # matplotlib brings it

    task = Chains()
    task.test_size = 4
    show.draw_moving(task, tiny_model().eval(), tmp_path / "x.gif", last=3)
    with Image.open(tmp_path / "x.gif") as picture:
        assert picture.n_frames >= 3
