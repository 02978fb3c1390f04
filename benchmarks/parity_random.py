"""Every method and 20 random recipes, by mergelab and by mergekit 0.1.5: how far apart?

Recipes with gradients, filters and slices over random float32 models. Each is merged by both tools
in float32 and once more in float64: the formulas are the same if the float64 results agree; in
float32 the peer's float64 result says whose rounding is whose. Random masks differ by design:
those methods are compared at density 1, and their masks by statistics. Exit code 1 if a target is
missed. The peer gets an environment of its own (peer.py)."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import options
import peer
import yaml
from parity import machine
from parity_models import FAMILIES, NAMES, Array, Size, config, shapes, values
from parity_random_recipes import Case, fixed_cases, random_cases, sparse_cases
from safetensors.numpy import load_file, save_file

from mergelab import engine
from mergelab.plan import SHARD_SIZE, Plan, make_plan
from mergelab.recipe import load_recipe
from mergelab.writer import Planned

SIZE = Size(500, 64, 96, 3)
ULPS, RELATIVE = 4.0, 1e-12  # targets in float32 and in float64
HEADER = (
    "| recipe | models | differ | largest, ulp | largest, relative | error of mergelab, ulp | "
    "error of mergekit, ulp | other selection / free | in float64, relative | holds |"
)
MASK_HEADER = (
    "| recipe | share, mergelab | share, mergekit | norm, mergelab | norm, mergekit | holds |"
)
LEGEND = """
- Recipes: `parity_random_recipes.py` makes the same ones each time; dare and della at density 1.
- One **ulp** is the float32 spacing at the largest magnitude among result, base and experts;
  **relative** is to the largest entry of the tensor. Columns 3 to 5: the two float32 results.
- **error**: of a float32 result against the peer's float64 result of the same recipe.
- **other selection / free**: entries left out because one of the experts has an equal magnitude at
  a cut (ties, breadcrumbs), or a variance within rounding of it (sce): how many the tools chose
  differently, and how many there are. The peer sorts unstably.
- **holds**: the float64 results agree to 1e-12, and in float32 either the tools agree to 4 ulp or
  mergelab's error is at most the larger of mergekit's and 4 ulp: mergekit sums norms and dot
  products in float32 where mergelab sums in float64.
- arcee_fusion in float32 is shown only: the peer's KL divergences of nearly equal rows are rounding
  noise in float32, so it selects by chance; in float64 both select the same entries.
- ramplus_tl in float64: the peer takes its one ratio per expert in float32, to 1e-7.
"""
LOOSE = {"ramplus_tl": 1e-6}  # float64 targets of methods that the peer computes in float32


@dataclass
class Row:
    """What was seen of one recipe, over all tensors; errors and largest in ulps."""

    case: Case
    entries: int = 0
    differ: int = 0
    largest: float = 0.0
    relative: float = 0.0
    ours: float = 0.0
    theirs: float = 0.0
    other: int = 0
    free: int = 0
    wide: float = 0.0

    @property
    def holds(self) -> bool:
        """Are the targets kept?"""
        right = self.wide <= LOOSE.get(self.case.method, RELATIVE)
        near = self.largest <= ULPS or self.ours <= max(self.theirs, ULPS)
        return right and (near or self.case.method == "arcee_fusion")


def write_models(folder: Path, family: str, seed: int) -> None:
    """base, a, b, c as float32 Qwen2 models."""
    for model, name in enumerate(NAMES):
        place = folder / name
        place.mkdir(parents=True)
        found = {
            key: np.ascontiguousarray(values(family, seed, model, index, shape), "<f4")
            for index, (key, shape) in enumerate(shapes("qwen2", SIZE, head=False).items())
        }
        save_file(found, place / "model.safetensors")
        facts = config("qwen2", SIZE, tied=True)
        (place / "config.json").write_text(json.dumps(facts))


def merged(
    case: Case, folder: Path, mergekit: peer.Peer, dtype: str
) -> tuple[dict[str, Array], dict[str, Array], Plan]:
    """Both tools' tensors (ours, theirs) as float64, and our plan."""
    place = folder / f"{case.number}-{dtype}"
    place.mkdir()
    text = yaml.safe_dump({**case.recipe(folder / case.family), "dtype": dtype}, sort_keys=False)
    path = place / "recipe.yaml"
    path.write_text(text)
    recipe = load_recipe(path)
    plan = make_plan(recipe, {m: Path(m) for m in recipe.models}, shard_size=SHARD_SIZE)
    engine.merge(plan, place / "ours")
    mergekit.merge(path, place / "theirs")
    ours, theirs = (load_file(place / tool / "model.safetensors") for tool in ("ours", "theirs"))
    if ours.keys() != theirs.keys():
        raise SystemExit(f"{case.name}: only one tool wrote {sorted(ours.keys() ^ theirs.keys())}")
    both = ({n: np.asarray(x, float) for n, x in found.items()} for found in (ours, theirs))
    return (*both, plan)


def compare(case: Case, folder: Path, mergekit: peer.Peer) -> Row:
    """Merge a recipe four times and compare, tensor by tensor."""
    row = Row(case)
    ours, theirs, plan = merged(case, folder, mergekit, "float32")
    wide, truth, _ = merged(case, folder, mergekit, "float64")
    for tensor in plan.tensors:
        name, scale = tensor.name, np.max(np.abs(truth[tensor.name]))
        inputs = [np.abs(stored(source)) for source in tensor.sources]
        top = np.max([np.abs(truth[name]), *inputs], axis=0).astype("<f4")
        same = ~free(case.method, tensor)
        apart = np.abs(ours[name] - theirs[name])
        row.entries += apart.size
        row.free += int(np.count_nonzero(~same))
        row.other += int(np.count_nonzero(apart[~same]))
        row.differ += int(np.count_nonzero(apart[same]))
        for what, gap in (("largest", apart), ("ours", np.abs(ours[name] - truth[name])),
                          ("theirs", np.abs(theirs[name] - truth[name]))):  # fmt: skip
            seen = float(np.max(gap / np.spacing(top), where=same, initial=0))
            setattr(row, what, max(getattr(row, what), seen))
        for what, gap in (("relative", apart), ("wide", np.abs(wide[name] - truth[name]))):
            seen = float(np.max(gap / scale, where=same, initial=0))
            setattr(row, what, max(getattr(row, what), seen))
    return row


def stored(source: Any) -> Array:
    """One input tensor in its shape, as float32."""
    found: Array = source.floats(0, source.size).reshape(source.shape)
    return found


def free(method: str, tensor: Planned) -> Array:
    """Entries that either tool may keep or drop: those at a cut among equals."""
    found = np.zeros(tensor.shape, bool)
    if method not in ("ties", "breadcrumbs", "breadcrumbs_ties", "sce") or tensor.base is None:
        return found
    base = stored(tensor.base)
    deltas = [stored(expert) - base for expert in tensor.experts]
    if method == "sce":
        variance = np.var(np.array(deltas, float), axis=0)
        count = int(np.count_nonzero(variance) * tensor.settings.shared["select_topk"])
        return at_cut(variance, count, 1e-5) if count < variance.size else found
    for delta, own in zip(deltas, tensor.settings.experts, strict=True):
        size, magnitude = delta.size, np.abs(delta)
        count = max(int(method == "ties"), int(own["density"] * size))
        first = min(int(own.get("gamma", 0) * size), size - count)
        if own["density"] < 1:
            found |= at_cut(magnitude, first, 0) | at_cut(magnitude, first + count, 0)
    return found


def at_cut(magnitude: Array, rank: int, slack: float) -> Array:
    """Entries within `slack` (relative) of the rank-th largest, if others of them lie below it."""
    if not 0 < rank < magnitude.size:
        return np.zeros(magnitude.shape, bool)
    ordered = np.sort(magnitude, axis=None)[::-1]
    cut = ordered[rank - 1]
    near = np.abs(magnitude - cut) <= slack * cut
    split = np.count_nonzero(magnitude > cut * (1 + slack)) + np.count_nonzero(near) > rank
    return near if split or slack else np.zeros(magnitude.shape, bool)


@dataclass
class Mask:
    """Statistics of one random method's masks: kept share in standard deviations, L1 ratio - 1."""

    case: Case
    share: dict[str, float]
    norm: dict[str, float]

    @property
    def holds(self) -> bool:
        """Is every tensor's share within 4.5 deviations, every norm kept to 1e-5?"""
        return max(self.share.values()) <= 4.5 and max(self.norm.values()) <= 1e-5


def statistics(case: Case, folder: Path, mergekit: peer.Peer) -> Mask:
    """Merge one expert with weight 1 and a density, and look at what is left of it."""
    ours, theirs, plan = merged(case, folder, mergekit, "float64")
    mask = Mask(case, {"ours": 0.0, "theirs": 0.0}, {"ours": 0.0, "theirs": 0.0})
    for tensor in (t for t in plan.tensors if t.size >= 1000 and t.base is not None):
        (density,) = tensor.settings.each("density")
        base = stored(tensor.base).astype(float)
        delta = stored(tensor.experts[0]).astype(float) - base
        for tool, result in (("ours", ours), ("theirs", theirs)):
            left = result[tensor.name] - base
            count, mean = np.count_nonzero(np.abs(left) > 1e-12), density * delta.size
            gap = abs(count - mean) / np.sqrt(mean * (1 - density))
            mask.share[tool] = max(mask.share[tool], float(gap))
            ratio = np.abs(left).sum() / np.abs(delta).sum()
            mask.norm[tool] = max(mask.norm[tool], float(abs(ratio - 1)))
    return mask


def page(rows: list[Row], masks: list[Mask], facts: dict[str, Any], seconds: float) -> str:
    """The Markdown report."""
    table = []
    for row in rows:
        share = f"{row.differ / row.entries:.2%}" if row.differ else "0"
        numbers = (row.largest, row.relative, row.ours, row.theirs)
        chosen = f"{row.other} / {row.free}" if row.free else ""
        cells = (row.case.name, row.case.family, share, *(f"{x:.3g}" for x in numbers), chosen,
                 f"{row.wide:.2g}", "yes" if row.holds else "**no**")  # fmt: skip
        table.append("| " + " | ".join(cells) + " |")
    drawn = []
    for mask in masks:
        numbers = (*mask.share.values(), *mask.norm.values())
        cells = (mask.case.name, *(f"{x:.2g}" for x in numbers), "yes" if mask.holds else "**no**")
        drawn.append("| " + " | ".join(cells) + " |")
    used = sorted({row.case.family for row in rows})
    lines = [
        "# Every method, and random recipes, beside mergekit", "",
        f"{time.strftime('%Y-%m-%d')}, {seconds:.0f} s. {machine(facts)}.", "",
        HEADER, "|---|---|--:|--:|--:|--:|--:|--:|--:|---|", *table, "",
        *(f"- **{name}** models: {FAMILIES[name]} (float32 here)." for name in used),
        LEGEND.strip(), "", "## Masks", "",
        "Per tensor of 1000 entries or more, at worst: how far the kept share is from the density, "
        "in standard deviations of independent draws, and how far the L1 norm is from what it was.",
        "", MASK_HEADER, "|---|--:|--:|--:|--:|---|", *drawn,
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def entries(rows: list[Row], masks: list[Mask]) -> Iterator[dict[str, Any]]:
    """The numbers for --json."""
    for row in rows:
        limit = LOOSE.get(row.case.method, RELATIVE)
        right = {"target": f"<= {limit:g}", "holds": row.wide <= limit}
        name, none = f"{row.case.name} ({row.case.family})", {"target": None, "holds": None}
        yield {"name": f"{name}: float64", "value": row.wide, "unit": "relative", **right}
        goal = {"target": f"<= {ULPS:g}, or no less exact", "holds": row.holds}
        goal = none if row.case.method == "arcee_fusion" else goal
        yield {"name": f"{name}: float32", "value": row.largest, "unit": "ulp", **goal}
        for tool, error in (("mergelab", row.ours), ("mergekit", row.theirs)):
            yield {"name": f"{name}: error of {tool}", "value": error, "unit": "ulp", **none}
    for mask in masks:
        goal = {"target": "<= 4.5", "holds": mask.holds}
        share = max(mask.share.values())
        yield {"name": f"{mask.case.name}: kept", "value": share, "unit": "deviations", **goal}


def main() -> int:
    """Parse arguments, run, report."""
    arguments = options.parsed(__doc__, quick="five random recipes, not twenty")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, family in enumerate(FAMILIES):
            write_models(folder / family, family, seed)
        with peer.started(arguments.python, folder / "peer.log") as mergekit:
            cases = [*fixed_cases(), *random_cases(5 if arguments.quick else 20)]
            rows = [compare(case, folder, mergekit) for case in cases]
            masks = [statistics(case, folder, mergekit) for case in sparse_cases()]
            facts = mergekit.facts
    text = page(rows, masks, facts, time.monotonic() - started)
    options.report(text, entries(rows, masks), arguments.json)
    return 0 if all(x.holds for x in (*rows, *masks)) else 1


if __name__ == "__main__":
    sys.exit(main())
