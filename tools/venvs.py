"""Environments of their own for what cannot live in ours: made whole, or left as they are."""

import subprocess
import sys
from pathlib import Path

INSTALL_S = 1800.0


def make_venv(directory: Path) -> Path:
    """Make an environment in ``directory``; its interpreter. Also where Debian has no python3-venv."""
    python = directory / "bin" / "python"
    made = subprocess.run([sys.executable, "-m", "venv", str(directory)], capture_output=True)
    if made.returncode != 0:  # then without pip, which ours puts in
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(directory)], check=True)
        command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "pip"]
        subprocess.run(command, check=True, timeout=INSTALL_S)
    return python


def pip_install(python: Path, *arguments: str) -> None:
    """``pip install`` for ``python``; ends the program with pip's own words if it fails."""
    command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
    if done.returncode != 0:
        raise SystemExit(f"pip could not install {arguments}:\n{done.stderr[-2000:]}")
