"""One-cycle learning rate and momentum, decoupled weight decay and Adam, written by hand.

`adamw` moves whole tables; `sparse_adamw`, to the same numbers, the rows of a batch alone.
`exponential` and `suggest_lr` are the two ends of a learning rate range test.

>>> import torch
>>> from schedule import adamw, one_cycle
>>> target, param = torch.tensor([1.0, 2.0]), torch.zeros(2)
>>> optimizer = adamw(one_cycle(200, lr_max=0.1))
>>> state = optimizer.init([param])
>>> for step in range(200):
...     optimizer.update_([param], [param - target], state, step)
>>> param.round(decimals=3).tolist()
[1.0, 2.0]
"""

import math
from collections.abc import Callable, Generator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Pace(NamedTuple):
    """What a schedule gives for one step."""

    lr: float
    momentum: float  # Adam's beta1


Schedule = Callable[[int], Pace]


def constant(*, lr: float, momentum: float = 0.9) -> Schedule:
    """The same `lr` and `momentum` at every step.

    >>> constant(lr=0.005)(123)
    Pace(lr=0.005, momentum=0.9)
    """
    pace = Pace(lr, momentum)
    return lambda step: pace


def one_cycle(
    n_steps: int,
    *,
    lr_max: float,
    warm_up: float = 0.3,
    div: float = 25.0,
    final_div: float = 25e4,
    momentum_max: float = 0.95,
    momentum_min: float = 0.85,
) -> Schedule:
    """The one-cycle policy as a function of `step`, 0-based, in fastai v1's convention.

    With `n_up = int(n_steps * warm_up)` and `cos(a, b, frac) = a + (b - a) (1 - cos(pi frac)) / 2`:

        step < n_up:  lr = cos(lr_max / div, lr_max, step / n_up)
        then:         lr = cos(lr_max, lr_max / final_div, (step - n_up) / (n_steps - n_up))

    and momentum runs between `momentum_max` and `momentum_min` in mirror image. The peak is at step
    `n_up`; the end, `lr_max / final_div`, would be at step `n_steps`, and stays from there on.

    Source: Smith 2018, "A disciplined approach to neural network hyper-parameters: part 1"; half
    cosines, 30 % and the divisors are fastai v1's.

    >>> [round(one_cycle(10, lr_max=1.0)(step).lr, 4) for step in (0, 1, 3, 9, 10)]
    [0.04, 0.28, 1.0, 0.0495, 0.0]
    """
    if n_steps < 1:
        raise ValueError(f"n_steps must be at least 1, not {n_steps}")
    if not 0 <= warm_up < 1:
        raise ValueError(f"warm_up must be in [0, 1), not {warm_up}")
    n_up = int(n_steps * warm_up)

    def at(step: int) -> Pace:
        if step < n_up:
            frac, lr_start, lr_end = step / n_up, lr_max / div, lr_max
            momentum_start, momentum_end = momentum_max, momentum_min
        else:
            frac, lr_start, lr_end = (step - n_up) / (n_steps - n_up), lr_max, lr_max / final_div
            momentum_start, momentum_end = momentum_min, momentum_max
        return Pace(_cos(lr_start, lr_end, frac), _cos(momentum_start, momentum_end, frac))

    return at


def _cos(start: float, end: float, frac: float) -> float:
    return start + (end - start) * (1 - math.cos(math.pi * min(frac, 1.0))) / 2


def exponential(n_steps: int, *, lr_min: float, lr_max: float, momentum: float = 0.9) -> Schedule:
    """For the learning rate range test: lr grows by the same factor at every step.

        lr = lr_min^(1 - frac) lr_max^frac,  frac = step / (n_steps - 1)

    It stays at `lr_max` after the last step, as `momentum` does throughout. ValueError for less
    than two steps, or where not 0 < lr_min < lr_max.

    >>> [round(exponential(4, lr_min=0.01, lr_max=10)(step).lr, 9) for step in range(5)]
    [0.01, 0.1, 1.0, 10.0, 10.0]
    """
    if n_steps < 2:
        raise ValueError(f"n_steps must be at least 2, not {n_steps}")
    if not 0 < lr_min < lr_max:
        raise ValueError(f"lr cannot grow from {lr_min:g} to {lr_max:g}")

    def at(step: int) -> Pace:
        frac = min(step / (n_steps - 1), 1.0)
        return Pace(lr_min ** (1 - frac) * lr_max**frac, momentum)

    return at


class Suggestion(NamedTuple):
    """Two learning rates read off a range test's curve."""

    valley: float  # half-way through the longest fall
    steepest: float  # where the loss falls fastest in log lr


def suggest_lr(
    lrs: Sequence[float] | Tensor,
    losses: Sequence[float] | Tensor,
    *,
    n_steps: int | None = None,
) -> Suggestion:
    """Where the curve of a range test, smoothed `losses` (m,) over growing `lrs` (m,), falls best.

    The first `n_steps // 10` points and the last 5 are left out, `n_steps` being what the test was
    to take, m unless given. Of the rest, by index from 0:

        valley: lrs[max(end - L + int(L / 3) + int(L / 6), 0)], L the length of the longest
            subsequence of ever smaller losses, gaps allowed, `end` where the first such ends
        steepest: lrs[i] for the least (losses[i + 1] - losses[i]) / (log lrs[i + 1] - log lrs[i])

    Source: fastai 2, `lr_find`, `valley` and `steep` of callback/schedule.py; but at 0 the index
    of the valley is held here, where fastai's may be -1, the last point.

    ValueError for columns of different length, fewer than 2 points left, an lr that does not grow
    or a loss that is not finite.
    """
    if len(lrs) != len(losses):
        raise ValueError(f"there are {len(lrs)} lrs and {len(losses)} losses")
    kept = slice((len(lrs) if n_steps is None else n_steps) // 10, -5)
    lrs, losses = (torch.as_tensor(x, dtype=torch.float64)[kept].tolist() for x in (lrs, losses))
    if len(lrs) < 2:
        raise ValueError(f"{len(lrs)} points are left of the curve, at least 2 are needed")
    if not all(map(math.isfinite, losses)):
        raise ValueError("a loss of the curve is not finite")
    if not all(0 < lr < after for lr, after in pairwise(lrs)):
        raise ValueError("the lrs of the curve do not grow")
    slopes = [
        (loss_after - loss) / math.log(lr_after / lr)
        for (lr, loss), (lr_after, loss_after) in pairwise(zip(lrs, losses, strict=True))
    ]
    return Suggestion(lrs[_find_valley(losses)], lrs[slopes.index(min(slopes))])


def _find_valley(losses: Sequence[float]) -> int:
    lengths = []  # of the longest fall that ends at each point
    for loss in losses:
        before = zip(lengths, losses, strict=False)
        lengths.append(1 + max((n for n, above in before if above > loss), default=0))
    longest = max(lengths)
    start = lengths.index(longest) - longest
    return max(start + int(longest / 3) + int(longest / 6), 0)


def decay_(param: Tensor, *, lr: float, weight_decay: float) -> None:
    """Shrink `param` in place: `param *= 1 - lr * weight_decay`.

    The decay is decoupled: it never enters the gradient, so Adam does not rescale it.
    Source: Loshchilov & Hutter 2019, "Decoupled weight decay regularization", algorithm 2, line 12.
    """
    param.mul_(1 - lr * weight_decay)


class Moments(NamedTuple):
    """Adam's running means of one table, each of the table's shape and dtype."""

    mean: Tensor  # of the gradient: m in the paper
    square: Tensor  # of its square: v in the paper


def adam_(
    param: Tensor,
    grad: Tensor,
    moments: Moments,
    step: int,
    *,
    lr: float,
    momentum: float,
    beta2: float = 0.99,
    eps: float = 1e-8,
) -> None:
    """One step of Adam on `param` and `moments`, in place; `step` is 0-based, t = step + 1.

        m = momentum m + (1 - momentum) grad
        v = beta2 v + (1 - beta2) grad^2
        param -= lr m / (1 - momentum^t) / (sqrt(v / (1 - beta2^t)) + eps)

    The bias corrections use the momentum of this step, as `torch.optim.Adam` does when its betas
    are changed between steps. `beta2` is fastai's 0.99, not the paper's 0.999.
    Source: Kingma & Ba 2015, "Adam: a method for stochastic optimization", algorithm 1.
    """
    mean, square = moments
    mean.lerp_(grad, 1 - momentum)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    # sqrt(v / c2) + eps = (sqrt(v) + eps sqrt(c2)) / sqrt(c2): the correction moves into two
    # floats and saves a pass over the table.
    root = math.sqrt(1 - beta2 ** (step + 1))
    scale = lr * root / (1 - momentum ** (step + 1))
    param.addcdiv_(mean, square.sqrt().add_(eps * root), value=-scale)


class Optimizer(NamedTuple):
    """`init(params)` makes a state; `update_(params, grads, state, step)` changes params, state."""

    init: Callable[[Sequence[Tensor]], list[Moments]]
    update_: Callable[[Sequence[Tensor], Sequence[Tensor], list[Moments], int], None]


def adamw(
    schedule: Schedule,
    *,
    weight_decay: float | Sequence[float] = 0.0,
    beta2: float = 0.99,
    eps: float = 1e-8,
) -> Optimizer:
    """AdamW over several tables: at each step `decay_`, then `adam_`, at the schedule's pace.

    `weight_decay` is one number for all tables or one a table. Equal to `torch.optim.AdamW` with
    its lr and beta1 set from `schedule` before every step.
    """

    def init(params: Sequence[Tensor]) -> list[Moments]:
        return [Moments(torch.zeros_like(param), torch.zeros_like(param)) for param in params]

    def update_(params, grads, state, step) -> None:
        lr, momentum = schedule(step)
        decays = weight_decay
        if not isinstance(decays, Sequence):
            decays = [decays] * len(params)
        for param, grad, moments, decay in zip(params, grads, state, decays, strict=True):
            decay_(param, lr=lr, weight_decay=decay)
            adam_(param, grad, moments, step, lr=lr, momentum=momentum, beta2=beta2, eps=eps)

    return Optimizer(init, update_)


class Course(NamedTuple):
    """The way of a row that sleeps: float64, a line a step, G columns, one a weight decay."""

    decay: Tensor  # (n_steps + 1, G) D, the product of d over the steps before
    flight: Tensor  # (n_steps + 1, G) R
    decay_after: Tensor  # (n_steps, G) D of the next step, but where the count starts anew there
    pull: Tensor  # (n_steps, G) the factor of u' in z'
    group: Tensor  # (C,) int64: which of the G columns a column of the table follows
    fade: Tensor  # (n_steps + 1,) log of the product of b over the steps before
    waking: Tensor  # (n_steps + 1,) the same less the log of u's unit, for a row of step - 1
    carry: Tensor  # (n_steps,) the factor of u r in m
    eps: Tensor  # (n_steps,) as it is added to r
    beta2: float
    rests: frozenset[int]  # steps before which the count starts anew: first `rest_`


def plan_course(
    schedule: Schedule,
    n_steps: int,
    *,
    weight_decay: float | Sequence[float],
    beta2: float = 0.99,
    eps: float = 1e-8,
) -> Course:
    """Everything in `sparse_adamw` that depends on the schedule alone.

    ValueError for a momentum of at least sqrt(beta2), for which m / sqrt(v) would grow in a sleep
    until eps stops it, and for an lr of at least 1 / weight_decay.
    """
    columns = weight_decay if isinstance(weight_decay, Sequence) else [weight_decay]
    decays = sorted(set(columns))
    paces = torch.tensor([schedule(step) for step in range(n_steps)], dtype=torch.float64)
    lr, momentum = paces[:, 0], paces[:, 1].clamp(min=1e-30)
    if momentum.max() ** 2 >= beta2:
        raise ValueError(f"momentum {momentum.max():g} is not below sqrt(beta2), {beta2**0.5:g}")
    d = 1 - lr.unsqueeze(1) * torch.tensor(decays, dtype=torch.float64)
    if not d.min() > 0:
        raise ValueError(f"lr {lr.max():g} times weight decay {decays[-1]:g} is not below 1")
    t = torch.arange(1, n_steps + 1, dtype=torch.float64)
    root = (1 - beta2**t).sqrt()
    c = (lr * root / (1 - momentum**t)).unsqueeze(1)
    log_b, log_d = momentum.log().unsqueeze(1) - math.log(beta2) / 2, d.log()
    # The count starts anew before D has fallen to 1e-12, or R, where d is near b, left the scale
    # of lr: z in float32 would lose digits.
    strain = (log_b - log_d + 0.02).clamp(min=0) / 3 + log_d / math.log(1e-12)
    piece = strain.amax(1).cumsum(0).floor()
    is_start = torch.cat([piece.new_ones(1), piece.diff()]) > 0
    starts = is_start.nonzero().squeeze(1)
    total = torch.cat([torch.zeros_like(log_d[:1]), log_d.cumsum(0)])
    base = total[starts].repeat_interleave(starts.diff(append=torch.tensor([n_steps])), 0)
    decay, decay_after = (total[:-1] - base).exp(), (total[1:] - base).exp()
    flight, flight_after = _look_back((log_b - log_d).exp(), c, is_start)
    unit = (1 - momentum) / (1 - beta2) ** 0.5
    zero = torch.zeros(1, dtype=torch.float64)
    fade = torch.cat([zero, log_b.squeeze(1).cumsum(0)])
    return Course(
        decay=torch.cat([decay, decay_after[-1:]]),
        flight=torch.cat([flight, torch.zeros_like(flight[:1])]),
        decay_after=decay_after,
        pull=-unit.unsqueeze(1) * (c + flight_after) / decay_after,
        group=torch.tensor([decays.index(decay) for decay in columns]),
        fade=fade,
        waking=fade - torch.cat([zero, unit.log()]),
        carry=momentum / (1 - momentum) * ((1 - beta2) / beta2) ** 0.5,
        eps=eps * root / (1 - beta2) ** 0.5,
        beta2=beta2,
        rests=frozenset(starts[1:].tolist()),
    )


def _look_back(ratio: Tensor, c: Tensor, is_start: Tensor) -> tuple[Tensor, Tensor]:
    """R of each step and of the next, by `R = ratio (c + R of the next)`, 0 at each end."""
    is_end = is_start.roll(-1).unsqueeze(1)
    slope = ratio.masked_fill(is_end, 0.0)
    before = []
    for column, line in zip((ratio * c).T.tolist(), slope.T.tolist(), strict=True):
        pairs = zip(reversed(column), reversed(line), strict=True)
        before.append(
            [*accumulate(pairs, lambda R, pair: pair[0] + pair[1] * R, initial=0.0)][:0:-1]
        )
    before = torch.tensor(before, dtype=torch.float64).T
    return before, before.roll(-1, 0).masked_fill(is_end, 0.0)


class RowOptimizer(NamedTuple):
    """What `sparse_adamw` returns. `since` (int64) is each row's last step so far, -1 for none."""

    init: Callable[[Tensor], Tensor]  # table (R, C) -> state
    # state, rows (n, m) all different in each of n steps, their since (n, m), step -> a generator
    # that gives a step's values (m, C) and by `send` takes their gradient and goes on to the next
    steps_: Callable[[Tensor, Tensor, Tensor, int], Generator[Tensor, Tensor, None]]
    wake: Callable[[Tensor, Tensor, int], Tensor]  # state, since (R,), step -> table (R, C)
    rest_: Callable[[Tensor, Tensor, int], None]  # state, since (R,), step
    rests: frozenset[int]  # the steps before which `rest_` must be called


def sparse_adamw(
    schedule: Schedule,
    n_steps: int,
    *,
    weight_decay: float | Sequence[float] = 0.0,
    beta2: float = 0.99,
    eps: float = 1e-8,
) -> RowOptimizer:
    """`adamw` on a table of R rows where a step costs what the rows in its batch cost.

    `weight_decay` is one number or one a column. A row without gradient does not stand still under
    `adamw`: it decays, and its momentum carries it on. But its course is known. With

        d = 1 - lr weight_decay,  b = momentum / sqrt(beta2),  u = m / sqrt(v),
        c = lr sqrt(1 - beta2^t) / (1 - momentum^t),  t = step + 1

    of each step, and eps neglected, a step takes u to b u and w to d w - c b u. Let R = 0 after the
    last step and, going back, R = (b / d) (c + R of the next step). Then a step takes w - R u to
    d (w - R u), so z = (w - R u) / D does not change at all, D the product of d so far. The state
    of a row is z, u and r = sqrt(v) as of its last step. In a sleep, u takes the product of b and r
    that of sqrt(beta2), and to read the row is w = D z + R u. With its gradient g, and ' for after
    the step,

        m' = momentum u r + (1 - momentum) g
        r' = sqrt(beta2 r^2 + (1 - beta2) g^2)
        u' = m' / (r' + eps sqrt(1 - beta2^t))
        z' = (d w - (c + R') u') / D' = z + (R / D) u - ((c + R') / D') u'

    r is kept divided by sqrt(1 - beta2), and u multiplied by sqrt(1 - beta2) / (1 - momentum): two
    products less a step. Equal to `adamw` but for eps, which a sleeping row does without: where
    sqrt(v) is near eps, the two part. D and R start anew now and then, at `rests`, so that z keeps
    its digits: every 27 / (lr weight_decay) steps or, from lr weight_decay = 0.03 on, every few,
    when `adamw` is faster.
    Source: Adam's step is Kingma & Ba 2015; sleeping rows that are caught up when they are next
    read are of Langford, Li & Zhang 2009, "Sparse online learning via truncated gradient";
    the closed form for AdamW is worked out here.
    """
    course = plan_course(schedule, n_steps, weight_decay=weight_decay, beta2=beta2, eps=eps)
    return RowOptimizer(
        _fall_asleep,
        partial(_steps_, course),
        partial(_wake, course),
        partial(_rest_, course),
        course.rests,
    )


def _fall_asleep(table: Tensor) -> Tensor:
    """The state (R + 1, 3, C): z, u, r of each row, and a last row to fill up `rows` with."""
    state = table.new_zeros(len(table) + 1, 3, table.shape[1])
    state[:-1, 0] = table
    return state


def _fade(course: Course, since: Tensor, step: Tensor | int, dtype: torch.dtype) -> Tensor:
    """The factors of u before `step` and of r after it, of rows whose last step was `since`."""
    u = course.fade[step] - course.waking.index_select(0, since.view(-1) + 1).view(since.shape)
    r = (step - since).double() * (math.log(course.beta2) / 2)
    logs = torch.stack([u, r], 1).to(dtype)
    # Below 1e-18 nothing shows any more, but numbers that underflow are slow to compute with.
    return torch.nn.functional.threshold_(logs, -41, -math.inf).exp_()


def _steps_(course, state, rows, since, step):
    """Read the rows of each step, yield their values, take their gradient, write them."""
    n, m = rows.shape
    table = state.view(-1, state.shape[2])
    x = table.new_empty(3, m, table.shape[1])
    gathered, faded, (z, u, r) = x.view(3 * m, -1), x[1:], x.unbind()
    # Copying rows takes as long as they have numbers, so let a number be of 16 bytes.
    is_wide = gathered.shape[1] * gathered.element_size() % 16 == 0
    wide, wide_gathered = (t.view(torch.complex128) if is_wide else t for t in (table, gathered))
    flown, values, mean = table.new_empty(3, *z.shape).unbind()

    span, steps = slice(step, step + n), torch.arange(step, step + n).unsqueeze(1)
    planes = (3 * rows.unsqueeze(1) + torch.arange(3).unsqueeze(1)).view(n, 3 * m)
    fades = _fade(course, since, steps, state.dtype).unsqueeze(3)
    lines = course.decay[span], course.flight[span] / course.decay[span], course.pull[span]
    lines = (line[:, course.group] for line in lines)
    tensors = (t.to(state.dtype).unbind() for t in (fades, *lines, course.eps[span]))
    carries = course.carry[span].tolist()
    for plane, fade, decay, flight, pull, eps, carry in zip(
        planes.unbind(), *tensors, carries, strict=True
    ):
        torch.index_select(table, 0, plane, out=gathered)
        faded.mul_(fade)
        torch.addcmul(z, u, flight, out=flown)
        torch.mul(flown, decay, out=values)
        grads = yield values
        torch.addcmul(grads, u, r, value=carry, out=mean)
        r.mul_(r).addcmul_(grads, grads).sqrt_()
        torch.div(mean, torch.add(r, eps, out=values), out=u)
        torch.addcmul(flown, u, pull, out=z)
        wide.index_copy_(0, plane, wide_gathered)
    yield  # what `send` returns after the last step


def _wake(course: Course, state: Tensor, since: Tensor, step: int) -> Tensor:
    """The whole table as `adamw` has it before `step`, by reading every row; `state` sleeps on."""
    z, u, _ = state[:-1].unbind(1)
    u = u * _fade(course, since, step, u.dtype)[:, :1]
    decay, flight = (line[step, course.group].to(u) for line in (course.decay, course.flight))
    return torch.addcmul(z * decay, u, flight)


def _rest_(course: Course, state: Tensor, since: Tensor, step: int) -> None:
    """Write every row as of `step`, one of `rests`, where D and R start anew."""
    z, u, r = state[:-1].unbind(1)
    u.mul_(_fade(course, since, step, u.dtype)[:, :1])
    r.mul_(_fade(course, since, step - 1, r.dtype)[:, 1:])
    z.mul_(course.decay_after[step - 1, course.group].to(z))  # R was 0, so this is w
    z.addcmul_(u, -course.flight[step, course.group].to(z))
    u.mul_((course.waking[step] - course.fade[step]).exp())  # into the unit of step - 1
    since.fill_(step - 1)
