"""The command line: one verb per step. Knows every other module; holds no logic of its own."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
import traceback
from typing import Any

try:
    import rich_click as click

    from mergelab import __version__
    from mergelab.cli import model_verbs, study_verbs
    from mergelab.errors import UserError
    from mergelab.progress import say
except KeyboardInterrupt:
    raise SystemExit(130) from None

# --help is markdown, with a line after the first paragraph
HELP = {"text_markup": "markdown", "padding_helptext_first_line": (0, 0, 1, 0)}


class _Verbs(click.RichGroup):
    """The verbs, in their order; Ctrl-C ends each with 130."""

    def list_commands(self, _: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            raise SystemExit(130) from None


@click.group(cls=_Verbs, context_settings={"show_default": True, "rich_help_config": HELP})
@click.version_option(__version__, message="mergelab %(version)s", help="Print it.")
def app() -> None:
    """Merge language models so that anyone can re-create the result, and check its scores
    for contamination.

    A **study** is a folder such as `recipes/demo`: a `study.yaml` (models, benchmarks, checks) and
    one mergekit-compatible YAML per merge. Run a whole study with `snakemake --config study=demo`;
    the verbs below are its single steps. Exit code 0: done, 2: your input needs a change, 1: our
    fault, 130: stopped."""


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
    except SystemExit as end:  # how click ends
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code == 130:
            say("stopped")
        elif isinstance(end.code, str):
            say(end.code)
    except UserError as error:
        say(f"error: {error}", style="red")
        code = 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception:
        say(
            f"{traceback.format_exc()}\nThis is a mistake in mergelab {__version__}, not yours. "
            "Please report it with the text above and the command you ran (see CONTRIBUTING.md)."
        )
        code = 1
    if threading.active_count() > 1:  # one may still download, for minutes: do not wait
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
