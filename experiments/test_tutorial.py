# SPDX-License-Identifier: MIT
"""tutorial.ipynb runs top to bottom, its checks print True, and what it stores is what it prints.

pytest experiments/test_tutorial.py            the stored notebook
pytest -m slow experiments/test_tutorial.py    runs it, too: minutes
"""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import torch

import mythos
from experiments.report import RESULTS, accuracy_at, load_results, spread
from train_tiny import mean

ROOT = Path(__file__).resolve().parent.parent
CELLS = json.loads((ROOT / "tutorial.ipynb").read_text("utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
TEXT = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
FOLDED = re.findall(r"<details>(.*?)</details>", TEXT, re.DOTALL)
SOLUTIONS = [re.search(r"```python\n(.*?)```", f, re.DOTALL)[1] for f in FOLDED]
# What a solution prints, where its answer quotes that.
QUOTED = [re.search(r"```text\n(.*?)```", f, re.DOTALL) for f in FOLDED]


def stored_text(cell: dict) -> str:
    return "".join("".join(out.get("text", [])) for out in cell["outputs"])


def checks(printed: str) -> list[str]:
    """The verdicts of all checks: True, False, or, in the exercises, not yet."""
    return re.findall(r": (True|False|not yet)$", printed, re.MULTILINE)


def test_stored_outputs_are_of_one_whole_run():
    """Cells run out of order, an error or a warning kept, a check that failed, no outputs."""
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    kinds = {out["output_type"] for cell in CODE for out in cell["outputs"]}
    assert kinds <= {"stream", "display_data"}
    assert all(out.get("name") != "stderr" for cell in CODE for out in cell["outputs"])
    verdicts = checks("".join(map(stored_text, CODE)))
    assert "False" not in verdicts and verdicts.count("True") >= 30


def test_every_chapter_and_section_that_claims_also_checks():
    """A claim without a check; a chapter without a picture or a number."""
    sections = re.split(r"(?m)^###? ", "\n".join(map(cell_text, CELLS)))
    assert sum(s[0].isdigit() for s in sections) > 20
    for section in sections:
        assert "**Claim" not in section or checks(section), section[:60]
    chapters = re.findall(r"(?m)^## (\d)\. ", TEXT)
    assert chapters == [str(i) for i in range(1, 10)]


def cell_text(cell: dict) -> str:
    source = "".join(cell["source"])
    return source if cell["cell_type"] == "markdown" else stored_text(cell)


def test_contents_lead_to_headings():
    """A link in the table of contents that goes nowhere."""
    headings = {h.replace(" ", "-") for h in re.findall(r"(?m)^## (.+)$", TEXT)}
    links = re.findall(r"\]\(#(.+?)\)", TEXT)
    assert len(links) == 9 and set(links) == headings


def test_it_imports_the_file_and_redefines_nothing():
    """A notebook that teaches another implementation than the one that the tests trust."""
    source = "\n".join("".join(cell["source"]) for cell in CODE)
    assert "import mythos" in source
    taught = {name for name, thing in vars(mythos).items() if callable(thing)}
    defined = re.findall(r"(?m)^(?:class|def) (\w+)", source + "\n".join(SOLUTIONS))
    assert defined and not taught & set(defined)


def test_cells_are_short():
    """A cell that nobody reads."""
    lengths = [len("".join(cell["source"]).splitlines()) for cell in CODE]
    assert max(lengths) <= 22 and sorted(lengths)[len(lengths) // 2] <= 15
    assert all(len(line) <= 100 for cell in CODE for line in "".join(cell["source"]).splitlines())


def test_folded_answers_quote_the_results():
    """A number in exercises 9.1 and 9.2 that the JSON files of all seeds do not give."""
    chains = load_results("chains", RESULTS)
    for row, name in (
        ("without", "loop"),
        ("with the embedding", "loop-index"),
        ("with a LoRA per loop", "loop-lora"),
    ):
        runs = chains[name]
        columns = (
            [100 * accuracy_at(run, 12)[10] for run in runs],
            [100 * accuracy_at(run, 32)[10] for run in runs],
            [100 * mean(run["halting"]["accuracy"]) for run in runs],
            [100 * run["further"]["ring, 64 hops"] for run in runs],
        )
        line = " | ".join([row, str(len(runs)), *map(spread, columns)])
        assert f"| {line} |" in TEXT, name


def test_nothing_is_left_to_be_written():
    """A placeholder in capitals, an empty answer."""
    source = "\n".join("".join(cell["source"]) for cell in CELLS)
    assert not re.search(r"TODO|FIXME|XXX|TEXT[A-Z]+|[A-Z]+TEXT|ANSWER|@@", source)
    assert len(FOLDED) == 4
    assert all(len(re.sub(r"```.*?```", "", f, flags=re.DOTALL)) > 200 for f in FOLDED)


def numbers(printed: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", printed)]


@pytest.mark.slow
def test_it_runs_and_every_check_prints_true(monkeypatch, capsys):
    """A cell that fails, a check that prints False, a solution that does not solve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    threads, names = torch.get_num_threads(), {"__name__": "__main__"}

    def run(code: str) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), plt.rc_context():
            exec(compile(code, code[:60], "exec"), names)
        return printed.getvalue()

    try:
        for cell in CODE:
            got, stored = checks(run("".join(cell["source"]))), checks(stored_text(cell))
            assert got == stored and "False" not in got, "".join(cell["source"])
        for code, quoted in zip(SOLUTIONS, QUOTED, strict=True):
            printed = run(code)
            assert checks(printed) == ["True"], code
            if quoted:  # another processor rounds otherwise and trains another model
                assert numbers(printed) == pytest.approx(numbers(quoted[1]), rel=0.15), printed
    finally:
        torch.set_num_threads(threads)
