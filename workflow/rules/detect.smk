rule probe:
    """Token log-probabilities of one variant on every checked item, stored."""
    input:
        needs("probe"),
    output:
        target("probe"),
    log:
        log_of("probe"),
    benchmark:
        benchmark_of("probe")
    threads: 1
    resources:
        **resources_of("probe"),
    params:
        mergelab=WORKER,
        study=STUDY,
    shell:
        "{params.mergelab} probe {params.study:q} {wildcards.name:q} --record {output:q} 2> {log:q}"


rule detect:
    """Compare a variant's evidence with its base's."""
    input:
        needs("detect"),
    output:
        target("detect"),
    log:
        log_of("detect"),
    benchmark:
        benchmark_of("detect")
    group:
        "detect"
    threads: 1
    resources:
        **resources_of("detect"),
        one_by_one=1,
    params:
        mergelab=WORKER,
        study=STUDY,
    shell:
        "{params.mergelab} detect {params.study:q} {wildcards.name:q} --record {output:q} 2> {log:q}"
