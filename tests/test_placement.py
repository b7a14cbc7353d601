"""One run on one device, on meshes of eight, and where its arrays lie there."""

import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spread
import tiny_llama
import tiny_vit
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from experiments.launch_local import environment
from fedgalore_jax import blocks, placement, tree
from fedgalore_jax.config import Config

ROOT = pathlib.Path(__file__).parents[1]
MESH = AbstractMesh((2, 4), placement.AXES)


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """What a process with eight devices learned."""
    out = tmp_path_factory.mktemp("spread") / "out.npz"
    command = [sys.executable, str(ROOT / "tests" / "spread.py"), str(out)]
    env = environment(8) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(np.load(out))


@pytest.mark.parametrize("name", spread.CASES)
def test_eight_devices_are_as_good_as_one(eight, name):
    wide = spread.CASES[name][-1]
    with jax.enable_x64(wide):
        arrays, _, _ = spread.run(name)
    for path, x in arrays.items():
        found = eight[f"{name}|{path}"]
        assert found.dtype == x.dtype, path
        np.testing.assert_allclose(found, x, rtol=0, atol=1e-10 if wide else 1e-5, err_msg=path)


@pytest.mark.parametrize("name", spread.CASES)
def test_a_digest_is_that_of_one_device(eight, name):
    with jax.enable_x64(spread.CASES[name][-1]):
        params = spread.machine(name, None, False)[1]
        other = tree.flatten(params)
        other["classifier/kernel"] = other["classifier/kernel"].at[3, 2].multiply(-1)
        assert tree.digest(params) == eight[f"{name}|digest"] != tree.digest(tree.unflatten(other))


def test_data_that_travel_to_one_device_are_the_same():
    """As where a training set is large."""
    with jax.enable_x64(True):
        here, there = (spread.run("memories", streams=streams)[0] for streams in (False, True))
    for path, x in here.items():
        np.testing.assert_array_equal(there[path], x, err_msg=path)


def test_weights_stay_apart(eight):
    """Each device holds its share of a kernel, and no device makes one whole in a round."""
    assert tuple(eight["rows of clients|share"]) == (3, 20, 12)
    assert tuple(eight["rows and weights|share"]) == (3, 10, 12)
    assert tuple(eight["memories|share"]) == (3, 10, 12)
    flat = tree.flatten(tiny_vit.model()[1])
    kernels = [x.shape for path, x in flat.items() if re.match("layers/.*kernel", path)]
    spread_out = {spread.sizes(shape) for shape in [*kernels, *(shape[1:] for shape in kernels)]}
    spread_out -= {spread.sizes(flat["embeddings/projection/kernel"].shape)}  # is whole anyway
    assert spread_out == {"12,12,3", "12,20", "12,20,3"}
    for name in spread.CASES:
        assert not spread_out & set(eight[f"{name}|gathered"]), name


def test_activations_are_summed_once_a_block(eight):
    """Two blocks in the one layer that a program holds, there and back; on rows of clients alone, never."""
    assert eight["rows and weights|summed"] == 4
    assert eight["rows of clients|summed"] == 0


def test_every_memory_is_spread_over_all_devices(eight):
    """Of ten clients that remember a kernel of 3 x 20 x 12, on four shares of clients and two of a model."""
    assert tuple(eight["memories|memory"]) == (10, 3, 10, 3)


@pytest.mark.parametrize(
    "mesh, row, spec",
    [
        ((4, 1), (10, 3, 20, 12), P(None, None, "clients", None)),  # the longest
        ((4, 2), (10, 3, 20, 12), P(None, None, "model", "clients")),
        ((3, 1), (10, 3, 20, 12), P(None, "clients", None, None)),  # not the last
        ((5, 1), (10, 3, 8, 12), P("clients", None, None, None)),  # no axis of a row divides
        ((7, 1), (10, 3, 8, 12), P(None, None, None, None)),
        ((4, 1), (10, 12), P(None, "clients")),
        ((4, 1), (12,), P("clients")),
    ],
)
def test_rows_of_memories_are_spread_by_an_axis_that_divides(mesh, row, spec):
    path = "layers/output/kernel"
    rows, weights = {path: jax.ShapeDtypeStruct(row, "f4")}, {path: jax.ShapeDtypeStruct(row[1:], "f4")}
    assert placement.of_clients(AbstractMesh(mesh, placement.AXES), rows, weights)[path].spec == spec


def test_every_family_has_its_weights_spread():
    def axes(model):
        _, params = model
        flat = tree.flatten(params)
        return {path: placement.weight(MESH, path, x.shape).spec for path, x in flat.items()}

    llama = axes(tiny_llama.model())
    assert llama["layers/attention/query/kernel"] == llama["layers/mlp/gate/kernel"] == P(None, None, "model")
    assert llama["layers/attention/output/kernel"] == llama["layers/mlp/down/kernel"] == P(None, "model")
    assert llama["layers/mlp/up/bias"] == P(None, "model")
    for path in ("layers/input_layernorm/scale", "layers/attention/output/bias"):
        assert llama[path] == P()
    assert llama["lm_head/kernel"] == llama["embeddings/embed_tokens"] == P()  # 61 words on four devices
    for config in (tiny_vit.CONFIG, tiny_vit.BERT, tiny_vit.ROBERTA):
        found = axes(tiny_vit.model(config))
        assert (
            found["layers/attention/value/kernel"]
            == found["layers/intermediate/kernel"]
            == P(None, None, "model")
        )
        assert found["layers/attention/output/kernel"] == found["layers/output/kernel"] == P(None, "model")
        assert all(spec == P() for path, spec in found.items() if not path.startswith("layers/"))
    assert placement.weight(MESH, "embeddings/word_embeddings", (32, 12)).spec == P("model")


@pytest.mark.parametrize("mesh", ["8", "0x1", "8x", "-1x1", "8x1x1", "axb"])
def test_a_mesh_has_two_axes(mesh):
    with pytest.raises(ValueError, match=f"mesh={mesh!r} is not usable: give two numbers"):
        Config(mesh=mesh)


def test_a_mesh_needs_its_devices():
    with pytest.raises(ValueError, match=r"mesh='9x3' is of 27 devices, and there are 1: give a smaller one"):
        placement.mesh("9x3")


def test_every_device_trains_as_many_clients():
    def chunk(cohort, chunk, shares=4, activations=0):
        return blocks.chunk(Config(clients=10, cohort=cohort, chunk=chunk), shares, lambda: activations)

    assert [chunk(None, None), chunk(3, None), chunk(9, 4)] == [12, 4, 4]
    with pytest.raises(ValueError, match=r"chunk=6 is not usable with mesh='4x1': give a multiple of 4"):
        blocks.chunk(Config(chunk=6, mesh="4x1"), 4, lambda: 0)


def test_a_cpu_trains_as_many_clients_as_its_caches_serve(monkeypatch):
    def chunk(activations, chunk=None):
        return blocks.chunk(Config(clients=10, chunk=chunk), 1, lambda: activations)

    assert [chunk(share * blocks.NEAR // 100) for share in (1, 10, 30, 60, 200)] == [10, 10, 2, 1, 1]
    assert chunk(blocks.NEAR, 4) == 4
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert chunk(blocks.NEAR) == 10


def test_activations_are_what_is_kept_of_a_batch():
    """Of `x @ w`, squared: x for the kernel's gradient, and the product."""
    params, train = {"w": jnp.ones((3, 2))}, {"x": np.ones((40, 3), np.float32)}

    def loss(params, batch, key):
        return jnp.square(batch["x"] @ params["w"]).sum()

    found = [blocks.activations(loss, params, train, size) for size in (8, 16)]
    assert found[1] - found[0] == 4 * 8 * (3 + 2)


def test_activations_grow_with_the_batch_alone():
    weights, train = {"w": jnp.ones((3, 2))}, {"x": np.ones((40, 3), np.float32)}

    def loss(params, batch, key):
        return jnp.square(jnp.tanh(batch["x"] @ params["w"]) @ params["w"].T).sum()

    found = [blocks.activations(loss, weights, train, size) for size in (8, 16)]
    assert found[1] == 2 * found[0]


def test_a_chunk_is_no_larger_than_a_cohort():
    assert blocks.chunk(Config(clients=10, cohort=2, chunk=8), 1, lambda: 0) == 2
