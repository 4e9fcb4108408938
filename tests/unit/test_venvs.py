"""Environments for what cannot live in ours: made in a room of their own, never in somebody else's."""

import pytest

from common.errors import ConfigError
from tools.bench.end2end import trl_env
from tools.sglang_cpu import __main__ as sglang_cpu

FAILS = "no room on the disk"


@pytest.fixture(autouse=True)
def full_disk(monkeypatch):
    """No environment is ever whole."""

    def fail(_):
        raise SystemExit(FAILS)

    for module in (sglang_cpu, trl_env):
        monkeypatch.setattr(module, "make_venv", fail)


@pytest.mark.parametrize("name", ["notes.txt", "pyvenv.cfg"])
@pytest.mark.parametrize("install", [sglang_cpu.install, trl_env.install])
def test_files_of_somebody_else_are_left_alone(tmp_path, install, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=r"not an environment of ours.*name another directory, or move it away"):
        install(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(ConfigError, match=r": cannot be made anew \(Not a directory\)"):
        install(tmp_path / name)


@pytest.mark.parametrize("module", [sglang_cpu, trl_env])
def test_one_that_was_half_made_is_made_anew(tmp_path, module):
    for attempt in range(2):
        with pytest.raises(SystemExit, match=FAILS):
            module.install(tmp_path / "new")
        assert not (tmp_path / "new" / "rest").exists(), attempt
        (tmp_path / "new" / "rest").write_text("of a wheel")
    assert (tmp_path / "new" / module.STAMP).read_text() == ""


def test_the_command_says_so_in_a_line(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert sglang_cpu.main(["install", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: holds files")
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / sglang_cpu.STAMP).write_text(sglang_cpu.recipe())
    assert sglang_cpu.main(["install", str(tmp_path / "whole")]) == 0


@pytest.mark.parametrize(("words", "code"), [("--help", 0), ("elsewhere", 2)])
def test_who_asks_for_help_gets_it_and_no_environment(tmp_path, monkeypatch, capsys, words, code):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        trl_env.main([words])
    assert ended.value.code == code
    said = capsys.readouterr()
    assert (said.out or said.err).startswith(f"usage: {trl_env.HOW}")
    assert not list(tmp_path.iterdir())


def test_where_trl_cannot_be_installed_is_said_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trl_env.DIRECTORY.mkdir()
    (trl_env.DIRECTORY / "notes.txt").write_text("mine")
    assert trl_env.main([]) == 2
    assert capsys.readouterr().err.startswith("error: .trl: holds files")
