"""What a run would take: operations against XLA's own count and by hand, memory against the program's."""

import jax
import jax.numpy as jnp
import pytest

from fedgalore_jax import prepare
from fedgalore_jax.config import Config
from fedgalore_jax.forecast import flops, forecast


def counted(f, *shapes):
    return flops(jax.make_jaxpr(f)(*(jnp.zeros(shape) for shape in shapes)))


def test_products_and_convolutions_as_xla_counts_them():
    def f(image, kernel, left, right):
        patches = jax.lax.conv_general_dilated(
            image, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return patches.sum() + jnp.einsum("bij,bjk->bik", left, right).sum()

    shapes = (2, 16, 16, 3), (4, 4, 3, 8), (5, 6, 7), (5, 7, 9)
    assert counted(f, *shapes) == 2 * (2 * 16 * 8) * (4 * 4 * 3) + 2 * (5 * 6 * 9) * 7
    cost = jax.jit(f).lower(*(jnp.zeros(shape) for shape in shapes)).compile().cost_analysis()
    assert counted(f, *shapes) == pytest.approx(cost["flops"], rel=0.1)  # it counts the sums as well


def test_loops_count_as_often_as_they_turn_and_branches_once():
    def product(x):
        return x @ x

    def looped(x):
        x, _ = jax.lax.scan(lambda x, _: (jax.jit(product)(x), None), x, None, length=5)
        return jax.lax.cond(x.sum() > 0, product, lambda x: product(product(x)), x)

    def unknown(x, turns):
        return jax.lax.fori_loop(0, turns.astype(int)[0], lambda _, x: product(x), x)

    once = 2 * 4**3
    assert counted(looped, (4, 4)) == 7 * once
    assert counted(unknown, (4, 4), (1,)) == once
    assert counted(jax.vmap(looped), (3, 4, 4)) == 3 * (5 + 1 + 2) * once  # a select runs both branches


def test_a_forecast_is_of_the_rounds_of_the_run():
    """Twice the steps are twice the work; the best state is kept beside the last."""
    small = {"rounds": 2, "clients": 4, "cohort": 3, "batch_size": 4, "rank": 2, "method": "fedavg"}
    one, two = (
        prepare.prepare(Config(**small, local_steps=k, keep=keep)) for k, keep in ((1, "last"), (2, "best"))
    )
    ours, twice = forecast(one), forecast(two)
    assert twice.flops == pytest.approx(2 * ours.flops, rel=0.01)
    tokens, kernels = 3 * 4 * 17, 196_608  # clients x batch x (16 patches and a class token)
    assert 3 * 2 * tokens * kernels < ours.flops < 1.2 * 3 * 2 * tokens * kernels
    needs = two.compile().memory_analysis()
    weights = 4 * (196_608 + 650)  # as they were; the 4,928 that stay are not there twice
    parts = needs.argument_size_in_bytes + needs.temp_size_in_bytes + 2 * needs.output_size_in_bytes
    assert twice.memory == parts + weights
    assert ours.traffic == 2 * 3 * (one.wire.up + one.wire.down)
