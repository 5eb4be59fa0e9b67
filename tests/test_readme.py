"""The README's commands, figures and examples, the docstrings' examples, and the layout."""

import doctest
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import data

README = (ROOT / "README.md").read_text()
# Every block with the one below it, if that is what the first prints.
BLOCKS = re.findall(r"```(\w+)\n(.*?)\n```\n(?=(?:\n```text\n(.*?)\n```)?)", README, re.DOTALL)
COMMANDS = [(code, shown) for language, code, shown in BLOCKS if language == "sh"]
EXAMPLES = [code for language, code, _ in BLOCKS if language == "python"]
MODULES = ("data", "model", "schedule", "train")


def run(*arguments, cwd):
    command = [sys.executable, *map(str, arguments)]
    options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    return subprocess.run(command, cwd=cwd, **options)


def numbers(text):
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def assert_same_text(printed, shown):
    """But for the numbers, which are near, and the seconds: another processor rounds otherwise."""
    untold = r"\d+\.\d\d s\b| +(?=\d)|(?<=-)-+"
    printed, shown = (re.sub(untold, "", text) for text in (printed, shown))
    assert re.sub(r"\d+\.\d+", "", printed) == re.sub(r"\d+\.\d+", "", shown)
    assert numbers(printed) == pytest.approx(numbers(shown), abs=5e-3)


def test_its_commands_print_what_it_shows(main, tmp_path, ratings, ml_100k):
    """Those of collab.py, in this order and in one folder; what takes long is in few epochs."""
    pairs, names = (code for language, code, _ in BLOCKS if language == "csv"), {"item": "product"}
    (tmp_path / "pairs.csv").write_text(next(pairs))
    ratings.rename(names).write_csv(tmp_path / "ratings.csv")
    titles = data.read_items(ml_100k).select("item", "title").rename(names)
    titles.write_csv(tmp_path / "titles.csv")
    for command, shown in COMMANDS:
        *_, command = command.split(" && ")
        if command.startswith("python collab.py"):
            done = main(*shlex.split(command)[2:])
            assert done.returncode == 0, done.stderr
            if shown:
                assert_same_text(done.stdout.strip(), shown)
        if command == "python collab.py train":
            (told,) = re.findall(r"```text\n([^`]*without a model[^`]*)\n```", README)
            assert_same_text(done.stderr.partition("\n")[2].strip(), told)
    written = {"model.pt", "predicted.csv", "recommended.parquet", "lr.png", "map.png", "runs.svg"}
    assert written <= set(os.listdir(tmp_path))


def test_its_other_commands_are_there():
    """The tools have all the options; test_tools.py runs them."""
    tools = [shlex.split(code)[1:] for code, _ in COMMANDS if code.startswith("python tests")]
    for tool, *arguments in tools:
        options = set(re.findall(r'"(--[\w-]+)', (ROOT / tool).read_text()))
        assert {each for each in arguments if each.startswith("--")} <= options
    (test,) = (code for code, _ in COMMANDS if "pytest" in code)
    assert test in (ROOT / ".ci" / "run").read_text().splitlines()


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
    elif "optimizer" in EXAMPLES[number]:
        assert numbers(done.stdout.replace("2.,", "2.0")) == pytest.approx([1.0, 2.0], abs=0.02)
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
