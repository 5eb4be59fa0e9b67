"""Settle the notebook's question: each of its experiments, with its shapes and with them right.

`python tests/reproduce.py` runs them on ml-100k's ua split and prints the notebook's figures beside
ours: the last epoch's training loss and test MSE, of predictions that are not clipped.

The notebook adds biases of shape (B, 1) to dot products of shape (B,). The sum is (B, B), with the
biases of pair i in row i and the dot product of pair j in column j, and its loss averages over all
of them. With fastai's model the predictions are (B,), but its loop compares them with targets of
shape (B, 1): every prediction with every rating.
"""

import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import model
import schedule
import train


class Experiment(NamedTuple):
    name: str
    notebook: tuple | None  # its training and test figure; it has none where it crashed
    n_epochs: int = 10
    y_range: tuple = (0.5, 5.5)
    std: float | None = 0.01  # of the cut normal; None: torch's standard normal
    lr: float = 0.01
    is_cyclic: bool = True
    l2: float = 0.0  # in the gradient
    weight_decay: float = 0.0  # decoupled
    drop_last: bool = False
    is_fastai_model: bool = False


EXPERIMENTS = [
    Experiment(
        "fastai's settings", (0.352, 0.900), y_range=(0, 5.5), weight_decay=0.1, drop_last=True
    ),
    Experiment("plain Adam", (1.045, 2.043), 10, (-0.5, 5.5), None, 0.005, is_cyclic=False),
    Experiment("one-cycle", (1.355, 3.304), 10, (-0.5, 5.5), None, 0.005),
    Experiment("y_range from 0.5, lr 0.01", (0.830, 0.986), 20, std=None),
    Experiment("L2 in the gradient", (1.116, 1.228), 20, std=None, l2=0.01),
    Experiment("truncated-normal init", (0.829, 0.934), 20),
    Experiment("both", (1.115, 1.228), 20, l2=0.01),
    Experiment("AdamW, decay 0.01", (0.831, 0.923), weight_decay=0.01),
    Experiment("AdamW, decay 0.1", (0.869, 0.945), weight_decay=0.1),
    Experiment("fastai's model, author's loop", None, weight_decay=0.1, is_fastai_model=True),
]


def predict_all_pairs(params, rows, columns, *, y_range):
    """The notebook's model: (b, B) predictions, biases of `rows` and dot products of `columns`."""
    (row_users, row_items), (users, items) = rows, columns
    biases = (params.user_bias[row_users] + params.item_bias[row_items]).unsqueeze(1)
    dot = (params.user_factors[users] * params.item_factors[items]).sum(1)
    return torch.sigmoid(biases + dot) * (y_range[1] - y_range[0]) + y_range[0]


def predict_columns(params, rows, columns, *, y_range):
    """fastai's model: (B,) predictions, which the author's loop compares with (b, 1) ratings."""
    return model.predict(params, *columns, head=model.bounded(*y_range))


def broadcast_loss_and_grad(params, users, items, ratings, *, n_users, predict):
    leaf = params[0].detach().requires_grad_()
    prediction = predict(model.split_table(leaf, n_users), (users, items), (users, items))
    loss = (prediction - ratings.unsqueeze(1)).square().mean()
    return loss.detach(), torch.autograd.grad(loss, leaf)


def broadcast_mse(params, part, *, predict):
    """The notebook's test figure: the mean over all pairs of test rows, a block of rows at once."""
    total, columns = 0.0, (part.users, part.items)
    for users, items, ratings in zip(*(column.split(256) for column in part), strict=True):
        prediction = predict(params, (users, items), columns)
        total += (prediction - ratings.unsqueeze(1)).square().double().sum().item()
    return total / len(part.ratings) ** 2


def with_l2(loss_and_grad, l2):
    """L2 in the gradient, as `torch.optim.Adam`'s weight_decay: Adam rescales it."""

    def regularised(params, *batch):
        loss, grads = loss_and_grad(params, *batch)
        return loss, [grad + l2 * param for grad, param in zip(grads, params, strict=True)]

    return regularised


def run(experiment, part, test_part, ids, *, broadcast, n_epochs, seed):
    """Return the training loss and the test MSE after the last epoch."""
    generator, n_users = torch.Generator().manual_seed(seed), len(ids.users)
    params = model.init_params(
        n_users,
        len(ids.items),
        n_factors=40,
        generator=generator,
        std=experiment.std or 1.0,
    )
    if experiment.std is None:
        params = model.Params(*(torch.randn(p.shape, generator=generator) for p in params))
    y_range = experiment.y_range
    if broadcast:
        predict = predict_columns if experiment.is_fastai_model else predict_all_pairs
        predict = partial(predict, y_range=y_range)
        loss_and_grad = partial(broadcast_loss_and_grad, n_users=n_users, predict=predict)
    else:
        head = model.bounded(*y_range)
        loss_and_grad = partial(model.loss_and_grad, n_users=n_users, head=head)
    if experiment.l2:
        loss_and_grad = with_l2(loss_and_grad, experiment.l2)
    batches = {"batch_size": 64, "drop_last": experiment.drop_last}
    n_steps = n_epochs * train.count_batches(len(part.ratings), **batches)
    if experiment.is_cyclic:
        pace = schedule.one_cycle(n_steps, lr_max=experiment.lr)
    else:
        pace = schedule.constant(lr=experiment.lr)
    table = model.join(params)
    for epoch in train.fit(  # noqa: B007
        [table],
        *part,
        loss_and_grad=loss_and_grad,
        optimizer=schedule.adamw(pace, weight_decay=experiment.weight_decay),
        n_epochs=n_epochs,
        generator=generator,
        **batches,
    ):
        pass
    params = model.split_table(table, n_users)
    if broadcast:
        mse = broadcast_mse(params, test_part, predict=predict)
    else:
        predict = partial(model.predict, params, head=head)
        mse = train.evaluate(predict, *test_part).mse
    return epoch.train_loss, mse


@click.command()
@click.option("--only", multiple=True, help="Run only the experiments whose name has this in it.")
@click.option("--epochs", type=click.IntRange(1), help="Cut every experiment to this many.")
@click.option("--seed", type=int, default=0, show_default=True)
def main(only, epochs, seed):
    """Run the notebook's experiments twice and print its figures beside ours."""
    torch.set_num_threads(1)
    folder = data.get_ml_100k(notice=lambda line: click.echo(line, err=True))
    part, test_part, ids = data.to_tensors(*data.split(data.read_ratings(folder / "u.data"), "ua"))
    click.echo("| experiment | notebook | the notebook's shapes | the right shapes |")
    click.echo("|---|---|---|---|")
    for experiment in EXPERIMENTS:
        if only and not any(name in experiment.name for name in only):
            continue
        figures = [experiment.notebook]
        for broadcast in (True, False):
            n_epochs = epochs or experiment.n_epochs
            losses = run(
                experiment, part, test_part, ids, broadcast=broadcast, n_epochs=n_epochs, seed=seed
            )
            figures.append(losses)
        cells = ["{:.3f}, {:.3f}".format(*pair) if pair else "crashed" for pair in figures]
        click.echo(f"| {' | '.join([experiment.name, *cells])} |")


if __name__ == "__main__":
    main()
