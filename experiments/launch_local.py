"""Several processes of one run on this machine, on CPU devices: what pods do, without one.

python -m experiments.launch_local --processes=2 --devices=4 -- <flags of run.py>

Each process has so many devices. The first that fails ends the others, and says why; its exit status is the
launcher's. Ctrl-C and SIGTERM are passed on.
"""

import argparse
import contextlib
import os
import pathlib
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO, NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
GRACE = 30
"""Seconds for the others to end by themselves where a signal was passed on."""


class Process(NamedTuple):
    """One of them, and where it writes errors; the first writes to the launcher's own output."""

    handle: subprocess.Popen
    log: IO[bytes] | None


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    """This process's, for one that has so many CPU devices."""
    options = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": options}


def start(flags: Sequence[str], processes: int, devices: int) -> list[Process]:
    """Starts all processes."""
    joined = ["--distributed", f"--coordinator=localhost:{free_port()}", f"--num_processes={processes}"]
    started = []
    for i in range(processes):
        command = [sys.executable, str(ROOT / "run.py"), *joined, f"--process_id={i}", *flags]
        log = tempfile.TemporaryFile() if i else None  # noqa: SIM115
        # In a session of its own a process gets signals from here alone, and each of them once.
        options = {"env": environment(devices), "start_new_session": True, "stderr": log}
        handle = subprocess.Popen(command, stdout=subprocess.DEVNULL if i else None, **options)
        started.append(Process(handle, log))
    return started


def wait(started: list[Process], grace: Callable[[], float]) -> int:
    """Waits for all; the exit status of the one that failed first, once the others have ended too.

    Args:
      started: the processes.
      grace: seconds that the others get then, before they are killed.
    """
    ended: queue.SimpleQueue[Process] = queue.SimpleQueue()  # the others fail a moment later
    for process in started:
        threading.Thread(target=_report, args=(process, ended), daemon=True).start()
    failed = next((process for process in (ended.get() for _ in started) if process.handle.returncode), None)
    deadline = time.monotonic() + grace()
    for process in started:
        try:
            process.handle.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.handle.kill()
            process.handle.wait()
    status = failed.handle.returncode if failed else 0
    for process in started:
        with process.log or contextlib.nullcontext() as log:
            if log and process is failed and status != started[0].handle.returncode:
                log.seek(0)
                sys.stderr.write(log.read().decode(errors="replace"))
    return status if status >= 0 else 128 - status


def _report(process: Process, ended: queue.SimpleQueue[Process]) -> None:
    process.handle.wait()
    ended.put(process)


def main() -> None:
    """Starts, passes signals on, and ends as the processes do."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, help="how many")
    parser.add_argument("--devices", type=int, default=4, help="of each")
    parser.add_argument("flags", nargs="*", help="of run.py, after --")
    args = parser.parse_args()
    if args.processes < 1 or args.devices < 1:
        parser.error(f"processes={args.processes} and devices={args.devices}: give numbers >= 1")
    started: list[Process] = []
    passed: list[int] = []

    def pass_on(number, frame):
        del frame
        passed.append(number)
        for process in started:
            process.handle.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    started += start(args.flags, args.processes, args.devices)
    sys.exit(wait(started, lambda: GRACE if passed else 0))


if __name__ == "__main__":
    main()
