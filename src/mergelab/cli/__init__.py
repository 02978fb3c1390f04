"""The command line: one verb per step. Knows every other module; holds no logic of its own."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
import traceback
from typing import Annotated

import typer

from mergelab import __version__
from mergelab.cli import model_verbs, study_verbs
from mergelab.errors import UserError
from mergelab.progress import console

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Merge language models so that anyone can re-create the result, and check its scores
for contamination.

A **study** is a folder such as `recipes/demo`: a `study.yaml` (models, benchmarks, checks) and one
mergekit-compatible YAML per merge. Run a whole study with `snakemake --config study=demo`;
the verbs below are its single steps. Exit code 0: done, 2: your input needs a change, 1: our
fault, 130: stopped.""",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"mergelab {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Options before the verb."""


VERBS = (  # in the order of --help
    model_verbs.merge,
    model_verbs.plan,
    model_verbs.diff,
    model_verbs.explain,
    model_verbs.infer,
    model_verbs.audit,
    study_verbs.lock,
    study_verbs.data,
    study_verbs.fetch,
    study_verbs.train,
    study_verbs.evaluate,
    study_verbs.probe,
    study_verbs.detect,
    study_verbs.report,
    study_verbs.soup,
    study_verbs.publish,
    study_verbs.status,
    study_verbs.record,
)
for verb in VERBS:
    app.command()(verb)


def main() -> None:
    """Run the command line: exit code 0 done, 2 the user's mistake, 1 our fault, 130 Ctrl-C."""
    gc.set_threshold(100_000)  # what is imported stays: looking for garbage in it takes long,
    atexit.register(gc.freeze)  # longest at the end
    code = 0
    try:
        app()
    except SystemExit as end:  # how typer ends, after Ctrl-C with 130
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code == 130:
            console.print("stopped", markup=False)
        elif isinstance(end.code, str):
            console.print(end.code, markup=False)
    except UserError as error:
        console.print(f"error: {error}", style="red", markup=False)
        code = 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception:
        traceback.print_exc()
        console.print(
            f"\nThis is a mistake in mergelab {__version__}, not yours. Please report it with the "
            "text above and the command you ran (see CONTRIBUTING.md).",
            markup=False,
        )
        code = 1
    if threading.active_count() > 1:  # one may still download, for minutes: do not wait
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
