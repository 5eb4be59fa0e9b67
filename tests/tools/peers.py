"""Measure other rating predictors on our splits, for the table of tests/README.md.

`python tests/tools/peers.py --install --ours` makes a virtual environment for each peer and prints
a Markdown table of them and of our recipes; without `--install`, a peer that is not there is
skipped. With `--dataset ml-1m`, or `--ratings FILE`, the ratings are these, cut at random by three
seeds, the peer is cmfrec alone, on two threads as ours, and a cell is mean and deviation.

A peer is `peers/NAME_fit.py`, run by `peers/peer.py` in an environment with the packages of
`peers/NAME.txt`, and of `peers/NAME.nodeps.txt` where there are packages whose own needs are to be
left out. It is given a folder with train.tsv and test.tsv, and in users.tsv and items.tsv what is
known of them, fits one or several systems, and writes results.json: a list of {system, predictions,
seconds}, with a prediction for each row of test.tsv. It could read the test ratings: that none does
is a matter of reading the scripts. Errors are worked out here, all alike, of predictions clipped to
the range of the training part. Seconds are of the fit alone, one thread.
"""

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
import polars
from common import echo_heads, echo_row, notice, spread, train

import collab
import data

FOLDER = Path(__file__).resolve().parent / "peers"
PEERS = ("surprise", "cornac", "cmfrec", "lenskit", "myfm", "fastai")  # the slowest last
SPLITS = {"ua": "mse", "u1": "rmse", "last10": "mse", "by-date": "rmse"}
# On larger ratings. The last was chosen on a tenth held out of ml-1m's training part.
OURS = (
    "default",
    "best --features id,implicit",
    "best --features id,implicit --dropout 0.1 --epochs 16 --batch-size 10226 --weight-decay 0.9 "
    "--bias-decay 0.1",
)
LIBRARIES = "OMP", "OPENBLAS", "MKL", "RAYON", "LK"
THREADS = [f"{name}_NUM_THREADS" for name in LIBRARIES] + ["LK_NUM_BACKEND_THREADS"]


def run(*command, threads=1):
    """Run a command. RuntimeError with its last line of errors if it fails."""
    env = os.environ | dict.fromkeys(THREADS, str(threads))
    options = {"env": env, "capture_output": True, "text": True, "errors": "replace"}
    done = subprocess.run(list(map(str, command)), stdin=subprocess.DEVNULL, **options)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(lines[-1])


def prepare(names, *, is_install=False):
    """The environments that can be used, `{name: folder}`, with a notice of each that can't."""
    ready = {}
    for name in names:
        venv = data.default_data_dir() / "peers" / name
        needs = [FOLDER / f"{name}.txt", FOLDER / f"{name}.nodeps.txt"]
        needs = {path: path.read_text() for path in needs if path.exists()}
        stamp = venv / "installed.txt"  # what an environment was made for, once it is whole
        try:
            if is_install and not (stamp.exists() and stamp.read_text() == "".join(needs.values())):
                notice(f"{name}: installing in {venv}")
                run(sys.executable, "-m", "venv", "--clear", venv)
                for path in needs:
                    options = ["--no-deps"] if ".nodeps." in path.name else []
                    install = venv / "bin" / "python", "-m", "pip", "install", "--quiet"
                    run(*install, *options, "--requirement", path)
                stamp.write_text("".join(needs.values()))
        except RuntimeError as error:
            notice(f"{name}: skipped, not installed: {error}")
            continue
        if stamp.exists() and stamp.read_text() == "".join(needs.values()):
            ready[name] = venv
        else:
            notice(f"{name}: skipped, {venv} is not there or not up to date; --install makes it")
    return ready


def write_tables(folder, **tables):
    """Write frames as NAME.tsv, without a header."""
    for name, frame in tables.items():
        frame.write_csv(folder / f"{name}.tsv", separator="\t", include_header=False)


def write_task(folder, source, split, seed=0):
    """Write what a peer is given: the parts, and of ml-100k what is known of users and items."""
    train, test = data.split(source.ratings, split, seed=seed)
    write_tables(folder, train=train, test=test)
    if source.name != "ml-100k":
        return
    age, area = polars.col("age") // 5, polars.col("zip_code").str.head(1)
    told = polars.format("age {}|{}|{}|zip {}", age, "gender", "occupation", area)
    users = source.users.select("user", told)
    year = polars.col("year").cast(polars.String).fill_null("None")
    genres = polars.format("year {}|{}", year, polars.col("genres").list.join("|"))
    items = source.items.select("item", genres)
    write_tables(folder, users=users, items=items)


def run_peer(name, venv, folder, *arguments, threads=1):
    """Run a peer's script on the task in `folder`. Returns a row for each of its systems."""
    results = folder / "results.json"
    results.unlink(missing_ok=True)
    script = FOLDER / "peer.py"
    run(venv / "bin" / "python", script, name, folder, *arguments, threads=threads)
    options = {"separator": "\t", "has_header": False, "columns": [2]}
    parts = (polars.read_csv(folder / f"{part}.tsv", **options) for part in ("train", "test"))
    parts = [part.to_series().to_numpy() for part in parts]
    return [judge(result, *parts) for result in json.loads(results.read_text())]


def judge(result, train, test):
    """The row of a system: its errors and time. ValueError if a prediction is missing or bad."""
    system, predictions = result["system"], numpy.array(result["predictions"], dtype=float)
    if predictions.shape != test.shape:
        raise ValueError(f"{system}: predictions of shape {predictions.shape}, not {test.shape}")
    if n_bad := int((~numpy.isfinite(predictions)).sum()):
        raise ValueError(f"{system}: {n_bad} predictions are not finite")
    mse = float(numpy.square(predictions.clip(train.min(), train.max()) - test).mean())
    return {"system": system, "mse": mse, "rmse": math.sqrt(mse), "seconds": result["seconds"]}


def measure_random(ratings, arguments, ready, scratch):
    """Print a line for each of ours and of the peers' systems, means over the seeds."""
    cells = {}
    for seed in range(3):
        common = *arguments, "--split", "random", "--seed", seed, "--threads", 2
        rows = [train(f"`{name}`", *common, "--recipe", *name.split())[0] for name in OURS]
        write_task(scratch, collab.read(ratings), "random", seed)
        for name, venv in ready.items():
            rows += run_peer(name, venv, scratch, threads=2)
        for row in rows:
            cells.setdefault(row["system"], []).append((row["rmse"], row["seconds"]))
    echo_heads("system", "RMSE", "seconds")
    for system, pairs in sorted(cells.items(), key=lambda pair: pair[1][0], reverse=True):
        errors, seconds = zip(*pairs, strict=True)
        echo_row(system, spread(errors), spread(seconds, 1))


def show(rows):
    """Print a system a line, the worst on the first split first."""
    cells = {}
    for split, row in rows:
        line = cells.setdefault(row["system"], dict.fromkeys([*SPLITS, "seconds"], ""))
        line[split] = f"{row[SPLITS[split]]:.4f}"
        line["seconds"] = line["seconds"] or f"{row['seconds']:.2f}"
    heads = (f"{split} {error.upper()}" for split, error in SPLITS.items())
    echo_heads("system", *heads, "seconds")
    for system, line in sorted(cells.items(), key=lambda pair: pair[1]["ua"], reverse=True):
        echo_row(system, *line.values())


@click.command()
@click.option("--install", "is_install", is_flag=True, help="Make the environments not there.")
@click.option("--ours", is_flag=True, help="Train our recipes too, as --dataset does.")
@click.option("--dataset", help="These ratings instead, on random splits.")
@click.option("--ratings", type=click.Path(path_type=Path), help="The same, of a file.")
def main(is_install, ours, dataset, ratings):
    """Print a table of the errors of other rating predictors, and of ours."""
    if dataset or ratings:
        arguments = ("--ratings", ratings) if ratings else ("--dataset", dataset)
        ready = prepare(["cmfrec"], is_install=is_install)
        with tempfile.TemporaryDirectory() as scratch:
            return measure_random(ratings or dataset, arguments, ready, Path(scratch))
    source, ready = collab.read(notice=notice), prepare(PEERS, is_install=is_install)
    if not ready and not ours:
        raise click.ClickException("no peer is installed, and --ours is not given")
    rows, is_whole = [], not is_install or len(ready) == len(PEERS)
    for split in SPLITS:
        with tempfile.TemporaryDirectory() as scratch:
            write_task(Path(scratch), source, split)
            jobs = {name: partial(run_peer, name, ready[name], Path(scratch)) for name in ready}
            for name in collab.RECIPES if ours else ():
                arguments = f"ours, {name}", "--recipe", name, "--split", split
                jobs[arguments[0]] = partial(train, *arguments)
            for name, job in jobs.items():
                notice(f"{split}: {name}")
                try:
                    rows += [(split, row) for row in job()]
                except (RuntimeError, subprocess.SubprocessError, OSError, ValueError) as error:
                    notice(f"{split}: {name} failed: {error}")
                    is_whole = False
    show(rows)
    sys.exit(0 if is_whole else 1)


if __name__ == "__main__":
    main()
