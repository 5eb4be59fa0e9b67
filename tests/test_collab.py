"""The library and the training: what is learned, what it depends on, and what it answers."""

import json
import math
import re
import subprocess
import sys
from datetime import UTC, datetime

import numpy
import polars
import pytest
import torch
from conftest import COLUMNS, FLAGS, ROOT, call

import collab
import data

ERRORS = ("mse", "rmse", "mae")


@pytest.fixture(scope="module")
def source(ml_100k):
    """ml-100k, as it is read."""
    return collab.read()


@pytest.fixture(scope="module")
def tiny(small):
    """A small part of it, with times and tables."""
    paths = {"users": small / "u.csv", "items": small / "i.csv"}
    return collab.read(small / "r.csv", columns=COLUMNS, **paths)


@pytest.fixture(scope="module")
def plain(source):
    return collab.train_model(collab.prepare(source, epochs=1))


@pytest.fixture(scope="module")
def timed(source):
    """A model with all features, two members."""
    short = {"epochs": 2, "ensemble": 2, "n_factors": 8}
    return collab.train_model(collab.prepare(source, "best", **short))


def fit(source, recipe="default", **options):
    """The tables and the figures of a training."""
    trained = collab.train_model(collab.prepare(source, recipe, **options))
    return trained.tensors["tables"], trained.about["figures"]


def read_json(path):
    return json.loads(path.read_text())


# Training.


@pytest.mark.usefixtures("ml_100k")
def test_train_keeps_the_contract(main, tmp_path):
    done = main("train", "--metrics", "m.json")
    header, *lines, last = done.stdout.splitlines()
    assert header == "epoch | train_loss | test_mse | test_rmse | test_mae |    time"
    cache, *notices = done.stderr.splitlines()  # and no bar
    assert cache.startswith("ml-100k: from the cache ")
    assert "943 users, 1,682 items, 100,000 ratings from 1 to 5" in notices
    assert (
        "without training ratings: 0 users, 2 items, in 2 test ratings; predicted as average"
        in notices
    )
    figures = read_json(tmp_path / "m.json")
    assert (figures["n_users"], figures["n_train"], figures["n_test"]) == (943, 90570, 9430)
    options = json.loads(json.dumps(collab.RECIPES["default"]))
    assert figures["options"] == options | {"y_range": [0.5, 5.5]}
    assert len(lines) == len(figures["epochs"]) == options["epochs"]
    for number, (line, epoch) in enumerate(zip(lines, figures["epochs"], strict=True), 1):
        assert list(epoch) == ["epoch", "train_loss", *ERRORS, "seconds"]
        shown = [f"{epoch[name]:#.4g}" for name in ("train_loss", *ERRORS)]
        assert (len(line), line.split()[:9:2]) == (len(header), [str(number), *shown])
    # The last epoch is the result, whatever the others were.
    assert all(figures[name] == figures["epochs"][-1][name] for name in ERRORS)
    assert ", ".join(f"{name} {figures[name]:#.4g}" for name in ERRORS) in last
    assert figures["mse"] < 0.853 < figures["baselines"]["averages"]["mse"]


def test_the_recipes_reach_what_they_promise(source):
    figures = fit(source, "fastai", seed=3)[1]
    assert 0.888 < figures["mse"] < 0.908
    assert (len(figures["epochs"]), figures["options"]) == (10, collab.RECIPES["fastai"])
    figures = fit(source, "best", ensemble=1, epochs=4, holdout=0.1)[1]
    assert (figures["holdout"], figures["n_train"], figures["n_test"]) == (0.1, 81_513, 9_057)
    assert figures["mse"] < 0.76


def test_members_on_threads_of_their_own_are_what_one_thread_makes(tiny):
    options = {"epochs": 2, "ensemble": 3}
    alone, _ = fit(tiny, "best", **options)
    torch.set_num_threads(2)
    try:
        assert torch.equal(fit(tiny, "best", **options)[0], alone)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("recipe", ["default", "best"])
def test_the_same_seed_gives_the_same_bits(tiny, recipe):
    common = {"epochs": 2, "ensemble": 2}
    tables, again, other = (fit(tiny, recipe, seed=seed, **common)[0] for seed in (0, 0, 1))
    assert torch.equal(tables, again)
    assert not torch.equal(tables, other)
    assert not torch.equal(tables[0], tables[1])


CHANGES = """--seed 1; --split last5; --holdout 0.2; --n-factors 5; --dropout 0.5; --ensemble 2
--epochs 2; --batch-size 512; --drop-last; --lr-max 0.005; --weight-decay 20; --bias-decay 20
--features id,implicit; --features id,side; --features id,time; --loss mse --y-range 0 6
--loss mse --rating-range 0 9; --test r.csv --allow-overlap"""


@pytest.mark.parametrize("recipe", ["default", "best"])
@pytest.mark.parametrize("changed", re.split(r"; |\n", CHANGES))
def test_every_option_matters(small, tmp_path, recipe, changed):
    """Through the command line: another error on the test part."""
    command = ["train", "--ratings", "r.csv", "--items", "i.csv", "--users", "u.csv", *FLAGS]
    command += ["--epochs", 1, "--ensemble", 1, "--batch-size", 400, "--recipe", recipe]
    errors = []
    for options in ("", changed):
        done = call(small, *command, *options.split(), "--metrics", tmp_path / "m")
        assert done.returncode == 0, done.stderr
        errors.append(read_json(tmp_path / "m")["mse"])
    assert errors[0] != errors[1]


def test_no_test_rating_reaches_training(source):
    """Other ratings of other pairs in the test part leave all that is trained bit for bit."""
    train, test = data.split(source.ratings, "ua")
    other = test.with_columns(polars.col("rating", "item").shuffle(seed=0))
    options = {"epochs": 1, "ensemble": 1, "batch_size": 4096, "allow_overlap": True}
    parts = [source._replace(ratings=train, test=each) for each in (test, other)]
    (tables, figures), (others, others_figures) = (fit(part, "best", **options) for part in parts)
    assert torch.equal(tables, others)
    assert figures["mse"] < 1 < others_figures["mse"]
    # And what is held out of the training part is the same, whatever the test part is.
    turned = polars.concat([train, test.with_columns(rating=6 - polars.col("rating"))])
    pairs = source.ratings.select("user", "item")
    turned = pairs.join(turned, ["user", "item"], maintain_order="left")
    sources = (source._replace(ratings=each) for each in (source.ratings, turned))
    tasks = [collab.prepare(each, holdout=0.2, seed=3) for each in sources]
    for one, again in zip(*((*task.train, *task.test) for task in tasks), strict=True):
        assert torch.equal(one, again)


def test_predictions_are_clipped_to_the_training_ratings(tiny):
    """Not to those of the test part: here it has 1 and 5, the training part has not."""
    is_inner = polars.col("rating").is_between(2, 4)
    test = tiny.ratings.filter(~is_inner)
    part = tiny._replace(ratings=tiny.ratings.filter(is_inner), test=test)
    trained = collab.train_model(collab.prepare(part, epochs=9, y_range=(0, 6), weight_decay=0.0))
    found = collab.predict(trained, test, allow_unknown=True)["rating"]
    assert (found.min(), found.max()) == (2, 4)
    error = ((found - test["rating"]) ** 2).mean()
    assert trained.about["figures"]["mse"] == pytest.approx(error, rel=1e-5)


def test_a_recipe_fits_the_data(source):
    """On ua it has its own values; else as many steps, and decays that go with ratings a row."""
    for recipe, values in collab.RECIPES.items():
        options = collab.prepare(source, recipe).options
        assert options | {"y_range": None} == values | {"y_range": None}
    for n_ratings in (99, 5_000, 50_000):
        part = source._replace(ratings=source.ratings.sample(n_ratings, seed=0), split="random")
        task, default = collab.prepare(part), collab.RECIPES["default"]
        n_train, n_rows = len(task.train[0]), sum(len(rows.unique()) for rows in task.train[:2])
        assert task.options["batch_size"] == max(round(612 * n_train / 90_570), 2)
        for name in ("weight_decay", "bias_decay"):
            expected = default[name] * (90_570 / 2_623 / (n_train / n_rows)) ** 0.7
            assert task.options[name] == pytest.approx(expected, rel=1e-3)
        for low, high in ((1.0, 5.0), (0.0, 9.0)):
            options = collab.prepare(part._replace(rating_range=(low, high))).options
            reach = 4 * task.train[2].double().std(correction=0), task.train[2].mean()
            expected = [low - (high - low) / 8, high + (high - low) / 8]
            expected = max(expected[0], reach[1] - reach[0]), min(expected[1], sum(reach))
            assert options["y_range"] == pytest.approx(list(map(float, expected)), rel=1e-4)
    given = {"weight_decay": 0.3, "y_range": (0.0, 6.0), "batch_size": 7}
    assert collab.prepare(part, **given).options.items() >= given.items()


@pytest.mark.parametrize("n_levels", [2, 101])
def test_ratings_that_are_no_scale(tiny, n_levels):
    place, told = (polars.int_range(polars.len()) % n_levels).cast(polars.Float32), []
    part = tiny._replace(ratings=tiny.ratings.with_columns(rating=place))
    assert collab.prepare(part, "best", notice=told.append).options["loss"] == "mse"
    assert f"loss mse, not ordinal, for {n_levels} distinct ratings" in told


@pytest.mark.parametrize("recipe", ["default", "best"])
@pytest.mark.parametrize(("factor", "constant"), [(1e-6, 0), (1e6, 0), (1, 100), (-1, 6)])
def test_the_scale_of_ratings_changes_the_unit_alone(source, recipe, factor, constant):
    ratings, found = source.ratings.sample(5_000, seed=0), []
    options = {"n_factors": 8, "epochs": 2, "ensemble": 1, "features": ("id", "time")}
    for scale in (1, 0), (factor, constant):
        rating = (polars.col("rating") * scale[0] + scale[1]).cast(polars.Float32)
        part = source._replace(ratings=ratings.with_columns(rating), split="random")
        figures = fit(part, recipe, **options)[1]
        rows = figures, figures["baselines"]["averages"]
        found.append([row[name] for row in rows for name in ERRORS])
    units = [abs(factor) ** power for power in (2, 1, 1) * 2]
    assert found[1] == pytest.approx((found[0] * numpy.array(units)).tolist(), rel=2e-3)


SMALL = {  # a rating by user and item; none may end worse than the averages
    "one hated item": (20, 20, lambda user, item: 1 if item == 19 else 5),
    "an outlier": (200, 100, lambda u, item: 50_000 if u == item == 7 else 3 + u * item % 3),
    "mostly fives": (100, 50, lambda user, item: 5 if (user * 31 + item * 17) % 20 else 1),
    "counts": (100, 40, lambda user, item: int(1.0625 ** ((user * user + item) % 210))),
}


@pytest.mark.parametrize(
    ("recipe", "name"),
    [*(("default", name) for name in SMALL), ("best", "an outlier"), ("best", "mostly fives")],
)
def test_small_and_odd_ratings_end_no_worse_than_averages(main, tmp_path, name, recipe):
    n_users, n_items, rate = SMALL[name]
    rows = [(u, i, rate(u, i)) for u in range(n_users) for i in range(n_items)]
    polars.DataFrame(rows, ["user", "item", "rating"], orient="row").write_csv(tmp_path / "r.csv")
    done = main("train", "--ratings", "r.csv", "--recipe", recipe, "--metrics", "m.json")
    figures = read_json(tmp_path / "m.json")
    ratio = figures["rmse"] / figures["baselines"]["averages"]["rmse"]
    assert ratio < 1.01
    assert ("this is worse than the averages" in done.stderr) == (ratio > 1)
    assert "\n8 of 10 ratings are " in done.stderr


def test_two_processes_train_as_one_does(main, tmp_path, small):
    """Features, context, dropout, outputs and two models; the last batch is not whole."""

    def torchrun(*arguments):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", ROOT / "collab.py", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=100)

    command = ("train", "--ratings", small / "r.parquet", "--recipe", "best", "--ensemble", 2)
    models = []
    for start in (torchrun, main):
        done = start(*command, "--epochs", 2, "--batch-size", 600, "--save", "m.pt")
        assert [line.split()[0] for line in done.stdout.splitlines()] == ["epoch", "1", "2", "test"]
        models.append(collab.load_model(tmp_path / "m.pt"))
    assert collab.evaluate(models[0]) == pytest.approx(collab.evaluate(models[1]), rel=1e-5)
    # Sums in another order: Adam makes a step of lr of a gradient of rounding errors.
    tables, others = (model.tensors["tables"] for model in models)
    torch.testing.assert_close(tables, others, rtol=0, atol=1e-3)
    assert (tables - others).abs().mean() < 1e-6
    done = torchrun(*command, "--loss", "mse", "--y-range", 0, 4)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(re.findall("^Error: .*--y-range", done.stderr, re.MULTILINE)) == 1
    assert "collab.py" not in done.stderr.replace("collab.py FAILED", ""), "no traceback of ours"


@pytest.mark.parametrize(("rank", "size", "n_lines"), ["021", "120", "311", "x21"])
def test_the_first_process_speaks_for_all(main, monkeypatch, rank, size, n_lines):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    done = main("cross-validate", "--folds", "1")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, int(n_lines))
    is_many = rank + size in ("02", "12")
    assert main("cross-validate", "--ratings", "x.csv").returncode == (2 if is_many else 1)


# Resuming.


@pytest.mark.parametrize("recipe", ["fastai", "default", "best"])
@pytest.mark.parametrize("n_done", [1, 2, 3])
def test_resumed_it_goes_on_to_the_same_bits(tiny, tmp_path, recipe, n_done):
    """After each epoch, the last too; and on nothing but the same data and options."""
    options = {"epochs": 3, "ensemble": 2, "n_factors": 4, "dropout": 0.3, "batch_size": 300}
    task, path = collab.prepare(tiny, recipe, **options), tmp_path / "c"

    def stop(row):
        if row["epoch"] == n_done:
            raise KeyError

    with pytest.raises(KeyError):
        collab.train_model(task, checkpoint=path, on_epoch=stop)
    again = collab.train_model(collab.prepare(tiny, recipe, **options), resume=path)
    whole = collab.train_model(task)
    assert torch.equal(whole.tensors["tables"], again.tensors["tables"])
    rows = [[row["train_loss"] for row in m.about["figures"]["epochs"]] for m in (whole, again)]
    assert rows[0] == rows[1]
    first = polars.int_range(polars.len()) == 0
    others = [collab.prepare(tiny, recipe, **options | {name: 2}) for name in ("seed", "epochs")]
    for name, value in (("rating", 2.5), ("item", "new")):
        changed = polars.when(first).then(polars.lit(value)).otherwise(name).alias(name)
        part = tiny._replace(ratings=tiny.ratings.with_columns(changed))
        others.append(collab.prepare(part, recipe, **options))
    for other in others:
        with pytest.raises(ValueError, match="the data is not"):
            collab.train_model(other, resume=path)


def test_a_checkpoint_has_all_options(main, tmp_path, small):
    """All that the result depends on, and no other may be given."""
    train = ("train", "--ratings", small / "r.csv", "--items", small / "i.csv", *FLAGS)
    train += ("--features", "id,side", "--rating-range", 0, 6, "--epochs", 2, "--keep-last")
    assert main(*train, "--checkpoint", "c", "--save", "m.pt").returncode == 0
    done = main("train", "--resume", "c", "--save", "again.pt", "--threads", 1)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 4), done.stderr
    ours, again = (collab.load_model(tmp_path / name) for name in ("m.pt", "again.pt"))
    assert torch.equal(ours.tensors["tables"], again.tensors["tables"])


# Other data.


def test_best_uses_all_that_the_data_has(tiny):
    lacks = {"": tiny, "side": tiny._replace(users=None, items=None)}
    lacks["time"] = tiny._replace(ratings=tiny.ratings.drop("timestamp"))
    for lack, part in lacks.items():
        told, features = [], collab.RECIPES["best"]["features"]
        found = collab.prepare(part, "best", notice=told.append).options["features"]
        assert found == tuple(name for name in features if name != lack)
        assert any(line.startswith(f"without the feature {lack}:") for line in told) == bool(lack)
        assert collab.prepare(part).options["features"] == ("id",)


def test_cross_validation(main, tmp_path, source, small):
    command = ("cross-validate", "--epochs", 1, "--batch-size", 2048, "--metrics", "m.json")
    done = main(*command, "--splits", "u2,u4")
    figures, last = read_json(tmp_path / "m.json"), done.stdout.splitlines()[-1]
    assert [line.split()[0] for line in done.stdout.splitlines()[1:3]] == ["u2", "u4"]
    for fold in figures["folds"]:  # each is what `train` gives on the split
        alone = fit(source, split=fold["fold"], epochs=1, batch_size=2048)[1]
        assert fold["mse"] == alone["mse"]
    for name in ("rmse", "mae"):
        values = [fold[name] for fold in figures["folds"]]
        assert figures[name] == pytest.approx(sum(values) / 2)
        assert figures[f"{name}_std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        assert f"{name} {figures[name]:#.4g} +- {figures[f'{name}_std']:#.2g}" in last
    for n_folds, told in ((3, ("--folds", 3)), (5, ())):  # five of one's own, unless told
        done = main(*command, *told, "--ratings", small / "r.parquet")
        assert done.stdout.splitlines()[n_folds].startswith(f"  {n_folds}/{n_folds} | ")
    done = main(*command, "--by-date", 2)
    fold = read_json(tmp_path / "m.json")["folds"][1]
    train, test = list(data.fold_by_date(source.ratings, 2))[1]
    part = source._replace(ratings=train, test=test)
    assert fold["mse"] == fit(part, epochs=1, batch_size=2048)[1]["mse"]
    assert "in 28,705 test ratings; predicted as average" in done.stderr


# Answers.


def test_ids_and_titles(plain, source):
    """An unknown id is an average one on request; a part of a title is enough if it is alone."""
    pairs = polars.DataFrame({"user": [0, 22, 22], "item": [10**9, 50, 10**9]})
    with pytest.raises(ValueError, match="no user '0' in the model"):
        collab.predict(plain, pairs)
    found = collab.predict(plain, pairs, allow_unknown=True)["rating"]
    assert found[1] == pytest.approx(collab.predict(plain, pairs[1:2])["rating"][0])
    assert abs(found[0] - source.ratings["rating"].mean()) < 0.7
    for raw in ("022", "+22", "22.5", "2 2", "", "x", -22, 944, "9" * 30):
        with pytest.raises(ValueError, match="no user"):
            collab.recommend(plain, raw)
    assert collab.recommend(plain, "22").equals(collab.recommend(plain, 22))
    assert collab.find_similar(plain, "STAR WARS").equals(collab.find_similar(plain, 50))
    with pytest.raises(ValueError, match=r"^'alien' .* 183 'Alien \(1979\)', [^\n]*$"):
        collab.find_similar(plain, "alien")


def test_similar_items_and_likings_by_hand(plain):
    """Weighed cosines and the order of biases by numpy; what nobody rated is in neither."""
    counts = numpy.bincount(plain.tensors["train_items"], minlength=1682)
    biases, factors = plain.members[0].item_bias, plain.members[0].item_factors.numpy()[:1682]
    order = [row for row in biases.reshape(-1)[:1682].argsort(descending=True) if counts[row]]
    found, items = collab.find_similar(plain, 50, n=5), collab.interpret(plain)
    assert items["item"].to_list() == plain.ids.items.gather(order).to_list()
    assert items["n_ratings"].to_list() == counts[order].tolist()
    factors = factors / numpy.linalg.norm(factors, axis=1, keepdims=True)
    cosines = numpy.where(counts > 0, factors @ factors[49] * counts / (counts + 30), -2)
    cosines[49] = -2
    top = numpy.argsort(-cosines)[:5]
    assert found["item"].to_list() == plain.ids.items.gather(top).to_list()
    assert found["similarity"].to_list() == pytest.approx(cosines[top].tolist(), abs=1e-5)
    assert found["n_ratings"].to_list() == counts[top].tolist()
    users = collab.find_similar(plain, 196, n=2, side="user")
    assert users.columns == ["user", "similarity", "n_ratings"]
    assert 196 not in users["user"]
    assert users["similarity"].is_sorted(descending=True)


@pytest.mark.parametrize("by", ["rating", "taste", "popular"])
def test_ranking_figures_by_brute_force(plain, by):
    """Every user's items sorted in numpy: by predictions, by X V V' and these, by numbers."""
    users, items = plain.ids.users.to_frame("user"), plain.ids.items.to_frame("item")
    every, k = users.join(items, how="cross"), 10
    scores = collab.predict(plain, every)["rating"].to_numpy().reshape(943, 1682).copy()
    tensors, figures = {name: tensor.numpy() for name, tensor in plain.tensors.items()}, []
    rated = numpy.zeros((943, 1682))
    rated[tensors["train_users"], tensors["train_items"]] = 1
    if by == "taste":
        scores = rated @ tensors["tastes"] @ tensors["tastes"].T + 0.4 * scores / 4
    scores = rated.sum(0) - numpy.zeros((943, 1)) if by == "popular" else scores
    scores[rated > 0] = -1
    for user in range(943):
        is_own = (tensors["test_users"] == user) & (tensors["test_ratings"] >= 4)
        wanted = tensors["test_items"][is_own]
        if len(wanted):
            hits = numpy.isin(numpy.argsort(-scores[user], kind="stable")[:k], wanted)
            gains = 1 / numpy.log2(numpy.arange(k) + 2)
            ndcg = gains[hits].sum() / gains[: len(wanted)].sum()
            first = 1 / (hits.argmax() + 1) if hits.any() else 0
            figures.append([hits.mean(), hits.sum() / len(wanted), ndcg, hits.any(), first])
    found = collab.rank(plain, k=k, min_rating=4, by="taste" if by == "popular" else by)
    found = found["popular"] if by == "popular" else found
    assert found["n_users"] == len(figures)
    expected = numpy.mean(figures, axis=0).tolist()
    names = ("precision", "recall", "ndcg", "hit_rate", "mrr")
    tolerance = 4e-3 if by == "popular" else 2e-4  # numbers tie
    assert [found[name] for name in names] == pytest.approx(expected, abs=tolerance)


def test_what_a_list_may_have(main, tmp_path, plain):
    """What was rated in the test part is left out, too, what is no candidate, or little rated."""
    tensors, ids = plain.tensors, plain.ids
    rows = [tensors[f"{part}_items"][tensors[f"{part}_users"] == 21] for part in ("train", "test")]
    seen = ids.items.gather(torch.cat([each.long() for each in rows]).numpy())
    every = collab.recommend(plain, 22, n=10**6)
    assert not set(every["item"]) & set(seen)
    assert len(every) == 1680 - len(seen)
    few, often = collab.recommend(plain, 22, n=10**6, min_ratings=100), plain.counts[1] >= 100
    assert set(few["item"]) == {*ids.items.filter(polars.Series(often.numpy()))} - {*seen}
    chosen = [*every["item"][:5], *seen[:2], 10**9]
    found = collab.recommend(plain, 22, candidates=chosen)
    assert found["item"].to_list() == chosen[:5]
    new = collab.recommend(plain, rated=polars.DataFrame({"item": [50], "rating": [5.0]}), n=5)
    assert 50 not in new["item"]
    popular = plain.counts[1].argsort(descending=True)[:100].numpy()
    nobody = polars.DataFrame({"item": [1], "rating": [1.0]}).clear()
    assert set(collab.recommend(plain, rated=nobody, n=5)["item"]) <= {*ids.items.gather(popular)}
    collab.save_model(tmp_path / "m.pt", plain)
    polars.DataFrame({"user": [22, 196]}).write_csv(tmp_path / "u.csv")
    polars.DataFrame({"item": chosen}).write_csv(tmp_path / "c.csv")
    ask = ("recommend", "m.pt", "-n", 3, "--json")
    several = json.loads(main(*ask, "--user", 22, "--user", 196).stdout)["items"]
    assert [(each["user"], each["rank"]) for each in several][::3] == [(22, 1), (196, 1)]
    assert json.loads(main(*ask, "--users", "u.csv").stdout)["items"] == several
    found = json.loads(main(*ask, "--user", 22, "--candidates", "c.csv").stdout)["items"]
    assert [each["item"] for each in found] == chosen[:3]
    rate = ("--rate", "Star Wars", 5, "--rate", "Postino, Il", 4)
    done = main("recommend", "m.pt", *rate)
    assert "rated: Star Wars (1977); Postino, Il (1994)" in done.stderr
    done = main("predict", "m.pt", *rate, "--item", 172, "--json")
    assert 1 <= json.loads(done.stdout)["rating"] <= 5
    done = main("predict", "m.pt", "--user", 10**9, "--item", 172, "--allow-unknown")
    assert done.stdout.endswith("(1980), in part as average\n")


def test_a_model_with_times_knows_the_moment_of_a_rating(timed, source):
    """The test part as other ratings: the same errors, from the times that the model has kept."""
    train, test = data.split(source.ratings, "ua")
    expected = {name: timed.about["figures"][name] for name in ("n_test", *ERRORS)}
    assert collab.evaluate(timed) == pytest.approx(expected, rel=1e-6)
    assert collab.evaluate(timed, test) == pytest.approx(expected, rel=1e-5)
    assert collab.evaluate(timed, test.drop("timestamp"))["mse"] > expected["mse"] + 0.01
    with pytest.raises(ValueError, match=r"^118 of the \(user, item\) pairs .* training part"):
        collab.evaluate(timed, train.filter(polars.col("user") == 22))


def test_members_are_averaged(timed):
    pairs, head = torch.cartesian_prod(*map(torch.arange, (9, 9))).T, collab.make_head(*timed.head)
    each = [collab.model.predict(rows, *pairs, head=head) for rows in timed.members]
    assert not torch.equal(*each)
    found = collab.predict_mean(timed.members, *pairs, head=head)
    torch.testing.assert_close(found, sum(each) / 2)


def test_a_question_is_about_the_moment_after_the_last_rating(main, tmp_path, timed, source):
    """Unless it tells another, by --time, in a table or from Python: then it is as told."""
    train, _ = data.split(source.ratings, "ua")
    last = train.filter(user=196)["timestamp"].max()
    pairs = polars.DataFrame({"user": [196, 196, 22], "item": [50, 172, 50]})

    def ask(*times):
        return collab.predict(timed, pairs.with_columns(timestamp=polars.Series(times)))["rating"]

    day = last + 86_400
    after = ask(last + 1, last + 1, train.filter(user=22)["timestamp"].max() + 1)
    assert not after.equals(ask(day, day, day))
    for options, expected in (({}, after), ({"time": day}, ask(day, day, day))):
        assert collab.predict(timed, pairs, **options)["rating"].equals(expected)
        listed = collab.recommend(timed, [22, 196], n=1682, include_seen=True, **options)
        listed = pairs.join(listed, ["user", "item"], maintain_order="left")["rating"]
        numpy.testing.assert_allclose(listed, expected, atol=1e-5)
    collab.save_model(tmp_path / "m.pt", timed)
    when = datetime.fromtimestamp(day, UTC)
    ask = "predict", "m.pt", "--user", 196, "--item", 50, "--json"
    for given in ([], ["--time", day], ["--time", when.isoformat()], ["--time", f"{when:%F %T}"]):
        rating = json.loads(main(*ask, *given).stdout)["rating"]
        assert rating == pytest.approx((expected if given else after)[0], abs=1e-5)
    listed = [main("recommend", "m.pt", "--user", 196, *g).stdout for g in ([], ["--time", day])]
    assert listed[0] != listed[1]
    done = main("recommend", "m.pt", "--rated", "50:5", "--time", day)
    assert (done.returncode, "a time needs a model" in done.stderr) == (1, True)
    with pytest.raises(ValueError, match=r"in Unix seconds, not datetime\.datetime"):
        collab.recommend(timed, 196, time=when)
    with pytest.raises(ValueError, match="timestamps must be Unix seconds"):
        collab.predict(timed, pairs.with_columns(timestamp=when))
    pairs.select("user", "item").write_csv(tmp_path / "p.csv")
    for time in ("noon", "9" * 12, "2026-13-01"):
        done = main(*ask, "--time", time)
        assert done.returncode == 2
        assert f"'{time}' is not the time of a date, as 2026-01-31" in done.stderr
    main("predict", "m.pt", "--pairs", "p.csv", "--output", "o.csv", "--time", day)
    found = polars.read_csv(tmp_path / "o.csv")["rating"]
    numpy.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_new_user_is_nearer_than_the_average_one(timed, plain, source):
    """By what is known of users who are known: as near as the rows that were trained."""
    parts = data.split(source.ratings, "ua")
    for trained in (timed, plain):
        errors = []
        for user in range(1, 300, 20):
            rated, asked = (part.filter(polars.col("user") == user) for part in parts)
            asked, rated = asked.drop("timestamp"), rated.drop("user")
            every = {"n": 2000, "include_seen": True}
            folded = collab.recommend(trained, rated=rated.drop("timestamp"), **every)
            is_new = not collab.recommend(trained, rated=rated, **every).equals(folded)
            assert is_new == (trained is timed), "the moments tell of the user, too"
            folded = asked.drop("rating").join(folded, "item", maintain_order="left")
            average = asked.with_columns(user=0)
            found = [collab.predict(trained, each, allow_unknown=True) for each in (asked, average)]
            found = [each["rating"] - asked["rating"] for each in (folded, *found)]
            errors.append([(each**2).mean() for each in found])
        ours, theirs, average = numpy.mean(errors, axis=0)
        assert ours < min(theirs + 0.05, average - 0.05)


def test_the_librarys_errors_are_its_own(plain, source):
    """And what a new user rated twice counts once, the later one."""
    frames = [[(50, 1), (172, 4)], [(50, 5), (172, 4), (50, 1)], [(50, 5), (172, 4)]]
    frames += [[(50, 1, 9), (50, 5, 8), (172, 4, 7)], [(50, 0.5)], [(50, float("nan"))]]
    names = ["item", "rating", "timestamp"]
    frames = [polars.DataFrame(rows, names[: len(rows[0])], orient="row") for rows in frames]
    alone, later, other, timed = (collab.recommend(plain, rated=each) for each in frames[:4])
    assert alone.equals(later)
    assert alone.equals(timed)
    assert not alone.equals(other)
    assert not {50, 172} & set(collab.recommend(plain, rated=frames[0], n=2000)["item"])
    wrong = [{"rated": frame} for frame in frames[4:]] + [{"users": 1, "rated": frames[0]}]
    for each in (*wrong, {}, {"users": 1, "n": -1}, {"users": [0]}):
        with pytest.raises(ValueError, match=r"rating .* 1 to 5|give a user|no user '0'"):
            collab.recommend(plain, **each)
    for wrong in ({"n_factor": 8}, {"recipe": "x"}, {"loss": "x"}, {"epochs": 0}):
        with pytest.raises(ValueError, match=str(next(iter(wrong)))):
            collab.prepare(source, **wrong)


def test_titles_that_are_numbers_are_texts(main, tmp_path):
    row = polars.Series(range(99))
    ratings = polars.DataFrame({"user": row % 10, "item": row % 7, "rating": row % 5})
    ratings.write_csv(tmp_path / "r.csv")
    titles = polars.DataFrame({"item": range(7), "title": range(1990, 1997)})
    titles.write_parquet(tmp_path / "i.parquet")
    files = ("--ratings", "r.csv", "--items", "i.parquet")
    assert main("train", "--epochs", 1, *files, "--save", "m.pt").returncode == 0
    found = json.loads(main("similar", "m.pt", "--item", "1993", "--json").stdout)
    assert (found["item"], found["title"]) == (3, "1993")


LIKES = {
    (user, item): 5 if item % 4 == user % 4 else 2 for user in range(1, 21) for item in range(40)
}
LIKED = polars.DataFrame(
    [(*pair, rating) for pair, rating in LIKES.items()], ["user", "item", "rating"], orient="row"
)
KINDS = polars.DataFrame({"item": [*range(40), 999], "title": [f"Film {n}" for n in range(41)]})
KINDS = KINDS.with_columns(genre=polars.format("g{}", polars.col("item").replace(999, 1) % 4))


def test_items_of_a_table_alone_are_in_the_model(main, tmp_path):
    """By their features if these are learnt, else as the average one, which is in no list."""
    said = []
    source = collab.read(LIKED, items=KINDS, notice=said.append)
    assert "1 of the table's 41 items have no ratings" in said
    asked = polars.DataFrame({"user": [1, 2], "item": [999, 999]})
    trained = collab.train_model(collab.prepare(source, features=("id", "side")))
    like, dislike = collab.predict(trained, asked)["rating"]
    assert like > 4.5
    assert dislike < 2.5
    assert 999 in collab.recommend(trained, 1, n=10**6)["item"]
    assert 999 not in collab.find_similar(trained, 1, n=10**6)["item"]
    plain = collab.train_model(collab.prepare(source))
    assert plain.ids.items[-1] == 999
    average = collab.predict(plain, asked.with_columns(item=-1), allow_unknown=True)["rating"]
    assert collab.predict(plain, asked)["rating"].equals(average)
    assert 999 not in collab.recommend(plain, 1, n=10**6)["item"]
    with pytest.raises(ValueError, match=r"no item of the table .* '.*1' there, .* --item-column"):
        collab.read(LIKED, items={"item": ["01", "02"], "title": ["a", "b"]})
    KINDS.write_csv(tmp_path / "i.csv")
    LIKED.rename({"item": "asin"}).write_csv(tmp_path / "r.csv")  # which the table calls otherwise
    done = main("train", "--ratings", "r.csv", "--items", "i.csv", "--item-column", "asin")
    assert done.returncode == 0, done.stderr
    assert "r.csv: user is user, item is asin, rating is rating" in done.stderr


def test_ids_may_be_of_any_library(plain):
    users = plain.ids.users[:2]
    expected = collab.recommend(plain, users.to_list(), n=2)
    for ids in (users, users.to_numpy(), users.to_torch(), tuple(users)):
        assert collab.recommend(plain, ids, n=2).equals(expected)
    assert collab.recommend(plain, numpy.int64(users[0]), n=2).equals(expected.head(2))
    with pytest.raises(ValueError, match="no item '2001' in the model"):
        collab.find_item(plain, 2001)  # a number is in no title, as that of 2001: A Space Odyssey
    assert plain.titles[collab.find_item(plain, "2001")].startswith("2001: A Space")
    rated = polars.DataFrame({"item": [2001], "rating": [5.0]})
    with pytest.raises(ValueError, match="no item '2001'"):
        collab.recommend(plain, rated=rated)
    assert re.fullmatch(
        "<Model: default on ml-100k, ua; 943 users, 1,682 items; mse .*>", repr(plain)
    )


def test_all_may_be_trained_on(main, tmp_path):
    """Without a test part there are no errors, in no file, and a checkpoint goes on to the same."""
    LIKED.write_csv(tmp_path / "r.csv")
    train = ("train", "--ratings", "r.csv", "--split", "none")
    done = main(*train, "--save", "m.pt", "--metrics", "m.json", "--checkpoint", "k.pt")
    assert done.stdout.startswith("epoch | train_loss |    time\n"), done.stderr
    assert re.fullmatch(r"trained in \d+\.\d\d s", done.stdout.splitlines()[-1])
    figures = json.loads((tmp_path / "m.json").read_text())
    assert figures["n_train"] == 800
    assert figures["n_test"] == 0
    assert not {"mse", "rmse", "mae"} & {*figures, *figures["epochs"][0]}
    for words in (("evaluate", "m.pt"), ("evaluate", "m.pt", "--ranking")):
        done = main(*words)
        assert done.returncode == 1
        assert done.stderr.endswith("--ratings\n")
    assert (
        "on 800 ratings of r.csv"
        in main("evaluate", "m.pt", "--ratings", "r.csv", "--allow-overlap").stdout
    )
    assert main("info", "m.pt").returncode == 0
    assert main("plot", "m.json", "--output", "m.svg").returncode == 0
    done = main("train", "--resume", "k.pt", "--save", "n.pt")
    assert done.returncode == 0, done.stderr
    tables = (collab.load_model(tmp_path / name).tensors["tables"] for name in ("m.pt", "n.pt"))
    assert torch.equal(*tables)


def test_factors_are_exported_with_their_ids(main, tmp_path, plain, timed):
    """From what is written the predictions follow."""
    collab.save_model(tmp_path / "m.pt", plain)
    for output in ("f.npz", "f.parquet"):
        assert main("export", "m.pt", "--output", output).returncode == 0
    arrays = numpy.load(tmp_path / "f.npz")
    users, items = ((arrays[f"{n}_factors"][0], arrays[f"{n}_bias"][0]) for n in ("user", "item"))
    head = plain.head[1]
    low, span = head["low"], head["high"] - head["low"]
    share = (head["mean"] - low) / span
    z = users[0] @ items[0].T + users[1][:, None] + items[1] + numpy.log(share / (1 - share))
    asked = polars.DataFrame({"user": [196, 22], "item": [242, 50]})
    expected = (low + span / (1 + numpy.exp(-z))).clip(*plain.clip)
    places = [numpy.searchsorted(arrays[f"{name}_ids"], asked[name]) for name in ("user", "item")]
    assert numpy.allclose(
        collab.predict(plain, asked)["rating"], expected[tuple(places)], atol=1e-5
    )
    table = polars.read_parquet(tmp_path / "f.parquet")
    assert table.columns == ["side", "id", "member", "factors", "bias"]
    assert table["id"].to_list() == [*map(str, [*plain.ids.users, *plain.ids.items])]
    assert numpy.allclose(table["factors"].to_numpy(), numpy.concatenate([users[0], items[0]]))
    many = collab.export(timed)
    assert many["user_bias"].shape == (len(timed.members), 943, timed.members[0].user_bias.shape[1])


def test_times_may_have_fractions(main, tmp_path):
    """To the model a time is a second, in training, in its file and in questions."""
    rows = [(u, i, 1 + u * i % 5, 1e9 + 7.25 * u + i) for u in range(1, 21) for i in range(1, 21)]
    frame = polars.DataFrame(rows, ["user", "item", "rating", "timestamp"], orient="row")
    frame.write_csv(tmp_path / "r.csv")
    done = main("train", "--ratings", "r.csv", "--features", "id,time", "--save", "m.pt")
    assert done.returncode == 0, done.stderr
    done = main("evaluate", "m.pt", "--ratings", "r.csv", "--allow-overlap")
    assert "on 400 ratings" in done.stdout, done.stderr
    frame.filter(user=1).drop("user").write_csv(tmp_path / "one.csv")
    done = main("recommend", "m.pt", "--rated", "one.csv", "--include-seen")
    assert done.returncode == 0, done.stderr


def test_what_the_library_is_asked_is_checked(plain, tmp_path):
    """Frames are of any library, and what is wrong is a ValueError, never an answer."""
    pair = {"user": [196.0], "item": ["242"]}
    expected = collab.predict(plain, polars.DataFrame({"user": [196], "item": [242]}))["rating"]
    assert collab.predict(plain, pair)["rating"].equals(expected)
    assert len(collab.recommend(plain, rated={"item": [50], "rating": [5]}, n=2)) == 2
    both = collab.recommend(plain, 196, candidates=[50.0, 172.0], include_seen=True)
    assert sorted(both["item"]) == [50, 172]
    for ask, message in (
        ({"by": "typo"}, "by taste or rating, not 'typo'"), ({"candidates": [0]}, "no candidate"),
        ({"n": 0}, "n above 0"), ({"rated": {"item": [50], "rating": [6]}}, "not both"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            collab.recommend(plain, 196, **ask)
    for rating in (6, None, math.nan):
        with pytest.raises(ValueError, match="is not within 1 to 5"):
            collab.recommend(plain, rated={"item": [50, 1], "rating": [5, rating]})
