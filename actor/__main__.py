"""``python -m actor RUN.yaml [--name actor-0] [key=value ...]``."""

import sys

from common.cli import run_process


def main() -> int:
    """Entry point."""
    from actor.service import run_actor

    return run_process("actor", sys.argv[1:], run_actor, default_name="actor-0")


if __name__ == "__main__":
    sys.exit(main())
