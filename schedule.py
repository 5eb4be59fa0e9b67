"""One-cycle learning rate and momentum, decoupled weight decay and Adam, written by hand.

A schedule is a function of the step; `adamw` follows one. `exponential` and `suggest_lr` are the
two ends of a learning rate range test.

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
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Schedules


class Pace(NamedTuple):
    """What a schedule gives for one step."""

    lr: float
    momentum: float  # Adam's beta1


Schedule = Callable[[int], Pace]


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

    start, peak = Pace(lr_max / div, momentum_max), Pace(lr_max, momentum_min)
    end = Pace(lr_max / final_div, momentum_max)

    def at(step: int) -> Pace:
        if step < n_up:
            return _move(start, peak, step / n_up)
        return _move(peak, end, min((step - n_up) / (n_steps - n_up), 1.0))

    return at


def _move(start: Pace, end: Pace, frac: float) -> Pace:
    rise = (1 - math.cos(math.pi * frac)) / 2
    return Pace(*(a + (b - a) * rise for a, b in zip(start, end, strict=True)))


def exponential(n_steps: int, *, lr_min: float, lr_max: float, momentum: float = 0.9) -> Schedule:
    """For the learning rate range test: lr grows by the same factor at every step.

        lr = lr_min^(1 - frac) lr_max^frac,  frac = min(step / (n_steps - 1), 1)

    `momentum` stays. ValueError for less than two steps, or where not 0 < lr_min < lr_max.

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


# Learning rate range test


class Suggestion(NamedTuple):
    """Two learning rates read off a range test's curve."""

    valley: float  # half-way through the longest fall
    steepest: float  # where the loss falls fastest in log lr


def suggest_lr(
    lrs: Sequence[float] | Tensor, losses: Sequence[float] | Tensor, *, n_steps: int
) -> Suggestion:
    """Where the curve of a range test, smoothed `losses` (m,) over growing `lrs` (m,), falls best.

    The first `n_steps // 10` points and the last 5 are left out, `n_steps` being what the test was
    to take. Of the rest, by index from 0:

        valley: lrs[max(end - L + int(L / 3) + int(L / 6), 0)], L the length of the longest
            subsequence of ever smaller losses, gaps allowed, `end` where the first such ends
        steepest: lrs[i] for the least (losses[i + 1] - losses[i]) / (log lrs[i + 1] - log lrs[i])

    Source: fastai 2, `lr_find`, `valley` and `steep` of callback/schedule.py; but at 0 the index
    of the valley is held here, where fastai's may be -1, the last point.

    ValueError for less than 2 points left, an lr that does not grow or a loss that is not finite.
    """
    kept = slice(n_steps // 10, -5)
    lrs, losses = (torch.as_tensor(x, dtype=torch.float64)[kept] for x in (lrs, losses))
    if not len(lrs) == len(losses) > 1:
        raise ValueError(f"{len(lrs)} lrs and {len(losses)} losses are left, not 2 or more")
    growths, rises = (lrs[1:] / lrs[:-1]).log(), losses.diff()
    if not ((growths > 0) & growths.isfinite() & rises.isfinite()).all():
        raise ValueError("an lr of the curve does not grow, or a loss is not finite")
    steepest = (rises / growths).argmin()
    return Suggestion(lrs[_find_valley(losses.tolist())].item(), lrs[steepest].item())


def _find_valley(losses: Sequence[float]) -> int:
    lengths = []  # of the longest fall that ends at each point
    for loss in losses:
        before = zip(lengths, losses, strict=False)
        lengths.append(1 + max((n for n, above in before if above > loss), default=0))
    longest = max(lengths)
    start = lengths.index(longest) - longest
    return max(start + int(longest / 3) + int(longest / 6), 0)


# Decoupled weight decay


def decay_(
    param: Tensor, *, lr: float, weight_decay: float | Tensor, center: Tensor | None = None
) -> None:
    """Pull `param` towards `center` in place, 0 unless given: no part of the gradient.

        param -= lr * weight_decay * (param - center)

    The decay is decoupled, so Adam does not rescale it. `weight_decay` is a number or a tensor that
    broadcasts to `param`'s shape, such as (C,) for one a column; `center` has `param`'s shape. All
    are of one dtype.
    Source: Loshchilov & Hutter 2019, "Decoupled weight decay regularization", algorithm 2, line 12;
    towards a point: Li, Grandvalet & Davoine 2018, "Explicit inductive bias for transfer learning
    with convolutional networks", L2-SP, here decoupled.
    """
    if center is None:
        param.mul_(1 - lr * weight_decay)
    else:
        param.lerp_(center, lr * weight_decay)


# Adam


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
    # torch's sqrt is several times slower where v is 0, as it is for a row not seen yet.
    param.addcdiv_(mean, square.rsqrt().reciprocal_().add_(eps * root), value=-scale)


# AdamW


class Optimizer(NamedTuple):
    """`init(params)` makes a state; `update_(params, grads, state, step)` changes params, state."""

    init: Callable[[Iterable[Tensor]], list[Moments]]
    update_: Callable[[Iterable[Tensor], Iterable[Tensor], list[Moments], int], None]


def adamw(
    schedule: Schedule,
    *,
    weight_decay: float | Sequence[float | Tensor] = 0.0,
    centers: Sequence[Tensor | None] | None = None,
    beta2: float = 0.99,
    eps: float = 1e-8,
) -> Optimizer:
    """AdamW over several tables: at each step `decay_`, then `adam_`, at the schedule's pace.

    `weight_decay` is one number for all tables or one decay a table; `centers` has what each table
    decays towards, 0 unless given. Equal to `torch.optim.AdamW` with its lr and beta1 set from
    `schedule` before every step. `params` may be a module's, `net.parameters()`.
    """

    def init(params) -> list[Moments]:
        return [Moments(torch.zeros_like(param), torch.zeros_like(param)) for param in params]

    def update_(params, grads, state, step) -> None:
        lr, momentum = schedule(step)
        decays = weight_decay if isinstance(weight_decay, Sequence) else [weight_decay] * len(state)
        rest = zip(state, decays, centers or [None] * len(state), strict=True)
        for param, grad, (moments, decay, center) in zip(params, grads, rest, strict=True):
            param = param.detach()  # the same numbers, of which autograd takes no notice
            decay_(param, lr=lr, weight_decay=decay, center=center)
            adam_(param, grad, moments, step, lr=lr, momentum=momentum, beta2=beta2, eps=eps)

    return Optimizer(init, update_)
