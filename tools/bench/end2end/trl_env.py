"""``python -m tools.bench.end2end.trl_env``: an environment with TRL, which the benchmark compares croupier with.

About a minute and 1.5 GB in ``.trl``. The torch and transformers in it are those of our own
environment (``constraints.txt``). An environment that is whole is left as it is.
"""

import argparse
import sys
from pathlib import Path

from common.errors import CroupierError
from tools.venvs import is_whole, make_room, make_venv, pip_install

DIRECTORY = Path(".trl")
CONSTRAINTS = Path("constraints.txt")
PACKAGES = ("torch==2.13.0", "transformers==5.23.0", "trl==1.16.0", "accelerate==1.15.0", "datasets==5.2.0")
STAMP = "croupier-trl"
HOW = "python -m tools.bench.end2end.trl_env"


def interpreter(directory: Path = DIRECTORY) -> Path | None:
    """That of a whole environment; None where there is none."""
    return directory / "bin" / "python" if is_whole(directory, STAMP, _recipe()) else None


def install(directory: Path = DIRECTORY) -> Path:
    """Make ``directory`` a whole environment, unless it is one; returns its interpreter.

    Raises :class:`ConfigError` where something else lies there.
    """
    found = interpreter(directory)
    if found is not None:
        return found
    make_room(directory, STAMP)
    print(f"installing {PACKAGES[2]} into {directory} (about a minute, 1.5 GB)", flush=True)
    python = make_venv(directory)
    pip_install(python, "-c", str(CONSTRAINTS), *PACKAGES)
    (directory / STAMP).write_text(_recipe())
    return python


def _recipe() -> str:
    return "\n".join(PACKAGES)


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    argparse.ArgumentParser(prog=HOW, description=f"Install TRL into {DIRECTORY} (1.5 GB).").parse_args(arguments)
    try:
        print(install())
    except CroupierError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
