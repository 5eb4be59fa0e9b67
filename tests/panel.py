"""Measure recipes beside the averages on many tables of ratings: `python tests/panel.py FOLDER`.

Prints a Markdown table, a set a line: training ratings, how many there are for each user and item
that has some, RMSE of their mean and of the averages of users and items (`model.find_averages`),
and each recipe's RMSE over that of the averages: means over the seeds, which draw the test part, a
random tenth. NAME_train.* and NAME_test.* in FOLDER are one set with a test part of its own.
FOLDER/options.json may have arguments of `collab.read` by file name, {"a.csv": {"columns": {"item":
"placeID"}}}. What can't be read is left out with a line on stderr. The exit status is 1 for a ratio
above --at-most, and where there is no set.

Without FOLDER the sets are the first of ml-100k's split ua, its training part shuffled by the seed,
tested on all of its test part.
"""

import json
import statistics
import sys
from pathlib import Path

import click
import numpy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import collab

SIZES = (500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000)  # training ratings of ml-100k's cuts
RECIPES = {"default": {}, "best": {}}  # and options over theirs
CUT_RECIPES = RECIPES | {"best": {"features": ("id", "implicit")}}
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


def find_sets(folder):
    """`(name, arguments of collab.read)` of each set of files in a folder, by name."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    given = folder / "options.json"
    options = json.loads(given.read_text()) if given.exists() else {}
    tests = {name.split("_test.")[0]: name for name in names if "_test." in name}
    pairs = {name: tests.get(name.split("_train.")[0]) for name in names if "_train." in name}
    for name in names:
        if name == given.name or name.startswith(".") or name in pairs.values():
            continue
        test = {"test": folder / pairs[name]} if pairs.get(name) else {}
        arguments = {"ratings": folder / name, **test, **options.get(name, {})}
        yield name.replace("_train.", ".") if test else name, arguments


def read_sets(folder):
    """`(name, function of the seed that makes a collab.Data)` of each set that can be read."""
    for name, arguments in find_sets(folder):
        try:
            source = collab.read(**arguments)
        except (ValueError, OSError, TypeError) as error:
            click.echo(f"{name}: skipped: {error}", err=True)
            continue
        yield name, lambda seed, source=source: source


def cut_sets(sizes):
    """The same of ml-100k cut down."""
    source = collab.read(notice=lambda line: click.echo(line, err=True))
    train, test = collab.cut(source.ratings, "ua", seed=0)
    for size in map(int, sizes):

        def cut(seed, size=size):
            rows = numpy.random.default_rng(seed).permutation(len(train))[:size]
            return source._replace(name=None, ratings=train[rows], test=test)

        yield f"ml-100k, {size:,}", cut


def measure(cut, recipes, n_seeds):
    """The numbers of a set's line, means over the seeds."""
    rows = []
    for seed in range(n_seeds):
        ratios, source = [], cut(seed)
        for recipe, options in recipes.items():
            model = collab.train_model(source, recipe=recipe, seed=seed, **options)
            figures = model.figures
            mean, averages = (figures["baselines"][name]["rmse"] for name in ("mean", "averages"))
            ratios.append(figures["rmse"] / averages)
        starts, items = model.rated[:2]
        n_train, n_rows = len(items), (starts.diff() > 0).sum().item() + len(items.unique())
        rows.append((n_train, n_train / n_rows, mean, averages, *ratios))
    return [statistics.mean(column) for column in zip(*rows, strict=True)]


@click.command()
@click.argument("folder", required=False, type=FOLDER)
@click.option("--recipe", "only", multiple=True, type=click.Choice(list(RECIPES)))
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--sizes", default=",".join(map(str, SIZES)), show_default=True)
@click.option("--at-most", type=float, default=1.01, show_default=True)
def main(folder, only, seeds, sizes, at_most):
    """Print each recipe's error over that of the averages on the tables in FOLDER."""
    recipes = CUT_RECIPES if folder is None else RECIPES
    recipes = {name: options for name, options in recipes.items() if not only or name in only}
    heads = "| set | ratings | ratings a row | mean | averages |"
    heads += "".join(f" {name} / averages |" for name in recipes)
    click.echo(f"{heads}\n{'|---' * (5 + len(recipes))}|")
    sets, highest = cut_sets(sizes.split(",")) if folder is None else read_sets(folder), 0.0
    for name, cut in sets:
        try:
            n_train, density, mean, averages, *ratios = measure(cut, recipes, seeds)
        except ValueError as error:  # of what can't be trained on
            click.echo(f"{name}: skipped: {error}", err=True)
            continue
        numbers = [f"{n_train:,.0f}", f"{density:.1f}", f"{mean:.4g}", f"{averages:.4g}"]
        click.echo(f"| {' | '.join([name, *numbers, *(f'{ratio:.4f}' for ratio in ratios)])} |")
        highest = max(highest, *ratios)
    sys.exit(0 if 0 < highest <= at_most else 1)


if __name__ == "__main__":
    main()
