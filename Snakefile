"""The pipeline on one screen: data, models, merges, scores, evidence, findings, audit, report.

    snakemake                          # the demo study
    snakemake --config study=smollm2   # another folder of recipes/
    snakemake -n                       # only say what would run
    snakemake --profile slurm          # on a cluster; docs/cluster.md
    snakemake --report page.html       # of a finished study: its tables, figures, records and jobs

Targets are records named by a content key (src/mergelab/steps.py): a result is current or absent.
"""


report: "workflow/report/study.rst"


container: "docker://python:3.11"  # only for those who ask for it with --sdm apptainer


include: "workflow/common.smk"


wildcard_constraints:
    name="[^/]+",
    key="[0-9a-f]{12}",


# On a cluster these run where Snakemake runs: they are short, or need the network.
localrules:
    all,
    data,
    fetch,
    audit,
    report,
    record,


rule all:
    """The report of the study, every step that it shows, and DVC's note of them."""
    input:
        [RECORDS / step.record for step in (*STEPS.values(), RECORD)],
        pages(),


onerror:
    sys.stderr.write(last_words())


include: "workflow/rules/data.smk"
include: "workflow/rules/models.smk"
include: "workflow/rules/merge.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/detect.smk"
include: "workflow/rules/audit.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/record.smk"
