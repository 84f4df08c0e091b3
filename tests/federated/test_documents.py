"""What the documents say of settings and codes, and what travels to a site."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from federated.federation import Federation
from federated.launch import APP, APP_FILES
from federated.messages import REASONS, Code
from federated.policy import OpeningHours, SitePolicy

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize(("page", "model"), [("site", SitePolicy), ("site", OpeningHours), ("coordinator", Federation)])
def test_every_setting_is_in_its_table_and_no_other(page: str, model: type[SitePolicy]) -> None:
    text = (DOCS / f"{page}.md").read_text()
    named = set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE))
    assert set(model.model_fields) <= named
    assert named <= {*SitePolicy.model_fields, *OpeningHours.model_fields, *Federation.model_fields, *(code.value for code in Code)}


def test_every_code_has_a_sentence_without_numbers_and_a_row() -> None:
    text = (DOCS / "site.md").read_text()
    for code in Code:
        assert not re.search(r"\d|/", REASONS[code])
        assert f"`{code.value}`" in text


def test_the_page_holds_what_errors_of_the_ledger_send_to_it_for() -> None:
    """None of them may lead to an older ledger, or to a second budget that forgets the first."""
    text, said = (DOCS / "site.md").read_text(), (DOCS.parent / "dpsynth/privacy/ledger.py").read_text()
    assert said.count("docs/site.md says what to do") == 2
    for heading in ("### When the ledger is damaged or lost", "### When patients come or go", "### A new ledger for patients who have one"):
        assert text.count(f"\n{heading}\n") == 1
    assert "never put an older copy back" not in text, "it is said there what to put back, and beside what"


def test_what_travels_imports_nothing_of_ours_and_is_only_what_is_named() -> None:
    assert sorted(path.name for path in APP.iterdir() if path.name != "__pycache__") == sorted(APP_FILES)
    imported = set()
    for name in APP_FILES:
        if name.endswith(".py"):
            for node in ast.walk(ast.parse((APP / name).read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                imported |= {item.split(".")[0] for item in (*names, *([node.module] if isinstance(node, ast.ImportFrom) else []))}
    assert imported == {"collections", "flwr", "json", "numpy", "socket", "struct", "time", "typing"}
