rule report:
    """The page, the metrics and the plots of the study."""
    input:
        needs("report"),
    output:
        target("report"),
    log:
        log_of("report"),
    benchmark:
        benchmark_of("report")
    threads: 1
    resources:
        **resources_of("report"),
    params:
        mergelab=MERGELAB,
        study=STUDY,
    shell:
        "{params.mergelab} report {params.study:q} --record {output:q} 2> {log:q}"
