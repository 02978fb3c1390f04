"""The audit in one table and one sentence: a row per question, each with its verdict and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

LEVELS = ("bad", "warn", "unknown", "good")
MARKS = {"bad": "✗", "warn": "!", "unknown": "?", "good": "✓"}
STYLES = {"bad": "red", "warn": "yellow", "unknown": "dim", "good": "green"}
SCORES = {
    "reproduced": "good",
    "consistent": "good",
    "not reproduced": "bad",
    "impossible": "bad",
    "does not fit": "warn",
    "unverifiable": "unknown",
}
WEIGHTS = {
    "exact": "good",
    "rounding only": "good",
    "other mask": "warn",
    "different": "bad",
    "unverifiable": "unknown",
}


def rows(audit: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The verdict table of an audit (see audit.schema.json), the gravest first within a subject."""
    found = [
        *_weights(audit["weights"]),
        *_scores(audit["claims"]),
        *_comparisons(audit["comparisons"]),
        *_lineage(audit["lineage"], audit["target"]["models"]),
        *_contamination(audit["contamination"]),
        *_policy(audit["policy"]),
    ]
    order = {name: place for place, name in enumerate(dict.fromkeys(r["subject"] for r in found))}
    return sorted(found, key=lambda r: (order[r["subject"]], LEVELS.index(r["level"])))


def sentence(audit: Mapping[str, Any]) -> str:
    """What a reader should know after ten seconds."""
    said = [
        _score_words(audit["claims"]),
        _order_words(audit["comparisons"]),
        _weight_words(audit["weights"]),
    ]
    tainted = dict.fromkeys(taint["benchmark"] for taint in audit["lineage"]["taints"])
    if tainted:
        said.append(f"descends from what is flagged for {', '.join(tainted)}")
    flagged = {row["variant"] for row in audit["contamination"]["findings"] if row["flagged"]}
    if flagged:
        said.append(f"traces of a benchmark in the weights of {', '.join(sorted(flagged))}")
    if broken := [row for row in audit["policy"] if row["verdict"] == "broken"]:
        said.append(f"{len(broken)} policy rule{'s' * (len(broken) > 1)} broken")
    text = "; ".join(part for part in said if part)
    return (
        f"{text[:1].upper()}{text[1:]}."
        if text
        else "Nothing was claimed, and nothing is known against it."
    )


def _row(
    subject: str, about: str, verdict: str, level: str, why: str, anchor: str
) -> dict[str, Any]:
    return {
        "subject": subject,
        "about": about,
        "verdict": verdict,
        "level": level,
        "why": why,
        "anchor": anchor,
    }


def _weights(entries: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for number, entry in enumerate(entries):
        anchor = f"weights-{number}"
        if made := entry["remerge"]:
            level = WEIGHTS[made["verdict"]]
            yield _row(entry["model"], "weights", made["verdict"], level, made["why"], anchor)
        if found := entry["infer"]:
            other = made is not None and made["verdict"] == "different"
            odd = other or found["undeclared"]["found"] or found["finetuned"]["found"]
            level = "warn" if odd else "good" if found["hypotheses"] else "unknown"
            why = found["undeclared"]["why"] if found["undeclared"]["found"] else ""
            why = why or (found["finetuned"]["why"] if found["finetuned"]["found"] else "")
            why = why or "read from the weights alone"
            yield _row(entry["model"], "weights", found["verdict"], level, why, anchor)
        if not made and not found:
            why = entry.get("why") or "neither a recipe nor candidates"
            yield _row(entry["model"], "weights", "not looked at", "unknown", why, anchor)


def score_level(claim: Mapping[str, Any]) -> str:
    """How grave a claim's verdict is: a difference that is explained is only doubtful."""
    explained = claim["verdict"] == "not reproduced" and claim["explained_by"]
    return "warn" if explained else SCORES[claim["verdict"]]


def _scores(claims: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for number, claim in enumerate(claims):
        level = score_level(claim)
        what = f"{claim['published']}: {claim['printed']}{' %' if claim['percent'] else ''}"
        verdict = f"{what} {claim['verdict']}"
        yield _row(claim["model"], "score", verdict, level, claim["why"], f"claim-{number}")


def _comparisons(found: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for number, one in enumerate(found):
        verdict = f"{one['benchmark']}: better than {one['than']}"
        level = "good" if one["significant"] and one["claimed"] else "warn"
        if one["difference"] is None:
            level = "unknown"
        yield _row(one["model"], "comparison", verdict, level, one["why"], f"comparison-{number}")


def _lineage(
    lineage: Mapping[str, Any], models: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    missing = {node["name"] for node in lineage["nodes"] if node["missing"]}
    for model in models:
        name, node = model["name"], model["node"]
        taints = [taint for taint in lineage["taints"] if taint["model"] == node]
        for benchmark in dict.fromkeys(taint["benchmark"] for taint in taints):
            own = (taint for taint in taints if taint["benchmark"] == benchmark)
            first = max(own, key=lambda taint: taint["strength"])
            share = f"{'' if first['exact'] else 'at most '}{first['strength']:.2g}"
            why = f"{' > '.join(first['path'])} (share {share}): {first['evidence']}"
            level = "bad" if first["strength"] >= 1 else "warn"
            yield _row(name, "lineage", f"tainted with {benchmark}", level, why, "lineage")
        if not taints:
            unknown = sorted(_ancestors(lineage["edges"], node) & missing)
            why = f"nothing is known of {', '.join(unknown[:3])}" if unknown else "none is flagged"
            verdict = "unverifiable" if unknown else "no known taint"
            yield _row(name, "lineage", verdict, "unknown", why, "lineage")


def _ancestors(edges: Sequence[Mapping[str, Any]], subject: str) -> set[str]:
    reached = {subject}
    for _ in range(len(edges) + 1):
        more = {edge["parent"] for edge in edges if edge["child"] in reached} - reached
        if not more:
            break
        reached |= more
    return reached


def _contamination(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row per model and benchmark in which a detector finds traces."""
    tested = [row for row in found["findings"] if row["q"] is not None]
    for model, benchmark in dict.fromkeys((row["variant"], row["benchmark"]) for row in tested):
        own = [r for r in tested if (r["variant"], r["benchmark"]) == (model, benchmark)]
        flagged = [row for row in own if row["flagged"]]
        if flagged:
            first = min(flagged, key=lambda row: row["q"])
            why = f"{len(flagged)} of {len(own)} detectors; {first['detector']}: "
            why += f"{first['effect_name']} {first['effect']:.2f}, q {first['q']:.1g}"
            verdict = f"traces of {benchmark}"
            yield _row(model, "contamination", verdict, "bad", why, "contamination")


def _policy(found: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in found:
        level = {"kept": "good", "broken": "bad"}.get(row["verdict"], "unknown")
        yield _row(
            "policy", "policy", f"{row['rule']} {row['verdict']}", level, row["why"], "policy"
        )


def _score_words(claims: Sequence[Mapping[str, Any]]) -> str:
    if not claims:
        return ""
    counts = Counter(claim["verdict"] for claim in claims)
    good = counts["reproduced"] + counts["consistent"]
    said = [f"{good} of {len(claims)} scores reproduced"]
    for verdict in ("not reproduced", "impossible", "does not fit", "unverifiable"):
        if counts[verdict]:
            said.append(f"{counts[verdict]} {verdict}")
    return ", ".join(said)


def _order_words(found: Sequence[Mapping[str, Any]]) -> str:
    if not found:
        return ""
    held = sum(one["significant"] and one["claimed"] for one in found)
    return f"{held} of {len(found)} claimed orders hold"


def _weight_words(entries: Sequence[Mapping[str, Any]]) -> str:
    made = Counter(entry["remerge"]["verdict"] for entry in entries if entry["remerge"])
    words = {
        "exact": "match the recipe exactly",
        "rounding only": "match the recipe up to rounding",
        "other mask": "match the recipe with another random mask",
        "different": "are not what the recipe makes",
        "unverifiable": "could not be checked",
    }
    if entries and not made and not any(entry["infer"] for entry in entries):
        return "the weights were not looked at"
    if len(entries) == 1 and made:
        return f"the weights {words[next(iter(made))]}"
    return ", ".join(f"weights of {count} {words[name]}" for name, count in made.items())
