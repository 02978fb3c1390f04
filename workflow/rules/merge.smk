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
        "{params.mergelab} merge {params.study}/{wildcards.name}.yaml -o {params.results}/merged/{wildcards.name} --workers {threads} --record {output} 2> {log}"
