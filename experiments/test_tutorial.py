# SPDX-License-Identifier: MIT
"""tutorial.ipynb runs top to bottom, its checks print True, and what it stores is what it prints.

pytest experiments/test_tutorial.py            the stored notebook
pytest -m slow experiments/test_tutorial.py    runs it, too: minutes
"""

import ast
import contextlib
import difflib
import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import mythos

ROOT = Path(__file__).resolve().parent.parent
CELLS = json.loads((ROOT / "tutorial.ipynb").read_text("utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
TEXT = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")


def source(cell: dict) -> str:
    return "".join(cell["source"])


def stored_text(cell: dict) -> str:
    return "".join("".join(out.get("text", [])) for out in cell["outputs"])


def verdicts(printed: str) -> list[str]:
    """The verdicts of all checks: True or False."""
    return re.findall(r": (True|False)$", printed, re.MULTILINE)


def exercises() -> list[tuple[dict, dict, str, str]]:
    """Of each: the cell with the stub, the cell that checks it, the solution, what it says."""
    found = []
    for i, cell in enumerate(CELLS):
        if folded := re.search(r"<details>(.*?)</details>", source(cell), re.DOTALL):
            solution = re.search(r"```python\n(.*?)```(.*)", folded[1], re.DOTALL)
            found.append((CELLS[i - 2], CELLS[i - 1], solution[1], solution[2]))
    return found


def test_stored_outputs_are_of_one_whole_run():
    """Cells run out of order, an error or a warning kept, a check that failed, no outputs."""
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    kinds = {out["output_type"] for cell in CODE for out in cell["outputs"]}
    assert kinds <= {"stream", "display_data"}
    assert all(out.get("name") != "stderr" for cell in CODE for out in cell["outputs"])
    got = verdicts("".join(map(stored_text, CODE)))
    assert "False" not in got and got.count("True") >= 30


def test_it_opens_on_any_machine():
    """A path of the machine that ran it; a version that the notebook insists on."""
    everything = (ROOT / "tutorial.ipynb").read_text("utf-8")
    assert not re.search(r"/(tmp|home|root|work|Users|usr)/", everything)
    assert not re.search(r"(torch|numpy|matplotlib)\s*[=~<>]=", everything)


def test_every_chapter_and_section_that_claims_also_checks():
    """A claim without a check; a chapter without a picture or a number."""
    sections = re.split(r"(?m)^###? ", "\n".join(map(cell_text, CELLS)))
    assert sum(s[0].isdigit() for s in sections) > 20
    for section in sections:
        assert "**Claim" not in section or verdicts(section), section[:60]
    chapters = re.findall(r"(?m)^## (\d)\. ", TEXT)
    assert chapters == [str(i) for i in range(1, 10)]


def cell_text(cell: dict) -> str:
    return source(cell) if cell["cell_type"] == "markdown" else stored_text(cell)


def test_links_lead_to_headings():
    """A link to a chapter that goes nowhere."""
    headings = {h.replace(" ", "-") for h in re.findall(r"(?m)^##+ (.+)$", TEXT)}
    links = re.findall(r"\]\(#(.+?)\)", TEXT)
    assert len(links) == 3 and set(links) <= headings


def all_code() -> str:
    """The cells, in order, then the solutions."""
    return "\n".join([*map(source, CODE), *(solution for _, _, solution, _ in exercises())])


def test_it_needs_no_more_than_the_two_files_and_what_it_says_to_install():
    """An import of the laboratory, which who copies mythos.py and train_tiny.py does not have."""
    imported = []
    for node in ast.walk(ast.parse(all_code())):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported.append("." * node.level + (node.module or ""))
    packages = {name.split(".")[0] for name in imported}
    allowed = {"mythos", "train_tiny", "torch", "numpy", "matplotlib"}
    assert packages <= allowed | sys.stdlib_module_names
    assert {"mythos", "train_tiny"} <= packages and "experiments" not in all_code()


def test_it_imports_the_file_and_redefines_nothing():
    """A notebook that teaches another implementation than the one that the tests trust."""
    code = all_code()
    assert "import mythos" in code
    taught = {name for name, thing in vars(mythos).items() if callable(thing)}
    defined = re.findall(r"(?m)^(?:class|def) (\w+)", code)
    assert defined and not taught & set(defined)


def test_cells_and_prose_are_short():
    """What nobody reads: a long cell, a long text."""
    lengths = [len(source(cell).splitlines()) for cell in CODE]
    assert max(lengths) <= 22 and sorted(lengths)[len(lengths) // 2] <= 15
    assert all(len(line) <= 100 for cell in CODE for line in source(cell).splitlines())
    assert len(TEXT.split()) <= 2100


def test_stages_are_small_steps():
    """A stage that changes more than 15 lines of the one before, or does not end in a number."""
    stages = [cell for cell in CODE if source(cell).startswith("# Stage ")]
    assert len(stages) == 5
    for number, cell in enumerate(stages, start=1):
        assert re.match(rf"stage {number}: \d[^\n]*\n?$", stored_text(cell))
    for before, after in zip(stages, stages[1:], strict=False):
        changed = difflib.unified_diff(*(source(c).splitlines()[1:] for c in (before, after)), n=0)
        new = [line[1:].strip() for line in [*changed][2:] if line[0] == "+"]
        assert len([line for line in new if line]) <= 15, new


def test_each_exercise_has_a_stub_a_hint_and_a_folded_solution():
    """A solution to something else; an unsolved exercise that says nothing, or more than a hint."""
    assert 6 <= len(exercises()) <= 8
    for stub, check, solution, said in exercises():
        assert stub["cell_type"] == check["cell_type"] == "code"
        asked, answered = (re.match(r"(?:class|def) (\w+)", c)[1] for c in (source(stub), solution))
        assert asked == answered and asked in source(check)
        assert re.fullmatch(r"not yet: .+\n", stored_text(check)) and not stored_text(stub)
        assert len(said.split()) > 5


def test_nothing_is_left_to_be_written():
    """A placeholder in capitals."""
    everything = "\n".join(map(source, CELLS))
    assert not re.search(r"TODO|FIXME|XXX|TEXT[A-Z]+|[A-Z]+TEXT|ANSWER|@@", everything)


@pytest.mark.slow
def test_it_runs_and_every_check_prints_true(monkeypatch, tmp_path):
    """A cell that fails, or that needs a file of the laboratory; a check that prints False, a
    solution that does not solve, a stub that does."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "experiments", None)  # importing it raises
    threads, names = torch.get_num_threads(), {"__name__": "__main__"}

    def run(code: str) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), plt.rc_context():
            exec(compile(code, code[:60], "exec"), names)
        return printed.getvalue()

    try:
        for cell in CODE:
            got, stored = verdicts(run(source(cell))), verdicts(stored_text(cell))
            assert got == stored and "False" not in got, source(cell)
        for stub, check, solution, _ in exercises():
            run(solution)
            assert run(source(check)) == "", solution
            run(source(stub))
            assert re.fullmatch(r"not yet: .+\n", run(source(check))), source(check)
    finally:
        torch.set_num_threads(threads)
