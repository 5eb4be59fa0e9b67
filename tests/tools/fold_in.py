"""New users without retraining, against users trained on: `python tests/tools/fold_in.py`.

A tenth of ua's users is left out of the training part. They are folded in by their ratings of the
training part, one by one, and their test ratings predicted; beside it a model trained on all, and
one that knows nothing of them. With `--validate` a tenth of the training part takes the place of
the test part, for several widths of the prior: so `collab.PRIOR_WIDTH` was found.
"""

import click
import numpy
import polars
import torch
from common import echo_heads, echo_row, notice, spread

import collab
import data

WIDTHS = (1.0, 2.0, 4.0, 8.0)


def measure(source, recipe, seed, *, widths, is_validation):
    """The numbers of a line: test MSE on the hidden users, in each of the ways."""
    ratings, test = data.split(source.ratings, "ua")
    if is_validation:
        ratings, test = data.hold_out(ratings, 0.1, seed=seed)
    users = ratings["user"].unique().sort().to_numpy()
    drawn = numpy.random.default_rng(seed).choice(users, len(users) // 10, replace=False)
    is_hidden = polars.col("user").is_in(polars.Series(drawn).implode())
    rest, hidden = ratings.filter(~is_hidden), ratings.filter(is_hidden)
    test = test.filter(is_hidden)
    source = source._replace(test=test, split=None)
    trained, model = (
        collab.train_model(collab.prepare(source._replace(ratings=part), recipe, seed=seed))
        for part in (ratings, rest)
    )
    folded = []
    for width in widths:
        errors = [fold_in(model, hidden, test, user, width) for user in drawn.tolist()]
        folded.append(torch.cat(errors).square().mean().item())
    mse = trained.figures["mse"]
    return mse, *folded, min(folded) - mse, model.figures["mse"]


def fold_in(model, hidden, test, user, width):
    """Errors (N,) on the test ratings of a user, folded in by the hidden ones."""
    own = hidden.filter(
        polars.col("user") == user, polars.col("item").is_in(model.ids.items.implode())
    )
    asked = test.filter(polars.col("user") == user)
    rows, asked_rows = (collab.find_rows(model, "item", each["item"]) for each in (own, asked))
    columns, options, users = [rows, own["rating"].to_torch()], {}, torch.zeros_like(asked_rows)
    if "time" in model.options["features"]:  # each at a moment of its own
        columns.append(own["timestamp"].to_torch())
        options, users = {"time": asked["timestamp"].to_torch()}, torch.arange(len(asked))
    members = collab.fold_in(model, *columns, **options, width=width)
    ratings = collab.predict_mean(members, users, asked_rows, head=collab.make_head(*model.head))
    return ratings.clamp(*model.clip) - asked["rating"].to_torch()


@click.command()
@click.option("--validate", "is_validation", is_flag=True, help="Compare widths of the prior.")
def main(is_validation):
    """Print a Markdown table: mean and deviation over the seeds, which draw the users, too."""
    torch.set_num_threads(1)
    source, widths = collab.read(notice=notice), WIDTHS if is_validation else (collab.PRIOR_WIDTH,)
    names = [f"width {width:g}" for width in widths] if is_validation else ["folded in"]
    echo_heads("recipe", "trained on them", *names, "difference", "average user")
    options = {"widths": widths, "is_validation": is_validation}
    for recipe in collab.RECIPES:
        lines = [measure(source, recipe, seed, **options) for seed in range(3)]
        echo_row(recipe, *map(spread, zip(*lines, strict=True)))


if __name__ == "__main__":
    main()
