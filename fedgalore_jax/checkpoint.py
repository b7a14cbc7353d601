"""Checkpoints of a run, written while it goes on and read onto whatever devices there are now.

    checkpoints/<rounds done>/shapes.json    of the arrays, by path
    checkpoints/<rounds done>/arrays/        Orbax's
    checkpoints/<rounds done>/digests.json   of all these files; last of all, it makes the checkpoint whole

Orbax reads a damaged array without a word where its files still have their form, and refuses others in many
ways; so the digests are compared first, and Orbax is asked for what is whole and fits.
"""

import contextlib
import functools
import hashlib
import logging
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedgalore_jax import hosts
from fedgalore_jax.folder import read_json, write_json
from fedgalore_jax.tree import apart
from fedgalore_jax.types import Tree

FOLDER = "checkpoints"
SHAPES, ARRAYS, DIGESTS = "shapes.json", "arrays", "digests.json"


class Misfit(ValueError):
    """A checkpoint that is whole, and holds something else than what is asked for."""


class Checkpoints:
    """The checkpoints of one run; a context that waits for the last one at its end.

    Each is whole by itself. Where there are several processes all call every method at the same rounds, each
    writes and reads what it holds, and the first sees to the rest; the folder is one that all of them see.

    Args:
      run: the run's folder.
      keep: the newest that are kept.
    """

    def __init__(self, run: pathlib.Path, keep: int):
        import orbax.checkpoint as ocp

        _hush()
        self.run, self.path, self.keep = run, run.absolute() / FOLDER, keep
        self.orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self.thread, self.saving = futures.ThreadPoolExecutor(1), None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.wait()
        except OSError:
            if error is None:  # one that is on its way already says more
                raise
        finally:
            self.thread.shutdown()
            self.orbax.close()

    def save(self, rounds: int, tree: Tree) -> None:
        """Begins a checkpoint; the arrays may be given up as soon as it returns.

        Args:
          rounds: that are done.
          tree: what is saved.

        Raises:
          OSError: this one, or the one before it, could not be written; those that were whole stay.
        """
        import orbax.checkpoint as ocp

        self.wait()
        # What the host keeps is written in place while Orbax is still at work.
        arrays, path = _arrays(apart(tree)), self.path / str(rounds)
        with _written(path):
            if hosts.first():
                path.mkdir(parents=True, exist_ok=True)
                write_json(path / SHAPES, _shapes(arrays))
            self.orbax.save(path / ARRAYS, args=ocp.args.PyTreeSave(arrays))
        self.saving = self.thread.submit(self._finish, path)

    def wait(self) -> None:
        """Waits until the last checkpoint is whole.

        Raises:
          OSError: it could not be written.
        """
        saving, self.saving = self.saving, None
        if saving:
            saving.result()

    def check(self, rounds: int, like: Tree) -> None:
        """Sees that a checkpoint can be read.

        Args:
          rounds: which.
          like: as for `restore`.

        Raises:
          OSError: it is damaged.
          Misfit: it holds another tree.
        """
        path = self.path / str(rounds)
        try:
            digests = read_json(path / DIGESTS)
            damaged = [name for name, digest in digests.items() if _digest(path / name) != digest]
        except FileNotFoundError as error:
            raise OSError(f"{pathlib.Path(error.filename).name} is missing") from None
        except ValueError as error:
            raise OSError(str(error)) from None
        if damaged:
            raise OSError(f"{path / damaged[0]} is damaged")
        now, was = _shapes(_arrays(like)), read_json(path / SHAPES)
        if wrong := [name for name in {**now, **was} if now.get(name) != was.get(name)]:
            here, there = (shapes.get(wrong[0], "nothing") for shapes in (now, was))
            raise Misfit(f"{path} has {there} at {wrong[0]}, where a run with these values has {here}")

    def restore(self, rounds: int, like: Tree) -> Tree:
        """Reads a checkpoint that was checked.

        Args:
          rounds: which.
          like: the tree with `jax.ShapeDtypeStruct` leaves, whose shardings say where the arrays go; those
            without one become NumPy's.
        """
        import orbax.checkpoint as ocp

        path, wanted = self.path / str(rounds), _arrays(like)
        on_host = ocp.RestoreArgs(restore_type=np.ndarray)
        places = ocp.checkpoint_utils.construct_restore_args(wanted)
        places = {name: places[name] if leaf.sharding else on_host for name, leaf in wanted.items()}
        arrays = self.orbax.restore(path / ARRAYS, args=ocp.args.PyTreeRestore(wanted, restore_args=places))
        return _tree(arrays, like)

    def newest(self, like: Callable[[int], Tree], up_to: int, say: Callable[[str], None]) -> int:
        """The newest checkpoint that can be used. Later ones and damaged ones are removed.

        Args:
          like: the tree to `restore` after so many rounds.
          up_to: rounds; later ones are not asked for.
          say: takes a line for each that is damaged.

        Returns:
          Its rounds, or 0 where there is none.

        Raises:
          Misfit: it holds another tree.
        """
        for rounds in rounds_in(self.run) if hosts.first() else ():
            if rounds <= up_to:
                try:
                    self.check(rounds, like(rounds))
                    return hosts.agreed(rounds)
                except OSError as error:
                    say(f"the checkpoint of round {rounds} cannot be used: {error}")
            shutil.rmtree(self.path / str(rounds))
        return hosts.agreed(0)

    def _finish(self, path: pathlib.Path) -> None:
        """Makes a checkpoint whole once Orbax's part is there, and removes the oldest."""
        with _written(path):
            self.orbax.wait_until_finished()
            if not hosts.first():
                return
            files = sorted(file for file in path.rglob("*") if file.is_file())
            write_json(path / DIGESTS, {str(file.relative_to(path)): _digest(file) for file in files})
        for rounds in rounds_in(self.run)[self.keep :]:
            shutil.rmtree(self.path / str(rounds))


@contextlib.contextmanager
def _written(path: pathlib.Path) -> Iterator[None]:
    """Makes whatever stops a checkpoint from being written one OSError, and leaves nothing of it."""
    try:
        yield
    except Exception as error:
        for _ in range(50):  # Orbax's other threads may be at work in there for a while
            shutil.rmtree(path, ignore_errors=True)
            if not path.exists():
                break
            time.sleep(0.1)
        known = isinstance(error, OSError) and error.strerror
        reason = known or str(error).partition("\n")[0].rpartition(": ")[2]  # TensorStore names files first
        raise OSError(
            f"{path} could not be written ({reason}): make room, then go on with --resume"
        ) from error


def rounds_in(run: pathlib.Path) -> list[int]:
    """Rounds done at each checkpoint in a run's folder, whole or not, the newest first."""
    path = run / FOLDER
    found = path.iterdir() if path.is_dir() else ()
    return sorted((int(path.name) for path in found if path.name.isdecimal()), reverse=True)


def abstract(tree: Tree) -> Tree:
    """Shapes, types and shardings of a tree: what `restore` takes, without the arrays themselves."""

    def one(leaf):
        sharding = None if isinstance(leaf, np.ndarray) else leaf.sharding
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, tree)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _arrays(tree: Tree) -> dict[str, Any]:
    """A tree's leaves by path: keys as their data, and without those that have no elements."""

    def data(leaf):
        if not _is_key(leaf):
            return leaf
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.random.key_data(leaf)
        raw = jax.eval_shape(jax.random.key_data, leaf)
        return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=leaf.sharding)

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): data(leaf) for path, leaf in leaves if leaf.size}


def _tree(arrays: dict[str, Any], like: Tree) -> Tree:
    """The opposite of `_arrays`."""

    def leaf(path, shape):
        if not shape.size:
            return jax.device_put(np.zeros(shape.shape, shape.dtype), shape.sharding)
        array = arrays[jax.tree_util.keystr(path)]
        return jax.random.wrap_key_data(array) if _is_key(shape) else array

    return jax.tree_util.tree_map_with_path(leaf, like)


def _shapes(arrays: dict[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype.name}{list(leaf.shape)}" for name, leaf in arrays.items()}


def _digest(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def _hush() -> None:
    """Drops what Orbax logs, and what its event loops print when a failed save leaves them.

    Both speak of its inside; that something failed, and where, is in the error. What others log passes.
    """

    def unraisable(what) -> None:
        if not (isinstance(what.exc_value, RuntimeError) and str(what.exc_value) == "Event loop is closed"):
            before(what)

    logging.getLogger("absl").addFilter(lambda record: "orbax" not in pathlib.Path(record.pathname).parts)
    before, sys.unraisablehook = sys.unraisablehook, unraisable
