import io
import math
import multiprocessing
import os
import re
from functools import partial
from itertools import accumulate

import numpy
import pytest
import torch
from hypothesis import example, given
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


def test_an_epoch_is_every_rating_once():
    _, seen = fit_recorded()
    assert [len(batch) for batch in seen] == [4, 4, 2] * 2
    first, second = (seen[i] + seen[i + 1] + seen[i + 2] for i in (0, 3))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert second != sorted(second)


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
    """One short real training; returns the caller's params, those trained, and the loss."""
    generator = torch.Generator().manual_seed(seed)
    start = model.init_params(len(ids.users), len(ids.items), n_factors=5, generator=generator)
    epochs = train.fit(
        start,
        *part,
        loss_and_grad=lambda *batch: model.loss_and_grad(*batch, head=HEAD),
        optimizer=schedule.adamw(schedule.constant(lr=lr_max)),
        n_epochs=n_epochs,
        batch_size=1024,
        generator=generator,
    )
    *_, last = epochs
    return start, last.params, last.train_loss


def test_same_seed_same_bits(ua):
    part, _, ids = ua
    _, first, first_loss = fit_model(part, ids)
    _, again, again_loss = fit_model(part, ids)
    _, other, _ = fit_model(part, ids, seed=1)
    assert first_loss == again_loss
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.user_factors, other.user_factors)


def test_the_callers_params_and_the_global_random_state_stay(ua):
    part, _, ids = ua
    torch.manual_seed(99)
    before = torch.get_rng_state()
    start, trained, _ = fit_model(part, ids)
    assert torch.equal(before, torch.get_rng_state())
    assert isinstance(trained, model.Params)
    assert start.user_factors.abs().max() < 0.02 < trained.user_factors.abs().max()
    torch.manual_seed(1)
    _, again, _ = fit_model(part, ids)
    assert torch.equal(trained.user_factors, again.user_factors)


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


def fit_both(part, ids, *, lr_max=0.01, decays=(0.1, 0.02), n_epochs=2, batch_size=700, **options):
    """The epochs of `fit_rows` and of `fit`: the same rows, the parameters copied."""
    n_users, n_items = len(ids.users), len(ids.items)
    n_steps = n_epochs * train.count_batches(len(part[0]), batch_size)
    pace = schedule.one_cycle(n_steps, lr_max=lr_max)
    common = {"n_epochs": n_epochs, "batch_size": batch_size}
    factor, bias = decays
    ways = []
    for is_sparse in (True, False):
        generator = torch.Generator().manual_seed(0)
        params = model.init_params(n_users, n_items, n_factors=6, generator=generator)
        if is_sparse:
            epochs = train.fit_rows(
                model.join(params),
                *part,
                offsets=(0, n_users),
                loss_and_grad_=partial(model.pair_loss_and_grad_, n_factors=6, head=HEAD),
                optimizer=schedule.sparse_adamw(
                    pace, n_steps, weight_decay=[factor] * 6 + [bias] * 2
                ),
                generator=generator,
                **common,
                **options,
            )
        else:
            epochs = train.fit(
                params,
                *part,
                loss_and_grad=partial(model.loss_and_grad, head=HEAD),
                optimizer=schedule.adamw(pace, weight_decay=(factor, factor, bias, bias)),
                generator=generator,
                **common,
            )
        ways.append([(e.epoch, e.train_loss, [p.clone() for p in e.params]) for e in epochs])
    return ways


@pytest.mark.parametrize(
    "changed",
    [{}, {"block": 700}, {"block": 5000}, {"lr_max": 0.05, "decays": (2.0, 0.0)}],
    ids=["one block", "a batch a block", "7 batches a block", "rests"],
)
def test_a_step_on_the_batchs_rows_is_the_dense_step(ua, changed):
    """90,570 ratings are 129 batches of 700 and one of 270: the last is short."""
    part, _, ids = ua
    ours, theirs = fit_both(part, ids, **changed)
    assert len(ours) == 2
    for (epoch, loss, table), (same, dense_loss, params) in zip(ours, theirs, strict=True):
        assert epoch == same
        # Not closer: rows whose gradients nearly cancel have a direction that rounding decides.
        assert loss == pytest.approx(dense_loss, rel=1e-4)
        split = model.split_table(torch.stack(table), len(ids.users), n_factors=6)
        for ours, theirs in zip(split, params, strict=True):
            assert (ours - theirs).abs().mean() < 1e-4


def test_fit_rows_repeats_its_bits_whatever_the_block(ua):
    part, _, ids = ua
    first, again, blocks = (
        fit_both(part, ids, n_epochs=1, **o)[0] for o in ({}, {}, {"block": 1400})
    )
    for other in (again, blocks):
        assert first[0][1] == pytest.approx(other[0][1], rel=1e-12)
        assert all(torch.equal(a, b) for a, b in zip(first[0][2], other[0][2], strict=True))


def test_fit_rows_takes_what_fit_takes():
    """Fewer ratings than a batch are one batch; drop_last; a loss that is not finite."""
    generator = torch.Generator().manual_seed(0)
    rows, batches = torch.arange(10), []

    def loss_and_grad_(pairs, grads, ratings):
        batches.extend(ratings.tolist())
        return lambda: None, lambda: ratings.mean(1) * pairs[0, 0, 0]

    def fit(batch_size, value=1.0, **options):
        batches.clear()
        return train.fit_rows(
            torch.full((12, 4), value),
            *(rows, rows + 1, rows.float()),
            offsets=(0, 1),
            loss_and_grad_=loss_and_grad_,
            optimizer=schedule.sparse_adamw(schedule.constant(lr=0.0), 100),
            n_epochs=1,
            batch_size=batch_size,
            generator=generator,
            **options,
        )

    assert [epoch.train_loss for epoch in fit(64)] == [4.5]
    assert [epoch.train_loss for epoch in fit(4)] == [4.5]
    assert [len(batch) for batch in batches] == [4, 4, 2]
    list(fit(4, drop_last=True))
    assert [len(batch) for batch in batches] == [4, 4]
    with pytest.raises(ValueError, match="the loss is nan in epoch 1"):
        list(fit(4, value=math.nan))


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def record(epochs):
    """Number, loss, parameters and state of each epoch, as of its end."""
    return [
        (e.epoch, e.train_loss, [p.clone() for p in e.params], saved_and_loaded(e.state))
        for e in epochs
    ]


def same_bits(ours, theirs):
    """Whether two lists of what `record` returns are equal to the bit, and of the same length."""
    return [epoch[:2] for epoch in ours] == [epoch[:2] for epoch in theirs] and all(
        torch.equal(a, b)
        for epoch, other in zip(ours, theirs, strict=True)
        for a, b in zip((*epoch[2], *epoch[3]), (*other[2], *other[3]), strict=True)
    )


def fit_few(seed, *, is_sparse, lr_max, decay, resume=None, n_epochs=5):
    """A short real training on 50 ratings in 6 batches, by `fit` with dropout or by `fit_rows`."""
    generator = torch.Generator().manual_seed(seed)
    params = model.init_params(10, 10, n_factors=3, generator=generator)
    *rows, ratings, _ = make_columns()
    columns = *rows, ratings.float()
    pace = schedule.one_cycle(30, lr_max=lr_max)
    common = {
        "n_epochs": n_epochs,
        "batch_size": 8,
        "drop_last": True,
        "generator": generator,
        "resume": resume,
    }
    if not is_sparse:
        return train.fit(
            params,
            *columns,
            loss_and_grad=partial(model.loss_and_grad, head=HEAD, dropout=0.3, generator=generator),
            optimizer=schedule.adamw(pace, weight_decay=decay),
            **common,
        )
    return train.fit_rows(
        model.join(params),
        *columns,
        offsets=(0, 10),
        loss_and_grad_=partial(model.pair_loss_and_grad_, n_factors=3, head=HEAD),
        optimizer=schedule.sparse_adamw(pace, 30, weight_decay=decay),
        block=16,
        **common,
    )


WAYS = {
    "fit": {"is_sparse": False, "lr_max": 0.05, "decay": 0.1},
    "fit_rows": {"is_sparse": True, "lr_max": 0.05, "decay": 0.1},
    "fit_rows with rests": {"is_sparse": True, "lr_max": 0.3, "decay": 2.5},
}


@pytest.mark.parametrize("way", WAYS)
def test_resuming_is_to_the_bit(way):
    options = WAYS[way]
    rests = schedule.sparse_adamw(
        schedule.one_cycle(30, lr_max=options["lr_max"]), 30, weight_decay=options["decay"]
    ).rests
    assert ("rests" in way) == bool(rests & {6, 12, 18, 24}), "some at the end of an epoch"
    whole = record(fit_few(0, **options))
    assert [epoch for epoch, *_ in whole] == [1, 2, 3, 4, 5]
    for epoch, _, _, state in whole:
        kept = [tensor.clone() for tensor in state]
        again = record(fit_few(9, **options, resume=(epoch, state)))
        assert same_bits(again, whole[epoch:])
        assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True)), "copied"
    other = record(fit_few(9, **options))
    assert not same_bits(other, whole)


def test_the_state_is_the_tables_the_optimizers_and_the_generators():
    epoch = next(fit_few(0, **WAYS["fit"]))
    assert all(a is b for a, b in zip(epoch.state, epoch.params, strict=False)), "not copied"
    tables = [(10, 3), (10, 3), (10,), (10,)]
    moments = [shape for shape in tables for _ in "mv"]
    assert [tuple(t.shape) for t in epoch.state[:-1]] == tables + moments
    epoch = next(fit_few(0, **WAYS["fit_rows"]))
    assert [tuple(t.shape) for t in epoch.state[:-1]] == [(21, 3, 4), (21,)]


@pytest.mark.parametrize("way", ["fit", "fit_rows"])
def test_a_state_that_does_not_fit(way):
    options = WAYS[way]
    *_, last = fit_few(0, **options)
    first, *rest = last.state
    n, shape, text = len(last.state), tuple(first.shape), "tensor {} of the state to resume from is"
    bad = [
        (5, rest, f"has {n - 1} tensors, not {n}"),
        (5, [first[1:], *rest], f"{text.format(0)} torch.float32 {tuple(first[1:].shape)}, not"),
        (5, [first.double(), *rest], f"torch.float64 {shape}, not torch.float32 {shape}"),
        (5, [first, *rest[:-1], first], f"{text.format(n - 1)} torch.float32 {shape}, not"),
        (6, last.state, "cannot resume after 6 of 5 epochs"),
        (-1, last.state, "cannot resume after -1 of 5 epochs"),
    ]
    for n_done, state, message in bad:
        with pytest.raises(ValueError, match=re.escape(message)):
            next(fit_few(0, **options, resume=(n_done, state)))
    assert not list(fit_few(0, **options, resume=(5, last.state)))


def test_an_optimizers_state_is_of_tensors():
    """In dicts and lists, or none at all; what could not be saved is refused at once."""

    def fit(state):
        return train.fit(
            [torch.zeros(())],
            ROWS,
            loss_and_grad=lambda params, rows: (torch.zeros(()), None),
            optimizer=(lambda params: state, lambda *changed: None),
            n_epochs=1,
            batch_size=4,
            generator=torch.Generator(),
        )

    for state, n_tensors in [({"a": [torch.ones(2)], "b": torch.ones(3)}, 2), (None, 0)]:
        assert len(next(fit(state)).state) == 1 + n_tensors + 1
    for state in (0.5, [torch.ones(1), "mean"]):
        with pytest.raises(ValueError, match=r"state has (0\.5|'mean'), which is no tensor"):
            next(fit(state))


# Three processes and 50 rows: shares of 17, 17 and 16.
PARALLEL = {
    "dropout and context": {"batch_size": 20, "dropout": 0.3},
    "batches of one": {"batch_size": 1, "dropout": 0.3},
    "one batch": {"batch_size": 1000},
    "the last batch dropped": {"batch_size": 7, "drop_last": True},
    "features and two outputs": {"batch_size": 8, "dropout": 0.1, "head": "ordinal"},
}


def fit_shares(fit, columns, *, dropout=0.0, head="bounded", **options):
    """A short real training in float64 on `columns`; returns what `record` does."""
    generator = torch.Generator().manual_seed(5)
    head = HEAD if head == "bounded" else model.ordinal([0, 2, 5], [0.8, 0.4])
    shape = {"n_factors": 3, "n_outputs": head.n_outputs, "dtype": torch.float64, "std": 0.5}
    params = model.init_params(10, 10, generator=generator, **shape)
    loss_and_grad = model.loss_and_grad
    if head is not HEAD:
        starts = torch.arange(0, 21, 2)
        matrix = starts, torch.arange(20) * 7 % 10, torch.linspace(0.5, 1, 20).double()
        order = matrix[1].argsort(stable=True)
        transposed = starts, order // 2, matrix[2][order]
        features = model.Features(matrix, matrix, transposed, transposed)
        loss_and_grad = partial(model.embedded_loss_and_grad, features=features)
    epochs = fit(
        params,
        *columns,
        loss_and_grad=partial(loss_and_grad, head=head, dropout=dropout, generator=generator),
        optimizer=schedule.adamw(schedule.constant(lr=0.01), weight_decay=0.1),
        n_epochs=3,
        generator=generator,
        **options,
    )
    return record(epochs)


def make_columns():
    generator = torch.Generator().manual_seed(2)
    users, items = (torch.randint(8, (50,), generator=generator) for _ in "12")
    ratings = torch.randint(6, (50,), generator=generator).double()
    return users, items, ratings, torch.rand(50, 2, generator=generator, dtype=torch.float64)


def run_process(rank, size, folder):
    """All of PARALLEL, and then: process 1 ends, which the others must notice."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    columns = train.deal(make_columns() if rank == 0 else None, by_row=True)
    (whole,) = train.deal([torch.ones(2, 3)] if rank == 0 else None, by_row=False)
    fit = partial(train.fit_parallel, n_rows=50)
    results = [fit_shares(fit, columns, **options) for options in PARALLEL.values()]
    options, whole_run = next(iter(PARALLEL.values())), results[0]
    resumed = fit_shares(fit, columns, **options, resume=(1, whole_run[0][3]))
    is_resumed = len(resumed) == 2 and same_bits(resumed, whole_run[1:])
    message = None
    if rank != 1:
        with pytest.raises(ConnectionError) as caught:
            fit_shares(fit, columns, batch_size=1)
        message = str(caught.value)
    torch.save((columns, whole, results, is_resumed, message), f"{folder}/{rank}.pt")
    os._exit(0)  # as if killed


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of three processes has received and trained, all of PARALLEL in one group."""
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
    wanted = fit_shares(train.fit, make_columns(), **PARALLEL[name])
    first, *others = (results[number] for _, _, results, _, _ in processes)
    assert len(first) == 3
    for (_, loss, params, _), (_, got_loss, got, _) in zip(wanted, first, strict=True):
        assert got_loss == pytest.approx(loss, rel=1e-12)
        for ours, theirs in zip(got, params, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for other in others:  # and to the bit as each other
        assert same_bits(first, other)


def test_several_processes_resume_to_the_bit(processes):
    assert all(is_resumed for *_, is_resumed, _ in processes)


def test_a_process_gets_its_rows_alone(processes):
    for rank, (columns, whole, *_) in enumerate(processes):
        for share, column in zip(columns, make_columns(), strict=True):
            assert torch.equal(share, column[rank::3])
        assert torch.equal(whole, torch.ones(2, 3))


def test_a_process_that_ends_is_noticed(processes):
    gone = "another process of this training has ended"
    assert [message for *_, message in processes] == [gone, None, gone]


@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 9))
@example(7, 7, 9)
def test_the_parts_of_a_batch_are_the_batch(n_rows, batch_size, size):
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(n_rows))
    batches = [[None] * len(batch) for batch in order.split(batch_size)]
    totals = [0.0] * len(batches)
    for rank in range(size):
        rows, places, sizes, n_all, weights = train._find_parts(order, batch_size, rank, size)
        assert n_all == [len(batch) for batch in batches]
        parts = zip(rows.split(sizes), places.split(sizes), weights, strict=True)
        for number, (part, where, weight) in enumerate(parts):
            totals[number] += weight
            assert len(part) == (round(weight * n_all[number]) or 1)
            if not weight:
                assert part.tolist() == [0]
            else:
                for row, place in zip(part.tolist(), where.tolist(), strict=True):
                    assert batches[number][place] is None
                    batches[number][place] = row * size + rank
    assert [row for batch in batches for row in batch] == order.tolist()
    assert totals == pytest.approx([1] * len(batches))


@pytest.mark.parametrize(
    ("n_held", "n_rows", "message"),
    [(1, 3, "3 ratings are too few for 4 processes"), (9, 40, "9 of 40 rows are no share of pro")],
)
def test_shares_that_do_not_fit(monkeypatch, n_held, n_rows, message):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(ValueError, match=message):
        fit_shares(
            partial(train.fit_parallel, n_rows=n_rows),
            [column[:n_held] for column in make_columns()],
            batch_size=4,
        )


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
    generator = torch.Generator().manual_seed(0)
    params = model.init_params(len(ids.users), len(ids.items), n_factors=40, generator=generator)
    pace = schedule.exponential(100, lr_min=1e-5, lr_max=10)
    losses = train.find_lr(
        params,
        *part,
        loss_and_grad=partial(model.loss_and_grad, head=HEAD),
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
    # User 0 alone, with equal scores: the lower row is first, so the same two are shown.
    *_, n_users = got = rank([[0.0] * 5], [(0, 2), (0, 4)], [[0]], 2)
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
    line = st.lists(st.integers(-2, 2).map(float), min_size=n_items, max_size=n_items)
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


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 5), st.data())
def test_the_top_is_a_stable_sorts(n_lines, n, n_levels, data):
    generator = torch.Generator().manual_seed(n)
    scores = torch.randint(n_levels, (n_lines, n), generator=generator).float().log()
    k = data.draw(st.integers(1, n))
    expected = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(train._find_top(scores, k), expected)


def test_rankings_that_cannot_be():
    one, pairs = [[1.0, 2.0]], [(0, 1)]
    for k in (0, 3):
        with pytest.raises(ValueError, match=f"k must be from 1 to the 2 items, not {k}"):
            rank(one, pairs, [[]], k)
    for bad in ([], [(0, 1)]):
        with pytest.raises(ValueError, match="no user has a relevant item"):
            rank(one, bad, [[1]], 1)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="of users 0 to 0 a score is not finite"):
            rank([[bad, 1.0]], pairs, [[]], 1)
    seen = torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64)
    rows, options = torch.tensor([0]), {"seen": seen, "k": 1, "n_items": 2}
    with pytest.raises(ValueError, match=r"shape is \(2,\), not \(1, 2\)"):
        train.rank(lambda users: torch.ones(2), rows, rows, **options)
    with pytest.raises(ValueError, match="the columns have 1, 2 rows"):
        train.rank(None, rows, torch.tensor([0, 1]), **options)
