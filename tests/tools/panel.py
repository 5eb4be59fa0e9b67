"""Measure recipes beside the averages on many tables of ratings, `python tests/tools/panel.py DIR`.

Prints a Markdown table, a set a line: training ratings, how many there are for each user and item
that has some, RMSE of their mean and of the averages of users and items (`model.find_averages`),
and each recipe's RMSE over that of the averages: means over the seeds, which draw the test part, a
random tenth. NAME_train.* and NAME_test.* in DIR are one set with a test part of its own.
DIR/options.json may have arguments of `collab.read` by file name, {"a.csv": {"columns": {"item":
"placeID"}}}. What can't be read or trained on is left out with a line on stderr.

Without DIR the sets are the first of ml-100k's split ua, its training part shuffled by the seed,
tested on all of its test part.
"""

import json
import statistics
from pathlib import Path

import click
import numpy
from common import echo_heads, echo_row, notice

import collab
import data

SIZES = (500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000)  # training ratings of ml-100k's cuts
SEEDS = 3
RECIPES = {"default": {}, "best": {}}  # and options over theirs
CUT_RECIPES = RECIPES | {"best": {"features": ("id", "implicit")}}
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


def read_sets(folder):
    """`(name, function of the seed that makes a collab.Source)` of each set."""
    paths = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    options = paths.pop("options.json", None)
    options = json.loads(options.read_text()) if options else {}
    tests = {name.split("_test.")[0]: name for name in paths if "_test." in name}
    pairs = {name: tests.get(name.split("_train.")[0]) for name in paths if "_train." in name}
    for name, path in paths.items():
        if name.startswith(".") or name in pairs.values():
            continue
        arguments = {"ratings": path, "test": paths.get(pairs.get(name)), **options.get(name, {})}
        yield name, lambda seed, arguments=arguments: collab.read(**arguments)


def cut_sets():
    """The same of ml-100k cut down."""
    source = collab.read(notice=notice)
    train, test = data.split(source.ratings, "ua")
    for size in SIZES:

        def cut(seed, size=size):
            rows = numpy.random.default_rng(seed).permutation(len(train))[:size]
            return source._replace(name=None, ratings=train[rows], test=test, split=None)

        yield f"ml-100k, {size:,}", cut


def measure(cut, recipes):
    """The numbers of a set's line, means over the seeds."""
    lines = []
    for seed in range(SEEDS):
        ratios, source = [], cut(seed)
        for recipe, options in recipes.items():
            task = collab.prepare(source, recipe, seed=seed, **options)
            figures = collab.train_model(task).figures
            mean, averages = (figures["baselines"][name]["rmse"] for name in ("mean", "averages"))
            ratios.append(figures["rmse"] / averages)
        users, items = task.train[:2]
        density = len(users) / (len(users.unique()) + len(items.unique()))
        lines.append((len(users), density, mean, averages, *ratios))
    return [statistics.mean(column) for column in zip(*lines, strict=True)]


@click.command()
@click.argument("folder", required=False, type=FOLDER)
def main(folder):
    """Print each recipe's error over that of the averages on the tables in FOLDER."""
    recipes = CUT_RECIPES if folder is None else RECIPES
    ratios = (f"{name} / averages" for name in recipes)
    echo_heads("set", "ratings", "ratings a row", "mean", "averages", *ratios)
    for name, cut in read_sets(folder) if folder else cut_sets():
        try:
            n_train, density, mean, averages, *ratios = measure(cut, recipes)
        except (ValueError, OSError, TypeError) as error:
            notice(f"{name}: skipped: {error}")
            continue
        numbers = f"{n_train:,.0f}", f"{density:.1f}", f"{mean:.4g}", f"{averages:.4g}"
        echo_row(name, *numbers, *(f"{ratio:.4f}" for ratio in ratios))


if __name__ == "__main__":
    main()
