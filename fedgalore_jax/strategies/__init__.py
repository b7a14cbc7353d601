"""Federated algorithms by name: `build("fedgalore", lr=1e-3, sync="ajive")`."""

import inspect
import typing
from collections.abc import Callable
from dataclasses import fields

from fedgalore_jax.config import mistyped
from fedgalore_jax.strategies.adel_fl import adel_fl
from fedgalore_jax.strategies.base import Common, Strategy
from fedgalore_jax.strategies.dual_adapter import dual_adapter
from fedgalore_jax.strategies.fedadamw import fedadamw
from fedgalore_jax.strategies.fedavg import fedavg
from fedgalore_jax.strategies.feddyn import feddyn
from fedgalore_jax.strategies.fedex_lora import fedex_lora
from fedgalore_jax.strategies.fedgalore import fedgalore
from fedgalore_jax.strategies.fedglomo import fedglomo
from fedgalore_jax.strategies.fedit import fedit
from fedgalore_jax.strategies.fedlada import fedlada
from fedgalore_jax.strategies.fedlore import fedlore
from fedgalore_jax.strategies.fedopt import fedopt
from fedgalore_jax.strategies.fedprox import fedprox
from fedgalore_jax.strategies.fedsa_lora import fedsa_lora
from fedgalore_jax.strategies.fedslop import fedslop
from fedgalore_jax.strategies.fedsmoo import fedsmoo
from fedgalore_jax.strategies.fedzmg import fedzmg
from fedgalore_jax.strategies.ffa_lora import ffa_lora
from fedgalore_jax.strategies.flexlora import flexlora
from fedgalore_jax.strategies.flora import flora
from fedgalore_jax.strategies.fr_lora import fr_lora
from fedgalore_jax.strategies.galore_avg import galore_avg
from fedgalore_jax.strategies.hetlora import hetlora
from fedgalore_jax.strategies.ilora import ilora
from fedgalore_jax.strategies.lora_a2 import lora_a2
from fedgalore_jax.strategies.lora_fair import lora_fair
from fedgalore_jax.strategies.rolora import rolora
from fedgalore_jax.strategies.scaffold import scaffold
from fedgalore_jax.strategies.ssf import ssf

_Method = typing.TypeVar("_Method", bound=Callable[..., Strategy])

_GROUPS = {
    "full": (
        fedadamw,
        fedavg,
        feddyn,
        fedglomo,
        fedlada,
        fedopt,
        fedprox,
        fedsmoo,
        fedzmg,
        scaffold,
    ),
    "subspace": (fedgalore, fedlore, fedslop, galore_avg, ssf),
    "lora": (
        dual_adapter,
        fedex_lora,
        fedit,
        fedsa_lora,
        ffa_lora,
        flexlora,
        flora,
        fr_lora,
        hetlora,
        ilora,
        lora_a2,
        lora_fair,
        rolora,
    ),
    "system": (adel_fl,),
}
"""By what clients train of a kernel: all of it, a gradient subspace, LoRA factors; or around another."""
_STRATEGIES = {method.__name__: method for group in _GROUPS.values() for method in group}
_AROUND = {"adel_fl": "fedavg"}
"""Those around another method, and which it is by default."""
_RANKS = ("flexlora", "flora", "hetlora", "ilora")
"""Those whose clients may have different ranks."""
_COMMON = tuple(field.name for field in fields(Common))


def names() -> tuple[str, ...]:
    """All strategies' names, sorted."""
    return tuple(sorted(_STRATEGIES))


def register(method: _Method) -> _Method:
    """Makes a method of your own known by its name, to `build` and so to `Config(method=...)`; a decorator.

    Args:
      method: `(common, *, options) -> Strategy`, as those here.

    Raises:
      ValueError: there is one of that name.
    """
    name = method.__name__
    if name in _STRATEGIES:
        raise ValueError(f"there is a method {name!r} already: give yours another name")
    _STRATEGIES[name] = method
    return method


def groups() -> dict[str, tuple[str, ...]]:
    """Strategies' names by what clients train of a kernel, and "all"."""
    return {"all": names()} | {
        name: tuple(method.__name__ for method in group) for name, group in _GROUPS.items()
    }


def options(name: str) -> dict[str, object]:
    """A strategy's own options with their defaults (those of `Common` are shared by all).

    One around another method has an option `base`, and takes that method's besides.
    """
    _check_name(name)
    parameters = inspect.signature(_STRATEGIES[name]).parameters.values()
    own: dict[str, object] = {"base": _AROUND[name]} if name in _AROUND else {}
    return own | {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def build(name: str, **given) -> Strategy:
    """Builds a strategy.

    Args:
      name: one of `names()`.
      **given: fields of `Common` (`lr` has no default) and the strategy's own `options(name)`.

    Raises:
      ValueError: an unknown name or option, or a value that cannot be used; the message lists the
        accepted ones.
    """
    own, base = options(name), _base(name, given)
    accepted = (*own, *(options(base) if base else ()), *_COMMON)
    if unknown := [key for key in given if key not in accepted]:
        raise ValueError(f"{name} has no option {unknown[0]!r}: its options are {', '.join(accepted)}")
    inside: typing.Any = None
    if base:
        inside = build(base, **{key: value for key, value in given.items() if key not in own})
        given = {key: value for key, value in given.items() if key in own and key != "base"}
    hints = typing.get_type_hints(Common) | typing.get_type_hints(_STRATEGIES[name])
    for key, value in given.items():
        if wanted := mistyped(value, hints.get(key, object)):
            raise ValueError(f"{name}: {key}={value!r} is not usable: give {wanted}")
    if given.get("ranks") and name not in _RANKS:
        raise ValueError(f"{name} has one rank for all, not ranks={given['ranks']}: try {', '.join(_RANKS)}")
    common = inside or Common(**{key: value for key, value in given.items() if key in _COMMON})
    return _STRATEGIES[name](common, **{key: value for key, value in given.items() if key in own})


def _base(name: str, given: dict[str, typing.Any]) -> str | None:
    """The method inside one that is around another."""
    if name not in _AROUND:
        return None
    base = given.get("base", _AROUND[name])
    _check_name(base)
    if base in _AROUND:
        raise ValueError(f"{name}: base={base!r} is not usable: give a method that needs no base")
    return base


def _check_name(name: str) -> None:
    if name not in _STRATEGIES:
        raise ValueError(f"unknown method {name!r}: choose from {', '.join(names())}")
