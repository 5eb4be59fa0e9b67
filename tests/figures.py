"""Print the README's table of results: each recipe through the command line, seeds 0 to 4.

`python tests/figures.py` runs the recipes in turn, seed by seed, so that the machine's load falls
on all of them alike.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
RUNS = ("--recipe fastai", "--recipe default")


@click.command()
@click.option("--seeds", default=5, show_default=True)
def main(seeds):
    """Train with every recipe and seed, and print means and standard deviations."""
    figures = {run: [] for run in RUNS}
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.json"
        for seed in range(seeds):
            for run, results in figures.items():
                command = [sys.executable, ROOT / "collab.py", "train", *run.split(" ")]
                command += ["--seed", str(seed), "--metrics", metrics]
                subprocess.run(command, check=True, capture_output=True)
                results.append(json.loads(metrics.read_text()))
    click.echo("| `python collab.py train` | test MSE | test RMSE | seconds |")
    click.echo("|---|---|---|---|")
    for run, results in figures.items():
        cells = [f"`{run}`"]
        for name, digits in (("mse", 4), ("rmse", 4), ("fit_seconds", 2)):
            values = [result[name] for result in results]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}")
        click.echo(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
