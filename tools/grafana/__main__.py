"""``python -m tools.grafana``: writes croupier.json beside this file, or to the path that is given."""

import json
import sys
from pathlib import Path

from tools.grafana.dashboard import dashboard

WRITTEN = Path(__file__).with_name("croupier.json")


def main(arguments: list[str]) -> int:
    """Write the dashboard."""
    path = Path(arguments[0]) if arguments else WRITTEN
    path.write_text(json.dumps(dashboard(), indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
