rule audit:
    """Claims about the study's models (claims.yaml), judged by what was measured."""
    input:
        needs("audit"),
    output:
        target("audit"),
    log:
        log_of("audit"),
    benchmark:
        benchmark_of("audit")
    threads: 1
    resources:
        **resources_of("audit"),
    params:
        mergelab=MERGELAB,
        study=STUDY,
    shell:
        "{params.mergelab} audit {params.study:q} --record {output:q} 2> {log:q}"
