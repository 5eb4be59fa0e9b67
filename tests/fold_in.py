"""New users without retraining, against users trained on: `python tests/fold_in.py`.

A tenth of ua's users is left out of the training part. They are folded in by their ratings of the
training part, one by one, and their test ratings predicted; beside it a model trained on all, and
one that knows nothing of them.
"""

import statistics
import sys
from pathlib import Path

import click
import numpy
import polars
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import collab
import data


def measure(found, recipe, seed, **given):
    """Test MSE on the hidden users: of a model trained on them, of the average user, folded in."""
    ratings, test = data.split(found.ratings, "ua")
    users = ratings["user"].unique().sort().to_numpy()
    drawn = numpy.random.default_rng(seed).choice(users, len(users) // 10, replace=False)
    is_hidden = polars.col("user").is_in(polars.Series(drawn).implode())
    rest, hidden, test = (
        ratings.filter(~is_hidden),
        ratings.filter(is_hidden),
        test.filter(is_hidden),
    )

    def fit(part):
        parts = found._replace(ratings=part, test=test)
        return collab.train_model(parts, recipe=recipe, seed=seed, **given)

    trained, saved = fit(ratings), fit(rest)
    errors = [fold_in(saved, rest, hidden, test, user) for user in drawn.tolist()]
    return trained.figures["mse"], saved.figures["mse"], torch.cat(errors).square().mean().item()


def fold_in(saved, rest, hidden, test, user):
    """Errors (N,) on the test ratings of a user, folded in by the hidden ones."""
    known = polars.Series(saved.item_ids).implode()
    own = hidden.filter(polars.col("user") == user, polars.col("item").is_in(known))
    asked = test.filter(polars.col("user") == user)
    rows, asked_rows = (
        torch.tensor([collab.find_row(saved.item_ids, item) for item in frame["item"].to_list()])
        for frame in (own, asked)
    )
    is_timed = "timestamp" in own.columns and "time" in saved.figures["options"]["features"]
    times = own["timestamp"].to_torch() if is_timed else None
    tables = collab.fold_in(saved, rows, own["rating"].to_torch(), times)
    context = data.time_context(polars.concat([rest, own]), asked)[1:] if is_timed else ()
    head = collab.make_head(*saved.head)
    one = torch.zeros_like(asked_rows)
    mean, _ = collab.predict_rows(tables, one, asked_rows, *context, head=head)
    return mean.clamp(*saved.clip) - asked["rating"].to_torch()


@click.command()
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(collab.RECIPES)))
@click.option("--epochs", type=click.IntRange(1), help="Fewer, to try it.")
def main(seeds, only, epochs):
    """Print a Markdown table: mean and deviation over the seeds, which draw the users, too."""
    torch.set_num_threads(1)
    found = collab.read(notice=lambda line: click.echo(line, err=True))
    click.echo("| recipe | trained on them | folded in | difference | average user |")
    click.echo("|---|---|---|---|---|")
    for recipe in only or ("default", "best"):
        rows = [measure(found, recipe, seed, epochs=epochs) for seed in range(seeds)]
        columns = [(a, c, c - a, b) for a, b, c in rows]
        cells = [
            f"{mean:.4f} ± {spread:.4f}"
            for mean, spread in map(summarise, zip(*columns, strict=True))
        ]
        click.echo(f"| {recipe} | " + " | ".join(cells) + " |")


def summarise(values):
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
