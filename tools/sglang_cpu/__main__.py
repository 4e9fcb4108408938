"""``python -m tools.sglang_cpu install [DIRECTORY]``: an environment in which SGLang serves on a CPU.

About two minutes and 2.8 GB. SGLang's own files stay as they are; two add-ons (``site/``) stand in
for what PyPI lacks for CPUs. An environment that is whole is left as it is, and so are other people's files. On a GPU
machine ``pip install sglang`` is all, and ``engine.python`` names that interpreter.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from common.errors import CroupierError
from tools.venvs import is_whole, make_room, make_venv, pip_install

HERE = Path(__file__).parent
DEFAULT = ".sglang"
VERSION = "0.5.23"
TORCH = "torch==2.13.0"
ALONE = (f"sglang=={VERSION}", "torchvision==0.28.0", "xgrammar==0.2.7", "torch_memory_saver==0.0.10")  # without deps
STAMP = "croupier-sglang"


def recipe() -> str:
    """Everything that decides what is installed."""
    return "\n".join([TORCH, *ALONE, (HERE / "requirements.txt").read_text(), *_add_ons().values()])


def _add_ons() -> dict[str, str]:
    root = HERE / "site"
    return {str(file.relative_to(root)): file.read_text() for file in sorted(root.rglob("*")) if file.suffix != ".pyc"
            and file.is_file()}  # fmt: skip


def install(directory: Path) -> Path:
    """Make ``directory`` a whole environment, unless it is one; returns its interpreter.

    Raises :class:`ConfigError` where something else lies there.
    """
    python = directory / "bin" / "python"
    if is_whole(directory, STAMP, recipe()):
        return python
    make_room(directory, STAMP)
    print(f"installing SGLang {VERSION} for CPUs into {directory} (about two minutes, 2.8 GB)", flush=True)
    make_venv(directory)
    pip_install(python, TORCH)
    pip_install(python, "-r", str(HERE / "requirements.txt"))
    pip_install(python, "--no-deps", *ALONE)
    where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip())
    for name, text in _add_ons().items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    (directory / STAMP).write_text(recipe())
    return python


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m tools.sglang_cpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("action", choices=["install"])
    parser.add_argument("directory", nargs="?", default=DEFAULT, type=Path)
    given = parser.parse_args(arguments)
    try:
        print(install(given.directory))
    except CroupierError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
