"""Fetch the data that some tests and the training need, where this machine can: `make data`, and `make test` on its way.

python tests/fetch.py    # says what it does; exit code 1, and why, where something could not be fetched
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable

from steerfm_zoo.emoji import pictures as emoji
from steerfm_zoo.fashion.data import fashion_folder, fashion_mnist

PACKAGE = "dataset-fashion-mnist"


def check_fashion() -> None:
    for split in ("train", "test"):
        fashion_folder(split)


def fetch_fashion() -> None:
    """With apt where that can be, else as the loader does."""
    apt = shutil.which("apt-get")
    if os.environ.get("STEERFM_DATA") or not apt or os.geteuid():
        why = "no apt-get here" if not apt else "not root" if os.geteuid() else "they are asked for in another folder"
    else:
        print(f"installing {PACKAGE} with apt-get")
        wait = ["-q", "-o", "DPkg::Lock::Timeout=120", "-o", "Acquire::http::Timeout=20"]
        subprocess.run([apt, "update", *wait], capture_output=True, check=False)  # without a list the install says so
        told = subprocess.run(
            [apt, "install", "-y", *wait, PACKAGE],
            capture_output=True, text=True, check=False, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
        )  # fmt: skip
        if not told.returncode:
            return
        why = ([line for line in told.stderr.splitlines() if line.startswith("E:")] or ["apt-get failed"])[-1]
    try:
        fashion_mnist("train", fetch=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{why}; {error}") from None


def fetch_emoji() -> None:
    print("fetching the emoji with npm: about 150 MB, then half a minute of work")
    emoji.prepare()


DATA: dict[str, tuple[Callable[[], object], Callable[[], None]]] = {
    "fashion": (check_fashion, fetch_fashion),
    "emoji": (emoji.load, fetch_emoji),
}
"""By name: what raises FileNotFoundError where the data are missing, and what fetches them."""


def missing(name: str) -> str:
    """Why a data set cannot be read; empty where it can."""
    try:
        DATA[name][0]()
    except FileNotFoundError as error:
        return str(error)
    return ""


def fetch() -> dict[str, str]:
    """Fetch what is missing; returns why, for each that could not be fetched."""
    failures = {}
    for name, (_, get) in DATA.items():
        if missing(name):
            try:
                get()
            except (OSError, ValueError) as error:
                failures[name] = str(error)
    return failures


if __name__ == "__main__":
    failed = fetch()
    for name in DATA:
        print(f"{name}: {failed.get(name, 'there')}", file=sys.stderr if name in failed else sys.stdout)
    sys.exit(bool(failed))
