"""The folder's public names, and that importing them costs no optional package."""

from __future__ import annotations

import subprocess
import sys

import regimen.models


def test_every_public_name_is_there_and_documented():
    for name in regimen.models.__all__:
        assert getattr(regimen.models, name).__doc__, name


def test_importing_models_imports_no_optional_package():
    program = (
        "import sys, regimen.models; print([m for m in ('diffusers', 'peft', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
