"""The user's file about a cluster: names of its places, and its limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mergelab.errors import UserError, nearest


@dataclass(frozen=True)
class Cluster:
    """The user's file: names of the cluster's places, and its limits. Empty: the cluster's own."""

    account: str = ""
    partition: str = ""
    gpu_partition: str = ""
    gpu: str = ""
    hours: float = 24
    part_gb: float = 100

    @property
    def offers_gpu(self) -> bool:
        """Does the file name a GPU?"""
        return bool(self.gpu or self.gpu_partition)


def read_cluster(settings: Mapping[str, Any]) -> Cluster:
    """The user's settings. Raises UserError for an unknown name or a value of the wrong kind."""
    known = {field.name: type(field.default) for field in fields(Cluster)}
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in known:
            raise UserError(
                f"cluster: there is no setting '{name}'.{nearest(name, known)} "
                f"Known: {', '.join(known)}."
            )
        if known[name] is str:
            values[name] = "" if value is None else str(value).strip()
        elif isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            values[name] = value
        else:
            raise UserError(f"cluster: '{name}' must be a number above 0, not {value!r}.")
    return Cluster(**values)
