"""Runs that are killed, told to end, damaged or changed, and go on; and their checkpoints alone."""

import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import absl.flags
import jax
import jax.numpy as jnp
import numpy as np
import problem
import pytest
from forked import Forked
from jax.experimental.compilation_cache import compilation_cache

from experiments import flags as our_flags
from experiments import report
from experiments.launch import main
from experiments.launch_local import environment
from fedgalore_jax import blocks, checkpoint, folder, journal, models, prepare, strategies, train
from fedgalore_jax.checkpoint import Checkpoints, Misfit, abstract
from fedgalore_jax.config import Config
from fedgalore_jax.models import configs, vit
from fedgalore_jax.tree import digest

ROUNDS = 12
TINY = vit.Config(
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=8,
    image_size=8,
    patch_size=4,
    num_channels=1,
    initializer_range=0.3,
    labels=tuple("0123456789"),
)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """All runs here are one run: their programs are compiled once."""
    cache, options = tmp_path_factory.mktemp("programs"), {"jax_persistent_cache_min_compile_time_secs": 0}
    options |= {"jax_compilation_cache_dir": str(cache)}
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield cache
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def flags(programs, tmp_path_factory):
    """Of a run with memories of clients, some of which miss rounds, where checkpoints and evaluations do not
    coincide, and the best state is kept."""
    model = tmp_path_factory.mktemp("model") / "tiny"
    fns = configs.family_of(TINY).build(TINY, scan_layers=True)
    models.save(model, fns, fns.init(jax.random.key(0)))
    shape = ["--clients=3", "--cohort=2", "--local_steps=1", "--batch_size=4", "--lr=0.3"]
    every = ["--eval_every=2", "--eval_samples=20", "--keep=best", f"--rounds={ROUNDS}"]
    return [f"--model={model}", "--method=scaffold", *shape, *every, "--checkpoint_every=3"]


@pytest.fixture(scope="module")
def prepared(flags):
    """The run that all of these tests make; it is prepared once."""
    values = absl.flags.FlagValues()
    our_flags.define(values)
    values(["run.py", *flags])
    (config,) = our_flags.configs(values)
    return prepare.prepare(config)


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    """The folder of the run that nothing happened to."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    execute(prepared, out)
    return out


@pytest.fixture(scope="module")
def ended(prepared, tmp_path_factory):
    """The folder of the same run, told to end after eight rounds."""
    out = tmp_path_factory.mktemp("runs") / "ended"
    blocks = iter(range(100))
    with pytest.raises(train.Preempted, match="after round 8"):
        execute(prepared, out, stop=lambda: next(blocks) == 4)
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"6", "8"}
    assert records(out)[-1]["round"] == 8 and not (out / "summary.json").exists()
    return out


@pytest.fixture
def copy(ended, tmp_path):
    return shutil.copytree(ended, tmp_path / "copy")


@pytest.fixture(scope="module")
def forked(programs):
    forked = Forked(programs)
    yield forked
    forked.close()


def launch(*args):
    main(["run.py", *args])


def execute(prepared, out, *, stop=train.never, **changes):
    """Runs in a folder, or goes on there; what was said, and the result."""
    said, config = [], dataclasses.replace(prepared.config, out_dir=str(out), **changes)
    result = train.execute(prepared._replace(config=config), say=said.append, stop=stop)
    return said[1:], result


def records(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def written(out):
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(condition, log):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)


def same(out, whole):
    assert records(out) == records(whole)
    weights = "model/model.safetensors"
    assert (out / weights).read_bytes() == (whole / weights).read_bytes()
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (out, whole))
    assert {**ours, "seconds_per_round": 0} == {**theirs, "seconds_per_round": 0}
    pictures = {"curves.png", "clients.png"}
    assert {path.name for path in out.iterdir()} - pictures <= {path.name for path in whole.iterdir()}


def contents(out):
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_the_run_is_what_the_tests_need(whole):
    """The best round is not the last and has no checkpoint of its own; the last two checkpoints are kept."""
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["best"]["round"] % 3 and 0 < summary["best"]["round"] < ROUNDS - 3
    assert {path.name for path in (whole / "checkpoints").iterdir()} == {"9", "12"}
    shapes = json.loads((whole / "checkpoints" / "12" / "shapes.json").read_text())
    assert any("best" in path for path in shapes) and any("state" in path for path in shapes)


def test_numbers_do_not_depend_on_checkpoints(prepared, whole, tmp_path):
    execute(prepared, tmp_path / "out", checkpoint_every=0)
    same(tmp_path / "out", whole)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_what_was_told_to_end_goes_on(prepared, whole, copy, capfd):
    said, _ = execute(prepared, copy, resume=True)
    assert said == ["going on from the checkpoint of round 8"]
    same(copy, whole)
    out, error = capfd.readouterr()
    assert out == "" and all(line.startswith("round ") for line in error.splitlines())


def test_memories_on_the_host_go_on(prepared, tmp_path, monkeypatch):
    """A checkpoint is written while they change, and the best state has others than the last."""
    monkeypatch.setattr(blocks, "RESIDENT", 0)
    changed = {"clients": 8, "cohort": 2, "rounds": 5, "eval_every": 1, "checkpoint_every": 2}
    ready = prepare.prepare(dataclasses.replace(prepared.config, **changed))
    assert ready.blocks.slots == 2
    execute(ready, tmp_path / "whole")
    asked = iter(range(9))

    def interrupted():
        if next(asked) == 3:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        execute(ready, tmp_path / "out", stop=interrupted)
    said, _ = execute(ready, tmp_path / "out", resume=True)
    assert said == ["going on from the checkpoint of round 2"]
    same(tmp_path / "out", tmp_path / "whole")


def test_the_best_state_that_was_read_is_not_written_over(tmp_path):
    """What the host keeps of the running state is written in place; the best one is a copy of its own."""

    class Held:
        def newest(self, like, up_to, say):
            return up_to

        def restore(self, rounds, like):
            return {"state": {"memories": np.zeros(3), "weights": jnp.zeros(2)}}

    config = Config(keep="best", rounds=2, out_dir=str(tmp_path), resume=True)
    folder.write_json(tmp_path / folder.CONFIG, dataclasses.asdict(config))
    folder.write_lines(tmp_path / folder.METRICS, [{"round": t, "accuracy": t / 9} for t in range(2)])
    book = journal.Journal(config, {}, "accuracy", tmp_path, Held(), say=lambda line: None)
    state = book.open(lambda: Held().restore(0, None)["state"])
    state["memories"][:] = 5
    assert book.history[-1]["round"] == 1 and not book.best["memories"].any()
    book.write({"round": 2, "accuracy": 0.5}, state)
    state["memories"][:] = 6
    assert (book.best["memories"] == 5).all() and book.kept(state) is book.best


def test_rounds_after_the_checkpoint_are_written_once(prepared, whole, copy):
    """As a kill leaves them: whole lines, and half a line."""
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:11]) + lines[11][:30])
    execute(prepared, copy, resume=True)
    same(copy, whole)


def test_a_damaged_checkpoint_falls_back(prepared, whole, copy, capfd):
    arrays = max((copy / "checkpoints" / "8").rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(arrays, arrays.stat().st_size // 2)
    said, _ = execute(prepared, copy, resume=True)
    assert said[0].startswith("the checkpoint of round 8 cannot be used: ") and "is damaged" in said[0]
    assert said[1:] == ["going on from the checkpoint of round 6"]
    same(copy, whole)
    assert all(line.startswith("round ") for line in capfd.readouterr().err.splitlines())


def test_without_a_usable_checkpoint_it_starts_again(prepared, whole, copy):
    for path in (copy / "checkpoints").glob("*/digests.json"):
        path.unlink()
    said, _ = execute(prepared, copy, resume=True)
    lost = [f"the checkpoint of round {rounds} cannot be used: digests.json is missing" for rounds in (8, 6)]
    assert said == [*lost, "no checkpoint can be used: starting again at round 0"]
    same(copy, whole)


def test_a_lost_metrics_file_starts_again(prepared, whole, copy):
    (copy / "metrics.jsonl").unlink()
    execute(prepared, copy, resume=True)
    same(copy, whole)


def test_after_the_last_round_only_the_writing_is_left(prepared, whole, tmp_path, monkeypatch):
    out = shutil.copytree(whole, tmp_path / "out")
    (out / "summary.json").unlink()
    (out / "model" / "model.safetensors").unlink()
    (out / ".model.x1").mkdir()
    monkeypatch.setattr(train._Loop, "read", None)
    said, _ = execute(prepared, out, resume=True)
    assert said == ["going on from the checkpoint of round 12"]
    same(out, whole)


def test_a_test_that_fails_costs_no_model(prepared, whole, tmp_path, monkeypatch):
    out = shutil.copytree(whole, tmp_path / "out")
    (out / "summary.json").unlink()
    shutil.rmtree(out / "model")
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(train._Loop, "test", None)
        execute(prepared, out, resume=True)
    assert (out / "model" / "model.safetensors").exists() and not (out / "summary.json").exists()
    execute(prepared, out, resume=True)
    same(out, whole)


def test_a_complete_run_is_left_alone(flags, whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    launch(*flags, "--resume", f"--out_dir={whole}")
    assert capsys.readouterr().out == f"{whole} is complete: nothing is left to do\n"
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*")}


def test_a_complete_run_has_a_result(prepared, whole, tmp_path):
    """For who asks from Python; without its last checkpoint, it is not trained again."""
    out = shutil.copytree(whole, tmp_path / "out")
    _, result = execute(prepared, out, resume=True)
    assert len(result.history) == ROUNDS + 1 and result.summary["rounds"] == ROUNDS
    _, saved = models.load(out / "model")
    jax.tree.map(np.testing.assert_array_equal, result.params, saved)
    shutil.rmtree(out / "checkpoints" / "12")
    before = contents(out)
    with pytest.raises(FileExistsError, match="is complete, but the checkpoint of its last round is gone"):
        execute(prepared, out, resume=True)
    assert before == contents(out)


def test_a_changed_config_is_refused(flags, prepared, copy, capsys):
    before = contents(copy)
    with pytest.raises(SystemExit) as stop:
        launch(*flags, "--resume", f"--out_dir={copy}", "--seed=1", "--clip=2")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "clip was 1.0 and is 2.0, seed was 0 and is 1; give the old values, or --override" in error
    other = prepare.strategy_of(dataclasses.replace(prepared.config, method="fedit"), prepared.task)
    other = prepared._replace(machine=prepared.machine._replace(strategy=other), frozen=None)
    with pytest.raises(ValueError, match=r"copy/checkpoints/8 has .* where a run with these values has "):
        execute(other, copy, resume=True, override=True, method="fedit")
    assert before == contents(copy)


def test_other_data_under_the_same_name_are_refused(prepared, copy):
    on = dataclasses.replace(prepared.config, out_dir=str(copy), resume=True)
    dataset = prepared.loaded.dataset
    assert prepare.prepare(on, dataset=dataset).digests["data_digest"] == prepared.digests["data_digest"]
    labels = dataset.validation.labels.copy()
    labels[7] = (labels[7] + 1) % 10
    other = dataset._replace(validation=dataset.validation._replace(labels=labels))
    with pytest.raises(ValueError, match="cannot go on: the data are not those it began with; give the old"):
        prepare.prepare(on, dataset=other)
    prepare.prepare(dataclasses.replace(on, override=True), dataset=other)
    with pytest.raises(ValueError, match="holds no config"):
        (copy / "other").mkdir()
        folder.write_json(copy / "other" / "config.json", None)
        journal.changes(dataclasses.replace(on, out_dir=str(copy / "other")))
    config = folder.read_json(copy / "config.json")
    del config["data_digest"]  # as older runs are
    folder.write_json(copy / "config.json", config)
    prepare.prepare(on, dataset=other)


def test_weights_that_no_round_changes_stay_with_the_model(prepared, copy, tmp_path):
    shapes = folder.read_json(copy / "checkpoints" / "8" / "shapes.json")
    held = {name.split("'")[-2] for name in shapes if "server" in name}
    assert "layers/attention/query/kernel" in held and not any("embeddings" in name for name in held)
    same = shutil.copytree(prepared.loaded.base, tmp_path / "model")
    on = dataclasses.replace(prepared.config, out_dir=str(copy), resume=True, model=str(same))
    config = folder.read_json(copy / "config.json") | {"model": str(same)}
    folder.write_json(copy / "config.json", config | {"weights_digest": digest(prepared.frozen)})
    prepare.prepare(on)
    fns, params = models.load(same)
    params["embeddings"]["cls_token"] += 1.0
    models.save(same, fns, params)
    before = contents(copy)
    with pytest.raises(ValueError, match="go on: the weights that no round changes are not those it began w"):
        prepare.prepare(on)
    assert before == contents(copy)


def test_privacy_cannot_change_on_the_way(prepared, copy):
    """Epsilon is composed of all rounds alike; more of them are no other promise for each."""
    on = dataclasses.replace(prepared.config, out_dir=str(copy), resume=True, override=True)
    noisy = {"dp_clip": 1.0, "dp_noise": 1.0}
    for other, named in ((noisy, "dp_clip, dp_noise"), (noisy | {"cohort": 1}, "dp_clip, dp_noise, cohort")):
        with pytest.raises(ValueError, match=f"cannot go on with other {named}: epsilon"):
            journal.changes(dataclasses.replace(on, **other))
    config = folder.read_json(copy / "config.json")
    folder.write_json(copy / "config.json", config | noisy)
    with pytest.raises(ValueError, match="cannot go on with other dp_clip, dp_noise: epsilon"):
        journal.changes(on)  # without noise from now on
    longer = dataclasses.replace(on, rounds=99, **noisy)
    with pytest.raises(ValueError, match="cannot go on with other data_digest: epsilon"):
        journal.changes(longer, {"data_digest": "of other shares of them"})
    assert journal.changes(longer) == {"rounds": (config["rounds"], 99)}


def test_a_complete_run_can_be_made_longer(prepared, whole, tmp_path):
    out = tmp_path / "out"
    execute(prepared, out, rounds=8)
    execute(prepared, out, resume=True, override=True, checkpoint_every=5)
    same(out, whole)
    before = contents(out)
    with pytest.raises(
        ValueError, match=r"rounds=11: out_dir='.*' holds 12 rounds: give as many or more, or s"
    ):
        execute(prepared, out, resume=True, override=True, rounds=11)
    assert before == contents(out)


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["--resume"], "resume=True is not usable: give --out_dir too"),
        (["--override", "--out_dir=x"], "override=True is not usable: give --resume too"),
        (["--checkpoint_every=-1"], "checkpoint_every=-1"),
        (["--keep_checkpoints=0"], "keep_checkpoints=0"),
        (["--resume", "--out_dir=tests"], "out_dir='tests' holds no run to go on with"),
    ],
)
def test_bad_flags(args, error, capsys):
    with pytest.raises(SystemExit):
        launch(*args)
    assert error in capsys.readouterr().err


def test_two_runs_do_not_share_a_folder(flags, prepared, copy, capsys):
    before = contents(copy)
    with folder.locked(copy):
        for args in (["--resume"], []):
            with pytest.raises(SystemExit) as stop:
                launch(*flags, f"--out_dir={copy}", *args)
            error = capsys.readouterr().err
            assert stop.value.code == 2 and "is in use" in error and error.count("\n") == 1
        with pytest.raises(FileExistsError, match="another run writes there now"):
            execute(prepared, copy, resume=True)
    assert before == contents(copy)


def test_a_folder_that_was_only_claimed_is_new(tmp_path):
    with folder.claim(tmp_path / "out") as out:
        (out / "config.partial").write_text("{")
    folder.refuse_used(out)
    with folder.claim(out):
        (out / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="is in use"), folder.claim(out):
        pass


def test_a_comparison_goes_on_where_it_was(flags, tmp_path, capsys, monkeypatch):
    """SIGTERM comes between two methods: the first is kept as it is, the second runs."""
    args = [*flags, "--method=scaffold,fedavg", "--rounds=2", "--keep=last", f"--out_dir={tmp_path / 'out'}"]
    line = report.result_line
    monkeypatch.setattr(report, "result_line", lambda *a: signal.raise_signal(signal.SIGTERM) or line(*a))
    with pytest.raises(SystemExit) as stop:
        launch(*args)
    assert stop.value.code == 75
    error = capsys.readouterr().err.splitlines()[-1]
    assert ": told to end, before fedavg; go on with the same command and --resume" in error
    monkeypatch.undo()
    done = tmp_path / "out" / "scaffold" / "config.json"
    before = done.read_bytes()
    folder.write_json(done, json.loads(before) | {"data_digest": "other"})
    with pytest.raises(SystemExit):
        launch(*args, "--resume")
    assert "scaffold' cannot go on: the data are not those it began with" in capsys.readouterr().err
    done.write_bytes(before)
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "scaffold").rglob("*")}
    launch(*args, "--resume")
    assert first == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "scaffold").rglob("*")}
    assert {row.split()[0] for row in capsys.readouterr().out.splitlines()[-2:]} == {"scaffold", "fedavg"}
    assert set(json.loads((tmp_path / "out" / "summary.json").read_text())) == {"scaffold", "fedavg"}
    launch(*args, "--resume")
    assert capsys.readouterr().out == f"{tmp_path / 'out'} is complete: nothing is left to do\n"
    with pytest.raises(SystemExit):
        launch(*args[:-1], "--resume", f"--out_dir={tmp_path / 'out' / 'fedavg'}")
    assert "is in use by a run of one method" in capsys.readouterr().err


def test_a_full_disk_stops_with_one_line(prepared, whole, copy, capfd, monkeypatch):
    digest = checkpoint._digest

    def full(path):
        if "9" in path.parts:
            raise OSError(28, "No space left on device")
        return digest(path)

    monkeypatch.setattr(checkpoint, "_digest", full)
    with pytest.raises(
        OSError, match=r"checkpoints/9 could not be written \(No space left on device\): make room"
    ):
        execute(prepared, copy, resume=True)
    assert all(line.startswith("round ") for line in capfd.readouterr().err.splitlines())
    assert {path.name for path in (copy / "checkpoints").iterdir()} == {"6", "8"}
    monkeypatch.undo()
    execute(prepared, copy, resume=True)
    same(copy, whole)


def test_sigterm_ends_a_process_with_75(flags, whole, forked, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    pid = forked.start(log, *flags, "--rounds=100000", "--checkpoint_every=0", f"--out_dir={out}")
    wait_for(lambda: written(out) > 3, log)
    os.kill(pid, signal.SIGTERM)
    assert forked.status() == 75, log.read_text()
    done = records(out)[-1]["round"]
    line = (
        f"run.py: told to end, after round {done}; go on with the same command and --resume --out_dir={out}"
    )
    assert log.read_text().splitlines()[-1] == line and "Traceback" not in log.read_text()
    assert [path.name for path in (out / "checkpoints").iterdir()] == [str(done)]
    assert records(out) == (records(whole) + records(out)[ROUNDS + 1 :])[: done + 1]


def killed(kills, forked, flags, whole, tmp_path):
    """SIGKILL at random, a few rounds further each time; where a run comes to its end, another begins."""
    rng, log, runs = random.Random(kills), tmp_path / "log", 0
    while True:
        out = tmp_path / f"run-{runs}"
        done, more = written(out), rng.randint(-2, 6)
        pid = forked.start(log, *flags, f"--out_dir={out}", "--resume")
        if kills and more > 0:
            wait_for(
                lambda out=out, lines=done + more: written(out) >= lines or (out / "summary.json").exists(),
                log,
            )
        if kills:
            time.sleep(rng.uniform(0, 0.1 if more > 0 else 3))
            os.kill(pid, signal.SIGKILL)
        status = forked.status()
        assert status in (0, -signal.SIGKILL), log.read_text()
        if status:
            kills -= 1
            continue
        same(out, whole)
        runs += 1
        if not kills:
            break
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("kills", [3, pytest.param(17, marks=pytest.mark.slow)])
def test_killed_at_any_instant(kills, flags, whole, forked, tmp_path):
    killed(kills, forked, flags, whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["4x2", "8x1"])
def test_killed_at_any_instant_on_a_mesh(mesh, flags, programs, tmp_path):
    """Bit by bit the same too, with weights and memories in shares."""
    flags = [*flags, "--clients=8", "--cohort=5", f"--mesh={mesh}"]
    forked, whole = Forked(programs, 8), tmp_path / "whole"
    forked.start(tmp_path / "log", *flags, f"--out_dir={whole}")
    assert forked.status() == 0, (tmp_path / "log").read_text()
    killed(6, forked, flags, whole, tmp_path)
    forked.close()


def tree(seed=0):
    key = jax.random.key(seed)
    return {"kernel": jax.random.normal(key, (200, 300)), "key": key, "round": jnp.int32(seed)}


def equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.aval == b.aval  # shape, type and whether that is weak
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = map(jax.random.key_data, (a, b))
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("method", strategies.names())
def test_every_state_comes_back_as_it_was(method, tmp_path):
    """Types, structure and bits: the next round has no way to differ."""
    options = {"ranks": (3, 2)} if method in ("flora", "flexlora", "hetlora", "ilora") else {}
    _, _, state = problem.setup(method, **options)
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        equal(checkpoints.restore(1, abstract(state)), state)


def test_any_damage_is_seen(tmp_path, capfd):
    with Checkpoints(tmp_path, 3) as checkpoints:
        for rounds in (1, 2):
            checkpoints.save(rounds, tree(rounds))
        checkpoints.wait()
        last, like = tmp_path / "checkpoints" / "2", abstract(tree())
        whole = {path: path.read_bytes() for path in last.rglob("*") if path.is_file()}
        assert len(whole) > 8
        for path, content in whole.items():
            middle = len(content) // 2
            flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            for damaged in (None, b"", content[:middle], flipped):
                path.unlink() if damaged is None else path.write_bytes(damaged)
                with pytest.raises(OSError, match=r"is damaged|is missing"):
                    checkpoints.check(2, like)
                path.write_bytes(content)
        equal(checkpoints.restore(2, like), tree(2))
        said = []
        (last / "arrays" / "_METADATA").unlink()
        assert checkpoints.newest(lambda rounds: like, 9, said.append) == 1
        assert said == ["the checkpoint of round 2 cannot be used: _METADATA is missing"]
        equal(checkpoints.restore(1, like), tree(1))
        assert checkpoint.rounds_in(tmp_path) == [1]
        assert (
            checkpoints.newest(lambda rounds: like, 0, said.append) == 0
            and checkpoint.rounds_in(tmp_path) == []
        )
    assert capfd.readouterr() == ("", "")


def test_another_tree_is_a_misfit_and_stays(tmp_path):
    with Checkpoints(tmp_path, 3) as checkpoints:
        checkpoints.save(1, tree())
        checkpoints.wait()
        less = {name: x for name, x in tree().items() if name != "kernel"}
        for other in ({**tree(), "kernel": jnp.zeros((200, 301))}, {**tree(), "more": jnp.zeros(3)}, less):
            with pytest.raises(Misfit, match=r"where a run with these values has (float32|nothing)"):
                checkpoints.newest(lambda rounds, other=other: abstract(other), 1, print)
        equal(checkpoints.restore(1, abstract(tree())), tree())


def test_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, 2) as checkpoints:
        for rounds in (1, 2, 5, 10):
            checkpoints.save(rounds, tree(rounds))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["10", "5"]


@pytest.fixture
def small_files():
    """No file may grow past 16 kB, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_cannot_be_written_leaves_the_one_before(tmp_path, capfd, request):
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, tree(1))
        checkpoints.wait()
        request.getfixturevalue("small_files")
        checkpoints.save(2, tree(2))
        with pytest.raises(
            OSError, match=r"checkpoints/2 could not be written \(.*File too large.*make room"
        ):
            checkpoints.wait()
        assert checkpoint.rounds_in(tmp_path) == [1]
    with Checkpoints(tmp_path, 1) as checkpoints:
        equal(checkpoints.restore(1, abstract(tree())), tree(1))
    assert capfd.readouterr() == ("", "")


def test_a_line_is_written_whole_or_not_at_all(tmp_path, small_files):
    path, record = tmp_path / "metrics.jsonl", {"text": "x" * 1000}
    with pytest.raises(OSError, match=r"bytes of a line|too large"):
        for _ in range(20):
            folder.append_line(path, record)
    assert path.read_text().endswith("}\n") and set(path.read_text().splitlines()) == {json.dumps(record)}
    assert folder.read_lines(path) == [record] * 16


RESTORE = """
import pathlib, sys, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from fedgalore_jax.checkpoint import Checkpoints

mesh = jax.sharding.Mesh(jax.devices(), "x")
def place(shape, dtype, *axes):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))
like = {"kernel": place((200, 300), jnp.float32, None, "x"), "key": place((), jax.random.key(0).dtype),
    "round": place((), jnp.int32)}
with Checkpoints(pathlib.Path(sys.argv[1]), 1) as checkpoints:
    tree = checkpoints.restore(1, like)
assert tree["kernel"].sharding == like["kernel"].sharding and len(tree["kernel"].addressable_shards) == 4
assert (tree["kernel"] == jax.random.normal(tree["key"], (200, 300))).all() and int(tree["round"]) == 1
"""


def test_a_checkpoint_goes_onto_other_devices(tmp_path):
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, tree(1))
    command = [sys.executable, "-W", "error", "-c", RESTORE, str(tmp_path)]
    done = subprocess.run(command, env=environment(4), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_last_round_is_saved(prepared, tmp_path):
    """Eight is no multiple of three."""
    execute(prepared, tmp_path / "out", rounds=8)
    assert {path.name for path in (tmp_path / "out" / "checkpoints").iterdir()} == {"6", "8"}
