"""The README's commands, figures and examples, the docstrings' examples, and the layout."""

import doctest
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import polars
import pytest
from click.testing import CliRunner

import data

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [block.strip() for language, block in BLOCKS if language == "sh"]
EXAMPLES = [block for language, block in BLOCKS if language == "python"]
OTHER_RATINGS = (
    "python collab.py train --ratings ratings.csv --items titles.csv --item-column product"
    " --split last10"
)


JUDGED = (
    "python collab.py train --holdout 0.1 --n-factors 20",
    "python collab.py cross-validate --splits u1,u2,u3,u4,u5",
)


def find_tour():
    """The commands of the tour, each with what the README shows that it prints, or None."""
    (text,) = re.findall(r"## A tour\n(.*?)\n## ", README, re.DOTALL)
    found = re.findall(r"```sh\n(.*?)\n```\n(?:\n```text\n(.*?)\n```)?", text, re.DOTALL)
    tour = [(command, shown or None) for command, shown in found]
    return [each for each in tour if each[0].startswith("python collab.py")]


TOUR = find_tour()
MODULES = ("data", "model", "schedule", "train")


def run(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
    )


def table_rows(text):
    """Cells of the lines of all Markdown tables in a text, by their first cell."""
    rows = [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in rows}


def numbers(text):
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def test_the_commands_are_known():
    """Here, in .ci/run, test_collab.py or test_bench.py each is run, long ones in a short form."""
    tour = [command for command, _ in TOUR]
    assert all(command.startswith("python collab.py ") for command in tour)
    assert [command for command in COMMANDS if command not in tour] == [
        "pip install -r requirements.txt && python collab.py train",
        "pip install -r tests/requirements.txt && python -m pytest",
        OTHER_RATINGS,
        "python tests/panel.py",
        "python tests/fold_in.py",
        *JUDGED,
        "python tests/figures.py",
        "python tests/peers.py --install --ours",
        "python tests/tune.py default.jsonl",
        "python tests/tune.py --recipe best --splits ua,u1 --trials 60 best.jsonl",
        "python tests/bench.py",
        "python tests/bench.py --scale",
        "torchrun --nproc-per-node 2 collab.py train",
        "python tests/reproduce.py",
    ]


@pytest.mark.usefixtures("ml_100k")
def test_the_tour_prints_what_the_readme_shows(main, tmp_path):
    """Each command, in this order; test_commands.py runs each in a process of its own."""
    (pairs,) = (block for language, block in BLOCKS if language == "csv")
    (tmp_path / "pairs.csv").write_text(pairs)
    for command, shown in TOUR:
        done = main(*shlex.split(command)[2:])
        assert done.returncode == 0, done.stderr
        if shown is not None:
            printed = done.stdout.splitlines()
            assert len(printed) == len(shown.splitlines())
            for mine, theirs in zip(printed, shown.splitlines(), strict=True):
                assert re.sub(r"\d+\.\d+", "", mine) == re.sub(r"\d+\.\d+", "", theirs)
                assert numbers(mine) == pytest.approx(numbers(theirs), abs=3e-3)
    names = {"model.pt", "default.json", "pairs.csv", "predicted.csv", "recommended.parquet"}
    assert names | {"lr.png", "map.png", "runs.svg", "training.pt", "resumed.pt"} == set(
        os.listdir(tmp_path)
    )


def test_the_example_of_the_library(tmp_path, ml_100k):
    code = "import sys; sys.path.insert(0, sys.argv[1])\n" + EXAMPLES[0]
    done = run("-c", code, ROOT, cwd=tmp_path)
    lines = [line.rpartition(" ") for line in done.stdout.splitlines()]
    assert len(lines) == 4, done.stderr
    assert [title for title, _, _ in lines[:2]] == [
        "483 Casablanca (1942)",
        "318 Schindler's List (1993)",
    ]
    assert all(4 < float(rating) <= 5 for _, _, rating in lines)
    assert done.stderr == ""
    assert os.listdir(tmp_path) == ["model.pt"]


def test_the_panels_command(ml_100k):
    """The smallest cut, one seed; the table has means over three."""
    done = run("tests/panel.py", "--sizes", "500", "--seeds", 1, "--recipe", "default")
    assert done.returncode == 0, done.stderr
    printed, shown = table_rows(done.stdout)["ml-100k, 500"], table_rows(README)["ml-100k, 500"]
    assert numbers(" ".join(printed)) == pytest.approx(numbers(" ".join(shown[:5])), rel=0.02)


def test_new_users_against_trained_ones(ml_100k):
    """The table's command in short: one seed, the quick recipe, the figure within its spread."""
    done = run("tests/fold_in.py", "--only", "default", "--seeds", 1)
    assert done.returncode == 0, done.stderr
    printed, shown = table_rows(done.stdout)["default"], table_rows(README)
    for cells in (printed, *(shown[recipe] for recipe in ("default", "best", "fastai"))):
        trained, folded, difference, average = (float(cell.split(" ")[0]) for cell in cells)
        assert difference == pytest.approx(folded - trained, abs=2e-4)
        assert difference < 0.02
        assert max(trained, folded) < average - 0.1


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert COMMANDS[1] in script
    assert any(line.startswith("ruff check") for line in script)


def test_the_training_command_prints_what_the_readme_shows(ml_100k):
    done = run(*COMMANDS[0].partition(" && python ")[2].split(" "))
    assert done.returncode == 0, done.stderr
    shown, told = [block for language, block in BLOCKS if language == "text"][:2]
    assert told == "".join(done.stderr.splitlines(keepends=True)[1:]), "but where the data is"
    shown, printed = shown.splitlines(), done.stdout.splitlines()
    assert printed[0] == shown[0]
    assert len(printed) == len(shown)
    for mine, theirs in zip(printed[1:], shown[1:], strict=True):
        # All but the seconds, which come last; another processor rounds otherwise.
        assert numbers(mine)[:-1] == pytest.approx(numbers(theirs)[:-1], abs=3e-3)


def test_the_results_command(ml_100k):
    """The fast recipe in full, one seed; the table has all."""
    done = run("tests/figures.py", "--seeds", 1, "--only", "default", "--columns", "ua,u1")
    assert done.returncode == 0, done.stderr
    printed, shown = table_rows(done.stdout), table_rows(README)
    assert list(printed) == ["`python collab.py train`", "`--recipe default`"]
    cells = zip(printed["`--recipe default`"][:2], shown["`--recipe default`"][:2], strict=True)
    for got, (mean, spread) in [(numbers(a)[0], numbers(b)) for a, b in cells]:
        assert got == pytest.approx(mean, abs=5 * spread + 1e-3)
    recipes = [name for name in shown if name.startswith("`--recipe")]
    assert len(recipes) == 4


def test_the_peers_command_skips_what_is_not_installed(tmp_path, ml_100k):
    done = run("tests/peers.py", "--venvs", tmp_path / "none")
    assert done.returncode == 1
    *skipped, last = done.stderr.splitlines()[1:]
    names = ["surprise", "cornac", "cmfrec", "lenskit", "myfm", "fastai"]
    assert [line.split(":")[0] for line in skipped] == names
    assert last.startswith("Error: no peer is installed")


def test_peers_are_judged_like_us():
    """Clipped to the training ratings, on four numbers."""
    sys.path.insert(0, str(ROOT / "tests"))
    import peers

    train, test = polars.Series([2.0, 4.0]), polars.Series([1.0, 5.0, 3.0, 3.0])
    result = {"system": "x", "predictions": [0, 9, 3, 3.5], "seconds": 1, "cpu_seconds": 2}
    row = peers.judge(result, "ua", train, test)
    assert row["mse"] == pytest.approx((1 + 1 + 0 + 0.25) / 4)
    assert row["rmse"] == pytest.approx(row["mse"] ** 0.5)
    with pytest.raises(ValueError, match="1 predictions are not finite"):
        peers.judge(result | {"predictions": [1, 2, 3, float("nan")]}, "ua", train, test)
    with pytest.raises(ValueError, match="shape"):
        peers.judge(result | {"predictions": [1, 2, 3]}, "ua", train, test)


def test_cells_are_mean_and_deviation():
    sys.path.insert(0, str(ROOT / "tests"))
    import figures

    assert figures.cell([1.0, 2.0, 6.0], 2) == "3.00 ± 2.65"


@pytest.mark.parametrize("command", JUDGED)
def test_the_other_commands(command, ml_100k, tmp_path):
    done = run(ROOT / "collab.py", *command.split(" ")[2:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    assert 0.7 < numbers(last)[0] < 1


def test_the_command_for_other_ratings(tmp_path, ratings, ml_100k):
    names = {"user": "userId", "item": "product"}
    ratings.rename(names).write_csv(tmp_path / "ratings.csv")
    titles = data.read_items(ml_100k).select(product="item", title="title")
    titles.write_csv(tmp_path / "titles.csv")
    command = OTHER_RATINGS.split(" ")[2:]
    done = run(ROOT / "collab.py", *command, "--epochs", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 0.9 < numbers(done.stdout.splitlines()[-1])[0] < 1.4


def test_the_notebooks_question_command(ml_100k):
    """One experiment at full length; all are in the README."""
    name = "AdamW, decay 0.01"
    done = run("tests/reproduce.py", "--only", name)
    assert done.returncode == 0, done.stderr
    (notebook, broadcast, right), shown = table_rows(done.stdout)[name], table_rows(README)
    assert notebook == shown[name][0]
    assert numbers(broadcast)[1] == pytest.approx(0.923, abs=0.003)
    assert numbers(broadcast) == pytest.approx(numbers(shown[name][1]), abs=3e-3)
    assert numbers(right) == pytest.approx(numbers(shown[name][2]), abs=2e-2)
    source = (ROOT / "tests" / "reproduce.py").read_text()
    for experiment in re.findall(r'Experiment\(\s*"([^"]+)"', source):
        assert len(shown[experiment]) == 3


def test_the_search_command_resumes(tmp_path, ml_100k):
    sys.path.insert(0, str(ROOT / "tests"))
    import tune

    trials = tmp_path / "trials.jsonl"

    def search(*arguments):
        return CliRunner().invoke(tune.main, [str(trials), *map(str, arguments)])

    for n_trials in (1, 2):
        before = trials.read_text() if trials.exists() else ""
        done = search("--trials", n_trials)
        assert done.exit_code == 0, done.output
        assert trials.read_text().startswith(before)
        assert len(trials.read_text().splitlines()) == len(done.stdout.splitlines()) == n_trials
    whole = trials.read_text()
    trials.write_text(whole[:-5])  # cut off in the middle of a line
    done = search("--trials", 2)
    assert (done.exit_code, trials.read_text()) == (0, whole)
    done = search("--recipe", "best")
    assert done.exit_code == 1
    assert "holds trials of another search" in done.stderr


def test_the_readmes_example_of_a_copied_file(tmp_path):
    code = EXAMPLES[1]
    shutil.copy(ROOT / "schedule.py", tmp_path)
    done = run("-c", code, cwd=tmp_path)
    assert done.stderr == ""
    assert numbers(done.stdout.replace("2.", "2.0")) == pytest.approx([1.0, 2.0], abs=0.02)


@pytest.mark.usefixtures("ml_100k")
@pytest.mark.parametrize(("example", "n_epochs", "least"), [(2, 10, 0.91), (3, 20, 0.2)])
def test_the_readmes_trainers_need_no_collab(tmp_path, example, n_epochs, least):
    """By the four modules alone: fastai's result, and a module of one's own by autograd."""
    for module in MODULES:
        shutil.copy(ROOT / f"{module}.py", tmp_path)
    done = run("-c", f"import torch; torch.manual_seed(0)\n{EXAMPLES[example]}", cwd=tmp_path)
    assert done.stderr == ""
    errors = [float(line.split(" ")[1]) for line in done.stdout.splitlines()]
    assert len(errors) == n_epochs
    assert errors[-1] < least < errors[0]


def test_a_module_copied_alone_runs_its_examples(tmp_path, ml_100k):
    for module in MODULES:
        (tmp_path / module).mkdir()
        shutil.copy(ROOT / f"{module}.py", tmp_path / module)
        head = (ROOT / f"{module}.py").read_text().split('"""')[1]
        assert doctest.DocTestParser().get_examples(head), "the module's docstring has an example"
    code = (
        "import doctest, importlib, sys\n"
        f"for name in {MODULES}:\n"
        "    sys.path[0] = name\n"  # the folder that has this module alone
        "    print(name, doctest.testmod(importlib.import_module(name)).failed)\n"
    )
    done = run("-c", code, cwd=tmp_path)
    assert done.stdout == "".join(f"{module} 0\n" for module in MODULES), done.stdout + done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_no_sibling_and_no_optimizer(module):
    source = (ROOT / f"{module}.py").read_text()
    siblings = "|".join(("collab", *MODULES))
    code = re.sub(r'""".*?"""', "", source, flags=re.DOTALL)
    assert not re.search(rf"^\s*(from|import) ({siblings})\b", code, re.MULTILINE)
    assert "torch.optim" not in code


def test_import_does_nothing(tmp_path):
    code = (
        "import os, sys, torch; sys.path.insert(0, sys.argv[1]);"
        "torch.manual_seed(5); before = torch.get_rng_state(), torch.get_num_threads();"
        f"import collab, {', '.join(MODULES)};"
        "assert torch.equal(before[0], torch.get_rng_state());"
        "assert before[1] == torch.get_num_threads()"
    )
    done = run("-c", code, ROOT, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert os.listdir(tmp_path) == []


def test_the_layout():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if listed.returncode:
        pytest.skip("no git checkout")
    top = {path.split("/")[0] for path in listed.stdout.splitlines()}
    files = {"collab.py", "requirements.txt", "README.md", "tests", *(f"{m}.py" for m in MODULES)}
    assert {path for path in top if not path.startswith(".")} == files
