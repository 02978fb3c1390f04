"""The pipeline on one screen: data, models, merges, scores, evidence, findings, report.

    snakemake                          # the demo study
    snakemake --config study=smollm2   # another folder of recipes/
    snakemake -n                       # only say what would run

Targets are records named by a content key (src/mergelab/steps.py): a result is current or absent.
"""

import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from mergelab.errors import UserError
from mergelab.steps import Steps
from mergelab.study import load_study


container: "docker://python:3.11"  # only for those who ask for it with --sdm apptainer


STUDY = Path("recipes") / config.get("study", "demo")
RESULTS = Path("results") / STUDY.name
RECORDS = RESULTS / "records"
MERGELAB = f"{sys.executable} -m mergelab.cli"

try:
    STEPS = Steps(load_study(STUDY)).all
except UserError as error:
    raise WorkflowError(str(error)) from None


def needs(verb):
    """Input function of a rule: the records of the steps that this one builds on."""

    def records(wildcards):
        wanted = STEPS[verb, wildcards.name].needs
        return [ancient(RECORDS / STEPS[step].record) for step in wanted]

    return records


def target(verb):
    """Output of a rule: the record of one step."""
    return str(RECORDS / f"{verb}-{{name}}.{{key}}.json")


def log_of(verb):
    return str(RESULTS / "logs" / f"{verb}-{{name}}.{{key}}.log")


def benchmark_of(verb):
    return str(RESULTS / "benchmarks" / f"{verb}-{{name}}.{{key}}.tsv")


wildcard_constraints:
    name="[^/]+",
    key="[0-9a-f]{12}",


localrules:
    all,
    report,


rule all:
    """The report of the study, and with it everything it shows."""
    input:
        RECORDS / STEPS["report", STUDY.name].record,


include: "workflow/rules/data.smk"
include: "workflow/rules/models.smk"
include: "workflow/rules/merge.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/detect.smk"
include: "workflow/rules/report.smk"
