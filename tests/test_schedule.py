import math
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import schedule

# fastai v1's one-cycle at n = 10, lr_max = 1, and three points past the end.
LR = [0.0400, 0.2800, 0.7600, 1.0000, 0.9505, 0.8117, 0.6113, 0.3887, 0.1883, 0.0495, 4e-6, 4e-6]


def test_one_cycle_lr_is_fastais():
    at = schedule.one_cycle(10, lr_max=1.0)
    assert [at(step).lr for step in range(12)] == pytest.approx(LR, abs=5e-5)
    assert at(10).lr == pytest.approx(4e-6, rel=1e-12)


def test_one_cycle_momentum_mirrors_lr():
    at = schedule.one_cycle(10, lr_max=1.0)
    expected = [
        0.95,
        0.925,
        0.875,
        0.85,
        0.8550,
        0.8688,
        0.8889,
        0.9111,
        0.9312,
        0.9450,
        0.95,
        0.95,
    ]
    assert [at(step).momentum for step in range(12)] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("n_steps", [1, 2, 3, 4, 14150])
def test_one_cycle_peaks_once_at_any_length(n_steps):
    at = schedule.one_cycle(n_steps, lr_max=0.01)
    lrs = [at(step).lr for step in range(n_steps)]
    peak = int(n_steps * 0.3)
    assert lrs[peak] == max(lrs) == 0.01
    assert lrs[:peak] == sorted(lrs[:peak])
    assert lrs[peak:] == sorted(lrs[peak:], reverse=True)


@pytest.mark.parametrize("arguments", [{"n_steps": 0}, {"n_steps": 5, "warm_up": 1.0}])
def test_one_cycle_names_the_bad_value(arguments):
    with pytest.raises(ValueError, match=r"not (0|1\.0)$"):
        schedule.one_cycle(lr_max=1.0, **arguments)


def test_constant():
    at = schedule.constant(lr=0.005, momentum=0.8)
    assert [at(step) for step in (0, 7, 10**9)] == [(0.005, 0.8)] * 3


def test_exponential():
    at = schedule.exponential(5, lr_min=1e-3, lr_max=10, momentum=0.8)
    lrs = [1e-3, 1e-2, 1e-1, 1.0, 10.0, 10.0, 10.0]
    assert [at(step).lr for step in range(7)] == pytest.approx(lrs, rel=1e-12)
    assert (at(0), at(4), at(10**9)) == ((1e-3, 0.8), (10, 0.8), (10, 0.8)), "the ends to the bit"


@pytest.mark.parametrize(
    ("n_steps", "lr_min", "lr_max", "message"),
    [
        (1, 0.1, 1.0, "n_steps must be at least 2, not 1"),
        (5, 0.0, 1.0, "lr cannot grow from 0 to 1"),
        (5, 0.1, 0.1, r"lr cannot grow from 0\.1 to 0\.1"),
        (5, 0.1, math.nan, r"lr cannot grow from 0\.1 to nan"),
    ],
)
def test_exponential_names_the_bad_value(n_steps, lr_min, lr_max, message):
    with pytest.raises(ValueError, match=message):
        schedule.exponential(n_steps, lr_min=lr_min, lr_max=lr_max)


def suggest(losses, **options):
    """The places on the curve of what `suggest_lr` suggests, on lrs that double."""
    suggested = schedule.suggest_lr([2.0**i for i in range(len(losses))], losses, **options)
    return tuple(int(math.log2(lr)) for lr in suggested)


# 40 points, of which 4 to 34 count: flat, from 10 on down to 0.56 at 25 with one large step, up.
FALL = [1.0] * 11 + [1.0 - 0.01 * i for i in range(1, 8)] + [0.63 - 0.01 * i for i in range(8)]
CURVE = FALL + [0.56 * 1.5**i for i in range(1, 15)]


def test_suggestions_on_curves_worked_out_by_hand():
    # 20 points, 2 to 14 count: the fall is 9 long, at 2 to 10, and the same all along.
    assert suggest([abs(i - 10) + 1.0 for i in range(20)]) == (2 - 1 + 3 + 1, 2)
    # The fall is 16 long, at 10 to 25, its large step from 17 to 18.
    assert suggest(CURVE) == (9 + 5 + 2, 17)
    assert suggest(torch.tensor(CURVE)) == (16, 17)
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
    assert schedule.suggest_lr(lrs, ones) == (1.0, 1.0)
    bad = [
        (lrs[:6], ones[:6], "1 points are left of the curve, at least 2"),
        (lrs, ones[:6], "7 lrs and 6 losses"),
        ([], [], "0 points are left"),
        (lrs, [math.nan, *ones[1:]], "a loss of the curve is not finite"),
        (lrs[::-1], ones, "the lrs of the curve do not grow"),
        ([0.0, *lrs[1:]], ones, "the lrs of the curve do not grow"),
    ]
    for rates, losses, message in bad:
        with pytest.raises(ValueError, match=message):
            schedule.suggest_lr(rates, losses)


def test_decay_is_a_factor():
    param = torch.tensor([1.0, -2.0])
    schedule.decay_(param, lr=0.5, weight_decay=0.1)
    assert torch.equal(param, torch.tensor([0.95, -1.9]))


def both(weight_decay, n_steps=100):
    """The same noisy quadratic under torch.optim.AdamW and under ours, in float64."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).double() for shape in [(7, 3), (5,)]]
    theirs = [torch.nn.Parameter(param.clone()) for param in params]
    oracle = torch.optim.AdamW(theirs, weight_decay=weight_decay, eps=1e-8)
    pace = schedule.one_cycle(n_steps, lr_max=0.3)
    optimizer = schedule.adamw(pace, weight_decay=weight_decay)
    state = optimizer.init(params)
    for step in range(n_steps):
        noise = [torch.randn(param.shape, generator=generator).double() for param in params]
        for group in oracle.param_groups:
            group["lr"], group["betas"] = pace(step).lr, (pace(step).momentum, 0.99)
        for param, push in zip(theirs, noise, strict=True):
            param.grad = param.detach() - 1 + push
        oracle.step()
        grads = [param - 1 + push for param, push in zip(params, noise, strict=True)]
        optimizer.update_(params, grads, state, step)
        yield params, theirs


@pytest.mark.parametrize("weight_decay", [0.0, 0.1, 2.0])
def test_adamw_is_torchs(weight_decay):
    n_steps = 0
    for ours, theirs in both(weight_decay):
        n_steps += 1
        for param, oracle in zip(ours, theirs, strict=True):
            torch.testing.assert_close(param, oracle.detach(), rtol=0, atol=1e-12)
    assert n_steps == 100


def test_a_decay_for_each_table():
    params = [torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)]
    optimizer = schedule.adamw(schedule.constant(lr=0.1), weight_decay=[0.0, 0.5])
    grads = [torch.zeros_like(param) for param in params]
    optimizer.update_(params, grads, optimizer.init(params), 0)
    assert params[0].tolist() == [1.0, 1.0]
    assert params[1].tolist() == [0.95, 0.95]


def test_adam_takes_its_first_step_at_the_lr():
    """m / sqrt(v) is the sign of the gradient at step 0, whatever the momentum."""
    param = torch.zeros(3, dtype=torch.float64)
    grad = torch.tensor([1e-3, -5.0, 700.0], dtype=torch.float64)
    moments = schedule.Moments(torch.zeros_like(param), torch.zeros_like(param))
    schedule.adam_(param, grad, moments, 0, lr=0.25, momentum=0.95)
    assert param.tolist() == pytest.approx([-0.25, 0.25, -0.25], rel=1e-4)
    assert math.isclose(moments.mean[1].item(), -0.25)


def run_rows(decays, *, n_steps=2500, n_rows=60, lr_max=0.01, eps=1e-8, dtype=torch.float64):
    """`sparse_adamw` beside torch.optim.AdamW in float64 on rows drawn like rank^-2.

    The largest difference of any value read in a step or woken up, the longest sleep, and the most
    that one row occurs in a batch.
    """
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(n_rows, len(decays), generator=generator).double()
    pace = schedule.one_cycle(n_steps, lr_max=lr_max)
    optimizer = schedule.sparse_adamw(pace, n_steps, weight_decay=decays, eps=eps)
    theirs = [torch.nn.Parameter(column.clone()) for column in table.T]
    groups = [{"params": [p], "weight_decay": d} for p, d in zip(theirs, decays, strict=True)]
    oracle = torch.optim.AdamW(groups, eps=eps)
    state, since = optimizer.init(table.to(dtype)), torch.full((n_rows,), -1)
    weights = torch.arange(1, n_rows + 1).double() ** -2
    worst = longest = most = 0
    for step in range(n_steps):
        rows, counts = torch.multinomial(weights, 6, True, generator=generator).unique(
            return_counts=True
        )
        grads = torch.randn(len(rows), len(decays), generator=generator).double()
        slept = (step - since[rows])[since[rows] >= 0]
        longest, most = max(longest, *slept.tolist(), 0), max(most, *counts.tolist())
        if step in optimizer.rests:
            optimizer.rest_(state, since, step)
        steps = optimizer.steps_(state, rows.unsqueeze(0), since[rows].unsqueeze(0), step)
        expected = torch.stack([p.detach() for p in theirs], 1)
        worst = max(worst, (next(steps) - expected[rows]).abs().max().item())
        steps.send((grads * counts.unsqueeze(1)).to(dtype))
        since[rows] = step
        for group, param, column in zip(oracle.param_groups, theirs, grads.T, strict=True):
            group["lr"], group["betas"] = pace(step).lr, (pace(step).momentum, 0.99)
            param.grad = torch.zeros_like(param).index_copy_(0, rows, column * counts)
        oracle.step()
        if step % 100 == 99 and step + 1 not in optimizer.rests:
            expected = torch.stack([p.detach() for p in theirs], 1)
            woken = optimizer.wake(state, since, step + 1)
            worst = max(worst, (woken - expected).abs().max().item())
    return worst, longest, most, len(optimizer.rests)


@pytest.mark.parametrize(("eps", "tolerance"), [(1e-8, 2e-6), (1e-12, 2e-10), (1e-16, 1e-13)])
def test_rows_that_sleep_are_torchs(eps, tolerance):
    """A sleeping row neglects eps beside sqrt(v), about 1 here: the error is lr times eps / sqrt(v)

    over the steps in which momentum is still felt, more where v has decayed; so 100 eps, and
    rounding where eps is nothing. Factors and biases decay at different rates.
    """
    worst, longest, most, n_rests = run_rows([0.1, 0.1, 0.02], eps=eps)
    assert worst < tolerance
    assert longest > 500
    assert most > 2
    assert n_rests == 0


@pytest.mark.parametrize(
    ("lr_max", "decays", "least"),
    [(0.1, [2.0, 0.01], 10), (0.3, [3.3, 0.0], 100), (0.05, [0.0, 0.0], 0)],
)
def test_rows_rest_where_the_decay_is_strong(lr_max, decays, least):
    """At lr 0.3, decay 3.3 a step takes 99 % of a row. Rounding in float64, the rests included."""
    worst, *_, n_rests = run_rows(decays, lr_max=lr_max, eps=1e-16)
    assert worst < 1e-12
    assert n_rests >= least


def test_sleeping_in_float32():
    """Values are about 1: a hundred roundings."""
    assert run_rows([0.1, 0.1, 0.1, 0.02], dtype=torch.float32)[0] < 1e-5


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("width", [1, 4])
def test_a_row_that_was_never_in_a_batch_decays(n_steps, width):
    optimizer = schedule.sparse_adamw(
        schedule.constant(lr=0.5), n_steps, weight_decay=[0.5] * width
    )
    state = optimizer.init(torch.ones(2, width))
    table = optimizer.wake(state, torch.full((2,), -1), n_steps)
    assert table.tolist() == [[0.75**n_steps] * width] * 2


def test_a_very_long_sleep_leaves_no_slow_numbers():
    """u and r fade to 0, not to numbers too small for float32, which are slow to compute with."""
    n_steps = 20_000
    optimizer = schedule.sparse_adamw(schedule.constant(lr=1e-3), n_steps)
    state, step = optimizer.init(torch.zeros(1, 4)), torch.zeros(1, 1, dtype=torch.int64)
    steps = optimizer.steps_(state, step, step - 1, 0)
    next(steps)
    steps.send(torch.ones(1, 4))
    for at in (1, 100, 300, 1000, 9000, n_steps - 1):
        again = state.clone()
        steps = optimizer.steps_(again, step, step, at)
        values = next(steps)
        assert values.abs().max() < 0.02
        steps.send(torch.zeros(1, 4))
        assert not ((again != 0) & (again.abs() < 1e-37)).any()


def test_a_momentum_or_lr_without_closed_form():
    with pytest.raises(ValueError, match=r"momentum 0\.999 is not below"):
        schedule.sparse_adamw(schedule.constant(lr=0.1, momentum=0.999), 5)
    with pytest.raises(ValueError, match=r"lr 2 times weight decay 0\.5 is not below 1"):
        schedule.sparse_adamw(schedule.constant(lr=2.0), 5, weight_decay=0.5)
