# SPDX-License-Identifier: MIT
"""tutorial.ipynb: what it stores; with -m slow, that it runs, and that its checks print True."""

import json
import re
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "tutorial.ipynb"
CELLS = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def stored_text(cell: dict) -> str:
    return "".join("".join(out.get("text", [])) for out in cell["outputs"])


def verdicts(printed: str) -> list[str]:
    return re.findall(r": (True|False)$", printed, re.MULTILINE)


# Of each exercise: the cell with the stub, the cell that checks it, the solution.
EXERCISES = [
    (CELLS[i - 2], CELLS[i - 1], re.search(r"(?s)```python\n(.*?)```", source(cell))[1])
    for i, cell in enumerate(CELLS)
    if "<details>" in source(cell)
]

# Parts of the solutions, and what makes them wrong.
WRONG = [("(f * P)", "(P * P)"), ("e + index", "e + t"), ("+ r @", "+ h @"), ("=0) + 1", "=0)")]


def test_stored_outputs_are_of_one_whole_run():
    """Cells run out of order, an error or a warning kept, a check that failed; a machine's path."""
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [out for cell in CODE for out in cell["outputs"]]
    assert {out["output_type"] for out in outputs} == {"stream", "display_data"}
    assert all(out.get("name") != "stderr" for out in outputs)
    got = verdicts("".join(map(stored_text, CODE)))
    assert "False" not in got and got.count("True") >= 30
    assert not re.search(r"/(tmp|home|root|work|Users|usr)/", NOTEBOOK.read_text("utf-8"))


@pytest.mark.slow
def test_it_runs_and_every_check_prints_true(monkeypatch, tmp_path, capsys):
    """A cell that fails, or that needs a file of the laboratory; a check that prints False, a
    solution that does not solve, a stub or a wrong answer that does."""
    from matplotlib import pyplot as plt

    plt.switch_backend("Agg")
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "experiments", None)  # importing it raises
    names = {"__name__": "__main__"}

    def run(code: str) -> str:
        with plt.rc_context():
            exec(compile(code, code[:60], "exec"), names)
        return capsys.readouterr().out

    for cell in CODE:
        got, stored = verdicts(run(source(cell))), verdicts(stored_text(cell))
        assert got == stored and "False" not in got, source(cell)
    assert len(EXERCISES) >= 6
    for stub, check, solution in EXERCISES:
        run(solution)
        assert run(source(check)) == "right\n", solution
        for part, wrong in WRONG:
            if part in solution:
                run(solution.replace(part, wrong))
                assert run(source(check)).startswith("not yet: "), wrong
        run(source(stub))
        assert run(source(check)).startswith("not yet: "), source(check)
