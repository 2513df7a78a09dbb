"""Every module says what it is and what it offers, and offers what it says."""

import importlib
import pkgutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hw", "sim", "host", "golden", "bitstream")


def modules():
    for package in PACKAGES:
        yield f"skipopu.{package}"
        for info in pkgutil.walk_packages([str(ROOT / package)], f"skipopu.{package}."):
            yield info.name


def test_every_source_file_is_a_module():
    files = {f"skipopu.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}".removesuffix(".__init__")
             for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert files == set(modules())


@pytest.mark.parametrize("name", list(modules()))
def test_module_is_documented_and_its_names_exist(name):
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip(), f"{name} has no docstring"
    if hasattr(module, "__path__") and not module.__dict__.get("__all__"):
        return  # a package may be a folder only
    names = module.__all__
    assert len(set(names)) == len(names), f"{name} lists a name twice"
    for item in names:
        thing = getattr(module, item)
        if isinstance(thing, type) or callable(thing):
            assert thing.__doc__, f"{name}.{item} has no docstring"


def test_every_test_file_has_a_name_of_its_own():
    """pytest imports test files by their names alone."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
