"""Measure speed, each thing beside what it is compared with: `python tests/bench.py`.

What is compared takes turns, so that a shared machine's load falls on all alike; a line has the
median, the range, and how many times faster than the line that it names. Only ratios within a run
count. `--scale` measures sets of 1, 5 and 25 million ratings instead (`scale.py`, made once and
kept), `--ratings FILE` a fit of the default recipe on a table of one's own beside cmfrec's. Peers
are measured where `tests/peers.py --install` has put them.
"""

import itertools
import json
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
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import peers
import scale

import collab
import data
import model
import schedule
import train

ROOT = Path(collab.__file__).resolve().parent
FASTAI = collab.RECIPES["fastai"]
FILE = click.Path(path_type=Path)
PEERS = ("surprise", "cornac", "cmfrec", "lenskit", "fastai")
# Chosen on a tenth held out of the training part of 5 million.
LARGE_OPTIONS = "--n-factors 12 --epochs 3 --lr-max 0.02 --weight-decay 0.15"
THREADS = 2  # for large sets, ours and theirs
JOB_SIZE = 5_000_000  # ratings from which on whole jobs are compared
LARGE_JOBS = {JOB_SIZE: {"cornac": (), "cmfrec": (12, 6)}}
OWN_JOBS = {"cmfrec": (40, 8)}  # on a table of one's own: factors, iterations


def timed(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def alternate(measures, repeats):
    """Call each of `measures`, functions that return seconds, in turn; a list of seconds each."""
    for measure in measures.values():
        measure()  # warm-up
    seconds = {name: [] for name in measures}
    for _, (name, measure) in itertools.product(range(repeats), measures.items()):
        seconds[name].append(measure())
    return seconds


def apart(function, *arguments):
    """Call in a process of its own: the peak memory of children begins with this one's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def show(seconds, against):
    """Print a line for each of `seconds`, and how many times faster than the line `against`."""
    base = statistics.median(seconds[against])
    for name, values in seconds.items():
        median = statistics.median(values)
        line = f"{name:58} {median * 1e3:12.2f} ms  {min(values) * 1e3:.2f} to "
        line += f"{max(values) * 1e3:.2f}"
        click.echo(line if name == against else f"{line}  {base / median:.2f} x")


def our_loop(task, options):
    """Seconds of a whole training loop, all that is worked out for it included."""
    job = collab.make_job(task, options=options, seed=0)
    return timed(lambda: list(collab.fit_members(job)))


class Rows(torch.utils.data.Dataset):
    """A row at a time, as in the notebook."""

    def __init__(self, users, items, ratings):
        self.pairs, self.ratings = torch.stack([users, items], 1), ratings

    def __len__(self):
        return len(self.ratings)

    def __getitem__(self, row):
        return self.pairs[row], self.ratings[row]


class Notebook(torch.nn.Module):
    """The notebook's model, its shapes right."""

    def __init__(self, n_users, n_items, n_factors=40):
        super().__init__()
        self.p, self.b = (torch.nn.Embedding(n_users, k) for k in (n_factors, 1))
        self.q, self.c = (torch.nn.Embedding(n_items, k) for k in (n_factors, 1))

    def forward(self, users, items):
        dot = (self.p(users) * self.q(items)).sum(1)
        return torch.sigmoid(dot + self.b(users).squeeze(1) + self.c(items).squeeze(1)) * 5.5


def notebooks_loop(task):
    """Seconds of fastai's ten epochs with torch's own parts: ten times the first epoch."""
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(
        Rows(*task.train), batch_size=64, shuffle=True, drop_last=True
    )
    net = Notebook(*map(len, task.ids))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    pace = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=10 * len(loader))

    def epoch():
        for pairs, ratings in loader:
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(net(*pairs.unbind(1)), ratings).backward()
            optimizer.step()
            pace.step()

    return 10 * timed(epoch)


def time_to(training, mse, seeds):
    """Seconds of a `collab.Training`, evaluations too, to the first epoch with at most this MSE."""
    start = time.perf_counter()
    for _, row in collab.fit(training.task, options=training.options, seed=next(seeds)):
        if row["mse"] <= mse:
            return time.perf_counter() - start
    name = training.figures["recipe"]
    raise ValueError(f"the recipe {name} ends at {row['mse']:.4f}, above {mse}")


def evaluation(task, table, head):
    """What `collab.fit` does after an epoch."""
    rows = collab.to_rows(table, task.features, ids=task.ids, seen=task.seen, head=head)
    return train.evaluate(partial(model.predict, rows, head=head), *task.test, clip=(1, 5))


def load(path, split):
    return data.to_tensors(*data.split(data.read_ratings(path), split))


def process(*arguments):
    """Seconds of a whole Python process."""
    command = [sys.executable, *map(str, arguments)]
    return timed(partial(subprocess.run, command, check=True, capture_output=True))


def first_line(*arguments):
    """Seconds from the start of a Python process to its first line of output."""
    command = [sys.executable, *map(str, arguments)]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        child.stdout.readline()
        seconds = time.perf_counter() - start
        child.kill()
    return seconds


def compare_loops(task, threads, repeats):
    """The notebook's way, ours; then what does not take a whole loop."""
    torch.set_num_threads(threads)
    generator, head = torch.Generator().manual_seed(0), model.bounded(0.0, 5.5)
    table = model.join(model.init_params(*task.sizes, n_factors=40, generator=generator))
    loops = {
        f"fastai's settings, the notebook's way, threads {threads}": partial(notebooks_loop, task),
        f"fastai's settings, ours, threads {threads}": partial(our_loop, task, FASTAI),
    }
    evaluate = partial(timed, evaluation, task, table, head)
    seconds = alternate(loops, repeats)
    show(seconds, next(iter(loops)))
    once = alternate({f"evaluation, {len(task.test[2]):,} rows, threads {threads}": evaluate}, 50)
    show(once, next(iter(once)))
    return seconds | once


def compare_start(path, folder, repeats):
    """Loading ml-100k, and processes beside one that only imports torch."""
    command, saved = ROOT / "collab.py", folder / "model.pt"
    process(command, "train", "--save", saved)
    answer = partial(process, command, "recommend", saved, "--user", "196")
    measures = {
        'python -c "import torch"': partial(process, "-c", "import torch"),
        "collab.py --help": partial(process, command, "--help"),
        "collab.py train, to the first line of the table": partial(first_line, command, "train"),
        "collab.py recommend, from a saved model": answer,
        "u.data to tensors": partial(timed, load, path, "ua"),
    }
    seconds = alternate(measures, repeats)
    show(seconds, next(iter(measures)))
    return seconds


def compare_peers(training, source, folder, venvs, repeats):
    """Whole fits of the installed peers on ua, our loops and times to an error in between."""
    torch.set_num_threads(1)
    frames = data.split(source.ratings, "ua")
    peers.write_task(folder, *frames, source.users, source.items)
    ready = peers.prepare(PEERS, venvs, is_install=False)
    seeds = itertools.count()
    ours = {
        "ours, fastai's settings": partial(our_loop, training.task, FASTAI),
        "ours, default recipe to test MSE 0.8997": partial(time_to, training, 0.8997, seeds),
        "ours, default recipe to test MSE 0.8631": partial(time_to, training, 0.8631, seeds),
    }
    seconds = {}
    for _ in range(repeats):
        for name, venv in ready.items():
            for row in peers.run_peer(name, venv, "ua", folder, *frames):
                seconds.setdefault(row["system"], []).append(row["seconds"])
        for name, measure in ours.items():
            seconds.setdefault(name, []).append(measure())
    for against in ("fastai", "Cornac", "cmfrec"):
        if base := next((name for name in seconds if name.startswith(against)), None):
            click.echo(f"\nBeside {base}:")
            show(seconds, base)
    return seconds


def make_once(folder, n_ratings):
    """The file of a synthetic set, made unless it is there."""
    path = folder / f"ratings-{n_ratings}.csv"
    if not path.exists():
        click.echo(f"making {path}", err=True)
        folder.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".part")
        apart(scale.make, beside, n_ratings)
        os.replace(beside, path)
    return path


def run_child(*arguments):
    """Run `python ...`: its output, its seconds, and its peak memory in MiB."""
    start = time.perf_counter()
    command = [sys.executable, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        output = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return output, time.perf_counter() - start, usage.ru_maxrss / 1024


def train_child(path, folder, *options):
    """Figures of a `collab.py train` on a file, with its whole seconds and its peak memory."""
    metrics = folder / "metrics.json"
    arguments = ["train", "--ratings", path, "--metrics", metrics, *options]
    _, seconds, peak = run_child(ROOT / "collab.py", *arguments)
    return json.loads(metrics.read_text()) | {"job_seconds": seconds, "peak_mib": peak}


def recommend_child(path, folder):
    """Seconds and peak MiB of `recommend --all-users` from a model of one epoch."""
    saved, output, command = folder / "model.pt", folder / "top.parquet", ROOT / "collab.py"
    short = "--threads", THREADS, "--epochs", "1"
    run_child(command, "train", "--ratings", path, *short, "--save", saved)
    line, seconds, peak = run_child(command, "recommend", saved, "--all-users", "--output", output)
    line = line.strip().replace(str(output), "a file")
    click.echo(f"{line}: {seconds:.1f} s, peak {peak:.0f} MiB")
    return {"seconds": seconds, "peak_mib": peak}


def compare_loading(path, venvs, repeats):
    """CSV to tensors, split and index included, beside pandas.read_csv alone, each a process."""
    pandas = [venvs / name / "bin" / "python" for name in ("lenskit", "fastai")]
    seconds = {}
    for _ in range(repeats):
        for python in filter(Path.exists, pandas):
            output = subprocess.check_output(
                [python, peers.FOLDER / "pandas_job.py", path], text=True
            )
            version, taken, _ = output.split()
            seconds.setdefault(f"pandas {version} read_csv", []).append(float(taken))
        taken = apart(timed, load, path, "random")
        seconds.setdefault("ours, to tensors", []).append(taken)
    show(seconds, next(iter(seconds)))
    return seconds


def our_steps(task, options, batches):
    """Seconds a step of `batches`, by hand."""
    job = collab.make_job(task, options=options, seed=0)
    params, parts = collab.set_up_member(job, schedule.constant(lr=0.01))
    init, update_ = parts["optimizer"]
    state = init(params)

    def steps():
        for step, batch in enumerate(batches):
            _, grads = parts["loss_and_grad"](params, *batch)
            update_(params, grads, state, step)

    return timed(steps) / len(batches)


def fused_steps(task, options, batches):
    """Seconds a step of `batches`, by autograd and torch's fused AdamW."""
    net = Notebook(*task.sizes, options["n_factors"])
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, fused=True)

    def steps():
        for users, items, ratings in batches:
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(net(users, items), ratings).backward()
            optimizer.step()

    return timed(steps) / len(batches)


def measure_steps(path, threads, repeats):
    """Seconds a step of the default recipe, torch's and ours, at its batch for the ratings."""
    torch.set_num_threads(threads)
    task, options, *_ = collab.set_up(collab.read(ratings=path))
    size = options["batch_size"]
    rows = torch.randperm(len(task.train[2]))[: 20 * size].split(size)
    batches = [[column[each] for column in task.train] for each in rows if len(each) == size]
    ways = {"autograd and AdamW(fused=True)": fused_steps, "ours": our_steps}
    measures = {
        f"a step of {size:,} ratings, {name}": partial(way, task, options, batches)
        for name, way in ways.items()
    }
    return alternate(measures, repeats)


def write_split(path, folder):
    """Write the random split that `collab.py train` makes of a file, for peers' jobs."""
    parts = collab.cut(collab.read(ratings=path).ratings, "random", seed=0)
    for name, part in zip(("train", "test"), parts, strict=True):
        part.select("user", "item", "rating").write_csv(folder / f"{name}.csv")


def run_job(name, arguments, folder, venvs):
    """What a peer's job writes of the split in `folder`; None where the peer is not there."""
    python, script = venvs / name / "bin" / "python", peers.FOLDER / f"{name}_job.py"
    if not python.exists():
        peers.notice(f"{name}: skipped, {python} is not there")
        return None
    peers.run([python, script, folder, time.time(), *arguments], THREADS)
    return json.loads((folder / "results.json").read_text())


def compare_jobs(path, folder, venvs, repeats, *, jobs, options):
    """Jobs of peers and `collab.py train` with `options` on a file, in turn.

    `jobs` are `{peer: arguments}`. Ours reads the file, cuts it and is tested after each epoch,
    theirs read what was cut.
    """
    apart(write_split, path, folder)
    runs = {}
    for _ in range(repeats):
        for name, arguments in jobs.items():
            if result := run_job(name, arguments, folder, venvs):
                runs.setdefault(result["system"], []).append(result)
        figures = train_child(path, folder, "--threads", THREADS, *options.split())
        figures["seconds"] = figures["job_seconds"]
        runs.setdefault("ours", []).append(figures)
    for name, what in (("seconds", "file to model"), ("fit_seconds", "fit alone")):
        seconds = {
            f"{system}, {what}": [result[name] for result in results]
            for system, results in runs.items()
            if name in results[0]
        }
        show(seconds, next(iter(seconds)))
    for system, results in runs.items():
        line = f"{system:58} test MSE {statistics.mean(r['mse'] for r in results):.4f}"
        peak = max(result.get("peak_mib", 0) for result in results)
        click.echo(f"{line}, peak {peak:.0f} MiB" if peak else line)
    return runs


def measure_scale(sizes, kept, folder, venvs, repeats):
    """Load, memory, epoch and error of each size; then steps and whole jobs."""
    figures = {}
    for size in sizes:
        path = make_once(kept, size)
        click.echo(f"\n{size:,} ratings, threads {THREADS}")
        trained = train_child(path, folder, "--threads", THREADS)
        epochs = [row["seconds"] for row in trained["epochs"]]
        line = (
            "load {load_seconds:.2f} s, epoch {:.2f} s, fit {fit_seconds:.2f} s, "
            "peak {peak_mib:.0f} MiB, test MSE {mse:.4f}"
        )
        click.echo(line.format(statistics.mean(epochs), **trained))
        figures[size] = {
            "train": trained,
            "recommend": recommend_child(path, folder),
            "loading": compare_loading(path, venvs, repeats),
            "steps": apart(measure_steps, path, THREADS, repeats),
        }
        show(figures[size]["steps"], next(iter(figures[size]["steps"])))
        if size >= JOB_SIZE:
            work = {"jobs": LARGE_JOBS.get(size, {}), "options": LARGE_OPTIONS}
            figures[size]["jobs"] = compare_jobs(path, folder, venvs, repeats, **work)
    return figures


def measure_small(folder, venvs, repeats):
    source = collab.read(notice=peers.notice)
    training = collab.set_up(source)
    figures = compare_start(data.get_ml_100k() / "u.data", folder, repeats)
    for threads in (1, 2):
        figures |= compare_loops(training.task, threads, repeats)
    return figures | compare_peers(training, source, folder, venvs, repeats)


@click.command()
@click.option("--scale", "is_scale", is_flag=True, help="Sets of millions of ratings instead.")
@click.option("--ratings", type=FILE, help="This table instead, beside cmfrec.")
@click.option("--sizes", default="1000000,5000000,25000095", show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--folder", type=FILE, help="Where synthetic sets are kept.  [default: the cache]")
@click.option("--venvs", type=FILE, help="Folder of the peers.  [default: the cache]")
@click.option("--metrics", type=FILE, help="Write all figures here, as JSON.")
def main(is_scale, ratings, sizes, repeats, folder, venvs, metrics):
    """Measure and print."""
    if is_scale and ratings is not None:
        raise click.UsageError("--scale and --ratings do not go together.")
    if metrics is not None:
        data.check_writable(metrics)
    kept = folder or data.default_data_dir() / "scale"
    venvs = venvs or data.default_data_dir() / "peers"
    click.echo(f"torch {torch.__version__}, {os.cpu_count()} cores; seconds of whole loops")
    with tempfile.TemporaryDirectory() as scratch:
        if is_scale:
            sizes = [int(size) for size in sizes.split(",")]
            figures = measure_scale(sizes, kept, Path(scratch), venvs, repeats)
        elif ratings is not None:
            own = {"jobs": OWN_JOBS, "options": ""}
            figures = compare_jobs(ratings, Path(scratch), venvs, repeats, **own)
        else:
            figures = measure_small(Path(scratch), venvs, repeats)
    if metrics is not None:
        collab.save_json(metrics, figures)


if __name__ == "__main__":
    main()
