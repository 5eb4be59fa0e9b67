"""The READMEs' commands, figures and examples, the docstrings' examples, and the layout."""

import doctest
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "tools"))

import report

README, MEASURED = (path.read_text() for path in report.READMES)
EXAMPLES = re.findall(r"```python\n(.*?)\n```\n", README, re.DOTALL)
MODULES = ("data", "model", "schedule", "train")
PUBLISHED = {"0.8997", "0.8377", "0.8227", "0.8140"}  # by others


def run(*arguments, cwd):
    command = [sys.executable, *map(str, arguments)]
    options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    return subprocess.run(command, cwd=cwd, **options)


def differences(shown, printed):
    return list(report.find_differences(shown, printed, tolerance=5e-3))


@pytest.mark.usefixtures("ml_100k")
@pytest.mark.parametrize("text", [README, MEASURED])
def test_its_commands_print_what_it_shows(main, tmp_path, text):
    """Those of collab.py, in this order and in one folder."""
    report.write_files(tmp_path)
    for command, shown, _ in report.read_quotes(text):
        if command.startswith("python collab.py"):
            done = main(*shlex.split(command)[2:])
            assert done.returncode == 0, done.stderr
            assert not shown or not differences(shown, done.stdout)
        if command == "python collab.py train":
            (told,) = re.findall(r"```text\n([^`]*without a model[^`]*)\n```", text)
            assert not differences(told, done.stderr.partition("\n")[2])
    written = [
        "predicted.csv",
        "recommended.parquet",
        "factors.npz",
        "lr.png",
        "map.png",
        "runs.svg",
    ]
    assert {"model.pt", *(written if text == MEASURED else [])} <= set(os.listdir(tmp_path))


def test_its_other_commands_are_there():
    """The tools have all the options; test_tools.py runs them."""
    commands = re.findall(r"^python (tests/.*)$", README + MEASURED, re.MULTILINE)
    tools = [shlex.split(command) for command in commands]
    for tool, *arguments in tools:
        options = set(re.findall(r'"(--[\w-]+)', (ROOT / tool).read_text()))
        assert {each for each in arguments if each.startswith("--")} <= options
    assert len(tools) > 10
    test = "pip install -r tests/requirements.txt && python -m pytest"
    assert all(test in text.splitlines() for text in (README, (ROOT / ".ci" / "run").read_text()))


def test_each_figure_of_its_prose_is_printed_by_a_command():
    quoted = "\n".join(
        quote.shown or "" for t in (README, MEASURED) for quote in report.read_quotes(t)
    )
    for text in (README, MEASURED):
        prose = re.sub(r"```.*?```|^\|.*$", "", text, flags=re.DOTALL | re.MULTILINE)
        for figure in set(re.findall(r"\b\d\.\d{3,}\b", prose)) - PUBLISHED:
            assert figure in quoted


def test_its_length():
    assert len(README.splitlines()) <= 280


@pytest.mark.usefixtures("ml_100k")
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_its_examples_run(tmp_path, number):
    """In a folder that has the modules alone that an example imports."""
    for module in ("collab", *MODULES):
        if "import collab" in EXAMPLES[number] or module in EXAMPLES[number]:
            shutil.copy(ROOT / f"{module}.py", tmp_path)
    done = run("-c", f"import torch\ntorch.manual_seed(0)\n{EXAMPLES[number]}", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    if "train.fit" in EXAMPLES[number]:  # prints the number and the error of each epoch
        errors = [float(line.split()[1]) for line in done.stdout.splitlines()]
        assert errors[-1] < min(errors[0], 0.91)
    else:
        assert "model.pt" in os.listdir(tmp_path)


def test_a_module_copied_alone_runs_its_examples(tmp_path, ml_100k):
    for module in MODULES:
        (tmp_path / module).mkdir()
        shutil.copy(ROOT / f"{module}.py", tmp_path / module)
        source = (ROOT / f"{module}.py").read_text()
        head = source.split('"""')[1]
        assert doctest.DocTestParser().get_examples(head), "the module's docstring has an example"
        imports = rf"^\s*(from|import) (collab|{'|'.join(MODULES)})\b|torch\.optim"
        source = re.sub(r'""".*?"""', "", source, flags=re.DOTALL)
        assert not re.search(imports, source, re.MULTILINE)
    code = (
        "import doctest, importlib, sys\n"
        f"for name in {MODULES}:\n"
        "    sys.path[0] = name\n"  # the folder that has this module alone
        "    print(name, doctest.testmod(importlib.import_module(name)).failed)\n"
    )
    done = run("-c", code, cwd=tmp_path)
    assert done.stdout == "".join(f"{module} 0\n" for module in MODULES), done.stdout + done.stderr


def test_import_does_nothing(tmp_path, ml_100k):
    code = (
        "import os, sys, torch; sys.path.insert(0, sys.argv[1])\n"
        "torch.manual_seed(5); before = torch.get_rng_state(), torch.get_num_threads()\n"
        f"import collab, doctest, {', '.join(MODULES)}\n"
        "assert torch.equal(before[0], torch.get_rng_state())\n"
        "assert before[1] == torch.get_num_threads() and os.listdir('.') == []\n"
        "assert doctest.testmod(collab).failed == 0"
    )
    done = run("-c", code, ROOT, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_layout():
    command = ["git", "ls-files", "--cached"]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip("no git checkout")
    top = {path.split("/")[0] for path in listed.stdout.splitlines()}
    files = {"collab.py", "requirements.txt", "README.md", "tests", *(f"{m}.py" for m in MODULES)}
    assert {path for path in top if not path.startswith(".")} == files
