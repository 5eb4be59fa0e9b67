import pytest
import torch

import model

Y_RANGE = (0.5, 5.5)


@pytest.fixture
def params():
    """Large enough for the sigmoid to bend: std 1, float64, three factors."""
    generator = torch.Generator().manual_seed(0)
    return model.init_params(6, 9, n_factors=3, generator=generator, std=1.0, dtype=torch.float64)


@pytest.fixture
def batch():
    """Users and items that occur several times in one batch."""
    users = torch.tensor([0, 5, 0, 2, 0, 5, 1])
    items = torch.tensor([8, 8, 8, 3, 1, 0, 3])
    ratings = torch.tensor([5, 1, 3.5, 4, 2, 5, 1], dtype=torch.float64)
    return users, items, ratings


def test_init_is_a_cut_normal():
    params = model.init_params(
        400, 500, n_factors=50, generator=torch.Generator().manual_seed(0), std=0.01
    )
    assert [tuple(p.shape) for p in params] == [(400, 50), (500, 50), (400,), (500,)]
    assert all(p.dtype == torch.float32 and p.abs().max() < 0.02 for p in params)
    # Wrapping at two deviations leaves a variance of 0.777 of the normal's.
    assert params.item_factors.std().item() == pytest.approx(0.00881, rel=0.02)
    assert abs(params.item_factors.mean().item()) < 2e-4


def test_init_depends_on_the_generator_alone():
    first, again, other = (
        model.init_params(3, 4, n_factors=2, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.user_factors, other.user_factors)


@pytest.mark.parametrize("counts", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_init_names_the_bad_count(counts):
    with pytest.raises(ValueError, match="must be at least 1, not 0"):
        model.init_params(*counts[:2], n_factors=counts[2], generator=torch.Generator())


def test_prediction_is_the_formula(params):
    user, item = 2, 7
    p, q = params.user_factors[user].tolist(), params.item_factors[item].tolist()
    z = sum(a * b for a, b in zip(p, q, strict=True))
    z += params.user_bias[user].item() + params.item_bias[item].item()
    expected = 0.5 + 5 / (1 + 2.718281828459045**-z)
    got = model.predict(params, torch.tensor([user]), torch.tensor([item]), y_range=Y_RANGE)
    assert got.tolist() == pytest.approx([expected], rel=1e-12)


@pytest.mark.parametrize("n_users", [1, 2, 6])
def test_prediction_broadcasts(params, n_users):
    every = torch.arange(9)
    got = model.predict(params, torch.arange(n_users).unsqueeze(1), every, y_range=Y_RANGE)
    assert got.shape == (n_users, 9)
    for user in range(n_users):
        pairs = model.predict(params, torch.full((9,), user), every, y_range=Y_RANGE)
        torch.testing.assert_close(got[user], pairs, rtol=0, atol=1e-12)
    # A column of items against a row of users goes through the other branch.
    users = torch.arange(n_users)
    other = model.predict(params, users, every.unsqueeze(1), y_range=Y_RANGE)
    torch.testing.assert_close(other.T, got, rtol=0, atol=1e-12)


def test_gradient_is_autograds(params, batch):
    leaves = model.Params(*(param.clone().requires_grad_() for param in params))
    users, items, ratings = batch
    expected = model.mse(model.predict(leaves, users, items, y_range=Y_RANGE), ratings)
    expected.backward()
    loss, grads = model.loss_and_grad(params, *batch, y_range=Y_RANGE)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-14)
    for name, grad, leaf in zip(params._fields, grads, leaves, strict=True):
        torch.testing.assert_close(grad, leaf.grad, rtol=1e-12, atol=1e-14, msg=name)


def test_gradient_changes_nothing(params, batch):
    before = [param.clone() for param in params]
    model.loss_and_grad(params, *batch, y_range=Y_RANGE)
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))


def test_shapes_are_never_broadcast(params, batch):
    users, items, ratings = batch
    prediction = model.predict(params, users, items, y_range=Y_RANGE)
    with pytest.raises(ValueError, match=r"\(7,\) is not the ratings' shape \(7, 1\)"):
        model.mse(prediction, ratings.unsqueeze(1))
    with pytest.raises(ValueError, match=r"must be \(B,\), not \(7,\), \(7,\), \(7, 1\)"):
        model.loss_and_grad(params, users, items, ratings.unsqueeze(1), y_range=Y_RANGE)
    with pytest.raises(ValueError, match=r"must be \(B,\), not \(7, 1\), \(7,\), \(7,\)"):
        model.loss_and_grad(params, users.unsqueeze(1), items, ratings, y_range=Y_RANGE)
