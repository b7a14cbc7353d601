"""DeiT for image classification, as `DeiTForImageClassification`: a ViT with one more special token.

References:
  Touvron et al., Training data-efficient image transformers (2012.12877).
"""

import dataclasses

from fedgalore_jax.models import vit
from fedgalore_jax.models.functional import Transform

PREFIX = "deit."
HEAD = vit.HEAD
IGNORED = r"deit\.pooler\.|(cls|distillation)_classifier\."  # the two heads that distillation trained
MODULES = vit.MODULES


@dataclasses.dataclass(frozen=True)
class Config(vit.Config):
    """The fields of Hugging Face's `DeiTConfig`; see `vit.Config`."""

    special_tokens = ("cls_token", "distillation_token")


build, fields = vit.build, vit.fields


def table(config: Config) -> tuple[tuple[str, str, Transform], ...]:
    """Rows of our path (a regex), Hugging Face's name, and their view of our leaf."""
    return vit.table(config, PREFIX)


def files(config: Config) -> dict[str, dict]:
    """The JSON files beside the weights, by name; labels and the model type are added by `save`."""
    return vit.files(config, "DeiT")
