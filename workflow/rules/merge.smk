rule merge:
    """Merge models as a recipe says; of a divided merge, check the parts and write the record."""
    input:
        needs("merge"),
        parts,
    output:
        target("merge"),
    log:
        log_of("merge"),
    benchmark:
        benchmark_of("merge")
    threads: threads_of("merge")
    resources:
        **resources_of("merge"),
    params:
        mergelab=WORKER,
        study=STUDY,
        results=RESULTS,
    shell:
        "{params.mergelab} merge {params.study:q}/{wildcards.name:q}.yaml -o {params.results:q}/merged/{wildcards.name:q} --workers {threads} --record {output:q} 2> {log:q}"


rule merge_part:
    """Write one part of a large merge; parts run at once, on as many nodes as are free."""
    input:
        needs("merge"),
    output:
        temp(touch(RESULTS / "parts/merge-{name}.{key}.{part}-of-{parts}")),
    log:
        RESULTS / "logs/merge-{name}.{key}.{part}-of-{parts}.log",
    benchmark:
        RESULTS / "benchmarks/merge-{name}.{key}.{part}-of-{parts}.tsv"
    wildcard_constraints:
        part="[0-9]+",
        parts="[0-9]+",
    threads: threads_of("merge")
    resources:
        **resources_of("merge"),
    params:
        mergelab=WORKER,
        study=STUDY,
        results=RESULTS,
    shell:
        "{params.mergelab} merge {params.study:q}/{wildcards.name:q}.yaml -o {params.results:q}/merged/{wildcards.name:q} --workers {threads} --part {wildcards.part}/{wildcards.parts} 2> {log:q}"
