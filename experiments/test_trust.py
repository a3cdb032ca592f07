# SPDX-License-Identifier: MIT
"""Can train_tiny.py be trusted with a long training? Bad numbers, full disks, damaged files, kills.

Each test's docstring names the mistake that it catches. Only with `-m slow`, since they take
longer: the drill that kills a training twenty times, the runs on two ranks, the missing display.
"""

import dataclasses
import io
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import train_tiny
from experiments import distributed, show, text
from experiments.command import run_as_program, write_atomically
from experiments.test_trainer import AnySteps
from mythos import RecurrentDepthTransformer

torch.set_num_threads(1)

ROOT = Path(train_tiny.__file__).parent
NAME = "chains-mla-seed0"
SHRINK = """if True:
    import dataclasses, torch, train_tiny
    torch.set_num_threads(1)
    full, Chains = train_tiny.Chains.config, train_tiny.Chains
    tiny = dict(d_model=32, n_heads=2, num_experts=4)
    Chains.config = lambda self, kind: dataclasses.replace(full(self, kind), **tiny)
    Chains.batch_size = Chains.test_size = 4
    from experiments.test_trainer import AnySteps
    Chains.steps = AnySteps(600)
"""


@pytest.fixture(autouse=True, scope="module")
def small():
    """Chains shrunk to what a test can train; any number of steps has the default's file names; and
    instead of the picture, which takes as long to draw as all the rest, as many bytes."""

    def draw(task, results, path):
        import matplotlib  # noqa: F401

        path.write_bytes(bytes(100_000))

    full, tiny = train_tiny.Chains.config, dict(d_model=32, n_heads=2, num_experts=4)
    config = lambda self, kind: dataclasses.replace(full(self, kind), **tiny)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tiny.Chains, "config", config)
        patch.setattr(train_tiny.Chains, "steps", AnySteps(600))
        patch.setattr(train_tiny.Chains, "batch_size", 4)
        patch.setattr(train_tiny.Chains, "test_size", 4)
        patch.setattr(show, "draw_chains", draw)
        yield


def main(out, *flags):
    return train_tiny.main(["--out", str(out), *flags])


def after_step(monkeypatch, number, do):
    """Call do() when that step's update is done, and before it is saved."""
    steps = []

    def learned(self, n_loops, loss):
        steps.append(loss)
        if len(steps) == number:
            do()

    monkeypatch.setattr(train_tiny.Chains, "learned", learned)


def model_of_next_run(monkeypatch):
    """A list that the model which `main` makes will be put into."""
    models, prepare = [], train_tiny.Chains.prepare
    spy = lambda self, model: (models.append(model), prepare(self, model))  # noqa: E731
    monkeypatch.setattr(train_tiny.Chains, "prepare", spy)
    return models


# ---- flags ----


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--steps", "0"], "--steps: got 0"),
        (["--steps", "-3"], "--steps: got -3"),
        (["--steps", "1.5"], "invalid int value: '1.5'"),
        (["--data", "x"], "unrecognized arguments: --data x"),
        (["text", "--data", "no/such/file"], "--data: got 'no/such/file', expected"),
        (["text", "--data", ""], "--data: got '', expected a path"),
        (
            ["text", "--data", "{tmp}/empty"],
            "--data: got (0, 0), expected 258 bytes or more",
        ),
        (["text", "--data", "{tmp}/file"], "--data: got (34, 6), expected 258 bytes"),
        (["text", "--data", "x" * 5000], "xxx', expected readable files"),
        (["--resume"], "chains-mla-seed0.pt', expected a checkpoint; to start, leave"),
        (["--device", "abacus"], "--device: got 'abacus', expected cpu, cuda or mps"),
        (["--device", "meta"], "--device: got 'meta', expected cpu, cuda or mps"),
        (["--device", "cuda:99"], "--device: got 'cuda:99', expected a device of this"),
        (["--device", ""], "--device: got '', expected cpu, cuda or mps"),
        (["--attention", "mha"], "invalid choice: 'mha'"),
        (["--task", "text"], "unrecognized arguments: --task text"),
        (["--seed", "one"], "invalid int value: 'one'"),
        (["--seed", "-1"], "--seed: got -1, expected a number from 0"),  # torch: as 2^64 − 1
        (["--seed", str(2**64)], "--seed: got 18446744073709551616, expected"),
        (["--out", "{tmp}/file"], "file', expected a writable folder"),
        (["--out", "{tmp}/file/below"], "below', expected a writable folder"),
        (["--out", "/proc"], "--out: got '/proc', expected a writable folder"),  # root cannot, too
        (["--out", ""], "--out: got '', expected a path"),
        (["--faster"], "unrecognized arguments: --faster"),
    ],
)
def test_bad_flags_are_refused(flags, message, tmp_path, capsys, monkeypatch):
    """A flag that is misread silently, or refused only after the training: each ends in exit code
    2 and names itself, with what it got and what was expected."""
    monkeypatch.setattr(train_tiny.Training, "step", lambda *_: pytest.fail("trained"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"0123456789" * 4)
    program = text.main if flags[0] == "text" else train_tiny.main
    flags = [f.format(tmp=tmp_path) for f in flags if f != "text" or program is train_tiny.main]
    with pytest.raises(SystemExit) as stop:
        program(["--out", str(tmp_path), *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and "Traceback" not in error


# ---- numbers that are no longer finite ----


def test_a_loss_that_is_nan_stops_before_the_step(monkeypatch, tmp_path, capsys):
    """A training that goes on with nan, and overwrites the last good checkpoint with it."""
    monkeypatch.setattr(train_tiny, "SAVE_EVERY", 2)
    models = model_of_next_run(monkeypatch)
    after_step(monkeypatch, 3, lambda: models[0].state_update.b.data[5:].fill_(math.inf))
    assert main(tmp_path, "--steps", "6") == 3
    told = capsys.readouterr().err
    numbers = r"loss nan, gradient norm nan, rho\(A\) 0\.\d+, gain of the loop nan"
    kept = rf"{re.escape(str(tmp_path))}/{NAME}\.pt is kept"
    assert re.fullmatch(rf"Stopped in step 4, at \d+ loops: {numbers}; {kept}\.\n", told), told
    saved = train_tiny.load_checkpoint(tmp_path / f"{NAME}.pt")
    assert saved["step"] == 2 and all(v.isfinite().all() for v in saved["model"].values())
    assert models[0].embed.weight.isfinite().all(), "the step was taken"


def test_a_gradient_that_is_not_finite_stops_before_the_step(monkeypatch, tmp_path, capsys):
    """A finite loss with an infinite gradient: clipping would make every gradient nan."""
    models, prepare = [], train_tiny.Chains.prepare

    def with_bad_gradient(self, model):
        prepare(self, model)
        model.head.weight.register_hook(lambda grad: grad * math.inf)
        models.append((model, {k: v.clone() for k, v in model.state_dict().items()}))

    monkeypatch.setattr(train_tiny.Chains, "prepare", with_bad_gradient)
    assert main(tmp_path, "--steps", "2") == 3
    told = capsys.readouterr().err
    numbers = r"loss \d\.\d+, gradient norm (nan|inf), rho"
    assert re.search(rf"step 1, at \d+ loops: {numbers}", told), told
    assert re.search(rf"gain of the loop \d+\.\d+; .*{NAME}\.pt is kept\.\n$", told), told
    model, before = models[0]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


def test_parameters_that_are_not_finite_are_never_saved(monkeypatch, tmp_path, capsys):
    """The last update before a save: no later loss would have told."""
    monkeypatch.setattr(train_tiny, "SAVE_EVERY", 2)
    models = model_of_next_run(monkeypatch)
    after_step(monkeypatch, 4, lambda: models[0].head.weight.data[0].fill_(math.nan))
    assert main(tmp_path, "--steps", "4") == 3
    told = capsys.readouterr().err
    assert re.search(r"step 4, at \d+ loops: parameter norm nan, rho\(A\)", told), told
    assert train_tiny.load_checkpoint(tmp_path / f"{NAME}.pt")["step"] == 2


def test_a_model_without_a_loop_stops_too(tmp_path):
    """Asking a flat twin for rho(A): the message would die of a ValueError."""
    model = RecurrentDepthTransformer(prelude_layers=1, recurrent_layers=0)
    training = train_tiny.Training(
        model, train_tiny.Chains(), steps=1, seed=0, checkpoint=tmp_path / "no"
    )
    training.last = torch.zeros(1, 2, dtype=torch.long), 0
    with pytest.raises(FloatingPointError, match="at 0 loops: loss nan; nothing"):
        training.expect_finite({"loss": math.nan})


def test_watching_the_numbers_costs_no_extra_wait_for_a_gpu(monkeypatch, tmp_path):
    """An .item() for the loss, another for the norm: each makes a GPU wait."""
    waits = []
    for name in ("item", "tolist", "__bool__", "__float__"):
        real = getattr(torch.Tensor, name)

        def count(tensor, real=real):
            waits.append(sys._getframe(1).f_code.co_name)
            return real(tensor)

        monkeypatch.setattr(torch.Tensor, name, count)
    assert main(tmp_path, "--steps", "7") == 1
    # one in each step; when it saves, first and last, also the parameters' norm
    assert waits.count("step") == 7 and waits.count("save") == 2, waits


# ---- output that cannot be printed ----


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437"])
def test_no_character_ends_a_run(encoding, monkeypatch, tmp_path):
    """× or → on a console that is not UTF-8: exit 2, "bad arguments", after the training."""
    console = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding))
    with pytest.raises(SystemExit) as end:
        run_as_program(lambda: main(tmp_path, "--steps", "1"))
    out = console.buffer.getvalue().decode(encoding)
    assert end.value.code == 1 and out.rstrip().endswith("FAIL"), out
    assert "Measuring, up to a minute " in out  # a line is not left out for one character
    assert files(tmp_path) == [f"{NAME}{suffix}" for suffix in (".json", ".png", ".pt")]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), BrokenPipeError(), ValueError()])
def test_a_line_that_cannot_be_printed_costs_only_that_line(error, monkeypatch, tmp_path):
    """A log on a full disk, or `| head`, that ends the training: results after one step of 600."""

    class Full(io.StringIO):
        def write(self, line):
            raise error

    monkeypatch.setattr(sys, "stdout", Full())
    assert main(tmp_path, "--steps", "3") == 1
    assert json.loads((tmp_path / f"{NAME}.json").read_text())["steps"] == 3
    assert train_tiny.load_checkpoint(tmp_path / f"{NAME}.pt")["step"] == 3


def test_an_error_of_ours_is_not_blamed_on_the_flags(monkeypatch, tmp_path):
    """Any ValueError called a bad argument; Ctrl-C's handler set outside the main thread."""
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(tmp_path, "--steps", "1")))
    thread.start()
    thread.join()
    assert codes == [1]

    def broken(*_):
        raise ValueError("a bug")

    monkeypatch.setattr(train_tiny.Chains, "evaluate", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(tmp_path / "other", "--steps", "1")


def test_ctrl_c_while_measuring_says_what_is_saved(monkeypatch, tmp_path, capsys):
    """A traceback, and no word about the trained model."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_tiny.Chains, "evaluate", interrupted)
    assert main(tmp_path, "--steps", "1") == 130
    assert "--resume" in capsys.readouterr().out


@pytest.mark.slow
def test_a_reader_that_leaves_ends_a_table_quietly():
    """`python mythos.py | head`: a traceback after the lines that were asked for."""
    command = f"{sys.executable} mythos.py | head -n 1"
    run = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.startswith("Mythos sizes") and run.stderr == ""


def test_ctrl_c_leaves_no_traceback(capsys):
    """Ctrl-C where nothing is trained: pages of Python."""

    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_as_program(main)
    assert stop.value.code == 130 and capsys.readouterr() == ("Stopped.\n", "")


# ---- runs that share a folder ----


def test_what_a_killed_save_left_is_removed_and_a_running_one_is_not(tmp_path):
    """Files of 10 MB that nobody knows, one for each kill; another run's save, taken for one."""
    for name, age in (("tmp-1-old", 7200), ("tmp-2-new", 0)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    assert main(tmp_path, "--steps", "1") == 1
    assert [name for name in files(tmp_path) if "tmp" in name] == ["tmp-2-new"]


def test_no_run_overwrites_another(monkeypatch, tmp_path, capsys):
    """`--steps 1`, or the same command typed again, that costs a trained checkpoint."""
    assert main(tmp_path, "--steps", "2") == 1
    kept = (tmp_path / f"{NAME}.pt").read_bytes()
    with pytest.raises(SystemExit):
        main(tmp_path, "--steps", "2")
    assert f"{NAME}.pt', expected no such file yet: --resume" in capsys.readouterr().err
    monkeypatch.setattr(train_tiny.Chains, "steps", 2)
    assert main(tmp_path, "--steps", "1") == 1
    assert (tmp_path / f"{NAME}-steps1.pt").is_file()
    assert (tmp_path / f"{NAME}.pt").read_bytes() == kept
    assert "s left" in capsys.readouterr().out


def test_progress_fits_a_screen(tmp_path, capsys):
    """Lines that wrap."""
    assert main(tmp_path, "--steps", "1") == 1
    out = capsys.readouterr().out
    assert "step    1/1" in out and max(map(len, out.splitlines())) <= 100 + len(str(tmp_path))


# ---- disks and pictures ----


@pytest.fixture
def disk():
    """disk(bytes): from now on no file may grow beyond; disk(None): as before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))

    yield limit
    limit(None)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_costs_a_checkpoint_not_the_training(disk, monkeypatch, tmp_path, capsys):
    """A periodic save that ends the training, spoils the old checkpoint or leaves a half file."""
    monkeypatch.setattr(train_tiny, "SAVE_EVERY", 2)
    seen = []

    def look():
        disk(None)
        seen.append((train_tiny.load_checkpoint(tmp_path / f"{NAME}.pt")["step"], files(tmp_path)))

    steps = {3: lambda: disk(40_000), 5: look}
    learned = lambda self, *_: steps.pop(calls.append(0) or len(calls), lambda: None)()  # noqa: E731
    calls = []
    monkeypatch.setattr(train_tiny.Chains, "learned", learned)
    assert main(tmp_path, "--steps", "6") == 1
    out = capsys.readouterr().out
    assert seen == [(2, [f"{NAME}.pt"])]
    assert out.count("warning: ") == 1
    assert f"warning: step 4: {tmp_path}/{NAME}.pt could not be written: " in out
    assert train_tiny.load_checkpoint(tmp_path / f"{NAME}.pt")["step"] == 6


def test_a_disk_full_at_the_end_still_reports(disk, tmp_path, capsys):
    """The result of a whole training lost because its last checkpoint could not be written."""
    disk(40_000)
    assert main(tmp_path, "--steps", "1") == 4
    disk(None)
    out = capsys.readouterr().out
    assert "Accuracy (%)" in out and out.endswith("FAIL\n")
    for step in ("step 0: ", "step 1: "):
        assert f"warning: {step}{tmp_path}/{NAME}.pt could not be written: " in out
    assert f"warning: {tmp_path}/{NAME}.png could not be written: " in out
    assert files(tmp_path) == [f"{NAME}.json"]
    assert json.loads((tmp_path / f"{NAME}.json").read_text())["steps"] == 1


def test_ctrl_c_on_a_full_disk_does_not_claim_to_have_saved(disk, monkeypatch, tmp_path, capsys):
    """ "Stopped; ... is saved", when it is not."""
    after_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    disk(40_000)
    assert main(tmp_path, "--steps", "9") == 4
    disk(None)
    out = capsys.readouterr().out
    assert "could not be written" in out and "is saved" not in out and files(tmp_path) == []


@pytest.mark.parametrize("blocked", [".pt", ".json", ".png"])
def test_each_file_is_written_whatever_happens_to_the_others(blocked, tmp_path, capsys):
    """One file that cannot be written taking the following ones with it."""
    (tmp_path / f"{NAME}{blocked}" / "in the way").mkdir(parents=True)
    assert main(tmp_path, "--steps", "1") == 4
    out = capsys.readouterr().out
    warned = 2 if blocked == ".pt" else 1  # before the first step, and after the last
    assert out.count("warning") == warned and f"{NAME}{blocked} could not be written" in out
    assert files(tmp_path) == [f"{NAME}{suffix}" for suffix in (".json", ".png", ".pt")]
    assert all((tmp_path / name).is_file() for name in files(tmp_path) if blocked not in name[-5:])


def test_without_matplotlib_only_the_picture_is_missing(monkeypatch, tmp_path, capsys):
    """An ImportError after the training."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(tmp_path, "--steps", "1") == 4
    out = capsys.readouterr().out
    assert f"{NAME}.png could not be written: ModuleNotFoundError" in out
    assert files(tmp_path) == [f"{NAME}.json", f"{NAME}.pt"] and out.endswith("FAIL\n")


@pytest.mark.slow
def test_pictures_need_no_display(tmp_path):
    """A server without a screen, whose matplotlib is told to open windows."""
    code = SHRINK + "    raise SystemExit(train_tiny.main(['--steps', '1']))"
    env = {k: v for k, v in os.environ.items() if "DISPLAY" not in k}
    env |= {"MPLBACKEND": "TkAgg", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (1, "")
    assert (tmp_path / "runs" / f"{NAME}.png").read_bytes().startswith(b"\x89PNG")


def test_interrupted_write_leaves_the_old_file_whole(tmp_path):
    """A writer that opens the target itself: a crash then costs the old checkpoint."""
    path = tmp_path / "file"
    path.write_text("old")

    def crash(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, crash)
    assert path.read_text() == "old"


def test_a_write_is_on_the_disk_before_it_gets_the_name(monkeypatch, tmp_path):
    """A power cut that leaves the new name without its bytes, and the old file gone."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        spy = lambda *a, name=name, real=real: (calls.append(name), real(*a))  # noqa: E731
        monkeypatch.setattr(os, name, spy)
    write_atomically(tmp_path / "file", lambda path: path.write_text("new"))
    assert calls == ["fsync", "replace"] and files(tmp_path) == ["file"]


def test_two_runs_with_one_out_do_not_mix_their_files(tmp_path):
    """One name for everybody's temporary file: two writers would fill it together."""
    path, size = tmp_path / "file", 300_000
    path.write_bytes(b"b" * size)

    def write(letter):
        def slowly(temporary):
            with open(temporary, "wb") as file:
                for _ in range(3):
                    file.write(letter * (size // 3))
                    file.flush()
                    time.sleep(0.001)

        write_atomically(path, slowly)

    child = os.fork()
    if child == 0:
        try:
            for _ in range(60):
                write(b"b")
            os._exit(0)
        finally:
            os._exit(1)
    for _ in range(60):
        write(b"a")
        assert path.read_bytes() in (b"a" * size, b"b" * size)
    assert os.waitpid(child, 0)[1] == 0 and files(tmp_path) == ["file"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The bytes of a checkpoint after 2 steps of 2."""
    folder = tmp_path_factory.mktemp("checkpoint")
    assert main(folder, "--steps", "2") == 1
    return (folder / f"{NAME}.pt").read_bytes()


def same(a, b):
    """Two checkpoints, equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def refusal(folder, capsys):
    """The one line with which `--resume` refuses; fails if it does anything else."""
    with pytest.raises(SystemExit) as stop:
        main(folder, "--steps", "2", "--resume")
    out, error = capsys.readouterr()
    last = error[error.index("error: ") :]
    assert stop.value.code == 2 and last.count("\n") == 1 and "Traceback" not in error, error
    return last


def test_damaged_checkpoints_are_refused(checkpoint, tmp_path, capsys):
    """A flipped bit in the weights, which torch.load does not notice; a file cut anywhere."""
    path, rng, harmless = tmp_path / f"{NAME}.pt", random.Random(0), 0
    path.write_bytes(checkpoint)
    whole = train_tiny.load_checkpoint(path)
    for _ in range(15):
        path.write_bytes(checkpoint[: rng.randrange(len(checkpoint))])
        assert "is no checkpoint of this" in refusal(tmp_path, capsys)
    for _ in range(60):
        altered = bytearray(checkpoint)
        altered[rng.randrange(len(altered))] ^= 1 << rng.randrange(8)
        path.write_bytes(altered)
        try:
            saved = train_tiny.load_checkpoint(path)
        except ValueError as error:
            assert "is no checkpoint" in str(error)
        else:  # it hit the padding between the tensors
            harmless += 1
            assert same(saved, whole)
    assert harmless < 20


FOREIGN = {
    "a list": lambda saved: [1, 2, 3],
    "a tensor": lambda saved: torch.zeros(3),
    "somebody else's dict": lambda saved: {"state_dict": saved["model"], "epoch": 3},
    "no run": lambda saved: saved | {"run": None},
    "no optimizers": lambda saved: {k: v for k, v in saved.items() if k != "optimizers"},
    "one optimizer": lambda saved: saved | {"optimizers": saved["optimizers"][:1]},
    "a step beyond the end": lambda saved: saved | {"step": 99},
    "a step that is no number": lambda saved: saved | {"step": "two"},
    "a generator of another kind": lambda saved: saved | {"generator": torch.zeros(3).byte()},
    "weights of another shape": lambda saved: (
        saved | {"model": saved["model"] | {"head.weight": torch.zeros(420, 16)}}
    ),
    "a weight too many": lambda saved: (
        saved | {"model": saved["model"] | {"value_head": torch.zeros(3)}}
    ),
    "a weight missing": lambda saved: (
        saved | {"model": {k: v for k, v in saved["model"].items() if k != "head.weight"}}
    ),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_checkpoints_are_refused(what, checkpoint, tmp_path, capsys):
    """A traceback, or a resumed run that takes what does not fit and goes on with other numbers."""
    path = tmp_path / f"{NAME}.pt"
    path.write_bytes(checkpoint)
    torch.save(FOREIGN[what](train_tiny.load_checkpoint(path)), path)
    assert f"{path} is no checkpoint of this" in refusal(tmp_path, capsys)


@pytest.mark.parametrize(
    "flags, differs",
    [
        (["--attention", "gqa"], "config"),
        (["--seed", "1"], "seed"),
        (["--steps", "3"], "steps"),
        (["--data", "{tmp}/other/text"], "data_crc"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(flags, differs, monkeypatch, tmp_path, capsys):
    """Two runs mixed: a renamed checkpoint, or other text in the middle of a training."""
    monkeypatch.setattr(text.Text, "context", 32)
    monkeypatch.setattr(text.Text, "steps", AnySteps(900))
    monkeypatch.setattr(text.Text, "batch_size", 1)
    monkeypatch.setattr(text.Text, "evaluate", lambda *_: {"checks": []})
    monkeypatch.setattr(text.Text, "describe", lambda *_: "")
    for name in ("text", "other/text"):  # one name, two texts
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"Some {name}, again and again. " * 200)
    run, first = train_tiny.main, []
    if "--data" in flags:
        run, first = text.main, ["--data", f"{tmp_path}/text"]
    out = ["--out", str(tmp_path), "--steps", "2"]
    assert run([*out, *first]) in (0, 1)
    stem = f"{'text-text' if first else 'chains'}-{'gqa' if 'gqa' in flags else 'mla'}"
    (saved,) = tmp_path.glob("*.pt")
    saved.rename(tmp_path / f"{stem}-seed{1 if '--seed' in flags else 0}.pt")
    with pytest.raises(SystemExit) as stop:
        run([*out, "--resume", *(f.format(tmp=tmp_path) for f in flags)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"error: --resume, {differs}: got " in error
    assert "expected the checkpoint's " in error and "Traceback" not in error


class Malicious:
    """What unpickling runs."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_unpickled(zipped, checkpoint, tmp_path, capsys):
    """A checkpoint from a stranger that runs his code."""
    trap = tmp_path / "trap"
    (tmp_path / f"{NAME}.pt").write_bytes(checkpoint)
    saved = train_tiny.load_checkpoint(tmp_path / f"{NAME}.pt") | {"extra": Malicious(trap)}
    torch.save(saved, tmp_path / f"{NAME}.pt", _use_new_zipfile_serialization=zipped)
    assert "is no checkpoint of this" in refusal(tmp_path, capsys)
    assert not trap.exists()
    torch.load(tmp_path / f"{NAME}.pt", weights_only=False)
    assert trap.exists(), "the trap would not have caught anything"


def test_resuming_a_finished_run_only_reports(checkpoint, monkeypatch, tmp_path):
    """Steps beyond the last one; a checkpoint written again for nothing; the time it took, lost."""
    path = tmp_path / f"{NAME}.pt"
    path.write_bytes(checkpoint)
    monkeypatch.setattr(train_tiny.Chains, "batch", lambda *_: pytest.fail("trains"))
    numbers = []
    for _ in range(2):
        assert main(tmp_path, "--steps", "2", "--resume") == 1
        numbers.append(json.loads((tmp_path / f"{NAME}.json").read_text()))
    assert path.read_bytes() == checkpoint
    assert numbers[0]["accuracy"] == numbers[1]["accuracy"]
    took = train_tiny.load_checkpoint(path)["seconds"]
    assert numbers[0]["train_seconds"] == numbers[1]["train_seconds"] == took > 0


# ---- kill −9 ----

# One life of the training per fork. Each save first tells the parent through a pipe, writes half,
# waits, and writes the rest: a kill soon after the message hits a half-written file.
DRILL = (
    SHRINK
    + """
    import io, os, random, signal, sys, time
    from pathlib import Path
    # All imports, once for all lives.
    train_tiny.main(["--steps", "1", "--out", sys.argv[1] + "-warm-up"])
    train_tiny.SAVE_EVERY, steps, wanted_kills = 1, 80, 22
    save, out, log = torch.save, Path(sys.argv[1]), Path(sys.argv[1]) / "losses"
    losses, sender = [], None

    def learned(self, n_loops, loss):
        self.frontier = min(self.frontier + 1, 4)
        losses.append(loss)

    def slow_save(state, path):
        with open(log, "a") as file:
            if losses:  # not before the first step
                file.write(f"{state['step']} {losses[-1]!r}\\n")
        buffer = io.BytesIO()
        save(state, buffer)
        os.write(sender, b".")
        half = len(buffer.getvalue()) // 2
        with open(path, "wb") as file:
            file.write(buffer.getvalue()[:half])
            file.flush()
            time.sleep(0.02)
            file.write(buffer.getvalue()[half:])

    Chains.learned, torch.save = learned, slow_save

    def live(flags):
        global sender
        receiver, sender = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receiver)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os._exit(train_tiny.main(["--steps", str(steps), "--out", str(out), *flags]))
        os.close(sender)
        return child, receiver

    out.mkdir(exist_ok=True)
    checkpoint, rng = out / "chains-mla-seed0.pt", random.Random(0)
    kills = during_a_write = last = 0
    while kills < (wanted_kills if sys.argv[2] == "kill" else 0):
        child, receiver = live(["--resume"] if checkpoint.exists() else [])
        for _ in range(rng.randint(1, 4)):
            assert os.read(receiver, 1), "the training ended before enough kills"
        time.sleep(rng.uniform(0.0, 0.04))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        os.close(receiver)
        kills += 1
        during_a_write += (out / f"tmp-{child}-{checkpoint.name}").exists()
        if checkpoint.exists():
            step = train_tiny.load_checkpoint(checkpoint)["step"]
            assert step >= last
            last = step
    child, receiver = live(["--resume"] if checkpoint.exists() else [])
    while os.read(receiver, 100):
        pass
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(kills, during_a_write, last, code)
"""
)


@pytest.mark.slow
def test_killed_twenty_times_a_training_ends_bit_identical(tmp_path):
    """A checkpoint that a kill −9 can spoil, or that forgets a part of the training."""
    told = []
    for name, how in (("straight", "none"), ("killed", "kill")):
        command = [sys.executable, "-c", DRILL, str(tmp_path / name), how]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        run = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0 and run.stderr == "", run.stderr
        told.append([int(number) for number in run.stdout.splitlines()[-1].split()])
    print(f"kills {told[1][0]}, of them during a write {told[1][1]}, last at step {told[1][2]}")
    assert told[0] == [0, 0, 0, 1] and told[1][0] == 22 and told[1][3] == 1
    assert 3 <= told[1][1] <= 19, "kills that hit a write, and kills that did not"

    losses, tables, states = [], [], []
    for name in ("straight", "killed"):
        folder = tmp_path / name
        losses.append(set((folder / "losses").read_text().splitlines()))
        tables.append(json.loads((folder / f"{NAME}.json").read_text()))
        states.append(train_tiny.load_checkpoint(folder / f"{NAME}.pt"))
        del tables[-1]["seconds"], tables[-1]["train_seconds"], states[-1]["seconds"]
    assert losses[0] == losses[1] and len(losses[0]) == 80  # a step done twice had one loss
    assert tables[0] == tables[1]
    assert same(*states)


# ---- several processes ----


def launched(ranks, *flags):
    """What experiments/distributed.py prints, run by so many processes; none may wait for ever."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "experiments.distributed", *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_one_process_trains_the_same_in_every_way(monkeypatch, capsys):
    """A trainer that has moved on from experiments/distributed.py, found by slow tests only; a loss
    or a gradient that micro-batches, DDP or FSDP change."""
    train, numbers = distributed.train, []
    one_step = lambda *args, steps, **how: train(*args, steps=1, **how)  # noqa: E731
    monkeypatch.setattr(distributed, "train", one_step)
    for flags in ([], ["--parts", "2"], ["--ddp"], ["--shard", "--parts", "2"]):
        distributed.main(flags)
        step, bias = capsys.readouterr().out.splitlines()
        numbers.append([float(step.split()[i]) for i in (2, 4)])
        assert "-0.01" in bias
    torch.testing.assert_close(numbers, [numbers[0]] * 4, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_two_ranks_train_like_one(capsys):
    """A mean of means, a gradient averaged instead of summed, a router steered by its own rank's
    load, or by rank 0's that DDP puts in its place; sharded weights that lose the gradient of all
    loops but one, or of all micro-batches but one."""
    wanted = launched(1)
    assert len(wanted) == 9
    for flags in ([], ["--shard", "--parts", "2"], ["--ddp", "--parts", "2"]):
        got = launched(2, *flags)
        worst = []
        for column in (2, 4):  # of the gradient norm, and of the loss
            pairs = [[float(x.split()[column]) for x in lines[:-1]] for lines in (wanted, got)]
            worst.append(max(abs(a / b - 1) for a, b in zip(*pairs, strict=True)))
        with capsys.disabled():
            print("\n2 ranks {}: norms and losses differ by {:.1e}, {:.1e}".format(flags, *worst))
        assert max(worst) < 1e-5 and got[-1] == wanted[-1] and "-0." in got[-1]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--shard"]])
def test_a_rank_that_halts_waits_for_nobody(flags):
    """A message in each loop: the rank that has halted and the one that has not both hang."""
    assert launched(2, "--halt", *flags) == ["loops used on each rank: [1, 64]"]
