"""Shared by all tests. Everything runs on the CPU and in float32 unless a test asks for x64."""

import os

# Many small decompositions gain nothing from BLAS threads, and lose much to them on a busy machine.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Tiny models run as fast without LLVM's optimiser, which takes a third of the whole suite's time.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}"

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """Turns on 64-bit arithmetic for one test."""
    with jax.enable_x64(True):
        yield
