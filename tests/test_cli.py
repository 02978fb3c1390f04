"""The command line itself: what --help shows, what a mistake is answered with, exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Run

from mergelab import __version__
from mergelab.cli import VERBS, app

NAMES = [verb.__name__ for verb in VERBS]


def test_help_lists_every_verb_in_the_order_of_the_work(mergelab: Run) -> None:
    done = mergelab("--help")
    assert (done.returncode, done.stderr) == (0, "")
    rows = done.stdout.partition("Commands")[2].splitlines()
    assert [row.split()[1] for row in rows if row.startswith("│ ")] == NAMES
    assert "A study is a folder such as recipes/demo: a study.yaml" in done.stdout


def test_without_a_verb_the_help_is_shown(mergelab: Run) -> None:
    done = mergelab()
    assert (done.returncode, done.stdout) == (2, mergelab("--help").stdout)


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_verb_shows_its_text_rendered_and_every_option(mergelab: Run, name: str) -> None:
    command = app.commands[name]
    done = mergelab(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    text = " ".join(done.stdout.replace("│", " ").split())
    assert f" {name} [OPTIONS] " in text
    assert " ".join((command.help or "").replace("`", "").split()) in text
    for parameter in command.params:
        if parameter.name == "more":  # the rest of --candidates A B C
            assert " MORE " not in text
            continue
        assert str(parameter.help) in text
        if parameter.param_type_name == "option":
            assert all(word in text for word in parameter.opts)
        else:
            assert f" {parameter.make_metavar(command.context_class(command))} " in text
    assert not set(text) & set("`\x1b")


def test_help_fits_a_narrow_terminal(mergelab: Run) -> None:
    done = mergelab("merge", "--help", COLUMNS="40")
    assert "usage: " in done.stdout.lower()
    assert max(map(len, done.stdout.splitlines())) <= 40


def test_defaults_are_shown(mergelab: Run) -> None:
    text = mergelab("merge", "--help").stdout
    for value in ("5GB", "(the cores that may be used, at most 8)", "0", "1/1", "results"):
        assert f"[default: {value}]" in text


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["mrge", "r.yaml"], "No such command 'mrge'. Did you mean 'merge'?"),
        (["--versio"], "Did you mean '--version'?"),
        (["merge", "r.yaml", "-o", "x", "--worker", "3"], "Did you mean '--workers'?"),
        (["merge", "r.yaml"], "Missing option '-o' / '--out'."),
        (["merge", "-o", "x"], "Missing argument 'RECIPE'."),
        (["merge", "r.yaml", "-o"], "Option '-o' requires an argument."),
        (["merge", "r.yaml", "-o", "x", "y"], "unexpected extra argument (y)"),
        (["merge", "r.yaml", "-o", "x", "--workers", "0"], "'--workers': 0 is not in the range"),
        (["merge", "r.yaml", "-o", "x", "--seed", "-1"], "'--seed': -1 is not in the range"),
        (["merge", "r.yaml", "-o", "x", "--record", "."], "'--record': File '.' is a directory."),
        (["audit", "m", "--depth", "-1"], "'--depth': -1 is not in the range"),
        (["audit", "m", "--limit", "0"], "'--limit': 0 is not in the range"),
        (["audit", "m", "--json", "."], "'--json': File '.' is a directory."),
        (["audit", "m", "--skip", "all"], "error: --skip all: what can be left out is"),
        (["infer", "m"], "error: infer m: name the models it may be made of"),
    ],
)
def test_a_mistake_of_use_is_named_and_ends_with_2(
    mergelab: Run, words: list[str], answer: str
) -> None:
    done = mergelab(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert answer in done.stderr


def test_control_characters_of_a_stranger_do_not_reach_the_terminal(mergelab: Run) -> None:
    Path("r.yaml").write_text('merge_method: "\\e]0;title\\a"\nmodels: [{model: a}]\n')
    done = mergelab("merge", "r.yaml", "-o", "out")
    assert done.returncode == 2
    assert "\N{REPLACEMENT CHARACTER}]0;title" in done.stderr
    assert done.stderr.replace("\n", "").isprintable()


def test_ctrl_c_while_the_program_is_imported_prints_no_traceback(
    mergelab: Run, tmp_path: Path
) -> None:
    (tmp_path / "early").mkdir()
    (tmp_path / "early/rich_click.py").write_text("raise KeyboardInterrupt")
    done = mergelab("--version", PYTHONPATH=str(tmp_path / "early"))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_version_is_told(mergelab: Run) -> None:
    done = mergelab("--version")
    assert (done.returncode, done.stdout) == (0, f"mergelab {__version__}\n")


def test_candidates_are_several_after_one_another() -> None:
    words = ["m", "--candidates", "a", "b", "--workers", "2", "c", "--candidates", "d", "--base=e"]
    for name in ("infer", "audit"):
        found = app.commands[name].make_context(name, [*words]).params
        assert (found["candidates"], found["more"]) == (("a", "d"), ("b", "c"))
        assert (found["model" if name == "infer" else "target"], found["base"]) == ("m", "e")


def test_a_reader_that_goes_away_is_no_error_of_ours() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "mergelab.cli", "explain"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")
