"""GaLore against the authors' code, optax's, plain optimizers, and its own contracts."""

import importlib.util
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedgalore_jax.galore import (
    SIDES,
    GaLoreState,
    MatrixAxes,
    find_basis,
    galore,
    in_subspace,
    project,
    project_back,
    scale_by_galore,
)
from fedgalore_jax.lowrank import FINDERS

KEY = jax.random.key(0)
ADAM = optax.scale_by_adam()


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def trajectory(tx, params, grads):
    """Params after each of a list of gradients."""

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, path = jax.jit(tx.init)(params), []
    for grad in grads:
        params, state = step(params, state, grad)
        path.append(params)
    return path, state


def assert_trees_close(actual, desired, **tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


# ---------------------------------------------------------------- against others' implementations


def galore_torch():
    """The authors' AdamW, around their `__init__`, which needs a GPU package."""
    torch = pytest.importorskip("torch")
    spec = importlib.util.find_spec("transformers") and importlib.util.find_spec("galore_torch")
    if spec is None:
        pytest.skip("needs galore-torch and transformers")
    folder = pathlib.Path(spec.origin).parent
    package = types.ModuleType("galore_torch_modules")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    module = importlib.import_module("galore_torch_modules.adamw")

    class Projector(module.GaLoreProjector):
        """Theirs, with our signs: a first moment outlives the basis it was made in."""

        def get_orthogonal_matrix(self, weights, rank, type):
            basis = super().get_orthogonal_matrix(weights, rank, type)
            axis = 0 if type == "left" else 1
            peak = basis.gather(axis, basis.abs().argmax(axis, keepdim=True))
            return basis * torch.where(peak < 0, -1.0, 1.0)

    module.GaLoreProjector = Projector
    return torch, module.AdamW


def scale_by_torch_adam(b1, b2, eps):
    """Adam with ε added before bias correction, as galore_torch has it."""

    def update(grads, state, params=None):
        del params
        count, mu, nu = state
        count = count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, nu, grads)
        size = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        return jax.tree.map(lambda m, v: size * m / (jnp.sqrt(v) + eps), mu, nu), (count, mu, nu)

    def init(params):
        return jnp.int32(0), *(jax.tree.map(jnp.zeros_like, params) for _ in range(2))

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize(("eps", "decay"), [(1e-2, 0.1), (0.0, 0.1), (0.0, 0.0)])
def test_equals_galore_torch_step_for_step(eps, decay):
    torch, adamw = galore_torch()
    shapes = {"wide": (6, 9), "tall": (9, 6), "square": (7, 7)}  # in x out
    params = {name: normal(*shape, seed=1) for name, shape in shapes.items()}
    grads = [{name: normal(*shape, seed=10 + step) for name, shape in shapes.items()} for step in range(8)]
    lr, scale, b1, b2, gap = 0.05, 0.25, 0.9, 0.99, 3
    theirs = {name: torch.nn.Parameter(torch.tensor(p.T.copy())) for name, p in params.items()}
    group = {"params": list(theirs.values()), "rank": 2, "update_proj_gap": gap}
    group |= {"scale": scale, "proj_type": "std"}
    options = {"betas": (b1, b2), "eps": eps, "weight_decay": decay, "no_deprecation_warning": True}
    optimizer = adamw([group], lr=lr, **options)
    subspace = {"finder": "svd", "side": "short", "refresh_every": gap}
    subspace["scale"] = scale * (1 - lr * decay)  # they decay the step as well
    if eps == 0:  # then both conventions agree
        tx = galore(lr, 2, b1=b1, b2=b2, eps=0.0, weight_decay=decay, **subspace)
    else:
        inner = scale_by_galore(scale_by_torch_adam(b1, b2, eps), 2, **subspace)
        decayed = optax.add_decayed_weights(decay)
        tx = optax.chain(inner, decayed, optax.scale_by_learning_rate(lr))
    for grad, ours in zip(grads, trajectory(tx, params, grads)[0], strict=True):
        for name, p in theirs.items():
            p.grad = torch.tensor(grad[name].T.copy())
        optimizer.step()
        for name, p in theirs.items():
            np.testing.assert_allclose(ours[name], p.detach().numpy().T, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(("b1", "gap"), [(0.9, 100), (0.0, 3)], ids=["one basis", "refreshed"])
def test_equals_optax_contrib(b1, gap):
    # With b1 > 0 a refresh would carry the first moment over to vectors of other, arbitrary signs.
    params = {"wide": normal(5, 8), "tall": normal(8, 5), "square": normal(6, 6), "bias": normal(4)}
    grads = [jax.tree.map(lambda p, s=s: normal(*p.shape, seed=s), params) for s in range(5)]
    theirs = optax.contrib.galore(
        0.1, 2, update_proj_gap=gap, scale=0.5, base_optimizer=optax.scale_by_adam(b1, 0.99)
    )
    inner = optax.scale_by_adam(b1, 0.99)
    ours = scale_by_galore(inner, 2, side="long", finder="svd", scale=0.5, refresh_every=gap)
    ours = optax.chain(ours, optax.scale_by_learning_rate(0.1))
    actual, desired = (trajectory(tx, params, grads)[0] for tx in (ours, theirs))
    assert_trees_close(actual, desired, atol=2e-5)


def test_full_rank_is_the_inner_optimizer_exactly():
    params = {"kernel": normal(4, 6), "bias": normal(6)}
    grads = [jax.tree.map(lambda p, s=s: normal(*p.shape, seed=s), params) for s in range(3)]
    full, plain = (trajectory(tx, params, grads)[0] for tx in (scale_by_galore(ADAM, 4, scale=3.0), ADAM))
    assert_trees_close(full, plain, rtol=0, atol=0)


# ------------------------------------------------------------------------------------ the subspace


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)], ids=["wide", "tall", "square"])
def test_projection_against_numpy(shape, side):
    grad = normal(*shape, dtype=np.float64)
    m, n = shape
    left = {"left": True, "right": False, "short": m <= n, "long": m >= n}[side]
    u, s, vt = np.linalg.svd(grad)
    desired = (u[:, :2] * s[:2]) @ vt[:2]
    tx = scale_by_galore(optax.identity(), 2, side=side, finder="svd", scale=0.5)
    updates, state = tx.update(grad, tx.init(grad))
    np.testing.assert_allclose(updates, 0.5 * desired, atol=1e-12)
    assert state.basis.shape == (m if left else n, 2)
    assert state.basis.dtype == jnp.float64
    side = "left" if left else "right"
    reduced = project(grad, state.basis, side)
    assert reduced.shape == ((2, n) if left else (m, 2))
    np.testing.assert_allclose(project_back(reduced, state.basis, side), desired, atol=1e-12)


@pytest.mark.parametrize("finder", FINDERS)
def test_first_step_of_sgd_keeps_a_planted_gradient(finder):
    grad = jnp.asarray(normal(12, 2) @ normal(2, 9, seed=1))
    tx = scale_by_galore(optax.identity(), 2, finder=finder)
    lost = jnp.linalg.norm(jax.jit(tx.update)(grad, tx.init(grad))[0] - grad)
    lost = lost / jnp.linalg.norm(grad)
    assert lost > 0.1 if finder == "random" else lost < 1e-4


@pytest.mark.parametrize("side", SIDES)
def test_side_is_decided_by_the_weight_never_by_its_coordinates(side):
    # Coordinates [3, 4] of [9, 4] have another longer side, and [3, 3] of [9, 3] have none.
    grads = [normal(9, 4), normal(9, 3)]
    tx = in_subspace(optax.scale(2.0), 3, side=side)
    bases, _ = find_basis(KEY, grads, 3, finder="random", side=side)
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads), basis=bases)
    left = side in ("left", "long")
    for grad, p, update in zip(grads, bases, updates, strict=True):
        if not left and grad.shape == (9, 3):  # full rank
            assert p == optax.MaskedNode()
            p = np.eye(3)
        assert p.shape == ((9, 3) if left else (grad.shape[1], 3))
        desired = p @ (p.T @ grad) if left else (grad @ p) @ p.T
        np.testing.assert_allclose(update, 2 * desired, atol=1e-5)


@pytest.mark.parametrize("finder", FINDERS)
def test_rank_beyond_the_gradients_own(finder):
    grad = normal(9, 2)  # the basis must be filled up, and loses nothing
    tx = scale_by_galore(optax.identity(), 4, side="left", finder=finder)
    updates, state = jax.jit(tx.update)(grad, tx.init(grad))
    np.testing.assert_allclose(state.basis.T @ state.basis, np.eye(4), atol=1e-5)
    assert (np.abs(updates - grad).max() < 1e-5) == (finder != "random")


def test_refreshes_at_multiples_of_refresh_every_only():
    params = normal(6, 8)
    tx = scale_by_galore(ADAM, 2, refresh_every=3, finder="subspace")
    update, state, changed = jax.jit(tx.update), tx.init(params), []
    for step in range(7):
        old = state.basis
        _, state = update(normal(6, 8, seed=step), state)
        changed.append(bool(np.any(old != state.basis)))
    assert changed == [True, False, False, True, False, False, True]
    assert state.count == 7


def test_random_bases_come_from_the_seed_the_count_and_the_leaf():
    params = {"a": normal(6, 8), "b": normal(6, 8)}
    tx, other = (scale_by_galore(ADAM, 2, refresh_every=1, finder="random", seed=seed) for seed in (3, 4))
    state = tx.init(params)
    key = jax.random.fold_in(jax.random.key(3), 0)
    drawn, refused = find_basis(key, params, 2, finder="random")
    assert refused == 0
    assert_trees_close(state.basis, drawn, rtol=0, atol=1e-6)
    _, first = tx.update(params, state)
    assert_trees_close(first.basis, drawn, rtol=0, atol=1e-6)
    _, second = tx.update(params, first)
    for basis in (drawn["b"], other.init(params).basis["a"], second.basis["a"]):
        assert np.abs(basis - drawn["a"]).max() > 0.1


@pytest.mark.parametrize("finder", ["svd", "gram", "subspace"])
def test_zero_and_nan_gradients_keep_the_basis_and_count(finder):
    params = {"stack": normal(3, 5, 6), "plain": normal(5, 6), "bias": normal(6)}
    tx = scale_by_galore(ADAM, 2, finder=finder, refresh_every=1)
    update, state = jax.jit(tx.update), tx.init(params)
    first = state.basis
    np.testing.assert_allclose(first["plain"].T @ first["plain"], np.eye(2), atol=1e-6)
    grads = dict(params)
    grads["stack"] = params["stack"] * np.float32([1, 0, np.nan])[:, None, None]
    _, state = update(grads, state)
    assert state.rejected == 2
    np.testing.assert_array_equal(state.basis["stack"][1:], first["stack"][1:])
    assert np.abs(state.basis["stack"][0] - first["stack"][0]).max() > 0.1
    _, state = update(grads | {"plain": np.full((5, 6), np.inf, np.float32)}, state)
    assert state.rejected == 2 + 3


# --------------------------------------------------------------------------- shapes, masks, dtypes


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_a_stack_equals_its_matrices_one_by_one(shape):
    params = normal(2, *shape)
    grads = [normal(2, *shape, seed=s) for s in range(1, 4)]
    tx = scale_by_galore(ADAM, 2, finder="svd", refresh_every=2)
    stacked = trajectory(tx, params, grads)[0][-1]
    split = trajectory(tx, list(params), [list(grad) for grad in grads])[0][-1]
    np.testing.assert_allclose(stacked, np.stack(split), atol=1e-5)


@pytest.mark.parametrize("axes", [MatrixAxes(1, 2), MatrixAxes(2, 1)])
def test_attention_kernels_equal_their_reshaped_matrices(axes):
    shape = (6, 2, 4) if axes.rows == 1 else (2, 4, 6)
    flat = (6, 8) if axes.rows == 1 else (8, 6)
    params = [normal(*shape), normal(3, *shape, seed=1)]  # the second is a scanned stack
    grads = [[normal(*p.shape, seed=s) for p in params] for s in range(1, 4)]
    reshape = lambda tree: [tree[0].reshape(flat), tree[1].reshape(3, *flat)]  # noqa: E731
    options = {"finder": "svd", "refresh_every": 2}
    heads = trajectory(scale_by_galore(ADAM, 2, mask=[axes, axes], **options), params, grads)[0]
    matrices = trajectory(scale_by_galore(ADAM, 2, **options), reshape(params), [reshape(g) for g in grads])[
        0
    ]
    assert_trees_close(reshape(heads[-1]), matrices[-1], atol=1e-5)
    assert heads[-1][0].shape == shape


def test_masks():
    params = {"block": {"in": normal(5, 6), "out": normal(6, 5)}, "head": normal(5, 4)}
    tree = {"block": True, "head": False}  # a prefix
    bases = [
        jax.jit(scale_by_galore(ADAM, 2, mask=mask).init)(params).basis
        for mask in (
            tree,
            {"block": {"in": True, "out": True}, "head": False},
            lambda p: {
                "block": jax.tree.map(lambda leaf: leaf.ndim == 2, p["block"]),
                "head": False,
            },
        )
    ]
    for basis in bases:
        assert basis["head"] == optax.MaskedNode()
        assert [leaf.shape for leaf in jax.tree.leaves(basis)] == [(5, 2), (5, 2)]
    grads = jax.tree.map(lambda p: normal(*p.shape, seed=1), params)
    tx = scale_by_galore(ADAM, 2, finder="svd", mask=tree)
    updates, state = jax.jit(tx.update)(grads, jax.jit(tx.init)(params))
    plain, _ = ADAM.update(grads["head"], ADAM.init(params["head"]))
    np.testing.assert_allclose(updates["head"], plain, rtol=1e-6)
    assert state.inner.mu["head"].shape == (5, 4)
    assert state.inner.mu["block"]["out"].shape == (6, 2)


def test_bfloat16_is_computed_in_float32():
    params = {"kernel": jnp.asarray(normal(6, 8), jnp.bfloat16), "bias": jnp.zeros(4, jnp.bfloat16)}
    grads = jax.tree.map(lambda p: jnp.asarray(normal(*p.shape, seed=1), p.dtype), params)
    tx = scale_by_galore(ADAM, 2, finder="svd")
    updates, state = tx.update(grads, tx.init(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype(jnp.float32)}
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads)
    desired = tx.update(wide, tx.init(wide))[0]
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), desired)
    assert_trees_close(updates, rounded, rtol=0, atol=0)


def test_inner_transforms_see_projected_params_and_extra_args():
    seen = {}

    def update(updates, state, params=None, *, loss, **extra_args):
        seen.update(params=params, loss=loss, rest=extra_args)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda _: (), update)
    params = {"kernel": normal(5, 8), "bias": normal(8)}
    tx = scale_by_galore(inner, 2)
    _, state = tx.update(params, tx.init(params), params, loss=3.0)
    assert seen["loss"] == 3.0
    assert seen["rest"] == {}
    desired = state.basis["kernel"].T @ params["kernel"]
    np.testing.assert_allclose(seen["params"]["kernel"], desired, atol=1e-6)
    np.testing.assert_array_equal(seen["params"]["bias"], params["bias"])


# ------------------------------------------------------------------------------------ in_subspace


def test_in_subspace_with_galores_bases_is_galore():
    params = {"kernel": normal(5, 8), "bias": normal(8)}
    tx = scale_by_galore(ADAM, 2, refresh_every=2, scale=0.5)
    core = in_subspace(ADAM, 2, scale=0.5)
    both = jax.jit(
        lambda grads, state, inner: (
            (out := tx.update(grads, state)),
            core.update(grads, inner, basis=out[1].basis),
        )
    )
    state, inner = tx.init(params), core.init(params)
    for seed in range(3):
        grads = jax.tree.map(lambda p, s=seed: normal(*p.shape, seed=s), params)
        (desired, state), (updates, inner) = both(grads, state, inner)
        assert_trees_close((updates, inner), (desired, state.inner), atol=1e-6)


def test_in_subspace_refuses_a_basis_that_does_not_fit():
    grad = normal(5, 8)
    tx = in_subspace(ADAM, 2)
    with pytest.raises(ValueError, match=r"shape \(5, 1\) for \(5, 8\), needs \(5, 2\): use find_basis"):
        tx.update(grad, tx.init(grad), basis=jnp.ones((5, 1)))
    with pytest.raises(ValueError, match="needs None"):
        tx.update(grad[0], tx.init(grad[0]), basis=jnp.ones((5, 2)))
    with pytest.raises(TypeError, match="basis"):
        tx.update(grad, tx.init(grad))


# ------------------------------------------------------------------------- under jit, vmap and scan


def decompositions(jaxpr, conditional=False):
    """For every decomposition in a jaxpr, whether it sits under a cond."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("svd", "eigh"):
            yield conditional
        for sub in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns")):
            sub = getattr(sub, "jaxpr", sub)
            if hasattr(sub, "eqns"):
                yield from decompositions(sub, conditional or eqn.primitive.name == "cond")


@pytest.mark.parametrize("finder", ["svd", "gram"])
def test_the_decomposition_stays_conditional_for_clients_under_vmap(finder):
    tx = scale_by_galore(ADAM, 2, finder=finder)
    state = tx.init(jnp.zeros((5, 8)))

    def client(grads, state):
        return jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], state, grads)

    def traced(axes, state):
        grads = jnp.ones((4, 3, 5, 8))
        run = jax.vmap(client, in_axes=(0, axes), out_axes=(axes, 0))
        return list(decompositions(jax.make_jaxpr(run)(grads, state).jaxpr))

    rows = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), state)
    assert traced(GaLoreState(None, 0, 0, 0), rows._replace(count=state.count)) == [True]
    # A batched counter turns cond into select: the walk would notice.
    assert traced(0, rows) == [False]


def test_vmap_over_clients_equals_a_loop():
    grads = normal(4, 3, 5, 8)
    tx = scale_by_galore(ADAM, 2, refresh_every=2, finder="gram")
    state = tx.init(grads[0, 0])

    def client(grads):
        return jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], state, grads)

    last, updates = jax.jit(jax.vmap(client, out_axes=(GaLoreState(None, 0, 0, 0), 0)))(grads)
    assert last.count == 3
    one = jax.jit(client)
    for i in range(4):
        np.testing.assert_allclose(updates[i], one(grads[i])[1], atol=1e-5)


def test_a_second_call_does_not_compile_and_the_state_keeps_its_types():
    params = {"kernel": normal(5, 8), "bias": normal(8)}
    tx = galore(optax.linear_schedule(0.1, 0.0, 10), 2, weight_decay=0.1, refresh_every=2)
    traces = []

    @jax.jit
    def update(grads, state, params):
        traces.append(None)
        return tx.update(grads, state, params)

    state = tx.init(params)
    types_before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), state)
    for _ in range(3):
        _, state = update(params, state, params)
    assert len(traces) == 1
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), state) == types_before


@pytest.mark.parametrize("finder", FINDERS)
def test_a_new_state_may_be_given_up(finder):
    """No buffer is in it twice."""
    params = {"kernel": normal(5, 8), "bias": normal(8)}
    tx = galore(0.1, 2, finder=finder)
    update = jax.jit(lambda grads, state: tx.update(grads, state, grads), donate_argnums=1)
    want, _ = tx.update(params, tx.init(params), params)
    updates, _ = update(params, tx.init(params))
    np.testing.assert_allclose(updates["kernel"], want["kernel"], atol=1e-5)


# -------------------------------------------------------------------------- composition with optax


def composed(name, tx, params):
    """The same optimizer, wrapped."""
    if name == "chain":
        return optax.chain(optax.clip_by_global_norm(1e9), tx)
    if name == "multi_transform":
        return optax.multi_transform({"all": tx, "none": optax.set_to_zero()}, "all")
    if name == "inject_hyperparams":
        make = optax.inject_hyperparams(galore, static_args=("rank", "refresh_every", "seed"))
        return make(learning_rate=0.1, rank=2, refresh_every=2, finder="svd")
    if name == "masked":
        return optax.masked(tx, jax.tree.map(lambda _: True, params))
    return optax.MultiSteps(tx, 1)


@pytest.fixture(scope="module")
def plain():
    """A short run of `galore` on its own."""
    params = {"kernel": normal(5, 8), "bias": normal(8)}
    grads = [jax.tree.map(lambda p, s=s: normal(*p.shape, seed=s), params) for s in range(3)]
    tx = galore(0.1, 2, refresh_every=2, finder="svd")
    return tx, params, grads, trajectory(tx, params, grads)[0]


@pytest.mark.parametrize("name", ["chain", "multi_transform", "inject_hyperparams", "masked", "MultiSteps"])
def test_composes_with_optax(name, plain):
    tx, params, grads, path = plain
    wrapped = composed(name, tx, params)
    assert_trees_close(trajectory(wrapped, params, grads)[0], path, atol=1e-5)


def test_multi_transform_gives_each_group_its_own_rank():
    params = {"wide": normal(5, 8), "tall": normal(8, 5), "bias": normal(8)}
    labels = {"wide": "one", "tall": "two", "bias": "one"}
    mask = {"wide": True, "tall": True, "bias": False}  # of all params, though a group sees its own
    ranks = {"one": 1, "two": 2}
    groups = {name: galore(0.1, rank, finder="svd", mask=mask) for name, rank in ranks.items()}
    path, state = trajectory(optax.multi_transform(groups, labels), params, [params])
    shapes = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim == 2]
    assert sorted(shapes) == [(1, 8), (1, 8), (5, 1), (5, 2), (8, 2), (8, 2)]
    plain = trajectory(optax.adam(0.1, eps=1e-6), params["bias"], [params["bias"]])[0]
    np.testing.assert_allclose(path[0]["bias"], plain[0], atol=1e-6)


def test_multi_steps_accumulates_whole_gradients():
    params = {"kernel": normal(5, 8)}
    halves = [{"kernel": normal(5, 8, seed=s)} for s in range(4)]
    means = [{"kernel": (halves[i]["kernel"] + halves[i + 1]["kernel"]) / 2} for i in (0, 2)]
    tx = galore(0.1, 2, refresh_every=1, finder="svd")
    accumulated = trajectory(optax.MultiSteps(tx, 2), params, halves)[0]
    assert_trees_close(accumulated[1::2], trajectory(tx, params, means)[0], atol=1e-5)


def test_tree_map_params_reaches_the_moments():
    params = {"kernel": normal(5, 8), "bias": normal(8)}
    tx = galore(0.1, 2, mask={"kernel": True, "bias": False})
    state = optax.tree_map_params(tx, lambda leaf: leaf + 1, tx.init(params))
    np.testing.assert_array_equal(state[0].inner.mu["kernel"], np.ones((2, 8)))
    assert state[0].count == 0


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank=0: use a number from 1"),
        ({"rank": 2.0}, TypeError, r"rank=2\.0: pass a Python int"),
        ({"rank": True}, TypeError, "rank=True: pass a Python int"),
        ({"refresh_every": 0}, ValueError, "refresh_every=0: use a number from 1"),
        ({"finder": "pca"}, ValueError, "finder='pca': choose one of svd, gram, subspace, random"),
        ({"side": "up"}, ValueError, "side='up': choose one of short, long, left, right"),
        ({"scale": float("nan")}, ValueError, "scale=nan: use"),
        ({"learning_rate": float("inf")}, ValueError, "learning_rate=inf: use"),
        ({"b2": 1.0}, ValueError, r"b2=1\.0: use a number from 0 to below 1"),
        ({"weight_decay": -0.1}, ValueError, r"weight_decay=-0\.1: use a number from 0"),
        ({"seed": 1.5}, TypeError, r"seed=1\.5: pass a Python int"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_fail_at_construction(change, error, message):
    with pytest.raises(error, match=message):
        galore(**{"learning_rate": 0.1, "rank": 2, **change})


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ("yes", TypeError, "mask has a leaf 'yes': use True, False or MatrixAxes"),
        (MatrixAxes(2, 2), ValueError, r"MatrixAxes\(rows=2, columns=2\) for a leaf of shape"),
        (MatrixAxes(0, 1), ValueError, r"MatrixAxes\(rows=0, columns=1\) for a leaf of shape"),
    ],
)
def test_masks_that_do_not_fit(mask, error, message):
    with pytest.raises(error, match=message):
        galore(0.1, 2, mask={"kernel": mask}).init({"kernel": jnp.zeros((3, 4, 5))})


def test_complex_kernels_are_refused_and_may_be_masked():
    params = {"kernel": jnp.ones((5, 8), jnp.complex64)}
    with pytest.raises(TypeError, match="a leaf is complex64: mask it"):
        galore(0.1, 2).init(params)
    galore(0.1, 2, mask=False).init(params)
