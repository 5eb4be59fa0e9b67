import copy
import io
import math
import multiprocessing
import os
import re
import weakref
from functools import partial
from itertools import accumulate

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import model
import schedule
import train

HEAD = model.bounded(0, 5.5)
ROWS = torch.arange(10)
RATINGS = torch.arange(10, dtype=torch.float32)


def recorder(seen):
    """A loss that notes its batches: the sum of the ratings over their number, no gradient."""

    def loss_and_grad(params, users, items, ratings):
        assert torch.equal(users, items)
        assert torch.equal(users.float(), ratings)
        seen.append(users.tolist())
        return ratings.mean(), [torch.zeros(())]

    return loss_and_grad


def fit_recorded(n_epochs=2, batch_size=4, drop_last=False, seed=0):
    seen = []
    epochs = train.fit(
        [torch.zeros(())],
        ROWS,
        ROWS,
        RATINGS,
        loss_and_grad=recorder(seen),
        optimizer=(lambda params: None, lambda params, grads, state, step: None),
        n_epochs=n_epochs,
        batch_size=batch_size,
        drop_last=drop_last,
        generator=torch.Generator().manual_seed(seed),
    )
    return list(epochs), seen


def test_an_epoch_is_every_rating_once(monkeypatch):
    _, seen = fit_recorded()
    assert [len(batch) for batch in seen] == [4, 4, 2] * 2
    first, second = (seen[i] + seen[i + 1] + seen[i + 2] for i in (0, 3))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert second != sorted(second)
    for n_rows in (1, 8):
        monkeypatch.setattr(train, "SHUFFLED_AT_ONCE", n_rows)
        assert fit_recorded()[1] == seen


def test_the_last_batch_can_be_dropped():
    _, seen = fit_recorded(drop_last=True)
    assert [len(batch) for batch in seen] == [4, 4] * 2
    assert set(seen[0] + seen[1]) != set(seen[2] + seen[3]), "another two are left out"


def test_fewer_ratings_than_a_batch_are_one_batch():
    _, seen = fit_recorded(n_epochs=1, batch_size=64, drop_last=True)
    assert [len(batch) for batch in seen] == [10]


def test_the_loss_is_weighted_by_batch_size():
    epochs, _ = fit_recorded()
    assert [epoch.epoch for epoch in epochs] == [1, 2]
    assert [epoch.train_loss for epoch in epochs] == [pytest.approx(4.5)] * 2


@pytest.mark.parametrize(
    ("n_ratings", "batch_size", "drop_last", "expected"),
    [(10, 5, False, 2), (11, 5, False, 3), (11, 5, True, 2), (4, 5, True, 1), (1, 1, True, 1)],
)
def test_count_batches(n_ratings, batch_size, drop_last, expected):
    assert train.count_batches(n_ratings, batch_size, drop_last=drop_last) == expected


@pytest.mark.parametrize("counts", [(0, 5), (5, 0)])
def test_no_batches(counts):
    with pytest.raises(ValueError, match="batches of"):
        train.count_batches(*counts)


def fit_model(part, ids, seed=0, n_epochs=1, lr_max=0.01):
    """One short real training; returns the table before, that after, and the loss."""
    generator, n_users = torch.Generator().manual_seed(seed), len(ids.users)
    start = model.init_params(n_users, len(ids.items), n_factors=5, generator=generator)
    *_, last = train.fit(
        [model.join(start)],
        *part,
        loss_and_grad=partial(model.loss_and_grad, n_users=n_users, head=HEAD),
        optimizer=schedule.adamw(schedule.constant(lr=lr_max)),
        n_epochs=n_epochs,
        batch_size=1024,
        generator=generator,
    )
    return start, model.split_table(*last.params, n_users), last.train_loss


def test_same_seed_same_bits(ua):
    """Whatever the global random state, which stays."""
    part, _, ids = ua
    torch.manual_seed(99)
    before = torch.get_rng_state()
    _, first, first_loss = fit_model(part, ids)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    _, again, again_loss = fit_model(part, ids)
    _, other, _ = fit_model(part, ids, seed=1)
    assert first_loss == again_loss
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.user_factors, other.user_factors)


def test_training_learns(ua):
    part, test_part, ids = ua
    start, trained, _ = fit_model(part, ids, n_epochs=2)
    errors = [
        train.evaluate(lambda *rows, p=p: model.predict(p, *rows, head=HEAD), *test_part).mse
        for p in (start, trained)
    ]
    assert errors[0] > 1.5
    assert errors[1] < 0.95


def test_a_loss_that_is_not_finite_is_an_error(ua):
    part, _, ids = ua
    with pytest.raises(ValueError, match="the loss is nan in epoch 1"):
        fit_model(part, ids, lr_max=1e38)


def test_columns_of_different_length():
    with pytest.raises(ValueError, match="the columns have 10, 10, 9 rows"):
        next(
            train.fit(
                [torch.zeros(())],
                ROWS,
                ROWS,
                RATINGS[:9],
                loss_and_grad=None,
                optimizer=(None, None),
                n_epochs=1,
                batch_size=4,
                generator=torch.Generator(),
            )
        )


def make_columns():
    """Users, items, ratings and two features of each rating; 50 rows."""
    generator = torch.Generator().manual_seed(2)
    users, items = (torch.randint(8, (50,), generator=generator) for _ in "12")
    ratings = torch.randint(6, (50,), generator=generator).double()
    return users, items, ratings, torch.rand(50, 2, generator=generator, dtype=torch.float64)


def make_net(seed=0):
    torch.manual_seed(seed)
    layers = torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
    return torch.nn.Sequential(*layers).double()


def by_autograd(net):
    """The loss of a module that predicts ratings from their context, and its gradient."""

    def loss_and_grad(params, users, items, ratings, context, **options):
        loss = torch.nn.functional.mse_loss(net(context).squeeze(1), ratings)
        return loss, torch.autograd.grad(loss, params)

    return loss_and_grad


def test_a_module_is_trained_as_by_a_plain_loop_of_torch():
    net, (*_, ratings, context) = make_net(), make_columns()
    theirs, own = copy.deepcopy(net), list(net.parameters())
    oracle = torch.optim.AdamW(theirs.parameters(), lr=0.05, weight_decay=0.1, betas=(0.9, 0.99))
    for epoch in train.fit(
        net.parameters(),
        *make_columns(),
        loss_and_grad=by_autograd(net),
        optimizer=schedule.adamw(schedule.constant(lr=0.05), weight_decay=0.1),
        n_epochs=20,
        batch_size=50,
        generator=torch.Generator().manual_seed(0),
    ):
        oracle.zero_grad()
        loss = torch.nn.functional.mse_loss(theirs(context).squeeze(1), ratings)
        loss.backward()
        oracle.step()
        assert epoch.train_loss == pytest.approx(loss.item(), rel=1e-12)
        for param, mine, other in zip(epoch.params, own, theirs.parameters(), strict=True):
            assert param is mine, "in place"
            assert param.is_leaf
            torch.testing.assert_close(param.detach(), other.detach(), rtol=0, atol=1e-12)


class Mark:
    """Lives as long as the graph it is put into."""


MARKS = weakref.WeakSet()


class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark = Mark()
        MARKS.add(ctx.mark)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_no_graph_outlives_its_step():
    """The one of this step, and the one before until there is another."""
    param, n_alive = torch.ones((), requires_grad=True), []

    def loss_and_grad(params, rows):
        loss = Marked.apply(params[0].square())
        n_alive.append(len(MARKS))
        return loss, torch.autograd.grad(loss, params)

    *epochs, _ = train.fit(
        [param],
        ROWS,
        loss_and_grad=loss_and_grad,
        optimizer=schedule.adamw(schedule.constant(lr=0.01)),
        n_epochs=3,
        batch_size=1,
        generator=torch.Generator(),
    )
    assert len(n_alive) == 30
    assert max(n_alive) <= 2
    assert not any(tensor.grad_fn for epoch in epochs for tensor in epoch.state)


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def record(epochs):
    """Number, loss, parameters and state of each epoch, as of its end."""
    return [
        (e.epoch, e.train_loss, [p.detach().clone() for p in e.params], saved_and_loaded(e.state))
        for e in epochs
    ]


def same_bits(ours, theirs):
    """Whether two lists of what `record` returns are equal to the bit, and of the same length."""
    return [epoch[:2] for epoch in ours] == [epoch[:2] for epoch in theirs] and all(
        torch.equal(a, b)
        for epoch, other in zip(ours, theirs, strict=True)
        for a, b in zip((*epoch[2], *epoch[3]), (*other[2], *other[3]), strict=True)
    )


def fit_few(way, seed=0, resume=None):
    """5 epochs on 50 ratings in 6 batches: of a table with dropout, or of a module."""
    generator, columns = torch.Generator().manual_seed(seed), make_columns()
    if way == "a module":
        net = make_net(seed)
        params, loss_and_grad = net.parameters(), by_autograd(net)
    else:
        shape = {"n_factors": 3, "dtype": torch.float64}
        params = [model.join(model.init_params(10, 10, generator=generator, **shape))]
        options = {"n_users": 10, "head": HEAD, "dropout": 0.3, "generator": generator}
        loss_and_grad = partial(model.loss_and_grad, **options)
    return train.fit(
        params,
        *columns,
        loss_and_grad=loss_and_grad,
        optimizer=schedule.adamw(schedule.one_cycle(30, lr_max=0.05), weight_decay=0.1),
        n_epochs=5,
        batch_size=8,
        drop_last=True,
        generator=generator,
        resume=resume,
    )


# And the shapes of what is trained.
WAYS = {"a table": [(20, 4)], "a module": [(4, 2), (4,), (1, 4), (1,)]}


@pytest.mark.parametrize("way", WAYS)
def test_resuming_is_to_the_bit(way):
    whole = record(fit_few(way))
    assert [epoch for epoch, *_ in whole] == [1, 2, 3, 4, 5]
    for epoch, _, _, state in whole:
        kept = [tensor.clone() for tensor in state]
        again = record(fit_few(way, seed=9, resume=(epoch, state)))
        assert same_bits(again, whole[epoch:])
        assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True)), "copied"
    assert not same_bits(record(fit_few(way, seed=9)), whole)


@pytest.mark.parametrize("way", WAYS)
def test_the_state_is_the_tables_the_optimizers_and_the_generators(way):
    epoch = next(fit_few(way))
    assert all(a is b for a, b in zip(epoch.state, epoch.params, strict=False)), "not copied"
    moments = [shape for shape in WAYS[way] for _ in "mv"]
    assert [tuple(t.shape) for t in epoch.state[:-1]] == WAYS[way] + moments


@pytest.mark.parametrize("way", WAYS)
def test_a_state_that_does_not_fit(way):
    *_, last = fit_few(way)
    first, *rest = last.state
    shape, text = tuple(first.shape), "the state to resume from is ['torch.float{} {}', "
    bad = [
        (5, rest, "the state to resume from is ["),
        (5, [first[1:], *rest], text.format(64, tuple(first[1:].shape))),
        (5, [first.float(), *rest], text.format(32, shape)),
        (5, [first, *rest[:-1], first], f"'torch.float64 {shape}'], not ["),
        (6, last.state, "cannot resume after 6 of 5 epochs"),
        (-1, last.state, "cannot resume after -1 of 5 epochs"),
    ]
    for n_done, state, message in bad:
        with pytest.raises(ValueError, match=re.escape(message)):
            next(fit_few(way, resume=(n_done, state)))
    assert not list(fit_few(way, resume=(5, last.state)))


@pytest.mark.parametrize(("state", "n_tensors"), [([(torch.ones(2), torch.ones(3))], 2), (None, 0)])
def test_an_optimizers_state_is_a_tuple_of_tensors_a_table_or_none(state, n_tensors):
    epochs = train.fit(
        [torch.zeros(())],
        ROWS,
        loss_and_grad=lambda params, rows: (torch.zeros(()), None),
        optimizer=(lambda params: state, lambda *changed: None),
        n_epochs=1,
        batch_size=4,
        generator=torch.Generator(),
    )
    assert len(next(epochs).state) == 1 + n_tensors + 1


# Three processes and 50 rows: the last batch of 20 is of 10, those of 7 are shares of 3, 2 and 2.
PARALLEL = {
    "dropout and context": {"batch_size": 20, "dropout": 0.3},
    "batches of one": {"batch_size": 1, "dropout": 0.3},
    "batches of two": {"batch_size": 2},
    "one batch": {"batch_size": 1000},
    "the last batch dropped": {"batch_size": 7, "drop_last": True},
    "features and two outputs": {"batch_size": 8, "dropout": 0.1, "way": "features"},
    "a module": {"batch_size": 8, "way": "module"},
}


def fit_shared(wrap, *, dropout=0.0, way="", **options):
    """A short real training in float64; returns what `record` does."""
    generator = torch.Generator().manual_seed(5)
    head = model.ordinal([0, 2, 5], [0.8, 0.4]) if way == "features" else HEAD
    shape = {"n_factors": 3, "n_outputs": head.n_outputs, "dtype": torch.float64, "std": 0.5}
    params = [model.join(model.init_params(10, 10, generator=generator, **shape))]
    batch_options = {"n_users": 10, "head": head, "dropout": dropout, "generator": generator}
    loss_and_grad = partial(model.loss_and_grad, **batch_options)
    if way == "features":  # each row has two, each is of two rows
        starts, of_items = torch.arange(0, 41, 2), torch.arange(40) // 20 * 10
        matrix = starts, torch.arange(40) * 7 % 10 + of_items, torch.linspace(0.5, 1, 40).double()
        order = matrix[1].argsort(stable=True)
        features = model.Features(matrix, (starts, order // 2, matrix[2][order]))
        batch_options["features"] = features
        loss_and_grad = partial(model.embedded_loss_and_grad, **batch_options)
    elif way == "module":
        net = make_net()
        params, loss_and_grad = net.parameters(), by_autograd(net)
    epochs = train.fit(
        params,
        *make_columns(),
        loss_and_grad=wrap(loss_and_grad),
        optimizer=schedule.adamw(schedule.constant(lr=0.01), weight_decay=0.1),
        n_epochs=3,
        generator=generator,
        **options,
    )
    return record(epochs)


def run_process(rank, size, folder):
    """All of PARALLEL, and then: process 1 ends, which the others must notice."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    results = [fit_shared(train.share, **options) for options in PARALLEL.values()]
    options, whole = next(iter(PARALLEL.values())), results[0]
    resumed = fit_shared(train.share, **options, resume=(1, whole[0][3]))
    is_resumed = len(resumed) == 2 and same_bits(resumed, whole[1:])
    message = None
    if rank != 1:
        with pytest.raises(ConnectionError) as caught:
            fit_shared(train.share, batch_size=1)
        message = str(caught.value)
    torch.save((results, is_resumed, message), f"{folder}/{rank}.pt")
    os._exit(0)  # as if killed


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of three processes has trained, all of PARALLEL in one group."""
    folder = tmp_path_factory.mktemp("processes")
    context = multiprocessing.get_context("spawn")
    started = [
        context.Process(target=run_process, args=(rank, 3, str(folder)), daemon=True)
        for rank in range(3)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=60)
    return [torch.load(folder / f"{rank}.pt") for rank in range(3)]


@pytest.mark.parametrize("name", PARALLEL)
def test_several_processes_train_as_one_does(processes, name):
    number = list(PARALLEL).index(name)
    alone = fit_shared(lambda loss_and_grad: loss_and_grad, **PARALLEL[name])
    first, *others = (results[number] for results, _, _ in processes)
    assert len(first) == 3
    for (_, loss, params, _), (_, got_loss, got, _) in zip(alone, first, strict=True):
        assert got_loss == pytest.approx(loss, rel=1e-12)
        for ours, theirs in zip(got, params, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    for other in others:  # and to the bit as each other
        assert same_bits(first, other)


def test_several_processes_resume_to_the_bit(processes):
    assert [is_resumed for _, is_resumed, _ in processes] == [True] * 3


def test_a_process_that_ends_is_noticed(processes):
    gone = "another process of this training has ended"
    assert [message for *_, message in processes] == [gone, None, gone]


def find_scripted(losses, n_rows=10, batch_size=4, **options):
    """A range test in which step k's loss is `losses[k]`; also the batches and updates it made."""
    batches, updates = [], []

    def loss_and_grad(params, rows):
        batches.append(rows.tolist())
        params[0].add_(1)
        return torch.tensor(losses[len(batches) - 1], dtype=torch.float64), ["gradient"]

    params = [torch.zeros(())]
    found = train.find_lr(
        params,
        torch.arange(n_rows),
        loss_and_grad=loss_and_grad,
        optimizer=(lambda params: "state", lambda *given: updates.append(given[1:])),
        n_steps=len(losses),
        batch_size=batch_size,
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    assert params[0] == 0, "the caller's stay"
    assert updates[: len(found)] == [(["gradient"], "state", k) for k in range(len(updates))]
    return found, batches


def smooth(losses, beta):
    """Each the mean of those so far, weighted by beta to the power of their age."""
    weights = [[beta ** (t - k) for k in range(t + 1)] for t in range(len(losses))]
    return [numpy.average(losses[: len(w)], weights=w) for w in weights]


@given(st.lists(st.floats(0.5, 1.5), min_size=1, max_size=12), st.floats(0, 0.99))
def test_the_range_test_smooths(losses, beta):
    found, _ = find_scripted(losses, smoothing=beta)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(smooth(losses, beta), rel=1e-9)


def test_the_range_test_ends_when_the_loss_grows():
    losses = [1.0, 3.9, 0.5, 1.9, 2.1, 0.1]
    assert find_scripted(losses, smoothing=0)[0].tolist() == [1.0, 3.9, 0.5, 1.9, 2.1]
    assert find_scripted(losses, smoothing=0, stop=3.5)[0].tolist() == [1.0, 3.9]
    assert len(find_scripted(losses)[0]) == 6, "smoothed, it does not grow as much"
    found, batches = find_scripted([1.0, 2.0, math.nan, 1.0], smoothing=0)
    assert found.tolist() == [1.0, 2.0]
    assert len(batches) == 3
    assert find_scripted([math.inf])[0].shape == (0,)


def test_the_range_test_draws_whole_batches_anew():
    _, batches = find_scripted([1.0] * 5)
    assert [len(set(batch)) for batch in batches] == [4] * 5
    assert len({*batches[0], *batches[1]}) == len({*batches[2], *batches[3]}) == 8
    assert batches[:2] != batches[2:4]
    _, batches = find_scripted([1.0] * 2, batch_size=64)
    assert [sorted(batch) for batch in batches] == [list(range(10))] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"losses": []}, "n_steps must be at least 1, not 0"),
        ({"losses": [1.0], "smoothing": 1.0}, r"smoothing must be in \[0, 1\), not 1\.0"),
        ({"losses": [1.0], "n_rows": 0}, "cannot cut 0 ratings"),
    ],
)
def test_the_range_test_names_the_bad_value(options, message):
    with pytest.raises(ValueError, match=message):
        find_scripted(**options)


def test_the_range_test_finds_the_lr_that_works(ua):
    """lr_max is 0.01 in the recipe for these batches."""
    part, _, ids = ua
    generator, n_users = torch.Generator().manual_seed(0), len(ids.users)
    params = model.init_params(n_users, len(ids.items), n_factors=40, generator=generator)
    pace = schedule.exponential(100, lr_min=1e-5, lr_max=10)
    losses = train.find_lr(
        [model.join(params)],
        *part,
        loss_and_grad=partial(model.loss_and_grad, n_users=n_users, head=HEAD),
        optimizer=schedule.adamw(pace, weight_decay=0.1),
        n_steps=100,
        batch_size=512,
        generator=generator,
    )
    lrs = [pace(step).lr for step in range(len(losses))]
    assert 0.003 < schedule.suggest_lr(lrs, losses, n_steps=100).valley < 0.03


PREDICTION = numpy.array([0.5, 2.0, 3.5, 6.0])
TARGET = numpy.array([1.0, 2.0, 5.0, 4.0])


def evaluate(prediction, **options):
    rows = torch.arange(len(TARGET))
    table = torch.tensor(prediction)
    return train.evaluate(
        lambda users, items: table[users], rows, rows, torch.tensor(TARGET), **options
    )


@pytest.mark.parametrize("block", [1, 3, 4, 100])
def test_errors_are_numpys(block):
    error = PREDICTION - TARGET
    mse, mae = (error**2).mean(), abs(error).mean()
    assert evaluate(PREDICTION, block=block) == pytest.approx((mse, math.sqrt(mse), mae))
    clipped = PREDICTION.clip(1, 5) - TARGET
    got = evaluate(PREDICTION, block=block, clip=(1, 5))
    assert got.mse == pytest.approx((clipped**2).mean())
    assert got.mae == pytest.approx(abs(clipped).mean())


def test_evaluation_is_in_blocks():
    sizes = []

    def predict(users, items):
        sizes.append(len(users))
        return torch.ones(len(users))

    train.evaluate(predict, ROWS, ROWS, RATINGS, block=4)
    assert sizes == [4, 4, 2]


def test_seconds_are_of_training_alone(monkeypatch):
    """On a clock that the caller moves on between the epochs."""
    now = 0.0
    monkeypatch.setattr(train.time, "perf_counter", lambda: now)

    def loss_and_grad(params, rows):
        nonlocal now
        now += 1
        return torch.zeros(()), [torch.zeros(())]

    for epoch in train.fit(
        [torch.zeros(())],
        ROWS,
        loss_and_grad=loss_and_grad,
        optimizer=(lambda params: None, lambda *changed: None),
        n_epochs=3,
        batch_size=4,
        generator=torch.Generator(),
    ):
        now += 100  # the caller's evaluation
        assert epoch.seconds == 3


def test_an_error_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="the mean squared error is nan"):
        train.evaluate(lambda users, items: torch.full((10,), math.nan), ROWS, ROWS, RATINGS)


def test_no_prediction_is_bent_to_shape():
    rows = torch.arange(4)
    with pytest.raises(ValueError, match=r"shape is \(4, 1\), the ratings' is \(4,\)"):
        train.evaluate(lambda users, items: torch.ones(4, 1), rows, rows, torch.ones(4))
    with pytest.raises(ValueError, match="0 ratings"):
        train.evaluate(lambda users, items: torch.ones(0), rows[:0], rows[:0], torch.ones(0))


def rank(scores, pairs, seen, k, **options):
    """`train.rank` of a table of scores, pairs of a user and a relevant item, and lists of seen."""
    users, items = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
    starts = torch.tensor([0, *accumulate(map(len, seen))])
    flat = torch.tensor([item for line in seen for item in line], dtype=torch.int32)
    table = torch.tensor(scores)
    return train.rank(
        lambda rows: table[rows],
        *(users, items),
        seen=(starts, flat),
        k=k,
        n_items=table.shape[1],
        **options,
    )


def test_a_ranking_worked_out_by_hand():
    """Lists of 2 from 5 items, of which 0 is most liked, then 1, and so on.

    User 0 has seen 0, is shown 1 and 2, likes 2 and 4: a hit in place 2. User 1 is shown 0 and 1,
    likes both and 3. User 2 likes what was seen, and is not counted. User 3 is shown 0 and 1,
    likes 4. User 4 has no relevant item. User 5 is shown 4 alone and likes it.
    """
    scores = [[5.0, 4.0, 3.0, 2.0, 1.0]] * 6
    pairs = [(5, 4), (1, 3), (1, 1), (0, 4), (1, 0), (3, 4), (2, 0), (0, 2), (0, 2)]
    seen = [[0], [], [0], [2], [], [2, 0, 3, 1]]
    ndcg = (0.6309297535714575 / 1.6309297535714575 + 1 + 0 + 1) / 4  # 1 / log2(3) = 0.63093
    expected = ((1 / 2 + 1 + 0 + 1 / 2) / 4, (1 / 2 + 2 / 3 + 0 + 1) / 4, ndcg, 3 / 4, 4)
    for block in (1, 10, 1000):
        assert rank(scores, pairs, seen, 2, block=block) == pytest.approx(expected, rel=1e-12)
    *_, n_users = got = rank(scores[:1], [(0, 2), (0, 4)], [[0]], 2)  # user 0 alone
    assert got == pytest.approx((0.5, 0.5, 0.38685280723454163, 1.0, 1), rel=1e-12)
    assert isinstance(n_users, int)


def rank_slowly(scores, pairs, seen, k):
    lines = []
    for user in sorted({user for user, _ in pairs}):
        relevant = {item for other, item in pairs if other == user} - set(seen[user])
        candidates = [item for item in range(len(scores[user])) if item not in seen[user]]
        shown = sorted(candidates, key=lambda item: -scores[user][item])[:k]
        if not relevant:
            continue
        gains = [1 / math.log2(place + 2) for place in range(k)]
        got = [gain for gain, item in zip(gains, shown, strict=False) if item in relevant]
        ideal = sum(gains[: len(relevant)])
        lines.append((len(got) / k, len(got) / len(relevant), sum(got) / ideal, bool(got)))
    return (*numpy.mean(lines, 0), len(lines)) if lines else None


@st.composite
def rankings(draw):
    n_users, n_items = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    user, item = st.integers(0, n_users - 1), st.integers(0, n_items - 1)
    line = st.permutations([float(place) for place in range(n_items)])
    scores = draw(st.lists(line, min_size=n_users, max_size=n_users))
    pairs = draw(st.lists(st.tuples(user, item), min_size=1, max_size=20))
    seen = draw(st.lists(st.lists(item, unique=True), min_size=n_users, max_size=n_users))
    return scores, pairs, seen, draw(st.integers(1, n_items))


@given(rankings(), st.integers(1, 40))
def test_a_ranking_is_that_of_a_slow_loop(case, block):
    expected = rank_slowly(*case)
    if expected is None:
        with pytest.raises(ValueError, match="no user has a relevant item"):
            rank(*case, block=block)
    else:
        assert rank(*case, block=block) == pytest.approx(expected, rel=1e-12)


def test_rankings_that_cannot_be():
    one, pairs = [[1.0, 2.0]], [(0, 1)]
    for k in (0, 3):
        with pytest.raises(ValueError, match=f"k must be from 1 to the 2 items, not {k}"):
            rank(one, pairs, [[]], k)
    for bad in ([], [(0, 1)]):
        with pytest.raises(ValueError, match="no user has a relevant item"):
            rank(one, bad, [[1]], 1)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"of users 0 to 0 the scores' shape .* not finite"):
            rank([[bad, 1.0]], pairs, [[]], 1)
    seen = torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64)
    rows, options = torch.tensor([0]), {"seen": seen, "k": 1, "n_items": 2}
    with pytest.raises(ValueError, match=r"shape is \(2,\), not \(1, 2\)"):
        train.rank(lambda users: torch.ones(2), rows, rows, **options)
    with pytest.raises(ValueError, match="the columns have 1, 2 rows"):
        train.rank(None, rows, torch.tensor([0, 1]), **options)
