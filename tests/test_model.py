from functools import partial

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import model

HEAD = model.bounded(0.5, 5.5)
MOVED = model.bounded(-3, 8, mean=4.4, unit=0.3)
ORDINAL = model.ordinal([1, 2, 3.5, 4, 5], [0.9, 0.8, 0.5, 0.2])
HEADS = pytest.mark.parametrize("head", [HEAD, MOVED, ORDINAL], ids=["bounded", "moved", "ordinal"])


def make_params(n_users, n_items, head=HEAD):
    """Large enough for the sigmoid to bend: std 1, float64, three factors."""
    generator = torch.Generator().manual_seed(1)
    options = {"n_factors": 3, "n_outputs": head.n_outputs, "std": 1.0, "dtype": torch.float64}
    return model.init_params(n_users, n_items, generator=generator, **options)


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
    again = model.init_params(400, 500, n_factors=50, generator=generator.manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))
    with pytest.raises(ValueError, match="cannot make 400 x 0 rows of 50 factors"):
        model.init_params(400, 0, n_factors=50, generator=generator)


def predict_written_out(head, z):
    """A sigmoid from -3 to 8 or 0.5 to 5.5, or Q of them, without the model's functions."""
    if head is ORDINAL:
        odds = torch.tensor([0.9 / 0.1, 0.8 / 0.2, 0.5 / 0.5, 0.2 / 0.8], dtype=torch.float64)
        return 1 + (torch.tensor([1, 1.5, 0.5, 1]) / (1 + torch.exp(-z) / odds)).sum(-1)
    low, high, mean = (0.5, 5.5, 3.0) if head is HEAD else (-3, 8, 4.4)
    return low + (high - low) / (1 + torch.exp(-z) * (high - mean) / (mean - low))


def loss_written_out(head, z, ratings):
    if head is not ORDINAL:
        unit = 1 if head is HEAD else 0.3
        return ((predict_written_out(head, z) - ratings) / unit).square().mean()
    total = 0.0  # the negative log-likelihood of Q independent coins
    for q, (level, share) in enumerate(zip([1, 2, 3.5, 4], [0.9, 0.8, 0.5, 0.2], strict=True)):
        p = 1 / (1 + torch.exp(-z[:, q]) * (1 - share) / share)
        total = total - torch.where(ratings > level, p, 1 - p).log().mean()
    return total


def sums(table, users, items, context, kept=1.0, n_users=8):
    """Dot product and biases of pairs, written without any of the model's functions."""
    ours, theirs = table[users], table[n_users + items]
    if context is not None:
        ours = ours + context @ table[n_users - 2 : n_users]
    dot = (ours[:, :3] * theirs[:, :3] * kept).sum(1, keepdim=True)
    return (dot + ours[:, 3:] + theirs[:, 3:]).squeeze(1)


def sparse(matrix):
    """The triple of a dense matrix."""
    rows, columns = matrix.nonzero(as_tuple=True)
    starts = torch.searchsorted(rows, torch.arange(len(matrix) + 1))
    return starts, columns, matrix[rows, columns]


@HEADS
@pytest.mark.parametrize("has_context", [False, True])
@pytest.mark.parametrize("has_features", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradient_is_autograds(batch, head, has_context, has_features, dropout):
    users, items, ratings = batch
    generator = torch.Generator().manual_seed(2)
    context = torch.randn(len(users), 2, generator=generator).double() if has_context else None
    compute, matrix = model.loss_and_grad, torch.eye(8 + 9, dtype=torch.float64)
    if has_features:
        matrix = torch.randn(8 + 9, 11, generator=generator).relu().double() / 3
        matrix[5], matrix[:, 3] = 0, 0
        features = model.Features(sparse(matrix), sparse(matrix.T))
        compute = partial(model.embedded_loss_and_grad, features=features)
    compute = partial(compute, n_users=8, head=head)
    draw = torch.rand((7, 3), generator=generator.manual_seed(3), dtype=torch.float64)
    kept = (draw >= dropout).double() / (1 - dropout)
    if dropout:
        options = {"n_factors": 3, "generator": generator.manual_seed(3)}
        compute = model.with_dropout(compute, dropout=dropout, **options)
    table = model.join(make_params(5, matrix.shape[1] - 5, head))
    leaf, before = table.clone().requires_grad_(), table.clone()
    expected = loss_written_out(head, sums(matrix @ leaf, users, items, context, kept), ratings)
    expected.backward()
    got, (grad,) = compute([table], users, items, ratings, context)
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


def test_heads_that_cannot_be():
    for mean in (0.5, 6.0, float("nan")):
        with pytest.raises(ValueError, match=f"the mean {mean:g} is not between 0.5 and 5.5"):
            model.bounded(0.5, 5.5, mean=mean)
    for levels, shares in (([1, 2], [0.5]), ([1, 3, 2], [0.5, 0.2]), ([1, 2, 3], [1.0, 0.2])):
        with pytest.raises(ValueError, match=r"levels .* and shares .* do not fit"):
            model.ordinal(levels, shares)


def test_shapes_are_never_broadcast(batch):
    users, items, ratings = batch
    bad = [
        ((users, items, ratings.unsqueeze(1)), r"\(7,\), \(7,\), \(7, 1\)"),
        ((users.unsqueeze(1), items, ratings), r"\(7, 1\), \(7,\), \(7,\)"),
        ((users[:0], items[:0], ratings[:0]), r"\(0,\), \(0,\), \(0,\)"),
    ]
    for columns, shapes in bad:
        with pytest.raises(ValueError, match=rf"must be \(B,\), not {shapes}"):
            model.loss_and_grad([model.join(make_params(6, 9))], *columns, n_users=6, head=HEAD)


RATED = st.tuples(st.integers(0, 4), st.integers(0, 6), st.sampled_from([0.5, 1, 2, 3.5, 5]))


@given(st.lists(RATED, min_size=1, max_size=30), st.sampled_from([0.5, 5, 12.5]))
def test_averages_are_those_of_a_slow_loop(rows, shrink):
    users, items, ratings = map(torch.tensor, zip(*rows, strict=True))
    options = {} if shrink == 5 else {"shrink": shrink}
    got = model.find_averages(users, items, ratings, n_users=5, n_items=7, **options)
    assert got.mean == pytest.approx(sum(r for *_, r in rows) / len(rows), rel=1e-12)
    rest = [r - got.mean for *_, r in rows]
    for offsets, side, n in ((got.items, 1, 7), (got.users, 0, 5)):
        slow = []
        for row in range(n):
            own = [x for x, line in zip(rest, rows, strict=True) if line[side] == row]
            slow.append(sum(own) / (len(own) + shrink))
        assert offsets.tolist() == pytest.approx(slow, abs=1e-5)
        rest = [x - slow[line[side]] for x, line in zip(rest, rows, strict=True)]


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
    expected = predict_written_out(head, sums(model.join(params), users, items, context))
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


def test_the_average_row_is_of_those_seen_and_stands_behind_them():
    params = make_params(6, 9)
    seen_users, seen_items = torch.tensor([True, False, True]), torch.ones(9, dtype=torch.bool)
    got = model.add_average(params, seen_users, seen_items)  # the last three rows are no users'
    for table, longer in zip(params[::2], got[::2], strict=True):
        mean = table[[0, 2]].mean(0)
        assert torch.equal(longer, torch.stack([table[0], mean, table[2], mean, *table[3:]]))
    for table, longer in zip(params[1::2], got[1::2], strict=True):
        assert torch.equal(longer, torch.cat([table, table.mean(0, keepdim=True)]))


@pytest.mark.parametrize(
    ("head", "noise"), [(HEAD, 1.2), (HEAD, 6.0), (MOVED, 18.0), (ORDINAL, 1.0)]
)
@pytest.mark.parametrize("seed", range(5))
def test_a_folded_in_user_is_where_the_posterior_is_flat(head, noise, seed):
    """By autograd, of the objective that the docstring states; without ratings at its start."""
    _, q, _, bias = make_params(1, 12, head)
    ratings = torch.randint(1, 6, (12,), generator=torch.Generator().manual_seed(seed)).double()
    prior = model.find_prior(make_params(7, 1, head), torch.arange(7), width=4.0)
    p, b = model.fold_in(q, bias, ratings, prior=prior, head=head, noise=noise)
    x = torch.cat([p, b.reshape(-1)]).requires_grad_()
    z = (q @ x[:3]).reshape(len(q), *[1] * (bias.dim() - 1))
    z = z + (x[3:] if bias.dim() > 1 else x[3]) + bias
    nll = loss_written_out(head, z, ratings) * len(ratings)
    posterior = nll / noise + ((x - prior.mean).square() / prior.variance).sum() / 2
    (slope,) = torch.autograd.grad(posterior, x)
    assert slope.abs().max() < 1e-4
    p, b = model.fold_in(q[:0], bias[:0], ratings[:0], prior=prior, head=head)
    assert torch.equal(torch.cat([p, b.reshape(-1)]), prior.mean)


@pytest.mark.parametrize("head", [HEAD, ORDINAL])
def test_an_added_user_is_so_too_where_ratings_have_moments(head):
    rows, items = make_params(9, 12, head), torch.arange(12)  # the last two users' are moments
    prior = model.find_prior(rows, torch.arange(7), width=4.0)
    generator = torch.Generator().manual_seed(0)
    ratings = torch.randint(1, 6, (12,), generator=generator).double()
    context = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    got = model.add_user(rows, items, ratings, prior=prior, head=head, context=context)
    assert [len(table) for table in got] == [3, 12, 3, 12]
    row = torch.cat([got.user_factors[0], got.user_bias[0].reshape(-1)]).requires_grad_()
    user = row + context @ torch.cat([rows.user_factors, rows.user_bias.view(9, -1)], 1)[-2:]
    z = (user[:, :3] * rows.item_factors).sum(1, keepdim=True) + user[:, 3:]
    z = z.view(rows.item_bias.shape) if head is HEAD else z
    nll = loss_written_out(head, z + rows.item_bias, ratings) * len(ratings)
    posterior = nll + ((row - prior.mean).square() / prior.variance).sum() / 2
    (slope,) = torch.autograd.grad(posterior, row)
    assert slope.abs().max() < 1e-4


def test_the_prior_by_hand():
    factors, bias = torch.tensor([[1.0, 0.0], [9.0, 9.0], [3.0, 0.0]]), torch.tensor([1.0, 9, -1.0])
    rows = model.Params(factors, factors, bias, bias)
    prior = model.find_prior(rows, torch.tensor([0, 2]), width=3.0)
    assert prior.mean.tolist() == [2, 0, 0]
    assert prior.variance.tolist() == pytest.approx([1.5, 1.5, 3.0])
    part = torch.tensor([[1.0, 0, 0], [0, 0, 0], [3.0, 0, 0]])  # all that differs in the factors
    implicit = part, torch.tensor([5.0, 0, 0])
    prior = model.find_prior(rows, torch.tensor([0, 2]), width=3.0, implicit=implicit)
    assert prior.mean.tolist() == [5, 0, 0]
    assert prior.variance.tolist() == pytest.approx([0, 0, 3.0])


def test_likings_by_hand():
    params = make_params(2, 3)
    members = params, params._replace(item_bias=params.item_bias + 1)
    z = params.user_bias[1] + params.item_bias
    expected = (HEAD.predict(z) + HEAD.predict(z + 1)) / 2
    assert torch.allclose(model.find_likings(members, 1, head=HEAD), expected, 0, 1e-12)


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
    (places, shares), expected = model.find_components(members), u[:, :2] * s[:2]
    assert torch.allclose(places.abs(), expected.abs())
    assert torch.allclose(shares, s[:2] ** 2 / (s**2).sum())
    assert (places.max(0).values > -places.min(0).values).all()


def test_unrated_rows_are_a_ridge_regression():
    """Against numpy's solution; row 0 and 5 have no ratings, feature 0 is of rated rows alone."""
    generator = torch.Generator().manual_seed(0)
    rows, n_ratings = torch.randn(6, 3, generator=generator), torch.tensor([0, 2, 3, 1, 4, 0])
    features = [[3], [0, 1], [1, 3], [0, 2], [1, 3], [1, 2]]
    columns = torch.tensor([7, *(each for own in features for each in own)])  # of other rows before
    starts = torch.tensor([0, *(len(own) for own in features)]).cumsum(0) + 1
    values = torch.rand(len(columns), generator=generator)
    full = numpy.zeros((6, 5))
    for line, (start, own) in enumerate(zip(starts.tolist(), features, strict=False)):
        full[line, own] = values[start : start + len(own)]
    full[:, 0], full[:, 4] = 0, 1
    weights = n_ratings.numpy()[:, None] / n_ratings[n_ratings > 0].double().mean().item()
    mean = (weights * rows.numpy()).sum(0) / weights.sum()
    gram = full.T @ (weights * full) + 0.5 * numpy.eye(5)
    slopes = numpy.linalg.solve(gram, full.T @ (weights * (rows.numpy() - mean)))
    found = model.regress_unrated(rows, (starts, columns, values), n_ratings, ridge=0.5)
    assert torch.equal(found[1:5], rows[1:5])
    assert numpy.allclose(found[[0, 5]], (mean + full @ slopes)[[0, 5]], atol=1e-5)


def test_tastes_are_the_right_singular_vectors():
    """Of a matrix of low rank exactly; who has rated nothing gets what most have rated."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(0, 3, (60,), generator=generator)
    rated = torch.randint(0, 2, (3, 30), generator=generator)[groups]
    users, items = rated.nonzero().unbind(1)
    tastes = model.find_tastes(users, items, n_users=60, n_items=30, n_factors=3)
    vectors = numpy.linalg.svd(rated.numpy(), full_matrices=False)[2][:3]
    assert numpy.allclose(tastes @ tastes.T, vectors.T @ vectors, atol=1e-5)
    own, counts = rated[0].nonzero()[:, 0], rated.sum(0)
    scores = model.score_tastes(tastes, [own, own[:0]], counts)
    assert numpy.allclose(scores[0], rated[0].numpy() @ vectors.T @ vectors, atol=1e-5)
    assert counts[scores[1].argmax()] == counts.max()
