"""The pipeline on one screen: data, models, merges, scores, evidence, findings, report.

    snakemake                          # the demo study
    snakemake --config study=smollm2   # another folder of recipes/
    snakemake -n                       # only say what would run

Targets are records named by a content key (src/mergelab/steps.py): a result is current or absent.
"""


container: "docker://python:3.11"  # only for those who ask for it with --sdm apptainer


include: "workflow/common.smk"


wildcard_constraints:
    name="[^/]+",
    key="[0-9a-f]{12}",


localrules:
    all,
    report,


rule all:
    """The report of the study, and every step that it shows."""
    input:
        [RECORDS / step.record for step in STEPS.values()],


include: "workflow/rules/data.smk"
include: "workflow/rules/models.smk"
include: "workflow/rules/merge.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/detect.smk"
include: "workflow/rules/report.smk"
