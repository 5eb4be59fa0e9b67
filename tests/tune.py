"""Choose a recipe: a random search over a stated grid, on a validation part of the training part.

`python tests/tune.py trials.jsonl` chose the `default` recipe. The test part of the split is never
read: each trial trains on nine tenths of the training part, drawn by a seed, and is judged on the
tenth left, for each of two seeds. A trial is a line of the file; an interrupted search goes on
where it stopped. The best trials are printed last.
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

# At most 1,062 steps on small tables: whatever wins trains in well under a second.
GRID = {
    "n_factors": (20, 30, 40),
    "epochs": (4, 5, 6),
    "batch_size": (512, 768, 1024),
    "drop_last": (False,),
    "lr_max": (0.0075, 0.01, 0.015, 0.02),
    "weight_decay": (0.2, 0.3, 0.4, 0.5, 0.6),
    "bias_decay": (0.01, 0.02, 0.04, 0.1),
    "y_range": ((0.0, 5.5), (0.5, 5.5)),
}


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--trials", default=200, show_default=True)
@click.option("--split", default="ua", show_default=True, help="Its training part is all we read.")
def main(file, trials, split):
    """Run trials until FILE has --trials of them."""
    torch.set_num_threads(1)
    folder = data.get_ml_100k(notice=lambda line: click.echo(line, err=True))
    base, _ = data.split(data.read_ratings(folder / "u.data"), split)
    seeds = (0, 1)
    tasks = [collab.prepare(*data.hold_out(base, 0.1, seed=seed), ("id",)) for seed in seeds]
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for number in range(len(done), trials):
        draw = random.Random(number)
        drawn = {name: draw.choice(values) for name, values in GRID.items()}
        options = collab.RECIPES["default"] | drawn
        last = []
        for task, seed in zip(tasks, seeds, strict=True):
            *_, (_, row) = collab.fit(task, options=options, seed=seed)
            last.append(row["mse"])
        done.append({"mse": sum(last) / len(last), "options": options})
        with file.open("a") as lines:
            lines.write(json.dumps(done[-1]) + "\n")
    for trial in sorted(done, key=lambda trial: trial["mse"])[:10]:
        click.echo(f"{trial['mse']:.4f} {json.dumps(trial['options'])}")


if __name__ == "__main__":
    main()
