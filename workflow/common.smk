"""What the rules have in common: the study, its steps, the names of their records, their needs."""

import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.io import report as shown  # at a line's start, `report` is a directive

from mergelab import versions
from mergelab.cluster import read_cluster
from mergelab.errors import UserError, nearest
from mergelab.resources import Estimates, asked
from mergelab.status import rows
from mergelab.steps import Steps
from mergelab.study_file import load_study

if unknown := set(config) - {"study", "cluster"}:
    raise WorkflowError(f"--config takes study=NAME, not {', '.join(sorted(unknown))}.")

STUDIES = sorted(path.parent.name for path in Path("recipes").glob("*/study.yaml"))
NAME = str(config.get("study", "demo")).removeprefix("recipes/").rstrip("/")
if NAME not in STUDIES:
    hint = nearest(NAME, STUDIES)
    raise WorkflowError(
        f"there is no study '{NAME}'.{hint} Studies: {', '.join(STUDIES)}."
    )

STUDY = Path("recipes") / NAME
RESULTS = Path("results") / STUDY.name
RECORDS = RESULTS / "records"
ON_CLUSTER = "cluster" in config
MERGELAB = f"{shlex.quote(sys.executable)} -m mergelab.cli"
PAGES = {  # of a finished study, for `snakemake --report`: file, what it is, caption
    "report.html": ("report", "page.rst"),
    "audit/audit.html": ("audit", "audit.rst"),
    "plots/scores.csv": ("scores", "scores.rst"),
    "plots/contamination.csv": ("contamination", "contamination.rst"),
}
# The login node fetches; what runs on a compute node does not look for a network.
WORKER = (
    f"HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 {MERGELAB}" if ON_CLUSTER else MERGELAB
)

try:
    PLANNED = Steps(load_study(STUDY))
    ESTIMATES = Estimates(PLANNED, RESULTS, read_cluster(config.get("cluster") or {}))
    RECORD = versions.step(PLANNED)
    lack = versions.lacking(PLANNED, RESULTS) if workflow.is_main_process else ""
except UserError as error:
    raise WorkflowError(str(error)) from None
STEPS = PLANNED.all
if lack:
    logger.warning(lack)


def needs(verb):
    """Input function: the records of the steps that this one builds on."""

    def records(wildcards):
        wanted = STEPS[verb, wildcards.name].needs
        return [ancient(RECORDS / STEPS[step].record) for step in wanted]

    return records


def parts(wildcards):
    """Input function: the parts of a merge that is divided; on one machine none is."""
    count = ESTIMATES.parts(wildcards.name) if ON_CLUSTER else 1
    marks = f"{RESULTS}/parts/merge-{wildcards.name}.{wildcards.key}"
    return [f"{marks}.{i}-of-{count}" for i in range(1, count + 1) if count > 1]


def resources_of(verb):
    """Resources: memory, minutes and disk, more at every attempt; partition, account and GPU."""
    return asked(ESTIMATES, verb)


def threads_of(verb):
    """Threads: how many the step can make use of."""
    return lambda wildcards: ESTIMATES.needs(verb, wildcards.name, 1).threads


def target(verb):
    """Output: the record of one step; `snakemake --report` shows it."""
    path = str(RECORDS / f"{verb}-{{name}}.{{key}}.json")
    about = {"step": verb, "of": "{name}"}
    return shown(path, "../report/step.rst", "Steps", verb, labels=about)


def pages():
    """The pages and tables that are here already, as `snakemake --report` shows them."""
    return [
        shown(
            str(RESULTS / name), f"workflow/report/{text}", "Results", labels={"of": of}
        )
        for name, (of, text) in PAGES.items()
        if (RESULTS / name).is_file()
        and (of != "audit" or ("audit", STUDY.name) in STEPS)
    ]


def log_of(verb):
    return str(RESULTS / "logs" / f"{verb}-{{name}}.{{key}}.log")


def benchmark_of(verb):
    return str(RESULTS / "benchmarks" / f"{verb}-{{name}}.{{key}}.tsv")


def last_words():
    """What failed steps said last, for people."""
    failed = [row for row in rows(PLANNED.study, RESULTS) if row.state == "failed"]
    return "".join(f"\n{row.verb} {row.name} failed. {row.why}\n" for row in failed)
