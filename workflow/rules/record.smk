rule record:
    """Hand the finished study to DVC, where DVC keeps it; the only step that calls dvc."""
    input:
        [ancient(RECORDS / step.record) for step in STEPS.values()],
    output:
        RECORDS / RECORD.record,
    log:
        RESULTS / "logs" / f"record-{NAME}.{RECORD.key}.log",
    params:
        mergelab=MERGELAB,
        study=STUDY,
    shell:
        "{params.mergelab} record {params.study:q} --record {output:q} 2>&1 | tee {log:q}"
