"""Keys: made once, listed, allowed and revoked; every wrong file is an error that names it."""

import errno
import json
import os
from pathlib import Path

import pytest

from common.config import BrokerSection
from common.errors import ConfigError
from common.keys import AllowList, broker_keys, client_keys, is_local, read_secret, require_keys
from tools import keys


def section(directory="", address="tcp://10.0.0.1:5555"):
    return BrokerSection(address=address, keys=str(directory))


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("tcp://127.0.0.1:1", True), ("tcp://localhost:1", True), ("tcp://[::1]:1", True), ("ipc:///tmp/x", True),
        ("tcp://127.8.8.8:1", True), ("tcp://0.0.0.0:1", False), ("tcp://*:1", False), ("tcp://eth0:1", False),
        ("tcp://10.0.0.1:1", False), ("tcp://[::]:1", False), ("tcp://node7:1", False), ("udp://127.0.0.1:1", False),
    ],
)  # fmt: skip
def test_what_leaves_the_machine_needs_keys(address, local):
    assert is_local(address) is local
    if local:
        require_keys(address, False)
    else:
        with pytest.raises(ConfigError, match=r"tools\.keys make DIR"):
            require_keys(address, False)
    require_keys(address, True)


def test_made_keys_open_the_door_and_are_private(tmp_path):
    said = keys.make(tmp_path / "keys", ["actor-0", "learner"])
    assert [line.split()[0] for line in said] == ["broker", "actor-0", "learner"]
    server = broker_keys(section(tmp_path / "keys"))
    client = client_keys(section(tmp_path / "keys"), "actor-0")
    assert client.server == server.public
    assert AllowList(server.allowed).name_of(client.public) == "actor-0"
    assert "secret" not in repr(client) and client.secret.decode() not in repr(client)
    for path in (tmp_path / "keys/server.key", tmp_path / "keys/clients/actor-0.key"):
        assert path.stat().st_mode & 0o777 == 0o600
    before = (tmp_path / "keys/server.key").read_bytes()
    assert "was there" in keys.make(tmp_path / "keys", ["actor-0"])[1]
    assert (tmp_path / "keys/server.key").read_bytes() == before


def test_revoked_is_out_and_made_again_only_by_allow(tmp_path):
    keys.make(tmp_path, ["a"])
    allowed, mine = AllowList(tmp_path / "allowed"), client_keys(section(tmp_path), "a").public
    keys.revoke(tmp_path, "a")
    assert "revoked" in keys.make(tmp_path, ["a"])[1]
    assert AllowList(tmp_path / "allowed").name_of(mine) is None
    keys.allow(tmp_path, "a", tmp_path / "revoked/a.pub")
    assert AllowList(tmp_path / "allowed").name_of(mine) == "a"
    assert allowed.name_of(mine) == "a"  # it had not looked again
    assert "was revoked" not in keys.make(tmp_path, ["a"])[1]


def test_only_a_file_that_is_gone_shuts_anybody_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("common.keys.LOOK_AGAIN_S", 0.0)
    keys.make(tmp_path, ["a", "b"])
    directory = tmp_path / "allowed"
    a, b = (client_keys(section(tmp_path), name).public for name in "ab")
    allowed, path = AllowList(directory), directory / "a.pub"
    whole, second = path.read_bytes(), (directory / "b.pub").read_bytes()

    def both():
        return allowed.name_of(a), allowed.name_of(b)

    for half in (whole[:20], b""):  # cp is at it
        path.write_bytes(half)
        assert both() == both() == ("a", "b")
    assert caplog.text.count("is no key file") == 1
    path.write_bytes(whole)
    assert both() == ("a", "b")

    def exhausted(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as m:
        m.setattr("common.keys.os.scandir", exhausted)
        assert both() == both() == ("a", "b")
        assert caplog.text.count("Too many open files; until it can, nobody is let in or shut out") == 1
    with monkeypatch.context() as m:
        (directory / "b.pub").unlink()
        m.setattr(Path, "open", exhausted)
        assert both() == ("a", None)
    keys.make(tmp_path / "other", ["a"])
    path.write_bytes((tmp_path / "other/allowed/a.pub").read_bytes())
    assert both() == (None, None)  # another key has the name
    path.write_bytes(whole)
    (directory / "b.pub").write_bytes(second)
    assert both() == ("a", "b")
    (directory / "b.pub").write_bytes(whole)
    assert both() == ("a", None)  # b's file holds a's key now: b's own is out
    (directory / "b.pub").unlink()
    path.write_bytes(whole)
    assert both() == ("a", None)
    (directory / "b.pub").write_bytes(second)
    (directory / "file.pub").symlink_to(path / "beyond")
    (directory / "itself.pub").symlink_to(directory / "itself.pub")
    (directory / "odd.pub").write_text(json.dumps({"public": "\ud800"}))
    assert both() == ("a", "b")
    (directory / "b.pub").unlink()
    assert both() == ("a", None)  # whatever lies beside it
    assert all(f"{name}.pub: " in caplog.text for name in ("file", "itself", "odd"))
    directory.rename(tmp_path / "away")
    assert both() == (None, None)


def test_who_was_revoked_by_a_damaged_file_comes_back_when_the_owner_says_so(tmp_path):
    keys.make(tmp_path, ["a"])
    mine, public = client_keys(section(tmp_path), "a").public, tmp_path / "allowed/a.pub"
    whole = public.read_bytes()
    public.write_bytes(whole[:20])
    keys.revoke(tmp_path, "a")
    with pytest.raises(ConfigError, match="remove it to let a in again"):
        keys.make(tmp_path, ["a"])
    (tmp_path / "brought.pub").write_bytes(whole)
    keys.allow(tmp_path, "a", tmp_path / "brought.pub")
    assert AllowList(tmp_path / "allowed").name_of(mine) == "a"
    assert "allowed" in keys.make(tmp_path, ["a"])[1]


def test_a_file_that_leads_nowhere_is_revoked_like_another(tmp_path):
    keys.make(tmp_path, ["a"])
    public = tmp_path / "allowed/a.pub"
    public.unlink()
    public.symlink_to(public)
    with pytest.raises(ConfigError, match=r"a\.pub: cannot be read"):
        keys.make(tmp_path, ["a"])
    assert "revoked" in keys.revoke(tmp_path, "a") and not os.path.lexists(public)
    assert "already" in keys.revoke(tmp_path, "a")


def test_a_key_made_elsewhere_is_carried_over(tmp_path):
    keys.make(tmp_path / "broker")
    (tmp_path / "far").mkdir()
    (tmp_path / "far/server.pub").write_bytes((tmp_path / "broker/server.pub").read_bytes())
    keys.make(tmp_path / "far", ["actor-7"])
    assert not (tmp_path / "far/server.key").exists()
    keys.allow(tmp_path / "broker", "actor-7", tmp_path / "far/allowed/actor-7.pub")
    mine = client_keys(section(tmp_path / "far"), "actor-7")
    assert AllowList(tmp_path / "broker/allowed").name_of(mine.public) == "actor-7"


def break_(path, how):
    if how == "gone":
        path.unlink()
    elif how == "open":
        os.chmod(path, 0o644)
    elif how == "half":
        path.write_text(path.read_text()[:20])
    elif how == "pair":
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "public": content["secret"]}))


@pytest.mark.parametrize(
    ("how", "words"),
    [("gone", "tools.keys make"), ("open", "chmod 600"), ("half", "is no key file"), ("pair", "no pair")],
)
def test_a_damaged_secret_says_what_to_do(tmp_path, how, words):
    keys.make(tmp_path, ["a"])
    break_(tmp_path / "clients/a.key", how)
    with pytest.raises(ConfigError, match=words) as raised:
        client_keys(section(tmp_path), "a")
    assert "clients/a.key" in str(raised.value)
    break_(tmp_path / "server.key", how)
    with pytest.raises(ConfigError, match=words):
        broker_keys(section(tmp_path))


@pytest.mark.parametrize("name", ["", ".hidden", "../up", "a/b", "x" * 129, "ä"])
def test_names_that_cannot_be_files_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="key name"):
        keys.make(tmp_path, [name])


def test_the_commands_say_what_they_did_and_what_is_wrong(tmp_path, capsys):
    directory = str(tmp_path / "k")
    assert keys.main(["list", directory]) == 2
    assert f"tools.keys make {directory}" in capsys.readouterr().out.replace("\n", "")
    assert keys.main(["make", directory, "--client", "actor-0", "--client", "learner"]) == 0
    assert keys.main(["revoke", directory, "learner"]) == 0
    capsys.readouterr()
    assert keys.main(["list", directory]) == 0
    shown = capsys.readouterr().out
    assert "actor-0" in shown and "revoked" in shown
    assert read_secret(tmp_path / "k/server.key")[1].decode() not in shown
    assert keys.main(["revoke", directory, "nobody"]) == 2
    assert "known: actor-0" in capsys.readouterr().out


def test_one_key_has_one_name(tmp_path):
    keys.make(tmp_path, ["a"])
    with pytest.raises(ConfigError, match="allowed as a already"):
        keys.allow(tmp_path, "b", tmp_path / "allowed/a.pub")
    with pytest.raises(ConfigError, match="secret"):
        keys.allow(tmp_path, "b", tmp_path / "clients/a.key")
