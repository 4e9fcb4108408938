"""``[torchrun ...] -m learner RUN.yaml [key=value ...]``; plain ``python -m learner`` is one rank."""

import sys

from common.cli import run_process


def main() -> int:
    """Entry point."""
    from learner.train import run_learner

    return run_process("learner", sys.argv[1:], run_learner)


if __name__ == "__main__":
    sys.exit(main())
