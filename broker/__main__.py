"""``python -m broker RUN.yaml [key=value ...]``."""

import sys

from common.cli import run_process


def main() -> int:
    """Entry point."""
    from broker.service import run_broker

    return run_process("broker", sys.argv[1:], lambda config, _name, stop: run_broker(config, stop))


if __name__ == "__main__":
    sys.exit(main())
