"""Every module imports, every public name exists, is documented, and is tested for neither by accident."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import regimen

MODULES = [m.name for m in pkgutil.walk_packages(regimen.__path__, "regimen.") if not m.name.endswith("__main__")]


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_and_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    for public in getattr(module, "__all__", []):
        assert hasattr(module, public), f"{name}.{public} is named in __all__ and does not exist"


@pytest.mark.parametrize("name", [m for m in ["regimen", *MODULES] if hasattr(importlib.import_module(m), "__all__")])
def test_public_names_are_documented(name: str) -> None:
    module = importlib.import_module(name)
    for public in module.__all__:
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{name}.{public} has no docstring"
        for member, method in vars(value).items() if inspect.isclass(value) else ():
            if not member.startswith("_") and inspect.isfunction(method):
                assert inspect.getdoc(method), f"{name}.{public}.{member} has no docstring"


def test_optional_packages_are_not_imported_by_the_library_itself() -> None:
    program = (
        "import sys, regimen, regimen.models, regimen.policies, regimen.tasks, regimen.rewards, regimen.loop;"
        "optional = ('diffusers', 'peft', 'transformers', 'rliable', 'accelerate', 'httpx');"
        "print([m for m in optional if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
