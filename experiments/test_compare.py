# SPDX-License-Identifier: MIT
"""Tests of variants.py, compare.py and report.py. Docstrings name the mistakes."""

import json
from functools import partial

import pytest
import torch

from experiments import compare, report, text, variants
from experiments.variants import VARIANTS, Circuits, Text
from mythos import flops_per_token, num_params
from test_mythos import edges_of, walk
from train_tiny import Chains, logits_per_loop


@pytest.fixture
def small(monkeypatch, tmp_path):
    """All variants shrunk to what a test can train; files go to an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(variants, "replace", partial(variants.replace, d_model=32, n_heads=4))
    for task in (Chains, Circuits, Text):
        monkeypatch.setattr(task, "batch_size", 4)
        monkeypatch.setattr(task, "test_size", 8, raising=False)
    monkeypatch.setattr(text, "read_pieces", lambda data: [bytes(range(250))] * 40)
    monkeypatch.setattr(variants, "NORM_LOOPS", (1, 4))
    monkeypatch.setattr(compare, "shape_set", partial(compare.shape_set, size=4))


@pytest.mark.slow
@pytest.mark.parametrize("kind", VARIANTS)
def test_every_variant_trains_and_is_measured(kind, small, tmp_path, capsys):
    """A variant that crashes; a run that is lost, or not in the tables; a try among real runs."""
    assert compare.main(["--task", kind, "--quick", "--seeds", "5"]) == 0
    told = capsys.readouterr().out
    runs = report.read_runs(tmp_path / "runs/quick/results" / f"{kind}.jsonl")
    assert [run["variant"] for run in runs] == sorted(VARIANTS[kind])
    assert all(run["steps"] == 2 and f"\n| {run['variant']} |" in told for run in runs)
    assert [path.name for path in tmp_path.rglob("runs/*")] == ["quick"]


def test_runs_go_on_and_stay_apart(small, tmp_path, monkeypatch, capsys):
    """A quick try that blocks the real run; a new start, or a lost curriculum, after a run was cut
    off; FLOPs of other loops, or without the backward pass; a tracked file that is overwritten."""
    flags, calls = ["--only", "loop", "--seeds", "3"], []

    def climb(self, frontier, n_loops, loss):
        calls.append(n_loops)
        if len(calls) == 4 + 8:
            raise KeyboardInterrupt
        return min(frontier + 1, 3)

    before = {path: path.stat().st_mtime_ns for path in report.HERE.rglob("*.*")}
    monkeypatch.setattr("train_tiny.SAVE_EVERY", 6)
    monkeypatch.setattr(Chains, "steps", 12)
    monkeypatch.setattr(Chains, "advance", climb)  # else each step has one loop
    monkeypatch.setattr(compare, "measure", lambda *_: {"accuracy": {"0": [1] * 11}, "shapes": {}})
    assert compare.main([*flags, "--quick"]) == compare.main([*flags, "--quick"]) == 0  # anew
    with pytest.raises(SystemExit, match="2"):
        compare.main(flags)
    assert "the same command continues" in capsys.readouterr().err
    for _ in range(2):  # the second time nothing is left to do
        assert compare.main(flags) == 0 and len(calls) == 4 + 8 + 6
    (run,) = report.read_runs(tmp_path / "runs/results/chains.jsonl")
    assert (run["frontier"], run["steps"]) == (3, 12)
    loops, (model, _) = sum(calls[4:10] + calls[12:]), VARIANTS["chains"]["loop"].build()
    none, one = (flops_per_token(model, n, 20) for n in (0, 1))
    flops = 3 * 4 * 40 * (12 * none + loops * (one - none))
    assert loops > 12 and run["train_flops"] == pytest.approx(flops, rel=1e-5)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_flat_models_are_as_large_or_as_expensive_as_the_loop(monkeypatch):
    """A comparison between models of unequal size."""
    monkeypatch.setattr(text, "read_pieces", lambda data: [bytes(range(250))] * 40)
    loop, flat = (VARIANTS["text"][name].build()[0] for name in ("loop-4", "flat-12"))
    assert flops_per_token(loop, 4, 128) == pytest.approx(flops_per_token(flat, 0, 128), rel=0.03)
    answers = dict(chains=(12, 20), circuits=(12, 24))
    for kind, (n_loops, context) in answers.items():  # context: the mean in a sequence
        models = {name: row.build()[0] for name, row in VARIANTS[kind].items()}
        for name in (name for name in models if "flat" in name or name == "injected"):
            loop, flat = models["loop"], models[name]
            size = num_params(loop), num_params(flat)
            if name != "flat-params":
                counted = (loop, n_loops), (flat, min(1, len(flat.recurrent)))
                size = [flops_per_token(model, n, context) for model, n in counted]
            assert size[1] == pytest.approx(size[0], rel=0.03), name


def test_ends_ask_what_they_say(monkeypatch):
    """A node short of the end, an edge that is scored otherwise, a training answer more than 5 hops
    away; a curriculum that skips ahead, or counts nearer queries; arms that get other batches."""
    task, n, rng = variants.Ends(), 20, torch.Generator().manual_seed(0)
    for frontier in (1, 3, 5):
        tokens, targets, _ = task.batch(rng, frontier)
        for row, wanted in zip(tokens[:8].tolist(), targets[:8].tolist(), strict=True):
            after = edges_of(row, n)
            assert wanted[:n] == [token % n for token in row[:n]]
            for query, target in zip(row[n:], wanted[n:], strict=True):
                end = walk(after, query, n)
                hops = sum(walk(after, query, k) != end for k in range(n))
                assert target == (end if hops <= frontier else -100)
    assert {task.draw_loops(rng, 5) for _ in range(99)} == {5, 6, 7, 8, 16}
    tokens, ends, hops = task.chains(rng)
    task.chains, task.model = lambda generator: (tokens, ends, hops), torch.nn.Module()
    for known, loss, old, new in ((3, 0.1, 3, 4), (2, 0.1, 3, 3), (3, 0.21, 3, 3), (5, 0, 5, 5)):
        said = torch.eye(n + 1)[torch.where(hops == known, ends, n).repeat(1, 2)]  # at that hop
        task.model.forward = lambda tokens, n_loops, said=said: (said, None)
        assert task.advance(old, 1, loss) == new
    monkeypatch.setattr(text, "read_pieces", lambda data: [bytes(range(250))] * 40)
    for kind, names in (
        ("chains", "ends one-loop flat-slow written-ends"), ("circuits", "loop one-loop flat-slow"),
        ("chains", "loop flat-told injected input-once"), ("text", "loop-2 loop-4 flat-6"),
    ):  # fmt: skip
        batches = []
        for _, task in (VARIANTS[kind][name].build() for name in names.split()):
            rng.manual_seed(0)
            batches.append(torch.cat([x for _ in range(3) for x in task.batch(rng, 4)[:2]]))
        assert all(torch.equal(batch, batches[0]) for batch in batches)


def test_tables_of_functions(monkeypatch):
    """An answer of another table or hop, also 64·n hops away; tables that are scored always, or
    never; other loops; a climb past the end, or while a start symbol is not learned."""
    task, rng = variants.Table(), torch.Generator().manual_seed(0)
    tokens, targets, T = task.batch(rng, 5)
    for (*f, start), wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert wanted[-1] == walk(f, start, T) and wanted[:-1] in (f, [-100] * 12)
    assert 3 < (targets[:, 0] != -100).sum() < 25  # of 96, an eighth
    drawn = [task.draw_loops(rng, 5) for _ in range(999)]
    assert {*drawn} == {1, 2, 3, 4, 5} and 0.55 < drawn.count(5) / 999 < 0.65
    assert [task.advance(*x) for x in ((8, 8, 0), (3, 3, 0.04), (3, 3, 0.06))] == [8, 4, 3]

    def answers(model, tokens, loops, threshold):  # right for 4 hops
        ends = {T: [walk(row, row[-1], min(T, 4)) for row in tokens.tolist()] for T in loops}
        return {T: torch.eye(12)[torch.tensor([at]).T.expand(-1, 13)] for T, at in ends.items()}, 0

    monkeypatch.setattr(variants, "logits_per_loop", answers)
    task.train_loops = 1
    assert (found := task.walk(None, None))[:4] == [1] * 4 and len(found) == 64 and found[4] < 0.9


def test_told_model_gets_what_the_loop_gets():
    """In training or test told a wrong T, or one it never met; one that hears T and does not feel
    it; a score for hops that its curriculum never came to."""
    model, task = VARIANTS["chains"]["flat-told"].build()
    task.test_size = 8
    for seed in range(6):
        tokens, _, T = Chains().batch(torch.Generator().manual_seed(seed), 12)
        assert task.batch(torch.Generator().manual_seed(seed), 12)[2] == 0 and task.embed.T == T
    for task.embed.T, frontier in ((2, 3), (3, 4)):  # 2 hops mastered: the frontier was not
        assert task.advance(3, 0, 0.1) == frontier
    near, task.embed.T = model(tokens[:1])[0], 5
    assert not torch.allclose(near, model(tokens[:1])[0])
    told, forward = [], task.embed.forward
    task.embed.forward = lambda tokens: told.append(task.embed.T) or forward(tokens)
    found = compare.measure("chains", model.eval(), task, 6)["accuracy"]
    assert told == [1, *range(1, 11)] and found[0][7:] == [None] * 4 and None not in found[0][:7]


def test_other_loops_by_hand():
    """An input that comes back, blocks without it, without noise or in another order; a state that
    outlives the written step, edges that are overwritten."""
    once, _ = VARIANTS["chains"]["input-once"].build()
    e, rope = once.run_prelude(tokens := Chains().test_set()[0][:2])
    r = once.run_blocks(once.recurrent, once.loop_norm(e), rope)
    torch.testing.assert_close(once.run_loop(e, rope, 1), once.state_update.diagonal_A() * e + r)
    stack, _ = VARIANTS["chains"]["injected"].build()
    e, rope = stack.run_prelude(tokens)
    h = torch.zeros_like(e)
    for block in stack.recurrent:
        h = stack.state_update(h, e, block(stack.loop_norm(h + e), rope))
    torch.testing.assert_close(stack.run_loop(e, rope, 1, states=(found := [])), h)
    assert not torch.equal(found[0], stack.run_loop(e, rope, 1, state_noise=0.1))
    written, _ = VARIANTS["chains"]["written"].build()
    asked = tokens.clone()
    for L in (1, 2, 3):
        logits, _ = written(tokens, n_loops=L)
        torch.testing.assert_close(logits, written(asked, n_loops=1)[0])
        asked[:, 20:] = logits[:, 20:].argmax(dim=-1)
    halted, _ = written(tokens, n_loops=3, halt_threshold=9.0)  # after the first
    torch.testing.assert_close(halted, written(tokens, n_loops=1)[0])


def test_halting_controls_spend_what_halting_spends():
    """A random exit that is given fewer loops: with accuracy = loops / 100 it scores the mean;
    edges taken for queries; a call that ends before its last token has halted."""
    model, task = VARIANTS["chains"]["loop"].build()
    task.test_size, task.halt_threshold = 8, 0.05  # no whole number of loops
    _, used = task.measure(model, [32], 0.05)
    accuracy, mean = {L: [L / 100] * 11 for L in range(1, 33)}, compare.mean(used)
    weights = torch.tensor([1.0] * 20 + [9.0] * 20)  # of edges and queries
    task.measure = lambda model, loops, halt: ({32: [(weights * halt).sum().item()]}, None)
    numbers = {"accuracy": accuracy, "halting": {"loops": used}}
    found = compare.halting_controls(model, task, numbers)
    assert 1 < mean < 32 and found["random exit"] == pytest.approx(mean / 100)
    assert 0 < found["fixed at the mean"] - found["random exit"] < 0.01
    slowest = logits_per_loop(model, task.test_set()[0], [32], 0.05)[1].amax(dim=1).float()
    assert found["loops run"] == {1: slowest.mean().item(), 32: slowest.max().item()}
    halted = [found["only edges halt"], found["only queries halt"]]
    assert halted == pytest.approx([20 * 0.05, 20 * 0.05 * 9])


def test_shapes_are_what_they_are_called_and_answers_walk(monkeypatch):
    """A "ring" with an end, a "tree" of chains, successors of another graph; accuracy after other
    loops than hops, at edges, or where queries halt, too."""
    for shape in variants.SHAPES:
        tokens, queries, successors = compare.shape_set(shape)
        for row, leads in zip(tokens.tolist(), successors.tolist(), strict=True):
            after = edges_of(row, 20)
            assert [after[i] for i in range(20)] == leads
            assert (sorted(row[20:]) == [*range(20)]) is (shape != "repeated queries")
            ends, targets = {i for i in after if after[i] == i}, len({*leads})
            rests = {walk(after, i, 20) for i in after}
            back = [k for k in range(1, 21) if walk(after, 0, k) == 0]  # hops from 0 to itself
            assert {
                "deep tree": len(ends) == 1 and rests == ends and targets < 18,
                "repeated queries": (len(ends), targets) == (2, 18),
                "random function": targets < 19,
                "two rings": targets == 20 and not ends and back == [10, 20],
                "ring": back == [20],
            }[shape]

    def answers(model, tokens, loops, threshold):
        """Right after T hops up to 8 loops, then a hop too few; always, if only edges halt."""
        far = torch.is_tensor(threshold) and threshold.gt(0).tolist() == [True] * 20 + [False] * 20
        ends = {T: compare.walk(queries, successors, T - (T > 8 and not far)) for T in loops}
        used = torch.tensor([4] * 15 + [512] * 25).expand_as(tokens)
        return {T: torch.eye(20)[torch.cat([queries, ends[T]], dim=1)] for T in loops}, used

    monkeypatch.setattr(variants, "SHAPES", (shape,))  # the last, a ring
    monkeypatch.setattr(compare, "logits_per_loop", answers)
    numbers = compare.measure_shapes(None, Chains())
    found, near = numbers["shapes"], (1, 2, 5, 8, 10, 16, 32, 64)
    assert found["ring, edges halt"] == dict.fromkeys(near, 1.0)
    assert found["ring"] == {T: float(T <= 8) for T in (*near, 128, 256, 512)}
    assert numbers["rest"] == {"loops of edges": 131, "edges rest": 0.75, "queries rest": 0}


def test_a_variant_differs_as_its_row_says(small, capsys):
    """A row that changes nothing; a misspelt name that trains nothing."""
    for flags, got in (("--only flat", "'flat'"), ("--only loop@x", "'x'"), ("--seeds -1", "-1")):
        with pytest.raises(SystemExit, match="2"):
            compare.main(flags.split())
        assert f": got {got}, expected" in capsys.readouterr().err
    for kind, name, differs in (
        ("chains", "one-loop", dict(prelude_lr=1.0, state_noise=0.0, n_loops=1)),
        ("circuits", "loop", dict(spectral_radius_target=0.5)),
        ("chains", "flat-slow@2", dict(lr_scale=2.0, n_loops=0)),
        ("chains", "flat-told-ten", dict(lr_scale=0.5, train_hops=10, steps=1200)),
        ("chains", "injected", dict(n_loops=1, state_noise=0.4, num_experts=8, prelude_lr=1.0)),
    ):
        model, task = variants.find(kind, name).build()
        assert differs.items() <= (vars(model.config) | task.settings()).items(), name
        if name == "one-loop":  # not as the identity: two blocks would be left to do the work
            assert model.prelude[0].attention.out_proj.weight.any()


def test_pages_are_what_the_program_writes(tmp_path, monkeypatch):
    """A number typed by hand, or one that outlived its run; no picture."""
    monkeypatch.chdir(tmp_path)
    report.write(publish=False)
    for page in (report.HERE / "RESULTS.md", report.HERE.parent / "README.md"):
        assert (tmp_path / "runs" / page.name).read_bytes() == page.read_bytes()
    assert (tmp_path / "runs/compare.png").read_bytes().startswith(b"\x89PNG")


def test_a_training_is_added_to_those_published(tmp_path, monkeypatch):
    """A line at the end, one that stands there twice, 17 digits, the loss of each step; a try of a
    few steps, or with other numbers, in the place of a run."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "write", lambda publish: [])
    run = {"attention": "mla", "history": {"loss": [1.0], "seconds": 1 / 3}, "out": "runs"}
    for seed, steps in ((10, 400), (2, 400), (2, 2), (2, 400)):
        path = tmp_path / f"chains-mla-seed{seed}.json"
        path.write_text(json.dumps(run | {"seed": seed, "steps": steps}))
        assert report.main(["--publish", str(path)]) == 0
    kept = '{"task": "chains", "attention": "mla", "seed": %d, "steps": %d, "train_seconds": '
    lines = [kept % name + "0.333333}" for name in ((2, 2), (2, 400), (10, 400))]
    assert sorted((tmp_path / "trainer.jsonl").read_text().splitlines()) == sorted(lines)
    path.write_text(json.dumps(run | {"seed": 3, "steps": 400, "set": ["d_model=8"]}))
    with pytest.raises(SystemExit, match="2"):
        report.main(["--publish", str(path)])
    (tmp_path / "trainer.jsonl").write_text(f"{lines[0]}\n{kept[:30]}\n")
    with pytest.raises(ValueError, match="trainer.jsonl, line 2: not a run"):
        report.load(tmp_path)


def test_cells_by_hand():
    """A spread that hides a seed; a dash for a number, a number where one seed was not asked; leads
    of the wrong sign, or over other seeds; unknown columns and rows; a new variant that is lost."""
    assert report.spread([1.0, 3.0, 2.0]) == "2.0 ± 2.5"  # 4.30 · 1 / √3
    assert report.spread([2.0, 2.0]) == "2.0" and report.spread([]) == "–"
    assert report.spread([98.0, 99.5, 100.0], percent=True) == "98.0 to 100.0"  # ± 2.5
    asked = {"accuracy": {"0": [1.0] * 6 + [None] * 5}}, {"accuracy": {"0": [1.0] * 11}}
    cells = [report.cell(name, asked, {}) for name in ("5 hops", "6 hops", "10 hops, 32 loops")]
    assert cells == ["100.0", "–", "–"]

    def rows(variant, *values):  # the seeds differ by 1, here and there
        return [dict(task="text", variant=variant, seed=seed, bits_per_byte={"2": bits + seed})
                for bits in values for seed in (1, 2, 3)]  # fmt: skip

    text = {f"flat-{n}": rows(f"flat-{n}", bits) for n, bits in ((3, 9), (6, 7), (12, 5))}
    text |= {"loop-2@2": rows("loop-2@2", 8), "flat-3@2": rows("flat-3@2", 0)}
    for name, worth, phi in (("loop-2@2", "4.24", "0.50"), ("flat-6", "–", "–")):
        cells = [report.cell(x, text[name], {"text": text}) for x in ("worth so many layers", "φ")]
        assert [cell.split(" ")[0] for cell in cells] == [worth, phi]
    assert report.cell("φ", text["loop-2@2"], {"text": {}}) == "–"  # no stacks, no line
    chains = [dict(task="chains", variant=name, seed=seed, accuracy={"12": [seed / 10 - x] * 11})
              for name, x in (("loop", 0), ("forgets", 0.25)) for seed in (3, 4)]  # fmt: skip
    lead = partial(report.cell, report.LEAD, results={"chains": {"loop": chains[:2]}})
    assert (lead(chains[3:]), lead(chains[:2])) == ("+25.0", "–")
    with pytest.raises(ValueError, match="^column: got 'hops', expected one of"):
        report.cell("hops", [{}], {})
    page = "<!-- table: text -->\n| variant | seeds |\n| --- | --- |\n| loop | |\n<!-- end -->"
    with pytest.raises(ValueError, match="^row of text: got 'loop'"):
        report.tables(page, {"text": text})
    ((_, _, made),) = report.tables(page, {"text": {"flat-6": text["flat-6"]}}, partial=True)
    assert made.endswith("| --- | --- |\n| flat-6 | 3 |\n")
