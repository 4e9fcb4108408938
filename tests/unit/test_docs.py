"""What the docs point to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_property_names_tests_that_exist():
    text = (ROOT / "docs" / "properties.md").read_text()
    file, found = None, 0
    for name in re.findall(r"`([^`]*::\w[^`]*)`", text):
        path, _, test = name.rpartition("::")
        file = ROOT / path.split("::")[0] if path else file
        assert file is not None and file.is_file(), name
        assert (
            re.search(rf"^\s*(def|class) {test}\b", file.read_text(), re.MULTILINE) or f"{test} =" in file.read_text()
        ), name
        found += 1
    assert found > 60


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_that_are_run_exist(page):
    for module in re.findall(r"python -m ((?:tools|actor|broker|learner)[\w.]*)", page.read_text()):
        path = ROOT / module.rstrip(".").replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for config in re.findall(r"configs/[\w-]+\.yaml", page.read_text()):
        assert (ROOT / config).is_file(), config
