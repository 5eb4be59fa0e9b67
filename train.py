"""The training loop, a generator that yields after each epoch, and evaluation in one pass.

>>> import torch
>>> from train import evaluate, fit
>>> rows, ratings = torch.arange(8), torch.full((8,), 3.0)
>>> def loss_and_grad(params, users, items, ratings):  # one number, predicted for every pair
...     error = params[0] - ratings.mean()
...     return error.square(), [2 * error]
>>> def update_(params, grads, state, step):
...     params[0].sub_(grads[0] / 4)
>>> for epoch in fit([torch.tensor(0.0)], rows, rows, ratings, loss_and_grad=loss_and_grad,
...                  optimizer=(lambda params: None, update_),
...                  n_epochs=9, batch_size=4, generator=torch.Generator()):
...     pass
>>> constant = epoch.params[0]
>>> evaluate(lambda users, items: constant.expand(len(users)), rows, rows, ratings).rmse < 1e-4
True
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Epoch(NamedTuple):
    """What `fit` yields. `params` goes on changing in the next epoch: clone what you keep."""

    epoch: int  # 1-based
    params: Sequence[Tensor]
    train_loss: float  # mean over the epoch's ratings of the loss before each step
    seconds: float  # of this epoch's training alone


class Errors(NamedTuple):
    """Mean squared error, its root, and mean absolute error."""

    mse: float
    rmse: float
    mae: float


def count_batches(n_ratings: int, batch_size: int, *, drop_last: bool = False) -> int:
    """The number of steps an epoch takes; a set smaller than one batch is one batch.

    >>> count_batches(90570, 64), count_batches(90570, 64, drop_last=True), count_batches(9, 64)
    (1416, 1415, 1)
    """
    if n_ratings < 1 or batch_size < 1:
        raise ValueError(f"cannot cut {n_ratings} ratings into batches of {batch_size}")
    whole, rest = divmod(n_ratings, batch_size)
    return max(whole + (rest > 0 and not drop_last), 1)


def _count_rows(columns: Sequence[Tensor]) -> int:
    counts = [len(column) for column in columns]
    if len(set(counts)) != 1:
        raise ValueError(f"the columns have {', '.join(map(str, counts))} rows")
    return counts[0]


def fit(
    params: Sequence[Tensor],
    *columns: Tensor,
    loss_and_grad: Callable,
    optimizer: tuple[Callable, Callable],
    n_epochs: int,
    batch_size: int,
    generator: torch.Generator,
    drop_last: bool = False,
) -> Iterator[Epoch]:
    """Train on `columns`, such as users, items and ratings, each (N, ...), yielding each epoch.

    An epoch is one permutation of the N rows, drawn from `generator`, cut into batches;
    `drop_last` leaves out an incomplete last one. `loss_and_grad(params, *batch)` returns the
    batch's mean loss and the gradient of each of `params`. `optimizer` is two
    functions: `init(params)` makes its state, `update_(params, grads, state, step)` changes both.
    The caller's `params`, a NamedTuple or a list, stay as they are. Errors come at the first
    `next`: ValueError for columns of different length, or when the loss is no longer finite.
    """
    n_rows = _count_rows(columns)
    n_batches = count_batches(n_rows, batch_size, drop_last=drop_last)
    tables = [param.clone() for param in params]
    params = type(params)(*tables) if hasattr(params, "_fields") else tables
    init, update_ = optimizer
    state, step = init(params), 0
    for epoch in range(1, n_epochs + 1):
        start = time.perf_counter()
        order = torch.randperm(n_rows, generator=generator)[: n_batches * batch_size]
        shuffled = (column[order].split(batch_size) for column in columns)
        total = torch.zeros((), dtype=torch.float64)
        for batch in zip(*shuffled, strict=True):
            loss, grads = loss_and_grad(params, *batch)
            update_(params, grads, state, step)
            # Read once an epoch: .item() here would be one more call a step.
            total += loss * len(batch[0])
            step += 1
        train_loss = total.item() / len(order)
        if not math.isfinite(train_loss):
            raise ValueError(f"the loss is {train_loss} in epoch {epoch}: try a smaller lr")
        yield Epoch(epoch, params, train_loss, time.perf_counter() - start)


def evaluate(
    predict: Callable[..., Tensor],
    users: Tensor,
    items: Tensor,
    ratings: Tensor,
    *context: Tensor,
    clip: tuple[float, float] | None = None,
    block: int = 1 << 17,
) -> Errors:
    """Errors of `predict(users, items, *context)` on all of `ratings`, each (N, ...), in one pass.

    `clip = (low, high)` bounds the predictions first. Memory is bounded by `block` pairs at a time,
    sums are in float64. ValueError for no ratings, a prediction of another shape than (N,), or an
    error that is not finite.
    """
    if not _count_rows((users, items, ratings, *context)):
        raise ValueError("there are 0 ratings")
    squared = absolute = 0.0
    columns = (column.split(block) for column in (ratings, users, items, *context))
    for target, *rows in zip(*columns, strict=True):
        prediction = predict(*rows)
        if prediction.shape != target.shape:
            shapes = f"{tuple(prediction.shape)}, the ratings' is {tuple(target.shape)}"
            raise ValueError(f"the prediction's shape is {shapes}")
        if clip is not None:
            prediction = prediction.clamp(*clip)
        error = (prediction - target).double()
        squared += error.dot(error).item()
        absolute += error.abs().sum().item()
    mse = squared / len(ratings)
    if not math.isfinite(mse):
        raise ValueError(f"the mean squared error is {mse}")
    return Errors(mse, mse**0.5, absolute / len(ratings))
