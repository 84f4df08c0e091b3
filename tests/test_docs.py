"""The documents that are made from the code say what the code says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_line_page_is_what_the_code_makes(pages: ModuleType) -> None:
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == pages.cli_page()


def test_the_configuration_page_is_what_the_code_makes(pages: ModuleType) -> None:
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == pages.config_page()


def test_every_pitfall_names_a_test_that_exists() -> None:
    rows = [line for line in (ROOT / "docs" / "pitfalls.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, f"no test named in: {row}"
        for file, name in named:
            path = ROOT / file
            assert path.is_file(), file
            assert re.search(rf"def {name}\b", path.read_text(encoding="utf-8")), f"{file} has no {name}"


def test_every_link_in_the_documents_leads_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?://)([^)]+)", page.read_text(encoding="utf-8")):
            name, _, anchor = target.partition("#")
            place = page.parent / name if name else page
            assert place.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(place), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """Of the headings of a page in Markdown, as they are made where it is shown."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
