"""Print the README's table of results: each recipe through the command line, over several seeds.

`python tests/figures.py` runs the recipes in turn, seed by seed, so that the machine's load falls
on all of them alike. A cell is mean and standard deviation over the seeds; seconds are of the
training loop on ua.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
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


def run(command):
    """Run `python collab.py COMMAND` and return its figures."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.json"
        arguments = [*command.split(" "), "--metrics", path]
        subprocess.run(
            [sys.executable, ROOT / "collab.py", *arguments], check=True, stdout=subprocess.DEVNULL
        )
        return json.loads(path.read_text())


def cell(values, digits):
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


@click.command()
@click.option("--seeds", default=3, show_default=True)
@click.option("--columns", default=",".join(COLUMNS), show_default=True)
@click.option("--only", multiple=True, help="Only recipes with this in their name.")
def main(seeds, columns, only):
    """Train with every recipe and seed, and print means and standard deviations."""
    columns = columns.split(",")
    recipes = [name for name in RECIPES if not only or any(part in name for part in only)]
    figures = {name: {column: [] for column in (*columns, "seconds")} for name in recipes}
    for seed in range(seeds):
        for column in columns:
            for name, results in figures.items():
                _, command, figure = COLUMNS[column]
                result = run(f"{command} {name} --seed {seed}")
                results[column].append(result[figure])
                if column == "ua":
                    results["seconds"].append(result["fit_seconds"])
    heads = [COLUMNS[column][0] for column in columns]
    click.echo(f"| `python collab.py train` | {' | '.join(heads)} | seconds |")
    click.echo("|---|" + "---|" * (len(columns) + 1))
    for name, results in figures.items():
        cells = [cell(results[column], 4) for column in columns]
        seconds = cell(results["seconds"], 2) if results["seconds"] else ""
        click.echo(f"| `{name}` | {' | '.join(cells)} | {seconds} |")


if __name__ == "__main__":
    main()
