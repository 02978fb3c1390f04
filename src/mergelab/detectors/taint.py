"""Lineage taint: does a model descend from one that is known or said to have seen a benchmark?

Taint flows from parents to children along merges and training, and only fades: its strength is the
largest share of the tainted model that can be left in the descendant, along the strongest way. It
never ends, for a small share is not a clean one; and a model with an ancestor that nobody declares
is unverifiable, not clean. A tainted base taints every child, and blinds the detectors that compare
with it. Sources: what a study plants, training texts found to hold the benchmark, and `flags.yaml`,
the published reports. Practice: discussions 474 and 556 of the Open LLM Leaderboard, where people
traced this by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergelab import lineage, statistics
from mergelab.detectors import shown
from mergelab.study import Study
from mergelab.yamlfile import load

FLAGS = Path(__file__).parent.parent / "flags.yaml"
OVERLAP_LEAST = 0.02  # share of suspects in training texts, above what look-alikes reach by chance
BLIND = (
    "The base itself is tainted with this benchmark: detectors that compare with the base are "
    "blind here."
)


@dataclass(frozen=True)
class Source:
    """A model or data set that is said to hold a benchmark: why (`evidence`), says who."""

    name: str
    benchmark: str
    evidence: str
    source: str


@dataclass(frozen=True)
class Taint:
    """A source's taint as it arrives at a model, by the strongest way."""

    source: Source
    way: lineage.Way

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "evidence": self.source.evidence,
            "source": self.source.source,
            "strength": self.way.strength,
            "exact": self.way.exact,
            "path": list(self.way.path),
        }


def flags(path: Path = FLAGS) -> tuple[Source, ...]:
    """The published reports."""
    return tuple(Source(**flag) for flag in load(path)["flags"])


def bases(path: Path = FLAGS) -> frozenset[str]:
    """Models that their makers trained from nothing, in lower case: these have no parents."""
    return frozenset(name.casefold() for name in load(path)["bases"])


def trace(graph: lineage.Graph, sources: Iterable[Source]) -> dict[str, list[Taint]]:
    """For each node the taint of every source above it, the strongest first."""
    found: dict[str, list[Taint]] = {node.name: [] for node in graph.nodes}
    for source in dict.fromkeys(sources):
        if source.name not in found:
            continue
        for child, way in lineage.reach(graph, source.name).items():
            found[child].append(Taint(source, way))
    for taints in found.values():
        taints.sort(key=lambda taint: (-taint.way.strength, len(taint.way.path)))
    return found


def unknown(graph: lineage.Graph) -> dict[str, list[str]]:
    """For each node those of its ancestors, itself among them, of which nothing is declared."""
    found: dict[str, list[str]] = {node.name: [] for node in graph.nodes}
    for node in graph.nodes:
        if not node.declared:
            for child in lineage.reach(graph, node.name):
                found[child].append(node.name)
    return found


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def verdict(taints: Sequence[Taint], undeclared: Sequence[str]) -> str:
    """One line on one benchmark, the strongest taint first. It never says clean."""
    if not taints:
        if undeclared:
            return f"unverifiable: nothing is declared of {some(undeclared)}"
        return "no known taint"
    first = taints[0].way
    if len(first.path) == 1:
        return f"tainted: {taints[0].source.evidence}"
    path = " > ".join(first.path)
    if first.strength >= 1 and first.exact:
        return f"tainted by descent: {path}"
    share = f"{'' if first.exact else 'at most '}{first.strength:.2g}"
    return f"attenuated to {share} - verify: {path}"


def published(names: Mapping[str, Iterable[str]]) -> list[Source]:
    """The published reports on nodes, each known on the hub by one or several names."""
    by_name: dict[str, list[Source]] = {}
    for flag in flags():
        by_name.setdefault(flag.name.casefold(), []).append(flag)
    return [
        Source(node, flag.benchmark, flag.evidence, flag.source)
        for node, known in names.items()
        for name in dict.fromkeys(name.casefold() for name in known)
        for flag in by_name.get(name, ())
    ]


def study_sources(study: Study, graph: lineage.Graph) -> list[Source]:
    """What a study plants, and the published reports on its models and on the data sets that these
    are trained on, under the study's names of the models."""
    planted = [
        Source(name, check.benchmark, "planted", "study.yaml")
        for check in study.contamination
        for name in check.planted
    ]
    reported = published({node.name: [_hub_name(study, node.name)] for node in graph.nodes})
    trained = [
        replace(flag, name=name, evidence=f"trained on {part}: {flag.evidence}")
        for name in study.models
        for part in shown(study, name)
        for flag in published({name: [f"datasets/{_dataset_hub(study, part)}"]})
    ]
    return planted + reported + trained


def _dataset_hub(study: Study, part: str) -> str:
    """org/name of a part's hub data set, without commit."""
    dataset = study.datasets.get(part.partition("/")[0])
    return ((dataset.hub if dataset else None) or "").partition("@")[0]


def _hub_name(study: Study, node: str) -> str:
    """org/name of a hub model, without commit."""
    model = study.models.get(node)
    name = (model.hub or "") if model else node
    return name.partition("@")[0]


def overlap_sources(findings: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Source]:
    """Models whose declared training texts hold more of a benchmark than look-alikes explain.

    `findings` are those of every variant; the texts are named "model: part"."""
    found = []
    for finding in (finding for several in findings.values() for finding in several):
        if finding["detector"] != "overlap":
            continue
        n = finding["n_suspects"]
        for name, dirty in finding["details"]["dirty_by_corpus"].items():
            if statistics.wilson(dirty, n)[0] > OVERLAP_LEAST:
                model, _, part = name.partition(": ")
                text = f"trained on {part}, which holds {dirty} of {n} suspects"
                found.append(Source(model, finding["benchmark"], text, "overlap"))
    return list(dict.fromkeys(found))


def lineage_findings(
    study: Study, graph: lineage.Graph, sources: Iterable[Source] = ()
) -> dict[str, list[dict[str, Any]]]:
    """For each node one row per benchmark: verdict, strength, paths, and what is undeclared.

    Benchmarks are those of the study's checks, then those that reports name; `sources` come beside
    the study's own (as of `overlap_sources`)."""
    taints = trace(graph, [*study_sources(study, graph), *sources])
    undeclared = unknown(graph)
    bases = {check.benchmark: check.base for check in study.contamination}
    reported = {taint.source.benchmark for several in taints.values() for taint in several}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in taints}
    for benchmark in [*bases, *sorted(reported - bases.keys())]:
        of = {
            name: [taint for taint in several if taint.source.benchmark == benchmark]
            for name, several in taints.items()
        }
        base = bases.get(benchmark, lineage.base_of(study))
        for name, several in of.items():
            rows[name].append(
                {
                    "benchmark": benchmark,
                    "detector": "lineage",
                    "verdict": verdict(several, undeclared[name]),
                    "strength": several[0].way.strength if several else 0.0,
                    "taints": [taint.plain() for taint in several],
                    "unknown": undeclared[name],
                    "blind": BLIND if base and of.get(base) else "",
                }
            )
    return rows
