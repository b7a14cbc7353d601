"""Bases are orthonormal whatever comes in, and span what NumPy's SVD says they should."""

import subprocess
import sys

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from fedgalore_jax import lowrank

KEY = jax.random.key(0)
FINDING = [finder for finder in lowrank.FINDERS if finder != "random"]


def planted(shape, rank, seed=0, gap=50.0):
    """Matrices with `rank` singular values well above the others, in float64."""
    matrix = np.random.default_rng(seed).normal(size=shape)
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    s[..., :rank] *= gap
    return (u * s[..., None, :]) @ vt


def left_vectors(matrix, rank):
    return np.linalg.svd(np.asarray(matrix, np.float64))[0][..., :rank]


def angle(a, b):
    """Sine of the largest principal angle between two orthonormal bases."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    residual = b - a @ (np.swapaxes(a, -1, -2) @ b)
    return np.max(np.linalg.norm(residual, 2, axis=(-2, -1)))


def defect(basis):
    basis = np.asarray(basis, np.float64)
    gram = np.swapaxes(basis, -1, -2) @ basis
    return np.max(np.abs(gram - np.eye(basis.shape[-1])))


@jax.jit
def orthonormal_9x4(y):
    return lowrank.orthonormalise(y, KEY)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    seed=st.integers(0, 2**20),
    rank=st.integers(0, 4),
    scales=st.tuples(*[st.sampled_from([0.0, 1e-40, 1e-30, 1e-3, 1.0, 1e6, 1e37])] * 4),
    poison=st.sampled_from([None, np.nan, np.inf]),
)
def test_orthonormal_for_any_input(seed, rank, scales, poison):
    rng = np.random.default_rng(seed)
    y = rng.normal(size=(9, rank)) @ rng.normal(size=(rank, 4)) * scales
    if poison:
        y[seed % 9, seed % 4] = poison
    assert defect(orthonormal_9x4(np.clip(y, -3e38, 3e38).astype(np.float32))) < 1e-5


def test_orthonormal_when_nearly_dependent():
    # The classic failure of one-pass Gram-Schmidt (Läuchli): columns that differ by 1e-4.
    y = np.concatenate([np.ones((1, 4)), 1e-4 * np.eye(4), np.zeros((4, 4))]).astype(np.float32)
    basis = orthonormal_9x4(y)
    assert defect(basis) < 1e-5
    assert angle(basis, np.linalg.qr(y.astype(np.float64))[0]) < 1e-2


@pytest.mark.usefixtures("x64")
def test_float64_matches_numpy_qr():
    y = np.random.default_rng(1).normal(size=(9, 4))
    q, r = np.linalg.qr(y)
    basis = lowrank.orthonormalise(jnp.asarray(y), KEY)
    np.testing.assert_allclose(basis, q * np.sign(np.diag(r)), atol=1e-13)


def test_independent_columns_do_not_depend_on_the_key():
    y = np.random.default_rng(2).normal(size=(9, 4)).astype(np.float32)
    both = jax.jit(lambda y: [lowrank.orthonormalise(y, jax.random.key(i)) for i in (0, 7)])
    np.testing.assert_array_equal(*both(y))
    y[:, 2] = y[:, 0]
    one, two = both(y)
    np.testing.assert_array_equal(one[:, :2], two[:, :2])
    assert np.abs(one[:, 2] - two[:, 2]).max() > 0.1


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)], ids=["wide", "tall"])
@pytest.mark.parametrize("finder", FINDING)
def test_finds_the_planted_subspace(finder, shape):
    matrix = planted(shape, 3)
    basis = lowrank.leading_subspace(jnp.asarray(matrix, "float32"), 3, finder=finder, key=KEY)
    assert basis.shape == (shape[0], 3)
    assert basis.dtype == jnp.float32
    assert defect(basis) < 1e-5
    assert angle(basis, left_vectors(matrix, 3)) < 1e-4
    # ... and the random one is none: the test can tell.
    random = lowrank.leading_subspace(jnp.asarray(matrix), 3, finder="random", key=KEY)
    assert angle(random, left_vectors(matrix, 3)) > 0.5


def test_without_a_gap_subspace_iteration_keeps_most_of_the_energy():
    rng = np.random.default_rng(3)
    u, v = (np.linalg.qr(rng.normal(size=(40, 40)))[0] for _ in range(2))
    matrix = (u / np.sqrt(np.arange(1, 41))) @ v
    find = jax.jit(lambda g: [lowrank.leading_subspace(g, 4, finder=f, key=KEY) for f in FINDING])
    kept = [np.linalg.norm(p.T @ matrix) for p in find(jnp.asarray(matrix))]
    best = np.linalg.norm(u[:, :4].T @ matrix)
    assert kept[0] == pytest.approx(best, rel=1e-5)
    assert kept[1] == pytest.approx(best, rel=1e-5)
    assert 0.97 * best < kept[2] < best


@pytest.mark.parametrize("finder", ["svd", "gram"])
def test_exact_finders_order_columns_and_fix_signs(finder):
    matrix = np.random.default_rng(4).normal(size=(7, 5))
    u = left_vectors(matrix, 3)
    u = u * np.sign(np.take_along_axis(u, np.argmax(np.abs(u), 0)[None], 0))
    basis = lowrank.leading_subspace(jnp.asarray(matrix), 3, finder=finder, key=KEY)
    np.testing.assert_allclose(basis, u, atol=1e-5)


@pytest.mark.parametrize("finder", lowrank.FINDERS)
@pytest.mark.parametrize("shape", [(6, 3), (3, 6)], ids=["tall", "wide"])
def test_full_rank_and_deficient_matrices_give_orthonormal_bases(finder, shape):
    run = jax.jit(lambda g: lowrank.leading_subspace(g, shape[0], finder=finder, key=KEY))
    random = np.random.default_rng(5).normal(size=shape)
    for matrix in (
        random,
        0 * random,
        1e-35 * random,
        1e35 * random,
        np.outer(*map(np.ones, shape)),
    ):
        assert defect(run(jnp.asarray(matrix, jnp.float32))) < 1e-5


@pytest.mark.parametrize("finder", FINDING)
def test_stacks_equal_one_by_one_and_bfloat16_is_computed_in_float32(finder):
    stack = jnp.asarray(planted((2, 3, 6, 8), 2), jnp.bfloat16)
    find = jax.jit(lambda g: lowrank.leading_subspace(g, 2, finder=finder, key=KEY))
    bases = find(stack)
    assert bases.dtype == jnp.float32
    assert bases.shape == (2, 3, 6, 2)
    for i in np.ndindex(2, 3):
        assert angle(bases[i], left_vectors(stack[i], 2)) < 1e-3


@pytest.mark.parametrize("transposed", [False, True])
def test_what_a_gpu_searches_in_is_rounded_once_and_columns_are_not(transposed, monkeypatch):
    rng = np.random.default_rng(3)
    matrix, columns = rng.normal(size=(2, 48, 48)), rng.normal(size=(2, 48, 4)).astype("float32")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    halved = lowrank._halved(jnp.asarray(matrix, "float32"))
    assert halved.dtype == jnp.bfloat16
    assert lowrank._halved(np.float64(matrix)).dtype == np.float64
    exact = np.asarray(halved, "float64")
    exact = (exact.swapaxes(-1, -2) if transposed else exact) @ columns.astype("float64")
    ours = lowrank._thin(halved, jnp.asarray(columns), transposed=transposed)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, exact, rtol=0, atol=2**-15 * abs(exact).max())


def test_a_gpu_finds_the_same_subspace(monkeypatch):
    matrix = jnp.asarray(planted((40, 30), 3), "float32")
    plain = lowrank.leading_subspace(matrix, 3, key=KEY)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    halved = lowrank.leading_subspace.__wrapped__(matrix, 3, key=KEY)
    assert np.linalg.svd(np.asarray(plain).T @ np.asarray(halved))[1].min() > 1 - 1e-4


def test_random_basis_is_a_function_of_the_key_and_fills_stacks_with_different_bases():
    draw = jax.jit(lambda key: lowrank.random_basis(key, (2, 8), 3))
    basis = draw(KEY)
    np.testing.assert_array_equal(basis, draw(KEY))
    assert basis.shape == (2, 8, 3)
    assert defect(basis) < 1e-5
    for other in (basis[1], draw(jax.random.key(1))[0]):
        assert angle(basis[0], other) > 0.1


def operands(jaxpr, names):
    """Ranks of the operands of some primitives, wherever they are in a jaxpr."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in names:
            yield eqn.invars[0].aval.ndim
        for sub in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns")):
            sub = getattr(sub, "jaxpr", sub)
            if hasattr(sub, "eqns"):
                yield from operands(sub, names)


@pytest.mark.parametrize("finder", lowrank.FINDERS)
def test_no_finder_makes_a_batched_lapack_call(finder):
    lapack = {"svd", "eigh", "cholesky", "geqrf", "householder_product", "lu", "qr"}
    stack = jnp.ones((3, 2, 6, 8))
    find = jax.vmap(lambda g: lowrank.leading_subspace(g, 2, finder=finder, key=KEY))
    ranks = list(operands(jax.make_jaxpr(find)(stack).jaxpr, lapack))
    assert ranks == ([2] if finder in ("svd", "gram") else [])
    if finder == "svd":  # the walk does see what the plain call would do
        assert list(operands(jax.make_jaxpr(jax.vmap(jnp.linalg.svd))(stack).jaxpr, lapack)) == [4]


def test_every_finder_ends_under_vmap():
    program = """
import jax, jax.numpy as jnp
from fedgalore_jax import lowrank
key = jax.random.key(0)
stacks = [jax.random.normal(jax.random.key(i), (8, 2, 32, 24)) for i in range(3)]
finders = ["svd", "gram", "subspace"]
def find(stacks):
    return [lowrank.leading_subspace(g, 4, finder=f, key=key) for g in stacks for f in finders]
jax.block_until_ready(jax.jit(jax.vmap(find))(stacks))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("rank", [0, 7])
def test_bad_arguments_name_value_and_remedy(rank):
    with pytest.raises(ValueError, match=rf"rank={rank} .*dimension 6: choose 1 to 6"):
        lowrank.leading_subspace(jnp.ones((6, 9)), rank, key=KEY)
    with pytest.raises(ValueError, match=rf"rank={rank} .*choose 1 to 6"):
        lowrank.random_basis(KEY, (6,), rank)
    with pytest.raises(ValueError, match=r"finder='pca' .*svd, gram, subspace, random"):
        lowrank.leading_subspace(jnp.ones((6, 9)), 2, finder="pca", key=KEY)


def test_factored_svd_is_the_svd_of_the_product():
    """Stacked, rank deficient in one matrix of the stack, asked for more triples than there are."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 9, 4)), rng.normal(size=(2, 4, 7))
    a[1, :, 3] = a[1, :, 0]
    u, s, vt = (np.asarray(x) for x in lowrank.factored_svd(jnp.asarray(a), jnp.asarray(b), 6))
    assert u.shape == (2, 9, 6) and s.shape == (2, 6) and vt.shape == (2, 6, 7)
    np.testing.assert_allclose((u * s[:, None]) @ vt, a @ b, atol=1e-5)
    want = np.linalg.svd(a @ b, compute_uv=False)
    np.testing.assert_allclose(s[:, :4], want[:, :4], atol=1e-5)
    best = np.linalg.svd(a @ b)
    two = (u[..., :2] * s[:, None, :2]) @ vt[:, :2]
    np.testing.assert_allclose(two, (best[0][..., :2] * best[1][:, None, :2]) @ best[2][:, :2], atol=1e-5)
    peaks = np.take_along_axis(u, np.abs(u).argmax(-2, keepdims=True), -2)[..., :3]
    assert (peaks > 0).all()


def test_ridge_solves_each_of_a_stack():
    rng = np.random.default_rng(0)
    x, rhs = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 3, 4))
    gram = x.swapaxes(1, 2) @ x
    got = lowrank.ridge(jnp.asarray(gram), jnp.asarray(rhs), 0.1)
    np.testing.assert_allclose(got, np.linalg.solve(gram + 0.1 * np.eye(3), rhs), rtol=1e-4, atol=1e-5)
