"""Lists and help start quickly: what takes seconds to import is imported by what needs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

SLOW = ("lightning", "torchmetrics", "torchvision", "transformers", "open_clip", "scipy", "matplotlib", "omegaconf", "peft")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "without"),
    [
        (["--version"], ("torch", *SLOW)), (["steer", "--help"], ("torch", *SLOW)), (["steer", "--show"], ("torch", *SLOW)),
        (["models"], SLOW), (["rewards"], SLOW), (["methods"], SLOW), (["methods", "direct"], SLOW),
    ],
)  # fmt: skip
def test_lists_import_nothing_slow(command, without):
    code = f"""
import sys
from steerfm import cli
try:
    cli.main({command!r})
except SystemExit:
    pass
print("imported:", [name for name in {without!r} if name in sys.modules])
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.endswith("imported: []\n")


@pytest.mark.slow
def test_what_is_imported_on_first_use_is_all_there():
    code = """
import importlib
for name in ("steerfm.finetuning", "steerfm.training"):
    package = importlib.import_module(name)
    missing = [name for name in package.__all__ if not hasattr(package, name)]
    print(missing, hasattr(package, "Nothing"))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "[] False\n" * 2
