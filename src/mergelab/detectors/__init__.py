"""Detectors: statistics on evidence that say whether a model looks as if it saw a benchmark.

A detector sees stored numbers and texts, never a model. DETECTORS is the only table of ours; a
package of yours adds one through an entry point of the group `mergelab.detectors`, whose name is
the detector's and whose object is a Detector."""

from __future__ import annotations

from collections.abc import Iterator, Set
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from mergelab.detectors import (
    calibrated,
    codec,
    constat,
    min_k,
    option_order,
    overlap,
    paraphrase,
    siblings,
    twin,
)
from mergelab.detectors.base import NEEDS, Detector, Evidence, Finding, Probed, Tokens
from mergelab.errors import Problems, UserError, nearest
from mergelab.study import Check, Study

__all__ = ["DETECTORS", "Detector", "Evidence", "Finding", "Probed", "Tokens"]

VERSION = 3
FLAG_Q = 0.01  # q below this is flagged; q = p after Benjamini-Hochberg over a study's findings
GROUP = "mergelab.detectors"
LEAST_ITEMS = 2  # of a part; a benchmark worth a verdict has far more

DETECTORS: dict[str, Detector] = {
    detector.name: detector
    for detector in (
        *calibrated.DETECTORS,
        *siblings.DETECTORS,
        paraphrase.DETECTOR,
        option_order.DETECTOR,
        overlap.DETECTOR,
        twin.DETECTOR,
        constat.DETECTOR,
        min_k.DETECTOR,
        codec.DETECTOR,
    )
}


def verdict(q: float) -> str:
    """One line on a finding. It never says clean: no detector can."""
    if q < FLAG_Q:
        return f"flagged: q < {FLAG_Q} against its null hypothesis"
    return "no evidence at this sample size"


@cache
def known() -> dict[str, Detector]:
    """Our detectors and those that installed packages add, by name.

    Raises UserError naming the package if one of these cannot be used."""
    found, problems = dict(DETECTORS), Problems()
    for entry in sorted(entry_points(group=GROUP), key=lambda e: (e.name, e.value)):
        owner = f"package '{entry.dist.name}'" if entry.dist else f"entry point '{entry.value}'"
        try:
            detector = _added(entry, owner)
            if detector.name in found:
                raise UserError(
                    f"{owner}: a detector '{detector.name}' is there already. Give it another name."
                )
            found[detector.name] = detector
        except UserError as error:
            problems.add(str(error))
    problems.raise_if_any()
    return found


def _added(entry: EntryPoint, owner: str) -> Detector:
    """The detector of an entry point."""
    try:
        detector = entry.load()
    except Exception as error:  # the package is the user's: any error is theirs
        raise UserError(
            f"{owner}: its detector '{entry.name}' ({entry.value}) cannot be imported: "
            f"{type(error).__name__}: {error}.\n  Mend the package, or uninstall it."
        ) from None
    if not isinstance(detector, Detector):
        raise UserError(
            f"{owner}: {entry.value} is a {type(detector).__name__}, not a "
            "mergelab.detectors.Detector. Point the entry point at the Detector object."
        )
    if detector.name != entry.name:
        raise UserError(
            f"{owner}: entry point '{entry.name}' holds the detector '{detector.name}'. "
            "Give both the same name."
        )
    odd = sorted(set(detector.needs) - set(NEEDS))
    if odd:
        needs = ", ".join(NEEDS)
        raise UserError(f"{owner}: '{detector.name}' needs '{odd[0]}'. What there is: {needs}.")
    return detector


def find(name: str, where: str) -> Detector:
    """A detector by name. Raises UserError with the nearest right name."""
    there = known()
    if name not in there:
        hint, names = nearest(name, there), ", ".join(there)
        raise UserError(f"{where}: there is no detector '{name}'.{hint}\n  Known: {names}.")
    return there[name]


def place(study: Study, check: Check) -> str:
    """The words by which errors name a check."""
    return f"{study.folder / 'study.yaml'}: check of {check.benchmark}"


def scored(check: Check, needs: Set[str], variant: str) -> tuple[str, ...]:
    """The models whose scores a check's detectors look at; beside a corpus, where the scores only
    add what the copies were worth, the variant alone."""
    if "scores" in needs:
        return tuple(dict.fromkeys((variant, check.base, *check.siblings)))
    return (variant,) if "corpus" in needs and check.scores else ()


def problems(study: Study) -> list[str]:
    """What the checks of a study lack for their detectors, and what in it contradicts their null
    hypotheses; one text per mistake."""
    found: list[str] = []
    for check in study.contamination:
        where = place(study, check)
        both = sorted({*check.siblings} & {*check.planted, check.base})
        if both:
            found.append(
                f"{where}: '{both[0]}' is among 'siblings', which are clean models of the same "
                "base, and is its base or planted too. Take it out of one of them."
            )
        for name in check.detectors:
            try:
                detector = find(name, where)
            except UserError as error:
                found.append(str(error))
                continue
            found += [f"{where}: {name} {lack}" for lack in _lacks(study, check, detector)]
        several = (*_too_small(study, check), *_contradictions(study, check))
        found += [f"{where}: {text}" for text in several]
    return found


def _lacks(study: Study, check: Check, detector: Detector) -> list[str]:
    """What a check must add for a detector, as the end of a sentence that begins with its name."""
    found = []
    templates = {"answer": "answer", "twin": "twin", "orders": "options"}
    for need, template in templates.items():
        for name in dict.fromkeys(p.partition("/")[0] for p in (check.suspects, check.controls)):
            if need in detector.needs and getattr(study.datasets.get(name), template, None) is None:
                found.append(f"needs '{template}': add this template to dataset '{name}'.")
    keys = {"siblings": "clean models of the same base", "scores": "a benchmark of the suite"}
    for key, what in keys.items():
        if key in detector.needs and not getattr(check, key):
            found.append(f"needs '{key}': add {what} to the check.")
    if "twin_scores" in detector.needs and check.twin is None:
        found.append("needs 'twin': add the benchmark of the suite that holds the twin items.")
    return found


def _too_small(study: Study, check: Check) -> list[str]:
    found = []
    for part in (check.suspects, check.controls):
        dataset, _, name = part.partition("/")
        size = study.datasets[dataset].parts.get(name) if dataset in study.datasets else None
        if size is not None and size < LEAST_ITEMS:
            found.append(f"{part} has {size} item, but needs {LEAST_ITEMS}. Enlarge the part.")
    return found


def _contradictions(study: Study, check: Check) -> Iterator[str]:
    """What the study itself says against the null hypotheses of a check."""
    if check.suspects == check.controls:
        yield f"suspects and controls are both {check.suspects}. Name another part as one of them."
    for name in study.models:
        if check.controls in shown(study, name):
            yield (
                f"'{name}' is trained on the controls, {check.controls}, which no model of the "
                "study may have seen. Name another part, or train on another."
            )
    for sibling in check.siblings:
        for name in _line(study, sibling):
            seen = check.suspects in shown(study, name)
            if seen or (name != sibling and name in check.planted):
                by = "" if name == sibling else f" by way of '{name}', which it is trained from"
                yield (
                    f"'{sibling}' is among 'siblings', which are clean models, but saw the "
                    f"suspects, {check.suspects}{by}. Take it out of 'siblings'."
                )
                break


def shown(study: Study, name: str) -> tuple[str, ...]:
    """The parts that a model is trained on, here or as declared."""
    model = study.models[name]
    here = [share.part for share in model.train.data] if model.train else []
    return tuple(dict.fromkeys([*here, *model.declared]))


def _line(study: Study, name: str) -> list[str]:
    """A model and those that its training starts from, one after the other."""
    found, following = [], [name]
    while following and following[0] in study.models and following[0] not in found:
        found += following
        train = study.models[found[-1]].train
        following = [train.start] if train and train.start else []
    return found
