rule evaluate:
    """Score one variant on the study's suite, through lm-eval."""
    input:
        needs("evaluate"),
    output:
        target("evaluate"),
    log:
        log_of("evaluate"),
    benchmark:
        benchmark_of("evaluate")
    threads: 1
    resources:
        **resources_of("evaluate"),
    params:
        mergelab=WORKER,
        study=STUDY,
    shell:
        "{params.mergelab} evaluate {params.study:q} {wildcards.name:q} --record {output:q} 2> {log:q}"
