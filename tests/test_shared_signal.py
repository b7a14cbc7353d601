"""AJIVE against a float64 write-up with sampled cuts, against mvlearn, and its contracts."""

import importlib
import importlib.util
import re
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgalore_jax import shared_signal
from fedgalore_jax.shared_signal import ajive, synchronise

C, D, N, S = 5, 12, 60, 3  # one shape for most tests: few compilations

jit_ajive = jax.jit(ajive, static_argnames=("signal_rank", "joint_rank"))
jit_sync = jax.jit(synchronise, static_argnames=("method", "signal_rank", "joint_rank", "floor"))


def extract(blocks, signal_rank, joint_rank=None, weights=None):
    """`ajive` with everybody present unless told otherwise: one program for both."""
    weights = jnp.ones(len(blocks)) if weights is None else jnp.asarray(weights, float)
    return jit_ajive(blocks, signal_rank, joint_rank=joint_rank, weights=weights)


def sync(moments, weights, **options):
    return jit_sync(moments, weights, **options)


def orthonormal(rng, rows, columns, away_from=None):
    frame = rng.normal(size=(rows, columns))
    if away_from is not None:
        frame -= away_from @ (away_from.T @ frame)
    return np.linalg.qr(frame)[0]


def planted(rng, joint, *, clients=C, d=D, n=N, s=S, noise=0.05):
    """Blocks whose s signals of strength 8..10 are `joint` common directions and individual ones."""
    common = orthonormal(rng, n, joint)
    blocks = []
    for _ in range(clients):
        own = orthonormal(rng, n, s - joint, away_from=common)
        loadings = orthonormal(rng, d, s) * rng.uniform(8, 10, size=s)
        noisy = noise * rng.normal(size=(d, n))
        blocks.append(loadings @ np.concatenate([common, own], axis=1).T + noisy)
    return np.stack(blocks), common


def random_cut(rng, clients, n, s, draws=200):
    """The reference's 95th percentile: the largest eigenvalue of a sum of random projections."""
    largest = []
    for _ in range(draws):
        stack = np.concatenate([orthonormal(rng, n, s) for _ in range(clients)], axis=1)
        largest.append(np.linalg.norm(stack, 2) ** 2)
    return np.percentile(largest, 95)


def wedin_cut(rng, blocks, s, draws=100):
    """The reference's 5th percentile over frames drawn away from the signal spaces."""
    total = np.zeros(draws)
    for x in blocks:
        u, sigma, vt = np.linalg.svd(x, full_matrices=False)
        for j in range(draws):
            right = orthonormal(rng, x.shape[1], s, away_from=vt[:s].T)
            left = orthonormal(rng, x.shape[0], s, away_from=u[:, :s])
            worst = max(np.linalg.norm(x @ right, 2), np.linalg.norm(x.T @ left, 2))
            total[j] += 1 - min(worst / sigma[s - 1], 1) ** 2
    return np.percentile(total, 5)


def reference(rng, blocks, s):
    """AJIVE as published, in float64 with full SVDs: joint parts, rank and spectrum."""
    spectra = [np.linalg.svd(x, full_matrices=False) for x in blocks]
    stack = np.concatenate([vt[:s].T for _, _, vt in spectra], axis=1)
    u, values, _ = np.linalg.svd(stack, full_matrices=False)
    spectrum = values[:s] ** 2
    cut = max(random_cut(rng, len(blocks), blocks.shape[2], s), wedin_cut(rng, blocks, s))
    keep = []
    for j in np.flatnonzero(spectrum > cut):
        norms = [np.linalg.norm(x @ u[:, j]) for x in blocks]
        if all(a >= (b[1][s - 1] + b[1][s]) / 2 for a, b in zip(norms, spectra, strict=True)):
            keep.append(j)
    basis = u[:, keep]
    return blocks @ basis @ basis.T, len(keep), spectrum


def projector(basis):
    return np.asarray(basis) @ np.asarray(basis).T


def in_float32(x):
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("joint", [0, 1, 2, 3])
def test_recovers_what_was_planted_as_the_sampled_reference_does(joint):
    rng = np.random.default_rng(joint)
    blocks, common = planted(rng, joint)
    want, rank, spectrum = reference(rng, blocks, S)
    got = extract(in_float32(blocks), S)
    assert rank == joint  # or the reference itself is at fault
    assert got.rank == joint and got.rank.dtype == jnp.int32
    np.testing.assert_allclose(got.joint, want, atol=1e-4)
    np.testing.assert_allclose(got.spectrum, spectrum, atol=1e-5)
    np.testing.assert_allclose(projector(got.basis), common @ common.T, atol=0.01)
    gram = got.basis.T @ got.basis
    np.testing.assert_allclose(gram, np.diag(np.arange(S) < joint), atol=1e-5)


@pytest.mark.parametrize("clients, n, s", [(2, 64, 4), (5, 60, 3), (10, 64, 4), (20, 120, 8)])
def test_closed_form_cut_is_near_the_sampled_random_cut(clients, n, s):
    sampled = random_cut(np.random.default_rng(0), clients, n, s, draws=60)
    noise = jnp.ones((clients, s + 1))  # no gap: the Wedin cut says nothing
    cut = shared_signal._cut(noise, jnp.ones(clients, bool), n)
    np.testing.assert_allclose(cut, sampled, rtol=0.05)


def test_closed_form_wedin_cut_is_at_most_the_sampled_one():
    rng = np.random.default_rng(0)
    blocks, _ = planted(rng, 1, noise=0.2)
    sigma = np.stack([np.linalg.svd(x, compute_uv=False)[: S + 1] for x in blocks])
    closed = C - np.sum((sigma[:, S] / sigma[:, S - 1]) ** 2)
    cut = shared_signal._cut(in_float32(sigma), jnp.ones(C, bool), N)
    np.testing.assert_allclose(cut, closed, rtol=1e-5)
    assert closed <= wedin_cut(rng, blocks, S)


def test_random_cut_is_out_of_reach_where_random_spaces_must_meet():
    blocks = in_float32(np.random.default_rng(0).normal(size=(3, 4, 4)))
    got = extract(blocks, 3)  # any three 3-dimensional spaces in R^4 share a line
    np.testing.assert_allclose(got.spectrum[0], 3, atol=1e-5)
    assert got.rank == 0


@pytest.mark.parametrize("own_rank, expected", [(D, S), (S, S), (2, 2), (1, 1), (0, 0)])
def test_identical_clients_share_all_of_their_signal(own_rank, expected):
    rng = np.random.default_rng(0)
    block = rng.normal(size=(D, own_rank)) @ rng.normal(size=(own_rank, N))
    got = extract(in_float32(np.broadcast_to(block, (C, D, N))), S)
    assert got.rank == expected
    if own_rank <= S:
        np.testing.assert_allclose(got.joint[0], block, atol=1e-4)


def test_zero_clients_share_nothing_even_at_a_fixed_rank():
    got = extract(jnp.zeros((C, D, N)), S, joint_rank=2)
    assert got.rank == 0 and not jnp.any(got.joint)


def test_small_singular_values_keep_their_directions():
    """One Gram matrix in float32 is off by 0.02 here, and by 1 at ten times the ratio."""
    rng = np.random.default_rng(0)
    right = orthonormal(rng, N, D)
    strengths = np.array([1e3, 500, 1] + [0.4] * (D - 3))
    block = (orthonormal(rng, D, D) * strengths) @ right.T
    got = extract(in_float32(np.broadcast_to(block, (C, D, N))), S, joint_rank=S)
    np.testing.assert_allclose(projector(got.basis), projector(right[:, :S]), atol=5e-4)


def test_every_unidentifiable_direction_is_dropped():
    """Two shared directions that one client lacks; a filter that stops at the first keeps one."""
    rng = np.random.default_rng(0)
    common = orthonormal(rng, N, S)
    strengths = np.array([10.0] * S + [7.0] * (D - S))  # little gap: a lenient Wedin cut
    blocks = []
    for client in range(C):
        held = common if client else common[:, :1]
        rest = orthonormal(rng, N, D - held.shape[1], away_from=common)
        right = np.concatenate([held, rest], axis=1)
        blocks.append((orthonormal(rng, D, D) * strengths) @ right.T)
    got = extract(in_float32(np.stack(blocks)), S)
    assert np.all(got.spectrum > 3.5)  # all three pass the cut of 2.55
    assert got.rank == 1
    np.testing.assert_allclose(projector(got.basis), projector(common[:, :1]), atol=1e-4)


def test_fixed_joint_rank_takes_the_leading_directions():
    blocks, _ = planted(np.random.default_rng(0), 1)
    stack = [np.linalg.svd(x)[2][:S].T for x in blocks]
    leading = np.linalg.svd(np.concatenate(stack, axis=1))[0][:, :2]
    got = extract(in_float32(blocks), S, joint_rank=2)
    assert got.rank == 2
    np.testing.assert_allclose(projector(got.basis), projector(leading), atol=1e-3)
    assert extract(in_float32(blocks), S, joint_rank=0).rank == 0


def test_permuting_clients_permutes_the_result():
    blocks, _ = planted(np.random.default_rng(0), 2)
    order = np.array([3, 0, 4, 2, 1])
    got, permuted = extract(in_float32(blocks), S), extract(in_float32(blocks[order]), S)
    np.testing.assert_allclose(permuted.joint, got.joint[order], atol=2e-5)
    np.testing.assert_allclose(permuted.spectrum, got.spectrum, atol=1e-5)
    np.testing.assert_allclose(projector(permuted.basis), projector(got.basis), atol=1e-5)


def test_scales_of_blocks_change_only_their_own_joint_part():
    blocks, _ = planted(np.random.default_rng(0), 2)
    scales = np.array([1e-12, 1e-3, 1.0, 70.0, 1e15])[:, None, None]
    got, scaled = extract(in_float32(blocks), S), extract(in_float32(blocks * scales), S)
    assert scaled.rank == got.rank == 2
    np.testing.assert_allclose(projector(scaled.basis), projector(got.basis), atol=1e-5)
    np.testing.assert_allclose(scaled.joint / scales, got.joint, atol=2e-5)


def test_masking_clients_equals_leaving_them_out():
    blocks, _ = planted(np.random.default_rng(0), 2)
    mask = np.array([1, 0, 1, 1, 0])
    held = in_float32(blocks[mask == 1])
    blocks[1], blocks[4] = np.nan, np.inf
    got = extract(in_float32(blocks), S, weights=mask)
    want = extract(held, S)
    assert got.rank == want.rank == 2
    np.testing.assert_allclose(got.spectrum, want.spectrum, atol=1e-5)
    np.testing.assert_allclose(got.joint[mask == 1], want.joint, atol=2e-5)
    assert not np.any(got.joint[mask == 0])


@pytest.mark.parametrize("joint_rank", [None, 2])
def test_nobody_taking_part_gives_zeros(joint_rank):
    blocks = in_float32(planted(np.random.default_rng(0), 2)[0])
    got = extract(blocks, S, joint_rank=joint_rank, weights=jnp.zeros(C))
    assert got.rank == 0
    assert not any(jnp.any(leaf) for leaf in got)


def test_one_participant_has_nobody_to_share_with():
    blocks = in_float32(planted(np.random.default_rng(0), 2)[0])
    assert extract(blocks, S, weights=jnp.arange(C) == 2).rank == 0


def mvlearn_ajive(monkeypatch):
    """The class, past package `__init__`s that import what mvlearn no longer installs with."""
    spec = importlib.util.find_spec("mvlearn")
    if spec is None:
        pytest.skip("mvlearn is not installed: pip install --no-deps mvlearn==0.5.0")
    root = spec.submodule_search_locations[0]
    for name, folder in [("", ""), (".embed", "/embed"), (".decomposition", "/decomposition")]:
        package = types.ModuleType("mvlearn" + name)
        package.__path__ = [root + folder]
        monkeypatch.setitem(sys.modules, "mvlearn" + name, package)
    try:
        return importlib.import_module("mvlearn.decomposition.ajive").AJIVE
    except ImportError as error:
        pytest.skip(f"mvlearn does not import: {error}")


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # it stacks with np.bmat
@pytest.mark.parametrize("joint", [1, 2])
def test_agrees_with_mvlearn(monkeypatch, joint):
    blocks, _ = planted(np.random.default_rng(joint), joint)
    blocks = blocks - blocks.mean(axis=2, keepdims=True)  # mvlearn always centres: now a no-op
    model = mvlearn_ajive(monkeypatch)(
        init_signal_ranks=[S] * C, random_state=0, n_wedin_samples=50, n_randdir_samples=50
    )
    theirs = model.fit_transform([x.T for x in blocks])  # its shared axis is the rows
    got = extract(in_float32(blocks), S)
    assert got.rank == model.joint_rank_ == joint
    np.testing.assert_allclose(got.spectrum, model.all_joint_svals_[:S] ** 2, atol=1e-5)
    np.testing.assert_allclose(got.joint, np.stack([x.T for x in theirs]), atol=1e-4)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    ranks=st.lists(st.integers(0, 6), min_size=4, max_size=4),
    exponents=st.lists(st.integers(-30, 30), min_size=4, max_size=4),
    same=st.booleans(),
    mask=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_properties_hold_for_any_rank_and_scale(seed, ranks, exponents, same, mask):
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(6, 10))
    rights = [common if same else rng.normal(size=(6, 10)) for _ in ranks]
    blocks = [rng.normal(size=(6, r)) @ v[:r] for r, v in zip(ranks, rights, strict=True)]
    scales = 10.0 ** np.array(exponents)[:, None, None]
    got = extract(in_float32(np.stack(blocks) * scales), 3, weights=mask)
    assert all(np.all(np.isfinite(leaf)) for leaf in got)
    assert 0 <= got.rank <= 3
    assert got.rank == np.sum(np.any(got.basis != 0, axis=0))
    assert np.all(got.spectrum >= 0) and got.spectrum[0] <= sum(mask) + 1e-4
    assert np.all(np.diff(got.spectrum) <= 1e-5)
    for x, joint, scale, present in zip(blocks, got.joint, scales, mask, strict=True):
        if not present:
            assert not np.any(joint)
            continue
        joint = np.asarray(joint, np.float64) / scale
        in_rows = joint @ projector(got.basis)
        np.testing.assert_allclose(in_rows, joint, atol=1e-4)  # J lies in the joint row space
        assert np.linalg.norm(joint) <= np.linalg.norm(x) * (1 + 1e-4)


def nonnegative(rng, clients=C, layers=(), d=D, n=N):
    """Like second moments: a common column profile with row energies and gamma noise."""
    profile = rng.gamma(1.0, size=(1, *layers, 1, n)) * rng.gamma(2.0, size=(1, *layers, d, 1))
    return in_float32(profile * rng.gamma(20.0, 1 / 20, size=(clients, *layers, d, n)))


WEIGHTS = jnp.array([0.1, 0.3, 0.2, 0.15, 0.25])


def test_mean_and_ajive_weigh_the_clients():
    moments = nonnegative(np.random.default_rng(0))
    mean, no_rank = sync(moments, WEIGHTS, method="mean", signal_rank=1)
    np.testing.assert_allclose(mean, np.einsum("c,cdn->dn", WEIGHTS, moments), rtol=1e-5)
    assert no_rank == -1
    synced, rank = sync(moments, WEIGHTS, method="ajive", signal_rank=1)
    assert rank == 1 and synced.shape == (D, N)
    joint = np.einsum("c,cdn->dn", WEIGHTS, extract(moments, 1).joint)
    floor = 1e-3 * mean.mean(axis=0, keepdims=True)
    np.testing.assert_allclose(synced, np.maximum(joint, floor), rtol=1e-4)


def test_unrelated_clients_fall_back_to_the_weighted_mean():
    blocks = abs(planted(np.random.default_rng(0), 0, noise=0)[0])
    shifted = in_float32(np.where(np.arange(N) // 12 == np.arange(C)[:, None, None], blocks, 0))
    synced, rank = sync(shifted, WEIGHTS, method="ajive", signal_rank=S)
    assert rank == 0
    np.testing.assert_array_equal(synced, sync(shifted, WEIGHTS, method="mean", signal_rank=S)[0])


def test_negative_entries_of_a_projection_are_clamped_to_the_floor():
    block = np.random.default_rng(0).gamma(0.3, size=(D, N))  # mostly small, so fits overshoot
    _, _, rows = np.linalg.svd(block)
    joint = block @ rows[:S].T @ rows[:S]
    assert joint.min() < -0.01
    floor = 0.1 * block.mean(axis=0, keepdims=True)
    moments = in_float32(np.broadcast_to(block, (C, D, N)))
    synced, rank = sync(moments, WEIGHTS, method="ajive", signal_rank=S, floor=0.1)
    assert rank == S
    np.testing.assert_allclose(synced, np.maximum(joint, floor), atol=1e-4)
    assert jnp.all(synced > 0)


@pytest.mark.parametrize("mask", [[1, 1, 1, 1, 1], [1, 0, 1, 1, 1], [0, 1, 0, 0, 1], [0, 0, 0, 1, 0]])
def test_median_counts_participants_only(mask):
    moments = np.array(nonnegative(np.random.default_rng(0)))
    mask = np.array(mask)
    want = np.median(moments[mask == 1], axis=0)
    moments[mask == 0] = np.nan
    weights = jnp.asarray(mask / mask.sum(), jnp.float32)
    got, rank = sync(jnp.asarray(moments), weights, method="median", signal_rank=S)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert rank == -1


@pytest.mark.parametrize("method", shared_signal.METHODS)
def test_absent_clients_leave_no_trace(method):
    moments = np.array(nonnegative(np.random.default_rng(0)))
    weights = jnp.array([0.5, 0.0, 0.3, 0.2, 0.0])
    options = {"method": method, "signal_rank": 1}
    want, want_rank = sync(jnp.asarray(moments), weights, **options)
    moments[1], moments[4] = np.inf, np.nan
    got, rank = sync(jnp.asarray(moments), weights, **options)
    np.testing.assert_array_equal(got, want)
    assert rank == want_rank
    nobody, _ = sync(jnp.asarray(moments), jnp.zeros(C), **options)
    assert not np.any(nobody)


@pytest.mark.parametrize("method", shared_signal.METHODS)
def test_layers_are_synced_each_by_itself(method):
    moments = nonnegative(np.random.default_rng(0), layers=(2, 3))
    got, ranks = sync(moments, WEIGHTS, method=method, signal_rank=1)
    assert got.shape == (2, 3, D, N) and ranks.shape == (2, 3) and ranks.dtype == jnp.int32
    for i, j in np.ndindex(2, 3):
        want, rank = sync(moments[:, i, j], WEIGHTS, method=method, signal_rank=1)
        np.testing.assert_allclose(got[i, j], want, rtol=1e-4)
        assert ranks[i, j] == rank


def test_vmap_over_layers_equals_a_loop():
    rng = np.random.default_rng(0)
    layers = in_float32(np.stack([planted(rng, joint)[0] for joint in range(S + 1)]))
    got = jax.jit(jax.vmap(partial(ajive, signal_rank=S)))(layers)
    np.testing.assert_array_equal(got.rank, np.arange(S + 1))
    for i, blocks in enumerate(layers):
        np.testing.assert_allclose(got.joint[i], extract(blocks, S).joint, atol=2e-5)


def test_no_batched_lapack_on_cpu():
    """Batches of LAPACK calls in one program can deadlock on CPUs with few cores: it must loop."""
    moments = jax.ShapeDtypeStruct((C, 2, 3, D, N), jnp.float32)
    text = jit_sync.lower(moments, WEIGHTS, method="ajive", signal_rank=S).as_text()
    batches = re.findall(r'num_batch_dims = "(\d+)"', text)
    assert batches and set(batches) == {"0"}


def test_second_call_does_not_recompile():
    traces = []

    @jax.jit
    def run(blocks, weights):
        traces.append(1)
        return ajive(blocks, 2, weights=weights).rank

    assert run(jnp.ones((2, 4, 6)), jnp.ones(2)) == 1
    assert run(jnp.zeros((2, 4, 6)), jnp.zeros(2)) == 0
    assert len(traces) == 1


def test_half_precision_is_widened():
    moments = jax.ShapeDtypeStruct((C, D, N), jnp.bfloat16)
    got = jax.eval_shape(partial(ajive, signal_rank=1), moments)
    assert got.joint.dtype == got.basis.dtype == got.spectrum.dtype == jnp.float32
    for method in shared_signal.METHODS:
        run = partial(synchronise, weights=WEIGHTS, method=method, signal_rank=1)
        assert [x.dtype for x in jax.eval_shape(run, moments)] == [jnp.float32, jnp.int32]


def test_float64_is_exact_and_float32_is_close(x64):
    rng = np.random.default_rng(0)
    blocks, _ = planted(rng, 2)
    want, rank, spectrum = reference(rng, blocks, S)
    got = extract(jnp.asarray(blocks, jnp.float64), S)
    assert got.joint.dtype == jnp.float64 and got.rank == rank
    np.testing.assert_allclose(got.joint, want, atol=1e-12)
    np.testing.assert_allclose(got.spectrum, spectrum, atol=1e-12)
    single = extract(in_float32(blocks), S)
    assert single.joint.dtype == jnp.float32 and single.rank.dtype == jnp.int32
    np.testing.assert_allclose(single.joint, got.joint, atol=2e-5)


def test_blocks_taller_than_the_shared_axis():
    block = np.random.default_rng(0).normal(size=(8, 5))
    got = extract(in_float32(np.broadcast_to(block, (3, 8, 5))), 2, joint_rank=2)
    leading = np.linalg.svd(block)[2][:2].T
    np.testing.assert_allclose(projector(got.basis), projector(leading), atol=1e-5)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x: ajive(x[0], 1), ["blocks", "[3, 6]", "stack"]),
        (lambda x: ajive(x, 3), ["signal_rank=3", "1..2", "3 x 6"]),
        (lambda x: ajive(x, 0), ["signal_rank=0"]),
        (lambda x: ajive(x[:, :1], 1), ["signal_rank=1", "d >= 2"]),
        (lambda x: ajive(x, 2, joint_rank=3), ["joint_rank=3", "0..2"]),
        (lambda x: ajive(x, 2, joint_rank=-1), ["joint_rank=-1"]),
        (lambda x: ajive(x, 2, weights=jnp.ones(3)), ["2 clients", "[3]"]),
        (lambda x: call_sync(x, method="mode"), ["'mode'", "mean, median, ajive"]),
        (lambda x: call_sync(x[0]), ["moments", "(3, 6)"]),
        (lambda x: call_sync(x, floor=-1.0), ["floor=-1.0"]),
        (lambda x: call_sync(x, method="ajive", signal_rank=3), ["signal_rank=3", "1..2"]),
        (lambda x: synchronise(x, jnp.ones(3), method="mean", signal_rank=1), ["2 clients", "[3]"]),
    ],
)
def test_errors_name_value_and_remedy(call, words):
    with pytest.raises(ValueError) as error:
        call(jnp.ones((2, 3, 6)))
    assert all(word in str(error.value) for word in words), error.value


def call_sync(moments, **options):
    options = {"method": "mean", "signal_rank": 1} | options
    return synchronise(moments, jnp.array([0.5, 0.5]), **options)
