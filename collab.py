"""Train a model of ratings and ask it: `python collab.py train`, `recommend`, `predict` and more.

The recipes, the functions that join the four other modules, which return values and print nothing,
and the commands, which read their options, call these and print.

>>> import collab
>>> trained = collab.train_model(collab.prepare(collab.read()))  # MovieLens 100K
>>> collab.recommend(trained, 196, n=1)["title"].to_list()
['When Harry Met Sally... (1989)']
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":  # before the imports, which take long enough to be interrupted

    def stop(number, _):
        """On Ctrl-C or SIGTERM: the end, at once, with nothing left half-written."""
        for path in getattr(sys.modules.get("data"), "UNFINISHED", ()):
            path.unlink(missing_ok=True)
        os._exit(128 + number)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)

import hashlib
import importlib
import io
import json
import math
import pickle
import re
import statistics
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import click


class Lazy:
    """A module that is imported when something of it is first used: `--help` needs none of these.

    (importlib's LazyLoader is no way: torch looks at all modules as it is imported, which would
    import those that import torch.)
    """

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, attribute: str):
        return getattr(importlib.import_module(self.name), attribute)


np, pl, torch = map(Lazy, ("numpy", "polars", "torch"))
data, model, schedule, train = map(Lazy, ("data", "model", "schedule", "train"))

# Recipes, and the rule that fits them to data

# Chosen by tests/tools/tune.py on validation parts of training parts of ml-100k; with
# fits_data, `fit_recipe` makes of these values those for other data.
# fmt: off
DEFAULT = {
    "fits_data": True, "features": ("id",), "loss": "mse", "y_range": None, "std": 0.003,
    "n_factors": 40, "dropout": 0.0, "ensemble": 1, "epochs": 6, "batch_size": 612,
    "drop_last": False, "lr_max": 0.01, "weight_decay": 0.6, "bias_decay": 0.3,
}
FASTAI = DEFAULT | {  # fastai v1's lesson, matched in every detail
    "fits_data": False, "y_range": (0.0, 5.5), "std": 0.01, "epochs": 10, "batch_size": 64,
    "drop_last": True, "weight_decay": 0.1, "bias_decay": 0.1,
}
BEST = DEFAULT | {
    "features": ("id", "implicit", "side", "time"), "loss": "ordinal", "n_factors": 48,
    "dropout": 0.25, "ensemble": 6, "epochs": 10, "batch_size": 1536, "lr_max": 0.015,
    "weight_decay": 0.9,
}
# fmt: on
RECIPES = {"fastai": FASTAI, "default": DEFAULT, "best": BEST}
# Of ml-100k's split ua, which the recipes' values are for.
UA_RATINGS, UA_ROWS = 90_570, 943 + 1_680  # training ratings; users and items that have some
MOST_LEVELS = 100  # distinct ratings that loss ordinal takes; it has a bias for each
PRIOR_WIDTH = 4.0  # of a new user's row, by `tests/tools/fold_in.py --validate`
FEW = 30  # ratings of an item that count for half in `find_similar`
LARGEST = 3e38  # of float32's numbers
# Of lists, chosen on validation parts of ml-100k.
N_TASTES, RATING_WEIGHT = 20, 0.4  # factors of `model.find_tastes`; of the predicted rating
SCORES_AT_ONCE = 1 << 24  # predictions held in memory when all items are ranked


class Usage(click.UsageError, ValueError):
    """Options that do not go together, or that there are not."""


def choose_options(recipe: str, given: dict) -> dict:
    """The recipe's options with those `given` over them, by name, None for not given.

    `Usage` for what the command line would refuse, too.
    """
    # The command line's own, so that both refuse the same.
    types = {option.name: option.type for option in train_command.params}
    check_names("recipe", (recipe,), RECIPES)
    check_names("options", tuple(given), DEFAULT)
    options = dict(RECIPES[recipe])
    for name in (name for name, value in given.items() if value is not None):
        try:
            options[name] = check_value(None, None, types[name].convert(given[name], None, None))
        except click.UsageError as error:
            raise Usage(f"{name}: {error.message}") from None
    check_names("features", options["features"], data.FEATURES)
    if options["loss"] == "ordinal":
        options["y_range"] = None
        if given.get("y_range") is not None:
            raise Usage("--y-range goes with --loss mse.")
    return options


def check_names(what: str, names: tuple, known) -> None:
    """`Usage` for a name that is not known, or is there twice."""
    for place, name in enumerate(names):
        if name not in known or name in names[:place]:
            raise Usage(f"{what}: '{name}' is not one of {', '.join(known)}, or is there twice.")


def fit_recipe(
    options: dict, given: dict, columns: tuple, clip: tuple, notice=lambda line: None
) -> dict:
    """The options for the training `columns`, users, items and ratings (N,); `given` ones stay.

    A recipe's values are those for ml-100k's split ua. Of these, with R users and items that have
    training ratings, and the scale `clip`,

        batch_size = recipe's * N / 90,570, at least 2
        weight_decay, bias_decay = recipe's * (34.5 / (N / R))^0.7
        y_range = the scale and an eighth of it at both ends, within mean -+ 4 deviations

    So there are as many steps whatever N is, and the fewer ratings a row has, the more it is held.
    34.5 is 90,570 / 2,623. Where there are too few or too many distinct ratings for loss ordinal,
    it is mse, which `notice` is told. ValueError for ratings that do not go with options given.
    """
    ratings, (low, high), fitted = columns[2], clip, {}
    n_levels = options["loss"] == "ordinal" and len(ratings.unique())
    if options["loss"] == "ordinal" and not 3 <= n_levels <= MOST_LEVELS:
        if given.get("loss") is not None:
            needs = f"--loss ordinal needs 3 to {MOST_LEVELS} distinct ratings"
            raise ValueError(f"{needs}, the training part has {n_levels}")
        notice(f"loss mse, not ordinal, for {n_levels:,} distinct ratings")
        fitted["loss"] = "mse"
    if options["fits_data"]:
        thinness, (mean, deviation) = find_thinness(columns), find_moments(ratings)
        fitted["batch_size"] = max(round(options["batch_size"] * len(ratings) / UA_RATINGS), 2)
        fitted |= {name: options[name] * thinness for name in ("weight_decay", "bias_decay")}
        if (options | fitted)["loss"] == "mse":
            margin, reach = (high - low) / 8, 4 * deviation
            fitted["y_range"] = max(low - margin, mean - reach), min(high + margin, mean + reach)
    options = options | {name: v for name, v in fitted.items() if given.get(name) is None}
    lr_max, decay = options["lr_max"], max(options["weight_decay"], options["bias_decay"])
    if lr_max * decay >= 1:  # the whole is taken off in a step
        cure = "give a smaller --lr-max, or --weight-decay and --bias-decay"
        raise Usage(f"--lr-max {lr_max:g} times a decay of {decay:g} is not below 1: {cure}.")
    is_told = given.get("y_range") or not options["fits_data"]
    (least, most), (low, high) = find_range(ratings), options["y_range"] or clip
    if is_told and options["loss"] == "mse" and (least < low or most > high):
        where = f"y_range {low:g} to {high:g}: give --y-range LOW HIGH"
        raise ValueError(f"ratings from {least:g} to {most:g} are not all within {where}")
    return options


def find_thinness(columns: tuple) -> float:
    """How much thinner the ratings are than ml-100k's: (34.5 / ratings per user or item)^0.7.

    Of `columns` users and items (N,) are read; those count that are in it.
    """
    n_rows = sum((torch.bincount(rows) > 0).sum().item() for rows in columns[:2])
    return (UA_RATINGS / UA_ROWS / (len(columns[0]) / n_rows)) ** 0.7


def find_range(ratings: torch.Tensor) -> tuple[float, float]:
    """The lowest and the highest of a tensor of ratings."""
    return ratings.min().item(), ratings.max().item()


def find_moments(ratings: torch.Tensor) -> tuple[float, float]:
    """The mean of a tensor of ratings and their standard deviation."""
    mean = ratings.mean(dtype=torch.float64).item()
    norm = torch.linalg.vector_norm(ratings - mean, dtype=torch.float64)
    return mean, norm.item() / len(ratings) ** 0.5


def choose_head(ratings: torch.Tensor, options: dict) -> tuple[str, dict]:
    """Name and arguments of the `model.Head` for `options` and the training `ratings`."""
    if options["loss"] == "ordinal":
        levels = ratings.unique()
        shares = [(ratings > level).double().mean().item() for level in levels[:-1]]
        return "ordinal", {"levels": levels.tolist(), "shares": shares}
    low, high = options["y_range"]
    mean, unit = find_moments(ratings) if options["fits_data"] else ((low + high) / 2, 1.0)
    return "bounded", {"low": low, "high": high, "mean": mean, "unit": unit}


def make_head(name: str, arguments: dict) -> model.Head:
    """The `model.Head` that `choose_head` has named."""
    return {"ordinal": model.ordinal, "bounded": model.bounded}[name](**arguments)


# Source and task


class Source(NamedTuple):
    """What a training reads, as polars frames, and their scale."""

    name: str  # of the MovieLens, or the path
    split: str  # how the ratings are cut unless told
    ratings: pl.DataFrame  # user, item, rating[, timestamp], as of `data.read_ratings`
    test: pl.DataFrame | None  # a test part of its own, the same
    users: pl.DataFrame | None  # side information, as `data.read_users`, `data.read_items`
    items: pl.DataFrame | None
    rating_range: tuple[float, float] | None  # None for that of the training ratings


def read(
    ratings="ml-100k",
    *,
    test=None,
    users=None,
    items=None,
    rating_range: tuple[float, float] | None = None,
    data_dir: str | Path | None = None,
    notice=lambda line: None,
    **how,
) -> Source:
    """Read a MovieLens, by a name of `data.DATASETS`, or a path or a frame, with tables beside it.

    The four are paths or frames; `how` (columns, encoding, skip_bad) and `rating_range` are as in
    `data.read_ratings`. Of several ratings of one (user, item) the latest is kept. `notice` gets a
    line on where data came from and on what was understood and left out. ValueError and OSError in
    one line for what cannot be read, and for a table of users or items of which none has a rating.
    """
    is_own = not isinstance(ratings, str) or ratings not in data.DATASETS
    how |= {"notice": notice}
    path = ratings if is_own else data.get_dataset(ratings, data_dir, notice=notice)

    def read_part(table, **how):
        frame = data.read_ratings(table, rating_range=rating_range, **how)
        kept = data.drop_repeats(frame)
        if n_repeats := len(frame) - len(kept):
            notice(f"{n_repeats:,} earlier ratings of the same user and item are left out")
        return kept

    frames = [read_part(path, **(how if is_own else {"notice": notice}))]
    frames.append(None if test is None else read_part(test, **how))
    has_tables = data.has_tables(path)
    for own, reader in ((users, data.read_users), (items, data.read_items)):
        if own is None:
            frames.append(reader(path) if has_tables else None)
        else:
            frames.append(read_table(reader, own, **how))
    frames = data.same_ids(*frames)
    for name, about in zip(("user", "item"), frames[2:], strict=True):
        if about is not None:
            check_table(name, about[name], frames[:2], notice)
    split = "ua" if not is_own and ratings == "ml-100k" else "random"
    split = "test file" if test is not None else split
    is_path = isinstance(ratings, str | os.PathLike)
    name = os.fsencode(ratings).decode(errors="replace") if is_path else "a frame"
    return Source(name, split, *frames, rating_range)


def read_table(reader, table, **how) -> pl.DataFrame:
    """By `data.read_users` or `data.read_items`; ValueError for a folder without such a table."""
    if (frame := reader(table, **how)) is None:
        raise ValueError(f"{table}: no table in it that is known: give the path of a file")
    return frame


def check_table(name: str, ids: pl.Series, ratings: tuple, notice) -> None:
    """That some `ids` of a table have `ratings`; a notice on how many have none."""
    rated = pl.concat([frame[name].unique() for frame in ratings if frame is not None])
    n_rated = ids.is_in(rated.implode()).sum()
    if not n_rated:
        ways = f"{ids[0]!r} there, {rated[0]!r} in the ratings: --{name}-column tells another"
        raise ValueError(f"no {name} of the table of {name}s has a rating: {ways}")
    if n_rated < len(ids):
        notice(f"{len(ids) - n_rated:,} of the table's {len(ids):,} {name}s have no ratings")


class Task(NamedTuple):
    """What a model is trained and tested on, and all that is known of it before."""

    train: tuple  # users, items, ratings (N,), and the context of each where features have one
    test: tuple  # the same
    times: torch.Tensor | None  # (N,) int64 timestamps of train; None without the feature time
    ids: data.Ids
    counts: tuple  # training ratings of each user and each item
    seen: tuple  # bool masks of the users and of the items that training tells something of
    averages: model.Averages  # of the training ratings
    features: model.Features | None  # None for ids alone
    sizes: tuple[int, int]  # how many features users and items have; for ids alone their numbers
    options: dict | None = None  # a recipe's, complete
    head: tuple[str, dict] | None = None  # what `choose_head` returns
    clip: tuple[float, float] | None = None  # the lowest and the highest rating that is predicted
    titles: list[str] | None = None  # by row of the items; None where none has one
    figures: dict | None = None  # recipe, dataset, split, seed, options, counts, baselines


def prepare(
    source: Source,
    recipe: str = "default",
    *,
    split: str | None = None,
    holdout: float | None = None,
    seed: int = 0,
    allow_overlap: bool = False,
    notice=lambda line: None,
    **given,
) -> Task:
    """The `Task` of training a recipe, with the options `given` over it, on a `Source`.

    `split` is one of `data.split`: ua for ml-100k, else random, unless given; a source with a test
    part of its own is not split. With `holdout`, the test part is dropped unread, and that share of
    the training part takes its place. `notice` gets a line on what is missing. ValueError for
    options, features or a split that do not go with the data, and for nothing to learn.
    """
    options = choose_options(recipe, given)
    kinds = options["features"] = choose_features(source, options["features"], given, notice)
    split, parts = split or source.split, [source.ratings, source.test]
    if source.test is None:
        is_timed = "time" in kinds or split.startswith(("last", "by-date"))
        ratings = source.ratings if is_timed else source.ratings.drop("timestamp", strict=False)
        parts = [*data.split(ratings, split, seed=seed)]
        parts = parts if holdout is None else [*data.hold_out(parts[0], holdout, seed=seed)]
    elif split != source.split or holdout is not None:
        raise Usage("--split and --holdout do not go together with --test.")
    task = make_task(parts, source, kinds, allow_overlap=allow_overlap)
    ratings, (n_users, n_items) = task.train[2], map(len, task.ids)
    clip = tuple(map(float, source.rating_range or find_range(ratings)))
    if ratings.min() == ratings.max():
        where = f"{source.name}: all ratings of the training part are {ratings[0]:g}"
        raise ValueError(f"{where}: pass ratings, not clicks or purchases")
    options = fit_recipe(options, given, task.train, clip, notice)
    n_unseen = [(counts == 0).sum().item() for counts in task.counts]
    if any(n_unseen):
        how = "by their features" if all(seen.all() for seen in task.seen) else "as average"
        pairs = zip(task.counts, task.test, strict=False)
        n_tested = torch.stack([counts[rows] == 0 for counts, rows in pairs]).any(0).sum().item()
        what = "{:,} users, {:,} items, in {:,} test ratings".format(*n_unseen, n_tested)
        notice(f"without training ratings: {what}; predicted {how}")
    figures = {"recipe": recipe, "dataset": source.name, "split": split, "seed": seed}
    figures |= {"options": options, "n_users": n_users, "n_items": n_items}
    figures |= {"n_train": len(ratings), "n_test": len(task.test[2])}
    figures |= {"baselines": find_baselines(task, clip)}
    figures |= {} if holdout is None else {"holdout": holdout}
    titles = find_titles(source.items, task.ids.items)
    rest = {"titles": titles, "options": options, "clip": clip, "figures": figures}
    return task._replace(head=choose_head(ratings, options), **rest)


def choose_features(source: Source, kinds: tuple, given: dict, notice=lambda line: None) -> tuple:
    """Those of `kinds` that the source has. Another is a ValueError if the user has given it."""
    lacks = {}
    if source.users is None and source.items is None:
        lacks["side"] = "tables of users or items: give --users or --items"
    frames = [frame for frame in (source.ratings, source.test) if frame is not None]
    if any("timestamp" not in frame.columns for frame in frames):
        lacks["time"] = "timestamps: tell their column by --time-column"
    for kind in (kind for kind in kinds if kind in lacks):
        if given.get("features") is not None:
            raise ValueError(f"the feature {kind}: the data has no {lacks[kind]}")
        notice(f"without the feature {kind}: the data has no {lacks[kind]}")
    return tuple(kind for kind in kinds if kind not in lacks)


def make_task(parts: list, source: Source, kinds: tuple, *, allow_overlap: bool) -> Task:
    """The tensors of a `Task` from its train and test frames, which leave `parts` meanwhile."""
    frame, test_frame = map(data.floor_times, parts) if "time" in kinds else parts
    parts.clear()  # so that nobody holds the frames when they are let go of below
    about = {"users": source.users, "items": source.items}
    part, test, ids = data.to_tensors(frame, test_frame, allow_overlap=allow_overlap, **about)
    about = about if "side" in kinds else {}
    sizes, features = tuple(map(len, ids)), None
    if kinds != ("id",):
        *matrices, sizes = data.features(frame, ids, kinds, **about)
        features = model.Features(*matrices)
    contexts = None
    if "time" in kinds:
        contexts = data.time_context(data.find_excess(frame), test_frame)
    times = frame["timestamp"].to_torch() if "time" in kinds else None
    del frame, test_frame  # of 25 million ratings half a gigabyte
    seen = data.find_seen(part, ids, **about)
    averages = model.find_averages(*part, n_users=len(ids.users), n_items=len(ids.items))
    if contexts is not None:
        part, test = ((*each, c) for each, c in zip((part, test), contexts, strict=True))
    counts = count_ratings(ids, *part[:2])
    return Task(tuple(part), tuple(test), times, ids, counts, seen, averages, features, sizes)


def find_titles(items: pl.DataFrame | None, item_ids: pl.Series) -> list[str] | None:
    """The title of each item, its id where it has none; None where none has one."""
    if items is None or "title" not in items.columns:
        return None
    titles = dict(items.select("item", "title").drop_nulls().iter_rows())
    return [str(titles.get(item, item)) for item in item_ids]


def find_baselines(task: Task, clip: tuple[float, float]) -> dict:
    """Errors on the test part without a model: of the mean, and of the averages."""
    mean, users, items = task.averages
    predictions = {
        "mean": lambda rows, columns, *_: users.new_full(rows.shape, mean),
        "averages": lambda rows, columns, *_: mean + users[rows] + items[columns],
    }
    return {name: find_errors(each, task.test, clip) for name, each in predictions.items()}


def find_errors(predict, columns: tuple, clip: tuple[float, float]) -> dict:
    """mse, rmse and mae on the `columns` of a test part; nothing of one without ratings."""
    return train.evaluate(predict, *columns, clip=clip)._asdict() if len(columns[0]) else {}


# Training


def train_model(
    task: Task,
    *,
    on_epoch=lambda figures: None,
    checkpoint=None,
    resume=None,
    arguments: dict | None = None,
) -> Model:
    """Train the ensemble's members side by side, and return the `Model`.

    After each epoch `on_epoch` gets its figures, a dict: epoch, train_loss, mse, rmse, mae (if
    there is a test part), seconds (of training), evaluate_seconds; the model's `figures` are what
    `train --metrics` writes. A file `checkpoint` is written after each epoch, with `arguments`,
    plain values; training goes on after the last epoch of such a file, `resume`, to the same bits.
    torch's number of threads is the caller's: as many members train at once, and one is fastest for
    one member of small batches. Under `torch.distributed` the other processes run
    `fit_members(train.broadcast())`. ValueError for a loss that is not finite, and for a checkpoint
    of another task.
    """
    rows, states, tables = [], None, []
    fingerprint = find_fingerprint(task) if checkpoint or resume else None
    if resume is not None:
        rows, states = load_states(resume, task, fingerprint)
        tables = [table for table, *_ in states]
    for row in rows:
        on_epoch(row)
    if torch.distributed.is_initialized():
        train.broadcast(task)
    head, unit = make_head(*task.head), task.head[1].get("unit", 1.0)
    start = time.perf_counter()  # what is worked out before the first step counts too
    for epochs in fit_members(task, len(rows), states):
        fitted = time.perf_counter()
        tables = [epoch.params[0] for epoch in epochs]
        members = [to_rows(task, table) for table in tables]
        predict = partial(predict_mean, members, head=head)
        errors = find_errors(predict, task.test, task.clip)
        loss = statistics.mean(epoch.train_loss for epoch in epochs)
        row = {"epoch": epochs[0].epoch, "train_loss": loss * unit**2}
        row |= errors | {"seconds": fitted - start}
        rows.append(row | {"evaluate_seconds": time.perf_counter() - fitted})
        if checkpoint is not None:
            states = [epoch.state for epoch in epochs]
            save_states(checkpoint, fingerprint, rows, states, arguments)
        on_epoch(rows[-1])
        start = time.perf_counter()
    return make_model(task, tables, rows)


def fit_members(task: Task, n_done: int = 0, states: list | None = None):
    """Train the members side by side; yields a list of their `train.Epoch`s, of one table each.

    Torch's threads go to members first, and what is left of them to the operations of each, which
    gain less: small batches nothing.
    """
    options, members = task.options, []
    common = {"batch_size": options["batch_size"], "drop_last": options["drop_last"]}
    n_steps = options["epochs"] * train.count_batches(len(task.train[0]), **common)
    pace, centers = schedule.one_cycle(n_steps, lr_max=options["lr_max"]), find_centers(task)
    for number in range(options["ensemble"]):
        params, parts = set_up_member(task, pace, centers, number)
        resume = states and (n_done, states[number])
        parts |= {"n_epochs": options["epochs"], "resume": resume, **common}
        members.append(train.fit(params, *task.train, **parts))
    n_threads = torch.get_num_threads()
    # Under torch.distributed all processes must go through the members in the same order.
    n_workers = 1 if torch.distributed.is_initialized() else min(n_threads, len(members))
    with ThreadPoolExecutor(n_workers) as pool:
        for _ in range(n_done, options["epochs"]):
            try:
                torch.set_num_threads(n_threads // n_workers)
                epochs = list((map if n_workers == 1 else pool.map)(next, members))
            finally:
                torch.set_num_threads(n_threads)
            yield epochs


def find_centers(task: Task) -> list[torch.Tensor | None]:
    """What the table decays towards: biases towards the averages; None for zero.

    Where rows have other features than the id, whose biases tell of the averages too when ratings
    are many, it is a share of them: t^2 / (1 + t^2) with the thinness t.
    """
    if not task.options["fits_data"] or "id" not in task.options["features"]:
        return [None]
    head = make_head(*task.head)
    outputs = () if head.n_outputs == 1 else (head.n_outputs,)
    shapes = [(n, *last) for last in ((task.options["n_factors"],), outputs) for n in task.sizes]
    zeros = model.Params(*map(torch.zeros, shapes))
    center = model.join(model.find_center(zeros, task.averages, head=head))
    share = 1.0 if task.features is None else 1 / (1 + find_thinness(task.train) ** -2)
    return [center * share]


def set_up_member(task: Task, pace, centers: list, number: int = 0) -> tuple[list, dict]:
    """The params of a model of the ensemble, and what a loop takes to train them at `pace`."""
    options, head = task.options, make_head(*task.head)
    # torch's generator takes 32 bits; this spreads the members over them, the first at the seed.
    seed = (task.figures["seed"] + number * 0x9E3779B1) % 2**32
    generator = torch.Generator().manual_seed(seed)
    shape = {"n_factors": options["n_factors"], "n_outputs": head.n_outputs}
    params = model.init_params(*task.sizes, **shape, std=options["std"], generator=generator)
    table, decay = model.join(params), options["weight_decay"]
    if options["bias_decay"] != decay:
        decay = torch.full(table.shape[1:], decay)
        decay[-head.n_outputs :] = options["bias_decay"]
    about = {"n_users": count_lines(options, task.ids) - len(task.ids.items), "head": head}
    loss_and_grad = partial(model.loss_and_grad, **about)
    if task.features is not None:
        loss_and_grad = partial(model.embedded_loss_and_grad, features=task.features, **about)
    if torch.distributed.is_initialized():
        loss_and_grad = train.share(loss_and_grad)
    if options["dropout"]:
        about = {"dropout": options["dropout"], "n_factors": options["n_factors"]}
        loss_and_grad = model.with_dropout(loss_and_grad, **about, generator=generator)
    optimizer = schedule.adamw(pace, weight_decay=[decay], centers=centers)
    parts = {"loss_and_grad": loss_and_grad, "optimizer": optimizer, "generator": generator}
    return [table], parts


def count_lines(options: dict, ids) -> int:
    """Rows of the table that features make: users, with the feature time its scales, and items."""
    return sum(map(len, ids)) + len(data.TIME_SCALES) * ("time" in options["features"])


def to_rows(task: Task | Model, table: torch.Tensor) -> model.Params:
    """The trained `table` with a row a user and a row an item, to predict with.

    Rows that training tells nothing of are average ones, and so is the one behind each side's.
    """
    if task.features is not None:
        starts, *entries = task.features[0]
        table = model.embed(table, (starts, *entries))
        for counts, first in zip(task.counts, (0, len(table) - len(task.counts[1])), strict=True):
            about = starts[first : first + len(counts) + 1], *entries
            rows = table[first : first + len(counts)]
            # Chosen on parts of ml-100k without a tenth of items, of users, or the last by date.
            ridge = (counts > 0).sum().item() / 100
            rows.copy_(model.regress_unrated(rows, about, counts, ridge=ridge))
    n_outputs = make_head(*task.head).n_outputs
    params = model.split_table(table, len(table) - len(task.ids.items), n_outputs=n_outputs)
    return model.add_average(params, *task.seen)


def predict_each(members: list, *pairs: torch.Tensor, head: model.Head) -> torch.Tensor:
    """The predictions of each member, along the first dimension."""
    return torch.stack([model.predict(params, *pairs, head=head) for params in members])


def predict_mean(members: list, *pairs: torch.Tensor, head: model.Head) -> torch.Tensor:
    """The mean of the members' predictions, of whom one at a time is held."""
    total = model.predict(members[0], *pairs, head=head)
    for params in members[1:]:
        total += model.predict(params, *pairs, head=head)
    return total.div_(len(members))


def find_lr(task: Task, *, n_steps: int = 200, lr_min: float = 1e-4, lr_max: float = 10.0) -> dict:
    """fastai's range test for a task: a dict of lrs, losses (smoothed), valley and steepest.

    One member of the ensemble takes up to `n_steps` steps at an lr that grows from `lr_min` to
    `lr_max`, until the loss has blown up; see `train.find_lr` and `schedule.suggest_lr`.
    """
    pace = schedule.exponential(n_steps, lr_min=lr_min, lr_max=lr_max)
    params, parts = set_up_member(task, pace, find_centers(task))
    parts |= {"n_steps": n_steps, "batch_size": min(task.options["batch_size"], len(task.train[0]))}
    losses = train.find_lr(params, *task.train, **parts).tolist()
    lrs = [pace(step).lr for step in range(len(losses))]
    suggested = schedule.suggest_lr(lrs, losses, n_steps=n_steps)
    return {"lrs": lrs, "losses": losses, **suggested._asdict()}


# Model file and checkpoint


ERRORS = ("mse", "rmse", "mae")


class Model(NamedTuple):
    """A trained model: what is in its file, and what answers need of it at hand."""

    about: dict  # plain values: head, clip, user_ids, item_ids, titles, figures
    tensors: dict  # by name, as in `TENSORS`
    head: tuple[str, dict]  # as of `Task`, and so are the next
    clip: tuple[float, float]
    options: dict
    figures: dict  # what `train --metrics` writes
    ids: data.Ids
    counts: tuple
    seen: tuple
    features: tuple | None  # the matrix alone, in a tuple
    titles: pl.Series  # by row of the items, the id where there is none
    members: list  # of each table `to_rows`

    def __repr__(self) -> str:
        """One line, for a notebook, in place of a hundred thousand ids."""
        text = "<Model: {recipe} on {dataset}, {split}; {n_users:,} users, {n_items:,} items"
        errors = f"; {format_errors(self.figures)}" if "mse" in self.figures else ""
        return text.format_map(self.figures) + errors + ">"


# The tensors of files by name: which have it; dtype; sizes, of which one letter is the same in all;
# and the size that integers are below. M members, R rows of K factors and Q biases (C), U users, I
# items, N training and T test ratings, E entries of a matrix of P rows, J scales of time, B bytes.
TENSORS = {
    "tables": ("model checkpoint", "float32", "MRC", None),  # as `model.join` makes them
    "seen_users": ("model", "bool", "U", None),
    "seen_items": ("model", "bool", "I", None),
    "train_users": ("model", "int32", "N", "U"),  # in order
    "train_items": ("model", "int32", "N", "I"),
    "tastes": ("model", "float32", "IL", None),  # L factors
    "test_users": ("test", "int64", "T", "U"),  # in order
    "test_items": ("test", "int64", "T", "I"),
    "test_ratings": ("test", "float32", "T", None),
    "feature_rows": ("features", "int64", "E", "P"),  # in order
    "feature_columns": ("features", "int64", "E", "R"),
    "feature_values": ("features", "float32", "E", None),
    "train_ratings": ("time", "float32", "N", None),
    "train_times": ("time", "int64", "N", None),
    "test_context": ("context", "float32", "TJ", None),
    "means": ("checkpoint", "float32", "MRC", None),  # Adam's
    "squares": ("checkpoint", "float32", "MRC", None),
    "generators": ("checkpoint", "uint8", "MB", None),
}
FORMATS = {"model": "collab 6", "checkpoint": "collab checkpoint 3"}


def find_forms(*files: str) -> dict:
    """The part of `TENSORS` that some files have: of each dtype, sizes and bound."""
    return {name: row[1:] for name, row in TENSORS.items() if set(row[0].split()) & set(files)}


def make_model(task: Task, tables: list[torch.Tensor], rows: list[dict]) -> Model:
    """The `Model` of the members' tables and of the figures of their epochs."""
    rows = [dict(row) for row in rows]
    figures = task.figures | {"epochs": rows} | choose(rows[-1], *ERRORS)
    figures["evaluate_seconds"] = sum(row.pop("evaluate_seconds") for row in rows)
    figures["fit_seconds"] = sum(row["seconds"] for row in rows)
    user_ids, item_ids = (raw_ids.to_list() for raw_ids in task.ids)
    about = {"head": task.head, "clip": task.clip, "titles": task.titles, "figures": figures}
    about |= {"user_ids": user_ids, "item_ids": item_ids}
    users, items, ratings, *_ = task.train
    columns = [users.int(), items.int(), *([] if task.times is None else [ratings, task.times])]
    columns = sort_by_user(columns)
    shape = {"n_users": len(user_ids), "n_items": len(item_ids)}
    tastes = model.find_tastes(*columns[:2], **shape, n_factors=N_TASTES)
    every = torch.stack(tables), *task.seen, *columns[:2], tastes
    tensors = dict(zip(find_forms("model"), every, strict=True))
    if task.features is not None:
        starts, *entries = task.features.matrix
        lines = torch.arange(len(starts) - 1).repeat_interleave(starts.diff())
        tensors |= zip(find_forms("features"), (lines, *entries), strict=True)
    tensors |= zip(find_forms("time"), columns[2:], strict=False)
    if len(task.test[0]):
        test = sort_by_user(task.test)
        tensors |= zip(find_forms("test", "context"), test, strict=False)
    return assemble(about, tensors)


def sort_by_user(columns):
    """Columns (N, ...), of which the first is of users, in order: as only a test file is not."""
    users = columns[0]
    if (users[1:] >= users[:-1]).all():
        return columns
    order = torch.argsort(users, stable=True)
    return [column[order] for column in columns]


def assemble(about: dict, tensors: dict) -> Model:
    """The `Model` of what is in a file."""
    tensors = {name: tensors[name] for name in TENSORS if name in tensors}
    ids = data.Ids(pl.Series(about["user_ids"]), pl.Series(about["item_ids"]))
    titles, figures, features = about["titles"], about["figures"], None
    titles = ids.items.cast(pl.String) if titles is None else pl.Series(titles)
    seen = tensors["seen_users"], tensors["seen_items"]
    if "feature_rows" in tensors:
        lines, *entries = (tensors[name] for name in find_forms("features"))
        counts = torch.bincount(lines, minlength=count_lines(figures["options"], ids))
        features = ((torch.cat([counts.new_zeros(1), counts.cumsum(0)]), *entries),)
    counts = count_ratings(ids, tensors["train_users"], tensors["train_items"])
    rest = figures["options"], figures, ids, counts, seen, features, titles, []
    trained = Model(about, tensors, about["head"], tuple(about["clip"]), *rest)
    return trained._replace(members=[to_rows(trained, table) for table in tensors["tables"]])


def save_model(path: str | Path, trained: Model) -> None:
    """Write a `Model` to a file. OSError names the file."""
    save(path, "model", trained.about, trained.tensors)


def load_model(path: str | Path) -> Model:
    """Read what `save_model` wrote. ValueError, naming the file, for anything else."""
    with refusing(path, "model"):
        return assemble(*load(path, "model"))


def check(kind: str, about: dict, tensors: dict) -> None:
    """ValueError for parts of a file that are not of their types, or do not fit each other."""
    if about["format"] != FORMATS[kind]:
        raise ValueError(f"format {about['format']!r}, not {FORMATS[kind]!r}: train it again")
    if kind == "checkpoint":
        return check_states(about, tensors)
    check_about(about)
    ids, options = (about["user_ids"], about["item_ids"]), about["figures"]["options"]
    sizes = {"U": len(ids[0]), "I": len(ids[1]), "J": len(data.TIME_SCALES)}
    sizes |= {"P": count_lines(options, ids), "Q": make_head(*about["head"]).n_outputs}
    kinds = set(options["features"])
    sizes |= {"R": sizes["P"]} if kinds == {"id"} else {}
    sizes["L"] = min(N_TASTES, sizes["U"], sizes["I"])
    files = {"model": True, "test": about["figures"]["n_test"] > 0, "features": kinds != {"id"}}
    files |= {"time": "time" in kinds, "context": files["test"] and "time" in kinds}
    check_tensors(tensors, find_forms(*(file for file in files if files[file])), sizes)
    if not tensors["seen_users"].any() or not tensors["seen_items"].any():
        raise ValueError("it has seen nothing")
    n_rows = len({"id", "implicit"} & kinds) * (sizes["U"] + sizes["I"])
    if tensors["tables"].shape[2] <= sizes["Q"] or tensors["tables"].shape[1] < n_rows:
        raise ValueError("its tables are too small")


def check_about(about: dict) -> None:
    """ValueError for plain values of a model that answers could not be made of."""
    ids, titles, figures = (about["user_ids"], about["item_ids"]), about["titles"], about["figures"]
    for raw_ids in ids:
        is_sorted = all(first < second for first, second in pairwise(raw_ids))
        if set(map(type, raw_ids)) not in ({int}, {str}) or not is_sorted:
            raise ValueError("its ids are not numbers or texts in order")
    if titles is not None and (len(titles) != len(ids[1]) or set(map(type, titles)) != {str}):
        raise ValueError("its titles are not texts, one for each item")
    (name, arguments), (low, high) = about["head"], about["clip"]
    numbers = low, high, *(arguments.values() if name == "bounded" else ())
    if set(map(type, numbers)) != {float} or not low < high or arguments.get("unit", 1) <= 0:
        raise ValueError("its range of ratings is none")
    if not set(figures["options"]["features"]) <= set(data.FEATURES):
        raise ValueError("a feature is unknown")
    if not figures["epochs"][-1]["train_loss"] > 0 or not figures["split"]:
        raise ValueError("it was not trained, or nobody knows on what")


def check_states(about: dict, tensors: dict) -> None:
    """`check` of a checkpoint."""
    rows, names = about["rows"], {"epoch", "train_loss", "seconds", "evaluate_seconds"}
    numbers = [each for row in rows for each in row.values()]
    is_whole = len(rows) > 0 and all(set(row) - {*ERRORS} == names for row in rows)
    is_whole &= set(about) == {"format", "arguments", "fingerprint", "rows"}
    if not is_whole or not {*map(type, numbers)} <= {int, float}:
        raise ValueError("the figures of its epochs are not whole")
    check_tensors(tensors, find_forms("checkpoint"), {})
    for generator in tensors["generators"]:
        torch.Generator().set_state(generator.clone())  # whose errors would come in the loop


def check_tensors(tensors: dict, forms: dict, sizes: dict) -> None:
    """ValueError for a tensor that is not of its form; `sizes` are by letter, as in `TENSORS`."""
    if set(tensors) != set(forms):
        raise ValueError(f"its tensors are not {', '.join(forms)}")
    sizes = dict(sizes)
    for name, (dtype, letters, _) in forms.items():
        tensor = tensors[name]
        form = tensor.dtype, tensor.layout, tensor.device.type, tensor.requires_grad
        is_own = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        if form != (getattr(torch, dtype), torch.strided, "cpu", False) or not is_own:
            raise ValueError(f"{name} is no plain tensor of {dtype}")
        for letter, size in zip(letters, tensor.shape, strict=True):
            if sizes.setdefault(letter, size) != size or size == 0:
                raise ValueError(f"{name} has {size}, not {sizes[letter]}, of {letter}")
    for name, (dtype, _, bound) in forms.items():
        tensor = tensors[name]
        if bound is not None and not 0 <= tensor.min() <= tensor.max() < sizes[bound]:
            raise ValueError(f"{name} has one that there is not")
        is_ordered = name in ("train_users", "test_users", "feature_rows")
        if is_ordered and (tensor[1:] < tensor[:-1]).any():
            raise ValueError(f"{name} is not in order")
        if dtype == "float32" and not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")


def check_numbers(value) -> None:
    """ValueError for a number beyond those of float32 anywhere in a value of JSON."""
    if isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            check_numbers(each)
    elif isinstance(value, int | float) and not abs(value) < LARGEST:
        raise ValueError(f"{value} is out of range")


def save(path: str | Path, kind: str, about: dict, tensors: dict) -> None:
    """Write plain values and tensors to a file, if it could be loaded."""
    text = json.dumps({"format": FORMATS[kind], **about}, allow_nan=False)
    tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    plain = json.loads(text)
    check_numbers(plain)
    check(kind, plain, tensors)
    file = io.BytesIO()
    torch.save({"about": text, **tensors}, file)
    data.write_file(path, file.getbuffer())


def load(path: str | Path, kind: str) -> tuple[dict, dict]:
    """The plain values and the tensors that `save` wrote. Code in the file is refused, not run."""
    with open(path, "rb") as file:  # OSError for a folder, or where there is none
        if not zipfile.is_zipfile(file):  # torch's older formats are plain pickles
            raise ValueError("no zip file")
        if any(member.compress_type for member in zipfile.ZipFile(file).infolist()):
            raise ValueError("it is compressed")
        n_bytes = 0
        for device in ("meta", "cpu"):  # first without numbers, for a tensor may claim any size
            if n_bytes > os.fstat(file.fileno()).st_size:
                raise ValueError("its tensors are larger than the file")
            file.seek(0)
            tensors = torch.load(file, weights_only=True, map_location=device)
            text = tensors.pop("about")
            n_bytes = sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
    about = json.loads(text)
    check_numbers(about)
    check(kind, about, tensors)
    return about, tensors


@contextmanager
def refusing(path: str | Path, what: str):
    """One line that names `path`, for whatever a file from elsewhere makes torch raise."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: {error.strerror or error}") from None
    except Exception as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, pickle.UnpicklingError):  # whose text advises to run what is in it
            why = "there is more in it than tensors and plain values"
        raise ValueError(f"{path}: not a {what} of this program: {why}") from None


def save_states(path, fingerprint: str, rows: list[dict], states: list, arguments) -> None:
    """Write what training goes on from: each member's state after the last of `rows`."""
    about = {"arguments": arguments or {}, "fingerprint": fingerprint, "rows": rows}
    columns = map(torch.stack, zip(*states, strict=True))
    save(path, "checkpoint", about, dict(zip(find_forms("checkpoint"), columns, strict=True)))


def load_states(path: str | Path, task: Task, fingerprint: str) -> tuple[list, list]:
    """The figures of the epochs done, and the state of each member after the last."""
    with refusing(path, "checkpoint"):
        about, tensors = load(path, "checkpoint")
    if (about["fingerprint"], len(tensors["tables"])) != (fingerprint, task.options["ensemble"]):
        raise ValueError(f"{path}: the data is not that which it was trained on")
    columns = (map(torch.clone, tensors[name]) for name in find_forms("checkpoint"))
    return about["rows"], list(zip(*columns, strict=True))


def find_fingerprint(task: Task) -> str:
    """SHA-256 of all that a training depends on: options, seed, ids, ratings, features."""
    about = task.options, task.figures["seed"], *(raw_ids.to_list() for raw_ids in task.ids)
    digest = hashlib.sha256(repr(about).encode())
    matrices = [tensor for matrix in task.features or () for tensor in matrix]
    for tensor in (*task.train, *task.test, *task.seen, *matrices):
        digest.update(tensor.numpy())
    return digest.hexdigest()


# Answers


def find_rows(trained: Model, name: str, raw, *, locate=None, allow_unknown=None) -> torch.Tensor:
    """Rows of raw ids of users or items, `name` being user or item: int64 (N,).

    ValueError for an unknown id, after `locate` of its place, if given; with `allow_unknown`, it
    gets the row behind the last, that of the average user or item.
    """
    raw_ids, raw = getattr(trained.ids, f"{name}s"), data.to_series(raw)
    rows = data.find_rows(raw_ids, raw)
    if rows.null_count() and not allow_unknown:
        place = rows.is_null().arg_max()
        where = f"{locate(place)}: " if locate else ""
        cure = "" if allow_unknown is None else ": --allow-unknown takes it as average"
        raise ValueError(f"{where}no {name} {str(raw[place])!r} in the model{cure}")
    return rows.fill_null(len(raw_ids)).cast(pl.Int64).to_torch()


def find_item(trained: Model, raw, *, allow_unknown: bool | None = None) -> int:
    """The row of an item, by its id or a part of its title that no other has.

    ValueError for what is neither, which with `allow_unknown` gets the row behind the last; for a
    part of several titles it lists them.
    """
    rows = data.find_rows(trained.ids.items, pl.Series([str(raw)])).drop_nulls().to_list()
    part, titles = str(raw).casefold().strip(), trained.about["titles"] or []
    if not rows and part and isinstance(raw, str):  # a number is never a part of a title
        rows = [row for row, title in enumerate(titles) if part in title.casefold()]
    if len(rows) == 1:
        return rows[0]
    if not rows and allow_unknown:
        return len(trained.ids.items)
    if not rows:
        titled = " and in no title" * (bool(titles) and isinstance(raw, str))
        cure = "" if allow_unknown is None else ": --allow-unknown takes it as average"
        raise ValueError(f"no item {str(raw)!r} in the model{titled}{cure}")
    counts = trained.counts[1].tolist()
    rows.sort(key=lambda row: -counts[row])
    listed = ", ".join(f"{trained.ids.items[row]} {titles[row]!r}" for row in rows[:10])
    more = f" and {len(rows) - 10} more" if len(rows) > 10 else ""
    raise ValueError(f"{str(raw)!r} is in {len(rows)} titles: {listed}{more}")


def find_items(trained: Model, raw: pl.Series) -> torch.Tensor:
    """`find_item` of each of `raw` (N,), int64 (N,): the ids at once, the rest by titles."""
    rows = data.find_rows(trained.ids.items, raw).to_list()
    pairs = zip(rows, raw, strict=True)
    return torch.tensor([find_item(trained, r) if n is None else n for n, r in pairs]).long()


def count_ratings(ids: data.Ids, users: torch.Tensor, items: torch.Tensor) -> tuple:
    """How many ratings each user and each item has, of those with these rows (N,)."""
    pairs = zip((users, items), ids, strict=True)
    return tuple(torch.bincount(rows, minlength=len(raw_ids)) for rows, raw_ids in pairs)


def describe_items(trained: Model, rows: torch.Tensor, **columns: torch.Tensor):
    """A frame of item and title of rows of items (N,), and of other columns (N,)."""
    frame = to_frame(("row", *columns), rows, *columns.values())
    items = trained.ids.items.gather(frame["row"]).alias("item")
    titles = trained.titles.gather(frame["row"]).alias("title")
    return frame.select(items, titles, pl.exclude("row"))


def to_frame(names, *columns: torch.Tensor) -> pl.DataFrame:
    """Tensors (N,) as a frame."""
    pairs = zip(names, columns, strict=False)
    return pl.DataFrame({name: column.numpy() for name, column in pairs})


NAMES = ("user", "item", "rating", "timestamp")


def find_history(trained: Model) -> pl.DataFrame:
    """The training part by rows: user, item; with the feature time also rating, timestamp."""
    users, items, *rest = (t for n, t in trained.tensors.items() if n.startswith("train"))
    return to_frame(NAMES, users.long(), items.long(), *rest)


def find_pairs(trained: Model, pairs: pl.DataFrame, **options) -> tuple:
    """`find_rows` of the users and of the items of a frame of raw ids."""
    return tuple(find_rows(trained, name, pairs[name], **options) for name in ("user", "item"))


def find_columns(trained: Model, pairs: pl.DataFrame, time=None, **options) -> tuple:
    """Rows of users and items of a frame of raw ids, and their context, as of `find_context`.

    `options` are those of `find_rows`; `time` takes the place of timestamps.
    """
    rows = find_pairs(trained, pairs, **options)
    is_timed = "time" in trained.options["features"] and "timestamp" in pairs.columns
    if is_timed and time is None:
        time = data.floor_times(pairs)["timestamp"].to_torch()
    return *rows, *find_context(trained, rows[0], time)


def find_context(trained: Model, users: torch.Tensor, time=None) -> tuple:
    """The context of users of rows (N,), (N, J), with the feature time; nothing without it.

    At `time`, Unix seconds for all or int64 (N,), or the moment after each's last training rating.
    """
    if "time" not in trained.options["features"]:
        if time is not None:
            raise ValueError("a model without the feature time predicts the same at any time")
        return ()
    excess = data.find_excess(find_history(trained))
    excess = excess.join(to_frame(NAMES, users), "user", "semi")
    return data.time_context(excess, list_times(excess, users, time))[1:]


def list_times(rated: pl.DataFrame, users: torch.Tensor, time=None) -> pl.DataFrame:
    """A frame of user and timestamp: each of `users` (N,) at `time`, or after the last `rated`."""
    if time is not None:
        try:
            times = torch.as_tensor(time, dtype=torch.float64).floor().long()
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"a time is in Unix seconds, not {time!r}") from None
        return to_frame(("user", "timestamp"), users, times.expand(len(users)))
    last = rated.group_by("user").agg(pl.col("timestamp").max() + 1)
    return to_frame(NAMES, users).join(last, "user", "left", maintain_order="left").fill_null(0)


def find_answers(trained: Model, members: list, *columns: torch.Tensor) -> dict:
    """rating, the mean of the members' predictions of pairs (N,), and deviation, theirs, (N,)."""
    each = predict_each(members, *columns, head=make_head(*trained.head))
    mean = each.mean(0)
    deviation = (each - mean).square().mean(0).sqrt()
    return {"rating": mean.clamp(*trained.clip), "deviation": deviation}


def predict(trained: Model, pairs: pl.DataFrame, **options) -> pl.DataFrame:
    """A frame of user, item, rating, deviation for a frame of user, item[, timestamp], raw ids.

    With the feature time a pair is asked about at `time`, Unix seconds, if given, else at its
    timestamp, else at the moment after the user's last training rating. The deviation is that of
    the ensemble's members, 0 for a single one. ValueError for an unknown id; with the option
    `allow_unknown=True` it is predicted as the average one, and is_known tells which are not.
    """
    pairs = data.to_lazy(pairs).collect()
    columns = find_columns(trained, pairs, **options)
    answers = find_answers(trained, trained.members, *columns)
    found = pairs.select("user", "item").hstack(to_frame(answers, *answers.values()))
    if options.get("allow_unknown"):
        is_known = (columns[0] < len(trained.ids.users)) & (columns[1] < len(trained.ids.items))
        found = found.with_columns(is_known=pl.Series(is_known.numpy()))
    return found


def find_test(trained: Model) -> list[torch.Tensor]:
    """The test part: users, items, ratings and, with the feature time, context."""
    if not trained.figures["n_test"]:
        raise ValueError("the model has no test part: give others by --ratings")
    return [tensor for name, tensor in trained.tensors.items() if name.startswith("test")]


def evaluate(trained: Model, ratings=None, *, allow_unknown=False, allow_overlap=False) -> dict:
    """Errors on a frame of ratings, on the test part of the training unless given: a dict.

    It has n_test, mse, rmse, mae. ValueError for an unknown id, which with `allow_unknown` is
    predicted as the average one, and, unless `allow_overlap`, for a pair of the training part.
    """
    if ratings is None:
        columns = find_test(trained)
    else:
        ratings = data.to_lazy(ratings).collect()
        users, items, *context = find_columns(trained, ratings, allow_unknown=allow_unknown)
        columns = users, items, ratings["rating"].to_torch(), *context
        pairs = to_frame(NAMES, users, items).with_row_index()
        shared = pairs.join(find_history(trained), ["user", "item"], "semi")
        if len(shared) and not allow_overlap:
            pair = ratings.select("user", "item").row(shared["index"].min())
            where = f"{len(shared)} of the (user, item) pairs are in the model's training part"
            raise ValueError(f"{where}, the first is {pair}: --allow-overlap takes them too")
    predict = partial(predict_mean, trained.members, head=make_head(*trained.head))
    errors = train.evaluate(predict, *columns, clip=trained.clip)
    return {"n_test": len(columns[0]), **errors._asdict()}


def rank(
    trained: Model, ratings=None, *, k: int = 10, min_rating: float | None = None, by="taste"
) -> dict:
    """How well the first `k` of each user's list, as of `recommend`, hit: as `train.rank`, a dict.

    Its `popular` has the same figures of a list of the most rated items. Relevant are the items
    that a user rated at least `min_rating` in `ratings`, a frame of raw ids, the test part unless
    given, and not in training. Unknown users and items are left out. ValueError for a `k` above the
    number of items, and where nothing is relevant.
    """
    n_users, n_items = map(len, trained.ids)
    if not 1 <= k <= n_items:
        raise ValueError(f"k must be from 1 to the {n_items} items, not {k}")
    if ratings is None:
        columns = find_test(trained)[:3]
    else:
        columns = *find_pairs(trained, ratings, allow_unknown=True), ratings["rating"].to_torch()
    least = -math.inf if min_rating is None else min_rating
    is_known = (pl.col("user") < n_users) & (pl.col("item") < n_items)
    pairs = to_frame(NAMES, *columns).filter(is_known, pl.col("rating") >= least)
    pairs = pairs.select("user", "item").unique()
    pairs = pairs.join(find_history(trained), ["user", "item"], "anti")
    if not len(pairs):
        raise ValueError("no such rating by a known user of a known item to look for")
    users = pairs["user"].unique().sort().to_torch()
    columns, about = (users, *find_context(trained, users)), {"n": k, "hidden": ("train",)}
    lists = (list_rows(trained, *columns, by=by, **about) for by in (by, "popular"))
    figures, popular = (train.rank(each, pairs, k=k) for each in lists)
    return figures | {"popular": popular}


def recommend(
    trained: Model,
    users=None,
    *,
    rated=None,
    n: int = 10,
    by: str = "taste",
    include_seen: bool = False,
    candidates=None,
    min_ratings: int = 0,
    time: int | None = None,
) -> pl.DataFrame:
    """The `n` items that a user will pick and like: a frame of user, rank, item, title, rating.

    `users` is a raw id, or several, of any library. Without the column user, it is for one who
    gave the ratings `rated`, a frame of item, rating[, timestamp]. In the order of `list_top`, or
    `by` "rating" of the predicted rating alone. Left out are items that a user has rated, in the
    training or the test part or there, unless `include_seen`, those not among the raw ids
    `candidates`, if given, or with fewer than `min_ratings` training ratings, and those of which
    nothing is known. With the feature time the ratings are those at `time`, Unix seconds, or at the
    moment after the user's last training rating. ValueError for what the model does not know.
    """
    if (users is None) == (rated is None) or n < 1:
        raise ValueError(f"give a user or what one has rated, not both, and n above 0, not {n}")
    if by not in ("taste", "rating"):
        raise ValueError(f"a list goes by taste or rating, not {by!r}")
    allowed = trained.seen[1] & (trained.counts[1] >= min_ratings)
    if candidates is not None:
        rows = find_rows(trained, "item", candidates, allow_unknown=True)
        if (rows == len(allowed)).all():
            raise ValueError("no candidate is an item of the model")
        allowed = allowed & (torch.bincount(rows, minlength=len(allowed) + 1) > 0)[:-1]
    about = {"n": n, "by": by, "allowed": allowed}
    if rated is None:
        rows = find_rows(trained, "user", [users] if np.ndim(users) == 0 else users)
        columns = rows, *find_context(trained, rows, time)
        top = list_rows(
            trained, *columns, hidden=() if include_seen else ("train", "test"), **about
        )
    else:
        items, *columns = to_rated(trained, data.to_lazy(rated).collect())
        members = fold_in(trained, items, *columns, time=time)
        top = list_top(trained, members, [items], [items[: 0 if include_seen else None]], **about)
    items, ratings = top["item"].to_torch(), top["rating"].clip(*trained.clip).to_torch()
    found = describe_items(trained, items, rating=ratings).with_columns(top["rank"])
    user = [] if rated is not None else [trained.ids.users.gather(top["user"]).alias("user")]
    return found.select(*user, "rank", "item", "title", "rating")


def find_rated(trained: Model, users: torch.Tensor, *parts: str) -> list[torch.Tensor]:
    """The rows of the items that each user (B,) has rated in these parts, of train and test."""
    rated = [users[:0]] * len(users)
    for part in (part for part in parts if f"{part}_users" in trained.tensors):
        column, items = (trained.tensors[f"{part}_{name}"] for name in ("users", "items"))
        asked = users.to(column.dtype)
        ends = (torch.searchsorted(column, asked, right=right).tolist() for right in (False, True))
        rated = [torch.cat([own, items[a:b]]) for own, a, b in zip(rated, *ends, strict=True)]
    return rated


def list_rows(trained: Model, *columns: torch.Tensor, hidden: tuple, **about) -> pl.DataFrame:
    """`list_top` of the model's users, without what they rated in parts `hidden`.

    `columns` are rows of users (B,) and, with the feature time, their context (B, J).
    """
    n_items, n_outputs = len(trained.ids.items), make_head(*trained.head).n_outputs
    n_kept = count_kept(about["n"], about["by"], n_items)
    n_scores = n_items * (n_outputs if about["by"] == "rating" else 1)
    n_floats = n_scores + n_kept * (find_factors(trained)[0].shape[1] + n_outputs)
    blocks, lists = (column.split(max(SCORES_AT_ONCE // n_floats, 1)) for column in columns), []
    for block in zip(*blocks, strict=True):
        members = [model.take_users(rows, *block) for rows in trained.members]
        rated = (find_rated(trained, block[0], *parts) for parts in (("train",), hidden))
        top = list_top(trained, members, *rated, **about)
        lists.append(top.with_columns(user=pl.Series(block[0].numpy()).gather(top["user"])))
    return pl.concat(lists)


def count_kept(n: int, by: str, n_items: int) -> int:
    """Of how many items of the highest score the rating is predicted, for a list of `n`."""
    return min(max(20 * n, 200) if by == "taste" else n, n_items)


def list_top(
    trained: Model, members: list, rated: list, hidden: list, *, n, by, allowed=None
) -> pl.DataFrame:
    """The first `n` items for each user: a frame of user, rank, item, predicted rating, all rows.

    Users are those of the `members`' tables; `rated` and `hidden` have the rows of the items that
    each has rated, and that are left out. `by` taste the order is that of `model.score_tastes`
    plus 0.4 of the place of the predicted rating in the scale, from 0 to 1, which is worked out for
    the `count_kept` items of the highest taste; by rating, or popular, it is of that alone.
    """
    n_items, counts, head = len(trained.ids.items), trained.counts[1], make_head(*trained.head)
    check_names("by", (by,), ("taste", "rating", "popular"))
    users = torch.arange(len(rated)).unsqueeze(1)
    if by == "rating":
        scores = predict_mean(members, users, torch.arange(n_items), head=head)
    elif by == "taste":
        scores = model.score_tastes(trained.tensors["tastes"], rated, counts)
    else:
        scores = counts.float().repeat(len(rated), 1)
    allowed = trained.seen[1] if allowed is None else allowed
    scores += torch.zeros(n_items).masked_fill(~allowed, -math.inf)
    for own, items in zip(scores, hidden, strict=True):
        own[items] = -math.inf
    scores, items = scores.topk(count_kept(n, by, n_items))
    ratings = predict_mean(members, users, items, head=head)
    if by == "taste":
        low, high = trained.clip
        scores = scores + RATING_WEIGHT * ratings / (high - low)
    scores, order = scores.topk(min(n, n_items))
    items, ratings = items.gather(1, order), ratings.gather(1, order)
    ranks = torch.arange(1, items.shape[1] + 1).repeat(len(users))
    columns = users.expand_as(items).reshape(-1), ranks, items.reshape(-1)
    columns = *columns, ratings.reshape(-1), scores.reshape(-1)
    top = to_frame(("user", "rank", "item", "rating", "score"), *columns)
    return top.filter(pl.col("score") > -math.inf).drop("score")


def to_rated(trained: Model, rated: pl.DataFrame) -> tuple:
    """Rows (N,) of the items rated, ratings (N,) and, if there are, timestamps (N,).

    Of several ratings of one item the latest counts, of one time or without times the last.
    """
    low, high = map(np.float32, trained.clip)
    rated = data.floor_times(rated).cast({"rating": pl.Float32})
    rows = find_items(trained, rated["item"])
    wrong = rated.filter(~pl.col("rating").is_between(low, high).fill_null(False))
    if len(wrong):
        item, rating = wrong.select("item", pl.col("rating").fill_null(math.nan)).row(0)
        raise ValueError(f"rating {rating:g} of item {item!r} is not within {low:g} to {high:g}")
    rated = rated.with_columns(pl.Series("item", rows.numpy()), user=0)
    rated = data.drop_repeats(rated)
    columns = [rated[name].to_torch() for name in NAMES[1:] if name in rated.columns]
    return columns[0], columns[1].float(), *columns[2:]


def fold_in(
    trained: Model, items, ratings, times=None, *, time=None, width: float = PRIOR_WIDTH
) -> list:
    """Tables as `Model.members` with one user: who gave `ratings` (N,) to the items of rows (N,).

    By `model.add_user`; `width` is that of `model.find_prior`. Where the model has implicit
    features, the items rated tell of the user through these too. With the feature time and `times`
    (N,) of the ratings it is the user at the moment after the last of them, or at `time`, Unix
    seconds; of a tensor of these (B,) each makes a row.
    """
    kinds, (n_users, n_items) = trained.options["features"], map(len, trained.ids)
    about = {"head": make_head(*trained.head), "noise": 1.0}
    users = trained.tensors["train_users"].unique().long()
    if "unit" in trained.head[1]:  # the squared error has no scale of its own, as ordinal has
        loss = trained.figures["epochs"][-1]["train_loss"]
        about["noise"] = 2 * loss / trained.head[1]["unit"] ** 2
    new, contexts = torch.zeros(1).long(), ()
    if time is not None and ("time" not in kinds or times is None):
        raise ValueError("a time needs a model of the feature time, and times of what is rated")
    if "time" in kinds and times is not None and len(items):
        user = torch.full_like(items, n_users)
        history = find_history(trained).vstack(to_frame(NAMES, user, items, ratings, times))
        own = data.find_excess(history)[-len(items) :]
        new = new.new_zeros(1 if time is None else torch.as_tensor(time).numel())
        about["context"], *contexts = data.time_context(own, list_times(own, new + n_users, time))
    parts = [None] * len(trained.members)
    if "implicit" in kinds:
        first = n_users if "id" in kinds else 0
        starts, columns, values = trained.features[0]
        values = values * ((columns >= first) & (columns < first + n_items))
        tables = trained.tensors["tables"]
        of_all = (model.embed(table, (starts, columns, values))[:n_users] for table in tables)
        of_new = tables[:, first + items].double().sum(1) / max(len(items), 1) ** 0.5
        parts = zip(of_all, of_new, strict=True)
    folded = []
    for rows, implicit in zip(trained.members, parts, strict=True):
        prior = model.find_prior(rows, users, width=width, implicit=implicit)
        added = model.add_user(rows, items, ratings, prior=prior, **about)
        folded.append(model.take_users(added, new, *contexts))
    return folded


def find_similar(trained: Model, raw, *, n: int = 10, side: str = "item") -> pl.DataFrame:
    """The `n` items, or users, most like one: item, title or user; similarity, n_ratings.

    By the cosine of their factors, of rating and not of picking, times r / (r + 30) for r training
    ratings: what hardly anybody has rated is like anything. A user is given by the raw id, an item
    as to `find_item`. Without training ratings there is none.
    """
    is_item = side == "item"
    row = find_item(trained, raw) if is_item else find_rows(trained, "user", [raw]).item()
    counts, ids = trained.counts[is_item], trained.ids[is_item]
    if not trained.seen[is_item][row]:
        raise ValueError(f"nothing is known of {side} {ids[row]!r}: no training ratings")
    cosines = model.find_similar(find_factors(trained, side), row) * counts / (counts + FEW)
    cosines[counts == 0] = cosines[row] = -math.inf
    values, rows = cosines.topk(min(n, len(cosines)))
    values, rows = values[values > -math.inf], rows[values > -math.inf]
    about = {"similarity": values, "n_ratings": counts[rows]}
    if is_item:
        return describe_items(trained, rows, **about)
    return to_frame(about, *about.values()).select(ids.gather(rows.numpy()).alias("user"), pl.all())


def find_factors(trained: Model, side: str = "item") -> list[torch.Tensor]:
    """The items' or the users' factors of each member, (n, K)."""
    n_rows = len(trained.ids[side == "item"])
    return [rows[side == "item"][:n_rows] for rows in trained.members]


def interpret(trained: Model) -> pl.DataFrame:
    """The items from the most to the least liked, whoever rates: item, title, rating, n_ratings.

    By `model.find_likings`. Items without training ratings are left out.
    """
    n_users, n_items = map(len, trained.ids)
    likings = model.find_likings(trained.members, n_users, head=make_head(*trained.head))[:n_items]
    counts = trained.counts[1]
    rows = likings.argsort(descending=True, stable=True)
    rows = rows[counts[rows] > 0]
    return describe_items(trained, rows, rating=likings[rows], n_ratings=counts[rows])


def export(trained: Model) -> dict:
    """Factors and biases with their ids, as numpy arrays by name: what `export` writes.

    M members of the ensemble, K factors, Q biases a row (`model.Head`): user_ids (U,), item_ids
    (I,), user_factors (M, U, K), item_factors (M, I, K), user_bias (M, U[, Q]), item_bias. With
    z = user_factors @ item_factors + user_bias + item_bias, a rating is the members' mean of the
    head's prediction: of the head bounded, low + (high - low) sigmoid(z + z0), where z0 makes that
    the mean of the training at z = 0.
    """
    arrays = {f"{name[:-1]}_ids": ids.to_numpy() for name, ids in trained.ids._asdict().items()}
    for name in model.Params._fields:
        n_rows = len(arrays[f"{name.split('_')[0]}_ids"])
        arrays[name] = torch.stack([rows._asdict()[name][:n_rows] for rows in trained.members])
        arrays[name] = arrays[name].numpy()
    return arrays


def export_frame(trained: Model) -> pl.DataFrame:
    """`export` as a table: side (user or item), id, member, factors and bias, a row each."""
    arrays, frames = export(trained), []
    for side in ("user", "item"):
        ids = trained.ids._asdict()[f"{side}s"].cast(pl.String).alias("id").to_frame()
        for member in range(len(trained.members)):
            columns = {n: pl.Series(arrays[f"{side}_{n}"][member]) for n in ("factors", "bias")}
            kind = pl.lit(side).alias("side"), "id", pl.lit(member).alias("member")
            frames.append(ids.select(*kind).with_columns(**columns))
    return pl.concat(frames)


# Pictures


def start_figure(n_columns: int = 1, *, width: float = 8.0, height: float = 4.8) -> tuple:
    """A matplotlib figure with empty axes side by side. ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # no pyplot: no window, nothing global
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from None

    class Picture(Figure):
        def _repr_png_(self) -> bytes:  # shown by a notebook
            file = io.BytesIO()
            self.savefig(file, format="png")
            return file.getvalue()

    figure = Picture(figsize=(width, height), layout="constrained", dpi=150)
    axes = figure.subplots(1, n_columns, squeeze=False)[0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def write_picture(path: Path, figure) -> None:
    """Write a matplotlib figure to a .png or .svg file."""
    with data.replacing(path) as beside, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that the font lacks
        figure.savefig(beside, format=path.suffix[1:].lower())


def plot_runs(runs: list[tuple[str, dict]]):
    """Learning curves, lr and momentum of trainings: pairs of a name and what --metrics wrote.

    The schedule is over the share of the training, for runs of different length.
    """
    figure, (errors, losses, lrs) = start_figure(3, width=14.0, height=4.4)
    momenta, shares = lrs.twinx(), [step / 10 for step in range(1001)]
    for number, (name, run) in enumerate(runs):
        style = {"color": f"C{number % 10}", "label": f" {shorten(name)}"}
        epochs = [row["epoch"] for row in run["epochs"]]
        errors.plot(epochs, [row.get("mse", math.nan) for row in run["epochs"]], "o-", **style)
        losses.plot(epochs, [row["train_loss"] for row in run["epochs"]], "o-", **style)
        paces = list(map(schedule.one_cycle(1000, lr_max=run["options"]["lr_max"]), range(1001)))
        lrs.plot(shares, [pace.lr for pace in paces], **style)
        momenta.plot(shares, [pace.momentum for pace in paces], ":", **style)
    errors.set(xlabel="epoch", ylabel="test MSE", title="Error on the test part")
    losses.set(xlabel="epoch", ylabel="loss", title="Loss in training")
    lrs.set(xlabel="% of the training", ylabel="learning rate (solid)", title="Schedule")
    momenta.set_ylabel("momentum (dotted)")
    for axes in (errors, losses):
        axes.xaxis.get_major_locator().set_params(integer=True)
    errors.legend(frameon=False, fontsize="small")
    return figure


def plot_lr(found: dict):
    """The curve of `find_lr`, with both suggestions."""
    figure, (axes,) = start_figure()
    axes.plot(found["lrs"], found["losses"], color="C0")
    for name, color in (("valley", "C1"), ("steepest", "C2")):
        loss = found["losses"][found["lrs"].index(found[name])]
        axes.plot(found[name], loss, "o", color=color, label=f"{name} {found[name]:.2g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="smoothed loss")
    axes.set_title("Learning-rate range test")
    axes.legend(frameon=False)
    return figure


def plot_map(trained: Model, *, n_items: int = 2_000, n_labels: int = 60):
    """Items by their first two principal components, the most rated ones labelled.

    The area of a dot goes with the item's ratings. A label that would cover another is left out.
    """
    counts = trained.counts[1]
    rows = counts.argsort(descending=True, stable=True)[:n_items]
    rows = rows[counts[rows] > 0]
    places, shares = model.find_components(find_factors(trained))
    figure, (axes,) = start_figure(width=12.0, height=9.0)
    sizes = 60 * (counts[rows] / counts.max()).numpy() + 2
    axes.scatter(*places[rows].T.numpy(), s=sizes, color="C0", alpha=0.35, linewidths=0)
    labels = [f"{share:.0%} of the variance of the items' factors" for share in shares.tolist()]
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.set_title(f"The {len(rows):,} most rated items; what is near is rated alike")
    axes.margins(0.06)
    rows = rows[:n_labels]
    titles = [shorten(title) for title in describe_items(trained, rows)["title"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that the font lacks
        place_labels(figure, axes, places[rows].tolist(), titles)
    return figure


def shorten(text: str, longest: int = 34) -> str:
    """A text for a label: cut with an ellipsis, and never read as a formula."""
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return text.encode(errors="replace").decode().replace("$", r"\$")


def place_labels(figure, axes, places: list, texts: list[str]) -> None:
    """Write each text beside its place where it covers none before it, else nowhere."""
    figure.draw_without_rendering()  # the axes have their place only then
    figure.set_layout_engine("none")
    taken, frame = [], axes.get_window_extent()
    for place, text in zip(places, texts, strict=True):
        for x, y in ((4, 3), (-4, 3), (4, -9), (-4, -9)):  # in points
            offset = {"xytext": (x, y), "textcoords": "offset points", "fontsize": 7}
            label = axes.annotate(text, place, ha="left" if x > 0 else "right", **offset)
            box = label.get_window_extent().expanded(1.02, 1.1)
            is_inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
            if is_inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()


# Options


def to_names(text) -> tuple[str, ...]:
    """Names between commas, or those of a list."""
    return tuple(text.split(",") if isinstance(text, str) else text)


def to_seconds(text: str) -> int:
    """Unix seconds of their number, or of a date of ISO 8601, of UTC unless it tells another."""
    try:
        when = datetime.fromtimestamp(int(text), UTC) if text.isdecimal() else None
        when = when or datetime.fromisoformat(text)
    except (ValueError, OverflowError, OSError):
        ways = "a date, as 2026-01-31 or 2026-01-31T18:30, or of Unix seconds"
        raise click.BadParameter(f"{text!r} is not the time of {ways}.") from None
    return int((when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp())


FILE, COUNT = click.Path(path_type=Path), click.IntRange(1, 10**6)
POSITIVE, SHARE = click.FloatRange(0, LARGEST, min_open=True), click.FloatRange(0, 1, max_open=True)
PART = click.FloatRange(0, 1, min_open=True, max_open=True)
DECAY, NUMBER = click.FloatRange(0, LARGEST), click.FloatRange(-1e38, 1e38)
INTERVAL, RATE = click.Tuple([NUMBER, NUMBER]), click.Tuple([str, NUMBER])
# By group, as in --help, and by name: type, help, and default if there is one. bool is a flag.
# fmt: off
OPTIONS = {
    "Data": {
        "dataset": (str, "A MovieLens: ml-100k, the default, ml-1m, ml-latest-small ..."),
        "ratings": (FILE, "Instead: a table of user, item, rating[, time], or a MovieLens."),
        "users": (FILE, "A table of users: what is known of them; those to list for."),
        "items": (FILE, "The same for items; titles are shown."),
        "user-column": (str, "The user column's name in the files' headers, or its number from 1."),
        "item-column": (str, "The item column's."),
        "rating-column": (str, "The rating column's."),
        "time-column": (str, "The time column's."),
        "title-column": (str, "The titles', of --items."),
        "encoding": (str, "Of the files, where it is not UTF-8: latin-1, cp1252 ..."),
        "skip-bad": (bool, "Leave out lines that can't be read, and count them."),
        "rating-range": (INTERVAL, "Of the scale; a rating outside can't be read."),
        "data-dir": (FILE, "Folder of the data.  [default: the user's cache]"),
    },
    "Split": {
        "split": (str, "ua, ub, u1 to u5 (ml-100k only), random, last10 ..., by-date, none."),
        "test": (FILE, "Test on the ratings of this file; no split."),
        "allow-overlap": (bool, "Pairs of the training part may be tested on."),
        "holdout": (PART, "Test on this share of the training part: the test part is not read"),
    },
    "Training": {
        "recipe": (click.Choice([*RECIPES]), "Defaults for the next group.", "default"),
        "seed": (click.IntRange(0, 2**32 - 1), "The same gives the same model.", 0),
        "threads": (click.IntRange(1, os.cpu_count()), "Of torch; members train side by side.", 1),
    },
    "Recipe": {
        "features": (to_names, "Of a row: id,implicit,side,time, or some."),
        "loss": (click.Choice(["mse", "ordinal"]), "What is differentiated."),
        "y-range": (INTERVAL, "Bounds of the sigmoid that makes a prediction (loss mse)."),
        "n-factors": (click.IntRange(1, 2**16), "Latent size."),
        "dropout": (SHARE, "Share of products of factors left out."),
        "ensemble": (click.IntRange(1, 1000), "Models to average."),
        "epochs": (COUNT, "Passes over the training part."),
        "batch-size": (click.IntRange(1, 2**31), "Ratings a step."),
        "drop-last/--keep-last": (bool, "Leave out an incomplete last batch, or not.", None),
        "lr-max": (POSITIVE, "Step size at the peak."),
        "weight-decay": (DECAY, "Decoupled: a step takes this times lr off each factor."),
        "bias-decay": (DECAY, "The same for the biases."),
    },
    "Output": {
        "metrics": (FILE, "Write the figures here, as JSON."),
        "save": (FILE, "Write the model to this file."),
        "checkpoint": (FILE, "Write to this file, after each epoch, its state."),
        "resume": (FILE, "Go on from this checkpoint, and keep it up unless --checkpoint."),
    },
    "Options": {
        "splits": (to_names, "Published ones, to test on in turn.  [ml-100k: u1,u2,u3,u4,u5]"),
        "folds": (click.IntRange(2), "Cut the ratings at random into this many.  [other data: 5]"),
        "by-date": (COUNT, "Test on this many parts by time, each after all before it."),
        "user": (str, "Its id; recommend takes more than one."),
        "item": (str, "Its id, or a part of its title that no other has."),
        "pairs": (FILE, "Instead: a table of user, item[, time], of any length."),
        "rated": (str, "Instead: a new user's ratings, ITEM:RATING,... or a file of them."),
        "rate": (RATE, "The same, one by one: an item, as --item, and its rating."),
        "time": (to_seconds, "When, as 2026-01-31T18:30.  [default: after the last rating]"),
        "all-users": (bool, "Instead: for every user."),
        "output": (FILE, "Write to this file, whose ending tells the form."),
        "plot": (FILE, "Draw the curve to this .png or .svg."),
        "n": (COUNT, "How many.", 10),
        "by": (click.Choice(["taste", "rating"]), "What the user picks, or only likes.", "taste"),
        "include-seen": (bool, "Items that the user has rated, too."),
        "candidates": (FILE, "A table of the items to choose among."),
        "min-ratings": (click.IntRange(0, 10**9), "Leave out items with fewer.", 0),
        "ranking": (bool, "How well the first of each user's list hit, too."),
        "k": (COUNT, "Length of the lists for --ranking.", 10),
        "min-rating": (NUMBER, "The least rating that is a hit.  [default: any]"),
        "allow-unknown": (bool, "Unknown users and items count as average ones."),
        "json": (bool, "Print JSON."),
    },
}
# fmt: on
COLUMNS = {each: each for each in ("user", "item", "rating", "title")} | {"time": "timestamp"}
READING = ("user-column", "item-column", "rating-column", "time-column", "encoding", "skip-bad")
WHOM, RANKING = ("rated", "rate...", "all-users"), ("ranking", "k", "min-rating", "by")
LISTS = ("n", "time", "by", "include-seen", "candidates", "min-ratings")
ALLOWED = ("allow-unknown", "allow-overlap")
PICTURES, TABLES = (".png", ".svg"), (".csv", ".tsv", ".parquet")
TASK = ("recipe", "seed", "split", "holdout", "allow_overlap", *DEFAULT)  # what `prepare` takes
NOT_KEPT = {"resume", "checkpoint", "save", "metrics", "threads"}  # in a checkpoint


class Command(click.Command):
    """A command whose --help shows its options by the groups of `OPTIONS`."""

    def format_options(self, context, formatter):
        options = [each for each in self.get_params(context) if isinstance(each, click.Option)]
        for title in OPTIONS:
            shown = [each for each in options if getattr(each, "group", "Options") == title]
            if shown:
                with formatter.section(title):
                    formatter.write_dl([each.get_help_record(context) for each in shown])


def command(name: str, *options: str, required: str | None = None):
    """A decorator: a command of the program with these options, or all of a group, of `OPTIONS`.

    "MODEL" among them is the argument `path`; one with ... behind it may be given several times.
    """

    def decorate(function):
        if "MODEL" in options:
            function = click.argument("path", metavar="MODEL", type=FILE)(function)
        for title, rows in reversed(OPTIONS.items()):
            for each, (kind, text, *default) in reversed(rows.items()):
                is_many = f"{each}..." in options
                if each in options or title in options or is_many:
                    flag = f"-{each}" if len(each) == 1 else f"--{each}"
                    rest = {"is_flag": True} if kind is bool else {"type": kind}
                    rest |= {"default": default[0], "show_default": True} if default else {}
                    rest |= {"callback": check_value}
                    rest |= {"multiple": True} if is_many else {}
                    rest |= {"required": each == required, "expose_value": each != "json"}
                    function = click.option(flag, help=text, **rest)(function)
                    function.__click_params__[-1].group = title
        return cli.command(name, cls=Command)(function)

    return decorate


def check_value(context, option, value):
    """A value that is no nan, which click's ranges let pass, nor an empty interval."""
    is_interval = isinstance(value, tuple) and {float} == {*map(type, value)}
    if value != value or (is_interval and not value[0] < value[1]):
        raise click.BadParameter(f"{value} is not a number, or an interval from low to high.")
    if option is not None:
        context.meta[option.name] = value  # of json, for `show`
    return value


# Commands


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def cli():
    """Collaborative filtering in plain PyTorch.

    A MODEL is a file that `train --save` has written.
    """


cli.list_commands = lambda context: list(cli.commands)  # in the order of work


@cli.result_callback()
@click.pass_context
def show(context, answer) -> None:
    """Print what a command returns: a value, if --json was given, or lines."""
    value, lines = answer or (None, ())
    if context.meta.get("json"):
        lines = [json.dumps(value, allow_nan=False)]
    for line in lines:
        say(line)


def say(line: str, *, err: bool = False) -> None:
    """Print a line; what can't be written, to a reader that has gone, is dropped."""
    try:
        click.echo(line, err=err)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2 if err else 1)


def notice(line: str) -> None:
    """Say a line on stderr, of several processes the first alone."""
    if find_processes()[0] == 0:
        say(" ".join(line.splitlines()), err=True)  # a file may have any name


def format_errors(errors: dict) -> str:
    """MSE, RMSE and MAE with four digits."""
    return ", ".join(f"{name} {errors[name]:#.4g}" for name in ERRORS)


def format_frame(frame: pl.DataFrame):
    """The lines of a table, the title last; fractions have four digits."""
    frame = frame.select(pl.exclude("title"), *["title"] * ("title" in frame.columns))
    lines = [frame.columns]
    for cells in frame.iter_rows():
        lines.append([f"{cell:#.4g}" if isinstance(cell, float) else str(cell) for cell in cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths[-1] = 0 if "title" in frame.columns else widths[-1]
    for cells in lines:
        yield " | ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


def describe_ratings(task: Task):
    """Lines on what is trained on."""
    ratings, (low, high) = task.train[2], find_range(task.train[2])
    counts = "{n_users:,} users, {n_items:,} items".format_map(task.figures)
    n_ratings = task.figures["n_train"] + task.figures["n_test"]
    yield f"{counts}, {n_ratings:,} ratings from {low:g} to {high:g}"
    sample = ratings[:: max(len(ratings) // 1_000_000, 1)]
    least, most = (sample.quantile(q).item() for q in (0.1, 0.9))
    if high - low > 3 * (most - least):
        cure = "if those far beyond are mistakes, leave them out; if counts, pass logarithms"
        yield f"8 of 10 ratings are from {least:g} to {most:g}: {cure}"


def describe_baselines(figures: dict):
    """Lines on the errors that there are without a model."""
    names = {"mean": "mean rating", "averages": "averages of users and items"}
    for name, errors in ((name, e) for name, e in figures["baselines"].items() if e):
        yield f"without a model, by the {names[name]}: {format_errors(errors)}"


def conclude(line: str, figures: dict, metrics: Path | None) -> None:
    """Say the result, and whether the training was for nothing; write --metrics."""
    if metrics is not None:
        text = json.dumps(figures, indent=1, allow_nan=False) + "\n"
        data.write_file(metrics, text.encode())
    say(line)
    if "rmse" in figures and figures["rmse"] > figures["baselines"]["averages"]["rmse"]:
        notice("this is worse than the averages of users and items: predict those instead")


def progress(length: int, label: str):
    """A progress bar on stderr with the remaining time, hidden where that is no terminal."""
    options = {"label": label, "file": sys.stderr, "item_show_func": lambda text: text}
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    return click.progressbar(length=length, hidden=not is_terminal, **options)


def find_processes() -> tuple[int, int]:
    """Rank and number of the processes of this training, as torchrun tells them; 0 and 1 alone."""
    number, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    is_told = number.isdecimal() and size.isdecimal() and int(size) > 1
    return (int(number), int(size)) if is_told else (0, 1)


def join_processes() -> None:
    """Be one of the processes that torchrun has started, until the end of the program."""

    def join():
        meeting = torch.distributed.rendezvous("env://", timeout=timedelta(minutes=5))
        store, rank, size = next(meeting)
        # The others wait while the first reads and evaluates, however long that takes.
        about = {"store": store, "rank": rank, "world_size": size, "timeout": timedelta(days=1)}
        torch.distributed.init_process_group("gloo", **about)

    try:  # in a thread, for Python sees no signal while torch waits
        ThreadPoolExecutor(1).submit(join).result()
    except (RuntimeError, ValueError) as error:
        address = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise ConnectionError(f"no other process of this training at {address}") from error


def choose(told: dict, *names: str) -> dict:
    """The values of some options."""
    return {name: told[name] for name in names if name in told}


def choose_reading(told: dict) -> dict:
    """The keywords of `data.read_ratings` from the values of the options."""
    values = {column: told.get(f"{name}_column") for name, column in COLUMNS.items()}
    how = {"columns": {column: value for column, value in values.items() if value is not None}}
    return how | choose(told, "encoding", "skip_bad") | {"notice": notice}


def check_paths(sources, *results: Path | None, endings: tuple = ("",)) -> None:
    """That results can be written, over nothing that is read, each to a file of its own."""
    taken = {os.path.realpath(path) for path in sources if path is not None}
    for path in (path for path in results if path is not None):
        if os.path.realpath(path) in taken:
            raise Usage(f"{path} is read, or is another result: it would be written over.")
        if not path.name.lower().endswith(endings):
            raise Usage(f"{path} does not end in {' or '.join(endings)}.")
        taken.add(os.path.realpath(path))
        data.check_writable(path)  # said now, not after the training


def start(told: dict, *results: Path | None) -> Source:
    """What a command that trains does first: cheap checks, threads, and reading."""
    choose_options(told["recipe"], choose(told, *DEFAULT))
    paths, how = choose(told, "ratings", "test", "users", "items"), choose_reading(told)
    if told["ratings"] and told["dataset"]:
        raise Usage("--dataset {dataset} and --ratings {ratings} are two.".format_map(told))
    if how["columns"] and not any(paths.values()):
        raise Usage("the options of columns go with --ratings.")
    check_names("--dataset", tuple(filter(None, [told["dataset"]])), data.DATASETS)
    if not re.fullmatch("|".join((*data.SPLITS, r"last[1-9]\d{0,8}")), told.get("split") or "ua"):
        raise Usage(f"--split {told['split']}: it is one of {', '.join(data.SPLITS)}, last10 ...")
    check_paths(paths.values(), *results)
    torch.set_num_threads(told["threads"])
    ratings = paths.pop("ratings") or told["dataset"] or "ml-100k"
    rest = choose(told, "rating_range", "data_dir")
    return read(ratings, **paths, **how, **rest)


@command("train", "Data", "Split", "Training", "Recipe", "Output")
@click.pass_context
def train_command(context, metrics, save, checkpoint, resume, **told):
    """Train a model, printing its error on the test part after each epoch.

    \b
    Recipes default and best are for ml-100k; N training ratings of in all R users and items get
      batch-size = recipe's x N / 90,570, at least 2
      weight-decay, bias-decay = recipe's x (34.5 / (N / R))^0.7
      y-range = the scale and an eighth of it at both ends, within mean -+ 4 deviations

    Under torchrun each process has a share of each batch, and the result is that of one.
    """
    if resume is not None:
        told, checkpoint = restore_options(context, resume), checkpoint or resume
        check_paths([resume], save, metrics)
    number, n_processes = find_processes()
    if n_processes > 1:
        if checkpoint is not None:
            raise Usage(f"--checkpoint is of one process, not of {n_processes}.")
        join_processes()
    torch.set_num_threads(told["threads"])
    if number > 0:
        for _ in fit_members(train.broadcast()):
            pass
        return
    started = time.perf_counter()
    task = prepare(start(told, save, metrics, checkpoint), **choose(told, *TASK), notice=notice)
    load_seconds = time.perf_counter() - started
    for line in (*describe_ratings(task), *describe_baselines(task.figures)):
        notice(line)
    tested, has_test = "test" if told["holdout"] is None else "held", len(task.test[0]) > 0
    errors = f" {tested}_mse | {tested}_rmse | {tested}_mae |" * has_test
    say(f"epoch | train_loss |{errors}    time")
    arguments = {n: os.path.abspath(v) if isinstance(v, Path) else v for n, v in told.items()}
    about = {"checkpoint": checkpoint, "resume": resume, "arguments": arguments}
    with progress(task.options["epochs"], "epochs") as bar:
        trained = train_model(task, on_epoch=partial(show_epoch, task, bar), **about)
    figures = trained.figures  # of what is saved, too
    figures.update(load_seconds=load_seconds, processes=n_processes)
    if save is not None:
        save_model(save, trained)
    done = f"trained in {figures['fit_seconds']:.2f} s"
    if has_test:
        done = f"{tested} {format_errors(figures)} on {describe_test(figures)}, {done}"
    conclude(done, figures, metrics)


def restore_options(context: click.Context, path: Path) -> dict:
    """The values that `train_command` kept, checked by click. `Usage` for one given besides."""
    for option in context.command.params:
        is_given = context.get_parameter_source(option.name).name == "COMMANDLINE"
        if is_given and option.name not in NOT_KEPT:
            raise Usage(f"{option.opts[0]} is the checkpoint's, with --resume.")
    with refusing(path, "checkpoint"):
        about, _ = load(path, "checkpoint")
        kept = context.command.make_context("train", [], default_map=about["arguments"]).params
    told = {name: value for name, value in kept.items() if name not in NOT_KEPT}
    return told | choose(context.params, "threads")


def show_epoch(task: Task, bar, figures: dict) -> None:
    """A line for an epoch, above the bar on a terminal."""
    if not bar.hidden:  # the bar makes room for the line
        click.echo("\r\033[K", nl=False, err=True)
    widths = {"train_loss": 10, "mse": 8, "rmse": 9, "mae": 8}
    cells = [f"{figures[n]:#{width}.4g}" for n, width in widths.items() if n in figures]
    say(f"{figures['epoch']:5} | {' | '.join(cells)} | {figures['seconds']:5.2f} s")
    n_ratings = task.figures["n_train"] * task.options["ensemble"]
    bar.update(1, f"{n_ratings / max(figures['seconds'], 1e-9):,.0f} ratings/s")


def describe_test(figures: dict) -> str:
    """What a training was tested on."""
    share = f"{figures['holdout']:g} of the training part of " if "holdout" in figures else ""
    return f"{share}{figures['split']}"


@command("cross-validate", "Data", "splits", "folds", "by-date", "Training", "Recipe", "metrics")
def cross_validate_command(splits, folds, by_date, metrics, **told):
    """Train and test on several splits: each one's error, the mean and the spread."""
    if (n_processes := find_processes()[1]) > 1:
        raise Usage(f"cross-validate is of one process, not of {n_processes}.")
    if sum(each is not None for each in (splits, folds, by_date)) > 1:
        raise Usage("give one of --splits, --folds and --by-date.")
    source, rows = start(told, metrics), []
    ratings, n_parts = source.ratings, folds or by_date
    if splits is None and n_parts is None and source.name != "ml-100k":
        folds = n_parts = 5
    splits = splits or data.PUBLISHED_SPLITS[2:]
    check_names("--splits", splits, data.PUBLISHED_SPLITS)
    if folds:
        parts = data.fold(ratings, folds, seed=told["seed"])
    elif by_date:
        parts = data.fold_by_date(ratings, by_date)
    else:
        parts = (data.split(ratings, name) for name in splits)
    names = [f"{number + 1}/{n_parts}" for number in range(n_parts)] if n_parts else splits
    say_once = cache(notice)
    say(" fold | test_rmse | test_mae |    time")
    for name, (part, test) in zip(names, parts, strict=True):
        part = source._replace(ratings=part, test=test)
        figures = train_model(prepare(part, **choose(told, *TASK), notice=say_once)).figures
        row = {"fold": name, "seconds": figures["fit_seconds"]}
        rows.append(row | choose(figures, *ERRORS, "baselines"))
        cells = f"{figures['rmse']:#9.4g} | {figures['mae']:#8.4g}"
        say(f"{name:>5} | {cells} | {row['seconds']:5.2f} s")
    figures = choose(figures, "recipe", "dataset", "seed", "options") | {"folds": rows}
    figures["baselines"] = dict.fromkeys(rows[0]["baselines"])
    figures["fit_seconds"] = sum(row["seconds"] for row in rows)
    for name in figures["baselines"]:
        each = pl.DataFrame([row["baselines"][name] for row in rows])
        figures["baselines"][name] = each.mean().row(0, named=True)
    cells = []
    for name in ERRORS[1:]:
        values = [row[name] for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        figures |= {name: statistics.mean(values), f"{name}_std": spread}
        cells.append(f"{name} {figures[name]:#.4g} +- {spread:#.2g}")
    for line in describe_baselines(figures):
        notice(line)
    conclude(f"{', '.join(cells)} over {len(rows)} folds", figures, metrics)


@command("lr-find", "Data", "Split", "Training", "Recipe", "plot", "json")
def lr_find_command(plot, **told):
    """Suggest an --lr-max: one short run at a growing learning rate, fastai's range test."""
    if used := choose({n: v for n, v in told.items() if v}, "epochs", "lr_max", "ensemble"):
        raise Usage(f"{', '.join(used)}: that changes nothing here.")
    check_paths([], plot, endings=PICTURES)
    curve = find_lr(prepare(start(told, plot), **choose(told, *TASK)))
    if plot is not None:
        write_picture(plot, plot_lr(curve))
    return curve, [f"{name:8} {curve[name]:.2g}" for name in ("valley", "steepest")]


@command("info", "MODEL", "json")
def info_command(path):
    """What a saved model was trained on, with which options, and its figures."""
    trained = load_model(path)
    tables, told = trained.tensors["tables"], dict(trained.figures)
    del told["epochs"]
    told |= {"rating_range": list(trained.clip), "has_titles": trained.about["titles"] is not None}
    told |= {"n_members": len(tables), "n_parameters": tables.numel()}
    lines = []
    for name, value in (told | told["options"]).items():
        value = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
        value = f"{value:.4g}" if isinstance(value, float) else value
        lines += [] if isinstance(value, dict) else [f"{name:16} {value}"]
    return told, lines


@command("evaluate", "MODEL", "ratings", *READING, *RANKING, *ALLOWED, "json")
def evaluate_command(path, ratings, ranking, k, min_rating, by, **told):
    """A saved model's error on the test part of its training, or on other ratings."""
    trained, frame, how = load_model(path), None, choose_reading(told)
    if ratings is None and how["columns"]:
        raise Usage("the options of columns go with --ratings.")
    if ratings is not None:
        frame = data.drop_repeats(data.read_ratings(ratings, **how))
    try:
        figures = evaluate(trained, frame, **choose(told, "allow_unknown", "allow_overlap"))
    except ValueError:
        if ratings is not None and ratings.is_file() and not told["allow_unknown"]:
            how |= {"notice": lambda line: None}  # it was said
            scan, locate = data.scan_pairs(ratings, **how)  # for the line of an id
            rows = scan.collect()
            about = {"locate": lambda at: locate(rows["row"][at]), "allow_unknown": False}
            find_pairs(trained, rows, **about)
        raise
    place = ratings or describe_test(trained.figures)
    lines = [f"{format_errors(figures)} on {figures['n_test']:,} ratings of {place}"]
    if ranking:
        figures |= {"k": k} | rank(trained, frame, k=k, min_rating=min_rating, by=by)
        lines.append(f"lists of {k} for {figures['n_users']:,} users, and of the most rated items:")
        names = ("precision", "recall", "ndcg", "hit_rate", "mrr")
        columns = [[figures[name], figures["popular"][name]] for name in names]
        frame = pl.DataFrame(dict(zip(names, columns, strict=True)))
        lines += format_frame(frame.with_columns(title=pl.Series(["model", "most rated"])))
    return figures, lines


PREDICT = ("user", "item", *WHOM[:2], "time", "pairs", *READING, "output", *ALLOWED[:1], "json")


@command("predict", "MODEL", *PREDICT)
def predict_command(path, user, item, rated, rate, pairs, output, **told):
    """The rating that a user will give an item, or those of a table of pairs."""
    how, options = choose_reading(told), choose(told, "allow_unknown", "time")
    if rated is not None or rate:
        if item is None or {user, pairs, output} != {None}:
            raise Usage("--rated and --rate go with --item alone.")
        trained = load_model(path)
        return predict_new(trained, item, read_rated(trained, rated, rate, how), told["time"])
    is_one = None not in (user, item) and pairs is None and output is None
    is_table = None not in (pairs, output) and user is None and item is None
    if not is_one and not is_table:
        raise Usage("give --user, or --rated, and --item, or --pairs and --output.")
    check_paths([path, pairs], output, endings=TABLES)
    trained, counts = load_model(path), []
    if pairs is None:
        return predict_one(trained, user, item, **options)
    scan, locate = data.scan_pairs(pairs, **how)

    def answer(frame):
        counts.append(len(frame))
        found = predict(trained, frame, locate=lambda at: locate(frame["row"][at]), **options)
        return found if len(trained.members) > 1 else found.drop("deviation")

    write_answers(output, scan, answer)
    value = {"n_pairs": sum(counts), "output": str(output)}
    return value, ["{n_pairs:,} predictions in {output}".format_map(value)]


def predict_one(trained: Model, user: str, item: str, *, allow_unknown: bool, time) -> tuple:
    """What `predict --user --item` returns."""
    user_row = find_rows(trained, "user", [user], allow_unknown=allow_unknown)
    item_row = torch.tensor([find_item(trained, item, allow_unknown=allow_unknown)])
    rows, value = (user_row, item_row), {"user": user, "item": item, "title": item}
    known = [row.item() < len(ids) for row, ids in zip(rows, trained.ids, strict=True)]
    value |= {"user": trained.ids.users[user_row.item()]} if known[0] else {}
    value |= describe_items(trained, item_row).row(0, named=True) if known[1] else {}
    columns = *rows, *find_context(trained, user_row, time)
    value |= {n: v.item() for n, v in find_answers(trained, trained.members, *columns).items()}
    value |= {"is_known": all(known)} if allow_unknown else {}
    average = ", in part as average" * (not all(known))
    return value, [format_rating(trained, value, f" by {value['user']}") + average]


def predict_new(trained: Model, item: str, rated: pl.DataFrame, time: int | None) -> tuple:
    """What `predict --rated --item` returns."""
    items, *columns = to_rated(trained, rated)
    members = fold_in(trained, items, *columns, time=time)
    row = torch.tensor([find_item(trained, item)])
    answers = find_answers(trained, members, torch.tensor([0]), row)
    value = describe_items(trained, row, **answers).row(0, named=True)
    return value, [format_rating(trained, value)]


def format_rating(trained: Model, value: dict, by: str = "") -> str:
    """A predicted rating, its spread where there are several members, and the item's title."""
    spread = f" +- {value['deviation']:#.2g}" if len(trained.members) > 1 else ""
    return f"{value['rating']:#.3g}{spread}{by} for {value['title']}"


def write_answers(path: Path, scan: pl.LazyFrame, answer) -> None:
    """Write to a table what `answer` makes of the frames of a lazy one, a part at a time."""
    schema = answer(scan.head(0).collect()).schema
    answers = scan.map_batches(answer, schema=schema, streamable=True)
    with data.replacing(path) as beside, open(beside, "wb") as file:  # which may have any name
        if path.suffix.lower() == ".parquet":
            answers.sink_parquet(file)
        else:
            answers.sink_csv(file, separator="\t" if path.suffix.lower() == ".tsv" else ",")


@command("recommend", "MODEL", "user...", "users", *WHOM, *LISTS, *READING, "output", "json")
def recommend_command(path, user, users, rated, rate, all_users, candidates, output, **told):
    """The items that a user will pick and like, of those that the user has not rated."""
    is_new, how = rated is not None or bool(rate), choose_reading(told)
    if bool(user) + (users is not None) + is_new + all_users != 1:
        raise Usage("give one of --user, --users, --rated, --rate and --all-users.")
    if (all_users and output is None) or (is_new and output is not None):
        raise Usage("--all-users needs --output, and --rated and --rate print.")
    check_paths([path, users, candidates], output, endings=TABLES)
    trained = load_model(path)
    options = choose(told, *(name.replace("-", "_") for name in LISTS))
    if candidates is not None:
        options["candidates"] = read_table(data.read_items, candidates, **how)["item"]
    if is_new:
        ratings = read_rated(trained, rated, rate, how)
        titles = describe_items(trained, find_items(trained, ratings["item"]))["title"]
        notice(f"rated: {'; '.join(titles)}")
        found = recommend(trained, rated=ratings, **options).drop("rank")
        return {"rated": rated, "items": found.to_dicts()}, format_frame(found)
    ids = trained.ids.users
    if not all_users:
        asked = user if users is None else read_table(data.read_users, users, **how)["user"]
        ids = ids.gather(find_rows(trained, "user", asked).numpy())
    if output is None:
        found = recommend(trained, ids, **options)
        if len(ids) > 1:
            return {"items": found.to_dicts()}, format_frame(found)
        found = found.select("item", "title", "rating")
        return {"user": ids[0], "items": found.to_dicts()}, format_frame(found)

    def answer(frame):
        found = recommend(trained, frame["user"], **options)
        return found if trained.about["titles"] else found.drop("title")

    write_answers(output, ids.alias("user").to_frame().lazy(), answer)
    value = {"n_users": len(ids), "output": str(output)}
    return value, [f"up to {told['n']} items for each of {len(ids):,} users in {output}"]


def read_rated(trained: Model, text: str | None, pairs: tuple, how: dict) -> pl.DataFrame:
    """A new user's ratings, of `--rated` or `--rate`: a frame of item, rating[, timestamp].

    A file has ids; what is typed may be parts of titles.
    """
    if text is None:
        return pl.DataFrame(pairs, {"item": pl.String, "rating": pl.Float32}, orient="row")
    if pairs:
        raise Usage("give one of --rated and --rate.")
    if os.path.exists(text):  # False, not OSError, where the text is too long for a name
        frame = data.read_rated(Path(text), **how)
        find_rows(trained, "item", frame["item"], locate=lambda _: text)
        return frame
    items, _, ratings = zip(*(pair.rpartition(":") for pair in text.split(",")), strict=True)
    ratings = pl.Series(ratings).str.strip_chars().cast(pl.Float32, strict=False)
    if ratings.null_count() or not all(map(str.strip, items)):
        cure = "neither a file nor ITEM:RATING,ITEM:RATING; --rate takes an item with commas"
        raise ValueError(f"--rated {text}: {cure}")
    return pl.DataFrame({"item": [item.strip() for item in items], "rating": ratings})


@command("similar", "MODEL", "user", "item", "n", "json")
def similar_command(path, user, item, n):
    """The items, or the users, most like one, by how they are rated or rate."""
    if (user is None) == (item is None):
        raise Usage("give one of --item and --user.")
    trained = load_model(path)
    if item is None:
        found = find_similar(trained, user, n=n, side="user")
        row = find_rows(trained, "user", [user]).item()
        return {"user": trained.ids.users[row], "users": found.to_dicts()}, format_frame(found)
    asked = describe_items(trained, torch.tensor([find_item(trained, item)])).row(0, named=True)
    found = find_similar(trained, asked["item"], n=n)
    return asked | {"items": found.to_dicts()}, format_frame(found)


@command("interpret", "MODEL", "n", "json")
def interpret_command(path, n):
    """The items liked most and least, whoever rates: those of the highest and lowest bias."""
    items = interpret(load_model(path))
    parts, lines = {"most": items.head(n), "least": items.reverse().head(n)}, []
    for name, part in parts.items():
        lines += [f"liked {name}:", *format_frame(part)]
    return {name: part.to_dicts() for name, part in parts.items()}, lines


@command("export", "MODEL", "output", required="output")
def export_command(path, output):
    """Write factors and biases with their ids to an .npz or .parquet file, for other programs."""
    check_paths([path], output, endings=(".npz", ".parquet"))
    trained = load_model(path)
    with data.replacing(output) as beside, open(beside, "wb") as file:
        if output.suffix.lower() == ".parquet":
            export_frame(trained).write_parquet(file)
        else:
            arrays = export(trained).items()  # texts of a fixed width, which need no pickle
            np.savez(file, **{n: a.astype(str) if a.dtype.kind == "O" else a for n, a in arrays})


@command("map", "MODEL", "output", required="output")
def map_command(path, output):
    """Draw the items by the first two principal components of their factors."""
    check_paths([path], output, endings=PICTURES)
    write_picture(output, plot_map(load_model(path)))


@command("plot", "output", required="output")
@click.argument("paths", metavar="FILE.json...", nargs=-1, required=True, type=FILE)
def plot_command(paths, output):
    """Draw the learning curves and schedules of trainings from their --metrics files."""
    check_paths(paths, output, endings=PICTURES)
    is_plain = len({path.stem for path in paths}) == len(paths)
    runs = [(path.stem if is_plain else str(path), read_metrics(path)) for path in paths]
    write_picture(output, plot_runs(runs))


def read_metrics(path: Path) -> dict:
    """What `train --metrics` wrote. ValueError, naming the file, for anything else."""
    with refusing(path, "training's figures"):
        figures = json.loads(path.read_bytes())
        rows = [[row["epoch"], row["train_loss"], row.get("mse", 0)] for row in figures["epochs"]]
        check_numbers([0.0 + number for row in rows for number in row])
        check_numbers(figures["options"]["lr_max"] / len(rows))
    return figures


def main() -> int:
    """Run the command line, to an exit status; what a user can cause ends in one line."""
    status = 1
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what its encoding lacks is escaped, not an error
            stream.reconfigure(errors="backslashreplace")
    try:
        cli(standalone_mode=False)
        return 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        status, line = error.exit_code, error.format_message()
        if "unexpected extra argument" in line:
            line += ": a table is given by an option, as --ratings FILE."
    except OSError as error:
        line = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except ValueError as error:
        line = str(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        line = "not enough memory for these options"
    notice(f"Error: {line}")
    return status


if __name__ == "__main__":
    os._exit(main())  # at once: nothing waits for a thread, or for what can't be written any more
