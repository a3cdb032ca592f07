# SPDX-License-Identifier: MIT
"""What a command of this project needs around its work: flags, files, devices.

Nothing is left half-written, and errors name their cause.
"""

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

from mythos import expect


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def say(text: str) -> None:
    """Print. A log on a full disk or a reader that has left must not end a run."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # nobody reads on: `| head`
    except (OSError, ValueError):  # ValueError: a stream that is closed
        pass


def accept_any_character() -> None:
    """A console or a file that is not UTF-8 gets a ? for what it cannot hold, and no error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # tests put other objects there
            stream.reconfigure(errors="replace")


def run_as_program(main: Callable[[], int | None]) -> None:
    """What `python -m experiments.NAME` does: Ctrl-C ends it in one line, without a traceback."""
    accept_any_character()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("Stopped.")
        sys.exit(130)


@contextmanager
def ctrl_c(pressed: Callable[[], None]):
    """Inside, Ctrl-C only calls `pressed`. Off the main thread, this changes nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: pressed())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def refusing(what: str):
    """Any failure inside becomes a ValueError of one line that starts with `what`."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {one_line(error)}") from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path`, then rename: whatever interrupts the write leaves the old file whole.

    Raises OSError that names the file, whatever `write` failed with: torch.save reports a full disk
    as a RuntimeError, and drawing needs matplotlib.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"tmp-{os.getpid()}-{path.name}")  # two runs may share a folder
    try:
        write(temporary)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())  # else a power cut may leave the new name without its bytes
        os.replace(temporary, path)
    except Exception as error:
        raise OSError(f"{path} could not be written: {one_line(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def writable_folder(name: str) -> Path:
    """The folder of that name, made if need be: refused now, and not after the training."""
    with refusing(f"--out: got {name!r}, expected a writable folder"):
        folder = Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        for left in folder.glob("tmp-*"):  # by a run that was killed in the middle of a save
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()
    return folder


def write_all(stem: Path, results: dict, draw: Callable[[dict, Path], None] | None) -> list[str]:
    """The JSON and, given `draw`, the picture; returns what went wrong."""
    text, failed = json.dumps(results, indent=1), []
    writers = {".json": lambda path: path.write_text(text, "utf-8")}
    if draw:
        writers[".png"] = lambda path: draw(results, path)
    for suffix, write in writers.items():
        try:
            write_atomically(stem.with_name(stem.name + suffix), write)  # a stem may have dots
        except OSError as error:  # a full disk, no matplotlib: no reason to lose the other file
            failed.append(str(error))
    return failed


def find_device(name: str | None) -> torch.device:
    """The device of that name, or the fastest there is. Raises ValueError if it cannot be used."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
    name = best if name is None else name
    expect(name.split(":")[0] in ("cpu", "cuda", "mps"), "--device", name, "cpu, cuda or mps")
    with refusing(f"--device: got {name!r}, expected a device of this machine"):
        return torch.empty(0, device=name).device


def describe_machine(device: torch.device) -> dict:
    """Where a result was measured."""
    machine, threads = platform.processor() or platform.machine(), torch.get_num_threads()
    return dict(device=str(device), machine=machine, threads=threads, torch=torch.__version__)


def make_parser(what: str, steps: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--attention", choices=("mla", "gqa"), default="mla")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=steps, help=f"default: {steps}")
    parser.add_argument("--out", default="runs", help="folder for the results")
    parser.add_argument("--resume", action="store_true", help="continue from --out's checkpoint")
    parser.add_argument("--device", help="default: cuda, mps or cpu, whichever is there first")
    return parser


def ask(task: str, checkpoint: Path) -> str:
    """The command that asks a trained model about an example."""
    examples = {"chains": "0-4 3-1 4-3 1-1 2-2", "circuits": "a=1 b=0 c=a^b"}
    example = examples.get(task, "def ")  # text, on any data
    return f'python -m experiments.ask "{example}" --checkpoint {checkpoint}'


def load_checkpoint(path: Path) -> dict:
    """A plain dict; no pickled code runs. Raises ValueError if `path` is no checkpoint of ours."""
    there = sorted(str(other) for other in path.parent.glob("*.pt"))
    expected = f"a file saved by training, such as {there[0]}" if there else "one: train first"
    expect(path.is_file(), "checkpoint", str(path), expected)
    with refusing(f"{path} is no checkpoint of this program"):
        damaged = zipfile.ZipFile(path).testzip()  # torch.load does not look at the checksums
        expect(damaged is None, "checksum", damaged, "the bytes that were written")
        saved = dict(torch.load(path, map_location="cpu", weights_only=True))
        dict(saved["run"]), saved["model"]  # KeyError: somebody else's checkpoint
    return saved
