"""Flags, one per field of `Config`, and their way into one `Config` per method."""

import ast
import dataclasses
import functools
import inspect
import pathlib
import re
from typing import Any, get_args, get_type_hints

from absl import flags

from fedgalore_jax import strategies
from fedgalore_jax.config import Config


class _Integers(flags.ArgumentParser):
    """Integers, comma-separated or on the lines of a file, as a tuple."""

    syntactic_help = "comma-separated integers, or a file of them"

    def parse(self, argument):
        """The tuple; absl turns a ValueError into a line that names the flag."""
        if re.fullmatch(r"[\d\s,+-]+", argument):
            return _integers(argument)
        try:
            return _integers(pathlib.Path(argument).read_text())
        except OSError as error:
            raise ValueError(f"neither integers nor a file of them: {error.strerror}") from None


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.split(r"\s*,\s*|\s+", text.strip()))


_DEFINE = {
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
    bool: flags.DEFINE_boolean,
    tuple[int, ...]: functools.partial(flags.DEFINE, _Integers(), serializer=flags.CsvListSerializer(",")),
}
_ELSEWHERE = ("method", "opt")


def define(values: flags.FlagValues) -> None:
    """Defines the flags of a run on `values`; help texts are the attribute docs of `Config`."""
    help_of = _attribute_docs(Config)
    types = get_type_hints(Config)
    for field in dataclasses.fields(Config):
        if field.name in _ELSEWHERE:
            continue
        (kind,) = [t for t in (get_args(types[field.name]) or (types[field.name],)) if t in _DEFINE]
        _DEFINE[kind](field.name, field.default, help_of[field.name], flag_values=values)
    flags.DEFINE_list(
        "method",
        ["fedgalore"],
        f"one strategy, or several on the same split, comma-separated: {', '.join(strategies.groups())}"
        " are groups of them",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "opt",
        [],
        "name=value, a strategy's own option; METHOD.name=value where several methods run",
        flag_values=values,
    )


def configs(values: flags.FlagValues) -> list[Config]:
    """One `Config` per method; each ValueError says which flag to change."""
    groups = strategies.groups()
    methods = [method for name in values.method for method in groups.get(name, (name,))]
    if not methods or len(set(methods)) < len(methods):
        raise ValueError(f"method={','.join(methods)!r}: name each method once")
    given = {
        field.name: values[field.name].value
        for field in dataclasses.fields(Config)
        if field.name not in _ELSEWHERE
    }
    options = _options(values.opt, methods)
    out = given.pop("out_dir")
    several = len(methods) > 1
    return [
        Config(
            **given,
            method=method,
            opt=options[method],
            out_dir=f"{out}/{method}" if several and out else out,
        )
        for method in methods
    ]


def _options(pairs: list[str], methods: list[str]) -> dict[str, dict[str, Any]]:
    """`["sync=mean", "fedit.lr=1e-3"]` as one dict per method."""
    options: dict[str, dict[str, Any]] = {method: {} for method in methods}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        prefix, dot, rest = name.partition(".")
        if not equals or not name or (dot and not rest):
            raise ValueError(f"opt={pair!r} is not name=value")
        if dot and prefix not in options:
            raise ValueError(f"opt={pair!r}: {prefix} is not among --method={','.join(methods)}")
        if not dot and len(methods) > 1:
            takes = [method for method in methods if name in strategies.options(method)]
            raise ValueError(f"opt={pair!r}: with several methods write {(takes or methods)[0]}.{pair}")
        options[prefix if dot else methods[0]][rest if dot else name] = _value(text)
    for method in methods:
        strategies.options(method)
    return options


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _attribute_docs(cls: type) -> dict[str, str]:
    """The `Attributes:` section of a docstring as a dict."""
    section = inspect.cleandoc(cls.__doc__ or "").split("Attributes:\n")[1]
    entries = re.split(r"^  (\w+): ", section, flags=re.MULTILINE)[1:]
    return {k: " ".join(v.split()) for k, v in zip(entries[::2], entries[1::2], strict=True)}
