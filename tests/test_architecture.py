"""Who may import whom (docs/architecture.md), and what must not be imported at start-up."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import mergelab

SOURCE = Path(mergelab.__file__).parent
HEAVY = {
    *("torch", "transformers", "lm_eval", "datasets", "scipy", "matplotlib", "huggingface_hub"),
    *("numba", "llvmlite"),
}


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Modules that a file imports, in full dotted form."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def roots(path: Path) -> set[str]:
    """The packages that a file imports."""
    return {name.partition(".")[0] for name in imports(path)}


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    for path in SOURCE.rglob("*.py"):
        roots = {name.partition(".")[0] for name in imports(path, top_level=True)}
        assert not roots & HEAVY, path


def test_methods_see_no_files_and_detectors_see_no_models() -> None:
    for path in (SOURCE / "methods").glob("*.py"):
        ours = {n for n in imports(path) if n.startswith("mergelab")}
        assert all(n.startswith(("mergelab.methods", "mergelab.kernels")) for n in ours), path
        assert not roots(path) & {"os", "pathlib", "yaml", "torch"}, path
    for path in (SOURCE / "detectors").glob("*.py"):
        assert not roots(path) & {"torch", "transformers"}, path
        assert "mergelab.inference" not in imports(path), path


def test_the_engine_sees_no_yaml_and_only_the_cli_knows_everyone() -> None:
    for name in ("engine", "writer", "checkpoint"):
        found = imports(SOURCE / f"{name}.py")
        studies = {"mergelab.study", "mergelab.study_file"}
        assert not found & {"yaml", "mergelab.yamlfile", *studies}, name
    for path in set(SOURCE.rglob("*.py")) - set((SOURCE / "cli").iterdir()):
        assert not any(name.startswith("mergelab.cli") for name in imports(path)), path


def test_a_merge_imports_no_torch() -> None:
    modules = ", ".join(f"mergelab.{name}" for name in ("cli", "engine", "locate", "steps"))
    code = f"import sys, {modules}\nsys.exit(bool({HEAVY!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_command_is_parsed_without_a_library_that_is_slow_to_import() -> None:
    slow = {*HEAVY, "typer", "pydantic", "rich.markdown"}
    code = (
        "import sys\nfrom mergelab.cli import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        f"sys.exit(bool({slow!r} & set(sys.modules)))"
    )
    for words in (["--version"], ["explain", "ties"]):
        assert subprocess.run([sys.executable, "-c", code, *words]).returncode == 0
