"""The command line: what a run leaves, what bad input gets, what Ctrl-C leaves."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny_vit
from absl import flags

from experiments import flags as our_flags
from experiments import report
from experiments.launch import _terminated, main
from fedgalore_jax import loading, models, prepare, strategies, tasks, train, tree
from fedgalore_jax.config import Config
from fedgalore_jax.data import digits
from fedgalore_jax.engine import Wire
from fedgalore_jax.forecast import Forecast
from fedgalore_jax.journal import Finished
from fedgalore_jax.metrics import classification
from fedgalore_jax.progress import human

ROOT = pathlib.Path(__file__).parents[1]
SMALL = ["--rounds=2", "--local_steps=2", "--clients=5", "--cohort=3", "--chunk=2", "--rank=2"]


def launch(*args: str) -> None:
    main(["run.py", *args])


def lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """One launch of three methods, and what it printed."""
    import contextlib
    import io

    out, printed = tmp_path_factory.mktemp("runs") / "three", io.StringIO()
    with contextlib.redirect_stdout(printed):
        launch(*SMALL, "--method=fedgalore,fedavg,fedit", f"--out_dir={out}", "--dropout=0.1")
    return out, printed.getvalue()


def test_a_comparison_has_a_table_and_a_folder_per_method(compared):
    out, printed = compared
    table = printed.splitlines()[-3:]
    assert {row.split()[0] for row in table} == {"fedgalore", "fedavg", "fedit"}
    accuracies = [float(row.split()[1]) for row in table]
    assert accuracies == sorted(accuracies, reverse=True)
    assert set(json.loads((out / "summary.json").read_text())) == {"fedgalore", "fedavg", "fedit"}
    for method in ("fedgalore", "fedavg", "fedit"):
        files = {file.name for file in (out / method).iterdir()}
        wanted = {"config.json", "metrics.jsonl", "summary.json", "curves.png", "clients.png", "model"}
        wanted |= {"checkpoints", ".lock"}
        assert files == wanted | ({"adapter"} if method == "fedit" else set())
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_metrics_have_a_line_per_round_and_round_zero(compared):
    out, _ = compared
    records = lines(out / "fedgalore" / "metrics.jsonl")
    assert [record["round"] for record in records] == [0, 1, 2]
    assert "train_loss" not in records[0] and 0 <= records[0]["accuracy"] <= 1
    for record in records[1:]:
        assert {"train_loss", "accuracy", "bytes_up", "bytes_down", "seconds"} <= set(record)
        assert record["bytes_up"] > 0
        ranks = [v for k, v in record.items() if k.startswith("joint_rank/")]
        assert len(ranks) == 6 and all(len(rank) == 4 for rank in ranks)


def test_the_total_has_every_byte_of_the_history(compared):
    """Also those that a client was sent for the rounds it missed: three of four take part."""
    out, printed = compared
    for method in ("fedgalore", "fedavg", "fedit"):
        records = lines(out / method / "metrics.jsonl")[1:]
        summary = json.loads((out / method / "summary.json").read_text())
        missed = sum(record.get("bytes_catch_up", 0) for record in records)
        assert summary["bytes_catch_up"] == missed and (missed > 0) == (method == "fedgalore")
        assert summary["bytes_total"] == missed + sum(3 * (r["bytes_up"] + r["bytes_down"]) for r in records)
        assert human(summary["bytes_total"]) in next(
            row for row in printed.splitlines() if row.split()[:1] == [method]
        )


def test_a_plan_says_what_the_run_then_takes_and_leaves_nothing(compared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    launch("--plan", *SMALL, "--method=fedavg,fedit", "--dropout=0.1")
    assert not list(tmp_path.iterdir())
    title, *rows = (line.split() for line in capsys.readouterr().out.splitlines()[-3:])
    ran = {line.split()[0]: line.split() for line in compared[1].splitlines()[-4:]}
    assert title[1:8] == ran["method"][2:9]
    assert [row[0] for row in rows] == ["fedavg", "fedit"]
    for row in rows:
        sizes = row[1 : 1 + 2 * 6]  # a number and a unit each
        assert sizes == ran[row[0]][2 : 2 + 2 * 6]


def test_the_same_split_and_start_for_every_method(compared):
    out, _ = compared
    starts = [lines(out / m / "metrics.jsonl")[0] for m in ("fedgalore", "fedavg", "fedit")]
    assert starts[0] == starts[1] == starts[2]


def test_the_saved_model_is_the_one_that_was_measured(compared):
    out, _ = compared
    fns, params = models.load(out / "fedgalore" / "model")
    test = digits.load().test
    logits = np.asarray(jax.jit(fns.apply)(params, test.inputs))
    summary = json.loads((out / "fedgalore" / "summary.json").read_text())
    measured = classification(logits, test.labels)
    assert measured["accuracy"] == summary["final"]["accuracy"]
    assert measured["loss"] == pytest.approx(summary["final"]["loss"], rel=1e-5)


def test_an_adapter_and_its_base_are_the_saved_model(compared):
    out, _ = compared
    folder = out / "fedit" / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    adapter = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    assert config["r"] == 2 and len(config["target_modules"]) == 6 * 4
    saved, base = (
        tree.flatten(models.load(path)[1])
        for path in (out / "fedit" / "model", config["base_model_name_or_path"])
    )
    for layer in range(4):
        name = f"base_model.model.vit.layers.{layer}.attention.k_proj.lora"
        a, b = (adapter[f"{name}_{x}.weight"] for x in "AB")
        learned = config["lora_alpha"] / 2 * (b @ a).T
        path = "layers/attention/key/kernel"
        np.testing.assert_allclose(saved[path][layer], base[path][layer] + learned, atol=1e-6)
        assert np.abs(learned).max() > 1e-4
    head = {name: x for name, x in adapter.items() if "lora" not in name}
    np.testing.assert_array_equal(
        head.pop("base_model.model.classifier.weight").T, saved["classifier/kernel"]
    )
    np.testing.assert_array_equal(head.pop("base_model.model.classifier.bias"), saved["classifier/bias"])
    assert not head


def test_what_an_adapter_cannot_hold_is_named(tmp_path):
    said, out = [], tmp_path / "out"
    shape = {"rounds": 1, "local_steps": 1, "clients": 2, "rank": 2, "out_dir": str(out)}
    train.run(Config(method="ffa_lora", lr=1e-3, train="classifier,layernorm", **shape), say=said.append)
    assert said[-1] == ("adapter/ is without layernorm/bias, layernorm/scale: the whole result is in model/")
    assert (out / "adapter" / "adapter_model.safetensors").exists()


def test_a_used_folder_is_refused_and_left_alone(compared, capsys):
    out, _ = compared
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        launch(*SMALL, f"--out_dir={out}")
    assert stop.value.code == 2 and "is in use" in capsys.readouterr().err
    assert before == {f: f.stat().st_mtime_ns for f in out.rglob("*")}


def test_runs_repeat_bit_for_bit_and_dropout_matters(compared):
    """Also: the flags of the command line and the fields of `Config` mean the same."""
    out, _ = compared
    shape = {"rounds": 2, "local_steps": 2, "clients": 5, "cohort": 3, "chunk": 2, "rank": 2}

    def run(**changes):
        result = train.run(Config(method="fedit", **shape, **changes), say=lambda line: None)
        return [without_seconds(record) for record in result.history], result.params

    again, params = run(dropout=0.1)
    assert again == [without_seconds(r) for r in lines(out / "fedit" / "metrics.jsonl")]
    _, saved = models.load(out / "fedit" / "model")
    jax.tree.map(np.testing.assert_array_equal, params, saved)
    assert run()[0][1]["train_loss"] != again[1]["train_loss"]


def without_seconds(record: dict) -> dict:
    return {name: value for name, value in record.items() if name != "seconds"}


def test_the_seed_decides_the_split_and_the_head():
    def start(seed):
        config = Config(seed=seed)
        task = tasks.get(config.task)
        data = task.load(loading.source(config, task))
        return prepare.federate(config, data).parts[0], loading.load_model(config, task, data)[1]

    (part, params), (same_part, same), (other_part, other) = start(0), start(0), start(1)
    np.testing.assert_array_equal(part, same_part)
    jax.tree.map(np.testing.assert_array_equal, params, same)
    assert not np.array_equal(part, other_part)
    head, other_head = (p["classifier"]["kernel"] for p in (params, other))
    assert np.abs(head - other_head).max() > 1e-3
    assert np.array_equal(params["layernorm"]["scale"], other["layernorm"]["scale"])


BAD = {
    "--foo=1": "Unknown command line flag 'foo'",
    "--rank=0": "rank=0",
    "--rank=abc": "--rank=abc",
    "--rank=64": "rank=64",
    "--ranks=2,x": "--ranks=2,x",
    "--ranks=4,0 --method=flora": "ranks=(4, 0) is not usable: give integers >= 1, the largest of them",
    "--ranks=4,8 --method=flora": "the largest of them --rank, 4",
    "--ranks=4,2 --lr=0.01 --method=flora,fedit": "fedit has one rank for all, not ranks=(4, 2): try",
    "--method=lora,fedit": "name each method once",
    "--method=lora --opt=lr=1": "with several methods write dual_adapter.lr=1",
    "--rank=64 --method=fedavg,fedgalore": "rank=64",
    "--rank=1": "rank=1 leaves AJIVE no room",
    "--seed=100000000000000000000": "seed=100000000000000000000",
    "--out_dir=": "out_dir=''",
    "--out_dir= --method=fedavg,fedit": "out_dir=''",
    "--opt=floor=-1": "floor=-1",
    "--opt=lr=-1": "lr=-1",
    "--opt=roles=x": "use --adapt and --train",
    "--opt=finder=svd": "would have no effect: it needs basis=own",
    "--opt=basis=own --opt=basis_batches=21": "batch 20 of a client with 20 local steps",
    "--method=fedit --client_weights=dense": "client_weights='dense': fedit has one form only",
    "--adapt=layers/.*bias": "only kernels can be adapted",
    "--method=fedsgd": "unknown method 'fedsgd': choose from adel_fl, dual_adapter, fedadamw",
    "--method=fedavg,fedavg": "name each method once",
    "--task=mnist": "unknown task 'mnist': choose from 20newsgroups",
    "--opt=sync=max": "sync='max' is not one of",
    "--opt=snyc=mean": "has no option 'snyc': its options are",
    "--opt=sync": "opt='sync' is not name=value",
    "--opt=fedit.lr=1": "fedit is not among",
    "--opt=floor=low": "floor='low'",
    "--lr=nan": "lr=nan",
    "--lr=-1": "lr=-1.0",
    "--clients=5000": "clients=5000 but there are only 1200",
    "--cohort=11": "cohort=11",
    "--alpha=0": "alpha=0.0",
    "--partition=sorted": "partition='sorted' is not one of",
    "--client_column=user --partition=iid": "client_column='user' has no effect",
    "--task=sft --data=nowhere --model=digits_vit --lr=1e-3": "sft needs a language model",
    "--method=fedsa_lora --lr=1e-3 --task=digits_domains --partition=domain": "has a model per client",
    "--method=adel_fl --lr=1e-3 --opt=base=flora": "the base of adel_fl sends uploads that are stacked",
    "--schedule=step": "schedule='step'",
    "--dropout=1": "dropout=1.0",
    "--adapt=layer[": "adapt=",
    "--adapt=nowhere": "'nowhere' matches no parameter",
    "--model=.": "config.json does not exist",
    "--ranks=/nowhere": "neither integers nor a file of them",
    "--ranks=4,,8": "flag --ranks=4,,8",
    "--ranks=": "neither integers nor a file of them",
    "--client_column= --task=text": "client_column='' is not usable: give a value, or leave it out",
    "--model=": "model='' is not usable: give a value",
    "--straggler= --deadline=1": "straggler='' is not usable",
    "--method=fedavg,fedgalore --opt=sync=mean": "with several methods write fedgalore.sync=mean",
    "--model=/nowhere": "/nowhere/config.json does not exist",
    "--model=tests": "tests/config.json does not exist",
    "--out_dir=/proc/nowhere": "/proc/nowhere",
    "--flagfile=/nowhere": "/nowhere",
    "stray": "unexpected argument 'stray'",
}


@pytest.mark.parametrize("arg", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(arg, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "_Loop", None)  # nothing may get as far as compiling
    args = [f"--out_dir={tmp_path / 'out'}", *arg.split()]
    with pytest.raises(SystemExit) as stop:
        launch(*args)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert BAD[arg] in error and error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_model_for_other_images_is_refused(tmp_path, capsys):
    models.save(tmp_path / "tiny", *tiny_vit.model())
    with pytest.raises(SystemExit):
        launch(f"--model={tmp_path / 'tiny'}", f"--out_dir={tmp_path / 'out'}")
    assert "reads 6 x 6 pixels in 3 channels, and digits are 8 x 8 in one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_comparison_does_not_overwrite_a_run(compared, capsys):
    out, _ = compared
    before = (out / "fedit" / "summary.json").read_text()
    with pytest.raises(SystemExit):
        launch(*SMALL, "--method=fedgalore,fedavg", f"--out_dir={out / 'fedit'}")
    assert "is in use" in capsys.readouterr().err
    assert (out / "fedit" / "summary.json").read_text() == before


def test_a_comparison_goes_on_where_one_began_and_nowhere_else(tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SystemExit):
        launch(*SMALL, "--method=fedavg,fedit", "--resume", f"--out_dir={tmp_path}")
    assert "holds no run to go on with" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_divergence_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        launch(*SMALL, "--method=fedavg", "--lr=1e30", "--clip=0", f"--out_dir={tmp_path / 'out'}")
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "lower --lr" in error[-1]


def test_list_names_everything(capsys):
    launch("--list")
    out = capsys.readouterr().out
    assert all(name in out for name in ("digits", "fedavg", "fedgalore", "sync=", "weight_decay"))
    assert "--method=subspace: fedgalore, fedlore" in out


def test_a_group_is_its_methods_and_ranks_reach_them(tmp_path):
    def configs(*args):
        values = flags.FlagValues()
        our_flags.define(values)
        values(["run.py", *args])
        return our_flags.configs(values)

    groups = strategies.groups()
    parts = [method for name, group in groups.items() if name != "all" for method in group]
    assert sorted(parts) == list(groups["all"]) == list(strategies.names())
    assert [c.method for c in configs("--method=subspace,fedit")] == [*groups["subspace"], "fedit"]
    (config,) = configs("--method=flexlora", "--rank=8", "--ranks=8,2", "--lr=1e-3")
    assert config.ranks == (8, 2) and configs("--method=flexlora")[0].ranks is None
    (tmp_path / "ranks.txt").write_text("8\n4, 2\n")
    (from_file,) = configs("--method=flexlora", "--rank=8", f"--ranks={tmp_path / 'ranks.txt'}")
    assert from_file.ranks == (8, 4, 2)
    task = tasks.get(config.task)
    strategy = prepare.strategy_of(config, task)
    assert strategy.wire_of == 2


def test_ctrl_c_leaves_whole_files_and_one_line(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "run.py", *SMALL, "--rounds=100000", f"--out_dir={out}"]
    # In the background of a shell this process ignores the signal, and its children would.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    try:
        metrics, deadline = out / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert error.splitlines()[-1].startswith("run.py: interrupted") and "Traceback" not in error
    rounds = [record["round"] for record in lines(metrics)]
    assert rounds == list(range(len(rounds)))
    assert json.loads((out / "config.json").read_text())["rounds"] == 100000
    assert not list(out.glob("*.partial"))


def test_ctrl_c_that_is_lost_in_a_callback_is_raised_when_next_asked():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with _terminated() as asked:
            assert not asked()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                asked()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_names_of_classes_are_drawn_as_they_are(tmp_path):
    """Dollars are no formulas, and long names are cut."""
    report.heat_map(tmp_path / "c.png", np.eye(3, dtype=int), ("$$", "$10%-$20%", "a" * 200))
    assert (tmp_path / "c.png").exists()


def test_a_comparison_holds_its_data_once():
    first, second = (Config(rounds=1, local_steps=1, clients=2, method=name) for name in ("fedavg", "fedit"))
    beside = prepare.prepare(first)
    other = prepare.prepare(second, beside=beside)
    assert other.loaded is beside.loaded and other.machine.train is beside.machine.train
    assert other.config == second


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            "--evaluate=digits_vit --mesh=1x1",
            "mesh has no effect: --evaluate and --predict run on one device",
        ),
        ("--evaluate=digits_vit --distributed", "distributed has no effect"),
        ("--evaluate=", "evaluate='' is not usable"),
        ("--predict= --model=digits_vit", "predict='' is not usable"),
    ],
)
def test_what_a_saved_model_is_not_asked(args, message, capsys):
    with pytest.raises(SystemExit) as stop:
        launch(*args.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


def sizes(*numbers):
    return [part for n in numbers for part in (str(n), "B")]


def test_a_comparison_has_every_number_in_its_column(tmp_path, capsys):
    summary = {
        "method": "own",
        "metric": "accuracy",
        "final": {"accuracy": 0.5},
        "personal": True,
        "bytes_per_client_and_round": {"up": 1, "down": 2},
        "catch_up_bytes_per_missed_round": 3,
        "optimizer_bytes": 4,
        "client_memory_bytes": 5,
        "bytes_total": 6,
        "gradients_per_step": 7,
        "seconds_per_round": 8,
    }
    history = [{"round": t, "accuracy": 0.5, "train_loss": 1.0} for t in range(2)]
    report.compare(
        tmp_path,
        [Finished(history, summary), Finished(history, summary | {"method": "b", "personal": False})],
    )
    own, other = capsys.readouterr().out.splitlines()[-3:-1]
    assert own.split() == ["own", "*", "0.5000", *sizes(1, 2, 3, 4, 5, 6), "7", "8.000"]
    assert other.split()[:2] == ["b", "0.5000"]


def test_a_forecast_has_every_number_in_its_column(capsys):
    report.plans(
        [Forecast("own", Wire(down=1, up=2, optimizer=3, memory=4, catch_up=5, gradients=6.0), 7, 8.0, 9)]
    )
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row == ["own", *sizes(2, 1, 5, 3, 4, 7), "6", "8.00e+00", *sizes(9)]


def test_rows_of_the_heat_map_are_named_by_client(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(report, "_save", lambda figure, path: figures.append(figure))
    report.heat_map(tmp_path / "c.png", np.array([[0, 9], [9, 0], [0, 3]]))
    axis = figures[0].axes[0]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["1", "0", "2"]
    assert np.asarray(axis.images[0].get_array()).tolist() == [[9, 0], [0, 9], [0, 3]]
    report._pyplot().close(figures[0])
