"""Arrays that are kept on disk, and token rows that are read one by one."""

import errno
import os
import threading
import time
from concurrent import futures

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgalore_jax import tree
from fedgalore_jax.data import cache
from fedgalore_jax.data.cache import cached
from fedgalore_jax.data.padded import Padded

WANTED = np.arange(6, dtype=np.uint8).reshape(2, 3)


def compute(empty):
    large = empty("large", WANTED.shape, WANTED.dtype)
    large[:] = WANTED
    return {"large": large, "small": np.array([], int)}


def never(empty):
    raise AssertionError("it was there")


def kept(folder):
    return [path for path in folder.iterdir() if path.is_dir()]


def check(arrays, *, mapped):
    np.testing.assert_array_equal(arrays["large"], WANTED)
    assert arrays["large"].dtype == np.uint8 and arrays["small"].shape == (0,)
    assert isinstance(arrays["large"], np.memmap) == mapped


def test_what_was_computed_once_is_mapped(tmp_path):
    for make in (compute, never):
        found = cached(tmp_path, ["a", 1], make)
        check(found, mapped=True)
        with pytest.raises(ValueError, match="read-only"):
            found["large"][0] = 1
    check(cached(tmp_path, ["a", 2], compute), mapped=True)
    assert len(kept(tmp_path)) == 2
    check(cached(None, ["a", 1], compute), mapped=False)


@pytest.mark.parametrize("name", ["large.npy", "small.npy", cache.NAMES])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "header"])
def test_what_is_damaged_is_made_again(damage, name, tmp_path):
    check(cached(tmp_path, "a", compute), mapped=True)
    (folder,) = kept(tmp_path)
    file = folder / name
    was = file.read_bytes()
    file.unlink()  # and made anew: what is mapped stays
    if damage != "gone":
        file.write_bytes({"cut": was[:-1], "empty": b"", "header": was[:11] + b"'" + was[12:]}[damage])
    check(cached(tmp_path, "a", compute), mapped=True)
    check(cached(tmp_path, "a", never), mapped=True)


def test_a_full_disk_costs_memory_alone(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        check(cached(tmp_path, "a", compute), mapped=False)
    (tmp_path / "file").touch()
    check(cached(tmp_path / "file", "a", compute), mapped=False)
    assert kept(tmp_path) == []


def test_of_several_one_computes(tmp_path):
    came = []

    def slow(empty):
        came.append(threading.get_ident())
        time.sleep(0.05)
        return compute(empty)

    with futures.ThreadPoolExecutor(3) as pool:
        for found in list(pool.map(lambda _: cached(tmp_path, ["a"], slow), range(3))):
            check(found, mapped=True)
    assert len(came) == 1


def test_what_a_killed_process_left_is_cleared(tmp_path):
    check(cached(tmp_path, ["a"], compute), mapped=True)
    (folder,) = kept(tmp_path)
    left = folder.rename(folder.with_suffix(".partial"))
    check(cached(tmp_path, ["a"], compute), mapped=True)
    assert not left.exists()


def test_keys_differ_by_what_is_in_which_list(tmp_path):
    for key in (["a", "b"], [["a", "b"]], [["a"], "b"], ["a"], [["a"], []]):
        check(cached(tmp_path, key, compute), mapped=True)
    assert len(kept(tmp_path)) == 5


def test_the_folder_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_cache() == tmp_path / "fedgalore_jax"


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=6), st.data())
def test_padded_rows_are_those_of_an_array(rows, data):
    lengths, hidden = np.array(rows).T
    starts, tokens = np.cumsum(lengths) - lengths, np.arange(1, lengths.sum() + 2)
    width, size = data.draw(st.integers(9, 12)), data.draw(st.integers(0, 9))
    wanted = np.full((len(rows), width), -1)
    for i, (length, unseen) in enumerate(rows):
        wanted[i, unseen:length] = tokens[starts[i] + unseen : starts[i] + max(length, unseen)]
    got = Padded(tokens, starts, lengths, width, -1, hidden)
    assert (got.shape, got.ndim, tree.nbytes(got), len(got)) == (wanted.shape, 2, 4 * wanted.size, len(rows))
    assert np.asarray(got).dtype == got.dtype == np.int32
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(got[:, :size], wanted[:, :size])
    ids = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=4, max_size=4))).reshape(2, 2)
    np.testing.assert_array_equal(got[ids], wanted[ids])
    np.testing.assert_array_equal(got[0, 1], wanted[0, 1])
    np.testing.assert_array_equal(got.take(ids[0]), wanted[ids[0]])


class Watched:
    """Tokens that remember which of them were read."""

    def __init__(self):
        self.read = set()

    def __getitem__(self, where):
        self.read |= set(where.ravel().tolist())
        return np.ones_like(where)


def test_no_other_row_is_read():
    tokens = Watched()
    got = Padded(tokens, np.array([0, 3, 5, 9]), np.array([3, 2, 4, 2]), 4, 0)
    assert got[np.array([1, 3])].tolist() == [[1, 1, 0, 0]] * 2
    assert tokens.read - {0} == {3, 4, 9, 10}  # the first stands in for padding
