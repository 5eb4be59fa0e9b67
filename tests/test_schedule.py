import math

import pytest
import torch

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
