"""Keys for a run over several machines: make, list, allow, revoke.

::

    python -m tools.keys make DIR                                the broker's pair
    python -m tools.keys make DIR --client actor-0 --client learner   and pairs of peers, allowed at once
    python -m tools.keys list DIR
    python -m tools.keys allow DIR NAME FILE                     let in who made a key elsewhere; FILE is its .pub
    python -m tools.keys revoke DIR NAME

Run it on the broker's machine, set ``broker.keys=DIR``, and carry ``server.pub`` and one
``clients/NAME.key`` to each other machine. A key made where there is only ``server.pub`` leaves
``allowed/NAME.pub``, which is carried back and allowed. What was allowed or revoked counts for a
running broker within a second. Nothing here overwrites a secret.
"""

import argparse
import sys
from collections.abc import Sequence
from os.path import lexists
from pathlib import Path

from rich.table import Table

from common.errors import ConfigError
from common.keys import (
    ALLOWED,
    CLIENTS,
    SERVER_PUBLIC,
    SERVER_SECRET,
    check_name,
    fingerprint,
    new_pair,
    read_allowed,
    read_public,
    read_secret,
    write_public,
    write_secret,
)
from tools.console import make_console, print_error

REVOKED = "revoked"  # beside allowed/: what `make` must not let in again by itself


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m tools.keys", description="Make and list the keys of a run."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command, what in (
        ("make", "make the pairs that are not there yet"),
        ("list", "who has a key and who is allowed"),
        ("allow", "put a public key on the allow-list"),
        ("revoke", "take a name off the allow-list"),
    ):
        sub = commands.add_parser(command, help=what)
        sub.add_argument("dir", type=Path)
        if command == "make":
            sub.add_argument("--client", action="append", default=[], metavar="NAME", help="a process's --name")
        if command in ("allow", "revoke"):
            sub.add_argument("name")
        if command == "allow":
            sub.add_argument("file", type=Path, help="a .pub file")
    given = parser.parse_args(arguments)
    console = make_console()
    try:
        if given.command == "make":
            said = make(given.dir, given.client)
        elif given.command == "allow":
            said = [allow(given.dir, given.name, given.file)]
        elif given.command == "revoke":
            said = [revoke(given.dir, given.name)]
        else:
            console.print(table(given.dir))
            _, said = read_allowed(given.dir / ALLOWED)
    except ConfigError as error:
        print_error(console, error)
        return 2
    for line in said:
        console.print(line, markup=False, soft_wrap=True)
    return 0


def make(directory: Path, clients: Sequence[str] = ()) -> list[str]:
    """Make the broker's pair and those of ``clients`` where they are missing; returns what was done, in words."""
    for name in clients:
        check_name(name)
    said = [_make_server(directory)]
    said += [_make_client(directory, name) for name in dict.fromkeys(clients)]
    return said


def _make_server(directory: Path) -> str:
    secret, public = directory / SERVER_SECRET, directory / SERVER_PUBLIC
    if public.exists() and not secret.exists():
        return f"broker      {fingerprint(read_public(public))}  its public key; the secret is on its own machine"
    done = "was there"
    if not secret.exists():
        write_secret(secret, *new_pair())
        done = "made"
    key, _ = read_secret(secret)
    if not public.exists():
        write_public(public, key)
    elif read_public(public) != key:
        raise ConfigError(f"{public}: not the public key of {secret}; remove it and run this again")
    (directory / ALLOWED).mkdir(mode=0o700, exist_ok=True)
    return f"broker      {fingerprint(key)}  {done}"


def _make_client(directory: Path, name: str) -> str:
    secret, public = directory / CLIENTS / f"{name}.key", directory / ALLOWED / f"{name}.pub"
    done = "was there"
    if not secret.exists():
        if lexists(public):
            raise ConfigError(f"{public}: {name} has a key made elsewhere; revoke it first, or take another name")
        write_secret(secret, *new_pair())
        done = "made"
    key, _ = read_secret(secret)
    if _is_revoked(directory, name, key):
        return (
            f"{name:<12}{fingerprint(key)}  {done}, revoked; `allow` with {directory / REVOKED / name}.pub undoes that"
        )
    if lexists(public):
        if read_public(public) != key:
            raise ConfigError(f"{public}: not the public key of {secret}; revoke {name} or remove the secret")
        return f"{name:<12}{fingerprint(key)}  {done}, allowed"
    write_public(public, key)
    return f"{name:<12}{fingerprint(key)}  {done}, now allowed"


def _is_revoked(directory: Path, name: str, key: bytes) -> bool:
    revoked = directory / REVOKED / f"{name}.pub"
    try:
        return lexists(revoked) and read_public(revoked) == key
    except ConfigError as error:
        raise ConfigError(
            f"{error}. It says that {name} was revoked, and not with which key: remove it to let {name} in again"
        ) from error


def allow(directory: Path, name: str, file: Path) -> str:
    """Put the public key in ``file`` on the allow-list as ``name``."""
    check_name(name)
    key = read_public(file)
    public = directory / ALLOWED / f"{name}.pub"
    if not (directory / SERVER_SECRET).exists():
        raise ConfigError(f"{directory}: no {SERVER_SECRET} there; run `python -m tools.keys make {directory}` first")
    names, _ = read_allowed(directory / ALLOWED)
    if names.get(key, name) != name:
        raise ConfigError(f"{file}: is allowed as {names[key]} already; revoke that name first")
    if lexists(public) and read_public(public) != key:
        raise ConfigError(f"{public}: another key is allowed as {name}; revoke it first, or take another name")
    record = directory / REVOKED / f"{name}.pub"
    try:
        undone = lexists(record) and read_public(record) == key
    except ConfigError:
        undone = True  # nobody can tell any more whose it was
    write_public(public, key)
    if undone:
        record.unlink(missing_ok=True)
    return f"{name:<12}{fingerprint(key)}  allowed"


def revoke(directory: Path, name: str) -> str:
    """Take ``name`` off the allow-list; its public key is kept apart, its secret is left alone."""
    public = directory / ALLOWED / f"{check_name(name)}.pub"
    kept = directory / REVOKED / f"{name}.pub"
    if not lexists(public):
        if lexists(kept):
            return f"{name:<12}was revoked already"
        known = sorted(p.stem for p in (directory / ALLOWED).glob("*.pub"))
        raise ConfigError(f"{public}: nobody of that name is allowed; known: {', '.join(known) or 'none'}")
    try:
        kept.parent.mkdir(mode=0o700, exist_ok=True)
        public.replace(kept)
    except OSError as error:
        raise ConfigError(f"{public}: cannot be revoked: {error.strerror}") from error
    return f"{name:<12}revoked; a running broker drops what it sends within a second"


def table(directory: Path) -> Table:
    """Every key in ``directory``."""
    if not (directory / SERVER_PUBLIC).exists():
        raise ConfigError(
            f"{directory}: no {SERVER_PUBLIC} there; make one with `python -m tools.keys make {directory}`"
        )
    found = Table(box=None, pad_edge=False, padding=(0, 2))
    for title in ("name", "fingerprint", "may connect", "secret here"):
        found.add_column(title, header_style="dim")
    here = "yes" if (directory / SERVER_SECRET).exists() else "no"
    found.add_row("broker", fingerprint(read_public(directory / SERVER_PUBLIC)), "–", here)
    keys = {name: (key, "yes") for key, name in read_allowed(directory / ALLOWED)[0].items()}
    for key, name in read_allowed(directory / REVOKED)[0].items():
        keys.setdefault(name, (key, "revoked"))
    secrets = {path.stem for path in (directory / CLIENTS).glob("*.key")}
    for name in sorted(secrets - keys.keys()):
        keys[name] = (read_secret(directory / CLIENTS / f"{name}.key")[0], "no")
    for name, (key, state) in sorted(keys.items()):
        found.add_row(name, fingerprint(key), state, "yes" if name in secrets else "no")
    return found


if __name__ == "__main__":
    sys.exit(main())
