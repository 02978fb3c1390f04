rule merge:
    """Merge models as a recipe says."""
    input:
        needs("merge"),
    output:
        target("merge"),
    log:
        log_of("merge"),
    benchmark:
        benchmark_of("merge")
    threads: 2
    resources:
        mem_mb=1000,
        runtime=120,
    params:
        mergelab=MERGELAB,
        study=STUDY,
        results=RESULTS,
    shell:
        "{params.mergelab} merge {params.study:q}/{wildcards.name:q}.yaml -o {params.results:q}/merged/{wildcards.name:q} --workers {threads} --record {output:q} 2> {log:q}"
