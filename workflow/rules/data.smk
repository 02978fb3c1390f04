rule data:
    """Fetch one dataset and cut it into disjoint parts."""
    input:
        needs("data"),
    output:
        target("data"),
    log:
        log_of("data"),
    benchmark:
        benchmark_of("data")
    threads: 1
    resources:
        **resources_of("data"),
    params:
        mergelab=MERGELAB,
        study=STUDY,
    shell:
        "{params.mergelab} data {params.study:q} {wildcards.name:q} --record {output:q} 2> {log:q}"
