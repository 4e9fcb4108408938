"""CURVE keys: who the broker is, and who may speak to it.

::

    DIR/server.key           the broker's secret, mode 0600, on the broker's machine only
    DIR/server.pub           its public half; every process needs it
    DIR/allowed/NAME.pub     the allow-list: who may connect, under which name
    DIR/clients/NAME.key     the secret of the actor, replica or learner NAME, mode 0600

Each file is one JSON object with Z85 text; ``python -m tools.keys`` makes them. Within one machine
(loopback, ipc) keys are a choice; any other address needs them, and nothing here lets it go without.
"""

import contextlib
import hashlib
import ipaddress
import json
import logging
import os
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from common.config import BrokerSection
from common.errors import ConfigError

SERVER_SECRET, SERVER_PUBLIC = "server.key", "server.pub"
ALLOWED, CLIENTS = "allowed", "clients"
KEY_LENGTH = 40  # Z85 characters of 32 bytes
MAX_FILE_BYTES = 4096
LOOK_AGAIN_S = 1.0  # how long a change of the allow-list may go unnoticed
SAY_AGAIN_S = 60.0  # of a directory that cannot be read
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
Z85 = re.compile(rb"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")

log = logging.getLogger("keys")


@dataclass(frozen=True)
class ServerKeys:
    """The broker's pair and the directory of those that it lets in."""

    public: bytes
    secret: bytes = field(repr=False)
    allowed: Path


@dataclass(frozen=True)
class ClientKeys:
    """A peer's pair and the key of the broker that it means to speak to."""

    name: str
    public: bytes
    secret: bytes = field(repr=False)
    server: bytes


def is_local(address: str) -> bool:
    """Whether only this machine can reach ``address``."""
    scheme, _, rest = address.partition("://")
    if scheme in ("ipc", "inproc"):
        return True
    host = rest.rpartition(":")[0]
    if scheme != "tcp" or host == "localhost":
        return scheme == "tcp"
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:  # a wildcard, an interface or a name of another machine
        return False


def require_keys(address: str, present: bool) -> None:
    """Raise :class:`ConfigError` where ``address`` leaves the machine without keys."""
    if not present and not is_local(address):
        raise ConfigError(
            f"broker.address={address!r}: other machines can reach it, so it needs keys: make them with "
            "`python -m tools.keys make DIR` and set broker.keys=DIR, or listen on tcp://127.0.0.1:PORT"
        )


def broker_keys(section: BrokerSection) -> ServerKeys | None:
    """The broker's keys; None where ``broker.keys`` is empty and the address is local."""
    require_keys(section.address, bool(section.keys))
    if not section.keys:
        return None
    directory = Path(section.keys)
    public, secret = read_secret(directory / SERVER_SECRET, f"python -m tools.keys make {directory}")
    AllowList(directory / ALLOWED)  # raises what is wrong with it
    return ServerKeys(public, secret, directory / ALLOWED)


def client_keys(section: BrokerSection, name: str) -> ClientKeys | None:
    """The keys of the process ``name``; None where ``broker.keys`` is empty and the address is local."""
    require_keys(section.address, bool(section.keys))
    if not section.keys:
        return None
    directory, remedy = Path(section.keys), f"python -m tools.keys make {section.keys} --client {name}"
    public, secret = read_secret(directory / CLIENTS / f"{check_name(name)}.key", remedy)
    server = read_public(directory / SERVER_PUBLIC, "copy it from the broker's machine")
    return ClientKeys(name, public, secret, server)


def check_name(name: str) -> str:
    """``name`` if it can be a file's."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"key name {name!r}: needs 1 to 128 of A-Z a-z 0-9 _ - and, not in front, a point")
    return name


def fingerprint(public: bytes) -> str:
    """Sixteen hexadecimal digits by which people compare public keys."""
    digest = hashlib.sha256(public).hexdigest()
    return "-".join(digest[i : i + 4] for i in range(0, 16, 4))


# ---- files --------------------------------------------------------------------------------------


def new_pair() -> tuple[bytes, bytes]:
    """A fresh (public, secret)."""
    return zmq.curve_keypair()


def write_public(path: Path, public: bytes) -> None:
    """Write or replace a public key."""
    _write(path, {"public": public.decode()}, 0o644, replace=True)


def write_secret(path: Path, public: bytes, secret: bytes) -> None:
    """Write a secret key; one that is there is never overwritten."""
    _write(path, {"public": public.decode(), "secret": secret.decode()}, 0o600, replace=False)


def read_public(path: Path, remedy: str = "") -> bytes:
    """The public key in ``path``; ``remedy`` is for a file that is not there."""
    found = _read(path, remedy)
    if "secret" in found:
        raise ConfigError(f"{path}: holds a secret key; keep it private and give the .pub file instead")
    return _key(path, found, "public")


def read_secret(path: Path, remedy: str = "") -> tuple[bytes, bytes]:
    """(public, secret) in ``path``, which nobody but its owner may read."""
    found = _read(path, remedy)
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise ConfigError(f"{path}: a secret that others may read (mode {mode:04o}); run `chmod 600 {path}`")
    public, secret = _key(path, found, "public"), _key(path, found, "secret")
    if zmq.curve_public(secret) != public:
        raise ConfigError(f"{path}: its public and secret keys are no pair; restore the file or make a new key")
    return public, secret


def _write(path: Path, content: dict[str, str], mode: int, replace: bool) -> None:
    """Whole or not at all, and never readable by others in between."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(json.dumps(content) + "\n")
                file.flush()
                os.fsync(file.fileno())
            if replace:
                os.replace(partial, path)
            else:
                os.link(partial, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                partial.unlink()
    except FileExistsError as error:
        raise ConfigError(f"{path}: exists, and a secret is never overwritten; remove it first") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error


def _read(path: Path, remedy: str) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such key" + (f"; {remedy}" if remedy else "")) from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        found = json.loads(raw) if len(raw) <= MAX_FILE_BYTES else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: is no key file; `python -m tools.keys` makes them")
    return found


def _key(path: Path, found: dict[str, object], what: str) -> bytes:
    text = found.get(what)
    key = text.encode() if isinstance(text, str) and text.isascii() else b""
    if not Z85.fullmatch(key):
        raise ConfigError(f"{path}: {what!r} is not a key of {KEY_LENGTH} Z85 characters; the file is damaged")
    return key


# ---- the allow-list -----------------------------------------------------------------------------


def read_allowed(directory: Path) -> tuple[dict[bytes, str], list[str]]:
    """Names by public key, and what is wrong with the files left out."""
    try:
        names, faults, _ = _read_files(directory)
    except OSError as error:
        return {}, [f"{directory}: cannot be read: {error.strerror}"]
    return names, faults


def _read_files(directory: Path) -> tuple[dict[bytes, str], list[str], set[str]]:
    """Names by public key, what is wrong with the other files, and names whose file is there and tells no key.

    Raises OSError for a directory that cannot be read.
    """
    names: dict[bytes, str] = {}
    faults: list[str] = []
    untold: set[str] = set()
    for file, *_ in _signature(directory):
        path = directory / file
        try:
            key, name = read_public(path), check_name(path.stem)
        except ConfigError as error:
            if os.path.lexists(path):  # it was not taken away meanwhile
                faults.append(str(error))
                untold.add(path.stem)
            continue
        if key in names:
            faults.append(f"{path}: the same key as {names[key]}.pub; remove one of them")
        else:
            names[key] = name
    return names, faults, untold


def _signature(directory: Path) -> list[tuple[str, int, int]]:
    """Name, time of change (-1: unknown) and place of every public key; a directory that is gone has none.

    Raises OSError for one that cannot be read.
    """
    try:
        with os.scandir(directory) as entries:
            keys = [entry for entry in entries if entry.name.endswith(".pub") and not entry.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for entry in keys:
        try:
            found.append((entry.name, entry.stat().st_mtime_ns, entry.inode()))
        except FileNotFoundError:  # taken away meanwhile
            continue
        except OSError:  # a link that leads astray: reading it says where
            found.append((entry.name, -1, entry.inode()))
    return sorted(found)


class AllowList:
    """Who may connect, by key; a file added or removed counts within LOOK_AGAIN_S. Any thread may ask.

    Raises :class:`ConfigError` for a faulty file at the start; one that turns up later is named in the
    log. Whom it let in before stays, and so does everybody while nothing can be read: only a file that is
    gone, or has another key, shuts somebody out.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._looked = time.monotonic()
        self._complained = -SAY_AGAIN_S
        try:
            self._seen: list[tuple[str, int, int]] | None = _signature(directory)  # None: look again in any case
            self._names, self._faults, _ = _read_files(directory)
        except OSError as error:
            raise ConfigError(f"{directory}: cannot be read: {error.strerror}") from error
        if self._faults:
            raise ConfigError(self._faults[0])

    def __len__(self) -> int:
        with self._lock:
            return len(self._names)

    def name_of(self, public: bytes) -> str | None:
        """Whose key it is; None if nobody's."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked >= LOOK_AGAIN_S:
                self._looked = now
                self._look_again()
            return self._names.get(public)

    def _look_again(self) -> None:
        try:
            signature = _signature(self._directory)
            if signature == self._seen:
                return
            names, faults, untold = _read_files(self._directory)
        except OSError as error:
            if self._looked - self._complained >= SAY_AGAIN_S:
                self._complained = self._looked
                words = "allow-list: %s: cannot be read: %s; until it can, nobody is let in or shut out"
                log.warning(words, self._directory, error.strerror)
            return
        for key, name in self._names.items():
            if name in untold:
                names.setdefault(key, name)
        self._say(faults)
        self._names, self._seen = names, None if faults else signature

    def _say(self, faults: list[str]) -> None:
        for fault in sorted(set(faults) - set(self._faults)):
            log.warning("allow-list: %s", fault)
        self._faults = faults
