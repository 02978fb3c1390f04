"""The audit as one HTML page: the verdicts first, then the evidence for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any
from urllib.parse import quote, urlsplit

from mergelab import page
from mergelab.audit import layers, pictures, summary
from mergelab.audit.protocol import prompts
from mergelab.headlines import decimals, signed

Audit = Mapping[str, Any]
UNITS = ("bytes", "kB", "MB", "GB", "TB")
FITS = 6  # counts that GRIM allows, at most so many are shown


def render_audit(data: Audit) -> str:
    """The page of an audit (audit.json, see audit.schema.json); links go to files beside it."""
    from markupsafe import Markup

    heats = [layers.heat_map(entry) for entry in data["weights"]]
    values = {
        **data,
        "sentence": summary.sentence(data),
        "claims": [_claim(claim) for claim in data["claims"]],
        "comparisons": [_comparison(one) for one in data["comparisons"]],
        "forests": [Markup(picture) for picture in pictures.forests(data["claims"])],
        "comparison_forest": Markup(pictures.comparison_forest(data["comparisons"])),
        "tree": Markup(pictures.tree(data["lineage"])),
        "taints": _taints(data["lineage"]),
        "several": len({claim["model"] for claim in data["claims"]}) > 1,
        "n_drawn": len(pictures.drawn(data["lineage"])),
        "weights": [
            {**entry, "heat": Markup(picture), "letters": _letters(parents)}
            for entry, (picture, parents) in zip(data["weights"], heats, strict=True)
        ],
        "sized": sized,
        "plain": plain,
        "outward": outward,
        "beside": beside,
    }
    return page.fill("audit.html.j2", values)


def outward(source: Any) -> str:
    """A source as a link, if it is an address of the web; else no link."""
    try:
        parts = urlsplit(str(source))
    except ValueError:
        return ""
    known = parts.scheme in ("http", "https") and parts.netloc
    return quote(str(source), safe=":/?#[]@!$&'()*+,;=%~") if known else ""


def beside(path: Any) -> str:
    """A record as a link, if its path begins at the folder of the page; else no link."""
    parts = str(path or "").split("/")
    up = len(list(takewhile(lambda part: part == "..", parts)))
    inside = all(part not in ("", ".", "..") for part in parts[up:]) and "\\" not in str(path)
    return "../" * up + page.local(*parts[up:]) if inside and parts[up:] else ""


def sized(count: int) -> str:
    """A number of bytes as it is read: 14.5 GB."""
    value, unit = float(count), 0
    while value >= 1000 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.{1 if unit else 0}f} {UNITS[unit]}"


def _claim(claim: Audit) -> dict[str, Any]:
    """A claim with its numbers as they are shown: in percent where they were published so."""
    ours, unit = claim["ours"], " %" if claim["percent"] else ""
    shown: dict[str, Any] = {
        "claimed": f"{claim['printed']}{unit}",
        "level": summary.score_level(claim),
    }
    shown |= {"ours_value": "", "ours_interval": "", "difference_shown": ""}
    shown |= {"settings": _settings(ours) if ours else [], "grim_shown": _grim(claim["grim"])}
    if ours:
        scale = 100.0 if claim["percent"] else 1.0
        low, high = (scale * edge for edge in ours["ci95"] or (ours["value"], ours["value"]))
        digits = max(len(claim["printed"].partition(".")[2]), 2) if claim["percent"] else 4
        shown["ours_value"] = f"{scale * ours['value']:.{digits}f}{unit}"
        shown["ours_interval"] = f"{low:.{digits}f} to {high:.{digits}f}" if low < high else ""
        shown["difference_shown"] = signed(scale * (claim["value"] - ours["value"]), digits)
    shown["others"] = [
        {**other, "shown": _number(claim, other["value"]), "prompt": _prompt(other)}
        for other in claim["alternatives"]
    ]
    shown["explained"] = [
        f"{EXPLAINED.get(name, name.replace('_', ' '))}: "
        + ("none" if value is None else plain(value))
        for name, value in (claim["explained_by"] or {}).items()
    ]
    return {**claim, **shown}


def _prompt(other: Audit) -> str:
    chat = bool(other.get("chat_template"))
    return prompts(other["shots"], chat, other.get("fewshot_as_multiturn"))


def _number(claim: Audit, value: float) -> str:
    return f"{100 * value:.2f} %" if claim["percent"] else f"{value:.4g}"


EXPLAINED = {"fewshot_as_multiturn": "a turn for each example"}
SETTINGS = {
    **{"metric": "metric", "filter": "filter", "shots": "shots", "n": "items", "task": "task"},
    **{"task_version": "task version", "dtype": "dtype", "chat_template": "chat template"},
    **EXPLAINED,
    "lm_eval": "lm-eval",
}


def _settings(ours: Audit) -> list[tuple[str, str]]:
    """How we scored, as (name, value)."""
    shown = [key for key in SETTINGS if key not in EXPLAINED or ours.get(key) is not None]
    return [(SETTINGS[key], plain(ours.get(key))) for key in shown]


def plain(value: Any) -> str:
    """A value of a protocol in words."""
    if value is None:
        return "not stated"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _grim(grim: Audit | None) -> str:
    """What GRIM says: can k of n items give the published digits?"""
    if grim is None:
        return "not applicable"
    if not grim["possible"]:
        return f"no whole number of {grim['n']} items gives it"
    fits = [str(count) for count in grim["fits"]]
    more = f" and {len(fits) - FITS} more" if len(fits) > FITS else ""
    return f"possible: {', '.join(fits[:FITS])}{more} of {grim['n']} items"


def _comparison(one: Audit) -> dict[str, Any]:
    interval = ""
    digits = 3
    if one["ci95"]:
        digits = decimals(*one["ci95"])
        interval = f"{signed(one['ci95'][0], digits)} to {signed(one['ci95'][1], digits)}"
    known = one["difference"] is not None
    level = "unknown" if not known else "good" if one["significant"] and one["claimed"] else "warn"
    words = {"good": "holds", "warn": "not shown", "unknown": "not measured"}[level]
    shown = signed(one["difference"], digits) if known else ""
    return {**one, "level": level, "words": words, "interval": interval, "shown": shown}


def _taints(lineage: Audit) -> tuple[list[Audit], list[Audit]]:
    """The taints of what was audited, and those of its ancestors; the strongest first.

    Several pieces of evidence for one way of one benchmark are one row."""
    own = {node["name"] for node in lineage["nodes"] if not node["depth"]}
    ways: dict[tuple[str, ...], list[Audit]] = {}
    for taint in sorted(lineage["taints"], key=lambda taint: -taint["strength"]):
        ways.setdefault((taint["model"], taint["benchmark"], *taint["path"]), []).append(taint)
    rows = [{**several[0], "found": several} for several in ways.values()]
    return [r for r in rows if r["model"] in own], [r for r in rows if r["model"] not in own]


def _letters(parents: Sequence[str]) -> list[tuple[str, str]]:
    return [(layers.letter(i), name) for i, name in enumerate(parents)]
