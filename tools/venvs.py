"""Environments of their own for what cannot live in ours: made whole, or left as they are."""

import shutil
import subprocess
import sys
from pathlib import Path

from common.errors import ConfigError

INSTALL_S = 1800.0


def is_whole(directory: Path, stamp: str, recipe: str) -> bool:
    """Whether an environment of this ``recipe`` was finished in ``directory``."""
    return (directory / stamp).is_file() and (directory / stamp).read_text() == recipe


def make_room(directory: Path, stamp: str) -> None:
    """Empty ``directory``, which the file ``stamp`` in it tells to be ours, from the first moment on.

    Raises :class:`ConfigError` where somebody else's files lie there, or where it cannot be made.
    """
    try:
        if directory.exists() and any(directory.iterdir()) and not (directory / stamp).is_file():
            raise ConfigError(
                f"{directory}: holds files that are not an environment of ours (no {stamp} is among them); "
                "name another directory, or move it away"
            )
        if directory.exists():
            shutil.rmtree(directory.resolve())
        directory.resolve().mkdir(parents=True)
        (directory / stamp).write_text("")
    except OSError as error:
        raise ConfigError(
            f"{directory}: cannot be made anew ({error.strerror or error}); name another directory"
        ) from error


def make_venv(directory: Path) -> Path:
    """Make an environment in ``directory``, beside what is there; its interpreter. Also without python3-venv."""
    python = directory / "bin" / "python"
    made = subprocess.run([sys.executable, "-m", "venv", str(directory)], capture_output=True)
    if made.returncode != 0:  # then without pip, which ours puts in
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
        command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "pip"]
        subprocess.run(command, check=True, timeout=INSTALL_S)
    return python


def pip_install(python: Path, *arguments: str) -> None:
    """``pip install`` for ``python``; ends the program with pip's own words if it fails."""
    command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
    if done.returncode != 0:
        raise SystemExit(f"pip could not install {arguments}:\n{done.stderr[-2000:]}")
