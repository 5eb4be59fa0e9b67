"""Measure speed, each thing beside what it is compared with: `python tests/bench.py`.

What is compared takes turns after a warm-up, so that a shared machine's load falls on all alike; a
line has the median, the range, and how many times faster than the line that it names. Only ratios
within a run count. `--scale` measures sets of 1, 5 and 25 million ratings instead (`scale.py`, made
once and kept). Peers are measured where `tests/peers.py --install` has put them.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
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
PEERS = ("surprise", "cornac", "lenskit", "fastai")
LARGE_BATCH = 2048
JOB_SIZE = 5_000_000  # ratings of the whole job from file to model
# Chosen on a tenth held out of the training part of 5 million ratings.
LARGE_OPTIONS = "--n-factors 12 --batch-size 4096 --epochs 1 --lr-max 0.03"
LARGE_OPTIONS += " --weight-decay 0.1 --bias-decay 0.004"


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


def time_to(task, mse, seeds):
    """Seconds of the default recipe, evaluations too, to the first epoch with at most this MSE."""
    start = time.perf_counter()
    for _, row in collab.fit(task, options=collab.RECIPES["default"], seed=next(seeds)):
        if row["mse"] <= mse:
            return time.perf_counter() - start
    raise ValueError(f"the default recipe ends at {row['mse']:.4f}, above {mse}")


def evaluation(task, params, head):
    """What `collab.fit` does after an epoch."""
    tables = collab.to_rows(params, task.features, task.seen)
    predict = partial(model.predict, tables, head=head)
    return train.evaluate(predict, *task.test, clip=(1, 5))


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
    generator = torch.Generator().manual_seed(0)
    params = model.init_params(*map(len, task.ids), n_factors=40, generator=generator)
    head = model.bounded(0.0, 5.5)
    loops = {
        f"fastai's settings, the notebook's way, threads {threads}": partial(notebooks_loop, task),
        f"fastai's settings, ours, threads {threads}": partial(our_loop, task, FASTAI),
    }
    evaluate = partial(timed, evaluation, task, params, head)
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


def compare_peers(task, frames, folder, venvs, repeats):
    """Whole fits of the installed peers on ua, our loops and times to an error in between."""
    torch.set_num_threads(1)
    path = data.get_ml_100k()
    peers.write_task(folder, *frames, data.read_users(path), data.read_items(path))
    ready = peers.prepare(PEERS, venvs, is_install=False)
    seeds = itertools.count()
    ours = {
        "ours, fastai's settings": partial(our_loop, task, FASTAI),
        "ours, default recipe to test MSE 0.8997": partial(time_to, task, 0.8997, seeds),
        "ours, default recipe to test MSE 0.8631": partial(time_to, task, 0.8631, seeds),
    }
    seconds = {}
    for _ in range(repeats):
        for name, venv in ready.items():
            for row in peers.run_peer(name, venv, "ua", folder, *frames):
                seconds.setdefault(row["system"], []).append(row["seconds"])
        for name, measure in ours.items():
            seconds.setdefault(name, []).append(measure())
    for against in ("fastai", "Cornac"):
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
        scale.make(beside, n_ratings)
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


def recommend_child(path, folder, options):
    """Seconds and peak MiB of `recommend --all-users` from a model of one epoch."""
    saved, output = folder / "model.pt", folder / "recommended.parquet"
    run_child(
        ROOT / "collab.py",
        "train",
        "--ratings",
        path,
        *options[:4],
        "--epochs",
        "1",
        "--save",
        saved,
    )
    line, seconds, peak = run_child(
        ROOT / "collab.py", "recommend", saved, "--all-users", "--output", output
    )
    click.echo(
        f"{line.strip()}: {seconds:.1f} s, peak {peak:.0f} MiB".replace(str(output), "a file")
    )
    return {"seconds": seconds, "peak_mib": peak}


def compare_loading(path, venvs, repeats):
    """CSV to tensors, split and index included, beside pandas.read_csv alone, each a process."""
    code = "import sys; sys.path[:0] = sys.argv[1:3]; import bench; from pathlib import Path;"
    code += "print(bench.timed(bench.load, Path(sys.argv[3]), 'random'))"
    places = ROOT, ROOT / "tests", path
    pandas = [venvs / name / "bin" / "python" for name in ("lenskit", "fastai")]
    seconds = {}
    for _ in range(repeats):
        for python in filter(Path.exists, pandas):
            output = subprocess.check_output(
                [python, peers.FOLDER / "pandas_job.py", path], text=True
            )
            version, taken, _ = output.split()
            seconds.setdefault(f"pandas {version} read_csv", []).append(float(taken))
        taken = float(run_child("-c", code, *places)[0])
        seconds.setdefault("ours, to tensors", []).append(taken)
    show(seconds, next(iter(seconds)))
    return seconds


def fused_steps(sizes, columns, n_steps):
    """Seconds of steps by autograd and torch's fused AdamW."""
    net = Notebook(*sizes)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)

    def steps():
        for users, items, ratings in itertools.islice(zip(*columns, strict=True), n_steps):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(net(users, items), ratings).backward()
            optimizer.step()

    return timed(steps) / n_steps


def compare_steps(path, threads, repeats):
    """Seconds a step at 40 factors and `LARGE_BATCH`: ours, dense by hand, torch's fused AdamW."""
    torch.set_num_threads(threads)
    part, _, ids = load(path, "random")
    sizes, n_steps = tuple(map(len, ids)), min(100, len(part.ratings) // LARGE_BATCH)
    few = min(10, n_steps)  # of the slow ones
    rows = torch.randperm(len(part.ratings))[: n_steps * LARGE_BATCH]
    task = collab.Task(tuple(column[rows] for column in part), (), ids, (), None)
    options = collab.RECIPES["default"] | {"batch_size": LARGE_BATCH, "epochs": 1}
    options |= {"weight_decay": 0.01, "bias_decay": 0.001}
    batches = [column.split(LARGE_BATCH) for column in task.train]
    params = model.init_params(*sizes, n_factors=40, generator=torch.Generator().manual_seed(0))

    def dense():
        optimizer = schedule.adamw(schedule.constant(lr=0.01), weight_decay=0.01)
        loss_and_grad = partial(model.loss_and_grad, head=model.bounded(0.5, 5.5))
        columns = [column[: few * LARGE_BATCH] for column in task.train]
        (epoch,) = train.fit(
            params,
            *columns,
            loss_and_grad=loss_and_grad,
            optimizer=optimizer,
            n_epochs=1,
            batch_size=LARGE_BATCH,
            generator=torch.Generator().manual_seed(0),
        )
        return epoch.seconds / few

    measures = {
        "a step, dense, by hand": dense,
        "a step, autograd and AdamW(fused=True)": partial(fused_steps, sizes, batches, few),
        "a step, ours": lambda: our_loop(task, options) / n_steps,
    }
    seconds = alternate(measures, repeats)
    show(seconds, next(iter(measures)))
    return seconds


def compare_jobs(path, folder, venvs, repeats):
    """From a CSV file to a trained model: Cornac's MF, and ours with `LARGE_OPTIONS`."""
    for name, part in zip(
        ("train", "test"), data.split(data.read_ratings(path), "random"), strict=True
    ):
        part.select("user", "item", "rating").write_csv(folder / f"{name}.csv")
    seconds, errors = {}, {}
    python = venvs / "cornac" / "bin" / "python"
    for _ in range(repeats):
        if python.exists():
            peers.run([python, peers.FOLDER / "cornac_job.py", folder, time.time()])
            result = json.loads((folder / "results.json").read_text())
            seconds.setdefault(result["system"], []).append(result["seconds"])
            errors.setdefault(result["system"], []).append(result["mse"])
        figures = train_child(path, folder, *LARGE_OPTIONS.split())
        seconds.setdefault("ours, whole process", []).append(figures["job_seconds"])
        errors.setdefault("ours, whole process", []).append(figures["mse"])
    show(seconds, next(iter(seconds)))
    for name, values in errors.items():
        click.echo(f"{name:58} test MSE {statistics.mean(values):.4f}")
    return seconds | {f"{name}, test MSE": values for name, values in errors.items()}


def measure_scale(sizes, kept, folder, venvs, repeats):
    """Load, memory, epoch and error of each size; then steps and whole jobs."""
    figures = {}
    for size in sizes:
        path = make_once(kept, size)
        click.echo(f"\n{size:,} ratings, threads 2")
        options = ["--batch-size", LARGE_BATCH, "--threads", "2", "--epochs", "2"]
        trained = train_child(path, folder, *options)
        epochs = [row["seconds"] for row in trained["epochs"]]
        line = (
            "load {load_seconds:.2f} s, epoch {:.2f} s, peak {peak_mib:.0f} MiB, test MSE {mse:.4f}"
        )
        click.echo(line.format(statistics.mean(epochs), **trained))
        figures[size] = {
            "train": trained,
            # Before this process holds much: a child's peak begins with its parent's.
            "recommend": recommend_child(path, folder, options),
            "loading": compare_loading(path, venvs, repeats),
            "steps": compare_steps(path, 2, repeats),
        }
        dense = statistics.median(figures[size]["steps"]["a step, dense, by hand"])
        n_steps = -(-trained["n_train"] // LARGE_BATCH)
        ratio = dense * n_steps / statistics.mean(epochs)
        click.echo(f"dense epoch {dense * n_steps:.1f} s: ours is {ratio:.1f} x faster")
        if size == JOB_SIZE:
            figures[size]["jobs"] = compare_jobs(path, folder, venvs, repeats)
    return figures


def measure_small(folder, venvs, repeats):
    path = data.get_ml_100k(notice=lambda line: click.echo(line, err=True)) / "u.data"
    frames = data.split(data.read_ratings(path), "ua")
    task = collab.prepare(*frames, ("id",))
    figures = compare_start(path, folder, repeats)
    for threads in (1, 2):
        figures |= compare_loops(task, threads, repeats)
    return figures | compare_peers(task, frames, folder, venvs, repeats)


@click.command()
@click.option("--scale", "is_scale", is_flag=True, help="Sets of millions of ratings instead.")
@click.option("--sizes", default="1000000,5000000,25000095", show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--folder", type=FILE, help="Where synthetic sets are kept.  [default: the cache]")
@click.option("--venvs", type=FILE, help="Folder of the peers.  [default: the cache]")
@click.option("--metrics", type=FILE, help="Write all figures here, as JSON.")
def main(is_scale, sizes, repeats, folder, venvs, metrics):
    """Measure and print."""
    if metrics is not None:
        data.check_writable(metrics)
    kept = folder or data.default_data_dir() / "scale"
    venvs = venvs or data.default_data_dir() / "peers"
    click.echo(f"torch {torch.__version__}, {os.cpu_count()} cores; seconds of whole loops")
    with tempfile.TemporaryDirectory() as scratch:
        if is_scale:
            sizes = [int(size) for size in sizes.split(",")]
            figures = measure_scale(sizes, kept, Path(scratch), venvs, repeats)
        else:
            figures = measure_small(Path(scratch), venvs, repeats)
    if metrics is not None:
        collab.save_json(metrics, figures)


if __name__ == "__main__":
    main()
