"""Models put together from whole tensors: copies, stacks of layers, mixtures of experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mergelab.checkpoint import Checkpoint, split_layer
from mergelab.forensics.origins import expert
from mergelab.forensics.readings import hypothesis, parent

Copies = Mapping[str, Sequence[tuple[str, str]]]
WHOLE = {"r2": 1.0, "residual": 0.0, "rounding": True, "explained": 1.0}


def stacked(model: Checkpoint, same: Copies, order: Sequence[str]) -> dict[str, Any]:
    """The reading of a model all of whose tensors are copies: slices of candidates, in order.

    A layer comes from the candidate that has all its tensors in one layer of its own."""
    homes = {layer: home(model, layer, same, order) for layer in range(model.layers)}
    slices: list[dict[str, Any]] = []
    for _, (name, source) in sorted(homes.items()):
        last = slices[-1] if slices else None
        if last and last["model"] == name and last["layers"][1] == source:
            last["layers"][1] = source + 1
        else:
            slices.append({"model": name, "layers": [source, source + 1]})
    outside = [n for n in same if split_layer(n)[1] is None]
    names = Counter({s["model"]: 0 for s in slices})
    for piece in slices:
        names[piece["model"]] += piece["layers"][1] - piece["layers"][0]
    used = {owner for n in outside for owner, _ in same[n]}
    if outside and not used & names.keys():
        names[min(used, key=list(order).index)] += 0
    total = max(1, sum(names.values()))
    method = "copy" if len(names) == 1 and len(slices) <= 1 and _straight(model, homes) else None
    parents = [parent(n, names[n] / total if model.layers else 1.0) for n in order if n in names]
    parameters = {} if method else {"slices": slices}
    why = "all tensors are copies of one of these models' (weight: share of the layers)"
    return hypothesis(method or "passthrough", parents, parameters, WHOLE, why)


def _straight(model: Checkpoint, homes: Mapping[int, tuple[str, int]]) -> bool:
    return all(layer == source for layer, (_, source) in homes.items())


def home(model: Checkpoint, layer: int, same: Copies, order: Sequence[str]) -> tuple[str, int]:
    """The candidate and its layer that hold most of a layer's tensors; its own number if any."""
    votes: Counter[tuple[str, int]] = Counter()
    for name in model.tensors:
        prefix, number, _ = split_layer(name)
        if prefix == model.stack and number == layer:
            votes.update({(o, split_layer(n)[1] or 0) for o, n in same.get(name, ())})
    return min(votes, key=lambda v: (-votes[v], v[1] != layer, list(order).index(v[0]), v[1]))


def experts(model: Checkpoint) -> dict[int, list[str]]:
    """Tensors of each expert of a mixture; empty for a dense model."""
    found: dict[int, list[str]] = {}
    for name in sorted(model.tensors):
        if mine := expert(name):
            found.setdefault(mine[0], []).append(name)
    return found


def routers(model: Checkpoint) -> list[str]:
    """Tensors that choose between experts: no dense model has them."""
    return [
        n
        for n in sorted(model.tensors)
        if n.endswith(("block_sparse_moe.gate.weight", "mlp.gate.weight"))
    ]


def mixture(
    model: Checkpoint, same: Copies, order: Sequence[str], rest: Sequence[str]
) -> dict[str, Any] | None:
    """The reading of experts that are copies of dense models' MLPs; None if too few are.

    `rest`: models that the other tensors come from."""
    owners: dict[int, str] = {}
    groups = experts(model)
    for number, names in groups.items():
        votes = Counter(o for n in names for o in {o for o, _ in same.get(n, ())})
        if votes and max(votes.values()) == len(names):
            owners[number] = min(
                (o for o in votes if votes[o] == len(names)), key=list(order).index
            )
    if not groups or len(owners) < len(groups):
        return None
    share = Counter(owners.values())
    named = [n for n in order if n in share or n in rest]
    parents = [parent(n, share[n] / len(owners)) for n in named]
    parameters = {
        "experts": {str(number): owner for number, owner in sorted(owners.items())},
        "base": list(rest),
    }
    why = (
        "every expert has the bits of one dense model's MLP (weight: share of the experts); the "
        "other tensors come from `base`; the routers come from no candidate"
    )
    return hypothesis("moe", parents, parameters, WHOLE, why)
