"""The record of a step, around its work: is it still asked for, is the old one gone?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergelab.errors import UserError


def load(folder: Path) -> Any:
    """The study that is meant by its folder, or by the study.yaml in it."""
    from mergelab.study_file import load_study

    return load_study(folder.parent if folder.name == "study.yaml" else folder)


def forget(place: Path, verb: str, name: str) -> None:
    """Delete a step's records before its result changes: a run by hand makes it out of date.

    And what DVC noted of the study with it."""
    from mergelab import record

    record.forget(place / "records", f"{verb}-{name}")
    record.forget(place / "records", f"record-{place.name}")


def still_asked(record: Path | None, study: Path, verb: str, name: str) -> None:
    """Raise UserError if a step is no longer the one whose key `record` has in its name.

    Called once everything that the key covers is read, so that no record tells of other work."""
    from mergelab.record import KEYED

    if record is None or not KEYED.fullmatch(record.name):
        return
    from mergelab.steps import Steps

    loaded = load(study)
    step = Steps(loaded).all.get((verb, name))
    if step is None or step.record != record.name:
        raise UserError(
            f"{loaded.folder}: changed since this run was planned, so that {record.name} is not "
            f"what {verb} {name} would make now. Run: snakemake --config study={loaded.name}"
        )


def keep(path: Path | None, value: dict[str, Any]) -> None:
    """Write a step's record where Snakemake asked for it; nothing of a run by hand."""
    from mergelab.record import write_record

    if path is not None:
        write_record(path, value)
