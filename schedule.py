"""One-cycle learning rate and momentum, decoupled weight decay and Adam, written by hand.

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
from collections.abc import Callable, Sequence
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
