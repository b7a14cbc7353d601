"""Products with adapted kernels: what they equal, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedgalore_jax import adapters
from fedgalore_jax.adapters import matmuls, merge
from fedgalore_jax.types import Adapted

m, n = 7, 5


def kernels():
    """A plain kernel between adapted ones of different ranks, one of which decays."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return [
        Adapted(draw(m, n), draw(m, 2), draw(2, n)),
        draw(m, n),
        Adapted(draw(m, n), draw(m, 3), draw(3, n), jnp.float32(0.9)),
        Adapted(draw(m, n), draw(m, 1), draw(1, n)),
    ], draw(4, m)


def test_each_product_is_that_of_the_merged_kernel():
    some, x = kernels()
    for y, kernel in zip(matmuls(x, some), some, strict=True):
        np.testing.assert_allclose(y, x @ merge(kernel), rtol=1e-5, atol=1e-5)
    assert matmuls(x, []) == []


def test_first_factors_read_x_once():
    """Four bases, one thin product for all three adapters, three second factors."""
    some, x = kernels()
    program = str(jax.make_jaxpr(lambda x: matmuls(x, some))(x))
    assert program.count("dot_general") == 4 + 1 + 3


def test_sums_may_be_wider_than_what_is_summed():
    some, x = kernels()
    narrow = matmuls(x.astype(jnp.bfloat16), some, jnp.float32)
    assert all(y.dtype == jnp.float32 for y in narrow)
    assert all(y.dtype == jnp.bfloat16 for y in matmuls(x.astype(jnp.bfloat16), some))


def test_decay_is_finer_than_bfloat16():
    """Whose numbers below 1 are 1/256 apart: a decay is rounded with its product, not before."""
    kernel = Adapted(jnp.full((m, n), 200 / m), jnp.zeros((m, 1)), jnp.zeros((1, n)), jnp.float32(0.998))
    (y,) = matmuls(jnp.ones((1, m), jnp.bfloat16), [kernel])
    assert (y == jnp.bfloat16(0.998 * 200)).all()


@pytest.mark.parametrize("few", [16, 0])
def test_merging_changes_no_number(monkeypatch, few):
    """Two forms of the same products: values and all gradients, under vmap over factors."""
    monkeypatch.setattr(adapters, "_FEW", few)
    some, _ = kernels()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 9, m)), jnp.float32)
    clients = [
        kernel._replace(b=jnp.stack([kernel.b, -kernel.b, 2 * kernel.b]))
        if isinstance(kernel, Adapted)
        else kernel
        for kernel in some
    ]
    axes = [Adapted(None, None, 0, None) if isinstance(kernel, Adapted) else None for kernel in some]

    def numbers():
        def total(x, kernels):
            ys = matmuls(x, kernels)
            return sum((y**2).sum() for y in ys), ys

        grads = jax.grad(total, (0, 1), has_aux=True)
        program = jax.vmap(grads, (0, axes))
        return str(jax.make_jaxpr(program)(x, clients)), program(x, clients)

    program, merged = numbers()
    assert "custom_vjp" in program
    monkeypatch.setattr(adapters, "_merging_pays", lambda x, kernels: False)
    program, plain = numbers()
    assert "custom_vjp" not in program
    assert jax.tree.structure(plain) == jax.tree.structure(merged)
    for ours, theirs in zip(jax.tree.leaves(merged), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_merging_is_for_more_tokens_than_a_kernel_has_rows(monkeypatch):
    some, _ = kernels()

    def products(x):
        return str(jax.make_jaxpr(lambda x: matmuls(x, some))(x)).count("dot_general")

    assert products(jnp.ones((5, m))) == 8
    assert products(jnp.ones((6, m))) == 3 + 1
    monkeypatch.setattr(adapters, "_FEW", 1)
    assert products(jnp.ones((6, m))) > 3 + 1
