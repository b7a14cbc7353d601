"""Runs of the command line as processes of their own, forked from one that has imported everything.

Importing takes longer than a tiny run does, and so does drawing, which is left out. No backend exists before
the fork, so no thread is lost in it.

    python tests/forked.py     reads [log file, argument, ...] as a line of JSON and prints a pid;
                               reads any other line and prints the status: until then the pid is nobody else's
"""

import json
import os
import pathlib
import subprocess
import sys

from experiments.launch_local import environment

ROOT = pathlib.Path(__file__).parents[1]


class Forked:
    """The process that forks; each run's output goes to a file, and each has so many devices."""

    def __init__(self, cache: pathlib.Path, devices: int = 1):
        settings = {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
        settings |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        command = [sys.executable, __file__]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment(devices) | settings, cwd=ROOT, **pipes)

    def start(self, log: pathlib.Path, *args: str) -> int:
        """Starts `run.py` with arguments; its pid."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps([str(log), *args]), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def status(self) -> int:
        """Waits for the run started last; its exit status, negative for a signal."""
        assert self.process.stdin and self.process.stdout
        print("status", file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


def serve() -> None:
    import orbax.checkpoint  # noqa: F401
    import sklearn.datasets  # noqa: F401

    from experiments import report
    from experiments.launch import main

    report.heat_map = report.curves = lambda *args: None
    while line := sys.stdin.readline():
        log, *args = json.loads(line)
        pid = os.fork()
        if not pid:
            file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.argv = ["run.py", *args]
            main()
            sys.exit()
        print(pid, flush=True)
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
