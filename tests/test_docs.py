"""What the documentation promises exists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from mergelab.methods import METHODS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("benchmarks/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_of_the_repository(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_test_that_the_conventions_name_exists() -> None:
    text = (ROOT / "docs/conventions.md").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in set(re.findall(r"\btest_[a-z0-9_]{12,}\b(?!\.py)", text)):
        assert f"def {name}(" in tests, name


def test_the_readme_names_every_method_and_every_source_file() -> None:
    text = (ROOT / "README.md").read_text()
    assert all(method in text for method in METHODS)
    for path in (ROOT / "src/mergelab").glob("*.py"):
        assert path.name in text or path.stem == "__init__", path.name


def test_nothing_of_the_peer_is_imported() -> None:
    found = subprocess.run(
        ["grep", "-rlE", r"^\s*(from|import) mergekit", "src", "tests", "workflow"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.stdout == ""
