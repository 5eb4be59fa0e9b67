"""Train a model of ratings and ask it: `python collab.py train`, `recommend`, `predict` and more.

The recipes, the functions that join the four other modules, which return values and print nothing,
and the commands, which read their options, call these and print. The modules are imported inside
the functions that need them, so that `--help` is instant.

>>> import collab
>>> model = collab.train_model(collab.read(), epochs=1)  # MovieLens 100K
>>> [each.title for each in collab.recommend(model, user=196, n=1)]
['Shawshank Redemption, The (1994)']
"""

import atexit
import hashlib
import io
import json
import math
import os
import pickle
import re
import signal
import statistics
import sys
import time
import warnings
import zipfile
from bisect import bisect_left
from contextlib import contextmanager
from datetime import timedelta
from functools import partial, wraps
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import click

FEATURES = ("id", "implicit", "side", "time")
DATASETS = ("ml-100k", "ml-latest-small", "ml-1m", "ml-10m", "ml-20m", "ml-25m", "ml-32m")
LOSSES = ("mse", "ordinal")
SPLITS = ("ua", "ub", "u1", "u2", "u3", "u4", "u5", "random")

# fastai: fastai v1's lesson, matched in every detail. default and best: chosen by tests/tune.py on
# validation parts of the training part of ml-100k; with fits_data, `fit_recipe` makes of these
# values those for other data.
RECIPES = {
    "fastai": {
        "fits_data": False,
        "features": ("id",),
        "loss": "mse",
        "y_range": (0.0, 5.5),
        "std": 0.01,
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
        "fits_data": True,
        "features": ("id",),
        "loss": "mse",
        "y_range": (0.5, 5.5),
        "std": 0.003,
        "n_factors": 40,
        "dropout": 0.0,
        "ensemble": 1,
        "epochs": 6,
        "batch_size": 612,
        "drop_last": False,
        "lr_max": 0.01,
        "weight_decay": 0.6,
        "bias_decay": 0.3,
    },
    "best": {
        "fits_data": True,
        "features": ("id", "implicit", "side", "time"),
        "loss": "ordinal",
        "y_range": None,
        "std": 0.003,
        "n_factors": 32,
        "dropout": 0.1,
        "ensemble": 5,
        "epochs": 16,
        "batch_size": 1024,
        "drop_last": False,
        "lr_max": 0.015,
        "weight_decay": 0.9,
        "bias_decay": 0.3,
    },
}


# Of ml-100k's split ua, which the recipes' values are for.
UA_RATINGS, UA_ROWS = 90_570, 943 + 1_680  # training ratings; users and items that have some
LEAST_BATCH = 2
MOST_LEVELS = 100  # distinct ratings that loss ordinal takes; it has a bias for each
PRIOR_WIDTH = 4.0  # of a new user's row, by `tests/fold_in.py --validate`
LARGEST = 3e38  # of float32's numbers
SCORES_AT_ONCE = 1 << 24  # predictions held in memory when all items are ranked


class Data(NamedTuple):
    """What a training reads, as polars frames."""

    name: str | None  # of the MovieLens; None for ratings of the user's own
    source: str  # the name or the path
    ratings: object  # user, item, rating[, timestamp], as `data.read_ratings`
    test: object | None  # a test part of its own, the same
    users: object | None  # side information, as `data.read_users` and `data.read_items`
    items: object | None
    rating_range: tuple | None  # of the scale; None for that of the ratings


def read(
    dataset=None,
    ratings=None,
    *,
    test=None,
    users=None,
    items=None,
    columns=None,
    rating_range=None,
    allow_similar_ids=False,
    data_dir=None,
    notice=lambda line: None,
):
    """Read a MovieLens, ml-100k unless named, or `ratings`, a path, with the tables beside it.

    `columns` and `rating_range` are those of `data.read_ratings`. Of several ratings of one (user,
    item) the latest is kept. `notice` gets a line on where data came from and on what was left out.
    ValueError and OSError in one line for what cannot be read, and, unless `allow_similar_ids`, for
    ids that differ only in case or spaces.
    """
    import data

    dataset = choose_dataset(dataset, ratings)
    if dataset is None:
        path = Path(ratings)
    else:
        path = data.get_dataset(dataset, data_dir and Path(data_dir), notice=notice)
    options = {"rating_range": rating_range, "notice": notice}
    frames = [
        read_part(path, columns=columns if dataset is None else None, **options),
        None if test is None else read_part(Path(test), columns=columns, **options),
    ]
    has_tables = path.is_dir() or (path.is_file() and zipfile.is_zipfile(path))  # a pipe: once
    tables = []
    for reader, own, name in ((data.read_users, users, "user"), (data.read_items, items, "item")):
        if own is not None:
            tables.append(reader(Path(own), column=(columns or {}).get(name)))
            if tables[-1] is None:
                raise ValueError(f"{own}: no table of {name}s in it")
        else:
            tables.append(reader(path) if has_tables else None)
    frames = data.same_ids(*frames, *tables)
    if not allow_similar_ids:
        for frame in frames[:2]:
            if frame is not None:
                data.check_ids(frame)
    return Data(dataset, dataset or str(ratings), *frames, rating_range)


def read_part(path, *, columns, rating_range, notice):
    """The ratings of a file, one for each user and item."""
    import data

    ratings = data.read_ratings(path, columns=columns, rating_range=rating_range)
    kept = data.drop_repeats(ratings)
    if n_repeats := len(ratings) - len(kept):
        notice(f"{path}: {n_repeats:,} earlier ratings of the same user and item are left out")
    return kept


class Task(NamedTuple):
    """What a model is trained and tested on, as tensors."""

    train: tuple  # users, items, ratings, and the context of each where features have one
    test: tuple  # the same
    ids: tuple  # data.Ids
    seen: tuple  # bool masks of the users and of the items that training tells something of
    averages: tuple  # model.Averages of the training ratings
    features: tuple | None  # model.Features; None for ids alone
    sizes: tuple  # how many features users and items have; how many they are for ids alone
    times: object = None  # (N,) int64 timestamps of train; None without the feature time


def prepare(train, test, kinds, *, users=None, items=None, allow_overlap=False):
    """Make a `Task` of two frames of ratings and, for features, those of users and items."""
    import data
    import model

    part, test_part, ids = data.to_tensors(train, test, allow_overlap=allow_overlap)
    about = {"users": users, "items": items} if "side" in kinds else {}
    seen, features, times = data.find_seen(part, ids, **about), None, None
    sizes = n_users, n_items = len(ids.users), len(ids.items)
    averages = model.find_averages(*part, n_users=n_users, n_items=n_items)
    if tuple(kinds) != ("id",):
        *matrices, sizes = data.features(train, ids, kinds, **about)
        features = model.Features(*matrices)
    if "time" in kinds:
        context, test_context = data.time_context(train, test)
        part, test_part = (*part, context), (*test_part, test_context)
        times = train["timestamp"].to_torch()
    return Task(part, test_part, ids, seen, averages, features, sizes, times)


def choose_features(kinds, found, *, is_given, notice):
    """Those of `kinds` that the `Data` has. Another is a ValueError if `is_given` by the user."""
    lacks = {}
    if found.users is None and found.items is None:
        lacks["side"] = "tables of users or items"
    frames = [frame for frame in (found.ratings, found.test) if frame is not None]
    if any("timestamp" not in frame.columns for frame in frames):
        lacks["time"] = "timestamps"
    for kind in kinds:
        if is_given and kind in lacks:
            raise ValueError(f"the feature {kind}: the data has no {lacks[kind]}")
        if kind in lacks:
            notice(f"without the feature {kind}: the data has no {lacks[kind]}")
    return tuple(kind for kind in kinds if kind not in lacks)


def choose_head(ratings, options):
    """Name and arguments of the `model.Head` for `options` and the training `ratings`.

    ValueError when there are too few or too many distinct ratings to be levels.
    """
    if options["loss"] == "ordinal":
        levels = ratings.unique()
        if not is_ordinal(levels):
            raise ValueError(
                f"--loss ordinal needs 3 to {MOST_LEVELS} distinct ratings, "
                f"the training part has {len(levels)}"
            )
        shares = [(ratings > level).double().mean().item() for level in levels[:-1]]
        return "ordinal", (levels.tolist(), shares)
    low, high = options["y_range"]
    mean, unit = (low + high) / 2, 1.0
    if options["fits_data"]:
        mean, unit = find_moments(ratings)
    return "bounded", (low, high, mean, unit)


def is_ordinal(levels):
    """Whether the distinct ratings `levels` can be those of loss ordinal, each with its bias."""
    return 3 <= len(levels) <= MOST_LEVELS


def find_moments(ratings):
    """The mean of a tensor of ratings and their standard deviation."""
    import torch

    mean = ratings.mean(dtype=torch.float64).item()
    norm = torch.linalg.vector_norm(ratings - mean, dtype=torch.float64)
    return mean, norm.item() / len(ratings) ** 0.5


def make_head(name, arguments):
    """The `model.Head` that `choose_head` has named."""
    import model

    if name == "ordinal":
        return model.ordinal(*arguments)
    low, high, mean, unit = arguments
    return model.bounded(low, high, mean=mean, unit=unit)


class Job(NamedTuple):
    """What each process trains on."""

    columns: tuple  # Task.train
    features: tuple | None  # Task.features
    sizes: tuple  # Task.sizes
    n_users: int  # rows of users, with features of moments, before those of the items
    averages: tuple | None  # that biases decay towards
    head: tuple  # what `choose_head` returns
    options: dict
    seed: int
    n_processes: int
    resume: tuple | None  # epochs done, and the state of each member


def make_job(task, *, options, seed, n_processes=1, resume=None):
    """The `Job` of training on all of the task's ratings with `options`, a recipe's dict."""
    head, n_users = choose_head(task.train[2], options), count_user_rows(task.features, task.ids)
    averages = task.averages if options["fits_data"] and "id" in options["features"] else None
    rest = averages, head, options, seed, n_processes, resume
    return Job(task.train, task.features, task.sizes, n_users, *rest)


def count_user_rows(features, ids):
    """Rows of users, and with the feature time of its scales, in the table that features make."""
    return len(ids[0]) if features is None else len(features[0][0]) - 1 - len(ids[1])


def fit(task, *, options, seed, n_processes=1, clip=None, resume=None):
    """Train with `options`, a recipe's dict, and yield `(epochs, row)` after each epoch.

    `epochs` has a `train.Epoch` for each model of the ensemble, which are trained side by side;
    `row` is a dict of figures: epoch, train_loss, mse, rmse, mae, seconds (training),
    evaluate_seconds. Predictions are clipped to `clip`, the range of the training ratings unless
    given. `resume` is that of `Job`. With more than one process, this is the first, and the others
    call `follow`.
    """
    import train

    clip = clip or find_range(task.train[2])
    job = make_job(task, options=options, seed=seed, n_processes=n_processes, resume=resume)
    if n_processes > 1:
        job = deal(job)
    head, unit = make_head(*job.head), job.head[1][3] if job.head[0] == "bounded" else 1.0
    about = {"ids": task.ids, "seen": task.seen, "head": head}
    start = time.perf_counter()  # what is worked out before the first step counts too
    for epochs in fit_members(job):
        trained = time.perf_counter()
        tables = [to_rows(epoch.params[0], task.features, **about) for epoch in epochs]
        errors = train.evaluate(
            lambda *rows, tables=tables: predict_each(tables, *rows, head=head).mean(0),
            *task.test,
            clip=clip,
        )
        row = {
            "epoch": epochs[0].epoch,
            "train_loss": unit**2 * sum(epoch.train_loss for epoch in epochs) / len(epochs),
            **errors._asdict(),
            "seconds": trained - start,
            "evaluate_seconds": time.perf_counter() - trained,
        }
        yield epochs, row
        start = time.perf_counter()


def find_range(ratings):
    """The lowest and the highest of a tensor of ratings."""
    return ratings.min().item(), ratings.max().item()


def deal(job):
    """Give process 0's `job` to each process. The other processes pass None."""
    import torch

    import train

    jobs = [job]
    train.call_together(torch.distributed.broadcast_object_list, jobs)
    return jobs[0]


def follow(threads):
    """What a process other than the first does for `fit`: train beside it."""
    import torch

    torch.set_num_threads(threads)
    for _ in fit_members(deal(None)):
        pass


def fit_members(job):
    """Train the ensemble's models side by side; yields a tuple of their `train.Epoch`s."""
    return zip(*(fit_member(job, number) for number in range(job.options["ensemble"])), strict=True)


def fit_member(job, number):
    """Train one model of the ensemble; yields its `train.Epoch`s, of one table of parameters."""
    import schedule
    import train

    options = job.options
    common = {"batch_size": options["batch_size"], "drop_last": options["drop_last"]}
    n_steps = options["epochs"] * train.count_batches(len(job.columns[0]), **common)
    pace = schedule.one_cycle(n_steps, lr_max=options["lr_max"])
    params, parts = set_up_member(job, pace, number)
    resume = job.resume and (job.resume[0], job.resume[1][number])
    return train.fit(
        params, *job.columns, **parts, n_epochs=options["epochs"], resume=resume, **common
    )


def set_up_member(job, pace, number=0):
    """The params of a model of the ensemble, and what a loop takes to train them at `pace`."""
    import torch

    import model
    import schedule
    import train

    options, head = job.options, make_head(*job.head)
    # torch's generator takes 32 bits; this spreads the members over them, the first at `seed`.
    generator = torch.Generator().manual_seed((job.seed + number * 0x9E3779B1) % 2**32)
    sizes = {"n_factors": options["n_factors"], "n_outputs": head.n_outputs}
    params = model.init_params(*job.sizes, **sizes, std=options["std"], generator=generator)
    center = None
    table, decay = model.join(params), options["weight_decay"]
    if job.averages is not None:  # what biases decay towards, instead of zero
        center = model.join(model.find_center(params, job.averages, head=head))
        if job.features is not None:
            center *= find_share(len(job.columns[0]) / count_rows(*job.columns[:2]))
    if options["bias_decay"] != decay:
        decay = torch.full(table.shape[1:], decay)
        decay[-head.n_outputs :] = options["bias_decay"]
    loss_and_grad = model.loss_and_grad
    if job.features is not None:
        loss_and_grad = partial(model.embedded_loss_and_grad, features=job.features)
    given = {"n_users": job.n_users, "head": head, "dropout": options["dropout"]}
    loss_and_grad = partial(loss_and_grad, **given, generator=generator)
    return [table], {
        "loss_and_grad": train.share(loss_and_grad) if job.n_processes > 1 else loss_and_grad,
        "optimizer": schedule.adamw(pace, weight_decay=[decay], centers=[center]),
        "generator": generator,
    }


def to_rows(table, features, *, ids, seen, head):
    """`model.Params` with a row a user and a row an item, the unseen filled, to predict with."""
    import model

    if features is not None:
        table = model.embed(table, features[0])
    params = model.split_table(table, count_user_rows(features, ids), n_outputs=head.n_outputs)
    return model.fill_unseen(params, *seen)


def predict_rows(members, *rows, head):
    """Mean and standard deviation of the members' predictions of pairs, as `model.predict` does.

    The deviation says how much the models of the ensemble disagree; it is 0 for a single one.
    """
    predictions = predict_each(members, *rows, head=head)
    mean = predictions.mean(0)
    return mean, (predictions - mean).square().mean(0).sqrt()


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


def describe_task(training):
    """Lines on what is trained on, and on the errors that there are without a model."""
    ratings, figures, clip = training.task.train[2], training.figures, training.clip
    low, high = find_range(ratings)
    n_ratings = figures["n_train"] + figures["n_test"]
    counts = "{n_users:,} users, {n_items:,} items".format_map(figures)
    yield f"{counts}, {n_ratings:,} ratings from {low:g} to {high:g}"
    sample = ratings[:: max(len(ratings) // 1_000_000, 1)]
    least, most = (sample.quantile(q).item() for q in (0.1, 0.9))
    if high - low > 3 * (most - least):
        where = f"from {least:g} to {most:g}" if least < most else f"{most:g}"
        yield (
            f"8 of 10 ratings are {where}: if those far beyond are mistakes, leave them out; if "
            "they are counts, pass logarithms"
        )
    if unseen := describe_unseen(training.task):
        yield unseen
    yield from describe_baselines(figures["baselines"], clip)


BASELINES = {"mean": "mean rating", "averages": "averages of users and items"}


def describe_baselines(baselines, clip):
    """A line on each of what `find_baselines` returns."""
    for name, errors in baselines.items():
        yield f"without a model, by the {BASELINES[name]}: {format_errors(errors, clip)}"


def find_scale(bounds):
    """The power of ten that ratings with these bounds are nearest to, 1 to 5 being 0."""
    return round(math.log10((bounds[1] - bounds[0]) / 4))


def format_number(value, scale, digits=4):
    """With `digits` decimals at scale 0, fewer or more at others; far from it, in powers of ten."""
    if -3 <= scale <= 4:
        return f"{value:.{max(digits - scale, 0)}f}"
    return f"{value:.{digits}e}"


def format_errors(errors, bounds):
    """MSE, RMSE and MAE of ratings with these bounds."""
    scale = find_scale(bounds)
    scales = {"mse": 2 * scale, "rmse": scale, "mae": scale}
    return ", ".join(f"{name} {format_number(errors[name], s)}" for name, s in scales.items())


def choose_options(recipe, given):
    """The recipe's options with those given over them. ValueError where they do not go together."""
    if recipe not in RECIPES:
        raise ValueError(f"no recipe {recipe!r}")
    if unknown := sorted(set(given) - set(RECIPES[recipe])):
        raise ValueError(f"no option {unknown}")
    options = RECIPES[recipe] | {name: value for name, value in given.items() if value is not None}
    if options["loss"] not in LOSSES:
        raise ValueError(f"no loss {options['loss']!r}: it is {' or '.join(LOSSES)}")
    if options["loss"] == "ordinal" and given.get("y_range") is not None:
        raise ValueError("--y-range goes with --loss mse.")
    check_decay(options)
    return options


def check_decay(options):
    """ValueError for a decay that takes more than the whole off in a step."""
    lr_max, decay = options["lr_max"], max(options["weight_decay"], options["bias_decay"])
    if lr_max * decay >= 1:
        cure = "give a smaller --lr-max, or --weight-decay and --bias-decay"
        raise ValueError(f"--lr-max {lr_max:g} times a decay of {decay:g} is not below 1: {cure}.")


def choose_dataset(dataset, source):
    """The data set's name, None with ratings of the user's own. ValueError for both."""
    if dataset is not None and source is not None:
        raise ValueError(f"--dataset {dataset} and --ratings {source} are two data sets.")
    return dataset or (DATASETS[0] if source is None else None)


def fit_recipe(options, given, *, ratings, n_rows, clip, notice):
    """The options for the training `ratings` (N,) of `n_rows` users and items; `given` ones stay.

    A recipe's values are those for ml-100k's split ua. Of these,

        batch_size = recipe's * N / 90,570, at least 2
        weight_decay, bias_decay = recipe's * (34.5 / (N / n_rows))^0.7
        y_range = the scale and an eighth of it at both ends, within mean -+ 4 deviations

    with `n_rows` users and items that have training ratings. So there are as many steps whatever N
    is, and the fewer ratings a row has, the more it is held. The scale is `clip`; 34.5 is 90,570 /
    2,623. Where there are too few or too many distinct ratings for loss ordinal, it is mse, which
    `notice` is told.
    """
    if not options["fits_data"]:
        return options
    low, high = clip
    margin, (mean, deviation) = (high - low) / 8, find_moments(ratings)
    thinness = find_thinness(len(ratings) / n_rows)
    fitted = {
        "loss": options["loss"],
        "batch_size": max(round(options["batch_size"] * len(ratings) / UA_RATINGS), LEAST_BATCH),
        "weight_decay": options["weight_decay"] * thinness,
        "bias_decay": options["bias_decay"] * thinness,
    }
    if options["loss"] == "ordinal" and given.get("loss") is None:
        n_levels = len(levels := ratings.unique())
        if not is_ordinal(levels):
            fitted["loss"] = "mse"
            notice(f"loss mse, not ordinal, for {n_levels:,} distinct ratings")
    if fitted["loss"] == "mse":
        bounds = max(low - margin, mean - 4 * deviation), min(high + margin, mean + 4 * deviation)
        fitted["y_range"] = bounds
    return options | {name: value for name, value in fitted.items() if given.get(name) is None}


def count_rows(users, items):
    """How many users and items have training ratings."""
    import torch

    return sum((torch.bincount(rows) > 0).sum().item() for rows in (users, items))


def find_thinness(ratings_per_row):
    """How much thinner the ratings are than ml-100k's: (34.5 / ratings per user or item)^0.7."""
    return (UA_RATINGS / UA_ROWS / ratings_per_row) ** 0.7


def find_share(ratings_per_row):
    """How much of the averages biases decay towards where rows have other features than the id.

    t^2 / (1 + t^2) with thinness t: all where ratings are few. Where they are many, the other
    features' biases tell of the averages, too.
    """
    return 1 / (1 + find_thinness(ratings_per_row) ** -2)


def check_y_range(ratings, options, given):
    """ValueError for a rating outside of a y_range that was not made for the ratings."""
    if options["loss"] == "mse" and (given.get("y_range") or not options["fits_data"]):
        (low, high), (least, most) = options["y_range"], find_range(ratings)
        if least < low or most > high:
            where = f"y_range {low:g} to {high:g}: give --y-range LOW HIGH"
            raise ValueError(f"ratings from {least:g} to {most:g} are not all within {where}")


def find_baselines(task, clip):
    """Errors on the test part without a model: of the mean, and of `model.find_averages`."""
    import train

    mean, users, items = task.averages
    predictions = {
        "mean": lambda rows, columns, *_: users.new_full(rows.shape, mean),
        "averages": lambda rows, columns, *_: mean + users[rows] + items[columns],
    }
    return {
        name: train.evaluate(predict, *task.test, clip=clip)._asdict()
        for name, predict in predictions.items()
    }


class Training(NamedTuple):
    """A training, ready to begin."""

    task: Task
    options: dict  # a recipe's, complete
    clip: tuple  # the lowest and the highest rating that is predicted
    titles: list | None  # by row of the items
    figures: dict  # what is known of it before: recipe, dataset, split, seed, options, counts


def set_up(
    found,
    *,
    recipe="default",
    split=None,
    holdout=None,
    seed=0,
    allow_overlap=False,
    notice=lambda line: None,
    **given,
):
    """The `Training` of a recipe, with the options `given` over it, on `Data` cut by `split`.

    `split` and `holdout` are those of `cut`: ua for ml-100k, else random, unless given; data with a
    test part of its own is not split. ValueError for options, features or a split that do not go
    with the data, and for a training part with nothing to learn.
    """
    return plan_training(found, recipe, split, holdout, seed, allow_overlap, given, notice)


def plan_training(found, recipe, split, holdout, seed, allow_overlap, given, notice):
    """`set_up` that lets go of `found` before the tensors are made if nobody else holds it.

    A call with ** would hold it, which of 25 million ratings is 0.7 gigabytes.
    """
    options = choose_options(recipe, given)
    check_split(split, found.test, holdout)
    is_given = given.get("features") is not None
    kinds = options["features"] = choose_features(
        options["features"], found, is_given=is_given, notice=notice
    )
    split = split or ("ua" if found.name == "ml-100k" else "random")
    ratings, test = found.ratings, found.test
    about = {"users": found.users, "items": found.items}
    source, rating_range = found.source, found.rating_range
    del found
    if "time" not in kinds and not split.startswith("last"):
        ratings = ratings.drop("timestamp", strict=False)
    if test is None:
        ratings, test = cut(ratings, split, seed=seed, holdout=holdout)
    else:
        split = "test file"
    task = prepare(ratings, test, kinds, allow_overlap=allow_overlap, **about)
    del ratings, test
    check_part(task, source)
    clip = rating_range or find_range(task.train[2])
    about_data = {"ratings": task.train[2], "n_rows": count_rows(*task.train[:2]), "clip": clip}
    options = fit_recipe(options, given, **about_data, notice=notice)
    check_decay(options)
    check_y_range(task.train[2], options, given)
    choose_head(task.train[2], options)  # its errors come before the first step
    figures = {
        "recipe": recipe,
        "dataset": source,
        "split": split,
        "seed": seed,
        "options": options,
        "n_users": len(task.ids.users),
        "n_items": len(task.ids.items),
        "n_train": len(task.train[2]),
        "n_test": len(task.test[2]),
        "baselines": find_baselines(task, clip),
    }
    if holdout is not None:
        figures["holdout"] = holdout
    return Training(task, options, clip, find_titles(about["items"], task.ids.items), figures)


def check_split(split, test, holdout):
    """ValueError where a test part is named twice."""
    for name, value in (("split", split), ("holdout", holdout)):
        if test is not None and value is not None:
            raise ValueError(f"--{name} {value} and --test do not go together.")


def check_part(task, source):
    """ValueError for a training part of one user, one item or one rating."""
    what = "all ratings of the training part are"
    for name, raw_ids, rows in zip(("user", "item"), task.ids, task.train[:2], strict=True):
        if not (rows != rows[0]).any():
            raise ValueError(f"{source}: {what} of one {name}, {raw_ids[rows[0].item()]!r}")
    low, high = find_range(task.train[2])
    if low == high:
        raise ValueError(f"{source}: {what} {low:g}: there is nothing to learn")


def find_titles(items, item_ids):
    """The title of each item, its id where it has none; None where none has one."""
    if items is None or "title" not in items.columns:
        return None
    titles = dict(items.select("item", "title").drop_nulls().iter_rows())
    return [titles.get(item) or str(item) for item in item_ids.to_list()]


def conclude(training, rows):
    """The figures of a training, as `--metrics` writes them, from those of its epochs."""
    rows = [dict(row) for row in rows]
    evaluate_seconds = sum(row.pop("evaluate_seconds") for row in rows)
    return {
        **training.figures,
        "epochs": rows,
        **{name: rows[-1][name] for name in ("mse", "rmse", "mae")},
        "fit_seconds": sum(row["seconds"] for row in rows),
        "evaluate_seconds": evaluate_seconds,
    }


def describe_test(figures):
    """What a training was tested on."""
    if "holdout" in figures:
        return "{holdout:g} of the training part of {split}".format_map(figures)
    return figures["split"]


def train_model(found, *, threads=1, **settings):
    """Train on what `read` returns, with the settings of `set_up`. Returns a `Model`.

    Its `figures` have the error on the test part. torch has `threads` meanwhile: one is fastest for
    small batches, and numbers are the same for the same seed and number of threads.
    """
    import torch

    threads_before, rows = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        training = set_up(found, **settings)
        del found
        options = {"options": training.options, "seed": training.figures["seed"]}
        for epochs, row in fit(training.task, **options, clip=training.clip):  # noqa: B007
            rows.append(row)
    finally:
        torch.set_num_threads(threads_before)
    tables = [epoch.params[0] for epoch in epochs]
    return make_model(training, tables, conclude(training, rows))


class Model(NamedTuple):
    """A trained model and all that its answers need. Raw ids are integers or text, sorted."""

    params: list  # of each member of the ensemble, model.Params with a row a user, or a feature
    features: tuple | None  # of `model.Features` the matrix alone, in a tuple
    seen: tuple  # bool masks of the users and the items that training tells something of
    head: tuple  # what `choose_head` returns
    clip: tuple  # the lowest and the highest rating that is predicted
    user_ids: list  # by row
    item_ids: list
    titles: list | None
    # the training part by user: where each one's begin (n_users + 1,) int64, items (N,) int32; and
    # for the feature time ratings (N,) float32, timestamps (N,) int64
    rated: tuple
    test: tuple  # Task.test
    figures: dict  # what `train --metrics` writes
    tables: list  # of each member, model.Params with a row a user and an item; not in the file


def make_model(training, tables, figures):
    """The `Model` of the ensemble's tables, as `fit` has trained them."""
    import model

    task, head = training.task, choose_head(training.task.train[2], training.options)
    n_outputs = make_head(*head).n_outputs
    members = [model.split_table(table, task.sizes[0], n_outputs=n_outputs) for table in tables]
    return add_tables(
        {
            "params": [model.Params(*map(clone, params)) for params in members],
            "features": task.features and (tuple(task.features.matrix),),
            "seen": task.seen,
            "head": head,
            "clip": training.clip,
            "user_ids": task.ids.users.to_list(),
            "item_ids": task.ids.items.to_list(),
            "titles": training.titles,
            "rated": group_by_user(*task.train[:3], task.times, n_users=len(task.ids.users)),
            "test": tuple(task.test),
            "figures": figures,
        }
    )


def clone(tensor):
    """A copy that is not a view: saved, a view brings the whole table that it is of."""
    return tensor.clone()


def add_tables(content):
    """A `Model` of all its fields but `tables`."""
    import model

    ids, head = (content["user_ids"], content["item_ids"]), make_head(*content["head"])
    rows = {"ids": ids, "seen": content["seen"], "head": head}
    tables = [to_rows(model.join(each), content["features"], **rows) for each in content["params"]]
    return Model(**content, tables=tables)


def group_by_user(users, items, ratings, times, *, n_users):
    """`Model.rated` of the training part's columns."""
    import torch

    starts = torch.zeros(n_users + 1, dtype=torch.int64)
    starts[1:] = torch.bincount(users, minlength=n_users).cumsum(0)
    columns = [items.int()] if times is None else [items.int(), ratings, times]
    if not (users[1:] >= users[:-1]).all():  # as only a test file of one's own leaves them
        order = torch.argsort(users, stable=True)
        columns = [column[order] for column in columns]
    return starts, *columns


FORMAT = "collab 3"  # of a saved model
CHECKPOINT = "collab checkpoint 2"
ROW = ("epoch", "train_loss", "mse", "rmse", "mae", "seconds", "evaluate_seconds")


def save_model(path, saved):
    """Write a `Model` to a file. OSError names the file."""
    content = saved._asdict() | {"params": [params._asdict() for params in saved.params]}
    del content["tables"]
    save(Path(path), {"format": FORMAT, **content})


def save(path, content):
    import torch

    import data

    file = io.BytesIO()
    torch.save(content, file)
    data.write_file(path, file.getbuffer())


def load_model(path):
    """Read what `save_model` wrote. ValueError, naming the file, for anything else."""
    with _refusing(path, "model"):
        content = load(path, FORMAT)
        check_model(content)
        return add_tables(content)


@contextmanager
def _refusing(path, what):
    """One line that names `path`, for whatever a file from elsewhere makes torch raise."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: {error.strerror or error}") from None
    except pickle.UnpicklingError:  # whose text advises to run what is in the file
        line = "there is more in it than tensors and plain values"
        raise ValueError(f"{path}: not a {what} of this program: {line}") from None
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not a {what} of this program: {line}") from None


def load(path, form):
    """The content of a file that `save` wrote. Code in it is refused, not run."""
    import torch

    with open(path, "rb") as file:  # OSError for a folder, or where there is none
        if not zipfile.is_zipfile(file):  # torch's older formats are plain pickles
            raise ValueError("no zip file")
        file.seek(0)
        content = torch.load(file, weights_only=True)
    if content["format"] != form:
        raise ValueError(f"format {content['format']!r}, not {form!r}")
    del content["format"]
    return content


def check_types(content):
    """Raise ValueError for a part of a model that is not of the type that `save_model` writes."""
    import torch

    def are(tensors, dtype, n_dims=1):
        form = dtype, n_dims, torch.strided, "cpu"
        return all(
            (tensor.dtype, tensor.dim(), tensor.layout, tensor.device.type) == form
            and (not dtype.is_floating_point or bool(tensor.isfinite().all()))
            for tensor in tensors
        )

    def are_ids(raw_ids):
        kinds = set(map(type, raw_ids))
        is_sorted = all(first < second for first, second in pairwise(raw_ids))
        is_small = kinds == {str} or -(2**63) <= raw_ids[0] <= raw_ids[-1] < 2**63
        return type(raw_ids) is list and kinds in ({int}, {str}) and is_sorted and is_small

    figures, rated, test = content["figures"], content["rated"], content["test"]
    titles, texts = content["titles"], (content["titles"], content["user_ids"], content["item_ids"])
    json.dumps((texts, figures), ensure_ascii=False, allow_nan=False).encode()  # no surrogates
    kinds = figures["options"]["features"]
    is_timed = "time" in kinds
    low, high = map(float, content["clip"])
    right = [
        are_ids(content["user_ids"]) and are_ids(content["item_ids"]),
        titles is None or (type(titles) is list and set(map(type, titles)) == {str}),
        -math.inf < low < high < math.inf,
        set(kinds) <= set(FEATURES) and (content["features"] is None) == (tuple(kinds) == ("id",)),
        math.isfinite(figures["epochs"][-1]["train_loss"]) and type(figures["split"]) is str,
        are(content["seen"], torch.bool) and all(mask.any() for mask in content["seen"]),
        are(rated[:1], torch.int64) and are(rated[1:2], torch.int32),
        are(rated[2:3], torch.float32) and are(rated[3:], torch.int64),
        len(rated) == 2 + 2 * is_timed and len(test) == 3 + is_timed,
        are(test[:2], torch.int64) and are(test[2:3], torch.float32),
        are(test[3:], torch.float32, 2) and len(test[0]) > 0,
        content["head"][0] != "bounded" or all(map(math.isfinite, content["head"][1])),
    ]
    for params in content["params"]:
        right += [are(params[:2], torch.float32, 2) and params[0].shape[1] > 0]
        right += [are(params[2:], torch.float32, params[2].dim())]
    for starts, columns, values in content["features"] or ():
        right += [are((starts, columns), torch.int64) and are((values,), torch.float32)]
    if not all(right):
        raise ValueError("a part is not of its type")


def check_model(content):
    """Raise ValueError for a file whose parts do not fit: a row out of a table would be read."""
    import model

    content["params"] = [model.Params(**params) for params in content["params"]]
    check_types(content)
    n_users, n_items = sizes = len(content["user_ids"]), len(content["item_ids"])
    starts, items, *history = content["rated"]
    users, test_items, *rest = content["test"]
    head = make_head(*content["head"])
    fits = [
        *(len(mask) == n for mask, n in zip(content["seen"], sizes, strict=True)),
        content["titles"] is None or len(content["titles"]) == n_items,
        len(starts) == n_users + 1 and is_rising(starts, len(items)),
        is_within(items, n_items) and is_within(users, n_users) and is_within(test_items, n_items),
        all(len(column) == len(items) for column in history),
        all(len(column) == len(users) for column in (test_items, *rest)),
        len(content["params"]) > 0,
    ]
    for params in content["params"]:
        rows = sizes
        if content["features"] is not None:
            rows = len(params.user_factors), len(params.item_factors)
            ((starts, columns, values),) = content["features"]
            fits += [0 < len(starts) - sum(sizes) <= 5, is_within(columns, sum(rows))]
            fits += [is_rising(starts, len(columns)), len(columns) == len(values)]
        factors = params.user_factors.shape[1:]
        outputs = () if head.n_outputs == 1 else (head.n_outputs,)
        shapes = [(n, *last) for last in (factors, outputs) for n in rows]
        fits += [tuple(t.shape) == shape for t, shape in zip(params, shapes, strict=True)]
    if not all(fits):
        raise ValueError("its parts do not fit each other")


def is_rising(starts, end):
    return starts[0] == 0 and starts[-1] == end and bool((starts.diff() >= 0).all())


def is_within(rows, n):
    return not len(rows) or (rows.min() >= 0 and rows.max() < n)


def find_row(raw_ids, raw):
    """The row of a raw id, given as it is or as text; None for one that is not there."""
    if isinstance(raw_ids[0], int):
        if not re.fullmatch(r"-?[1-9]\d{0,18}|0", str(raw)):
            return None
        raw = int(raw)
    else:
        raw = str(raw)
    row = bisect_left(raw_ids, raw)
    return row if row < len(raw_ids) and raw_ids[row] == raw else None


def find_user(saved, raw):
    """The row of a user. ValueError for one that the model does not know."""
    if (row := find_row(saved.user_ids, raw)) is None:
        raise ValueError(f"no user {str(raw)!r} in the model{_hint(saved.user_ids, raw)}")
    return row


def find_item(saved, raw):
    """The row of an item, by its id or a part of its title that no other has, or a whole title.

    ValueError for what is neither; for a part of several titles it lists them.
    """
    if (row := find_row(saved.item_ids, raw)) is not None:
        return row
    part = str(raw).casefold().strip()
    titles = [title.casefold() for title in saved.titles or ()]
    rows = [row for row, title in enumerate(titles) if part in title]
    if not rows or not part:
        where = "" if saved.titles is None else " and in no title"
        raise ValueError(f"no item {str(raw)!r} in the model{where}{_hint(saved.item_ids, raw)}")
    whole = [row for row in rows if titles[row] == part]
    if len(whole or rows) == 1:
        return (whole or rows)[0]
    counts = count_ratings(saved).tolist()
    rows.sort(key=lambda row: -counts[row])
    listed = ", ".join(f"{saved.item_ids[row]} {saved.titles[row]!r}" for row in rows[:10])
    more = f" and {len(rows) - 10} more" if len(rows) > 10 else ""
    raise ValueError(f"{str(raw)!r} is in {len(rows)} titles: {listed}{more}")


def _hint(raw_ids, raw):
    """What the user may have meant, for an id that differs only in case or spaces."""

    def fold(raw_id):
        return "".join(str(raw_id).split()).casefold()

    near = next((raw_id for raw_id in raw_ids if fold(raw_id) == fold(raw)), None)
    return "" if near is None else f"; there is {str(near)!r}"


def count_ratings(saved):
    """How many training ratings each item has, (n_items,)."""
    import torch

    return torch.bincount(saved.rated[1], minlength=len(saved.item_ids))


def find_title(saved, row):
    return str(saved.item_ids[row]) if saved.titles is None else saved.titles[row]


def find_rows(saved, pairs, *, source, allow_unknown=False):
    """Rows of the raw ids in a frame of user, item and maybe line, int64 (N,) each.

    ValueError, with `source` and the line, for an unknown id; with `allow_unknown`, these get the
    row after the last, that of the average user or item in `add_average`.
    """
    import polars

    found = []
    for name, raw_ids in (("user", saved.user_ids), ("item", saved.item_ids)):
        index, column = polars.Series(name, raw_ids), pairs[name]
        if index.dtype != column.dtype:
            index, column = (ids.cast(polars.String) for ids in (index, column))
        rows = column.to_frame().join(
            index.to_frame().with_row_index("row"), name, "left", maintain_order="left"
        )["row"]
        if rows.null_count() and not allow_unknown:
            place = rows.is_null().arg_max()
            line = f", line {pairs['line'][place]}" if "line" in pairs.columns else ""
            raise ValueError(f"{source}{line}: no {name} {str(column[place])!r} in the model")
        found.append(rows.fill_null(len(raw_ids)).cast(polars.Int64).to_torch())
    return tuple(found)


def add_average(saved):
    """The `Model` with the average user and item behind the others' rows, for unknown ids."""
    import model

    tables = [model.append_average(each, *saved.seen) for each in saved.tables]
    return saved._replace(tables=tables)


def find_times(frame):
    """The timestamps of a frame of ratings or pairs, None if it has none."""
    return frame["timestamp"].to_torch() if "timestamp" in frame.columns else None


def find_context(saved, users, items, times):
    """`data.time_context` of pairs of rows at `times` (N,) int64, from the model's training part.

    A tuple of it, or an empty one for a model without the feature time or for no times. A rating of
    the training part is left out of its own context, as it was in training.
    """
    import torch

    import data

    if len(saved.rated) == 2 or times is None:
        return ()
    history = frame_ratings(saved)
    pairs = history.clear().vstack(_to_frame(users, items, torch.zeros(len(users)), times))
    own, context = data.time_context(history, pairs)
    columns = ["user", "item", "timestamp"]
    rows = pairs.join(history.with_row_index("row"), columns, "left", maintain_order="left")["row"]
    known = torch.from_numpy(rows.is_not_null().to_numpy(writable=True))
    context[known] = own[rows.drop_nulls().cast(int).to_torch()]
    return (context,)


def find_new_context(saved, items, ratings, times):
    """`data.time_context` of a new user's own ratings (N,), or None as `find_context`'s tuple."""
    import torch

    import data

    if len(saved.rated) == 2 or times is None or not len(items):
        return None
    user = torch.full_like(items, len(saved.user_ids))
    frame = frame_ratings(saved).vstack(_to_frame(user, items, ratings, times))
    return data.time_context(frame, frame.clear())[0][-len(items) :]


def frame_ratings(saved):
    """The training part of a model with the feature time, by rows of users and items."""
    starts, items, ratings, times = saved.rated
    return _to_frame(_expand(starts), items.long(), ratings, times)


def _to_frame(*columns):
    import polars

    names = ("user", "item", "rating", "timestamp")
    return polars.DataFrame({n: c.numpy() for n, c in zip(names, columns, strict=True)})


def _expand(starts):
    """The user of each place in `Model.rated`."""
    import torch

    return torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())


def predict(saved, users, items, *, allow_unknown=False):
    """Predicted ratings of pairs of raw ids, two lists: float32 (N,), and their deviation (N,).

    The deviation is that of the ensemble's members, 0 for a single one. ValueError for an unknown
    id; with `allow_unknown` it is predicted as the average one.
    """
    import polars

    users, items = list(users), list(items)
    if len(users) != len(items):
        raise ValueError(f"{len(users)} users and {len(items)} items are no pairs")
    pairs = polars.DataFrame({"user": users, "item": items})
    ((_, *predicted),) = predict_frames(saved, [pairs], "predict", allow_unknown=allow_unknown)
    return tuple(predicted)


def predict_frames(saved, frames, source, *, allow_unknown):
    """Each frame of user, item and maybe timestamp, which the feature time reads, and `predict`."""
    saved, head = add_average(saved) if allow_unknown else saved, make_head(*saved.head)
    for pairs in frames:
        rows = find_rows(saved, pairs, source=source, allow_unknown=allow_unknown)
        context = find_context(saved, *rows, find_times(pairs))
        mean, deviation = predict_rows(saved.tables, *rows, *context, head=head)
        yield pairs, mean.clamp(*saved.clip), deviation


def predict_pairs(saved, frames, *, source, allow_unknown=False):
    """For each frame of `data.read_pairs` one of user, item, rating[, deviation], raw ids."""
    import polars

    for pairs, mean, deviation in predict_frames(
        saved, frames, source, allow_unknown=allow_unknown
    ):
        columns = {"rating": mean.numpy(), "deviation": deviation.numpy()}
        if len(saved.tables) == 1:
            del columns["deviation"]
        yield pairs.select("user", "item").with_columns(
            polars.Series(name, values) for name, values in columns.items()
        )


def evaluate(saved, ratings=None, *, source="ratings", k=None, min_rating=None, **allowed):
    """Errors on a frame of ratings, on the test part of the training unless given: a dict.

    It has n_test, mse, rmse, mae and, with `k`, the ranking figures of `train.Ranking` at `k`: of
    all items but those the user rated in training, the first k are looked for in the user's ratings
    of at least `min_rating` here. `allowed` may have allow_unknown and allow_overlap: without the
    second, a pair of the training part is a ValueError.
    """
    import train

    if ratings is None:
        rows, targets, context = saved.test[:2], saved.test[2], saved.test[3:]
    else:
        allow_unknown = allowed.get("allow_unknown", False)
        rows = find_rows(saved, ratings, source=source, allow_unknown=allow_unknown)
        if not allowed.get("allow_overlap", False):
            check_overlap(saved, *rows, source=source)
        targets = ratings["rating"].to_torch()
        context = find_context(saved, *rows, find_times(ratings))
    tables = add_average(saved).tables if allowed.get("allow_unknown", False) else saved.tables
    head = make_head(*saved.head)
    errors = train.evaluate(
        lambda *rows: predict_rows(tables, *rows, head=head)[0],
        *rows,
        targets,
        *context,
        clip=saved.clip,
    )
    figures = {"n_test": len(targets), **errors._asdict()}
    if k is not None:
        figures |= {"k": k, **rank(saved, *rows, targets, k=k, min_rating=min_rating)}
    return figures


def rank(saved, users, items, ratings, *, k, min_rating=None):
    """The ranking figures of `evaluate` for pairs of rows; the unknown ones are left out."""
    import train

    n_users, n_items = len(saved.user_ids), len(saved.item_ids)
    counts = (users < n_users) & (items < n_items)
    if min_rating is not None:
        counts &= ratings >= min_rating
    if not counts.any():
        least = "" if min_rating is None else f" of at least {min_rating:g}"
        raise ValueError(f"no rating{least} by a known user of a known item to look for")
    return train.rank(
        lambda rows: score(saved.tables, rows, saved.head),
        users[counts],
        items[counts],
        seen=saved.rated[:2],
        n_items=n_items,
        k=k,
        block=SCORES_AT_ONCE // make_head(*saved.head).n_outputs,
    )._asdict()


def check_overlap(saved, users, items, *, source):
    """ValueError for pairs of rows that the model was trained on."""
    import torch

    n_items = len(saved.item_ids)
    known = (users < len(saved.user_ids)) & (items < n_items)
    keys = users * n_items + items
    trained = _expand(saved.rated[0]) * n_items + saved.rated[1]
    shared = (torch.isin(keys, trained) & known).nonzero()[:, 0]
    if len(shared):
        pair = saved.user_ids[users[shared[0]]], saved.item_ids[items[shared[0]]]
        raise ValueError(
            f"{source}: {len(shared)} of the (user, item) pairs are in the model's training part, "
            f"the first is {pair}"
        )


def score(tables, users, head):
    """Predictions of every item for the users of some rows: (B, n_items), not clipped."""
    import model

    return model.predict_all(tables, users, head=make_head(*head))


class Recommendation(NamedTuple):
    """An item by its raw id, with its title (its id if it has none) and the predicted rating."""

    item: int | str
    title: str
    rating: float


def recommend(saved, user=None, *, rated=None, n=10, include_seen=False):
    """The `n` items of the highest predicted rating for a user, a list of `Recommendation`.

    The user is one of the model's, by raw id, or one who gave the ratings `rated`: a list of (item,
    rating), or (item, rating, timestamp) where the model has the feature time. Items that the user
    has rated are left out unless `include_seen`. ValueError for a user, an item or a rating that
    the model does not know.
    """
    import torch

    if (user is None) == (rated is None) or n < 1:
        raise ValueError(f"give a user or what one has rated, not both, and n above 0, not {n}")
    if rated is not None:
        rows, *columns = to_rated(saved, rated)
        scores = score(fold_in(saved, rows, *columns), torch.tensor([0]), saved.head)[0]
    else:
        row = find_user(saved, user)
        rows = saved.rated[1][slice(*saved.rated[0][row : row + 2])].long()
        scores = score(saved.tables, torch.tensor([row]), saved.head)[0]
    if not include_seen:
        scores[rows] = -math.inf
    return list_top(saved, scores, n, Recommendation, clip=saved.clip)


def list_top(saved, scores, n, form, *, clip=(-math.inf, math.inf)):
    """The `n` items of the highest of `scores` (n_items,), as `form`; -inf is none of them."""
    values, rows = scores.topk(min(n, len(scores)))
    is_kept = values > -math.inf
    values, rows = values[is_kept].clamp(*clip).tolist(), rows[is_kept].tolist()
    pairs = zip(rows, values, strict=True)
    return [form(saved.item_ids[row], find_title(saved, row), value) for row, value in pairs]


def to_rated(saved, rated):
    """Rows (N,) of the items rated, ratings (N,) and, if all have one, timestamps (N,).

    Of several ratings of one item the latest counts, of one time or without times the last.
    """
    import torch

    rated = [tuple(each) for each in rated]
    if len({len(each) for each in rated} | {2, 3}) > 2 or len({len(each) for each in rated}) > 1:
        raise ValueError("what was rated is (item, rating) or (item, rating, timestamp) for all")
    latest = {}
    for item, *told in sorted(rated, key=lambda each: each[2:]):
        latest[find_item(saved, item)] = told
    columns = list(zip(*latest.values(), strict=True)) or [()]
    rows, ratings = torch.tensor(list(latest)).long(), torch.tensor(columns[0]).float()
    return rows, ratings, *(torch.tensor(times) for times in columns[1:])


def recommend_all(saved, *, n=10, include_seen=False, block=None):
    """`recommend` for every user, a block at a time: frames of user, rank, item, title, rating."""
    import polars
    import torch

    starts, rated_items = saved.rated[:2]
    item_ids = polars.Series(saved.item_ids)
    titles = saved.titles and polars.Series(saved.titles)
    n_items = len(item_ids)
    block = block or max(SCORES_AT_ONCE // n_items // make_head(*saved.head).n_outputs, 1)
    n = min(n, n_items)
    for first in range(0, len(saved.user_ids), block):
        users = torch.arange(first, min(first + block, len(saved.user_ids)))
        scores = score(saved.tables, users, saved.head)
        if not include_seen:
            bounds = starts[first : first + len(users) + 1]
            scores[_expand(bounds), rated_items[bounds[0] : bounds[-1]].long()] = -math.inf
        values, rows = scores.topk(n)
        rows = rows.reshape(-1).numpy()
        frame = polars.DataFrame(
            {
                "user": polars.Series(saved.user_ids[first : first + len(users)]).gather(
                    torch.arange(len(users)).repeat_interleave(n).numpy()
                ),
                "rank": torch.arange(1, n + 1).repeat(len(users)).numpy(),
                "item": item_ids.gather(rows),
                **({} if titles is None else {"title": titles.gather(rows)}),
                "rating": values.clamp(*saved.clip).reshape(-1).numpy(),
            }
        )
        yield frame.filter(polars.Series((values > -math.inf).reshape(-1).numpy()))


def fold_in(saved, items, ratings, times=None, *, width=PRIOR_WIDTH):
    """Tables as `Model.tables` with one user: who gave `ratings` (N,) to the items of rows (N,).

    By `model.fold_in`; `width` is that of `model.find_prior`. Where the model has implicit
    features, the items rated tell of the user through these too, and the prior is about the rest.
    ValueError for a rating out of range.
    """
    import torch

    import model

    low, high = saved.clip
    for row, rating in zip(items.tolist(), ratings.tolist(), strict=True):
        if not low <= rating <= high:
            text = "rating {:g} of item {!r} is not within {:g} to {:g}"
            raise ValueError(text.format(rating, saved.item_ids[row], low, high))
    head, kinds = make_head(*saved.head), saved.figures["options"]["features"]
    # The squared error has no scale of its own; the likelihood of loss ordinal has.
    noise = 1.0
    if saved.head[0] == "bounded":
        noise = 2 * saved.figures["epochs"][-1]["train_loss"] / saved.head[1][3] ** 2
    n_users, n_items = len(saved.user_ids), len(saved.item_ids)
    is_trained = saved.rated[0].diff() > 0
    context = find_new_context(saved, items, ratings, times)
    folded = []
    for params, tables in zip(saved.params, saved.tables, strict=True):
        factors, bias = tables.user_factors[:n_users], tables.user_bias[:n_users]
        told = factors.new_zeros(factors.shape[1] + head.n_outputs).double()
        if "implicit" in kinds:
            first = n_users if "id" in kinds else 0
            ((starts, columns, values),) = saved.features
            is_implicit = (columns >= first) & (columns < first + n_items)
            part = model.embed(model.join(params), (starts, columns, values * is_implicit))
            part = model.split_table(part[:n_users], n_users, n_outputs=head.n_outputs)
            factors, bias = factors - part.user_factors, bias - part.user_bias
            told = torch.cat(
                [table[first + items].reshape(len(items), -1) for table in params[::2]], 1
            )
            told = told.double().sum(0) / max(len(items), 1) ** 0.5
        prior = model.find_prior(factors[is_trained], bias[is_trained], width=width)
        item_bias = tables.item_bias[items]
        if context is not None:  # of each rating's moment; it adds to the user's row
            n_context = context.shape[1]
            of_factors, of_bias = (table[-n_context:] for table in params[::2])
            dot = ((context @ of_factors) * tables.item_factors[items]).sum(1)
            item_bias = item_bias + context @ of_bias
            item_bias = item_bias + (dot.unsqueeze(1) if head.n_outputs > 1 else dot)
        row, row_bias = model.fold_in(
            tables.item_factors[items],
            item_bias,
            ratings,
            prior=prior._replace(mean=prior.mean + told),
            head=head,
            noise=noise,
        )
        # The rows of the moment's features stay behind the users', for `model.predict`.
        user_factors = torch.cat([row.unsqueeze(0), tables.user_factors[n_users:]])
        user_bias = torch.cat([row_bias.unsqueeze(0), tables.user_bias[n_users:]])
        folded.append(tables._replace(user_factors=user_factors, user_bias=user_bias))
    return folded


class Similar(NamedTuple):
    """An item by its raw id, its title, and the cosine of its factors with those asked for."""

    item: int | str
    title: str
    similarity: float


def find_similar(saved, item, *, n=10):
    """The `n` items most like one, by the cosine of their factors: a list of `Similar`.

    The item is given as to `find_item`. Items without training ratings are left out.
    """
    import model

    row = find_item(saved, item)
    if not saved.seen[1][row]:
        raise ValueError(f"nothing is known of item {saved.item_ids[row]!r}: no training ratings")
    cosines = model.find_similar([tables.item_factors for tables in saved.tables], row)
    cosines[row] = -math.inf
    cosines[count_ratings(saved) == 0] = -math.inf
    return list_top(saved, cosines, n, Similar)


class Liking(NamedTuple):
    """An item by its raw id, its title, what its bias alone predicts, its training ratings."""

    item: int | str
    title: str
    rating: float
    n_ratings: int


def interpret(saved, *, n=10):
    """The `n` items liked most and the `n` liked least whoever rates: two lists of `Liking`.

    By the item's bias, said as the rating that it predicts with the average user's bias and without
    factors. Items without training ratings are left out.
    """
    import torch

    head, total = make_head(*saved.head), 0.0
    n_users = len(saved.user_ids)
    for tables in saved.tables:
        total = total + head.predict(tables.user_bias[:n_users].mean(0) + tables.item_bias)
    ratings, counts = total / len(saved.tables), count_ratings(saved)
    rows = torch.argsort(ratings, descending=True, stable=True)
    rows = rows[counts[rows] > 0].tolist()
    return tuple(
        [
            Liking(saved.item_ids[r], find_title(saved, r), ratings[r].item(), counts[r].item())
            for r in part
        ]
        for part in (rows[:n], rows[::-1][:n])
    )


def describe_model(saved):
    """What a model is and was trained on: a dict of the figures, its size and its scale."""
    figures = {name: value for name, value in saved.figures.items() if name != "epochs"}
    return {
        "format": FORMAT,
        "rating_range": list(saved.clip),
        "n_members": len(saved.params),
        "n_parameters": sum(table.numel() for params in saved.params for table in params),
        "has_titles": saved.titles is not None,
        **figures,
    }


def find_lr(training, *, n_steps=200, lr_min=1e-4, lr_max=10.0):
    """fastai's range test for a training: a dict of lrs, losses (smoothed), valley and steepest.

    One member of the ensemble takes up to `n_steps` steps at an lr that grows from `lr_min` to
    `lr_max`, until the loss has blown up; see `train.find_lr` and `schedule.suggest_lr`.
    """
    import schedule
    import train

    seed = training.figures["seed"]
    job = make_job(training.task, options=training.options, seed=seed)
    pace = schedule.exponential(n_steps, lr_min=lr_min, lr_max=lr_max)
    params, parts = set_up_member(job, pace)
    batch_size = min(job.options["batch_size"], len(job.columns[0]))
    losses = train.find_lr(
        params, *job.columns, n_steps=n_steps, batch_size=batch_size, **parts
    ).tolist()
    lrs = [pace(step).lr for step in range(len(losses))]
    suggested = schedule.suggest_lr(lrs, losses, n_steps=n_steps)
    return {"lrs": lrs, "losses": losses, **suggested._asdict()}


def save_checkpoint(path, fingerprint, epochs, rows, arguments):
    """Write what `resume` goes on from: each member's state after the last of `rows`."""
    content = {
        "format": CHECKPOINT,
        "arguments": arguments,
        "fingerprint": fingerprint,
        "rows": rows,
        "states": [epoch.state for epoch in epochs],
    }
    save(path, content)


def load_checkpoint(path):
    """What `save_checkpoint` wrote, a dict. ValueError, naming the file, for anything else."""
    import torch

    with _refusing(path, "checkpoint"):
        content = load(path, CHECKPOINT)
        if set(content) != {"arguments", "fingerprint", "rows", "states"}:
            raise ValueError("its parts are not those of a checkpoint")
        numbers = [row[name] for row in content["rows"] for name in ROW]
        tensors = [tensor for state in content["states"] for tensor in state]
        fits = [
            len(content["rows"]) > 0 and all(map(math.isfinite, numbers)),
            len(content["states"]) > 0 and all(len(state) > 1 for state in content["states"]),
            all(isinstance(tensor, torch.Tensor) for tensor in tensors),
        ]
        if not all(fits):
            raise ValueError("its parts do not fit each other")
        for *_, generator in content["states"]:
            torch.Generator().set_state(generator)  # whose errors would come in the loop
        return content


def find_fingerprint(training):
    """SHA-256 of all that a training depends on: options, seed, ids, ratings, features."""
    task = training.task
    digest = hashlib.sha256(repr((training.options, training.figures["seed"])).encode())
    for raw_ids in task.ids:
        digest.update(repr(raw_ids.to_list()).encode())
    matrices = [tensor for matrix in task.features or () for tensor in matrix]
    for tensor in (*task.train, *task.test, *task.seen, *matrices):
        digest.update(tensor.numpy())
    return digest.hexdigest()


def picture(path, figure):
    """Write a matplotlib figure to a .png or .svg file."""
    import data

    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that the font lacks
        figure.savefig(content, format=path.suffix[1:].lower())
    data.write_file(path, content.getvalue())


def start_figure(n_columns=1, *, width=8.0, height=4.8):
    """A matplotlib figure with empty axes side by side. ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # no pyplot: no window, nothing global
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    axes = figure.subplots(1, n_columns, squeeze=False)[0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def plot_runs(runs):
    """Learning curves, lr and momentum of trainings: `runs` has pairs of a name and `--metrics`."""
    import schedule
    import train

    figure, (errors, losses, lrs) = start_figure(3, width=14.0, height=4.4)
    momenta = lrs.twinx()
    momenta.spines["top"].set_visible(False)
    for number, (name, run) in enumerate(runs):
        name = name.encode(errors="replace").decode().replace("$", r"\$")  # no formula
        name = f" {name}" if name.startswith("_") else name  # which would have no label
        color, options = f"C{number % 10}", run["options"]
        epochs = [row["epoch"] for row in run["epochs"]]
        for axes, key in ((errors, "mse"), (losses, "train_loss")):
            values = [row[key] for row in run["epochs"]]
            axes.plot(epochs, values, color=color, marker="o", markersize=3.5, label=name)
        n_batches = train.count_batches(
            run["n_train"], options["batch_size"], drop_last=options["drop_last"]
        )
        n_steps = options["epochs"] * n_batches
        steps = sorted({*range(0, n_steps, max(n_steps // 500, 1)), n_steps - 1})
        paces = [schedule.one_cycle(n_steps, lr_max=options["lr_max"])(step) for step in steps]
        lrs.plot(steps, [pace.lr for pace in paces], color=color, label=name)
        momenta.plot(steps, [pace.momentum for pace in paces], color=color, linestyle=":")
    errors.set(xlabel="epoch", ylabel="test MSE", title="Error on the test part")
    losses.set(xlabel="epoch", ylabel="loss", title="Loss in training")
    lrs.set(xlabel="step", ylabel="learning rate (solid)", title="Schedule")
    momenta.set_ylabel("momentum (dotted)")
    for axes in (errors, losses):
        axes.xaxis.get_major_locator().set_params(integer=True)
    errors.legend(frameon=False, fontsize="small")
    return figure


def plot_lr(found):
    """The curve of `find_lr`, with both suggestions."""
    figure, (axes,) = start_figure()
    axes.plot(found["lrs"], found["losses"], color="C0")
    for name, color in (("valley", "C1"), ("steepest", "C2")):
        place = found["lrs"].index(min(found["lrs"], key=lambda lr: abs(lr - found[name])))
        label = f"{name} {found[name]:.2g}"
        axes.plot(found[name], found["losses"][place], "o", color=color, label=label)
    axes.set(xscale="log", xlabel="learning rate", ylabel="smoothed loss")
    axes.set_title("Learning-rate range test")
    axes.legend(frameon=False)
    return figure


def plot_map(saved, *, n_labels=60):
    """Items by their first two principal components, the most rated ones labelled.

    The area of a dot goes with the item's ratings. A label that would cover another is left out.
    """
    import model

    counts = count_ratings(saved)
    rows = counts.argsort(descending=True, stable=True)[:2_000]
    rows = rows[counts[rows] > 0]
    places = model.find_components([tables.item_factors for tables in saved.tables])[rows]
    figure, (axes,) = start_figure(width=12.0, height=9.0)
    sizes = 60 * (counts[rows] / counts.max()).numpy() + 2
    axes.scatter(*places.T.numpy(), s=sizes, color="C0", alpha=0.35, linewidths=0)
    axes.set(xlabel="first principal component", ylabel="second principal component")
    axes.set_title(f"The {len(rows):,} most rated items by what their raters have in common")
    axes.margins(0.06)
    titles = [shorten(find_title(saved, row)) for row in rows[:n_labels].tolist()]
    place_labels(figure, axes, places[:n_labels].tolist(), titles)
    return figure


def shorten(title, longest=34):
    """A title for a label: cut with an ellipsis, and never read as a formula."""
    title = title if len(title) <= longest else title[: longest - 1] + "…"
    return title.replace("$", r"\$")


LABEL_PLACES = ((4, 3, "left"), (-4, 3, "right"), (4, -9, "left"), (-4, -9, "right"))  # in points


def place_labels(figure, axes, places, texts):
    """Write each text beside its place where it covers none before it, else nowhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that the font lacks
        figure.draw_without_rendering()  # the axes have their place only then
        figure.set_layout_engine("none")
        taken, frame = [], axes.get_window_extent()
        for place, text in zip(places, texts, strict=True):
            for x, y, align in LABEL_PLACES:
                offset = {"xytext": (x, y), "textcoords": "offset points", "ha": align}
                label = axes.annotate(text, place, fontsize=7, **offset)
                box = label.get_window_extent().expanded(1.02, 1.1)
                is_inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
                if is_inside and not any(box.overlaps(other) for other in taken):
                    taken.append(box)
                    break
                label.remove()


def plot_likings(most, least):
    """What `interpret` returns, a line an item, from the most liked to the least."""
    rows = [*least, *reversed(most)]
    figure, (axes,) = start_figure(width=9.0, height=1.2 + 0.26 * len(rows))
    colors = ["C3"] * len(least) + ["C0"] * len(most)
    axes.scatter([row.rating for row in rows], range(len(rows)), color=colors, s=28, zorder=3)
    axes.set_yticks(range(len(rows)), [shorten(row.title, 48) for row in rows], fontsize=8)
    for place, row in enumerate(rows):
        text = f"{row.rating:.2f}, {row.n_ratings:,} ratings"
        offset = {"xytext": (6, 0), "textcoords": "offset points"}
        axes.annotate(text, (row.rating, place), va="center", fontsize=7, **offset)
    axes.set(xlabel="rating that the item's bias predicts")
    axes.set_title("The items liked most and least, whoever rates")
    low, high = (end(row.rating for row in rows) for end in (min, max))
    margin = 0.05 * (high - low) + 0.05
    axes.set_xlim(low - margin, high + 5 * margin)
    return figure


def _finite(context, parameter, value):
    """Refuses `nan` and `inf`, which click's FloatRange lets pass."""
    for number in value if isinstance(value, tuple) else (value,):
        if number is not None and not math.isfinite(number):
            raise click.BadParameter(f"{number} is not a finite number.")
    return value


def _interval(context, parameter, value):
    _finite(context, parameter, value)
    if value is not None and max(map(abs, value)) > LARGEST:
        raise click.BadParameter(f"{max(value, key=abs):g} is beyond the numbers of float32.")
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


@contextmanager
def _usage():
    """A ValueError of what the command line says is wrong usage, with exit status 2."""
    try:
        yield
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _ending(*endings):
    """A callback: a file's name that ends so."""

    def check(context, parameter, value):
        if value is not None and value.suffix.lower() not in endings:
            raise click.BadParameter(f"'{value}' does not end in {' or '.join(endings)}.")
        return value

    return check


def packed(name, options):
    """A decorator: the command has `options`, by name, and gets their values in one dict."""

    def decorate(command):
        @wraps(command)
        def unpacked(**given):
            values = {each: given.pop(each) for each in options}
            return command(**{name: values}, **given)

        for option in reversed(options.values()):
            unpacked = option(unpacked)
        return unpacked

    return decorate


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def cli():
    """Collaborative filtering in plain PyTorch.

    A MODEL is a file that `train --save` has written.
    """


FILE = click.Path(path_type=Path)
POSITIVE = click.FloatRange(0, 1e30, min_open=True)  # of float32
INTERVAL = {"nargs": 2, "type": float, "callback": _interval, "metavar": "LOW HIGH"}
COLUMN_OPTIONS = {
    f"{name}_column": click.option(
        f"--{name}-column", metavar="NAME", help=f"The {name} column's name in the files' headers."
    )
    for name in ("user", "item", "rating", "time")
}
DATA_OPTIONS = {
    "dataset": click.option(
        "--dataset", type=click.Choice(DATASETS), help="A MovieLens.  [default: ml-100k]"
    ),
    "ratings": click.option(
        "--ratings",
        type=FILE,
        help="Instead: a table of user, item, rating[, time] (CSV, TSV, Parquet ..., also .gz), or"
        " a MovieLens's folder or zip.",
    ),
    "users": click.option("--users", type=FILE, help="A table of what is known of the users."),
    "items": click.option("--items", type=FILE, help="The same for items; titles are shown."),
    **COLUMN_OPTIONS,
    "rating_range": click.option(
        "--rating-range",
        **INTERVAL,
        help="Of the scale; a rating outside is an error.  [default: that of the ratings]",
    ),
    "allow_similar_ids": click.option(
        "--allow-similar-ids", is_flag=True, help="Ids may differ in case or spaces alone."
    ),
    "data_dir": click.option(
        "--data-dir", type=FILE, help="Folder of the data.  [default: the user's cache]"
    ),
}
RECIPE_OPTIONS = {
    "features": click.option(
        "--features",
        callback=_names(FEATURES),
        metavar="NAMES",
        help=f"What a row is made of: {','.join(FEATURES)}, or some of them.",
    ),
    "loss": click.option("--loss", type=click.Choice(LOSSES), help="What is differentiated."),
    "y_range": click.option(
        "--y-range",
        **INTERVAL,
        help="Bounds of a prediction, of the sigmoid that makes it (loss mse).",
    ),
    "n_factors": click.option("--n-factors", type=click.IntRange(1, 2**16), help="Latent size."),
    "dropout": click.option(
        "--dropout",
        type=click.FloatRange(0, 1, max_open=True),
        callback=_finite,
        help="Share of the products of factors left out of a prediction in training.",
    ),
    "ensemble": click.option("--ensemble", type=click.IntRange(1, 1000), help="Models to average."),
    "epochs": click.option(
        "--epochs", type=click.IntRange(1, 10**6), help="Passes over the training part."
    ),
    "batch_size": click.option(
        "--batch-size", type=click.IntRange(1, 2**31), help="Ratings a step."
    ),
    "drop_last": click.option(
        "--drop-last/--keep-last", default=None, help="Leave out an incomplete last batch, or not."
    ),
    "lr_max": click.option(
        "--lr-max", type=POSITIVE, callback=_finite, help="Step size at the peak."
    ),
    "weight_decay": click.option(
        "--weight-decay",
        type=click.FloatRange(0),
        callback=_finite,
        help="Decoupled: a step takes the share lr times this off every factor.",
    ),
    "bias_decay": click.option(
        "--bias-decay", type=click.FloatRange(0), callback=_finite, help="The same for the biases."
    ),
}


def with_training_options(command):
    """The options of every command that trains: data, recipe, seed and threads."""
    for option in (
        click.option(
            "--threads",
            type=click.IntRange(1, os.cpu_count()),
            default=1,
            show_default=True,
            help="Of torch, in each process; one is fastest for small batches.",
        ),
        click.option(
            "--seed",
            type=click.IntRange(0, 2**32 - 1),
            default=0,
            show_default=True,
            help="Of all that is drawn at random: the same seed gives the same model.",
        ),
        packed("given", RECIPE_OPTIONS),
        click.option(
            "--recipe",
            type=click.Choice(list(RECIPES)),
            default="default",
            show_default=True,
            help="A named set of defaults for the options from --features to --bias-decay.",
        ),
        packed("where", DATA_OPTIONS),
    ):
        command = option(command)
    return command


def with_split_options(command):
    """The options of a command that trains on one split."""
    for option in (
        click.option(
            "--holdout",
            type=click.FloatRange(0, 1, min_open=True, max_open=True),
            callback=_finite,
            help="Test on this share of the training part instead; the test part is not read.",
        ),
        click.option("--allow-overlap", is_flag=True, help="--test may share pairs with training."),
        click.option("--test", type=FILE, help="Test on the ratings of this file; no split."),
        click.option(
            "--split",
            callback=_split,
            metavar="NAME",
            help="ua, ub, u1 to u5 (ml-100k only), random, or last1, last10 ...: each user's last"
            " by time.  [default: ua for ml-100k, else random]",
        ),
    ):
        command = option(command)
    return command


METRICS = click.option("--metrics", type=FILE, help="Write the figures here, as JSON.")
MODEL = click.argument("path", metavar="MODEL", type=FILE)  # what `train --save` has written
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
NUMBER = click.option(
    "-n", "n", type=click.IntRange(1, 10**6), default=10, show_default=True, help="How many."
)
PICTURE = {"type": FILE, "callback": _ending(".png", ".svg"), "metavar": "FILE.png|.svg"}
TABLE = {"type": FILE, "callback": _ending(".csv", ".tsv", ".parquet")}
ALLOW_UNKNOWN = click.option(
    "--allow-unknown", is_flag=True, help="Unknown users and items count as average ones."
)


def choose_columns(values):
    """The `columns` of `data.read_ratings` from the values of `COLUMN_OPTIONS`."""
    names = {"user": "user", "item": "item", "rating": "rating", "time": "timestamp"}
    columns = {name: values[f"{option}_column"] for option, name in names.items()}
    return {name: column for name, column in columns.items() if column is not None}


def read_options(where):
    """What `read` takes, from the values of `DATA_OPTIONS`."""
    rest = {name: value for name, value in where.items() if name not in COLUMN_OPTIONS}
    return rest | {"columns": choose_columns(where)}


def refuse_columns(values, option):
    """UsageError for a name of a column where there is no table."""
    for name in COLUMN_OPTIONS:
        if values[name] is not None:
            raise click.UsageError(f"--{name.replace('_', '-')} goes with {option}.")


def check_paths(sources, results):
    """UsageError for a result that would be written over what is read."""
    sources = {path.resolve() for path in sources if path is not None}
    for path in results:
        if path is not None and path.resolve() in sources:
            raise click.UsageError(f"{path} is read, and would be written over.")


def start(threads, paths):
    """What a command that trains does first: threads, and that its results can be written."""
    import torch

    import data

    for path in filter(None, paths):
        data.check_writable(path)  # said now, not after the training
    torch.set_num_threads(threads)


def check_usage(recipe, given, where, paths=(), *, split=None, test=None, holdout=None):
    """UsageError for options that do not go together, before anything is read."""
    with _usage():
        choose_options(recipe, given)
        choose_dataset(where["dataset"], where["ratings"])
        check_split(split, test, holdout)
    sources = [where["ratings"], where["users"], where["items"], test]
    if not any(sources):
        refuse_columns(where, "--ratings")
    check_paths(sources, paths)
    names = [path.resolve() for path in paths if path is not None]
    if len(set(names)) < len(names):
        twice = next(path for path in filter(None, paths) if names.count(path.resolve()) > 1)
        raise click.UsageError(f"two of the results are both {twice}.")


@cli.command("train", short_help="Train a model on ratings.")
@with_split_options
@with_training_options
@METRICS
@click.option("--save", "save_to", type=FILE, help="Write the model to this file.")
@click.option("--checkpoint", type=FILE, help="Write to this file, after each epoch, its state.")
@click.option(
    "--resume", type=FILE, help="Go on from this checkpoint, and keep it up unless --checkpoint."
)
@click.pass_context
def train_command(context, threads, save_to, metrics, checkpoint, resume, **_told):
    """Train a model, printing its error on the test part after each epoch.

    \b
    Recipes default and best are for ml-100k; N training ratings of in all R users and items get
      batch-size = recipe's N / 90,570, at least 2
      weight-decay, bias-decay = recipe's (34.5 / (N / R))^0.7
      y-range = the scale and an eighth of it at both ends, within mean -+ 4 deviations

    Under torchrun each process has a share of each batch, and the result is that of one.
    """
    point, told = None, context.params
    if resume is not None:
        point, checkpoint = load_checkpoint(resume), checkpoint or resume
        told = restore_options(context, point["arguments"], resume)
    where, given = ({n: told[n] for n in names} for names in (DATA_OPTIONS, RECIPE_OPTIONS))
    parts = {name: told[name] for name in ("split", "holdout", "test")}
    check_usage(told["recipe"], given, where, (save_to, metrics, checkpoint), **parts)
    rank, n_processes = find_processes()
    if n_processes > 1 and checkpoint is not None:
        raise click.UsageError(f"--checkpoint is of one process, not of {n_processes}.")
    if n_processes > 1:
        join_processes()
    started = time.perf_counter()
    if rank > 0:
        return follow(threads)
    start(threads, (save_to, metrics, checkpoint))
    training = plan_training(
        read(**read_options(where), test=told["test"], notice=_notice),
        told["recipe"],
        told["split"],
        told["holdout"],
        told["seed"],
        told["allow_overlap"],
        given,
        _notice,
    )
    load_seconds = time.perf_counter() - started
    rows, tables, go_on = [], [], None
    fingerprint = checkpoint and find_fingerprint(training)
    if point is not None:
        n_members = training.options["ensemble"]
        if (point["fingerprint"], len(point["states"])) != (fingerprint, n_members):
            raise ValueError(f"{resume}: the data is not that which it was trained on")
        rows, tables = point["rows"], [state[0] for state in point["states"]]
        go_on = len(rows), point["states"]
    for line in describe_task(training):
        _notice(line)
    if point is not None:
        _notice(f"{resume}: going on after epoch {len(rows)} of {training.options['epochs']}")
    tested = "test" if told["holdout"] is None else "held"
    click.echo(f"epoch | train_loss | {tested}_mse | {tested}_rmse | {tested}_mae |    time")
    options = {"options": training.options, "seed": told["seed"], "clip": training.clip}
    epochs = fit(training.task, **options, n_processes=n_processes, resume=go_on)
    for done, row in show_epochs(epochs, training, rows):
        rows.append(row)
        tables = [epoch.params[0] for epoch in done]
        if checkpoint is not None:
            save_checkpoint(checkpoint, fingerprint, done, rows, keep_options(told))
    figures = conclude(training, rows) | {"load_seconds": load_seconds}
    if n_processes > 1:
        figures["processes"] = n_processes
    errors, on = format_errors(figures, training.clip), describe_test(figures)
    click.echo(f"{tested} {errors} on {on}, trained in {figures['fit_seconds']:.2f} s")
    warn_if_worse(figures, figures["baselines"]["averages"])
    if save_to is not None:
        save_model(save_to, make_model(training, tables, figures))
    if metrics is not None:
        save_json(metrics, figures)


def warn_if_worse(figures, averages):
    """A last line where a training was for nothing."""
    if figures["rmse"] > averages["rmse"]:
        _notice("this is worse than the averages of users and items: predict those instead")


NOT_KEPT = {"resume", "checkpoint", "save_to", "metrics", "threads"}  # in a checkpoint


def keep_options(told):
    """The values of train's options as text and numbers, as click takes them again."""
    kept = {name: value for name, value in told.items() if name not in NOT_KEPT}
    if kept["features"] is not None:
        kept["features"] = ",".join(kept["features"])
    return {name: str(v.resolve()) if isinstance(v, Path) else v for name, v in kept.items()}


def restore_options(context, kept, path):
    """The values that `keep_options` kept, checked by click. UsageError for one given besides."""
    told = dict(context.params)
    for option in context.command.params:
        if option.name in NOT_KEPT:
            continue
        if context.get_parameter_source(option.name).name == "COMMANDLINE":
            raise click.UsageError(f"{option.opts[0]} is the checkpoint's, with --resume.")
        with _refusing(path, "checkpoint"):
            value = kept[option.name]
            told[option.name] = None if value is None else option.process_value(context, value)
    return told


COLUMN_WIDTHS = (("train_loss", 10), ("mse", 8), ("rmse", 9), ("mae", 8))


def show_epochs(epochs, training, rows):
    """Pass on `epochs`, printing a line for each, first for `rows`; a bar below on a terminal."""
    scale = dict.fromkeys(("rmse", "mae"), find_scale(training.clip))
    scale["mse"] = 2 * scale["rmse"]
    scale["train_loss"] = scale["mse"] if training.options["loss"] == "mse" else 0

    def show(row):
        cells = (f"{format_number(row[n], scale[n]):>{width}}" for n, width in COLUMN_WIDTHS)
        click.echo(f"{row['epoch']:5} | {' | '.join(cells)} | {row['seconds']:5.2f} s")

    for row in rows:
        show(row)
    n_ratings = training.figures["n_train"] * training.options["ensemble"]
    bar = _progress(training.options["epochs"], label="epochs")
    with bar:
        bar.update(len(rows))
        for done, row in epochs:
            if not bar.hidden:  # the bar makes room for the line
                click.echo("\r\033[K", nl=False, err=True)
            show(row)
            yield done, row
            bar.update(1, f"{n_ratings / row['seconds']:,.0f} ratings/s")


def _progress(length, label):
    """A progress bar on stderr with the remaining time, hidden where that is no terminal."""
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    return click.progressbar(
        length=length,
        label=label,
        file=sys.stderr,
        hidden=not is_terminal,
        item_show_func=lambda text: text,
    )


@cli.command("cross-validate", short_help="Errors over several splits.")
@click.option(
    "--splits",
    callback=_names(SPLITS[:-1]),
    metavar="NAMES",
    help="Published splits to train and test on in turn.  [default: u1,u2,u3,u4,u5]",
)
@click.option(
    "--folds", type=click.IntRange(2), help="Cut the ratings into this many, by --seed, instead."
)
@with_training_options
@METRICS
def cross_validate_command(splits, folds, where, recipe, given, seed, threads, metrics):
    """Train and test on several splits, printing each one's error, the mean and the spread."""
    check_usage(recipe, given, where)
    if (n_processes := find_processes()[1]) > 1:
        raise click.UsageError(f"cross-validate is of one process, not of {n_processes}.")
    if folds and splits:
        raise click.UsageError("--splits and --folds do not go together.")
    start(threads, (metrics,))
    found = read(**read_options(where), notice=_notice)

    import data

    if folds:
        cuts = enumerate(data.fold(found.ratings, folds, seed=seed), 1)
        parts = ((f"{number}/{folds}", frames) for number, frames in cuts)
    else:
        splits = splits or ("u1", "u2", "u3", "u4", "u5")
        parts = ((name, data.split(found.ratings, name)) for name in splits)
    rows = []
    for name, (ratings, test) in parts:
        if not rows:  # not before the first cut, which may fail
            click.echo(" fold | test_rmse | test_mae |    time")
        part = found._replace(ratings=ratings, test=test)
        training = set_up(part, recipe=recipe, seed=seed, notice=_notice, **given)
        scale = find_scale(training.clip)
        if unseen := describe_unseen(training.task):
            _notice(f"{name}: {unseen}")
        seconds = 0.0
        options = {"options": training.options, "seed": seed, "clip": training.clip}
        for _, row in fit(training.task, **options):
            seconds += row["seconds"]
        errors = {each: row[each] for each in ("mse", "rmse", "mae")}
        baselines = training.figures["baselines"]
        rows.append({"fold": name, **errors, "seconds": seconds, "baselines": baselines})
        cells = (f"{format_number(row[n], scale):>{width}}" for n, width in COLUMN_WIDTHS[2:])
        click.echo(f"{name:>5} | {' | '.join(cells)} | {seconds:5.2f} s")
    names = ("recipe", "dataset", "seed", "options")
    figures = {name: training.figures[name] for name in names} | {"folds": rows}
    figures["baselines"] = {
        name: {
            each: statistics.mean(row["baselines"][name][each] for row in rows) for each in errors
        }
        for name in baselines
    }
    parts = []
    for name in ("rmse", "mae"):
        values = [row[name] for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        figures |= {name: statistics.mean(values), f"{name}_std": spread}
        both = (format_number(value, scale) for value in (figures[name], spread))
        parts.append(f"{name} {' +- '.join(both)}")
    figures["fit_seconds"] = sum(row["seconds"] for row in rows)
    click.echo(f"{', '.join(parts)} over {len(rows)} folds")
    for line in describe_baselines(figures["baselines"], training.clip):
        _notice(line)
    warn_if_worse(figures, figures["baselines"]["averages"])
    if metrics is not None:
        save_json(metrics, figures)


@cli.command("lr-find", short_help="Suggest an --lr-max.")
@with_split_options
@with_training_options
@click.option("--plot", "plot_to", **PICTURE, help="Draw the curve.")
@JSON
def lr_find_command(where, recipe, given, threads, test, plot_to, as_json, **settings):
    """Suggest an --lr-max: fastai's range test, one short run at a growing learning rate."""
    for name in ("epochs", "lr_max", "ensemble"):
        if given[name] is not None:
            raise click.UsageError(f"--{name.replace('_', '-')} changes nothing here.")
    parts = {name: settings[name] for name in ("split", "holdout")}
    check_usage(recipe, given, where, (plot_to,), **parts, test=test)
    start(threads, (plot_to,))
    found = read(**read_options(where), test=test, notice=_notice)
    curve = find_lr(set_up(found, recipe=recipe, **settings, **given))
    if plot_to is not None:
        picture(plot_to, plot_lr(curve))
    if as_json:
        return echo_json(curve)
    click.echo("valley   {valley:.2g}\nsteepest {steepest:.2g}".format_map(curve))


def save_json(path, figures):
    import data

    data.write_file(path, (json.dumps(figures, indent=1, allow_nan=False) + "\n").encode())


def echo_json(value):
    click.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))


def check_known(saved, frame, path, columns):
    """ValueError for an unknown id in a file of ratings, with the line, which its frame has not."""
    import data

    try:
        find_rows(saved, frame, source=path)
    except ValueError:
        for pairs in data.read_pairs(path, columns=columns) if path.is_file() else ():
            find_rows(saved, pairs, source=path)
        raise


@cli.command("evaluate", short_help="Errors and ranking of a saved model.")
@MODEL
@click.option("--ratings", type=FILE, help="On this table, not on the test part of the training.")
@packed("columns", COLUMN_OPTIONS)
@click.option(
    "--ranking", is_flag=True, help="How well the top of each user's list is chosen, too."
)
@click.option("-k", "k", type=click.IntRange(1), help="Length of that top.  [default: 10]")
@click.option(
    "--min-rating",
    type=float,
    callback=_finite,
    help="The least rating of an item to be looked for in it.  [default: any]",
)
@ALLOW_UNKNOWN
@click.option(
    "--allow-overlap", is_flag=True, help="Pairs that the model was trained on may occur."
)
@JSON
def evaluate_command(path, ratings, columns, ranking, k, min_rating, as_json, **allowed):
    """Print a saved model's error on the test part of its training, or on other ratings."""
    for name, value in (("-k", k), ("--min-rating", min_rating)):
        if value is not None and not ranking:
            raise click.UsageError(f"{name} goes with --ranking.")
    if ratings is None:
        refuse_columns(columns, "--ratings")

    import data

    saved, frame = load_model(path), None
    if ratings is not None:
        columns = choose_columns(columns)
        frame = data.drop_repeats(data.read_ratings(ratings, columns=columns))
        if not allowed["allow_unknown"]:
            check_known(saved, frame, ratings, columns)
    figures = evaluate(
        saved,
        frame,
        source=str(ratings),
        k=(k or 10) if ranking else None,
        min_rating=min_rating,
        **allowed,
    )
    if as_json:
        return echo_json(figures)
    place = str(ratings) if ratings is not None else describe_test(saved.figures)
    errors = format_errors(figures, saved.clip)
    click.echo(f"{errors} on {figures['n_test']:,} ratings of {place}")
    if ranking:
        line = (
            "precision {precision:.4f}, recall {recall:.4f}, ndcg {ndcg:.4f}, "
            "hit rate {hit_rate:.4f} at {k} over {n_users:,} users"
        )
        click.echo(line.format_map(figures))


@cli.command("predict", short_help="Ratings of one pair or of many.")
@MODEL
@click.option("--user", help="Its id.")
@click.option("--item", help="Its id, or a part of its title that no other has.")
@click.option("--pairs", type=FILE, help="Instead: a table of user, item[, time], of any length.")
@packed("columns", COLUMN_OPTIONS)
@click.option("--output", **TABLE, metavar="FILE.csv|.tsv|.parquet", help="For --pairs.")
@ALLOW_UNKNOWN
@JSON
def predict_command(path, user, item, pairs, columns, output, allow_unknown, as_json):
    """Print the rating that a user will give an item, or write those of a table of pairs."""
    if pairs is None and (user is None or item is None):
        raise click.UsageError("Give --user and --item, or --pairs and --output.")
    if pairs is not None and (output is None or user is not None or item is not None):
        raise click.UsageError("--pairs goes with --output, not with --user and --item.")
    if pairs is None:
        if output is not None:
            raise click.UsageError("--output goes with --pairs.")
        refuse_columns(columns, "--pairs")
        return predict_one(load_model(path), user, item, allow_unknown, as_json=as_json)

    import data

    check_paths((path, pairs), (output,))
    data.check_writable(output)
    saved, n_pairs = load_model(path), 0
    frames = data.read_pairs(pairs, columns=choose_columns(columns))

    def counted():
        nonlocal n_pairs
        for frame in predict_pairs(saved, frames, source=pairs, allow_unknown=allow_unknown):
            n_pairs += len(frame)
            yield frame

    data.write_frames(output, counted())
    if as_json:
        return echo_json({"n_pairs": n_pairs, "output": str(output)})
    click.echo(f"{n_pairs:,} predictions in {output}")


def predict_one(saved, user, item, allow_unknown, *, as_json):
    """`predict --user --item`."""
    ids = []
    for raw, raw_ids, find in (
        (user, saved.user_ids, find_user),
        (item, saved.item_ids, find_item),
    ):
        try:
            ids.append(raw_ids[find(saved, raw)])
        except ValueError:
            if not allow_unknown:
                raise
            ids.append(raw)
    (mean,), (deviation,) = predict(saved, *([each] for each in ids), allow_unknown=allow_unknown)
    row = find_row(saved.item_ids, ids[1])
    answer = {
        "user": ids[0],
        "item": ids[1],
        "title": str(ids[1]) if row is None else find_title(saved, row),
        "rating": mean.item(),
        "deviation": deviation.item(),
    }
    if as_json:
        return echo_json(answer)
    values = [answer["rating"], *([answer["deviation"]] if len(saved.tables) > 1 else [])]
    scale = find_scale(saved.clip)
    numbers = " +- ".join(format_number(value, scale, 2) for value in values)
    click.echo(f"{numbers} by {answer['user']} for {answer['title']}")


@cli.command("recommend", short_help="The best items for a user, a new one, all.")
@MODEL
@click.option("--user", help="Its id.")
@click.option(
    "--rated",
    metavar="FILE|ITEM:RATING,...",
    help="Instead: the ratings of a new user, in a table of item, rating[, time] or as they are.",
)
@click.option("--all-users", is_flag=True, help="Instead: for every user, written to --output.")
@packed("columns", COLUMN_OPTIONS)
@click.option("--output", **TABLE, metavar="FILE.csv|.tsv|.parquet", help="For --all-users.")
@NUMBER
@click.option("--include-seen", is_flag=True, help="Items that the user has rated, too.")
@JSON
def recommend_command(path, user, rated, all_users, columns, output, n, include_seen, as_json):
    """Print the items that a user will like best, of those that the user has not rated."""
    if sum((user is not None, rated is not None, all_users)) != 1:
        raise click.UsageError("Give one of --user, --rated and --all-users.")
    if all_users != (output is not None):
        raise click.UsageError("--all-users and --output go together.")
    if rated is None:
        refuse_columns(columns, "--rated")
    if all_users:
        check_paths((path,), (output,))
        return write_recommendations(path, output, n=n, include_seen=include_seen, as_json=as_json)
    saved = load_model(path)
    if rated is not None:
        asked, rated = {"rated": rated}, read_rated(saved, rated, choose_columns(columns))
    else:
        asked = {"user": saved.user_ids[find_user(saved, user)]}
    found = recommend(saved, user, rated=rated, n=n, include_seen=include_seen)
    if rated is not None:  # which may have been told by parts of titles
        rows = (find_row(saved.item_ids, item) for item, *_ in rated)
        _notice("rated: " + "; ".join(find_title(saved, row) for row in rows))
    echo_items(found, asked, as_json=as_json, scale=find_scale(saved.clip))


def write_recommendations(path, output, *, n, include_seen, as_json):
    """`recommend --all-users`."""
    import data

    data.check_writable(output)
    saved = load_model(path)

    def shown():
        with _progress(len(saved.user_ids), label="users") as bar:
            for frame in recommend_all(saved, n=n, include_seen=include_seen):
                yield frame
                bar.update(frame["user"].n_unique())

    data.write_frames(output, shown())
    if as_json:
        return echo_json({"n_users": len(saved.user_ids), "output": str(output)})
    click.echo(f"up to {n} items for each of {len(saved.user_ids):,} users in {output}")


def read_rated(saved, text, columns):
    """A new user's ratings from `--rated`: a list of (item, rating[, timestamp]).

    A file has ids; what is typed may be parts of titles.
    """
    if os.path.exists(text):  # False, not OSError, where the text is too long for a name
        import data

        rated = list(data.read_rated(Path(text), columns=columns).iter_rows())
        for item, *_ in rated:
            if find_row(saved.item_ids, item) is None:
                raise ValueError(f"{text}: no item {str(item)!r} in the model")
        return rated
    rated = []
    for pair in text.split(","):
        item, _, rating = (part.strip() for part in pair.rpartition(":"))
        try:
            rated.append((item, float(rating)))
        except ValueError:
            item = ""
        if not item:
            raise ValueError(f"--rated {text}: neither a file nor ITEM:RATING,ITEM:RATING")
    return [(saved.item_ids[find_item(saved, item)], rating) for item, rating in rated]


def echo_items(found, asked, *, as_json, scale=0):
    """Print items (NamedTuples) as a table with the title last; as JSON with what was asked.

    `scale` is that of the numbers, for `format_number`.
    """
    if as_json:
        return echo_json(asked | {"items": [each._asdict() for each in found]})
    if not found:
        return _notice("no item is left")
    lines = [[name for name in type(found[0])._fields if name != "title"] + ["title"]]
    for each in found:
        values = [value for name, value in each._asdict().items() if name != "title"]
        cells = [
            format_number(value, scale, 3) if isinstance(value, float) else f"{value}"
            for value in values
        ]
        lines.append([*cells, each.title])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for *cells, title in lines:
        cells = (cell.rjust(width) for cell, width in zip(cells, widths, strict=False))
        click.echo(" | ".join([*cells, title]))


@cli.command("similar", short_help="Items like one.")
@MODEL
@click.option("--item", required=True, help="Its id, or a part of its title that no other has.")
@NUMBER
@JSON
def similar_command(path, item, n, as_json):
    """Print the items most like one, by the cosine of their factors."""
    saved = load_model(path)
    row = find_item(saved, item)
    asked = {"item": saved.item_ids[row], "title": find_title(saved, row)}
    echo_items(find_similar(saved, asked["item"], n=n), asked, as_json=as_json)


@cli.command("info", short_help="What a saved model is.")
@MODEL
@JSON
def info_command(path, as_json):
    """Print what a saved model was trained on, with which options, and its figures."""
    told = describe_model(load_model(path))
    if as_json:
        return echo_json(told)
    for name, value in (told | told.pop("options")).items():
        value = f"{value:.4g}" if isinstance(value, float) else value
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
        click.echo(f"{name:16} {text}")


@cli.command("interpret", short_help="The items liked most and least.")
@MODEL
@NUMBER
@click.option("--output", **PICTURE, help="Draw them, too.")
@JSON
def interpret_command(path, n, output, as_json):
    """Print the items liked most and least, whoever rates: those of the highest and lowest bias."""
    check_paths((path,), (output,))
    saved = load_model(path)
    most, least = interpret(saved, n=n)
    if output is not None:
        picture(output, plot_likings(most[:50], least[:50]))
    if as_json:
        parts = {"most": most, "least": least}
        return echo_json({name: [each._asdict() for each in part] for name, part in parts.items()})
    for name, part in (("most", most), ("least", least)):
        click.echo(f"liked {name}:")
        echo_items(part, {}, as_json=False, scale=find_scale(saved.clip))


@cli.command("map", short_help="A picture of the items.")
@MODEL
@click.option("--output", **PICTURE, required=True)
def map_command(path, output):
    """Draw the items by the first two principal components of their factors."""
    check_paths((path,), (output,))
    picture(output, plot_map(load_model(path)))


@cli.command("plot", short_help="A picture of trainings.")
@click.argument("paths", metavar="FILE.json...", nargs=-1, required=True, type=FILE)
@click.option("--output", **PICTURE, required=True)
def plot_command(paths, output):
    """Draw the learning curves and schedules of trainings from their --metrics files."""
    is_plain = len({path.stem for path in paths}) == len(paths)
    names = [path.stem if is_plain else str(path) for path in paths]
    picture(output, plot_runs([(n, read_metrics(p)) for n, p in zip(names, paths, strict=True)]))


def read_metrics(path):
    """What `train --metrics` wrote. ValueError, naming the file, for anything else."""
    try:
        figures = json.loads(path.read_bytes())
        epochs = [
            [row[name] for name in ("epoch", "mse", "train_loss")] for row in figures["epochs"]
        ]
        names = ("batch_size", "drop_last", "epochs", "lr_max")
        options = [figures["options"][name] for name in names]
        for number in (*options, figures["n_train"], *(value for row in epochs for value in row)):
            if not abs(number) < LARGEST:
                raise ValueError(f"{number} is out of range")
        if not epochs:
            raise ValueError("no epochs")
        for count in (figures["n_train"], figures["options"]["epochs"], options[0]):
            if not isinstance(count, int) or not 0 < count < 2**53:
                raise ValueError(f"{count} is no number of ratings or epochs")
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        why = f"no {error}" if isinstance(error, LookupError) else error
        raise ValueError(f"{path}: not the figures of a training: {why}") from None
    return figures


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
