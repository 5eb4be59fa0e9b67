"""The training loop, a generator that yields after each epoch, and evaluation in one pass.

`fit` is the loop. `fit_rows` is the same for large tables, by an optimizer of rows; `fit_parallel`
for several processes. The three draw the same batches, yield the same epochs and resume after any.
`find_lr` tries learning rates; `evaluate` judges predicted ratings, `rank` lists of items.

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
from functools import partial
from itertools import chain, islice, pairwise, repeat
from typing import NamedTuple

import torch
from torch import Tensor


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


def _copy(params: Sequence[Tensor]) -> Sequence[Tensor]:
    tables = [param.clone() for param in params]
    return type(params)(*tables) if hasattr(params, "_fields") else tables


def _end_epoch(epoch: int, params, loss: Tensor, start: float, tree, generator) -> Epoch:
    """What an epoch begun at `start` yields, `tree` its state. ValueError for no finite `loss`."""
    train_loss = loss.item()
    if not math.isfinite(train_loss):
        raise ValueError(f"the loss is {train_loss} in epoch {epoch}: try a smaller lr")
    seconds = time.perf_counter() - start
    state = (*_find_tensors(tree), generator.get_state())
    return Epoch(epoch, params, train_loss, seconds, state)


def _find_tensors(tree) -> list[Tensor]:
    """All tensors in sequences and dicts of such, None for no tensor. ValueError for any other."""
    if isinstance(tree, Tensor):
        return [tree]
    if not isinstance(tree, Sequence | dict | None) or isinstance(tree, str):
        raise ValueError(f"the optimizer's state has {tree!r}, which is no tensor")
    branches = tree.values() if isinstance(tree, dict) else tree or ()
    return [tensor for branch in branches for tensor in _find_tensors(branch)]


def _resume_(tree, generator: torch.Generator, resume: tuple | None, n_epochs: int) -> int:
    """Copy the state in `resume` into the tensors of `tree` and `generator`; returns epochs done.

    ValueError for more epochs than `n_epochs`, and for a tensor that is missing or does not fit.
    """
    tensors = [*_find_tensors(tree), generator.get_state()]
    if resume is None:
        return 0
    n_done, state = resume
    if not 0 <= n_done <= n_epochs:
        raise ValueError(f"cannot resume after {n_done} of {n_epochs} epochs")
    if len(state) != len(tensors):
        raise ValueError(f"the state to resume from has {len(state)} tensors, not {len(tensors)}")
    for number, pair in enumerate(zip(state, tensors, strict=True)):
        saved, own = (f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in pair)
        if saved != own:
            raise ValueError(f"tensor {number} of the state to resume from is {saved}, not {own}")
    for saved, own in zip(state, tensors[:-1], strict=False):
        own.copy_(saved)
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
    batch's mean loss and the gradient of each of `params`. `optimizer` is two
    functions: `init(params)` makes its state, of tensors in lists, tuples or dicts, or None;
    `update_(params, grads, state, step)` changes both. The caller's `params`, a NamedTuple or a
    list, stay as they are.

    `resume = (epochs done, state)`, the `state` of that `Epoch`, goes on with the next epoch, all
    else as in the first call: of `params` the shapes alone count, `generator` is set. The epochs
    then have the bits of a training that went through; once all are done, none is left to yield.

    Errors come at the first `next`: ValueError for columns of different length, a state that does
    not fit, or when the loss is no longer finite.
    """
    n_rows = _count_rows(columns)
    n_batches = count_batches(n_rows, batch_size, drop_last=drop_last)
    n_drawn = min(n_batches * batch_size, n_rows)
    params = _copy(params)
    init, update_ = optimizer
    state = init(params)
    n_done = _resume_((params, state), generator, resume, n_epochs)
    step = n_done * n_batches
    for epoch in range(n_done + 1, n_epochs + 1):
        start = time.perf_counter()
        total = torch.zeros((), dtype=torch.float64)
        for batch in _shuffle(columns, n_drawn, batch_size, generator):
            loss, grads = loss_and_grad(params, *batch)
            update_(params, grads, state, step)
            # Read once an epoch: .item() here would be one more call a step.
            total += loss * len(batch[0])
            step += 1
        yield _end_epoch(epoch, params, total / n_drawn, start, (params, state), generator)


def _shuffle(columns: Sequence[Tensor], n_drawn: int, batch_size: int, generator) -> Iterator:
    """The batches of an epoch: the first `n_drawn` rows of a permutation, cut up."""
    order = torch.randperm(len(columns[0]), generator=generator)[:n_drawn]
    return zip(*(column[order].split(batch_size) for column in columns), strict=True)


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
    of one size, drawn anew whenever the rows are used up; the caller's `params` stay as they are.
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
    params = _copy(params)
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
    return torch.tensor(losses, dtype=torch.float64)


def fit_parallel(
    params: Sequence[Tensor],
    *columns: Tensor,
    n_rows: int,
    loss_and_grad: Callable,
    optimizer: tuple[Callable, Callable],
    n_epochs: int,
    batch_size: int,
    generator: torch.Generator,
    drop_last: bool = False,
    resume: tuple[int, Sequence[Tensor]] | None = None,
) -> Iterator[Epoch]:
    """`fit` by all processes of `torch.distributed` at once, each with its share of the columns.

    Of `n_rows` rows, process r of R holds r, r + R, r + 2R ..., as `deal` hands them out. Batches
    are those of `fit`: every process draws the same permutation, computes on the rows it holds of a
    batch, weighs its means by their share of the batch, and gets the sum of all processes' loss and
    gradients from one `all_reduce` a step. So `params`, `resume` and the state of `generator` must
    be the same in all, and each yields the epochs of `fit`, but for the rounding of sums in another
    order; the bits are the same for the same number of processes.
    `loss_and_grad` is called as by `fit` and with `rand`, to be used in place of `torch.rand` for
    random numbers of each row. The gradients that `update_` gets are overwritten in the next step.
    Source: Goyal et al. 2017, "Accurate, large minibatch SGD", remark 3 (means are of the whole
    batch); Li et al. 2020, "PyTorch Distributed" (gradient bucketing, here into one for all).

    ValueError as from `fit`, and for columns that are no share of `n_rows`; ConnectionError when
    another process has ended.
    """
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    n_batches = count_batches(n_rows, batch_size, drop_last=drop_last)
    if n_rows < size:
        raise ValueError(f"{n_rows} ratings are too few for {size} processes")
    if (n_held := _count_rows(columns)) != len(range(rank, n_rows, size)):
        raise ValueError(f"{n_held} of {n_rows} rows are no share of process {rank} of {size}")
    params = _copy(params)
    init, update_ = optimizer
    state, average = init(params), _make_average(params)
    n_done = _resume_((params, state), generator, resume, n_epochs)
    step = n_done * n_batches
    for epoch in range(n_done + 1, n_epochs + 1):
        start = time.perf_counter()
        order = torch.randperm(n_rows, generator=generator)[: n_batches * batch_size]
        rows, places, sizes, totals, weights = _find_parts(order, batch_size, rank, size)
        held = (places, *(column[rows] for column in columns))
        parts = zip(totals, weights, *(column.split(sizes) for column in held), strict=True)
        total = torch.zeros((), dtype=torch.float64)
        for n, weight, where, *part in parts:
            own = loss_and_grad(params, *part, rand=partial(_rand_rows, where, n))
            loss, grads = average(*own, weight)
            update_(params, grads, state, step)
            total += loss * n
            step += 1
        yield _end_epoch(epoch, params, total / len(order), start, (params, state), generator)


def _make_average(tables: Sequence[Tensor]) -> Callable:
    """A function of a process's loss, gradients and weight: their weighted sum over processes."""
    sizes = [table.numel() for table in tables]
    flat = tables[0].new_empty(1 + sum(sizes))
    loss, *sums = flat.split([1, *sizes])
    sums = [part.view_as(table) for part, table in zip(sums, tables, strict=True)]

    def average(own: Tensor, grads: Sequence[Tensor], weight: float) -> tuple:
        torch.cat([own.reshape(1), *(grad.reshape(-1) for grad in grads)], out=flat)
        call_together(torch.distributed.all_reduce, flat.mul_(weight))
        return loss[0], sums

    return average


def _rand_rows(places: Tensor, n: int, shape: Sequence[int], **options) -> Tensor:
    """The rows `places` of what `torch.rand` draws for a whole batch of `n`."""
    return torch.rand(n, *shape[1:], **options)[places]


def _find_parts(order: Tensor, batch_size: int, rank: int, size: int) -> tuple:
    """What one process holds of each batch of an epoch, the rows `order` (n,) cut by `batch_size`.

    Returns its rows in its own count (m,) and their places in their batches (m,); and for each
    batch how many of these are in it, how many rows it has in all, and the quotient. Where it holds
    none of a batch, its row 0 stands in with the quotient 0.
    """
    is_held = order % size == rank
    firsts = torch.arange(0, len(order), batch_size)
    totals = (len(order) - firsts).clamp_(max=batch_size)
    counts = torch.bincount(is_held.nonzero()[:, 0] // batch_size, minlength=len(firsts))
    stand_ins = firsts[counts == 0]
    order = order // size
    order[stand_ins], is_held[stand_ins] = 0, True
    found = is_held.nonzero()[:, 0]
    weights = (counts.double() / totals).tolist()
    sizes = counts.clamp_(min=1).tolist()
    return order[found], found % batch_size, sizes, totals.tolist(), weights


def deal(tensors: Sequence[Tensor] | None, *, by_row: bool) -> list[Tensor]:
    """Hand out process 0's `tensors`, each (N, ...), to all; the other processes pass None.

    By row, process r of R gets the rows r, r + R, r + 2R ... of each, otherwise all of each.
    ConnectionError when another process has ended.
    """
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def part(n_rows: int, rank: int) -> slice:
        return slice(rank, n_rows, size) if by_row else slice(n_rows)

    forms = [[(tensor.shape, tensor.dtype) for tensor in tensors or ()]]
    call_together(torch.distributed.broadcast_object_list, forms)
    if rank == 0:
        for tensor in tensors:
            for other in range(1, size):
                share = tensor[part(len(tensor), other)].contiguous()
                call_together(torch.distributed.send, share, other)
        return [tensor[part(len(tensor), 0)].contiguous() for tensor in tensors]
    shares = []
    for (n_rows, *rest), dtype in forms[0]:
        n_held = len(range(n_rows)[part(n_rows, rank)])
        shares.append(torch.empty(n_held, *rest, dtype=dtype))
        call_together(torch.distributed.recv, shares[-1], 0)
    return shares


def call_together(collective: Callable, *arguments):
    """Call a function of `torch.distributed`. ConnectionError when another process has ended."""
    try:
        collective(*arguments)
    except RuntimeError as error:
        raise ConnectionError("another process of this training has ended") from error


def fit_rows(
    table: Tensor,
    *columns: Tensor,
    offsets: Sequence[int],
    loss_and_grad_: Callable,
    optimizer: tuple,
    n_epochs: int,
    batch_size: int,
    generator: torch.Generator,
    drop_last: bool = False,
    block: int = 1 << 17,
    resume: tuple[int, Sequence[Tensor]] | None = None,
) -> Iterator[Epoch]:
    """`fit` for one large `table` (R, C), of which a step reads and writes the rows in its batch.

    Of `columns`, each (N,), the last is what is learnt, such as ratings, the others are rows of the
    table once their offset is added: users and items with `offsets=(0, n_users)`.
    `loss_and_grad_(rows, grads, targets)` is given two tensors (S, B, C), S = len(offsets), and the
    last column of some batches, (n, B). It returns two functions: one that for each batch in turn
    reads `rows` and writes the gradient of the mean loss in `rows[s]` to `grads[S - 1 - s]`, and
    one that gives the mean losses (n,) after the last. `optimizer` is as `schedule.sparse_adamw`
    returns it. Batches are those of `fit`, an epoch's `params` are the whole table as of its end.
    Memory beside table and columns is bounded by `block` ratings at a time.
    """
    n_rows = _count_rows(columns)
    n_batches = count_batches(n_rows, batch_size, drop_last=drop_last)
    init, steps_, wake, rest_, rests = optimizer
    state, since = init(table), torch.full((len(table) + 1,), -1)
    n_done = _resume_((state, since), generator, resume, n_epochs)
    step = n_done * n_batches
    for epoch in range(n_done + 1, n_epochs + 1):
        start = time.perf_counter()
        order = torch.randperm(n_rows, generator=generator)[: n_batches * batch_size]
        whole = max(len(order) // batch_size, 1)
        total = torch.zeros((), dtype=torch.float64)
        pauses = {rest - step for rest in rests if 0 < rest - step <= n_batches}
        cuts = {*range(0, whole, max(block // batch_size, 1)), whole, n_batches} | pauses
        for first, last in pairwise(sorted(cuts)):
            places = order[first * batch_size : last * batch_size]
            *sides, targets = (column[places].view(last - first, -1) for column in columns)
            sides = [side + offset for side, offset in zip(sides, offsets, strict=True)]
            losses = _run_(
                state, since, step, torch.stack(sides, 1), targets, steps_, loss_and_grad_
            )
            total += losses.sum(dtype=torch.float64) * targets.shape[1]
            step += last - first
            if step in rests:
                rest_(state, since[:-1], step)
        params = wake(state, since[:-1], step)
        yield _end_epoch(epoch, params, total / len(order), start, (state, since), generator)


@torch.inference_mode()  # a tenth less of a step; nothing here is differentiated
def _run_(state, since, step, rows, targets, steps_, loss_and_grad_) -> Tensor:
    """Do one step for each line of `rows` (n, S, B) and `targets` (n, B). Returns their losses."""
    n, n_sides, size = rows.shape
    rows, since_then, slots, order, starts = _list_rows(rows.view(n, -1), since, step)
    order = order + size * (n_sides - 1 - order // size * 2)  # the sides of grads are reversed
    pairs, pair_grads = state.new_zeros(2, n_sides, size, state.shape[2]).unbind()
    compute_, losses = loss_and_grad_(pairs, pair_grads, targets)
    pairs, pair_grads = pairs.view(n_sides * size, -1), pair_grads.view(n_sides * size, -1)
    steps = steps_(state, rows, since_then, step)
    values = next(steps)
    for slot, places, start in zip(slots.unbind(), order.unbind(), starts.unbind(), strict=True):
        torch.index_select(values, 0, slot, out=pairs)
        compute_()
        # A row's gradient is the sum over its pairs; in half the time of index_add_.
        values = steps.send(torch.embedding_bag(pair_grads, places, start)[0])
    return losses()


def _list_rows(rows: Tensor, since: Tensor, step: int) -> tuple[Tensor, ...]:
    """What the batches of `rows` (n, S), each a step, need to read each of their rows once.

    Returns the distinct rows of each batch (n, m), filled up with the last row of all; the step
    in which each was last in a batch (n, m); the place of each of `rows` among the distinct (n, S);
    and the other way round the places of each distinct row, one after another (n, S), and where
    among these each begins (n, m). `since` has the last step of all rows, before `step`, and is
    brought up to date.
    """
    n, size = rows.shape
    count = torch.arange(n * size)
    n_bits = len(count).bit_length()
    # Sorting row and place as one number is several times faster than a stable sort, and one of
    # 32 bits twice as fast again.
    key_type = torch.int32 if len(since) << n_bits < 1 << 31 else torch.int64
    key = rows.reshape(-1).to(key_type) << n_bits | count.to(key_type)
    ordered = key.sort().values.long()
    row, place = ordered >> n_bits, ordered & ((1 << n_bits) - 1)
    batch = place // size
    is_new_row = torch.ones(n * size, dtype=torch.bool)
    torch.ne(row[1:], row[:-1], out=is_new_row[1:])
    is_new = is_new_row.clone()
    is_new[1:] |= batch[1:] != batch[:-1]
    first = torch.where(is_new, count, 0).cummax(0).values  # of the same row in the same batch

    slot = torch.empty_like(row).scatter_(0, place, is_new.long()).view(n, size).cumsum(1).sub_(1)
    m = slot[:, -1].max().item() + 1
    slot = slot.view(-1).index_select(0, place.index_select(0, first))
    slots = torch.empty_like(row).scatter_(0, place, slot)
    before = since.index_select(0, row)
    before[1:] = torch.where(is_new_row[1:], before[1:], batch[:-1] + step)
    target = batch * m + slot
    distinct = torch.full((n * m,), len(since) - 1).scatter_(0, target, row)
    last_steps = torch.full((n * m,), -1).scatter_(0, target, before.index_select(0, first))
    is_end = is_new_row.roll(-1)
    since[row[is_end]] = batch[is_end] + step

    starts = torch.bincount(target, minlength=n * m).view(n, m)
    starts = starts.cumsum(1).sub_(starts)
    where = starts.view(-1).index_select(0, target).add_(count).sub_(first)
    start = batch * size
    order = torch.empty_like(row).scatter_(0, where.add_(start), place.sub_(start))
    return (
        distinct.view(n, m),
        last_steps.view(n, m),
        slots.view(n, size),
        order.view(n, size),
        starts,
    )


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
    given twice counts once. Of equal scores the lower item row comes first. With R the user's
    relevant items and rel_p = 1 if the item in place p = 1 ... k is in R, else 0, and hits their
    sum,

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
    n_users, sums = 0, torch.zeros(4, dtype=torch.float64)
    for rows in users.unique().split(max(block // n_items, 1)):
        is_seen = _mark(seen, rows, n_items)
        is_relevant = _mark(relevant, rows, n_items) & ~is_seen
        is_counted = is_relevant.any(1)
        top = _find_top(_score(scores, rows, n_items).masked_fill(is_seen, -math.inf), k)
        figures = _compare(is_relevant.gather(1, top), is_relevant.sum(1))
        sums += figures[:, is_counted].sum(1)
        n_users += is_counted.sum().item()
    if not n_users:
        raise ValueError("no user has a relevant item")
    return Ranking(*(sums / n_users).tolist(), n_users)


def _compare(is_hit: Tensor, n_relevant: Tensor) -> Tensor:
    """The four figures of `Ranking` (4, B) for each user's places (B, k) and count (B,)."""
    k = is_hit.shape[1]
    discounts = 1 / torch.arange(2, k + 2, dtype=torch.float64).log2()
    hits = is_hit.double()
    n_hits, ideal = hits.sum(1), discounts.cumsum(0)[n_relevant.clamp(1, k) - 1]
    return torch.stack([n_hits / k, n_hits / n_relevant, hits @ discounts / ideal, n_hits.sign()])


def _score(scores: Callable[[Tensor], Tensor], rows: Tensor, n_items: int) -> Tensor:
    found = scores(rows)
    if found.shape != (len(rows), n_items):
        shapes = f"{tuple(found.shape)}, not {(len(rows), n_items)}"
        raise ValueError(f"the scores' shape is {shapes}")
    if not found.isfinite().all():
        raise ValueError(f"of users {rows[0]} to {rows[-1]} a score is not finite")
    return found


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


def _find_top(scores: Tensor, k: int) -> Tensor:
    """The columns (B, k) of each line's highest `scores` (B, n), of equal ones the first columns.

    As a stable sort finds them, in a tenth of the time or less.
    """
    least = scores.topk(k).values[:, -1:]
    line, column = (scores >= least).nonzero(as_tuple=True)  # k a line, or more if some are equal
    order = scores[line, column].argsort(descending=True, stable=True)
    order = order[line[order].argsort(stable=True)]
    counts = torch.bincount(line, minlength=len(scores))
    firsts = counts.cumsum(0) - counts
    return column[order[firsts.unsqueeze(1) + torch.arange(k)]]
