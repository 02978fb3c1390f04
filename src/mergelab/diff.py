"""Two checkpoints compared tensor by tensor, in blocks: which tensors differ, and by how much.

Every measure is exact or summed in float64 over fixed blocks in order: the same on every machine,
for any number of workers (C3). Memory is a few blocks per worker (C2)."""

from __future__ import annotations

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Column, Table
from rich.text import Text

from mergelab.checkpoint import (
    BITS,
    FLOATS,
    Checkpoint,
    Tensor,
    count_not_finite,
    from_float,
    to_float,
)
from mergelab.progress import bar, printable
from mergelab.show import out

Array = np.ndarray[Any, Any]
BLOCK = 1 << 16  # elements; one block of each tensor and its float64 copies stay in cache
ROWS = 20  # tensors told to people
KEYS = 12  # names told to people
MEASURES = ("differing", "share", "max_ulp", "max_abs", "cosine", "not_finite")


def compare(a: Checkpoint, b: Checkpoint, workers: int = 1) -> dict[str, Any]:
    """Measure how two checkpoints differ; a plain dict that `json.dumps` takes.

    identical: both hold the same tensors with the same dtypes, shapes and bits.
    only_a, only_b: names of tensors that the other one lacks. config: keys of config.json that
    differ (never part of `identical`). totals: `tensors` that both hold, how many are `equal`,
    `different`, `not_compared`; sums, extremes, and the name of the `worst` of the different ones.
    tensors: one entry per tensor that both hold, in order of names; lists are [of a, of b]:

    - equal: same dtype, shape and bits. A NaN equals a NaN of the same bits.
    - differing, share: entries whose bits differ, as number and as share of all. 0.0 and -0.0
      differ, by 0 ulp.
    - max_ulp: the most steps from one entry to the other through the numbers of their format,
      where 0.0 and -0.0 are one number; for integers their difference.
    - max_abs: the largest absolute difference, in float64 (at most the largest float64).
    - cosine: of the flat tensors; 1 if equal, None if one of them has no length.
    - not_finite: entries that are infinite or NaN. An entry that is so in either tensor takes no
      part in max_ulp, max_abs and cosine.

    Floats of different dtypes are compared in the format that holds both (`compared_as`; float32
    for float16 and bfloat16), their ulp counted in the coarser one, after rounding to it
    (`ulp_of`; bfloat16 is coarser than float16): 0 ulp if one tensor is the other one rounded.
    Other dtypes that differ, and shapes that differ, are not compared: all measures are None."""
    _keep_freed_memory()
    names = sorted(a.tensors.keys() & b.tensors.keys())
    pairs = [(a.tensors[name], b.tensors[name]) for name in names]
    total = sum(x.nbytes + y.nbytes for x, y in pairs)
    with bar("compare", total) as progress, ThreadPoolExecutor(workers) as pool:

        def work(pair: tuple[Tensor, Tensor]) -> dict[str, Any]:
            entry = _entry(*pair)
            progress.advance(pair[0].nbytes + pair[1].nbytes)
            return entry

        try:
            entries = list(pool.map(work, pairs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    alone = [sorted(x.tensors.keys() - y.tensors.keys()) for x, y in ((a, b), (b, a))]
    return {
        "a": a.label,
        "b": b.label,
        "identical": not any(alone) and all(entry["equal"] for entry in entries),
        "only_a": alone[0],
        "only_b": alone[1],
        "config": _differing_keys(a.config, b.config),
        "totals": _totals(entries),
        "tensors": entries,
    }


def _keep_freed_memory() -> None:
    """Let the C library reuse the memory of blocks: with glibc, a fifth of the time.

    It returns freed arrays of this size to the system, and every new one faults its pages in,
    until one that is larger than all of them was freed (mallopt(3), M_MMAP_THRESHOLD)."""
    np.empty(4 * BLOCK)  # float64, freed at once


def _entry(a: Tensor, b: Tensor) -> dict[str, Any]:
    """What `compare` says of one tensor."""
    wide, coarse = _formats(a.dtype, b.dtype) if a.shape == b.shape else (None, None)
    measures: dict[str, Any] = dict.fromkeys(MEASURES)
    if wide and coarse:
        measures = _measure(a, b, wide, coarse)
    return {
        "name": a.name,
        "equal": a.dtype == b.dtype and measures["differing"] == 0,
        "dtypes": [a.dtype, b.dtype],
        "shapes": [list(a.shape), list(b.shape)],
        "elements": a.size if wide else None,
        "compared_as": wide,
        "ulp_of": coarse,
        **measures,
    }


def _formats(a: str, b: str) -> tuple[str, str] | tuple[None, None]:
    """The dtype that holds the values of both, and the one with fewer significant bits."""
    if a == b:
        return a, a
    if not {a, b} <= set(FLOATS):
        return None, None
    wide, coarse = sorted((a, b), key=FLOATS.index)  # F64, F32, F16, BF16: ever fewer bits
    return ("F32" if wide == "F16" else wide), coarse


def _measure(a: Tensor, b: Tensor, wide: str, coarse: str) -> dict[str, Any]:
    """Fold the blocks of two tensors of one shape; equal blocks are told by their bits alone."""
    x, y = np.asarray(a.bits()), np.asarray(b.bits())  # memory maps: nothing is read yet
    tally, equal = _Tally(a.dtype, b.dtype, wide, coarse), []
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, a.size, BLOCK):
            block = slice(start, start + BLOCK)
            if a.dtype == b.dtype and np.array_equal(_unsigned(x[block]), _unsigned(y[block])):
                tally.not_finite += count_not_finite(x[block], a.dtype)
                equal.append(block)
            else:
                tally.add(x[block], y[block])
        for block in equal if tally.differing else ():  # only the cosine needs them
            tally.add_equal(x[block])
    return {
        "differing": tally.differing,
        "share": tally.differing / max(a.size, 1),
        "max_ulp": tally.max_ulp,
        "max_abs": min(tally.max_abs, sys.float_info.max),
        "cosine": tally.cosine,
        "not_finite": tally.not_finite.tolist(),
    }


@dataclass
class _Tally:
    """Sums and extremes over two tensors of dtypes a and b; xx, yy, xy are dot products.

    wide, coarse: the formats of `_formats`; not_finite (2): counts of a and of b."""

    a: str
    b: str
    wide: str
    coarse: str
    differing: int = 0
    max_ulp: int = 0
    max_abs: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0
    not_finite: Array = field(default_factory=lambda: np.zeros(2, np.int64))

    def add(self, x: Array, y: Array) -> None:
        """Fold in one block of stored entries."""
        wrong = count_not_finite(x, self.a), count_not_finite(y, self.b)
        self.not_finite += wrong
        bits, others = (_widened(z, dtype, self.wide) for z, dtype in ((x, self.a), (y, self.b)))
        self.differing += int(np.count_nonzero(_unsigned(bits) != _unsigned(others)))
        u, v = to_float(x, self.a, "<f8"), to_float(y, self.b, "<f8")
        if any(wrong):
            keep = np.isfinite(u) & np.isfinite(v)
            x, y, u, v = x[keep], y[keep], u[keep], v[keep]
        if self.a != self.b:
            x, y = from_float(u, self.coarse), from_float(v, self.coarse)
        self.max_ulp = max(self.max_ulp, _max_steps(x, y, self.coarse))
        self.max_abs = max(self.max_abs, float(np.abs(u - v).max(initial=0)))
        self.xx += float((u * u).sum())
        self.yy += float((v * v).sum())
        self.xy += float((u * v).sum())

    def add_equal(self, x: Array) -> None:
        """Complete the dot products with a block that is the same in both."""
        u = to_float(x, self.a, "<f8")
        square = float(np.square(u[np.isfinite(u)]).sum())
        self.xx += square
        self.yy += square
        self.xy += square

    @property
    def cosine(self) -> float | None:
        """1 if nothing differs; None if a length is 0 or overflows."""
        if not self.differing:
            return 1.0
        lengths = math.sqrt(self.xx) * math.sqrt(self.yy)
        return min(1.0, max(-1.0, self.xy / lengths)) if 0 < lengths < math.inf else None


def _widened(bits: Array, dtype: str, wide: str) -> Array:
    return bits if dtype == wide else to_float(bits, dtype, BITS[wide])


def _unsigned(bits: Array) -> Array:
    return bits.view(f"<u{bits.dtype.itemsize}")


def _max_steps(x: Array, y: Array, dtype: str) -> int:
    """Largest distance between stored entries, in steps from one number of the format to the next.

    Exact up to 2**64: the difference is taken in unsigned integers of the entries' own width."""
    if dtype in FLOATS:
        x, y = _rank(x), _rank(y)
    return int((_unsigned(np.maximum(x, y)) - _unsigned(np.minimum(x, y))).max(initial=0))


def _rank(bits: Array) -> Array:
    """Number the values of a float format in ascending order; 0.0 and -0.0 are number 0."""
    signed = bits.view(f"<i{bits.dtype.itemsize}")
    minus = signed >> (8 * bits.dtype.itemsize - 1)  # -1 where the sign bit is set, else 0
    magnitude = signed & np.iinfo(signed.dtype).max
    rank: Array = (magnitude ^ minus) - minus
    return rank


def _totals(entries: list[dict[str, Any]]) -> dict[str, Any]:
    compared = [entry for entry in entries if entry["compared_as"]]
    different = sorted((e for e in entries if not e["equal"]), key=_badness)
    elements = sum(entry["elements"] for entry in compared)
    differing = sum(entry["differing"] for entry in compared)
    cosines = [entry["cosine"] for entry in compared if entry["cosine"] is not None]
    return {
        "tensors": len(entries),
        "equal": len(entries) - len(different),
        "different": len(different),
        "not_compared": len(entries) - len(compared),
        "elements": elements,
        "differing": differing,
        "share": differing / max(elements, 1),
        "max_ulp": max((entry["max_ulp"] for entry in compared), default=0),
        "max_abs": max((entry["max_abs"] for entry in compared), default=0.0),
        "min_cosine": min(cosines, default=None),
        "not_finite": [sum(entry["not_finite"][i] for entry in compared) for i in (0, 1)],
        "worst": different[0]["name"] if different else None,
    }


def _badness(entry: dict[str, Any]) -> tuple[Any, ...]:
    """Worst first: not comparable, then not finite, then by largest absolute difference."""
    if not entry["compared_as"]:
        return (0,)
    return (1 if any(entry["not_finite"]) else 2, -entry["max_abs"], -entry["share"])


def _differing_keys(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    missing = object()
    return sorted(k for k in a.keys() | b.keys() if a.get(k, missing) != b.get(k, missing))


def show(result: dict[str, Any]) -> None:
    """Print a comparison for people: the answer first, then the tensors that differ."""
    totals = result["totals"]
    for line in _summary(result):
        out.print(Text(printable(line)))
    if not totals["different"]:
        return
    different = sorted((e for e in result["tensors"] if not e["equal"]), key=_badness)
    titles = ("tensor, worst first", "dtype", "differ", "max ulp", "max diff", "cosine")
    rows = Table(*(Column(title, overflow="fold") for title in titles), box=None, pad_edge=False)
    for entry in different[:ROWS]:
        rows.add_row(*map(Text, _row(entry)))
    out.print()
    out.print(rows)
    if len(different) > ROWS:
        out.print(f"... and {len(different) - ROWS} more; --json lists them all")


def _summary(result: dict[str, Any]) -> list[str]:
    totals = result["totals"]
    if result["identical"]:
        lines = [f"identical: all {totals['tensors']} tensors have the same bits"]
    else:
        lines = [f"different: {totals['different']} of {totals['tensors']} common tensors differ"]
    if totals["differing"]:
        lines.append(
            f"{totals['differing']:,} of {totals['elements']:,} elements ({_percent(totals)}), by "
            f"up to {totals['max_ulp']:,} ulp and {totals['max_abs']:.3g}"
        )
    if totals["worst"]:
        lines.append(f"worst: {totals['worst']}")
    if any(totals["not_finite"]):
        first, second = totals["not_finite"]
        lines.append(f"infinite or NaN, not measured: {first:,} elements of A, {second:,} of B")
    for title, names in (
        ("only in A", result["only_a"]),
        ("only in B", result["only_b"]),
        ("config.json differs", result["config"]),
    ):
        if names:
            more = f" and {len(names) - KEYS} more" if len(names) > KEYS else ""
            lines.append(f"{title} ({len(names)}): {', '.join(names[:KEYS])}{more}")
    return lines


def _percent(measures: dict[str, Any]) -> str:
    """A share in percent, never shown as 0 if it is more."""
    share = measures["share"]
    return f"{share:.2%}" if share == 0 or share >= 5e-5 else "<0.01%"


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    dtypes = entry["dtypes"]
    dtype = "/".join(dict.fromkeys(dtypes))
    if not entry["compared_as"]:
        first, second = entry["shapes"]
        why = f"shapes {first} and {second}" if first != second else "not comparable"
        return f"{entry['name']}\n  {why}", dtype, "", "", "", ""
    steps = f"{entry['max_ulp']:,}"
    if dtypes[0] != dtypes[1]:
        steps += f" of {entry['ulp_of']}"
    cosine = "" if entry["cosine"] is None else f"{entry['cosine']:.8f}"
    return entry["name"], dtype, _percent(entry), steps, f"{entry['max_abs']:.3g}", cosine
