"""New users without retraining, against users trained on: `python tests/fold_in.py`.

A tenth of ua's users is left out of the training part. They are folded in by their ratings of the
training part, one by one, and their test ratings predicted; beside it a model trained on all, and
one that knows nothing of them. With `--validate` a tenth of the training part takes the place of
the test part, for several widths of the prior: so `collab.PRIOR_WIDTH` was found.
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

WIDTHS = (1.0, 2.0, 4.0, 8.0)


def measure(found, recipe, seed, *, widths, is_validation, **given):
    """Test MSE on the hidden users: of a model trained on them, of the average user, folded in."""
    holdout = 0.1 if is_validation else None
    ratings, test = collab.cut(found.ratings, "ua", seed=seed, holdout=holdout)
    users = ratings["user"].unique().sort().to_numpy()
    drawn = numpy.random.default_rng(seed).choice(users, len(users) // 10, replace=False)
    is_hidden = polars.col("user").is_in(polars.Series(drawn).implode())
    rest, hidden = ratings.filter(~is_hidden), ratings.filter(is_hidden)
    test = test.filter(is_hidden)

    def fit(part):
        parts = found._replace(ratings=part, test=test)
        return collab.train_model(parts, recipe=recipe, seed=seed, **given)

    trained, saved = fit(ratings), fit(rest)
    folded = []
    for width in widths:
        errors = [fold_in(saved, rest, hidden, test, user, width) for user in drawn.tolist()]
        folded.append(torch.cat(errors).square().mean().item())
    return trained.figures["mse"], saved.figures["mse"], folded


def fold_in(saved, rest, hidden, test, user, width):
    """Errors (N,) on the test ratings of a user, folded in by the hidden ones."""
    known = polars.Series(saved.item_ids).implode()
    own = hidden.filter(polars.col("user") == user, polars.col("item").is_in(known))
    asked = test.filter(polars.col("user") == user)
    rows, asked_rows = (
        torch.tensor([collab.find_row(saved.item_ids, i) for i in frame["item"].to_list()]).long()
        for frame in (own, asked)
    )
    is_timed = "time" in saved.figures["options"]["features"]
    times = own["timestamp"].to_torch() if is_timed else None
    tables = collab.fold_in(saved, rows, own["rating"].to_torch(), times, width=width)
    context = data.time_context(polars.concat([rest, own]), asked)[1:] if is_timed else ()
    one, head = torch.zeros_like(asked_rows), collab.make_head(*saved.head)
    mean, _ = collab.predict_rows(tables, one, asked_rows, *context, head=head)
    return mean.clamp(*saved.clip) - asked["rating"].to_torch()


@click.command()
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(collab.RECIPES)))
@click.option("--validate", "is_validation", is_flag=True, help="Compare widths of the prior.")
@click.option("--epochs", type=click.IntRange(1), help="Other than the recipe's.")
def main(seeds, only, is_validation, epochs):
    """Print a Markdown table: mean and deviation over the seeds, which draw the users, too."""
    torch.set_num_threads(1)
    found = collab.read(notice=lambda line: click.echo(line, err=True))
    widths = WIDTHS if is_validation else (collab.PRIOR_WIDTH,)
    names = [f"width {width:g}" for width in widths] if is_validation else ["folded in"]
    names = ["recipe", "trained on them", *names, "difference", "average user"]
    click.echo(f"| {' | '.join(names)} |")
    click.echo("|---" * len(names) + "|")
    options = {"widths": widths, "is_validation": is_validation, "epochs": epochs}
    for recipe in only or collab.RECIPES:
        rows = []
        for seed in range(seeds):
            trained, average, folded = measure(found, recipe, seed, **options)
            rows.append((trained, *folded, min(folded) - trained, average))
        cells = " | ".join(map(summarise, zip(*rows, strict=True)))
        click.echo(f"| {recipe} | {cells} |")


def summarise(values):
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {spread:.4f}"


if __name__ == "__main__":
    main()
