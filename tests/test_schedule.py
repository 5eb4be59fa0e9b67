import math
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import schedule

# fastai v1's one-cycle at n = 10, lr_max = 1, and two points past the end.
LR = [0.0400, 0.2800, 0.7600, 1.0000, 0.9505, 0.8117, 0.6113, 0.3887, 0.1883, 0.0495, 4e-6, 4e-6]
MOMENTUM = [0.95, 0.925, 0.875, 0.85, 0.855, 0.8688, 0.8889, 0.9111, 0.9312, 0.945, 0.95, 0.95]


def test_one_cycle_is_fastais():
    at = schedule.one_cycle(10, lr_max=1.0)
    assert [at(step).lr for step in range(12)] == pytest.approx(LR, abs=5e-5)
    assert [at(step).momentum for step in range(12)] == pytest.approx(MOMENTUM, abs=1e-4)
    assert at(10).lr == pytest.approx(4e-6, rel=1e-12)


@pytest.mark.parametrize("n_steps", [1, 2, 3, 4, 14150])
def test_one_cycle_peaks_once_at_any_length(n_steps):
    at = schedule.one_cycle(n_steps, lr_max=0.01)
    lrs = [at(step).lr for step in range(n_steps)]
    peak = int(n_steps * 0.3)
    assert lrs[peak] == max(lrs) == 0.01
    assert lrs[:peak] == sorted(lrs[:peak])
    assert lrs[peak:] == sorted(lrs[peak:], reverse=True)


def test_exponential():
    at = schedule.exponential(5, lr_min=1e-3, lr_max=10, momentum=0.8)
    lrs = [1e-3, 1e-2, 1e-1, 1.0, 10.0, 10.0, 10.0]
    assert [at(step).lr for step in range(7)] == pytest.approx(lrs, rel=1e-12)
    assert (at(0), at(4), at(10**9)) == ((1e-3, 0.8), (10, 0.8), (10, 0.8)), "the ends to the bit"


def test_schedules_name_the_bad_value():
    for n_steps, warm_up in ((0, 0.3), (5, 1.0)):
        with pytest.raises(ValueError, match=r"not (0|1\.0)$"):
            schedule.one_cycle(n_steps, lr_max=1.0, warm_up=warm_up)
    with pytest.raises(ValueError, match="n_steps must be at least 2, not 1"):
        schedule.exponential(1, lr_min=0.1, lr_max=1.0)
    for lr_min, lr_max in ((0.0, 1.0), (0.1, math.nan)):
        with pytest.raises(ValueError, match=f"lr cannot grow from {lr_min:g} to {lr_max:g}"):
            schedule.exponential(5, lr_min=lr_min, lr_max=lr_max)


def suggest(losses, n_steps=None):
    """The places on the curve of what `suggest_lr` suggests, on lrs that double."""
    lrs = [2.0**i for i in range(len(losses))]
    suggested = schedule.suggest_lr(lrs, losses, n_steps=n_steps or len(losses))
    return tuple(int(math.log2(lr)) for lr in suggested)


# 40 points, of which 4 to 34 count: flat, from 10 on down to 0.56 at 25 with one large step, up.
FALL = [1.0] * 11 + [1.0 - 0.01 * i for i in range(1, 8)] + [0.63 - 0.01 * i for i in range(8)]
CURVE = FALL + [0.56 * 1.5**i for i in range(1, 15)]


def test_suggestions_on_curves_worked_out_by_hand():
    # The fall is 16 long, at 10 to 25, its large step from 17 to 18.
    assert suggest(CURVE) == suggest(torch.tensor(CURVE)) == (9 + 5 + 2, 17)
    # A bump in it makes it one shorter, which moves its start, counted back from the end.
    assert suggest([*CURVE[:14], 0.985, *CURVE[15:]]) == (10 + 5 + 2, 17)
    # Of a test that was to take 200 steps the first 20 do not count: left are 20 to 25.
    assert suggest(CURVE, n_steps=200) == (20 - 1 + 2 + 1, 20)
    # Nothing falls: the valley is at the first that counts.
    assert suggest([float(i) for i in range(20)])[0] == 2
    # 2 long at the very start, where fastai's index is -1.
    assert suggest([1.0, 0.5] + [2.0] * 7) == (0, 0)


@given(st.lists(st.integers(0, 6), min_size=2, max_size=8))
def test_the_valley_is_of_the_longest_fall(losses):
    """Every subset of the points looked at."""
    places = range(len(losses))
    falls = [
        (len(chosen), -chosen[-1])
        for size in range(1, len(losses) + 1)
        for chosen in combinations(places, size)
        if all(losses[a] > losses[b] for a, b in pairwise(chosen))
    ]
    longest, end = max(falls)
    third = longest / 3
    expected = max(-end - longest + int(third) + int(third / 2), 0)
    slopes = [after - loss for loss, after in pairwise(losses)]
    # Fewer than 10 steps: no first tenth.
    assert suggest([*losses, 9, 9, 9, 9, 9], n_steps=9) == (expected, slopes.index(min(slopes)))


def test_curves_without_suggestion():
    ones, lrs = [1.0] * 7, [2.0**i for i in range(7)]
    assert schedule.suggest_lr(lrs, ones, n_steps=7) == (1.0, 1.0)
    bad = [
        (lrs[:6], ones[:6], "1 lrs and 1 losses are left, not 2 or more"),
        (lrs, ones[:6], "2 lrs and 1 losses"),
        (lrs, [math.nan, *ones[1:]], "a loss is not finite"),
        (lrs[::-1], ones, "an lr of the curve does not grow"),
        ([0.0, *lrs[1:]], ones, "an lr of the curve does not grow"),
    ]
    for rates, losses, message in bad:
        with pytest.raises(ValueError, match=message):
            schedule.suggest_lr(rates, losses, n_steps=len(rates))


def by_column(*lists):
    """Each column of each table, beside that of the same place in the other lists."""
    columns = ([column for table in tables for column in table.T] for tables in lists)
    return list(zip(*columns, strict=True))


# Columns of their own decay, and of none.
COLUMN = torch.tensor([0.0, 0.1, 2.0]).double()
DECAYS = [0.0, 0.1, [0.0, 0.5], [COLUMN, 0.5], torch.tensor([1.0]).double()]


@pytest.mark.parametrize("weight_decay", DECAYS)
@pytest.mark.parametrize("centered", ["no table", "a table", "both"])
def test_adamw_is_torchs(weight_decay, centered):
    """On a noisy quadratic in float64. Torch trains each column apart, less its center."""
    generator = torch.Generator().manual_seed(0)
    params, shifts = (
        [torch.randn(shape, generator=generator).double() for shape in ((7, 3), (5, 1))]
        for _ in "12"
    )
    is_centered = {"no table": (False, False), "a table": (False, True), "both": (True, True)}
    centers = [c if on else None for c, on in zip(shifts, is_centered[centered], strict=True)]
    shifts = [0 * p if c is None else c for p, c in zip(params, centers, strict=True)]
    decays = weight_decay if isinstance(weight_decay, list) else [weight_decay] * 2
    decays = [torch.zeros(1, len(p.T)).double() + d for p, d in zip(params, decays, strict=True)]
    theirs = [torch.nn.Parameter((p - c).clone()) for p, c in by_column(params, shifts)]
    groups = [
        {"params": [p], "weight_decay": decay.item()}
        for p, (decay,) in zip(theirs, by_column(decays), strict=True)
    ]
    oracle, pace = torch.optim.AdamW(groups), schedule.one_cycle(100, lr_max=0.3)
    options = {} if centered == "no table" else {"centers": centers}
    optimizer = schedule.adamw(pace, weight_decay=weight_decay, **options)
    state = optimizer.init(iter(params))  # as a module's, which can be taken only once
    for step in range(100):
        grads = [p - 1 + torch.randn(p.shape, generator=generator).double() for p in params]
        for p, (grad,) in zip(theirs, by_column(grads), strict=True):
            p.grad = grad
        for group in oracle.param_groups:
            group["lr"], group["betas"] = pace(step).lr, (pace(step).momentum, 0.99)
        oracle.step()
        optimizer.update_(iter(params), iter(grads), state, step)
        for p, (ours, shift) in zip(theirs, by_column(params, shifts), strict=True):
            torch.testing.assert_close(ours, p.detach() + shift, rtol=0, atol=1e-12)
