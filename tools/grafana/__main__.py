"""``python -m tools.grafana [FILE.json]``: writes croupier.json beside this file, or to the path that is given."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import CroupierError
from tools.grafana.dashboard import dashboard
from tools.outputs import check_output, writing

WRITTEN = Path(__file__).with_name("croupier.json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the dashboard."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m tools.grafana", description="Grafana's dashboard of runs."
    )
    parser.add_argument(
        "file", nargs="?", type=Path, default=WRITTEN, help="a .json (default: the one in tools/grafana)"
    )
    path = parser.parse_args(arguments).file
    try:
        check_output(path, (".json",))
        with writing(path, "name a file elsewhere"):
            path.write_text(json.dumps(dashboard(), indent=1) + "\n")
    except CroupierError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
