rule fetch:
    """Bring a model here: a pinned hub commit, verified, or a GGUF file, dequantised."""
    input:
        needs("fetch"),
    output:
        target("fetch"),
    log:
        log_of("fetch"),
    benchmark:
        benchmark_of("fetch")
    threads: 1
    resources:
        **resources_of("fetch"),
    params:
        mergelab=MERGELAB,
        study=STUDY,
    shell:
        "{params.mergelab} fetch {params.study:q} {wildcards.name:q} --record {output:q} 2> {log:q}"


rule train:
    """Train a model of the study, from scratch or from another one."""
    input:
        needs("train"),
    output:
        target("train"),
    log:
        log_of("train"),
    benchmark:
        benchmark_of("train")
    threads: 1
    resources:
        **resources_of("train"),
    params:
        mergelab=WORKER,
        study=STUDY,
    shell:
        "{params.mergelab} train {params.study:q} {wildcards.name:q} --record {output:q} 2> {log:q}"
