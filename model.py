"""Matrix factorisation with biases: tables of parameters, prediction, loss and its gradient.

>>> import torch
>>> from model import init_params, loss_and_grad, predict
>>> params = init_params(3, 5, n_factors=2, generator=torch.Generator().manual_seed(0))
>>> users, items, ratings = torch.tensor([0, 2]), torch.tensor([4, 1]), torch.tensor([5.0, 3.0])
>>> loss, grads = loss_and_grad(params, users, items, ratings, y_range=(0, 5.5))
>>> predict(params, torch.tensor([[0], [1]]), torch.arange(5), y_range=(0, 5.5)).shape
torch.Size([2, 5])
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Params(NamedTuple):
    """The tables of the model, or anything of their shapes, such as their gradients."""

    user_factors: Tensor  # (n_users, K)
    item_factors: Tensor  # (n_items, K)
    user_bias: Tensor  # (n_users,)
    item_bias: Tensor  # (n_items,)


def init_params(
    n_users: int,
    n_items: int,
    *,
    n_factors: int,
    generator: torch.Generator,
    std: float = 0.01,
    dtype: torch.dtype = torch.float32,
) -> Params:
    """All four tables from a normal distribution cut at two deviations, times `std`, as in fastai.

    Cut means `fmod(2)`: a draw beyond two deviations is wrapped towards zero, not drawn again.
    (`torch.nn.init.trunc_normal_(std=0.01)` would cut nothing: its bounds are absolute.)
    """
    for name, count in (("n_users", n_users), ("n_items", n_items), ("n_factors", n_factors)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")
    shapes = (n_users, n_factors), (n_items, n_factors), (n_users,), (n_items,)
    draws = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return Params(*(draw.fmod_(2).mul_(std) for draw in draws))


def predict(params: Params, users: Tensor, items: Tensor, *, y_range: tuple) -> Tensor:
    """Predicted ratings of pairs of rows: `users` and `items` int64, their shapes broadcast.

        low + (high - low) sigmoid(user_factors . item_factors + user_bias + item_bias)

    (B,) with (B,) gives B pairs; (B, 1) with (n_items,) gives a (B, n_items) matrix, every item
    for each user, by one matrix product. Source: Koren, Bell & Volinsky 2009, "Matrix factorization
    techniques for recommender systems", equation 4; the sigmoid into `y_range` is fastai's.
    """
    low, high = y_range
    bias = params.user_bias[users] + params.item_bias[items]
    if users.dim() == 2 and users.shape[1] == 1 and items.dim() == 1:
        dot = params.user_factors[users[:, 0]] @ params.item_factors[items].T
    else:
        dot = (params.user_factors[users] * params.item_factors[items]).sum(-1)
    return torch.sigmoid(dot + bias) * (high - low) + low


def mse(prediction: Tensor, ratings: Tensor) -> Tensor:
    """Mean squared error, () of two tensors of one shape.

    Another shape is a ValueError and never broadcast: (B,) against (B, 1) would average over B x B
    pairs, which trains the biases alone and looks like a result.
    """
    if prediction.shape != ratings.shape:
        raise ValueError(
            f"the prediction's shape {tuple(prediction.shape)} is not "
            f"the ratings' shape {tuple(ratings.shape)}"
        )
    return (prediction - ratings).square().mean()


def loss_and_grad(
    params: Params, users: Tensor, items: Tensor, ratings: Tensor, *, y_range: tuple
) -> tuple[Tensor, Params]:
    """`mse(predict(...), ratings)` of a batch, and its gradient in every table, derived by hand.

    `users` and `items` int64 (B,), `ratings` (B,). With s the sigmoid and z the sum inside it,
    d loss / d z = 2 (prediction - rating) (high - low) s (1 - s) / B, a bias gets this sum over the
    pairs it takes part in, and a row of factors this times the other side's row.
    """
    if not users.shape == items.shape == ratings.shape or users.dim() != 1:
        shapes = ", ".join(str(tuple(t.shape)) for t in (users, items, ratings))
        raise ValueError(f"users, items and ratings must be (B,), not {shapes}")
    low, high = y_range
    p, q = params.user_factors[users], params.item_factors[items]  # (B, K)
    z = (p * q).sum(1) + params.user_bias[users] + params.item_bias[items]
    s = torch.sigmoid(z)
    error = s * (high - low) + (low - ratings)
    dz = error * (s - s * s) * (2 * (high - low) / len(ratings))
    column = dz.unsqueeze(1)
    grads = Params(
        torch.zeros_like(params.user_factors).index_add_(0, users, q * column),
        torch.zeros_like(params.item_factors).index_add_(0, items, p * column),
        torch.zeros_like(params.user_bias).index_add_(0, users, dz),
        torch.zeros_like(params.item_bias).index_add_(0, items, dz),
    )
    return error.dot(error) / len(ratings), grads
