import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import collab
import data
import model
import train

ROOT = Path(collab.__file__).parent
LINE = re.compile(r" +(\d+) \| +(\d\.\d{4})" + r" \| +(\d\.\d{4})" * 3 + r" \| +\d+\.\d\d s")


def read_json(path):
    return json.loads(path.read_text())


@pytest.mark.usefixtures("ml_100k")
def test_train_keeps_the_contract(run, tmp_path):
    done = run("train", "--metrics", "m.json", "--save", "m.pt")
    assert done.returncode == 0, done.stderr
    header, *lines, last = done.stdout.splitlines()
    assert header == "epoch | train_loss | test_mse | test_rmse | test_mae |    time"
    rows = [LINE.fullmatch(line).groups() for line in lines]
    assert {len(line) for line in lines} == {len(header)}
    assert re.fullmatch(r"ml-100k: from the cache .*\n", done.stderr), "one line, and no bar"

    figures = read_json(tmp_path / "m.json")
    assert " ".join(figures) == (
        "recipe dataset split seed options n_users n_items n_train n_test epochs "
        "mse rmse mae fit_seconds evaluate_seconds load_seconds"
    )
    options = collab.RECIPES["default"]
    assert figures["options"] == json.loads(json.dumps(options))
    assert (figures["n_users"], figures["n_items"]) == (943, 1682)
    assert (figures["n_train"], figures["n_test"]) == (90570, 9430)
    assert [int(row[0]) for row in rows] == list(range(1, options["epochs"] + 1))
    for row, epoch in zip(rows, figures["epochs"], strict=True):
        assert list(epoch) == ["epoch", "train_loss", "mse", "rmse", "mae", "seconds"]
        values = [f"{epoch[name]:.4f}" for name in ("train_loss", "mse", "rmse", "mae")]
        assert list(row[1:]) == values
    # The last epoch is the result, whatever the others were.
    for name in ("mse", "rmse", "mae"):
        assert figures[name] == figures["epochs"][-1][name]
        assert f"{name} {figures[name]:.4f}" in last
    assert figures["fit_seconds"] == pytest.approx(sum(e["seconds"] for e in figures["epochs"]))
    assert figures["mse"] < 0.870


def test_the_saved_file_predicts_what_was_reported(run, tmp_path, ratings):
    run("train", "--save", "m.pt", "--epochs", "2")
    saved = torch.load(tmp_path / "m.pt", weights_only=True)
    assert sorted(saved) == ["figures", "item_ids", "params", "user_ids"]
    params = model.Params(**saved["params"])
    _, test_part, ids = data.to_tensors(*data.split(ratings, "ua"))
    assert saved["user_ids"] == ids.users.to_list()
    assert saved["item_ids"] == ids.items.to_list()
    y_range = saved["figures"]["options"]["y_range"]
    errors = train.evaluate(
        lambda users, items: model.predict(params, users, items, y_range=y_range),
        *test_part,
        clip=(1, 5),
    )
    assert errors.mse == pytest.approx(saved["figures"]["mse"], rel=1e-6)


def test_fastais_result_is_reached(run, tmp_path):
    done = run("train", "--recipe", "fastai", "--seed", 3, "--metrics", "m.json")
    assert done.returncode == 0, done.stderr
    figures = read_json(tmp_path / "m.json")
    assert 0.888 < figures["mse"] < 0.908
    assert len(figures["epochs"]) == 10
    assert figures["options"] == {
        "n_factors": 40,
        "epochs": 10,
        "batch_size": 64,
        "drop_last": True,
        "lr_max": 0.01,
        "weight_decay": 0.1,
        "bias_decay": 0.1,
        "y_range": [0.0, 5.5],
    }


@pytest.fixture(scope="module")
def one_epoch(ua):
    """The figures of one short run, with one option or none changed."""

    def one_epoch(seed=0, **changed):
        options = collab.RECIPES["default"] | {"epochs": 1, "batch_size": 2048} | changed
        *_, (params, row) = collab.fit(*ua, options=options, seed=seed)
        return params, row["mse"]

    return one_epoch


def test_the_same_seed_gives_the_same_bits(one_epoch):
    (first, first_mse), (again, again_mse) = one_epoch(), one_epoch()
    assert first_mse == again_mse
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"n_factors": 5},
        {"epochs": 2},
        {"batch_size": 1024},
        {"drop_last": True},
        {"lr_max": 0.02},
        {"weight_decay": 2.0},
        {"bias_decay": 2.0},
        {"y_range": (0.5, 5.5)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_every_option_matters(one_epoch, changed):
    assert one_epoch(**changed)[1] != one_epoch()[1]


def test_a_rating_out_of_the_y_range_is_refused(ua):
    options = collab.RECIPES["default"] | {"y_range": (0, 4.5)}
    with pytest.raises(ValueError, match=r"ratings from 1 to 5 .* y_range 0 to 4\.5"):
        next(collab.fit(*ua, options=options, seed=0))


@pytest.mark.parametrize("split", ["ub", "u3", "random"])
def test_every_kind_of_split_trains(run, tmp_path, split):
    arguments = ("--split", split, "--epochs", 1, "--seed", 5)
    done = run("train", *arguments, "--metrics", "m.json")
    assert done.returncode == 0, done.stderr
    figures = read_json(tmp_path / "m.json")
    assert figures["split"] == split
    assert figures["n_train"] + figures["n_test"] == 100_000
    assert 0.8 < figures["rmse"] < 1.2


@pytest.mark.usefixtures("ml_100k")
def test_threads(run):
    done = run("train", "--threads", 2, "--epochs", 2, "--batch-size", 50_000)
    assert done.returncode == 0, done.stderr


def test_recipes_have_the_same_options():
    """Each is a set of defaults for the same options of `train`."""
    default, fastai = collab.RECIPES["default"], collab.RECIPES["fastai"]
    parameters = {parameter.name for parameter in collab.train_command.params}
    assert list(default) == list(fastai)
    assert set(default) < parameters


USAGE = {
    "unknown command": ["fit"],
    "unknown option": ["train", "--speed"],
    "unknown split": ["train", "--split", "u9"],
    "unknown recipe": ["train", "--recipe", "sota"],
    "unknown data set": ["train", "--dataset", "netflix"],
    "no epochs": ["train", "--epochs", "0"],
    "text": ["train", "--epochs", "ten"],
    "no factors": ["train", "--n-factors", "0"],
    "no batch": ["train", "--batch-size", "-1"],
    "negative lr": ["train", "--lr-max", "-0.01"],
    "lr 0": ["train", "--lr-max", "0"],
    "lr nan": ["train", "--lr-max", "nan"],
    "lr inf": ["train", "--lr-max", "inf"],
    "negative decay": ["train", "--weight-decay", "-1"],
    "decay nan": ["train", "--bias-decay", "nan"],
    "decay beyond 1 / lr": ["train", "--lr-max", "0.5", "--weight-decay", "2"],
    "range reversed": ["train", "--y-range", "5", "0"],
    "range empty": ["train", "--y-range", "3", "3"],
    "range nan": ["train", "--y-range", "0", "nan"],
    "range inf": ["train", "--y-range", "0", "inf"],
    "range of one": ["train", "--y-range", "5"],
    "negative seed": ["train", "--seed", "-1"],
    "no threads": ["train", "--threads", "0"],
}


@pytest.mark.parametrize("arguments", USAGE.values(), ids=USAGE)
def test_wrong_usage_exits_2_with_the_value(run, arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert arguments[-1] in line or "bound" in line or "requires 2" in line or "a decay" in line


def test_no_command_shows_the_help(run):
    done = run()
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: collab.py")
    assert "train" in done.stderr


def assert_one_line(done, *parts):
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = [x for x in done.stderr.splitlines() if not x.startswith("ml-100k: from the cache")]
    for part in ("Error: ", *parts):
        assert part in line


@pytest.mark.parametrize("option", ["--save", "--metrics"])
def test_a_result_that_cannot_be_written_is_said_before_training(run, tmp_path, option):
    (tmp_path / "folder").mkdir()
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    if os.geteuid() == 0:  # root may write everywhere but to the kernel's own files
        closed = Path("/proc")
    for path in ("missing/file", "folder", closed / "file"):
        assert_one_line(run("train", option, path), str(path), "cannot be written")


@pytest.mark.usefixtures("ml_100k")
def test_a_range_that_cannot_reach_a_rating_is_refused(run, tmp_path):
    (tmp_path / "m.json").write_text("old")
    done = run("train", "--y-range", "0", "4", "--metrics", "m.json")
    assert done.returncode == 1
    *_, line = done.stderr.splitlines()
    assert line == "Error: ratings from 1 to 5 are not all within y_range 0 to 4"
    assert (tmp_path / "m.json").read_text() == "old"


@pytest.mark.usefixtures("offline")
def test_no_network_and_no_cache(run, tmp_path):
    done = run("train", "--data-dir", "empty")
    assert_one_line(done, "files.grouplens.org", "recbole==1.2.1 through pip")


@pytest.mark.usefixtures("offline")
def test_a_broken_cache_without_network_is_said_and_left(run, tmp_path, ml_100k):
    folder = tmp_path / "data" / "ml-100k"
    folder.mkdir(parents=True)
    for name in data.ML_100K_FILES:
        (folder / name).write_bytes((ml_100k / name).read_bytes())
    changed = (folder / "u.data").read_bytes().replace(b"\t3\t", b"\t4\t", 1)
    (folder / "u.data").write_bytes(changed)
    done = run("train", COLLAB_DATA_DIR=str(tmp_path / "data"))
    assert_one_line(done, f"u.data in {folder} failed the checksum")
    assert (folder / "u.data").read_bytes() == changed
    assert sorted(os.listdir(folder)) == sorted(data.ML_100K_FILES)


@pytest.mark.usefixtures("ml_100k")
def test_too_large_a_model_is_one_line(run):
    done = run("train", "--n-factors", 10**10)
    assert done.returncode == 1
    *_, line = done.stderr.splitlines()
    assert line == "Error: not enough memory for these options"


@pytest.mark.usefixtures("ml_100k")
def test_ctrl_c_exits_130_and_leaves_nothing_half_written(tmp_path):
    (tmp_path / "m.pt").write_text("old")
    command = [sys.executable, ROOT / "collab.py", "train", "--epochs", "100000"]
    process = subprocess.Popen(
        [*command, "--save", "m.pt", "--metrics", "m.json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    for _ in range(3):  # two epochs are through
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted"
    assert "Traceback" not in errors
    assert os.listdir(tmp_path) == ["m.pt"]
    assert (tmp_path / "m.pt").read_text() == "old"


def test_a_reader_that_goes_away_is_no_traceback(run, tmp_path, ml_100k):
    command = f"'{sys.executable}' '{ROOT / 'collab.py'}' train --epochs 3 2> errors | head -n 1"
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("epoch |")
    assert "Traceback" not in (tmp_path / "errors").read_text()


def test_a_terminal_gets_a_bar(tmp_path, ml_100k):
    leader, follower = os.openpty()
    process = subprocess.Popen(
        [sys.executable, ROOT / "collab.py", "train", "--epochs", "2"],
        stdout=subprocess.PIPE,
        stderr=follower,
        cwd=tmp_path,
    )
    output, _ = process.communicate(timeout=60)
    os.close(follower)
    drawn = os.read(leader, 1 << 16).decode()
    os.close(leader)
    assert process.returncode == 0
    assert "100%" in drawn
    assert len(output.splitlines()) == 4


def test_help_imports_nothing_heavy():
    code = (
        "import sys, collab; from click.testing import CliRunner;"
        "result = CliRunner().invoke(collab.cli, ['train', '-h']);"
        "assert result.exit_code == 0 and '--lr-max' in result.output;"
        "print(sorted({'torch', 'polars', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "[]\n"
