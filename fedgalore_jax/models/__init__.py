"""Models with Hugging Face weights, as pure functions; the only door to flax and safetensors."""

from fedgalore_jax.models.configs import is_decoder
from fedgalore_jax.models.functional import ModelFns
from fedgalore_jax.models.generate import generate
from fedgalore_jax.models.peft import adapter_paths, save_adapter
from fedgalore_jax.models.weights import load, save

__all__ = ["ModelFns", "adapter_paths", "generate", "is_decoder", "load", "save", "save_adapter"]
