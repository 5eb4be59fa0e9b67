"""Choose a recipe: a random search over a stated grid, on a validation part of the training part.

`python tests/tune.py default.jsonl` chose the `default` recipe, `python tests/tune.py --recipe best
--splits ua,u1 --trials 60 best.jsonl` chose `best`. A test part is never read: each trial trains on
nine tenths of the training part of each split, drawn by a seed, and is judged by the mean of its
errors on the tenths left. A trial is a line of the file; an interrupted search goes on where it
stopped. The best trials are printed last.
"""

import json
import random
import sys
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import collab
import data

GRIDS = {
    # At most 1,062 steps on small tables: whatever wins trains in well under a second.
    "default": {
        "n_factors": (20, 30, 40),
        "epochs": (4, 5, 6),
        "batch_size": (512, 768, 1024),
        "drop_last": (False,),
        "lr_max": (0.0075, 0.01, 0.015, 0.02),
        "weight_decay": (0.2, 0.3, 0.4, 0.5, 0.6),
        "bias_decay": (0.01, 0.02, 0.04, 0.1),
        "y_range": ((0.0, 5.5), (0.5, 5.5)),
    },
    # Two models of an ensemble are enough to choose by.
    "best": {
        "ensemble": (2,),
        "n_factors": (16, 24, 32),
        "dropout": (0.1, 0.2, 0.3),
        "epochs": (10, 12, 16),
        "batch_size": (1024, 1536, 2048),
        "lr_max": (0.01, 0.015, 0.02),
        "weight_decay": (0.6, 0.8, 1.0, 1.2),
        "bias_decay": (0.05, 0.1, 0.2),
    },
}


def read_trials(file, search):
    """The trials of an interrupted search. ClickException if `file` holds those of another."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    if lines and not lines[-1].endswith("\n"):  # cut off while it was written
        lines.pop()
        data.write_file(file, "".join(lines).encode())
    trials = [json.loads(line) for line in lines]
    for trial in trials:
        if {name: trial[name] for name in search} != search:
            raise click.ClickException(f"{file} holds trials of another search, {trial}")
    return trials


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--recipe", type=click.Choice(list(GRIDS)), default="default", show_default=True)
@click.option("--splits", default="ua,ua", show_default=True, help="The n-th is cut by seed n.")
@click.option("--trials", default=200, show_default=True)
def main(file, recipe, splits, trials):
    """Run trials until FILE has --trials of them."""
    torch.set_num_threads(1)
    folder = data.get_ml_100k(notice=lambda line: click.echo(line, err=True))
    ratings = data.read_ratings(folder / "u.data")
    about = {"users": data.read_users(folder), "items": data.read_items(folder)}
    features = collab.RECIPES[recipe]["features"]
    tasks = []
    for seed, split in enumerate(splits.split(",")):
        frames = collab.cut(ratings, split, seed=seed, holdout=0.1)
        tasks.append(collab.prepare(*frames, features, **about))
    search = {"recipe": recipe, "splits": splits}
    done = read_trials(file, search)
    for number in range(len(done), trials):
        draw = random.Random(number)
        drawn = {name: draw.choice(values) for name, values in GRIDS[recipe].items()}
        options = collab.RECIPES[recipe] | drawn
        last = []
        for seed, task in enumerate(tasks):
            *_, (_, row) = collab.fit(task, options=options, seed=seed)
            last.append(row["mse"])
        done.append({**search, "mse": sum(last) / len(last), "options": drawn})
        with file.open("a") as lines:
            lines.write(json.dumps(done[-1]) + "\n")
    for trial in sorted(done, key=lambda trial: trial["mse"])[:10]:
        click.echo(f"{trial['mse']:.4f} {json.dumps(trial['options'])}")


if __name__ == "__main__":
    main()
