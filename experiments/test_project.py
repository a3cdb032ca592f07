# SPDX-License-Identifier: MIT
"""What the project promises about its files: README, budgets, parts that can be lifted."""

import ast
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import mythos
import train_tiny
from experiments.circuits import Circuits
from experiments.text import Text
from mythos import RecurrentDepthTransformer
from train_tiny import Chains, train

torch.set_num_threads(1)
ROOT = Path(mythos.__file__).parent
README = (ROOT / "README.md").read_text("utf-8")
# Lines of code: neither blank, nor comment, nor docstring.
BUDGETS = {"mythos.py": 620, "train_tiny.py": 290, "experiments/text.py": 130}
BUDGETS |= {"before END OF THE MODEL": 400, "the model's class": 150, "a function": 40}
BUDGETS |= {"the checks": 45}  # and a table
LINES = {"test_mythos.py": 1150, "README.md": 250}  # blank lines and prose included
SIX = "mythos.py train_tiny.py test_mythos.py tutorial.ipynb README.md requirements.txt".split()

SOURCE = Path(mythos.__file__).read_text("utf-8")
NODES = {node.name: node for node in ast.parse(SOURCE).body if hasattr(node, "name")}
IMPORTS = {
    "torch": "import torch",
    "nn": "from torch import nn",
    "F": "import torch.nn.functional as F",
    "Tensor": "from torch import Tensor",
}
HEADS = "d_model=16, n_heads=4, head_dim=8"
ROPE = ", rope_angles(torch.arange(5), 8)"
PARTS = {  # how a user of the part builds and calls it, with what its docstring lists and no more
    "SwiGLU": ("SwiGLU(16, 24)", ""),
    "GroupedQueryAttention": (f"GroupedQueryAttention({HEADS}, n_kv_heads=2)", ROPE),
    "MultiHeadLatentAttention": (
        f"MultiHeadLatentAttention({HEADS}, rope_dim=8, kv_lora_rank=8)", ROPE
    ),
    "MixtureOfExperts": ("MixtureOfExperts(16, 8, num_experts=4, num_experts_per_token=2)", ""),
    "Block": ("Block(16, Mean(), nn.Linear(16, 16))", ", None"),
    "StateUpdate": ("StateUpdate(16)", ", torch.ones(2, 5, 16), torch.ones(2, 5, 16)"),
}  # fmt: skip
MEAN = """
class Mean(nn.Module):
    def forward(self, x, rope, recall):
        return x.cumsum(dim=1)
"""


def source(name):
    """The text of a class or function, decorators included."""
    node = NODES[name]
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return "\n".join(SOURCE.splitlines()[first - 1 : node.end_lineno])


@pytest.mark.parametrize("name", PARTS)
def test_part_can_be_lifted_out(name):
    """A part that, pasted into an empty file with what its docstring lists,
    cannot be used."""
    needs = re.search(r"(?s)To lift it: (.*)", ast.get_docstring(NODES[name]))[1]
    needs = [part for part in re.findall(r"`(\w+)`", needs)]
    code = [*(IMPORTS.get(part) or source(part) for part in needs), source(name)]
    build, more = PARTS[name]
    code += [
        MEAN if name == "Block" else "",
        f"part = {build}",
        f"run = lambda part, x: part(x{more})",
    ]
    exec("\n".join(code), alone := {})
    exec(f"{MEAN}\npart = {build}", here := {**globals(), **vars(mythos)})
    lifted, part, x = alone["part"], here["part"], torch.randn(2, 5, 16)
    lifted.load_state_dict(part.state_dict())
    outs = [alone["run"](m, x) for m in (lifted, part)]
    assert_close(*outs)
    assert_close(*(torch.autograd.grad(out.square().sum(), [*m.parameters()])
                   for out, m in zip(outs, (lifted, part), strict=True)))  # fmt: skip
    promised = {name for name, n in NODES.items() if "To lift it" in (ast.get_docstring(n) or "")}
    assert promised == {*PARTS}


def code_lines(source):
    """The numbers of the lines that are neither blank nor comment nor docstring."""
    tree, docstrings = ast.parse(source), set()
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node):
            docstrings |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    lines = enumerate(source.splitlines(), start=1)
    code = {i for i, line in lines if line.strip() and not line.lstrip().startswith("#")}
    return code - docstrings


def test_budgets():
    """A file that grows line by line until nobody reads it."""
    code = code_lines(SOURCE)
    seam = SOURCE[: SOURCE.index("# END OF THE MODEL")].count("\n")

    def size(node):
        return len(code & {*range(node.lineno, node.end_lineno + 1)})

    sizes = {"before END OF THE MODEL": len(code & {*range(seam)})}
    sizes["the model's class"] = size(NODES["RecurrentDepthTransformer"])
    checks = [node for name, node in NODES.items() if name.startswith(("check", "expect"))]
    sizes["the checks"] = sum(map(size, checks))
    functions = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.FunctionDef)]
    sizes["a function"] = max(map(size, functions))
    for name in BUDGETS.keys() - sizes.keys():
        sizes[name] = len(code_lines((ROOT / name).read_text("utf-8")))
    assert {name: n for name, n in sizes.items() if n > BUDGETS[name]} == {}
    for name, most in LINES.items():
        assert len((ROOT / name).read_text("utf-8").splitlines()) <= most, name
    assert len(README.split()) <= 2300


def test_arrows_point_down():
    """One of the six files that needs the laboratory, or a circle within it."""
    order = "mythos train_tiny circuits text variants report compare".split()
    for name in [file for file in SIX if file.endswith(".py")]:
        assert not re.search(
            r"^\s*(from|import) experiments", (ROOT / name).read_text("utf-8"), re.M
        )
    for i, name in enumerate(order[2:], start=2):
        code = (ROOT / "experiments" / f"{name}.py").read_text("utf-8")
        found = re.findall(r"^(?:from|import) (?:experiments[ .])?(?:import )?(.+)", code, re.M)
        named = {word for line in found for word in re.findall(r"\w+", line)}
        assert not named & {*order[i + 1 :]}, name


@pytest.mark.slow
def test_six_files_stand_alone(tmp_path):
    """A file that needs a seventh. (The notebook: test_tutorial.py runs it without the others.)"""
    for name in SIX:
        shutil.copy(ROOT / name, tmp_path)

    def run(*command):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.stderr == "", done.stderr
        return done

    assert run("mythos.py").stdout.count("\n") == 17
    trained = run("train_tiny.py", "--steps", "2", "--device", "cpu")
    assert trained.returncode == 1 and "\nFAIL\n" in trained.stdout
    tested = run("-m", "pytest", "-q", "-W", "ignore", "-m", "not slow", "test_mythos.py")
    assert tested.returncode == 0 and " passed" in tested.stdout, tested.stdout


def test_import_is_quiet_and_light():
    """A print, a package or a global setting from the import; `import *` that fails (flaw 20)."""
    code = """if True:
        import sys, torch
        get = lambda: (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
                       torch.initial_seed(), torch.get_float32_matmul_precision())
        before, settings = set(sys.modules), get()
        from mythos import *
        new = {name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
        print(sorted(new - {"torch"}), get() == settings, RecurrentDepthTransformer.__name__)"""
    command, folder = [sys.executable, "-c", code], Path(mythos.__file__).parent
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert (run.stdout, run.stderr) == ("['mythos'] True RecurrentDepthTransformer\n", "")


# ---- README ----


def test_readme_example_prints_what_it_says(capsys):
    """An import that does not exist, or output that has drifted from the code (flaw 20)."""
    example = r"```python\n(.*?)```\s*prints\s*```\n(.*?)```"
    code, printed = re.search(example, README, re.S).groups()
    exec(code, {})
    assert capsys.readouterr().out == printed


def test_readme_loads_what_was_trained(tmp_path, capsys):
    """A snippet for a checkpoint that the trainer does not write like this any more."""
    task, path = Chains(), tmp_path / "chains-mla-seed0.pt"
    train(RecurrentDepthTransformer(task.config("mla")), task, steps=1, seed=0, checkpoint=path)
    capsys.readouterr()
    (code,) = re.findall(r"```python\n([^`]*load_model[^`]*)```", README)
    exec(code.replace("runs/chains-mla-seed0.pt", str(path)), {})
    printed = capsys.readouterr().out
    assert (
        "loops that each query took: [" in printed and "rho(A) and the loop's gain: 0." in printed
    )


def test_readme_loops_your_own_blocks(capsys):
    """A snippet that does not run."""
    code = re.search(r"```python\n((?:(?!```).)*class Looped.*?)```", README, re.S)[1]
    exec(code, {})
    assert capsys.readouterr().out == "torch.Size([3, 10, 64])\n"


def test_the_recipe_is_what_readme_says():
    """Other steps, parameters, learning rates or noise than the results were made with."""
    assert f"(default {Chains.steps}), of text {Text.steps:,};" in README and Chains.steps == 400
    model = RecurrentDepthTransformer(Chains().config("mla"))
    assert f"{mythos.num_params(model):,} parameters" in README
    recipes = {Chains: (1.0, 0.05, 0.3), Circuits: (1.0, 0.05, 0.0), Text: (3.0, 1.0, 0.0)}
    for task, recipe in recipes.items():
        assert (task.lr_scale, task.prelude_lr, task.state_noise) == recipe


def test_the_trainers_docstring_trains_another_size(tmp_path, monkeypatch, capsys):
    """A snippet that does not run."""
    code = re.search(r"see mythos.py\):\n\n(    .*?)\n\n\S", train_tiny.__doc__, re.S)[1]
    monkeypatch.setattr(Chains, "test_size", 4)
    exec(textwrap.dedent(code).replace("=800", "=1").replace("runs/", f"{tmp_path}/"), {})
    assert (tmp_path / "mine.pt").is_file() and "\n12 ['" in capsys.readouterr().out


def test_readme_names_files_that_exist():
    """A broken picture or link, and commands that name a file which is not there."""
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    commands = re.findall(r"^python3? .*$", README, re.M)
    assert {"python train_tiny.py", "python -m pytest"} <= {*commands}
    for name in re.findall(r"\b\w+\.(?:py|txt)\b", " ".join(commands)):
        assert (ROOT / name).is_file(), name


def test_every_test_can_fail():
    """A test with nothing in it that could fail (flaw 23)."""
    files = [ROOT / "test_mythos.py", *(ROOT / "experiments").glob("test_*.py")]
    trees = [ast.parse(path.read_text("utf-8")) for path in files]
    for f in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(f, ast.FunctionDef) and f.name.startswith("test"):
            names = {n.attr for n in ast.walk(f) if isinstance(n, ast.Attribute)}
            names |= {n.id for n in ast.walk(f) if isinstance(n, ast.Name)}
            asserts = any(isinstance(n, ast.Assert) for n in ast.walk(f))
            assert asserts or names & {"assert_close", "raises"}, f.name
