"""Train a collaborative-filtering model on MovieLens: `python collab.py train`.

The recipes, the functions that join the four other modules to a training, and the commands, which
read their options, call these and print. The modules are imported inside the functions that need
them, so that `--help` is instant.
"""

import atexit
import io
import json
import math
import os
import re
import signal
import statistics
import sys
import time
import zipfile
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click

FEATURES = ("id", "implicit", "side", "time")
DATASETS = ("ml-100k", "ml-latest-small", "ml-1m", "ml-10m", "ml-20m", "ml-25m", "ml-32m")
SPLITS = ("ua", "ub", "u1", "u2", "u3", "u4", "u5", "random")

# fastai: fastai v1's lesson, matched in every detail. default and best: chosen by tests/tune.py on
# validation parts of the training part.
RECIPES = {
    "fastai": {
        "features": ("id",),
        "loss": "mse",
        "y_range": (0.0, 5.5),
        "n_factors": 40,
        "dropout": 0.0,
        "ensemble": 1,
        "epochs": 10,
        "batch_size": 64,
        "drop_last": True,
        "lr_max": 0.01,
        "weight_decay": 0.1,
        "bias_decay": 0.1,
    },
    "default": {
        "features": ("id",),
        "loss": "mse",
        "y_range": (0.5, 5.5),
        "n_factors": 40,
        "dropout": 0.0,
        "ensemble": 1,
        "epochs": 5,
        "batch_size": 512,
        "drop_last": False,
        "lr_max": 0.01,
        "weight_decay": 0.5,
        "bias_decay": 0.01,
    },
    "best": {
        "features": ("id", "implicit", "side", "time"),
        "loss": "ordinal",
        "y_range": None,
        "n_factors": 32,
        "dropout": 0.1,
        "ensemble": 5,
        "epochs": 16,
        "batch_size": 1024,
        "drop_last": False,
        "lr_max": 0.015,
        "weight_decay": 1.0,
        "bias_decay": 0.2,
    },
}


ML_100K_ROWS = 943 + 1_682  # users and items, for which the recipes' decays are
MOST_LEVELS = 100  # distinct ratings that loss ordinal takes; it has a bias for each


class Task(NamedTuple):
    """What a model is trained and tested on, as tensors."""

    train: tuple  # users, items, ratings, and the context of each where features have one
    test: tuple  # the same
    ids: tuple  # data.Ids
    seen: tuple  # bool masks of the users and of the items that training tells something of
    features: tuple | None  # model.Features; None for ids alone


def prepare(train, test, kinds, *, users=None, items=None):
    """Make a `Task` of two frames of ratings and, for features, those of users and items."""
    import data
    import model

    part, test_part, ids = data.to_tensors(train, test)
    about = {"users": users, "items": items} if "side" in kinds else {}
    seen, features = data.find_seen(part, ids, **about), None
    if tuple(kinds) != ("id",):
        features = model.Features(*data.features(train, ids, kinds, **about))
    if "time" in kinds:
        context, test_context = data.time_context(train, test)
        part, test_part = (*part, context), (*test_part, test_context)
    return Task(part, test_part, ids, seen, features)


def choose_features(kinds, ratings, users, items, *, is_given):
    """Those of `kinds` that the data has; ValueError for another if `is_given` by the user."""
    lacks = {}
    if users is None and items is None:
        lacks["side"] = "tables of users or items"
    if "timestamp" not in ratings.columns:
        lacks["time"] = "timestamps"
    for kind in kinds:
        if is_given and kind in lacks:
            raise ValueError(f"the feature {kind}: the data has no {lacks[kind]}")
    return tuple(kind for kind in kinds if kind not in lacks)


def choose_head(ratings, options):
    """Name and arguments of the `model.Head` for `options["loss"]` and the training `ratings`.

    ValueError when a rating lies outside `y_range`: no prediction could reach it; and when there
    are too few or too many distinct ratings to be levels.
    """
    if options["loss"] == "ordinal":
        levels = ratings.unique()
        if not 3 <= len(levels) <= MOST_LEVELS:
            raise ValueError(
                f"--loss ordinal needs 3 to {MOST_LEVELS} distinct ratings, "
                f"the training part has {len(levels)}"
            )
        shares = [(ratings > level).double().mean().item() for level in levels[:-1]]
        return "ordinal", (levels.tolist(), shares)
    low, high = options["y_range"]
    if ratings.min() < low or ratings.max() > high:
        text = "ratings from {:g} to {:g} are not all within y_range {:g} to {:g}"
        raise ValueError(text.format(ratings.min(), ratings.max(), low, high))
    return "bounded", (low, high)


def make_head(name, arguments):
    """The `model.Head` that `choose_head` has named."""
    import model

    return {"bounded": model.bounded, "ordinal": model.ordinal}[name](*arguments)


class Job(NamedTuple):
    """What a process trains on; under torchrun a share of the columns, and the same rest."""

    columns: tuple  # Task.train; in process r of R the rows r, r + R, r + 2R ... of it
    n_rows: int  # of all processes
    features: tuple | None  # Task.features
    sizes: tuple  # rows of the two tables of params
    head: tuple  # what `choose_head` returns
    options: dict
    seed: int
    n_processes: int


def make_job(task, *, options, seed, n_processes=1):
    """The `Job` of training on all of the task's ratings with `options`, a recipe's dict."""
    sizes = len(task.ids.users), len(task.ids.items)
    if task.features is not None:
        sizes = tuple(len(side[0]) - 1 for side in task.features[2:])
    ratings = task.train[2]
    head = choose_head(ratings, options)
    return Job(task.train, len(ratings), task.features, sizes, head, options, seed, n_processes)


def deal_job(job):
    """Give each process its part of process 0's `job`. The other processes pass None."""
    import torch

    import model
    import train

    rest = [job and job._replace(columns=None, features=None)]
    train.call_together(torch.distributed.broadcast_object_list, rest)
    columns = train.deal(job and job.columns, by_row=True)
    features = job and [tensor for matrix in job.features or () for tensor in matrix]
    if features := train.deal(features, by_row=False):
        features = model.Features(*(tuple(features[i : i + 3]) for i in range(0, 12, 3)))
    return rest[0]._replace(columns=columns, features=features or None)


def fit(task, *, options, seed, n_processes=1):
    """Train with `options`, a recipe's dict, and yield `(members, row)` after each epoch.

    `members` are the `model.Params` of the ensemble's models, trained side by side; `row` is a dict
    of the epoch's figures: epoch, train_loss, mse, rmse, mae, seconds (training), evaluate_seconds.
    With more than one process, this is the first, and the others call `follow`.
    """
    import train

    ratings = task.train[2]
    clip = ratings.min(), ratings.max()
    job = make_job(task, options=options, seed=seed, n_processes=n_processes)
    head = make_head(*job.head)
    if n_processes > 1:
        job = deal_job(job)
    start = time.perf_counter()  # what is worked out before the first step counts too
    for epochs in fit_members(job):
        trained = time.perf_counter()
        tables = [to_rows(epoch.params, task) for epoch in epochs]
        errors = train.evaluate(
            lambda *rows, tables=tables: predict_each(tables, *rows, head=head).mean(0),
            *task.test,
            clip=clip,
        )
        yield (
            [epoch.params for epoch in epochs],
            {
                "epoch": epochs[0].epoch,
                "train_loss": sum(epoch.train_loss for epoch in epochs) / len(epochs),
                **errors._asdict(),
                "seconds": trained - start,
                "evaluate_seconds": time.perf_counter() - trained,
            },
        )
        start = time.perf_counter()


def follow(threads):
    """What a process other than the first does for `fit`: train on the share that it is given."""
    import torch

    torch.set_num_threads(threads)
    for _ in fit_members(deal_job(None)):
        pass


def fit_members(job):
    """Train the ensemble's models side by side; yields a tuple of their `train.Epoch`s."""
    import torch

    import model

    head = make_head(*job.head)

    def member(number):
        # torch's generator takes 32 bits; this spreads the members over them, the first at `seed`.
        generator = torch.Generator().manual_seed((job.seed + number * 0x9E3779B1) % 2**32)
        params = model.init_params(
            *job.sizes,
            n_factors=job.options["n_factors"],
            n_outputs=head.n_outputs,
            generator=generator,
        )
        return train_params(params, job, head=head, generator=generator)

    return zip(*map(member, range(job.options["ensemble"])), strict=True)


def train_params(params, job, *, head, generator):
    """Train on the job's ratings by the faster of two ways to the same numbers; yields epochs.

    Several processes always take the step on all rows, of which the numbers of the step on the
    batch's rows differ by up to 1e-3 in the error.
    """
    import model
    import schedule
    import train

    options = job.options
    common = {
        "n_epochs": options["epochs"],
        "batch_size": options["batch_size"],
        "drop_last": options["drop_last"],
        "generator": generator,
    }
    n_batches = train.count_batches(
        job.n_rows, options["batch_size"], drop_last=options["drop_last"]
    )
    n_steps = options["epochs"] * n_batches
    pace = schedule.one_cycle(n_steps, lr_max=options["lr_max"])
    is_alone = job.n_processes == 1
    is_plain = job.features is None and not options["dropout"]
    if is_alone and is_plain and is_sparse_faster(params, options, n_steps):
        return train_rows(params, job, head=head, pace=pace, n_steps=n_steps, **common)
    loss_and_grad = model.loss_and_grad
    if job.features is not None:
        loss_and_grad = partial(model.embedded_loss_and_grad, features=job.features)
    decay, bias_decay = options["weight_decay"], options["bias_decay"]
    train_dense = train.fit if is_alone else partial(train.fit_parallel, n_rows=job.n_rows)
    return train_dense(
        params,
        *job.columns,
        loss_and_grad=partial(
            loss_and_grad, head=head, dropout=options["dropout"], generator=generator
        ),
        optimizer=schedule.adamw(
            pace,
            weight_decay=(decay, decay, bias_decay, bias_decay),  # in the order of model.Params
        ),
        **common,
    )


def train_rows(params, job, *, head, pace, n_steps, **common):
    """`train_params` by the step that touches the batch's rows alone; yields epochs."""
    import model
    import schedule
    import train

    n_users, n_factors = len(params.user_factors), job.options["n_factors"]
    table = model.join(params)
    decays = job.options["weight_decay"], job.options["bias_decay"]
    weight_decay = [decays[0]] * n_factors + [decays[1]] * (table.shape[1] - n_factors)
    for epoch in train.fit_rows(
        table,
        *job.columns,
        offsets=(0, n_users),
        loss_and_grad_=partial(model.pair_loss_and_grad_, head=head, n_factors=n_factors),
        optimizer=schedule.sparse_adamw(pace, n_steps, weight_decay=weight_decay),
        **common,
    ):
        shape = {"n_factors": n_factors, "n_outputs": head.n_outputs}
        yield epoch._replace(params=model.split_table(epoch.params, n_users, **shape))


def is_sparse_faster(params, options, n_steps):
    """Whether a step on the batch's rows alone beats one on all rows, as measured on one thread.

    A row in a batch costs what five rows cost the dense step, give or take two. With a strong decay
    at a large lr all rows must rest too often (see `schedule.sparse_adamw`), and what depends on
    the schedule is computed before the first step, 2 microseconds and 100 bytes for each.
    """
    n_rows = len(params.user_factors) + len(params.item_factors)
    decay = max(options["weight_decay"], options["bias_decay"])
    is_large = n_rows > 5 * options["batch_size"]
    return is_large and options["lr_max"] * decay < 0.03 and n_steps < 500_000


def to_rows(params, task):
    """Tables with a row a user and a row an item, the unseen ones filled, ready to predict with."""
    import model

    if task.features is not None:
        params = model.embed(params, task.features)
    return model.fill_unseen(params, *task.seen)


def predict(members, *rows, head):
    """Mean and standard deviation of the members' predictions of pairs, as `model.predict` does.

    The deviation says how much the models of the ensemble disagree; it is 0 for a single one.
    """
    predictions = predict_each(members, *rows, head=head)
    return predictions.mean(0), predictions.std(0, correction=0)


def predict_each(members, *rows, head):
    """The predictions of each member, along the first dimension."""
    import torch

    import model

    return torch.stack([model.predict(params, *rows, head=head) for params in members])


def cut(ratings, split, *, seed, holdout=None):
    """The train and test frames of `split`; with `holdout`, a share of train and the rest of it.

    With `holdout` the split's test part is dropped unread, and the share takes its place.
    """
    import data

    train, test = data.split(ratings, split, seed=seed)
    return (train, test) if holdout is None else data.hold_out(train, holdout, seed=seed)


def describe_unseen(task):
    """One line on the users and items without training ratings, or None where all have some."""
    pairs = zip(task.ids, task.train[:2], strict=True)
    counts = [len(raw_ids) - len(rows.unique()) for raw_ids, rows in pairs]
    if not any(counts):
        return None
    how = "by their features" if all(seen.all() for seen in task.seen) else "as average"
    return "without training ratings: {} users, {} items; predicted {}".format(*counts, how)


def _finite(context, parameter, value):
    """Refuses `nan` and `inf`, which click's FloatRange lets pass."""
    for number in value if isinstance(value, tuple) else (value,):
        if number is not None and not math.isfinite(number):
            raise click.BadParameter(f"{number} is not a finite number.")
    return value


def _interval(context, parameter, value):
    _finite(context, parameter, value)
    if value is not None and value[0] >= value[1]:
        raise click.BadParameter(f"{value[0]:g} is not below {value[1]:g}.")
    return value


def _split(context, parameter, value):
    if value not in (None, *SPLITS) and not re.fullmatch(r"last[1-9]\d{0,8}", value):
        raise click.BadParameter(f"'{value}' is not one of {', '.join(SPLITS)}, last1, last10 ...")
    return value


def _names(allowed):
    """A callback: names separated by commas, each one of `allowed` and none twice."""

    def read(context, parameter, value):
        if value is None:
            return None
        names = tuple(value.split(","))
        for name in names:
            if name not in allowed:
                raise click.BadParameter(f"'{name}' is not one of {', '.join(allowed)}.")
        if len(set(names)) < len(names):
            raise click.BadParameter(f"'{value}' names one twice.")
        return names

    return read


def find_processes():
    """Rank and number of the processes of this training, as torchrun tells them; 0 and 1 alone."""
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    is_told = rank.isdecimal() and size.isdecimal() and int(size) > 1
    return (int(rank), int(size)) if is_told else (0, 1)


def join_processes():
    """Be one of the processes that torchrun has started, until the end of the program."""
    from torch import distributed

    try:
        meeting = distributed.rendezvous("env://", timeout=timedelta(minutes=5))
        store, rank, size = next(meeting)
    except RuntimeError as error:
        address = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise ConnectionError(f"no other process of this training at {address}") from error
    # The others wait while the first reads the data and evaluates, however long that takes.
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(days=1)
    )
    # Not before an error is told: torchrun ends all processes when the others have lost the first.
    atexit.register(distributed.destroy_process_group)


def _notice(line):
    if find_processes()[0] == 0:  # the others have nothing else to say
        click.echo(" ".join(line.splitlines()), err=True)  # a file may have any name


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def cli():
    """Collaborative filtering in plain PyTorch."""


FILE = click.Path(path_type=Path)
POSITIVE = click.FloatRange(0, min_open=True)
MODEL_OPTIONS = [
    click.option("--dataset", type=click.Choice(DATASETS), help="A MovieLens.  [default: ml-100k]"),
    click.option(
        "--ratings",
        "source",
        type=FILE,
        help="Instead: a file of user, item, rating[, timestamp]; a MovieLens's folder or zip.",
    ),
    click.option("--data-dir", type=FILE, help="Folder of the data.  [default: the user's cache]"),
    click.option(
        "--recipe",
        type=click.Choice(list(RECIPES)),
        default="default",
        show_default=True,
        help="A named set of defaults for the options from --features to --bias-decay.",
    ),
    click.option(
        "--features",
        callback=_names(FEATURES),
        metavar="NAMES",
        help=f"What a row is made of: {','.join(FEATURES)}, or some of them.",
    ),
    click.option("--loss", type=click.Choice(["mse", "ordinal"]), help="What is differentiated."),
    click.option(
        "--y-range",
        nargs=2,
        type=float,
        callback=_interval,
        metavar="LOW HIGH",
        help="Bounds of a prediction, of the sigmoid that makes it (loss mse).",
    ),
    click.option("--n-factors", type=click.IntRange(1, 2**16), help="Latent size."),
    click.option(
        "--dropout",
        type=click.FloatRange(0, 1, max_open=True),
        callback=_finite,
        help="Share of the products of factors left out of a prediction in training.",
    ),
    click.option("--ensemble", type=click.IntRange(1, 1000), help="Models to average."),
    click.option("--epochs", type=click.IntRange(1, 10**6), help="Passes over the training part."),
    click.option("--batch-size", type=click.IntRange(1, 2**31), help="Ratings a step."),
    click.option("--drop-last/--keep-last", default=None, help="Leave out an incomplete batch?"),
    click.option("--lr-max", type=POSITIVE, callback=_finite, help="Step size at the peak."),
    click.option(
        "--weight-decay",
        type=click.FloatRange(0),
        callback=_finite,
        help="Decoupled: a step takes the share lr times this off every factor.",
    ),
    click.option(
        "--bias-decay", type=click.FloatRange(0), callback=_finite, help="The same for the biases."
    ),
    click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True),
    click.option(
        "--threads",
        type=click.IntRange(1, os.cpu_count()),
        default=1,
        show_default=True,
        help="Of torch, in each process; one is fastest for small batches.",
    ),
    click.option("--metrics", type=FILE, help="Write the figures here, as JSON."),
]


def with_model_options(command):
    for option in reversed(MODEL_OPTIONS):
        command = option(command)
    return command


def choose_options(recipe, given):
    """The recipe's options with those given over them. UsageError where they do not go together."""
    options = RECIPES[recipe] | {name: value for name, value in given.items() if value is not None}
    if options["loss"] == "ordinal" and given["y_range"] is not None:
        raise click.UsageError("--y-range goes with --loss mse.")
    if options["loss"] == "mse" and options["y_range"] is None:
        raise click.UsageError("--loss mse needs --y-range.")
    lr_max, decay = options["lr_max"], max(options["weight_decay"], options["bias_decay"])
    if lr_max * decay >= 1:
        raise click.UsageError(f"--lr-max {lr_max:g} times a decay of {decay:g} is not below 1.")
    return options


def choose_dataset(dataset, source):
    """The data set's name, None with ratings of the user's own. UsageError for both."""
    if dataset is not None and source is not None:
        raise click.UsageError(f"--dataset {dataset} and --ratings {source} are two data sets.")
    return dataset or (DATASETS[0] if source is None else None)


def scale_decay(recipe, given, *, n_rows):
    """The recipe's decays, but for those given, for `n_rows` users and items of other data.

    A row is in fewer of the batches the more rows there are, and decays at every step: a decay that
    goes with 1 / n_rows takes the same share off it between two of them. None is above the
    recipe's.
    """
    scale = min(ML_100K_ROWS / n_rows, 1.0)
    names = [name for name in ("weight_decay", "bias_decay") if given[name] is None]
    return {name: RECIPES[recipe][name] * scale for name in names}


def start(threads, dataset, source, data_dir, paths):
    """What every command does first: check, fetch, read. Returns ratings, users, items."""
    import torch

    import data

    for path in filter(None, paths):
        data.check_writable(path)  # said now, not after the training
    torch.set_num_threads(threads)
    if source is None:
        source = data.get_dataset(dataset, data_dir, notice=_notice)
    return data.read_ratings(source), data.read_users(source), data.read_items(source)


@cli.command("train")
@click.option(
    "--split",
    callback=_split,
    metavar="NAME",
    help="ua, ub, u1 to u5 (ml-100k only), random, or last1, last10 ...: each user's last by time."
    "  [default: ua for ml-100k, else random]",
)
@click.option(
    "--holdout",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    callback=_finite,
    help="Test on this share of the training part instead; the test part is not read.",
)
@with_model_options
@click.option("--save", type=FILE, help="Write the model to this file.")
def train_command(
    dataset, source, data_dir, split, holdout, recipe, seed, threads, save, metrics, **given
):
    """Train a model, printing its error on the test part after each epoch.

    Under torchrun each process has a share of the ratings, and the result is that of one.
    """
    options = choose_options(recipe, given)
    dataset = choose_dataset(dataset, source)
    split = split or ("ua" if dataset == "ml-100k" else "random")
    if save is not None and metrics is not None and save.resolve() == metrics.resolve():
        raise click.UsageError(f"--save and --metrics are both {save}.")
    rank, n_processes = find_processes()
    if n_processes > 1:
        join_processes()
    started = time.perf_counter()
    if rank > 0:
        return follow(threads)
    ratings, *about = start(threads, dataset, source, data_dir, (save, metrics))
    is_given = given["features"] is not None
    options["features"] = choose_features(options["features"], ratings, *about, is_given=is_given)
    if "time" not in options["features"] and not split.startswith("last"):
        ratings = ratings.drop("timestamp", strict=False)
    frames = cut(ratings, split, seed=seed, holdout=holdout)
    del ratings  # of 25 million, half a gigabyte; and so are the frames
    task = prepare(*frames, options["features"], users=about[0], items=about[1])
    del frames
    if dataset != "ml-100k":
        options |= scale_decay(recipe, given, n_rows=sum(map(len, task.ids)))
    choose_head(task.train[2], options)  # its errors come before the table
    load_seconds = time.perf_counter() - started
    if unseen := describe_unseen(task):
        _notice(unseen)

    tested = "test" if holdout is None else "held"
    click.echo(f"epoch | train_loss | {tested}_mse | {tested}_rmse | {tested}_mae |    time")
    epochs = fit(task, options=options, seed=seed, n_processes=n_processes)
    members, rows = show_epochs(epochs, options["epochs"])
    evaluate_seconds = sum(row.pop("evaluate_seconds") for row in rows)
    figures = {
        "recipe": recipe,
        "dataset": dataset or str(source),
        "split": split,
        "seed": seed,
        "options": options,
        "n_users": len(task.ids.users),
        "n_items": len(task.ids.items),
        "n_train": len(task.train[2]),
        "n_test": len(task.test[2]),
        "epochs": rows,
        **{name: rows[-1][name] for name in ("mse", "rmse", "mae")},
        "fit_seconds": sum(row["seconds"] for row in rows),
        "evaluate_seconds": evaluate_seconds,
        "load_seconds": load_seconds,
    }
    where = split
    if n_processes > 1:
        figures["processes"] = n_processes
    if holdout is not None:
        figures["holdout"] = holdout
        where = f"{holdout:g} of the training part of {split}"
    result = (
        "{} mse {mse:.4f}, rmse {rmse:.4f}, mae {mae:.4f} on {}, trained in {fit_seconds:.2f} s"
    )
    click.echo(result.format(tested, where, **figures))
    if save is not None:
        save_model(save, members, task, figures)
    if metrics is not None:
        save_json(metrics, figures)


def show_epochs(epochs, n_epochs):
    """Print a line after each epoch, with a bar below on a terminal. Returns members and rows."""
    line = (
        "{epoch:5} | {train_loss:10.4f} | {mse:8.4f} | {rmse:9.4f} | {mae:8.4f} | {seconds:5.2f} s"
    )
    members, rows = [], []
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    with click.progressbar(length=n_epochs, file=sys.stderr, hidden=not is_terminal) as bar:
        for members, row in epochs:  # noqa: B007
            if is_terminal:  # the bar makes room for the line
                click.echo("\r\033[K", nl=False, err=True)
            click.echo(line.format_map(row))
            rows.append(row)
            bar.update(1)
    return members, rows


@cli.command("cross-validate")
@click.option(
    "--splits",
    callback=_names(SPLITS[:-1]),
    metavar="NAMES",
    help="Published splits to train and test on in turn.  [default: u1,u2,u3,u4,u5]",
)
@click.option(
    "--folds", type=click.IntRange(2), help="Cut the ratings into this many, by --seed, instead."
)
@with_model_options
def cross_validate_command(
    dataset, source, data_dir, splits, folds, recipe, seed, threads, metrics, **given
):
    """Train and test on several splits, printing each one's error, the mean and the spread."""
    options = choose_options(recipe, given)
    if (n_processes := find_processes()[1]) > 1:
        raise click.UsageError(f"cross-validate is of one process, not of {n_processes}.")
    if folds and splits:
        raise click.UsageError("--splits and --folds do not go together.")
    dataset = choose_dataset(dataset, source)
    ratings, *about = start(threads, dataset, source, data_dir, (metrics,))
    is_given = given["features"] is not None
    options["features"] = choose_features(options["features"], ratings, *about, is_given=is_given)

    import data

    if folds:
        cuts = enumerate(data.fold(ratings, folds, seed=seed), 1)
        parts = ((f"{number}/{folds}", frames) for number, frames in cuts)
    else:
        splits = splits or ("u1", "u2", "u3", "u4", "u5")
        parts = ((name, data.split(ratings, name)) for name in splits)
    click.echo(" fold | test_rmse | test_mae |    time")
    rows = []
    for name, frames in parts:
        task = prepare(*frames, options["features"], users=about[0], items=about[1])
        if dataset != "ml-100k":
            options |= scale_decay(recipe, given, n_rows=sum(map(len, task.ids)))
        if unseen := describe_unseen(task):
            _notice(f"{name}: {unseen}")
        seconds = 0.0
        for _, row in fit(task, options=options, seed=seed):
            seconds += row["seconds"]
        rows.append(
            {"fold": name, **{n: row[n] for n in ("mse", "rmse", "mae")}, "seconds": seconds}
        )
        click.echo("{fold:>5} | {rmse:9.4f} | {mae:8.4f} | {seconds:5.2f} s".format_map(rows[-1]))
    figures = {
        "recipe": recipe,
        "dataset": dataset or str(source),
        "seed": seed,
        "options": options,
        "folds": rows,
    }
    for name in ("rmse", "mae"):
        values = [row[name] for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        figures |= {name: statistics.mean(values), f"{name}_std": spread}
    figures["fit_seconds"] = sum(row["seconds"] for row in rows)
    result = "rmse {rmse:.4f} +- {rmse_std:.4f}, mae {mae:.4f} +- {mae_std:.4f} over {} folds"
    click.echo(result.format(len(rows), **figures))
    if metrics is not None:
        save_json(metrics, figures)


def save_json(path, figures):
    import data

    data.write_file(path, (json.dumps(figures, indent=1, allow_nan=False) + "\n").encode())


FORMAT = "collab 1"  # of a saved model


def save_model(path, members, task, figures):
    """Write all that predictions need: the members' tables, features, raw ids, options, figures."""
    import torch

    import data

    content = io.BytesIO()
    saved = {
        "format": FORMAT,
        "params": [params._asdict() for params in members],
        "features": task.features and [tuple(matrix) for matrix in task.features[:2]],
        "seen": task.seen,
        "user_ids": task.ids.users.to_list(),
        "item_ids": task.ids.items.to_list(),
        "head": choose_head(task.train[2], figures["options"]),
        "figures": figures,
    }
    torch.save(saved, content)
    data.write_file(path, content.getvalue())


class Model(NamedTuple):
    """A saved model, ready for `predict`."""

    members: list  # model.Params with a row a user and a row an item
    head: tuple  # model.Head
    user_ids: list  # raw ids by row
    item_ids: list
    figures: dict  # what `train --metrics` wrote


def load_model(path):
    """Read what `train --save` wrote. ValueError, naming the file, for anything else."""
    import torch

    import model

    with open(path, "rb") as file:
        try:
            if not zipfile.is_zipfile(file):  # torch's older formats are plain pickles
                raise ValueError("no zip file")
            saved = torch.load(path, weights_only=True)
            if saved["format"] != FORMAT:
                raise ValueError(f"format {saved['format']!r}, not {FORMAT!r}")
            members = [model.Params(**params) for params in saved["params"]]
            if saved["features"] is not None:
                features = model.Features(*saved["features"], None, None)
                members = [model.embed(params, features) for params in members]
            members = [model.fill_unseen(params, *saved["seen"]) for params in members]
            head = make_head(*saved["head"])
            return Model(members, head, *(saved[n] for n in ("user_ids", "item_ids", "figures")))
        except Exception as error:  # whatever a file from elsewhere makes torch raise
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{path}: not a model of this program: {line}") from None


def main():
    """Run the command line; whatever a user can cause ends in one line, with no traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half-done is undone
    try:
        cli(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _notice(f"Error: {error.format_message()}")
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _notice("interrupted")
        sys.exit(130)
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        _notice(f"Error: {name}{error.strerror or error}")
        sys.exit(1)
    except ValueError as error:
        _notice(f"Error: {error}")
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        click.echo("Error: not enough memory for these options", err=True)  # of any process
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from here on it ends the program at once


if __name__ == "__main__":
    main()
