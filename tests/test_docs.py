"""What the documentation promises exists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from checkpoints import llama

from mergelab import estimate
from mergelab.methods import METHODS
from mergelab.plan import SHARD_SIZE, describe, make_plan
from mergelab.recipe import load_recipe

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


def test_the_fields_of_a_plan_are_those_that_its_docstrings_and_the_docs_list(
    tmp_path: Path,
) -> None:
    (tmp_path / "r.yaml").write_text("merge_method: passthrough\nmodels: [{model: a}]\n")
    recipe, folders = load_recipe(tmp_path / "r.yaml"), {"a": llama(tmp_path / "a", 0)}
    plan = make_plan(recipe, folders, shard_size=SHARD_SIZE)
    costs = estimate.costs(plan, tmp_path, passes=plan.passes)
    section = (ROOT / "docs/study.md").read_text().partition("## The plan as JSON")[2]
    rows = re.findall(r"^\| (`.*?) \|", section.partition("\n## ")[0], re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`(.+?)`", row)}
    assert documented == {*describe(plan), *(f"costs.{name}" for name in costs)}
    for function, fields in ((describe, describe(plan)), (estimate.costs, costs)):
        lines = re.findall(r"^    ([a-z_, ]+): ", function.__doc__ or "", re.MULTILINE)
        assert {name for line in lines for name in line.split(", ")} == set(fields)


def test_nothing_of_the_peer_is_imported() -> None:
    found = subprocess.run(
        ["grep", "-rlE", r"^\s*(from|import) mergekit", "src", "tests", "workflow"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.stdout == ""
