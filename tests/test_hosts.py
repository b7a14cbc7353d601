"""Several processes as one run: what they learn, save and go on from, and how they end."""

import dataclasses
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import absl.flags
import jax
import numpy as np
import own_rows
import pytest
from safetensors.numpy import load_file
from test_checkpoint import TINY

from experiments import flags as our_flags
from experiments import launch_local
from experiments.launch import main
from fedgalore_jax import models, train
from fedgalore_jax.models import configs

ROOT = pathlib.Path(__file__).parents[1]
ROUNDS = 4


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Of a run in 64 bits, whose clients remember something and of whom some miss rounds."""
    model, fns = tmp_path_factory.mktemp("model") / "tiny", configs.family_of(TINY).build(TINY)
    params = fns.init(jax.random.key(0))
    models.save(model, fns, jax.tree.map(lambda x: np.asarray(x, np.float64), params))
    shape = ["--clients=5", "--cohort=4", "--local_steps=2", "--batch_size=4", "--lr=0.3"]
    every = ["--eval_every=2", "--eval_samples=20", "--checkpoint_every=2", f"--rounds={ROUNDS}"]
    return [f"--model={model}", "--method=scaffold", *shape, *every]


def launch(*flags, processes=2, devices=4):
    """Starts processes through the launcher."""
    command = [sys.executable, "-m", "experiments.launch_local", f"--processes={processes}"]
    command += [f"--devices={devices}", "--", *flags]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = os.environ | {"JAX_ENABLE_X64": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, **output)


def run(flags, **changes):
    """The same on the one device of this process."""
    values = absl.flags.FlagValues()
    our_flags.define(values)
    values(["run.py", *flags])
    (config,) = our_flags.configs(values)
    with jax.enable_x64(True):
        train.run(dataclasses.replace(config, **changes), say=lambda line: None)


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(out, whole):
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (out, whole))
    for name, x in theirs.items():
        assert x.dtype == ours[name].dtype == np.float64
        np.testing.assert_allclose(ours[name], x, rtol=0, atol=1e-10, err_msg=name)
    ours, theirs = records(out), records(whole)
    assert [record["round"] for record in ours] == list(range(ROUNDS + 1))
    for a, b in zip(ours, theirs, strict=True):
        assert a | {"seconds": 0} == pytest.approx(b | {"seconds": 0}, abs=1e-10)


def test_two_processes_are_as_good_as_one(flags, tmp_path):
    """They stop in the middle; two others go on, and one alone."""
    whole, halfway = tmp_path / "whole", tmp_path / "halfway"
    first = launch(*flags, "--rounds=2", f"--out_dir={halfway}", "--mesh=4x2")
    run(flags, out_dir=str(whole))
    said = first.communicate()[0]
    assert first.returncode == 0, said
    assert {path.name for path in (halfway / "checkpoints").iterdir()} == {"2"}
    alone = shutil.copytree(halfway, tmp_path / "alone")
    then = launch(*flags, f"--out_dir={halfway}", "--resume", "--override")  # on a mesh of all devices
    run(flags, out_dir=str(alone), resume=True, override=True)
    said = then.communicate()[0]
    assert then.returncode == 0 and said.count("going on from the checkpoint of round 2") == 1, said
    same(alone, whole)
    same(halfway, whole)
    assert {path.name for path in halfway.iterdir()} - {"curves.png", "clients.png"} <= {
        path.name for path in whole.iterdir()
    }


def wait_for(lines, out, launcher):
    """Until a run has written so much, or is at its end."""
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while launcher.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < lines):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill_second(launcher):
    """The launcher then kills the first."""
    children = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[1]), signal.SIGKILL)


@pytest.fixture
def going(flags, tmp_path):
    """Two processes in the middle of a run that does not end."""
    out = tmp_path / "out"
    launcher = launch(*flags, "--rounds=100000", "--eval_every=1", f"--out_dir={out}", devices=1)
    wait_for(4, out, launcher)
    assert launcher.poll() is None
    yield launcher, out
    launcher.kill()


@pytest.mark.slow
def test_sigterm_reaches_all_of_them(going):
    launcher, out = going
    launcher.terminate()
    said = launcher.communicate(timeout=60)[0]
    assert launcher.returncode == 75, said
    (line,) = [line for line in said.splitlines() if "told to end" in line]
    done = records(out)[-1]["round"]
    assert f"after round {done};" in line and (out / "checkpoints" / str(done) / "digests.json").exists()


@pytest.mark.slow
def test_one_that_dies_ends_all(going):
    launcher, _ = going
    kill_second(launcher)
    launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGKILL


@pytest.mark.slow
def test_killed_processes_go_on_bit_by_bit(flags, tmp_path):
    flags, whole, out = [*flags, "--rounds=40", "--mesh=4x2"], tmp_path / "whole", tmp_path / "out"
    said = (first := launch(*flags, f"--out_dir={whole}")).communicate()[0]
    assert first.returncode == 0, said
    rng = random.Random(0)
    for lines in (3, 12, 25):
        launcher = launch(*flags, f"--out_dir={out}", "--resume")
        wait_for(lines, out, launcher)
        time.sleep(rng.uniform(0, 0.2))
        kill_second(launcher)
        launcher.communicate(timeout=60)
        assert launcher.returncode == 128 + signal.SIGKILL
    said = (last := launch(*flags, f"--out_dir={out}", "--resume")).communicate()[0]
    assert last.returncode == 0 and "going on from the checkpoint of round" in said, said
    ours, theirs = ([record | {"seconds": 0} for record in records(path)] for path in (out, whole))
    weights = "model/model.safetensors"
    assert ours == theirs and (out / weights).read_bytes() == (whole / weights).read_bytes()


@pytest.mark.slow
def test_an_error_of_one_ends_all_and_is_said(flags, tmp_path):
    """The first alone looks into the folder."""
    (tmp_path / "metrics.jsonl").write_text("{}")
    launcher = launch(*flags, f"--out_dir={tmp_path}", devices=1)
    said = launcher.communicate(timeout=60)[0]
    assert launcher.returncode == 2 and "is in use" in said and "Traceback" not in said, said


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_one_that_waits_in_vain_ends(process):
    address = f"localhost:{launch_local.free_port()}"
    code = f"from fedgalore_jax import hosts; hosts.JOINING = 2; hosts.join({address!r}, 2, {process})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "not all processes have come in 2 seconds: start one on every host" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_without_a_launcher_the_other_ends_too(dead, flags, tmp_path):
    started = launch_local.start([*flags, "--rounds=100000", f"--out_dir={tmp_path / 'out'}"], 2, 1)
    wait_for(4, tmp_path / "out", started[0].handle)
    started[dead].handle.kill()
    try:
        assert started[1 - dead].handle.wait(90) != 0
    finally:
        for process in started:
            process.handle.kill()
            process.handle.wait()
        started[1].log.close()


@pytest.mark.parametrize("failing", [0, 1])
def test_the_launcher_says_what_the_one_that_failed_said(failing, tmp_path, capfd):
    def process(i):
        code = "import sys; sys.exit('this is wrong')" if i == failing else "import time; time.sleep(60)"
        log = open(tmp_path / str(i), "w+b") if i else None  # noqa: SIM115
        return launch_local.Process(subprocess.Popen([sys.executable, "-c", code], stderr=log), log)

    started = [process(0), process(1)]
    assert launch_local.wait(started, lambda: 0) == 1
    assert started[1 - failing].handle.returncode == -signal.SIGKILL
    assert capfd.readouterr().err == "this is wrong\n"


def test_an_address_needs_others(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["run.py", "--num_processes=2"])
    assert stop.value.code == 2
    assert "num_processes=2 has no effect: give --distributed too" in capsys.readouterr().err


def test_processes_are_given_one_folder(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["run.py", "--distributed"])
    assert stop.value.code == 2 and "distributed needs --out_dir" in capsys.readouterr().err


def two(*out):
    """Two processes that share no memory."""
    env = launch_local.environment(2) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "own_rows.py"), str(launch_local.free_port())]
    options = {"env": env, "stderr": subprocess.PIPE, "text": True}
    args = [[*command, str(i), *out[i : i + 1]] for i in (0, 1)]
    with subprocess.Popen(args[0], **options) as first, subprocess.Popen(args[1], **options) as second:
        for process in (first, second):
            said = process.communicate(timeout=300)[1]
            assert process.returncode == 0, said


def test_a_host_gathers_what_its_own_clients_need():
    two()


@pytest.mark.slow
def test_two_hosts_that_keep_memories_are_as_good_as_one(tmp_path):
    out = [tmp_path / f"{i}.npz" for i in (0, 1)]
    two(*map(str, out))
    with jax.enable_x64(True):
        wanted = own_rows.learn()
    for found in map(np.load, out):
        for name, shape in itertools.product(wanted, own_rows.MESHES):
            got = found[f"{shape}|{name}"]
            np.testing.assert_allclose(got, wanted[name], rtol=0, atol=1e-10, err_msg=f"{shape} {name}")
