"""Several processes as one run: the only door to `jax.distributed`.

Every process runs the same program on all devices of all of them, and holds what lies on its own. The first
alone speaks and writes. Where one ends, the others do not wait for it: their next exchange fails, or the
coordinator, which hears of every process every few seconds, ends them.
"""

import math
import os
import pathlib
import sys
import threading
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from fedgalore_jax.types import Tree

JOINING, SILENCE, LEAVING = 120, 30, 30
"""Seconds: until all have come, without a sign of life, until all have left."""
REMEDY = (
    "start one on every host, and outside of TPU pods and SLURM give each --coordinator, --num_processes and"
    " --process_id"
)


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Makes this process one of several; before anything asks JAX for its devices.

    Args:
      coordinator: address and port of the first process, as all others see it.
      processes: how many there are.
      process: which one this is, from 0. All three are found by JAX on TPU pods and under SLURM.

    Raises:
      ValueError: they are not found. Where not all have come in time, the process ends instead.
    """
    alone = threading.Timer(JOINING, _alone)
    alone.daemon = True
    alone.start()
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=JOINING + SILENCE,
            heartbeat_timeout_seconds=SILENCE,
            shutdown_timeout_seconds=LEAVING,
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"cannot join other processes ({error}): {REMEDY}") from None
    finally:
        alone.cancel()
    said = sys.excepthook

    def end(*error: Any) -> None:
        said(*error)
        leave(1)

    sys.excepthook = end


def _alone() -> NoReturn:
    """Ends a process that still waits for others; JAX itself, a little later, would abort it."""
    line = f"not all processes have come in {JOINING} seconds: {REMEDY}"
    print(f"{pathlib.Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)
    os._exit(2)


def several() -> bool:
    """Whether there are other processes."""
    return jax.process_count() > 1


def first() -> bool:
    """Whether this is the process that speaks and writes."""
    return jax.process_index() == 0


def leave(status: int) -> NoReturn:
    """Ends this process; where there are others, at once, for they would wait for it."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def meet(what: str) -> None:
    """Waits until all processes are here."""
    if several():
        multihost_utils.sync_global_devices(what)


def agreed(number: int) -> int:
    """The first process's number, in all of them."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number))) if several() else number


def secret_key() -> jax.Array:
    """A PRNG key that follows from nothing: bits of the first process's operating system, in all of them."""
    shape = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
    words = np.frombuffer(os.urandom(4 * math.prod(shape)), np.uint32).reshape(shape)
    if several():
        words = multihost_utils.broadcast_one_to_all(words)
    return jax.random.wrap_key_data(jax.numpy.asarray(words))


def anywhere(flag: bool) -> bool:
    """Whether it is so in any process."""
    return bool(np.any(multihost_utils.process_allgather(np.bool_(flag)))) if several() else flag


def fetch(arrays: Tree) -> Tree:
    """Arrays whole on this host, leaf by leaf, wherever they lie; every process takes part."""

    def one(x: Any) -> np.ndarray:
        if isinstance(x, np.ndarray) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(one, arrays)
