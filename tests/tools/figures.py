"""Print the README's table of results: each recipe through the command line, over several seeds.

`python tests/tools/figures.py` runs the recipes in turn, seed by seed, so that the machine's load
falls on all of them alike. A cell is mean and standard deviation over the seeds; seconds are of the
training loop on ua.
"""

import click
from common import echo_heads, echo_row, run_collab, spread

RECIPES = (
    "--recipe fastai",
    "--recipe default",
    "--recipe best --features id,implicit",
    "--recipe best",
)
COLUMNS = {
    "ua": ("ua MSE", "train --split ua", "mse"),
    "u1": ("u1 RMSE", "train --split u1", "rmse"),
    "folds": ("u1..u5 RMSE", "cross-validate", "rmse"),
}


@click.command()
@click.option("--seeds", default=3, show_default=True)
@click.option("--columns", default=",".join(COLUMNS), show_default=True)
@click.option("--only", multiple=True, help="Only recipes with this in their name.")
def main(seeds, columns, only):
    """Train with every recipe and seed, and print means and standard deviations."""
    columns = {name: COLUMNS[name] for name in columns.split(",")}
    recipes = [name for name in RECIPES if not only or any(part in name for part in only)]
    cells = {recipe: {column: [] for column in columns} for recipe in recipes}
    seconds = {recipe: [] for recipe in recipes}
    for seed in range(seeds):
        for column, (_, command, figure) in columns.items():
            for recipe in recipes:
                figures = run_collab(*command.split(), *recipe.split(), "--seed", seed)
                cells[recipe][column].append(figures[figure])
                if column == "ua":
                    seconds[recipe].append(figures["fit_seconds"])
    echo_heads("`python collab.py train`", *(head for head, *_ in columns.values()), "seconds")
    for recipe in recipes:
        last = spread(seconds[recipe], 2) if seconds[recipe] else ""
        echo_row(f"`{recipe}`", *map(spread, cells[recipe].values()), last)


if __name__ == "__main__":
    main()
