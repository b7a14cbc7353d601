"""The search for learning rates: one program, no best rate at an edge, a preset that runs."""

import math
import sys

import numpy as np
import pytest
from absl import flags

from experiments import flags as our_flags
from experiments import tune
from experiments.launch import guarded
from fedgalore_jax import blocks, train
from fedgalore_jax.config import Config
from fedgalore_jax.trials import trials

TINY = {"rounds": 2, "local_steps": 1, "batch_size": 4, "clients": 3, "rank": 2, "eval_every": 2}
ARGS = [f"--{name}={value}" for name, value in TINY.items() if name != "eval_every"]


def test_trials_share_a_program_and_are_the_runs_themselves():
    """With a schedule, and a head whose own rate stays as `lr` changes."""
    shape = TINY | {"schedule": "cosine", "head_lr": 2e-3, "method": "fedavg"}
    trial = trials(Config(**shape))
    one, two = trial(3e-3, 0), trial(1e-2, 1)
    assert one.compile().func is two.compile().func
    validated = train.validate(one), train.validate(two)
    assert validated[0]["accuracy"] != validated[1]["accuracy"]
    for last, (lr, seed) in zip(validated, ((3e-3, 0), (1e-2, 1)), strict=True):
        plain = train.run(Config(**shape, lr=lr, seed=seed), say=lambda line: None)
        for name in ("train_loss", "loss", "accuracy"):
            np.testing.assert_allclose(last[name], plain.history[-1][name], rtol=1e-4)


def test_trials_of_all_seeds_travel_in_one_shape(monkeypatch):
    """Seeds deal clients of different sizes."""
    monkeypatch.setattr(blocks, "TRAINING_SET", 0)
    trial = trials(Config(**TINY | {"local_steps": 40, "batch_size": 16, "method": "fedavg"}))
    assert trial(1e-3, 0).blocks == trial(1e-3, 1).blocks
    assert trial(1e-3, 0).blocks.samples == 40 * 16


@pytest.mark.parametrize(
    ("score", "tried"),
    [
        (lambda lr: -abs(math.log(lr / 3e-3)), [1e-3, 3e-3, 1e-2]),
        (lambda lr: lr, [1e-3, 3e-3, 1e-2, 3e-2, 9e-2, 0.3, 1.0]),
        (lambda lr: -lr, [1e-3, 3e-3, 1e-2, 3e-4, 9e-5, 3e-5]),
        (lambda lr: 0.5, [1e-3, 3e-3, 1e-2, 3e-4]),
        (lambda lr: -math.inf, [1e-3, 3e-3, 1e-2, 3e-4]),
    ],
)
def test_no_best_rate_is_at_an_end(score, tried):
    scores = {}
    for rate, beyond in tune.search([1e-3, 3e-3, 1e-2], scores):
        assert beyond == (len(scores) >= 3)
        scores[rate] = score(rate) if 2e-5 < rate < 0.5 else -math.inf  # what is further out diverges
    np.testing.assert_allclose(list(scores)[: len(tried)], tried, rtol=0.15)
    assert min(scores) < tune.best(scores) < max(scores)


def test_a_grid_of_close_rates_still_moves_outward():
    assert tune.further(1.1e-3, 1e-3) == pytest.approx(1.21e-3)
    assert tune.further(1e-3, 1.1e-3) < 1e-3


def search(*args, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tune.py", *ARGS, *args])
    guarded(tune.main)


def test_the_preset_compares_each_method_at_its_rate(tmp_path, monkeypatch, capsys):
    """The scores are made up here: fedavg's best is beyond the grid, and fedit diverges at its end."""
    seen = []

    def validate(prepared):
        config = prepared.config
        seen.append((config.method, config.lr, config.seed, config.rounds))
        if config.method == "fedit":
            assert "--opt=fedavg.lr=0.03" in preset.read_text()  # fedavg's is kept already
        if config.method == "fedit" and config.lr > 5e-3:
            raise FloatingPointError
        return {"accuracy": (config.lr if config.lr < 0.05 else 0) + config.seed / 100}

    monkeypatch.setattr(train, "validate", validate)
    preset = tmp_path / "found.cfg"
    args = ("--method=fedavg,fedit", "--opt=fedavg.server_lr=0.5", "--search_rounds=1", "--remat")
    search(*args, f"--preset={preset}", "--rates=1e-2,3e-3,1e-3", monkeypatch=monkeypatch)
    printed, text = capsys.readouterr().out, preset.read_text()
    assert "0.0350       0.0300  beyond the grid" in printed
    assert [lr for method, lr, seed, _ in seen if (method, seed) == ("fedavg", 1)] == pytest.approx(
        [1e-3, 3e-3, 1e-2, 3e-2, 9e-2], rel=1e-9
    )
    assert {rounds for *_, rounds in seen} == {1} and {seed for _, _, seed, _ in seen} == {0, 1}
    assert all(f"# {line}" in text for line in printed.splitlines())
    assert "python -m experiments.tune --rounds=2" in text and "--search_rounds" not in text.split("\n--")[-1]
    values = flags.FlagValues()
    our_flags.define(values)
    values(["run.py", f"--flagfile={preset}"])
    fedavg, fedit = our_flags.configs(values)
    assert (fedavg.method, fedavg.opt) == ("fedavg", {"server_lr": 0.5, "lr": 0.03})
    assert (fedit.method, fedit.opt) == ("fedit", {"lr": 0.003})
    assert fedavg.rounds == 2 and fedavg.remat and fedavg.lr is None


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("--rates=1e-3", "rates='1e-3' are no grid"),
        ("--rates=1e-3,x", "must be numbers"),
        ("--rates=1e-3,inf", "rates='1e-3,inf' are no grid"),
        ("--rates=1e-3,nan", "rates='1e-3,nan' are no grid"),
        ("--seeds=", "seeds='' are none"),
        ("--search_rounds=0", "rounds=0 is not usable"),
        ("--seeds=0,-1", "seed=-1 is not usable"),
        ("--method=fedavg,fedgalore --rank=64", "rank=64"),
        ("--lr=1", "lr is set by the search"),
        ("--plan", "Unknown command line flag 'plan'"),
        ("--opt=lr=1", "opt lr of fedgalore"),
        ("--preset=/nowhere/x.cfg", "name a new file"),
    ],
)
def test_bad_input_is_one_line(arg, message, monkeypatch, capsys):
    monkeypatch.setattr(train, "validate", None)  # of several methods none begins
    with pytest.raises(SystemExit) as stop:
        search(*arg.split(), monkeypatch=monkeypatch)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
