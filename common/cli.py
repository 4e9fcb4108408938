"""The command line that every process shares: ``RUN.yaml [--name NAME] [key=value ...]``."""

import argparse
from collections.abc import Callable, Mapping, Sequence

from common.config import load
from common.errors import CroupierError
from common.process import StopFlag, die_with_parent, setup_logging

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_LASTING = 0, 1, 2, 78  # the last as EX_CONFIG of sysexits.h


def run_process(
    program: str,
    arguments: Sequence[str],
    main: Callable[..., None],
    default_name: str = "",
    flags: Mapping[str, str] | None = None,
) -> int:
    """Load the configuration, install the stop signals, run ``main(config, name, stop)``.

    ``flags``: further options and what they mean; ``main`` is given each as a text by its name, "" if it was left out.
    An error that a user can mend ends in one line on stderr and exit status 1, without a traceback; 78 if another
    start would end the same way.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, prog=f"python -m {program}")
    parser.add_argument("config", help="the run's YAML file")
    parser.add_argument("--name", default=default_name, help="this process's name in the run")
    for flag, meaning in (flags or {}).items():
        parser.add_argument(f"--{flag}", default="", help=meaning)
    parser.add_argument("overrides", nargs="*", default=[], help="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    die_with_parent()
    log = setup_logging(options.name or program)
    stop = StopFlag().install()
    try:
        further = {flag: getattr(options, flag) for flag in flags or {}}
        main(load(options.config, options.overrides), options.name, stop, **further)
    except CroupierError as error:
        log.error("%s: %s", type(error).__name__, error)
        return EXIT_LASTING if error.lasting else EXIT_FAILED
    return EXIT_OK
