"""The first sentences of a report, made from its numbers; none says more than the data do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

UNCORRECTED = "These 95 % CIs are not corrected for the number of comparisons."
NUMBERS = {2: "both", 3: "all three", 4: "all four", 5: "all five", 6: "all six"}


def headlines(data: Mapping[str, Any]) -> list[str]:
    """A few sentences about a report's data (the contents of report.json)."""
    merges = [v["name"] for v in data["variants"] if v["kind"] == "merge"]
    found = [merges_against_base(data, merges), merges_against_parents(data, merges)]
    found = [sentence for sentence in found if sentence]
    found[-1:] = [f"{sentence} {UNCORRECTED}" for sentence in found[-1:]]
    found += [same_weights(names) for names in data["twins"]]
    for check in data["checks"]:
        found += [flagged(check), found_what_was_planted(check), tainted_scores(check, data)]
    return [sentence for sentence in found if sentence]


def merges_against_base(data: Mapping[str, Any], merges: Sequence[str]) -> str:
    """Which merges beat the base everywhere; else, where they differ from it."""
    verdicts = {m: _verdicts(data, m, "vs_base") for m in merges}
    verdicts = {m: found for m, found in verdicts.items() if found}
    if not verdicts:
        return ""
    base = next(v["name"] for v in data["variants"] if v["kind"] == "base")
    benches = data["benchmarks"]
    complete = [m for m, found in verdicts.items() if len(found) == len(benches)]
    winners = [m for m in complete if set(verdicts[m].values()) == {"better"}]
    if winners:
        best = max(winners, key=lambda m: _mean_gain(data, m))
        others = [m for m in winners if m != best]
        told = "; ".join(_told(bench, best) for bench in benches)
        more = f" So {'does' if len(others) == 1 else 'do'} {listed(others)}." if others else ""
        return f"{best} beats {base} {_everywhere(benches)}: {told}.{more}"
    if all(v == "unsettled" for found in verdicts.values() for v in found.values()):
        return (
            f"No merge can be told apart from {base} on any benchmark: "
            "every 95 % CI of a paired difference includes 0."
        )
    parts = [
        f"{merge} is {verdict} on {listed([b for b, v in found.items() if v == verdict])}"
        for merge, found in verdicts.items()
        for verdict in ("better", "worse")
        if verdict in found.values()
    ]
    return f"No merge beats {base} {_everywhere(benches)}. Beyond the 95 % CI: {'; '.join(parts)}."


def merges_against_parents(data: Mapping[str, Any], merges: Sequence[str]) -> str:
    """Does a merge beat the best of its own parents anywhere?"""
    cells = [
        (bench, row)
        for bench in data["benchmarks"]
        for row in bench["rows"]
        if row["variant"] in merges and row["vs_parent"]
    ]
    if not cells:
        return ""
    better = [(b, r) for b, r in cells if r["vs_parent"]["verdict"] == "better"]
    worse = [(b, r) for b, r in cells if r["vs_parent"]["verdict"] == "worse"]
    if better:
        told = "; ".join(
            f"{r['variant']} on {b['name']} (vs {r['vs_parent']['parent']}: "
            f"{_interval(r['vs_parent'])})"
            for b, r in better[:4]
        )
        more = f" and {len(better) - 4} more" if len(better) > 4 else ""
        return (
            f"{len(better)} of {len(cells)} comparisons of a merge with its best parent favour "
            f"the merge: {told}{more}; {len(worse)} favour the parent."
        )
    found = f"in {len(worse)} of {len(cells)} comparisons the parent is better, in the others "
    return (
        "No merge beats the best of its parents on any benchmark: "
        f"{found if worse else 'everywhere '}the 95 % CI includes 0."
    )


def same_weights(names: Sequence[str]) -> str:
    """Merges that count as one."""
    return f"{listed(names)} have the same weights, byte for byte: read them as one result."


def flagged(check: Mapping[str, Any]) -> str:
    """Who is flagged for a benchmark, by which detectors, with the AUCs and the largest q."""
    rows = _tested(check)
    if not rows:
        return ""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    hit = [n for n in names if any(r["flagged"] for r in rows if r["variant"] == n)]
    rest = [n for n in names if n not in hit]
    what = f"{check['benchmark']} ({check['suspects']} against {check['controls']})"
    spared = f"{listed(rest)}{_aucs(rows, rest)}; that does not prove " if rest else ""
    spared += f"{'them' if len(rest) > 1 else 'it'} clean" if rest else ""
    if not hit:
        return f"No model is flagged for {what}: {spared}."
    q = max(row["q"] for row in rows if row["flagged"])
    verb = "are" if len(hit) > 1 else "is"
    kinds = {row["variant"]: row["kind"] for row in rows}
    groups = {kind: [n for n in hit if kinds[n] == kind] for kind in ("base", "expert", "merge")}
    parts = [f"{listed(names)}{_aucs(rows, names)}" for names in groups.values() if names]
    told = f"{listed(parts)} {verb} flagged for {what}; q ≤ {small(q, up=True)}."
    return f"{told} Not flagged: {spared}." if rest else told


def found_what_was_planted(check: Mapping[str, Any]) -> str:
    """Ground truth of a demo: what the check found of what is known to be there."""
    if not check["planted"]:
        return ""
    tainted: dict[str, bool] = {}
    hits: dict[str, bool] = {}
    for row in _tested(check):
        tainted[row["variant"]] = row["taint"] > 0
        hits[row["variant"]] = hits.get(row["variant"], False) or row["flagged"]
    seen, clean = [n for n in tainted if tainted[n]], [n for n in tainted if not tainted[n]]
    missed, false = [n for n in seen if not hits[n]], [n for n in clean if hits[n]]
    if not seen:
        return ""
    told = (
        f"The suspects were planted in {listed(check['planted'])} on purpose: the check flags "
        f"{len(seen) - len(missed)} of the {len(seen)} examined models that contain it"
    )
    told += f", and {len(false)} of the {len(clean)} that do not." if clean else "."
    told += f" Missed: {listed(missed)}." if missed else ""
    return told + (f" False alarm: {listed(false)}." if false else "")


def tainted_scores(check: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """A warning where a benchmark was scored on the very items that were seen."""
    rows = [row for detector in check["detectors"] for row in detector["rows"]]
    hit = list(dict.fromkeys(row["variant"] for row in rows if row["flagged"]))
    on = [b["name"] for b in data["benchmarks"] if b["data"] == check["suspects"]]
    if not (hit and on):
        return ""
    return f"Scores of {listed(hit)} on {listed(on)} come from suspect items: they show no skill."


def listed(names: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else list(names))


def small(value: float, *, up: bool = False) -> str:
    """A p- or q-value in two digits; `up` rounds up, so that 'at most' stays true."""
    if value <= 0:
        return "1e-300"
    if value >= 0.01:
        return f"{math.ceil(value * 1000) / 1000 if up else value:.3f}"
    digits, power = f"{value:.1e}".split("e")
    if up and float(f"{digits}e{power}") < value:
        digits = f"{float(digits) + 0.1:.1f}"
    return f"{digits}e{int(power)}"


def decimals(low: float, high: float) -> int:
    """Digits after the point that show an interval's width with two figures (2 to 5)."""
    width = abs(high - low)
    return 3 if width <= 0 else min(max(1 - math.floor(math.log10(width)), 2), 5)


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign, and a true minus."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def _interval(comparison: Mapping[str, Any]) -> str:
    low, high = comparison["ci95"]
    digits = decimals(low, high)
    return (
        f"{signed(comparison['difference'], digits)}, 95 % CI "
        f"{signed(low, digits)} to {signed(high, digits)}"
    )


def _told(bench: Mapping[str, Any], variant: str) -> str:
    row = _row(bench, variant)
    base = next(r for r in bench["rows"] if r["kind"] == "base")
    digits = decimals(*row["vs_base"]["ci95"])
    values = f"{row['value']:.{digits}f} vs {base['value']:.{digits}f}"
    return f"{bench['name']} {bench['axis']} {values} (difference {_interval(row['vs_base'])})"


def _row(bench: Mapping[str, Any], variant: str) -> Mapping[str, Any]:
    row: Mapping[str, Any] = next(r for r in bench["rows"] if r["variant"] == variant)
    return row


def _verdicts(data: Mapping[str, Any], variant: str, against: str) -> dict[str, str]:
    rows = {bench["name"]: _row(bench, variant) for bench in data["benchmarks"]}
    return {name: row[against]["verdict"] for name, row in rows.items() if row[against]}


def _mean_gain(data: Mapping[str, Any], variant: str) -> float:
    """Mean of |difference to the base| relative to the base's value."""
    gains = []
    for bench in data["benchmarks"]:
        row, base = _row(bench, variant), next(r for r in bench["rows"] if r["kind"] == "base")
        gains.append(abs(row["vs_base"]["difference"]) / (abs(base["value"]) or 1.0))
    return math.fsum(gains) / len(gains)


def _everywhere(benches: Sequence[Mapping[str, Any]]) -> str:
    if len(benches) == 1:
        return f"on {benches[0]['name']}"
    return f"on {NUMBERS.get(len(benches), f'all {len(benches)}')} benchmarks"


def _tested(check: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Findings that could have flagged."""
    rows = [row for detector in check["detectors"] for row in detector["rows"]]
    return [row for row in rows if row["effect"] is not None and row["q"] is not None]


def _aucs(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """The range of the AUCs of some variants, in brackets; nothing where there are none."""
    values = [row["auc"] for row in rows if row["variant"] in names and row["auc"] is not None]
    if not values:
        return ""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return f" (AUC {low})" if low == high else f" (AUC {low} to {high})"
