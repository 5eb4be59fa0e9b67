"""Measure speed, each thing beside what it is compared with: `python tests/tools/bench.py`.

What is compared takes turns, so that a shared machine's load falls on all alike; a line has the
median of the seconds, their range, and where there are some the mean test MSE and the peak memory
of the process. Only ratios within a run count. `--scale` measures synthetic sets of 5 and 25
million ratings instead (`scale.py`, made once and kept), `--ratings FILE` the default recipe on a
table of one's own, both on two threads beside cmfrec's alternating least squares. Peers are
measured where `tests/tools/peers.py --install` has put them.
"""

import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import click
import peers
import scale
import torch
from common import ROOT, echo_heads, echo_row, notice, run_collab, train

import collab
import data
import model
import schedule

PEERS = ("fastai", "cornac", "cmfrec")
THREADS = 2  # for large sets, ours and theirs
OWN = ((), (40, 8))  # our options; cmfrec's factors and iterations
# Chosen on a tenth held out of the training part of 5 million.
LARGE = ["--n-factors", 12, "--epochs", 3, "--lr-max", 0.02, "--weight-decay", 0.15], (12, 6)
SIZES = {5_000_000: True, 25_000_095: False}  # ratings, and whether cmfrec is given them
REPEATS = 2


def take_turns(measures):
    """Call each of `measures` in turn; each returns rows, {system, seconds[, mse, peak_mib]}.

    Returns a list of the rows of each system.
    """
    runs = {}
    for _ in range(REPEATS):
        for measure in measures:
            for row in measure():
                runs.setdefault(row["system"], []).append(row)
    return runs


def show(runs):
    """Print a line for each system, in their order."""
    echo_heads("work", "seconds", "range", "test MSE", "peak MiB")
    for system, rows in runs.items():
        seconds = [row["seconds"] for row in rows]
        mse = f"{statistics.mean(row['mse'] for row in rows):.4f}" if "mse" in rows[0] else ""
        peak = f"{max(row['peak_mib'] for row in rows):.0f}" if "peak_mib" in rows[0] else ""
        extent = f"{min(seconds):.4g} to {max(seconds):.4g}"
        echo_row(system, f"{statistics.median(seconds):.4g}", extent, mse, peak)


def train_to(mse):
    """Rows of the default recipe: training to the first epoch with at most this test MSE; tests."""
    figures, seconds = run_collab("train"), 0.0
    for epoch in figures["epochs"]:
        seconds += epoch["seconds"]
        if epoch["mse"] <= mse:
            break
    else:
        raise ValueError(f"the default recipe ends at {figures['mse']:.4f}, above {mse}")
    evaluation = figures["evaluate_seconds"] / len(figures["epochs"])
    return [
        {"system": f"ours, default recipe to a test MSE of {mse}", "seconds": seconds},
        {"system": f"evaluation on {figures['n_test']:,} test ratings", "seconds": evaluation},
    ]


class Notebook(torch.nn.Module):
    """The notebook's model, its shapes right."""

    def __init__(self, n_users, n_items, n_factors=40):
        super().__init__()
        self.p, self.b = (torch.nn.Embedding(n_users, k) for k in (n_factors, 1))
        self.q, self.c = (torch.nn.Embedding(n_items, k) for k in (n_factors, 1))

    def forward(self, users, items):
        dot = (self.p(users) * self.q(items)).sum(1)
        return torch.sigmoid(dot + self.b(users).squeeze(1) + self.c(items).squeeze(1)) * 5.5


def train_as_the_notebook(part, ids, n_epochs=10):
    """The row of fastai's settings with torch's own parts: the first epoch, times their number."""
    torch.manual_seed(0)
    rows = torch.utils.data.TensorDataset(*part)
    loader = torch.utils.data.DataLoader(rows, batch_size=64, shuffle=True, drop_last=True)
    net = Notebook(*map(len, ids))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    n_steps = n_epochs * len(loader)
    pace = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=n_steps)
    start = time.perf_counter()
    for users, items, ratings in loader:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(net(users, items), ratings).backward()
        optimizer.step()
        pace.step()
    seconds = n_epochs * (time.perf_counter() - start)
    return [{"system": "the notebook's way, fastai's settings", "seconds": seconds}]


def measure_step():
    """Rows of what a step of best takes, and a training has thousands of: its parts, apart."""
    torch.set_num_threads(1)
    task = collab.prepare(collab.read(), "best")
    pace = schedule.one_cycle(100, lr_max=0.01)
    (table,), parts = collab.set_up_member(task, pace, collab.find_centers(task))
    batch = [column[: task.options["batch_size"]] for column in task.train]
    whole, rows = parts["loss_and_grad"], model.embed(table, task.features.matrix)
    n_users = collab.count_lines(task.options, task.ids) - len(task.ids.items)
    about = {"n_users": n_users, "head": collab.make_head(*task.head)}
    grad, optimizer = torch.zeros_like(table), parts["optimizer"]
    state = optimizer.init([table])
    works = {
        "a step of best: loss and gradient, as a whole": lambda: whole([table], *batch),
        "of that: from features to rows": lambda: model.embed(table, task.features.matrix),
        "of that: its transpose": lambda: model.embed(rows, task.features.transposed),
        "of that: of the rows": lambda: model.loss_and_grad([rows], *batch, **about),
        "a step of best: AdamW": lambda: optimizer.update_([table], [grad], state, 0),
    }
    measured = []
    for name, work in works.items():
        work()
        start = time.perf_counter()
        for _ in range(100):
            work()
        measured.append({"system": name, "seconds": (time.perf_counter() - start) / 100})
    return measured


def start_python(name, *arguments, is_first_line=False):
    """The row of a Python process: its seconds as a whole, or to its first line of output."""
    command, pipe = [sys.executable, *map(str, arguments)], subprocess.PIPE
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=pipe, stderr=subprocess.DEVNULL) as child:
        child.stdout.readline() if is_first_line else child.communicate()
        seconds = time.perf_counter() - start
        child.kill()
    return [{"system": name, "seconds": seconds}]


def measure_small(folder):
    """ml-100k's split ua: whole fits, an error, an evaluation, starts of processes."""
    torch.set_num_threads(1)
    source, command, saved = collab.read(notice=notice), ROOT / "collab.py", folder / "model.pt"
    peers.write_task(folder, source, "ua")
    run_collab("train", "--save", saved)
    part, _, ids = data.to_tensors(*data.split(source.ratings, "ua"))
    answer = command, "recommend", saved, "--user", "196"
    ready = peers.prepare(PEERS)
    return take_turns(
        [
            *(partial(peers.run_peer, name, venv, folder) for name, venv in ready.items()),
            partial(train_as_the_notebook, part, ids),
            partial(train, "ours, fastai's settings", "--recipe", "fastai"),
            partial(train, "ours, best", "--recipe", "best"),
            partial(train, "ours, best, two threads", "--recipe", "best", "--threads", 2),
            measure_step,
            partial(train_to, 0.8631),
            partial(start_python, 'python -c "import torch"', "-c", "import torch"),
            partial(start_python, "train, to its first line", command, "train", is_first_line=True),
            partial(start_python, "recommend, from a saved model", *answer),
        ]
    )


def apart(function, *arguments):
    """Call in a process of its own: the peak memory of children begins with this one's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def make_once(folder, n_ratings):
    """The file of a synthetic set, made unless it is there."""
    path = folder / f"ratings-{n_ratings}.csv"
    if not path.exists():
        notice(f"making {path}")
        folder.mkdir(parents=True, exist_ok=True)
        apart(scale.make, path.with_suffix(".part"), n_ratings)
        os.replace(path.with_suffix(".part"), path)
    return path


def write_split(path, folder):
    """Write the random split that `collab.py train` makes of a file, for peers."""
    peers.write_task(folder, collab.read(path), "random")


def measure_large(path, folder, work, *, has_peer=True):
    """Our training with the options of `work` on a file, and cmfrec's with its numbers."""
    options, sizes = work
    measures = [partial(train, "ours", "--ratings", path, "--threads", THREADS, *options)]
    for name, venv in peers.prepare(["cmfrec"]).items() if has_peer else ():
        apart(write_split, path, folder)
        measures.append(partial(peers.run_peer, name, venv, folder, *sizes, threads=THREADS))
    return take_turns(measures)


@click.command()
@click.option("--scale", "is_scale", is_flag=True, help="Sets of millions of ratings instead.")
@click.option("--ratings", type=click.Path(path_type=Path), help="This table instead.")
def main(is_scale, ratings):
    """Measure and print."""
    click.echo(f"torch {torch.__version__}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        if ratings is not None:
            show(measure_large(ratings, scratch, OWN))
        elif is_scale:
            runs = {}
            for size, has_peer in SIZES.items():
                path = make_once(data.default_data_dir() / "scale", size)
                found = measure_large(path, scratch, LARGE, has_peer=has_peer)
                runs |= {f"{size:,} ratings: {name}": rows for name, rows in found.items()}
            show(runs)
        else:
            show(measure_small(scratch))


if __name__ == "__main__":
    main()
