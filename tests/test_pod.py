"""The scripts for pods, with commands of the same names in place of gcloud's and SLURM's."""

import os
import pathlib
import subprocess
import sys

import pytest
from safetensors.numpy import load_file

ROOT = pathlib.Path(__file__).parents[1]
GCLOUD = """
printf '%s\\n' "$@" >> "$LOG"
case $* in *--command=*) for last; do :; done; cd "$HOSTS" && eval "${last#--command=}" ;; esac
"""
SRUN = """
for option in "$@"; do case $option in -*) shift ;; *) break ;; esac; done
export SLURM_JOB_ID=7 SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=1
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & SLURM_PROCID=0 SLURM_LOCALID=0 "$@"
first=$?; wait $!; second=$?
exit $((first > second ? first : second))
"""
PYTHON = """
printf '%s\\n' "$SLURM_PROCID" "$@" >> "$LOG.$SLURM_PROCID"
exit "${STATUS:-0}"
"""


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """Runs a script where those commands are, in a folder where `.venv/bin/python` says how it was called."""

    def put(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}")
        path.chmod(0o755)

    here, log = tmp_path / "fedgalore_jax", tmp_path / "log"
    for name, text in (("gcloud", GCLOUD), ("srun", SRUN), ("scontrol", 'echo "$@" >> "$LOG"')):
        put(tmp_path / "bin" / name, text)
    put(here / ".venv" / "bin" / "python", PYTHON)
    settings = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "LOG": log, "HOSTS": tmp_path}
    for name, value in (settings | {"SLURM_JOB_ID": 7}).items():
        monkeypatch.setenv(name, str(value))

    def run(script, *args):
        command = ["bash", str(ROOT / "experiments" / "pod" / script), *args]
        return subprocess.run(command, cwd=here, capture_output=True, text=True)

    run.here = here
    run.said = lambda process="": pathlib.Path(f"{log}{process}").read_text().splitlines()
    return run


FLAGS = ["--mesh=4x2", "--out_dir=a folder", "--opt", "sync='none'"]


def test_a_tpu_pod_is_asked_for_on_all_workers(shell):
    assert shell("tpu_vm.sh", "run", "one", "us-east1-d", *FLAGS).returncode == 0
    call = ["compute", "tpus", "tpu-vm", "ssh", "--zone=us-east1-d", "--worker=all", "one"]
    assert shell.said()[: len(call)] == call
    assert shell.said(".")[1:] == ["run.py", "--distributed", *FLAGS]
    assert shell("tpu_vm.sh", "stop", "one", "us-east1-d").returncode == 2


@pytest.mark.parametrize("status", [0, 2, 75])
def test_slurm_queues_what_was_preempted_again(status, shell, monkeypatch):
    monkeypatch.setenv("STATUS", str(status))
    assert shell("slurm.sh", *FLAGS).returncode == status
    for process in "01":
        assert shell.said(f".{process}") == [process, "run.py", "--distributed", *FLAGS]
    assert (shell.said() if status == 75 else []) == ["requeue 7"] * (status == 75)


@pytest.mark.slow
def test_processes_find_each_other_through_slurm(shell, monkeypatch):
    (shell.here / "run.py").symlink_to(ROOT / "run.py")
    (shell.here / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"')
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    shape = ["--rounds=2", "--clients=2", "--local_steps=1", "--eval_samples=20", "--out_dir=out"]
    done = shell("slurm.sh", *shape)
    assert done.returncode == 0, done.stderr
    assert load_file(shell.here / "out" / "model" / "model.safetensors")
    assert '"device": "cpu x 2"' in (shell.here / "out" / "summary.json").read_text()
