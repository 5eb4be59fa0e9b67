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
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice, repeat
from typing import NamedTuple

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


class Errors(NamedTuple):
    """Mean squared error, its root, and mean absolute error."""

    mse: float
    rmse: float
    mae: float


class Ranking(NamedTuple):
    """Means over users of how well the first k of a list of items hit those that are relevant."""

    precision: float  # share of the k that is relevant
    recall: float  # share of the relevant that is among the k
    ndcg: float  # hits weighted by place, over the most that this could be
    hit_rate: float  # share of users with a hit
    n_users: int  # with a relevant item


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
    tensors: Sequence[Tensor], generator: torch.Generator, resume: tuple | None, n_epochs: int
) -> int:
    """Copy the state in `resume` into `tensors` and `generator`; returns epochs done.

    ValueError for more epochs than `n_epochs`, and for a tensor that is missing or does not fit.
    """
    if resume is None:
        return 0
    n_done, state = resume
    if not 0 <= n_done <= n_epochs:
        raise ValueError(f"cannot resume after {n_done} of {n_epochs} epochs")
    saved, own = (
        [f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in each]
        for each in (state, [*tensors, generator.get_state()])
    )
    if saved != own:
        raise ValueError(f"the state to resume from is {saved}, not {own}")
    with torch.no_grad():
        for tensor, value in zip(tensors, state, strict=False):
            tensor.copy_(value)
    generator.set_state(state[-1])
    return n_done


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
    params = params if isinstance(params, Sequence) else list(params)  # net.parameters(): once
    init, update_ = optimizer
    state = init(params)
    tensors = [*params, *chain.from_iterable(state or ())]
    n_done = _resume_(tensors, generator, resume, n_epochs)
    step = n_done * n_batches
    for epoch in range(n_done + 1, n_epochs + 1):
        start = time.perf_counter()
        losses = []  # read once an epoch: .item() here would be one more call a step
        for batch in _shuffle(columns, n_drawn, batch_size, generator):
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


def _shuffle(columns: Sequence[Tensor], n_drawn: int, batch_size: int, generator) -> Iterator:
    """The batches of an epoch: the first `n_drawn` rows of a permutation, cut up."""
    n_rows = len(columns[0])
    # Half the size draws the same in a third of the time. Rows are copied some batches at a time:
    # a whole copy of the columns is what memory would hold most of.
    dtype = torch.int32 if n_rows < 1 << 31 else torch.int64
    order = torch.randperm(n_rows, generator=generator, dtype=dtype)[:n_drawn]
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
    stop: float = 4.0,
    smoothing: float = 0.98,
) -> Tensor:
    """The learning rate range test: the smoothed losses (m,), float64, of one run of `n_steps`.

    The arguments are those of `fit`, with an `optimizer` whose lr grows from far too small to far
    too large, as by `schedule.exponential`; `schedule.suggest_lr` reads the curve. Batches are all
    of one size, drawn anew whenever the rows are used up; `params` are put back at the end.
    With the batch's loss l before each step, and s = `smoothing`,

        a = s a + (1 - s) l,  smoothed = a / (1 - s^t),  t = step + 1

    The run ends, m < `n_steps`, with the first smoothed loss above `stop` times the least so far,
    or before the first that is not finite. Losses must be positive for `stop` to have a meaning.
    Source: Smith 2017, "Cyclical learning rates for training neural networks", section 3.3;
    smoothing and rule to stop are fastai's `Recorder` and `LRFinder`.

    ValueError for columns of different length, `n_steps` < 1, or `smoothing` outside [0, 1).
    """
    if n_steps < 1:
        raise ValueError(f"n_steps must be at least 1, not {n_steps}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be in [0, 1), not {smoothing}")
    n_rows = _count_rows(columns)
    n_drawn = min(count_batches(n_rows, batch_size, drop_last=True) * batch_size, n_rows)
    draws = (_shuffle(columns, n_drawn, batch_size, generator) for _ in repeat(None))
    params = params if isinstance(params, Sequence) else list(params)
    before = [param.detach().clone() for param in params]
    init, update_ = optimizer
    state, average, least, losses = init(params), 0.0, math.inf, []
    for step, batch in enumerate(islice(chain.from_iterable(draws), n_steps)):
        loss, grads = loss_and_grad(params, *batch)
        average = smoothing * average + (1 - smoothing) * loss.item()
        smoothed = average / (1 - smoothing ** (step + 1))
        if not math.isfinite(smoothed):
            break
        losses.append(smoothed)
        least = min(least, smoothed)
        if step and smoothed > stop * least:
            break
        update_(params, grads, state, step)
    with torch.no_grad():
        for param, value in zip(params, before, strict=True):
            param.copy_(value)
    return torch.tensor(losses, dtype=torch.float64)


# Several processes


def share(loss_and_grad: Callable) -> Callable:
    """`loss_and_grad` by all processes of `torch.distributed`, each on its rows of a batch.

    All call it with the same `params` and the same batch. Process r of R takes the rows r, r + R,
    r + 2R ..., and one `all_reduce` sums loss and gradients, each process's means weighed by its
    share of the batch: what `fit` makes of it in each process is what it would make alone, but for
    the rounding of sums in another order. `loss_and_grad` is called with `rand` besides, to be used
    in place of `torch.rand` for random numbers of each row.
    Source: Goyal et al. 2017, "Accurate, large minibatch SGD", remark 3 (means are of the whole
    batch); Li et al. 2020, "PyTorch Distributed" (gradient bucketing, here into one for all).

    ConnectionError when another process has ended.
    """
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def shared(params: Sequence[Tensor], *batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        n_rows = len(batch[0])
        rows = slice(rank, None, size) if rank < n_rows else slice(1)  # the latter weighs nothing
        part = [column[rows] for column in batch]
        weight = len(part[0]) / n_rows if rank < n_rows else 0.0

        def rand(shape: Sequence[int], **options) -> Tensor:
            return torch.rand(n_rows, *shape[1:], **options)[rows]

        loss, grads = loss_and_grad(params, *part, rand=rand)
        flat = torch.cat([loss.reshape(1), *(grad.reshape(-1) for grad in grads)]).mul_(weight)
        call_together(torch.distributed.all_reduce, flat)
        loss, *sums = flat.split([1, *(grad.numel() for grad in grads)])
        return loss[0], [part.view_as(grad) for part, grad in zip(sums, grads, strict=True)]

    return shared


def call_together(collective: Callable, *arguments):
    """Call a function of `torch.distributed`. ConnectionError when another process has ended."""
    try:
        collective(*arguments)
    except RuntimeError as error:
        raise ConnectionError("another process of this training has ended") from error


# Errors and ranking


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


def rank(
    scores: Callable[[Tensor], Tensor],
    users: Tensor,
    items: Tensor,
    *,
    seen: tuple[Tensor, Tensor],
    k: int,
    n_items: int,
    block: int = 1 << 20,
) -> Ranking:
    """How well the `k` items of highest score hit each user's relevant ones, `users`, `items` (N,).

    `scores(rows)` returns (B, n_items) for the users in `rows` (B,), all different. Items that
    `seen` has for a user, such as those of training, are neither proposed nor relevant: `seen` is
    (starts (n_users + 1,), items (M,)), those of user i from starts[i] up to starts[i + 1]. A pair
    given twice counts once. With R the user's relevant items and rel_p = 1 if the item in place
    p = 1 ... k is in R, else 0, and hits their sum,

        precision = hits / k,  recall = hits / |R|,  hit rate = 1 if hits > 0 else 0
        ndcg = sum of rel_p / log2(p + 1) over p <= k / sum of 1 / log2(p + 1) over p <= min(k, |R|)

    each a mean over the users with a relevant item; where a user has fewer than k items left to
    propose, the other places are no hits. Memory is bounded by `block` scores at a time, or by one
    user's; sums are in float64.
    Source: Järvelin & Kekäläinen 2002, "Cumulated gain-based evaluation of IR techniques"; that the
    second place is discounted too is of Burges et al. 2005, "Learning to rank using gradient
    descent".

    ValueError for a `k` outside 1 to `n_items`, users and items of different length, no user with a
    relevant item, scores of another shape or not finite.
    """
    if not 1 <= k <= n_items:
        raise ValueError(f"k must be from 1 to the {n_items} items, not {k}")
    _count_rows((users, items))
    counts = torch.bincount(users, minlength=len(seen[0]) - 1)
    relevant = torch.cat([counts.new_zeros(1), counts.cumsum(0)]), items[users.argsort()]
    discounts = 1 / torch.arange(2, k + 2, dtype=torch.float64).log2()
    n_users, sums = 0, torch.zeros(4, dtype=torch.float64)
    for rows in users.unique().split(max(block // n_items, 1)):
        found = scores(rows)
        if found.shape != (len(rows), n_items) or not found.isfinite().all():
            shapes = f"{tuple(found.shape)}, not {(len(rows), n_items)}, or one is not finite"
            raise ValueError(f"of users {rows[0]} to {rows[-1]} the scores' shape is {shapes}")
        is_seen = _mark(seen, rows, n_items)
        is_relevant = _mark(relevant, rows, n_items) & ~is_seen
        top = found.masked_fill(is_seen, -math.inf).topk(k).indices
        hits, n_relevant = is_relevant.gather(1, top).double(), is_relevant.sum(1)
        n_hits, ideal = hits.sum(1), discounts.cumsum(0)[n_relevant.clamp(1, k) - 1]
        figures = [n_hits / k, n_hits / n_relevant, hits @ discounts / ideal, n_hits.sign()]
        sums += torch.stack(figures)[:, n_relevant > 0].sum(1)
        n_users += (n_relevant > 0).sum().item()
    if not n_users:
        raise ValueError("no user has a relevant item")
    return Ranking(*(sums / n_users).tolist(), n_users)


def _mark(lists: tuple[Tensor, Tensor], rows: Tensor, n_items: int) -> Tensor:
    """Which items (B, n_items) the users in `rows` (B,) have in `lists`, starts and items."""
    starts, items = lists
    counts = starts[rows + 1] - starts[rows]
    line = torch.arange(len(rows)).repeat_interleave(counts)
    shifts = starts[rows] - (counts.cumsum(0) - counts)
    place = torch.arange(len(line)) + shifts[line]
    marks = torch.zeros(len(rows), n_items, dtype=torch.bool)
    marks[line, items[place].long()] = True
    return marks
