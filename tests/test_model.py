import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import model

HEAD = model.bounded(0.5, 5.5)
MOVED = model.bounded(-3, 8, mean=4.4, unit=0.3)
ORDINAL = model.ordinal([1, 2, 3.5, 4, 5], [0.9, 0.8, 0.5, 0.2])


@pytest.fixture
def params():
    """Large enough for the sigmoid to bend: std 1, float64, three factors."""
    return make_params(6, 9, HEAD)


@pytest.fixture
def batch():
    """Users and items that occur several times in one batch."""
    users = torch.tensor([0, 5, 0, 2, 0, 5, 1])
    items = torch.tensor([8, 8, 8, 3, 1, 0, 3])
    ratings = torch.tensor([5, 1, 3.5, 4, 2, 5, 1], dtype=torch.float64)
    return users, items, ratings


def test_init_is_a_cut_normal():
    generator = torch.Generator().manual_seed(0)
    params = model.init_params(400, 500, n_factors=50, generator=generator, std=0.01)
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


def sparse(matrix):
    """The triple of a dense matrix."""
    rows, columns = matrix.nonzero(as_tuple=True)
    starts = torch.searchsorted(rows, torch.arange(len(matrix) + 1))
    return starts, columns, matrix[rows, columns]


def bounded_loss(low, high, mean, unit):
    """The mean squared error of a sigmoid, in units, written out."""
    odds = (mean - low) / (high - mean)

    def loss(z, ratings):
        prediction = low + (high - low) / (1 + torch.exp(-z) / odds)
        return ((prediction - ratings) / unit).square().mean()

    return loss


def ordinal_loss(z, ratings):
    """The negative log-likelihood of Q independent coins, written out."""
    total = 0.0
    for q, (level, share) in enumerate(zip([1, 2, 3.5, 4], [0.9, 0.8, 0.5, 0.2], strict=True)):
        p = 1 / (1 + torch.exp(-z[:, q]) * (1 - share) / share)
        total = total - torch.where(ratings > level, p, 1 - p).log().mean()
    return total


LOSSES = {
    "bounded": (HEAD, bounded_loss(0.5, 5.5, 3, 1)),
    "mean and unit": (MOVED, bounded_loss(-3, 8, 4.4, 0.3)),
    "ordinal": (ORDINAL, ordinal_loss),
}
HEADS = pytest.mark.parametrize("head", [HEAD, MOVED, ORDINAL], ids=LOSSES)


def make_params(n_users, n_items, head):
    generator = torch.Generator().manual_seed(1)
    options = {"n_factors": 3, "n_outputs": head.n_outputs, "std": 1.0, "dtype": torch.float64}
    return model.init_params(n_users, n_items, generator=generator, **options)


def sums(table, users, items, context, kept, n_users=8):
    """Dot product and biases of pairs, written without any of the model's functions."""
    ours, theirs = table[users], table[n_users + items]
    if context is not None:
        ours = ours + context @ table[n_users - 2 : n_users]
    dot = (ours[:, :3] * theirs[:, :3] * kept).sum(1, keepdim=True)
    return (dot + ours[:, 3:] + theirs[:, 3:]).squeeze(1)


@pytest.mark.parametrize(("head", "loss"), LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("has_context", [False, True])
@pytest.mark.parametrize("has_features", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradient_is_autograds(batch, head, loss, has_context, has_features, dropout):
    users, items, ratings = batch
    generator = torch.Generator().manual_seed(2)
    context = torch.randn(len(users), 2, generator=generator).double() if has_context else None
    kept = 1.0
    if dropout:
        draw = torch.rand((7, 3), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        kept = (draw >= dropout).double() / (1 - dropout)
    compute, matrix = model.loss_and_grad, torch.eye(8 + 9, dtype=torch.float64)
    if has_features:
        matrix = torch.randn(8 + 9, 11, generator=generator).relu().double() / 3
        matrix[5], matrix[:, 3] = 0, 0
        features = model.Features(sparse(matrix), sparse(matrix.T))
        compute = partial(model.embedded_loss_and_grad, features=features)
    table = model.join(make_params(5, matrix.shape[1] - 5, head))
    leaf = table.clone().requires_grad_()
    expected = loss(sums(matrix @ leaf, users, items, context, kept), ratings)
    expected.backward()
    before = table.clone()
    got, (grad,) = compute(
        [table],
        *(users, items, ratings, context),
        n_users=8,
        head=head,
        dropout=dropout,
        generator=torch.Generator().manual_seed(3),
    )
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-11, atol=1e-13)
    assert torch.equal(table, before), "changes nothing"


@HEADS
def test_the_joined_table_is_split_into_views_of_it(head):
    params = make_params(6, 9, head)
    table = model.join(params)
    assert table.shape == (15, 3 + head.n_outputs)
    split = model.split_table(table, 6, n_outputs=head.n_outputs)
    assert all(torch.equal(a, b) for a, b in zip(params, split, strict=True))
    assert all(part.untyped_storage().data_ptr() == table.data_ptr() for part in split)


@HEADS
def test_the_slope_is_autograds(head):
    z = torch.zeros(1, head.n_outputs, dtype=torch.float64).squeeze(1).requires_grad_()
    head.predict(z).sum().backward()
    assert head.slope == pytest.approx(z.grad.sum().item(), rel=1e-12)


@pytest.mark.parametrize("mean", [0.5001, 1.0, 3.0, 3.53, 5.4999])
def test_the_prediction_at_zero_is_the_mean(mean):
    """And of three times its odds where z is log 3."""
    head, odds = model.bounded(0.5, 5.5, mean=mean, unit=7.0), 3 * (mean - 0.5) / (5.5 - mean)
    z = torch.tensor([0.0, -1e3, 1e3, math.log(3)], dtype=torch.float64)
    expected = [mean, 0.5, 5.5, 0.5 + 5 * odds / (1 + odds)]
    assert head.predict(z).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("mean", [0.5, 5.5, -1.0, 6.0, float("nan")])
def test_a_mean_that_is_out_of_range(mean):
    with pytest.raises(ValueError, match=f"the mean {mean:g} is not between 0.5 and 5.5"):
        model.bounded(0.5, 5.5, mean=mean)


@pytest.mark.parametrize("b", [1e-6, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_are_the_same_at_any_scale(batch, b, dtype):
    users, items, ratings = batch
    table, tolerance = model.join(make_params(8, 9, MOVED)).to(dtype), 10 * torch.finfo(dtype).eps
    (loss, (grad,)), (scaled_loss, (scaled_grad,)) = (
        model.loss_and_grad([table], users, items, rated.to(dtype), n_users=8, head=head)
        for head, rated in (
            (MOVED, ratings),
            (model.bounded(-3 * b, 8 * b, mean=4.4 * b, unit=0.3 * b), ratings * b),
        )
    )
    assert scaled_loss.item() == pytest.approx(loss.item(), rel=tolerance)
    assert (scaled_grad - grad).abs().max() < tolerance * grad.abs().max()


def test_shapes_are_never_broadcast(params, batch):
    users, items, ratings = batch
    bad = [
        ((users, items, ratings.unsqueeze(1)), r"\(7,\), \(7,\), \(7, 1\)"),
        ((users.unsqueeze(1), items, ratings), r"\(7, 1\), \(7,\), \(7,\)"),
        ((users[:0], items[:0], ratings[:0]), r"\(0,\), \(0,\), \(0,\)"),
    ]
    for columns, shapes in bad:
        with pytest.raises(ValueError, match=rf"must be \(B,\), not {shapes}"):
            model.loss_and_grad([model.join(params)], *columns, n_users=6, head=HEAD)


def test_identity_features_are_ids(params):
    """Bit for bit: the model of ids alone is the case 'identity matrix'."""
    table = model.join(params)
    assert torch.equal(model.embed(table, sparse(torch.eye(15, dtype=torch.float64))), table)


RATED = st.tuples(st.integers(0, 4), st.integers(0, 6), st.sampled_from([0.5, 1, 2, 3.5, 5]))


@given(st.lists(RATED, min_size=1, max_size=30), st.sampled_from([0.5, 5, 12.5]))
def test_averages_are_those_of_a_slow_loop(rows, shrink):
    users, items, ratings = map(torch.tensor, zip(*rows, strict=True))
    options = {} if shrink == 5 else {"shrink": shrink}
    got = model.find_averages(users, items, ratings, n_users=5, n_items=7, **options)
    assert got.mean == pytest.approx(sum(r for *_, r in rows) / len(rows), rel=1e-12)
    rest = [r - got.mean for *_, r in rows]
    for offsets, side in ((got.items, 1), (got.users, 0)):
        slow = []
        for row in range(len(offsets)):
            own = [x for x, line in zip(rest, rows, strict=True) if line[side] == row]
            slow.append(sum(own) / (len(own) + shrink))
        assert offsets.tolist() == pytest.approx(slow, abs=1e-5)
        rest = [x - slow[line[side]] for x, line in zip(rest, rows, strict=True)]
    assert (len(got.users), len(got.items)) == (5, 7)


@HEADS
def test_the_center_predicts_the_averages(head):
    """To first order: of offsets a hundredth as large, the error is a ten-thousandth or less."""
    params, offsets = make_params(5, 8, head), torch.linspace(-1, 1, 10).double().square()
    mean = head.predict(torch.zeros(1, head.n_outputs, dtype=torch.float64).squeeze(1)).item()
    errors = []
    for scale in (0.1, 0.001):
        users, items = (scale * offsets).split([4, 6])
        center = model.find_center(params, model.Averages(mean, users, items), head=head)
        assert [table.shape for table in center] == [table.shape for table in params]
        assert not any(t.any() for t in (*center[:2], center.user_bias[4:], center.item_bias[6:]))
        got = model.predict(center, torch.arange(4).unsqueeze(1), torch.arange(6), head=head)
        errors.append((got - mean - users.unsqueeze(1) - items).abs().max().item())
    assert 0 < errors[1] < 1.2e-4 * errors[0] < 3e-6


@HEADS
@pytest.mark.parametrize("has_context", [False, True])
def test_prediction_is_the_formula(batch, head, has_context):
    users, items, _ = batch
    context = torch.linspace(-1, 1, 14).double().view(7, 2) if has_context else None
    params = make_params(8, 9, head)
    expected = head.predict(sums(model.join(params), users, items, context, kept=1.0))
    got = model.predict(params, users, items, context, head=head)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@HEADS
@pytest.mark.parametrize("n_users", [1, 2, 6])
def test_prediction_broadcasts(head, n_users):
    """A column of users against a row of items, and the other way, which takes another branch."""
    params, users, items = make_params(6, 9, head), torch.arange(n_users), torch.arange(9)
    pairs = torch.cartesian_prod(users, items).unbind(1)
    expected = model.predict(params, *pairs, head=head).view(n_users, 9)
    got = model.predict(params, users.unsqueeze(1), items, head=head)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    got = model.predict(params, users, items.unsqueeze(1), head=head)
    torch.testing.assert_close(got.T, expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"with context, users must be \(B,\), not \(\d, 1\)"):
        model.predict(params, users.unsqueeze(1), items, torch.zeros(n_users, 2), head=head)


def test_the_ordinal_prediction_is_the_expected_level():
    head = model.ordinal([1, 2, 4], [0.75, 0.25])
    assert head.predict(torch.zeros(3, 2)).tolist() == pytest.approx([1 + 0.75 + 2 * 0.25] * 3)
    sure = head.predict(torch.tensor([[50.0, 50.0], [50.0, -50.0], [-50.0, -50.0]]))
    assert sure.tolist() == pytest.approx([4, 2, 1])


@pytest.mark.parametrize(
    ("levels", "shares"),
    [([1, 2], [0.5]), ([1, 2, 3], [0.5]), ([1, 3, 2], [0.5, 0.2]), ([1, 2, 3], [1.0, 0.2])],
)
def test_levels_and_shares_that_do_not_fit(levels, shares):
    with pytest.raises(ValueError, match="shares"):
        model.ordinal(levels, shares)


def test_unseen_rows_are_the_mean_of_the_seen(params):
    seen_users = torch.tensor([True, True, False, True, True, True])
    filled = model.fill_unseen(params, seen_users, torch.ones(9, dtype=torch.bool))
    assert torch.equal(filled.user_factors[2], params.user_factors[seen_users].mean(0))
    assert torch.equal(filled.user_bias[2], params.user_bias[seen_users].mean(0))
    assert torch.equal(filled.user_factors[seen_users], params.user_factors[seen_users])
    assert torch.equal(filled.item_factors, params.item_factors)
    assert not torch.equal(params.user_factors[2], filled.user_factors[2]), "pure"


def rated(head, n=12, seed=0):
    """Items of three factors, ratings of them, and a prior, float64."""
    generator = torch.Generator().manual_seed(seed)
    outputs = () if head.n_outputs == 1 else (head.n_outputs,)
    q = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    bias = torch.randn(n, *outputs, generator=generator, dtype=torch.float64)
    ratings = torch.randint(1, 6, (n,), generator=generator).double()
    rows = torch.randn(7, 3 + head.n_outputs, generator=generator, dtype=torch.float64)
    return q, bias, ratings, model.find_prior(rows[:, :3], rows[:, 3:].squeeze(1), width=4.0)


@pytest.mark.parametrize(
    ("head", "noise"), [(HEAD, 1.2), (HEAD, 6.0), (MOVED, 18.0), (ORDINAL, 1.0)]
)
@pytest.mark.parametrize("seed", range(5))
def test_a_folded_in_user_is_where_the_posterior_is_flat(head, noise, seed):
    """By autograd, of the objective that the docstring states, from the losses in training."""
    q, bias, ratings, prior = rated(head, seed=seed)
    p, b = model.fold_in(q, bias, ratings, prior=prior, head=head, noise=noise)
    x = torch.cat([p, b.reshape(-1)]).requires_grad_()
    z = (q @ x[:3]).reshape(len(q), *[1] * (bias.dim() - 1))
    z = z + (x[3:] if bias.dim() > 1 else x[3]) + bias
    nll = head.loss_and_grad(z, ratings)[0] * len(ratings)
    posterior = nll / noise + ((x - prior.mean).square() / prior.variance).sum() / 2
    (slope,) = torch.autograd.grad(posterior, x)
    assert slope.abs().max() < 1e-4
    elsewhere = model.fold_in(q, bias, ratings.flip(0), prior=prior, head=head, noise=noise)[0]
    assert not torch.allclose(p, elsewhere)


def test_a_fold_in_recovers_the_user_who_gave_the_ratings(params):
    user = 3
    items = torch.arange(9)
    ratings = model.predict(params, torch.full((9,), user), items, head=HEAD)
    wide = model.Prior(torch.zeros(4, dtype=torch.float64), torch.full((4,), 1e8).double())
    p, b = model.fold_in(params.item_factors, params.item_bias, ratings, prior=wide, head=HEAD)
    assert torch.allclose(p, params.user_factors[user], atol=1e-5)
    assert b.item() == pytest.approx(params.user_bias[user].item(), abs=1e-5)


@pytest.mark.parametrize("head", [HEAD, ORDINAL])
def test_a_user_without_ratings_is_the_average_one(head):
    q, bias, ratings, prior = rated(head)
    p, b = model.fold_in(q[:0], bias[:0], ratings[:0], prior=prior, head=head)
    assert torch.equal(torch.cat([p, b.reshape(-1)]), prior.mean)


def test_the_prior_by_hand():
    factors, bias = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([1.0, -1.0])
    prior = model.find_prior(factors, bias, width=3.0)
    assert prior.mean.tolist() == [2, 0, 0]
    assert prior.variance.tolist() == pytest.approx([1.5, 1.5, 3.0])


def test_similar_is_the_mean_cosine():
    first = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    second = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [1.0, 0.0]])
    assert model.find_similar([first], 0).tolist() == [1, 1, 0, 0]
    expected = [1, 0.5, 0.5, 0.5**0.5 / 2]
    assert model.find_similar([first, second], 0).tolist() == pytest.approx(expected)


def test_components_are_those_of_the_singular_value_decomposition():
    members = [torch.randn(50, 4, generator=torch.Generator().manual_seed(n)) for n in (1, 2)]
    rows = torch.cat(members, 1).double()
    u, s, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    places, expected = model.find_components(members), u[:, :2] * s[:2]
    assert torch.allclose(places.abs(), expected.abs())
    assert places.shape == (50, 2)
    assert (places.max(0).values > -places.min(0).values).all()


def test_all_items_are_predicted_by_the_mean_of_the_members(params):
    others = model.Params(*(table.flip(0) for table in params))
    users, items = torch.tensor([4, 0]), torch.arange(9)
    pairs = torch.cartesian_prod(users, items).unbind(1)
    expected = (
        model.predict(params, *pairs, head=HEAD) + model.predict(others, *pairs, head=HEAD)
    ) / 2
    found = model.predict_all([params, others], users, head=HEAD)
    assert torch.allclose(found, expected.view(2, 9))
    assert torch.allclose(
        model.predict_all([params], users, head=HEAD).view(-1),
        model.predict(params, *pairs, head=HEAD),
    )


def test_the_average_row_stands_behind_the_others(params):
    seen_users, seen_items = torch.tensor([True, False, True]), torch.ones(9, dtype=torch.bool)
    longer = model.append_average(params, seen_users, seen_items)  # three rows more than users
    assert [len(table) for table in longer] == [7, 10, 7, 10]
    assert torch.equal(longer.user_factors[3], params.user_factors[[0, 2]].mean(0))
    assert torch.equal(longer.user_factors[4:], params.user_factors[3:])
    assert longer.item_bias[9] == params.item_bias.mean()
