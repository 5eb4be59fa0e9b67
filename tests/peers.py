"""Measure other rating predictors on our splits, for the README's table.

`python tests/peers.py --install --ours` makes a virtual environment for each peer and prints a
Markdown table of them and of our recipes; without `--install`, a peer that is not there is skipped.

A peer is `peers/NAME_fit.py`, which runs in an environment with the packages of `peers/NAME.txt`,
and of `peers/NAME.nodeps.txt` where there are packages whose own needs are to be left out. It is
given a folder with train.tsv and test.tsv, and in users.tsv and items.tsv what is known of them,
fits one or several systems, and writes results.json: a list of {system, predictions, seconds,
cpu_seconds}, with a prediction for each row of test.tsv. It could read the test ratings: that none
does is a matter of reading the scripts. Errors are worked out here, all alike, of predictions
clipped to the range of the training part. Seconds are of the fit alone, one thread.
"""

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import click
import numpy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import collab
import data

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "peers"
PEERS = ("surprise", "cornac", "cmfrec", "lenskit", "myfm", "fastai")  # the slowest last
QUIET = ("--quiet", "--no-input", "--disable-pip-version-check")
THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "RAYON_NUM_THREADS",
    "LK_NUM_THREADS",
    "LK_NUM_BACKEND_THREADS",
)


def requirements(name):
    """What pip is called with for a peer, a list of arguments a call."""
    calls = [["--requirement", FOLDER / f"{name}.txt"]]
    if (bare := FOLDER / f"{name}.nodeps.txt").exists():
        calls.append(["--no-deps", "--requirement", bare])
    return calls


def stamp(name):
    """The text that an environment made for the present requirements of a peer holds."""
    return "".join(call[-1].read_text() for call in requirements(name))


def is_installed(venv, name):
    """Whether `venv` was made for the present requirements of a peer, to the end."""
    file = venv / "installed.txt"
    return file.exists() and file.read_text() == stamp(name)


def install(venv, name):
    """Make a peer's virtual environment anew. RuntimeError where pip fails."""
    run([sys.executable, "-m", "venv", "--clear", venv])
    for call in requirements(name):
        run([venv / "bin" / "python", "-m", "pip", "install", *QUIET, *call])
    (venv / "installed.txt").write_text(stamp(name))


def run(command, threads=1):
    """Run a command. RuntimeError with its last line of errors if it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | dict.fromkeys(THREADS, str(threads)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(lines[-1])


def write_task(folder, train, test, users, items):
    """Write what a peer is given."""
    data.write_ratings(train, folder / "train.tsv")
    data.write_ratings(test, folder / "test.tsv")
    write_features(user_features(users), folder / "users.tsv")
    write_features(item_features(items), folder / "items.tsv")


def user_features(users):
    """`(user, [feature, ...])` by user: age in fives, gender, occupation, zip area."""
    for user, age, gender, occupation, zip_code in users.iter_rows():
        yield user, [f"age {age // 5}", gender, occupation, f"zip {zip_code[0]}"]


def item_features(items):
    """`(item, [feature, ...])` by item: year and genres."""
    for item, _title, year, genres in items.iter_rows():
        yield item, [f"year {year}", *genres]


def write_features(rows, path):
    path.write_text("".join(f"{name}\t{'|'.join(features)}\n" for name, features in rows))


def run_peer(name, venv, split, folder, train, test):
    """Run a peer's script on the task in `folder`. Returns a row for each of its systems."""
    results = folder / "results.json"
    results.unlink(missing_ok=True)
    run([venv / "bin" / "python", FOLDER / f"{name}_fit.py", folder])
    results = json.loads(results.read_text())
    return [judge(result, split, train["rating"], test["rating"]) for result in results]


def judge(result, split, train, test):
    """The row of a system: its errors and times. ValueError if a prediction is missing or bad.

    `train` and `test` are series of ratings.
    """
    system, predictions = result["system"], numpy.array(result["predictions"], dtype=float)
    if predictions.shape != (len(test),):
        raise ValueError(f"{system}: predictions of shape {predictions.shape}, not {len(test)}")
    if n_bad := int((~numpy.isfinite(predictions)).sum()):
        raise ValueError(f"{system}: {n_bad} predictions are not finite")
    error = predictions.clip(train.min(), train.max()) - test.to_numpy()
    mse = float(numpy.square(error).mean())
    times = {name: result[name] for name in ("seconds", "cpu_seconds")}
    return {"system": system, "split": split, "mse": mse, "rmse": math.sqrt(mse), **times}


def run_ours(recipe, split, folder, train, test):
    """Train one of our recipes, through the command line. Returns its row, in a list."""
    metrics = folder / "metrics.json"
    command = [sys.executable, ROOT / "collab.py", "train", "--recipe", recipe, "--split", split]
    run([*command, "--seed", "0", "--metrics", metrics])
    figures = json.loads(metrics.read_text())
    errors = {name: figures[name] for name in ("mse", "rmse")}
    seconds = figures["fit_seconds"]
    return [{"system": f"ours, {recipe}", "split": split, **errors, "seconds": seconds}]


def alternate(first, second):
    """A list of the members of two in turn, then of what is left of the longer."""
    pairs = itertools.zip_longest(first, second)
    return [member for pair in pairs for member in pair if member is not None]


def show_table(rows, splits):
    """The lines of a Markdown table, a system a line, the worst on the first split first."""
    errors = {split: "mse" if split in ("ua", "ub") else "rmse" for split in splits}
    titles = [f"{split} {error.upper()}" for split, error in errors.items()]
    cells = {}
    for row in rows:
        line = cells.setdefault(row["system"], dict.fromkeys([*splits, "seconds"], ""))
        line[row["split"]] = f"{row[errors[row['split']]]:.4f}"
        line["seconds"] = line["seconds"] or f"{row['seconds']:.2f}"
    yield f"| system | {' | '.join(titles)} | seconds |"
    yield "|---" * (len(splits) + 2) + "|"
    for system, line in sorted(cells.items(), key=lambda pair: pair[1][splits[0]], reverse=True):
        yield f"| {system} | {' | '.join(line.values())} |"


def read_splits(context, parameter, value):
    splits = list(dict.fromkeys(value.split(",")))
    for split in splits:
        if split not in collab.SPLITS:
            raise click.BadParameter(f"'{split}' is not one of {', '.join(collab.SPLITS)}.")
    return splits


def notice(line):
    click.echo(line, err=True)


def prepare(names, venvs, *, is_install):
    """The environments that can be used, `{name: folder}`, with a notice of each that can't."""
    ready = {}
    for name in names:
        venv = venvs / name
        if is_install and not is_installed(venv, name):
            notice(f"{name}: installing in {venv}")
            try:
                install(venv, name)
            except RuntimeError as error:
                notice(f"{name}: skipped, not installed: {error}")
                continue
        if is_installed(venv, name):
            ready[name] = venv
        else:
            notice(f"{name}: skipped, {venv} is not there or not up to date; --install makes it")
    return ready


def measure(jobs, splits, ratings, about):
    """Run every job on every split, and yield the rows of each; None for one that failed.

    `jobs` are `(name, function)`; `about` are the frames of the users and of the items.
    """
    for split in splits:
        parts = data.split(ratings, split)
        with tempfile.TemporaryDirectory() as folder:
            write_task(Path(folder), *parts, *about)
            for name, job in jobs:
                notice(f"{split}: {name}")
                try:
                    rows = job(split, Path(folder), *parts)
                except (RuntimeError, OSError, ValueError, KeyError) as error:
                    notice(f"{split}: {name} failed: {error}")
                    rows = None
                yield rows


FILE = click.Path(path_type=Path)


@click.command()
@click.option("--venvs", type=FILE, help="Folder of the environments.  [default: in the cache]")
@click.option("--install", "is_install", is_flag=True, help="Make the environments not there.")
@click.option("--splits", default="ua,u1", show_default=True, callback=read_splits)
@click.option("--only", multiple=True, type=click.Choice(PEERS), help="This peer; may be repeated.")
@click.option("--ours", is_flag=True, help="Train our recipes too, in between.")
@click.option("--metrics", type=FILE, help="Write the figures here, as JSON, as they come.")
def main(venvs, is_install, splits, only, ours, metrics):
    """Print a table of the errors of other rating predictors, and of ours."""
    if metrics is not None:
        data.check_writable(metrics)
    source = data.get_ml_100k(notice=notice)
    ratings = data.read_ratings(source / "u.data")
    about = data.read_users(source), data.read_items(source)
    names = only or PEERS
    ready = prepare(names, venvs or data.default_data_dir() / "peers", is_install=is_install)
    jobs = alternate(
        [(name, partial(run_peer, name, venv)) for name, venv in ready.items()],
        [(f"ours, {name}", partial(run_ours, name)) for name in collab.RECIPES if ours],
    )
    if not jobs:
        raise click.ClickException("no peer is installed, and --ours is not given")
    rows, is_whole = [], not is_install or len(ready) == len(names)
    for measured in measure(jobs, splits, ratings, about):
        is_whole = is_whole and measured is not None
        rows += measured or []
        if metrics is not None:
            data.write_file(metrics, (json.dumps(rows, indent=1) + "\n").encode())
    click.echo("\n".join(show_table(rows, splits)))
    sys.exit(0 if is_whole else 1)


if __name__ == "__main__":
    main()
