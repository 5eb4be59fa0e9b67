"""The training loop, a generator that yields after each epoch, and evaluation in one pass.

`fit` is the loop, which `share` lets several processes run together; `find_lr` tries learning
rates; `evaluate` judges predicted ratings, `rank` lists of items.

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
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice, repeat
from typing import NamedTuple

import polars as pl
import torch
from torch import Tensor

SHUFFLED_AT_ONCE = 1 << 20  # rows

# The loop


class Epoch(NamedTuple):
    """What `fit` yields. The tensors go on changing in the next epoch: save or clone what you keep.

    `state` is what `resume` needs to go on after this epoch to the same bits, beside the arguments
    of the first call: a plain tuple, which `torch.save` writes and `torch.load` reads.
    """

    epoch: int  # 1-based
    params: Sequence[Tensor]
    train_loss: float  # mean over the epoch's ratings of the loss before each step
    seconds: float  # of this epoch's training alone
    state: tuple[Tensor, ...]  # tables, the optimizer's tensors, the generator's state


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


def _resume_(
    tensors: Sequence[Tensor], generator: torch.Generator, state: Sequence[Tensor]
) -> None:
    """Copy `state`, an `Epoch`'s, into `tensors` and `generator`. ValueError if it does not fit."""
    both = state, [*tensors, generator.get_state()]
    saved, own = ([f"{t.dtype} {tuple(t.shape)}" for t in tensors] for tensors in both)
    if saved != own:
        raise ValueError(f"the state to resume from is {saved}, not {own}")
    with torch.no_grad():
        for tensor, value in zip(tensors, state, strict=False):
            tensor.copy_(value)
    generator.set_state(state[-1])


def fit(
    params: Sequence[Tensor],
    *columns: Tensor,
    loss_and_grad: Callable,
    optimizer: tuple[Callable, Callable],
    n_epochs: int,
    batch_size: int,
    generator: torch.Generator,
    drop_last: bool = False,
    resume: tuple[int, Sequence[Tensor]] | None = None,
) -> Iterator[Epoch]:
    """Train on `columns`, such as users, items and ratings, each (N, ...), yielding each epoch.

    An epoch is one permutation of the N rows, drawn from `generator`, cut into batches;
    `drop_last` leaves out an incomplete last one. `loss_and_grad(params, *batch)` returns the
    batch's mean loss and the gradient of each of `params`, derived by hand or by autograd.
    `optimizer` is two functions: `init(params)` makes its state, a list with a tuple of tensors for
    each of `params`, or None; `update_(params, grads, state, step)` changes both. `params`, tensors
    or a module's parameters, are trained in place.

    `resume = (epochs done, state)`, the `state` of that `Epoch`, goes on with the next epoch, all
    else as in the first call: of `params` the shapes alone count, `generator` is set. The epochs
    then have the bits of a training that went through; once all are done, none is left to yield.

    Errors come at the first `next`: ValueError for columns of different length, a state that does
    not fit, or when the loss is no longer finite.
    """
    n_rows = _count_rows(columns)
    n_batches = count_batches(n_rows, batch_size, drop_last=drop_last)
    n_drawn = min(n_batches * batch_size, n_rows)
    params = list(params)  # net.parameters() can be gone through only once
    init, update_ = optimizer
    state = init(params)
    tensors = [*params, *chain.from_iterable(state or ())]
    n_done, saved = resume or (0, None)
    if not 0 <= n_done <= n_epochs:
        raise ValueError(f"cannot resume after {n_done} of {n_epochs} epochs")
    if saved is not None:
        _resume_(tensors, generator, saved)
    step = n_done * n_batches
    for epoch in range(n_done + 1, n_epochs + 1):
        start = time.perf_counter()
        losses = []  # read once an epoch: .item() here would be one more call a step
        for batch in _shuffle(columns, n_batches, batch_size, generator):
            loss, grads = loss_and_grad(params, *batch)
            update_(params, grads, state, step)
            losses.append(loss.detach())
            step += 1
        total = torch.stack(losses).double()
        total[-1] *= n_drawn / batch_size - (n_batches - 1)  # the last batch may be short
        train_loss = total.sum().item() * batch_size / n_drawn
        if not math.isfinite(train_loss):
            raise ValueError(f"the loss is {train_loss} in epoch {epoch}: try a smaller lr")
        seconds = time.perf_counter() - start
        yield Epoch(epoch, params, train_loss, seconds, (*tensors, generator.get_state()))


def _shuffle(columns: Sequence[Tensor], n_batches: int, batch_size: int, generator) -> Iterator:
    """The batches of an epoch: the first rows of a permutation, cut up."""
    n_rows = len(columns[0])
    # Half the size draws the same in a third of the time. Rows are copied some batches at a time:
    # a whole copy of the columns is what memory would hold most of.
    dtype = torch.int32 if n_rows < 1 << 31 else torch.int64
    order = torch.randperm(n_rows, generator=generator, dtype=dtype)[: n_batches * batch_size]
    for rows in order.split(batch_size * max(SHUFFLED_AT_ONCE // batch_size, 1)):
        copies = (column.index_select(0, rows).split(batch_size) for column in columns)
        yield from zip(*copies, strict=True)


# Learning rate range test


def find_lr(
    params: Sequence[Tensor],
    *columns: Tensor,
    loss_and_grad: Callable,
    optimizer: tuple[Callable, Callable],
    n_steps: int,
    batch_size: int,
    generator: torch.Generator,
) -> Tensor:
    """The learning rate range test: the smoothed losses (m,), float64, of one run of `n_steps`.

    The arguments are those of `fit`, with an `optimizer` whose lr grows from far too small to far
    too large, as by `schedule.exponential`; `schedule.suggest_lr` reads the curve. Batches are all
    of one size, drawn anew whenever the rows are used up; `params` are of no use afterwards.
    With the batch's loss l before each step, and t = step + 1,

        a = 0.98 a + 0.02 l,  smoothed = a / (1 - 0.98^t)

    The run ends, m < `n_steps`, with the first smoothed loss (of positive ones) above 4 times the
    least so far, or before the first that is not finite.
    Source: Smith 2017, "Cyclical learning rates for training neural networks", section 3.3;
    smoothing and rule to stop are fastai's `Recorder` and `LRFinder`.
    """
    n_batches = count_batches(_count_rows(columns), batch_size, drop_last=True)
    draws = (_shuffle(columns, n_batches, batch_size, generator) for _ in repeat(None))
    params = list(params)
    init, update_ = optimizer
    state, average, losses = init(params), 0.0, []
    for step, batch in enumerate(islice(chain.from_iterable(draws), n_steps)):
        loss, grads = loss_and_grad(params, *batch)
        average = 0.98 * average + (1 - 0.98) * loss.item()
        smoothed = average / (1 - 0.98 ** (step + 1))
        if math.isfinite(smoothed):
            losses.append(smoothed)
        if not math.isfinite(smoothed) or smoothed > 4 * min(losses):
            break
        update_(params, grads, state, step)
    return torch.tensor(losses, dtype=torch.float64)


# Several processes


def share(loss_and_grad: Callable) -> Callable:
    """`loss_and_grad` by all processes of `torch.distributed`, each on its rows of a batch.

    All call it with the same `params` and the same batch. Process r of R takes the rows r, r + R,
    r + 2R ..., and one `all_reduce` sums loss and gradients, each process's means weighed by its
    share of the batch: what `fit` makes of it in each process is what it would make alone, but for
    the rounding of sums in another order. Random numbers of each row, such as those of
    `model.with_dropout`, are drawn for the whole batch, so before this function: they are tensors
    like the columns, given by position or by name.
    Source: Goyal et al. 2017, "Accurate, large minibatch SGD", remark 3 (means are of the whole
    batch); Li et al. 2020, "PyTorch Distributed" (gradient bucketing, here into one for all).

    ConnectionError when another process has ended.
    """
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def shared(params, *batch: Tensor, **more: Tensor) -> tuple[Tensor, list[Tensor]]:
        n_rows = len(batch[0])
        rows = slice(rank, None, size) if rank < n_rows else slice(1)  # the latter weighs nothing
        part = [column[rows] for column in batch]
        weight = len(part[0]) / n_rows if rank < n_rows else 0.0
        more = {name: column[rows] for name, column in more.items()}
        loss, grads = loss_and_grad(params, *part, **more)
        flat = torch.cat([loss.reshape(1), *(grad.reshape(-1) for grad in grads)]).mul_(weight)
        call_together(torch.distributed.all_reduce, flat)
        loss, *sums = flat.split([1, *(grad.numel() for grad in grads)])
        return loss[0], [part.view_as(grad) for part, grad in zip(sums, grads, strict=True)]

    return shared


def call_together(collective: Callable, *arguments) -> None:
    """Call a function of `torch.distributed`, and wait for it as Ctrl-C and signals can end.

    ConnectionError when another process has ended.
    """
    try:
        work = collective(*arguments, async_op=True)
        while not work.is_completed():  # wait() itself would hold signals up till it is done
            time.sleep(1e-4)
        work.wait()
    except RuntimeError as error:
        raise ConnectionError("another process of this training has ended") from error


def broadcast(value=None):
    """The `value` of process 0, which pickle must take, in all; that of the others is ignored."""
    content = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    length = torch.tensor(len(content))
    call_together(torch.distributed.broadcast, length, 0)
    if torch.distributed.get_rank():
        content = torch.empty(length.item(), dtype=torch.uint8)
    call_together(torch.distributed.broadcast, content, 0)
    return pickle.loads(content.numpy())


# Errors and ranking


class Errors(NamedTuple):
    """Mean squared error, its root, and mean absolute error."""

    mse: float
    rmse: float
    mae: float


def evaluate(
    predict: Callable[..., Tensor],
    users: Tensor,
    items: Tensor,
    ratings: Tensor,
    *context: Tensor,
    clip: tuple[float, float] | None = None,
    block: int = 1 << 17,
) -> Errors:
    """Errors of `predict(users, items, *context)` on all of `ratings`, each (N, ...).

    `predict` is given `block` pairs at a time, `clip = (low, high)` bounds what it predicts, sums
    are in float64. ValueError for no ratings, predictions of another shape than (N,), or an error
    that is not finite.
    """
    if not _count_rows((users, items, ratings, *context)):
        raise ValueError("there are 0 ratings")
    blocks = zip(*(column.split(block) for column in (users, items, *context)), strict=True)
    predicted = torch.cat([predict(*rows) for rows in blocks])
    if predicted.shape != ratings.shape:
        shapes = f"{tuple(predicted.shape)}, the ratings' is {tuple(ratings.shape)}"
        raise ValueError(f"the prediction's shape is {shapes}")
    error = ((predicted if clip is None else predicted.clamp(*clip)) - ratings).double()
    mse = error.dot(error).item() / len(ratings)
    if not math.isfinite(mse):
        raise ValueError(f"the mean squared error is {mse}")
    return Errors(mse, mse**0.5, error.abs().sum().item() / len(ratings))


def rank(lists: pl.DataFrame, relevant: pl.DataFrame, *, k: int) -> dict[str, float]:
    """How well the first `k` items of users' lists hit those that are relevant: means over users.

    `lists` has columns user, rank (from 1 to k) and item, `relevant` user and item, each pair once.
    With R a user's relevant items, and rel_p = 1 if the item in place p is in R, else 0, and hits
    their sum,

        precision = hits / k,  recall = hits / |R|,  hit_rate = 1 if hits > 0 else 0
        mrr = 1 / the first place p of rel_p = 1, or 0
        ndcg = sum of rel_p / log2(p + 1) over p <= k / sum of 1 / log2(p + 1) over p <= min(k, |R|)

    and n_users is the number of users that have relevant items, whom the means are over.
    Source: Järvelin & Kekäläinen 2002, "Cumulated gain-based evaluation of IR techniques"; that the
    second place is discounted too is of Burges et al. 2005, "Learning to rank using gradient
    descent".
    """
    gain = (1 / (pl.col("rank") + 1).log(2)).sum()
    hits = lists.join(relevant, ["user", "item"], "semi").group_by("user")
    users = relevant.group_by("user").agg(n=pl.len())
    found = hits.agg(hits=pl.len(), gain=gain, mrr=1 / pl.col("rank").min())
    users = users.join(found, "user", "left").sort("user")
    ideal = pl.select(1 / (pl.int_range(2, k + 2) + 0.0).log(2).alias("x")).to_series()
    places = pl.col("n").clip(1, k) - 1
    figures = users.fill_null(0).select(
        precision=pl.col("hits") / k,
        recall=pl.col("hits") / pl.col("n"),
        ndcg=pl.col("gain") / pl.lit(ideal.cum_sum()).gather(places),
        hit_rate=(pl.col("hits") > 0).cast(pl.Float64),
        mrr="mrr",
    )
    return {**figures.mean().row(0, named=True), "n_users": len(users)}
