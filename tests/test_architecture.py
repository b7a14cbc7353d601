"""The floors of the house: imports point downwards, and every heavy dependency has one door."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FLOORS = [
    {"types"},
    {"tree", "adapters", "lowrank", "config", "progress", "folder", "hosts"},
    {"placement"},
    {
        "galore",
        "shared_signal",
        "optimizer",
        "corrections",
        "models",
        "data",
        "metrics",
        "checkpoint",
        "privacy",
    },
    {"strategies", "tasks", "plans"},
    {"client", "aggregators"},
    {"engine", "evaluation", "defences", "loading", "journal"},
    {"blocks"},
    {"prepare"},
    {"results", "forecast"},
    {"train", "saved", "trials"},
    {"experiments"},
    {"run"},
]
DOORS = {
    "flax": {"models"},
    "safetensors": {"models"},
    "orbax": {"checkpoint"},
    "dp_accounting": {"privacy"},
    "transformers": {"data", "experiments"},  # tokenizers; the models that ours are timed against
    "datasets": {"data"},
    "pyarrow": {"data"},
    "scipy": {"data"},
    "sklearn": {"data"},
    "absl": {"experiments"},
    "matplotlib": {"experiments"},
    "PIL": {"data"},
    "gguf": {"experiments"},
    "tokenizers": {"experiments"},
}
ONLY_NUMPY = {"data", "metrics"}
FILES = sorted([*ROOT.glob("fedgalore_jax/**/*.py"), *ROOT.glob("experiments/**/*.py"), ROOT / "run.py"])


def room(file: pathlib.Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] != "fedgalore_jax" or len(parts) == 1 else parts[1]


def floor(name: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if name in rooms)


def imports(file: pathlib.Path):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(name: str) -> str | None:
    """The room an import leads to, if it leads into the house."""
    parts = name.split(".")
    if parts[0] == "fedgalore_jax" and len(parts) > 1:
        return parts[1]
    return "experiments" if parts[0] == "experiments" else None


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_downwards(file):
    if file == ROOT / "fedgalore_jax/__init__.py":
        return
    here = room(file)
    for name in imports(file):
        there = ours(name)
        if there is not None and there != here:
            assert floor(there) < floor(here), f"{here} may not import {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_every_dependency_has_one_door(file):
    here = room(file)
    for name in imports(file):
        package = name.split(".")[0]
        assert here in DOORS.get(package, {here}), f"{here} may not import {package}"
        if here in ONLY_NUMPY:
            assert package not in {"jax", "optax"}, f"{here} is NumPy only"


def test_every_room_is_on_a_floor():
    rooms = {room(file) for file in FILES} - {"__init__"}
    assert rooms == set().union(*FLOORS)


def test_importing_the_package_is_light():
    """Only jax and optax come in, and no device is touched."""
    code = (
        "import sys, fedgalore_jax, jax._src.xla_bridge as bridge;"
        "heavy = {'flax', 'orbax', 'transformers', 'datasets', 'sklearn', 'matplotlib'};"
        "print(sorted(heavy & set(sys.modules)), bridge.backends_are_initialized())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.strip() == "[] False", out.stderr
