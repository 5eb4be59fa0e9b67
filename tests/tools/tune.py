"""Search around a recipe's values, on a validation part of the training part.

`python tests/tools/tune.py default.jsonl` tries values around those of `default`, `python
tests/tools/tune.py --recipe best --splits ua,u1,last10 --trials 60 best.jsonl` around those of
`best`; the first trial is the recipe as it is. `--ratings FILE --splits random` does so for a table
of one's own. A test part is never read: each trial trains on a part of the training part of each
split, with the values fitted to it as those of a recipe are, and is judged by its errors on what is
held out, which is drawn as the test part is (ua: ten of each user, at most a third; last10 and
by-date: by time; else a tenth). Errors are compared with those of the first trial, and averaged. A
trial is a line of the file; an interrupted search goes on where it stopped. The best are printed
last.
"""

import json
import operator
import random
import statistics
from pathlib import Path

import click
import polars
import torch
from common import notice

import collab
import data

GRIDS = {
    # At most 1,239 steps on small tables: whatever wins trains in about a second.
    "default": {
        "n_factors": (30, 40, 50),
        "std": (0.001, 0.003, 0.01),
        "epochs": (4, 5, 6, 7),
        "batch_size": (512, 612, 768, 1024),
        "lr_max": (0.0075, 0.01, 0.0125, 0.015),
        "weight_decay": (0.4, 0.5, 0.6, 0.7, 0.8),
        "bias_decay": (0.1, 0.15, 0.2, 0.3),
    },
    # Two models of an ensemble are enough to choose by.
    "best": {
        "ensemble": (2,),
        "n_factors": (32, 40, 48, 64),
        "dropout": (0.1, 0.2, 0.25, 0.3),
        "epochs": (6, 8, 10, 12),
        "batch_size": (1024, 1536, 2048),
        "lr_max": (0.01, 0.015, 0.02),
        "weight_decay": (0.6, 0.75, 0.9, 1.05),
        "bias_decay": (0.2, 0.3, 0.4),
    },
}


def draw(recipe, number):
    """The options of a trial: at random from the grid, but for trial 0, which has the recipe's."""
    chance = random.Random(number)
    drawn = {name: chance.choice(choices) for name, choices in GRIDS[recipe].items()}
    if number == 0:
        free = [name for name, choices in GRIDS[recipe].items() if len(choices) > 1]
        drawn |= {name: collab.RECIPES[recipe][name] for name in free}
    return drawn


def hold_out(ratings, split, seed):
    """The training part of `split` without what is held out, and that."""
    train, _ = data.split(ratings, split, seed=seed)
    if split.startswith(("last", "by-date")):
        return data.split(train, split)
    if split != "ua":
        return data.hold_out(train, 0.1, seed=seed)
    n_held = polars.min_horizontal(polars.len() // 3, 10)
    is_held = polars.int_range(polars.len()).shuffle(seed).over("user") < n_held.over("user")
    is_held = train.select(is_held).to_series()
    return train.filter(~is_held), train.filter(is_held)


def validate(source, recipe, drawn, split, seed):
    """The MSE on what is held out of the training part of `split`."""
    collab.RECIPES["trial"] = collab.RECIPES[recipe] | drawn  # as a recipe, it is fitted to data
    part, held = hold_out(source.ratings, split, seed)
    source = source._replace(ratings=part, test=held, split=None)
    return collab.train_model(collab.prepare(source, "trial", seed=seed)).figures["mse"]


def read_trials(file, search):
    """The trials of an interrupted search. ClickException if `file` holds those of another."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    if lines and not lines[-1].endswith("\n"):  # cut off while it was written
        file.write_text("".join(lines[:-1]))
    trials = [json.loads(line) for line in lines if line.endswith("\n")]
    for trial in trials:
        if {name: trial[name] for name in search} != search:
            raise click.ClickException(f"{file} holds trials of another search, {trial}")
    return trials


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--recipe", type=click.Choice(list(GRIDS)), default="default", show_default=True)
@click.option("--splits", default="ua,ua", show_default=True, help="The n-th is cut by seed n.")
@click.option("--trials", default=200, show_default=True)
@click.option("--ratings", default="ml-100k", show_default=True, help="Of a MovieLens or a file.")
def main(file, recipe, splits, trials, ratings):
    """Run trials until FILE has --trials of them."""
    torch.set_num_threads(1)
    source = collab.read(ratings, notice=notice)
    search = {"recipe": recipe, "splits": splits, "ratings": ratings}
    done = read_trials(file, search)
    for number in range(len(done), trials):
        drawn, parts = draw(recipe, number), enumerate(splits.split(","))
        errors = [validate(source, recipe, drawn, split, seed) for seed, split in parts]
        first = done[0]["errors"] if done else errors
        ratio = statistics.mean(map(operator.truediv, errors, first))
        done.append({**search, "ratio": ratio, "errors": errors, "options": drawn})
        with file.open("a") as lines:
            lines.write(json.dumps(done[-1]) + "\n")
    for trial in sorted(done, key=lambda trial: trial["ratio"])[:10]:
        click.echo(f"{trial['ratio']:.4f} {json.dumps(trial['options'])}")


if __name__ == "__main__":
    main()
