"""Settle the notebook's question: each of its experiments, with its shapes and with them right.

`python tests/tools/reproduce.py` runs them on ml-100k's ua split and prints the notebook's figures
beside ours: the last epoch's training loss and test MSE, of predictions that are not clipped.

The notebook adds biases of shape (B, 1) to dot products of shape (B,). The sum is (B, B), with the
biases of pair i in row i and the dot product of pair j in column j, and its loss averages over all
of them. With fastai's model the predictions are (B,), but its loop compares them with targets of
shape (B, 1): every prediction with every rating.
"""

from functools import partial
from typing import NamedTuple

import click
import torch
from common import echo_heads, echo_row, notice

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
    Experiment("fastai's settings", (0.352, 0.900), 10, (0, 5.5), weight_decay=0.1, drop_last=True),
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


def choose_shapes(experiment, n_users, broadcast):
    """`loss_and_grad`, and a function of params and test part that finds the test MSE."""
    if not broadcast:
        head = model.bounded(*experiment.y_range)
        loss_and_grad = partial(model.loss_and_grad, n_users=n_users, head=head)

        def find_mse(params, part):
            return train.evaluate(partial(model.predict, params, head=head), *part).mse

        return loss_and_grad, find_mse
    predict = predict_columns if experiment.is_fastai_model else predict_all_pairs
    predict = partial(predict, y_range=experiment.y_range)
    loss_and_grad = partial(broadcast_loss_and_grad, n_users=n_users, predict=predict)
    return loss_and_grad, partial(broadcast_mse, predict=predict)


def with_l2(loss_and_grad, l2):
    """L2 in the gradient, as `torch.optim.Adam`'s weight_decay: Adam rescales it."""

    def regularised(params, *batch):
        loss, grads = loss_and_grad(params, *batch)
        return loss, [grad + l2 * param for grad, param in zip(grads, params, strict=True)]

    return regularised


def run(experiment, part, test_part, ids, *, broadcast):
    """Return the training loss and the test MSE after the last epoch."""
    generator, n_users, lr = torch.Generator().manual_seed(0), len(ids.users), experiment.lr
    options = {"n_factors": 40, "generator": generator, "std": experiment.std or 1.0}
    params = model.init_params(*map(len, ids), **options)
    if experiment.std is None:
        params = [torch.randn(table.shape, generator=generator) for table in params]
    table = model.join(model.Params(*params))
    loss_and_grad, find_mse = choose_shapes(experiment, n_users, broadcast)
    if experiment.l2:
        loss_and_grad = with_l2(loss_and_grad, experiment.l2)
    options = {"batch_size": 64, "drop_last": experiment.drop_last}
    n_steps = experiment.n_epochs * train.count_batches(len(part.ratings), **options)
    cycle, steady = schedule.one_cycle(n_steps, lr_max=lr), schedule.Pace(lr, 0.9)
    pace = cycle if experiment.is_cyclic else lambda step: steady
    options["optimizer"] = schedule.adamw(pace, weight_decay=experiment.weight_decay)
    options |= {"n_epochs": experiment.n_epochs, "generator": generator}
    *_, last = train.fit([table], *part, loss_and_grad=loss_and_grad, **options)
    return last.train_loss, find_mse(model.split_table(table, n_users), test_part)


@click.command()
def main():
    """Run the notebook's experiments twice and print its figures beside ours."""
    torch.set_num_threads(1)
    ratings = data.read_ratings(data.get_dataset("ml-100k", notice=notice))
    parts = data.to_tensors(*data.split(ratings, "ua"))
    echo_heads("experiment", "notebook", "the notebook's shapes", "the right shapes")
    for experiment in EXPERIMENTS:
        both = [run(experiment, *parts, broadcast=broadcast) for broadcast in (True, False)]
        pairs = experiment.notebook, *both
        cells = ("{:.3f}, {:.3f}".format(*pair) if pair else "crashed" for pair in pairs)
        echo_row(experiment.name, *cells)


if __name__ == "__main__":
    main()
