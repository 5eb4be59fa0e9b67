"""Print the README's table of results: each recipe through the command line, over several seeds.

`python tests/tools/figures.py` runs the recipes in turn, seed by seed, so that the machine's load
falls on all of them alike. A cell is mean and standard deviation over the seeds; seconds are of the
training loop on ua.
"""

from collections import defaultdict

import click
from common import echo_heads, echo_row, run_collab, spread

RECIPES = "fastai", "default", "best --features id,implicit", "best"
COLUMNS = {
    "ua MSE": ("train --split ua", "mse"),
    "u1 RMSE": ("train --split u1", "rmse"),
    "u1..u5 RMSE": ("cross-validate", "rmse"),
    "last10 MSE": ("train --split last10", "mse"),
    "by-date RMSE": ("train --split by-date", "rmse"),
}


@click.command()
def main():
    """Train with every recipe and seed, and print means and standard deviations."""
    cells = defaultdict(list)
    for seed in range(3):
        for column, (command, figure) in COLUMNS.items():
            for recipe in RECIPES:
                figures = run_collab(*command.split(), "--recipe", *recipe.split(), "--seed", seed)
                cells[recipe, column].append(figures[figure])
                if column == "ua MSE":
                    cells[recipe, "seconds"].append(figures["fit_seconds"])
    echo_heads("`python collab.py train`", *COLUMNS, "seconds")
    for recipe in RECIPES:
        errors = (spread(cells[recipe, column]) for column in COLUMNS)
        echo_row(f"`--recipe {recipe}`", *errors, spread(cells[recipe, "seconds"], 2))


if __name__ == "__main__":
    main()
