"""Plans and methods, printed for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from mergelab.grouping import rows
from mergelab.methods.base import Method, Parameter
from mergelab.parameters import bounds
from mergelab.progress import size

out = Console(highlight=False, emoji=False)


def plan(description: dict[str, Any], costs: dict[str, Any]) -> None:
    """Print a plan (`plan.describe`), its costs (`estimate.costs`) and what applies to what."""
    out.print(f"[bold]{description['method']}[/]")
    titles = (Column(t, overflow="fold") for t in ("model", "where", "tensors", "layers"))
    inputs = Table(*titles, box=None, pad_edge=False)
    for name, facts in description["inputs"].items():
        where = _where(costs["inputs"].get(name), facts["folder"])
        named = f"{name} (base)" if name == description["base"] else name
        told = (named, "" if where == name else where, facts["tensors"], facts["layers"])
        inputs.add_row(*(Text(str(cell)) for cell in told))
    out.print(inputs)
    kinds, files = ", ".join(description["dtypes"]), len(description["files"])
    out.print(
        f"\nreads  {_reads(description['bytes_in'], costs)}\n"
        f"writes {size(description['bytes_out'])}: {description['tensors']} tensors, {kinds}, "
        f"{files} file(s)\n"
        f"memory about {size(description['bytes_memory'])} per worker"
    )
    for line in _costs(costs, description["bytes_out"]):
        out.print(Text(line))
    if description["vocabulary"]:
        out.print(Text(f"tokens {description['vocabulary']}"))
    for warning in description["warnings"]:
        out.print(Text(f"note: {warning}"))
    columns = (Column(title, overflow="fold") for title in ("tensors", "parameters"))
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 1, 0))
    for label, values in rows(description["groups"]):
        table.add_row(Text(label), Text(values))
    out.print()
    out.print(table)


def _reads(bytes_in: int, costs: dict[str, Any]) -> str:
    """What a merge reads, in words; files that an earlier one has hashed are not hashed again."""
    (least, most), hashed = costs["passes"], costs["hashed"]
    total, times = size(hashed + most * bytes_in), f" {most} times" if most > 1 else ""
    if least < most:
        total, times = f"up to {total}", f" {least} to {most} times"
    return f"{total}: {size(hashed)} to hash new files, {size(bytes_in)} of tensors{times}"


def _where(source: dict[str, Any] | None, folder: str) -> str:
    if not source:
        return folder
    model = f"{source['hub']}@{source['commit'][:12]}"
    download = source["download"]
    return f"{model}, to download: {size(download)}" if download else f"{model}, in {folder}"


def _costs(costs: dict[str, Any], bytes_out: int) -> list[str]:
    """Room and time, in words."""
    lines = [f"fetch  {size(costs['download'])} from the hub first"] if costs["download"] else []
    if costs["free"] is not None:
        need = bytes_out + costs["download"]
        lack = "" if need <= costs["free"] else ": TOO LITTLE"
        lines.append(f"disk   {size(need)}; {size(costs['free'])} free at {costs['out']}{lack}")
    if costs["seconds"] is not None:
        speeds = [f"{size(costs[speed])}/s" for speed in ("read_speed", "write_speed")]
        lines.append(
            f"time   {_duration(costs['seconds'])} for the disks, if nothing is cached: reads "
            f"at {speeds[0]}, writes at {speeds[1]} (just measured); arithmetic comes on top"
        )
    elif costs["download"]:
        lines.append("time   unknown before the models are here")
    else:
        why = "a disk could not be measured, or the files are too small for that"
        lines.append(f"time   unknown: {why}")
    return lines


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * length:
            return f"about {seconds / length:.0f} {unit}"
    return "less than 2 s"


def methods(table: Sequence[Method], *, full: bool) -> None:
    """Print merge methods: one line each, or everything about one."""
    if not full:
        rows = Table("method", "what it does", box=None, pad_edge=False)
        for method in table:
            rows.add_row(method.name, Text(method.summary))
        out.print(rows)
        out.print("\nMore about one: mergelab explain METHOD")
        return
    for method in table:
        _method(method)


def _method(method: Method) -> None:
    out.print(f"[bold]{method.name}[/] (version {method.version})\n{method.summary}\n")
    least, most = method.experts
    count = f"{least}" if least == most else f"{least} or more"
    models = {
        "needed": f"base_model and {count} other (the base may be listed, too)",
        "optional": f"{count}; with a base_model besides, their task vectors are merged",
        "ordinary": f"{count}; base_model, if given, lends its config and tokenizer",
        "none": f"{count} per slice",
    }
    out.print(f"Models: {models[method.base]}.\n")
    if not method.parameters:
        out.print("It has no parameters.")
        _notes(method)
        return
    rows = Table("parameter", "where", "default", "meaning", box=None, pad_edge=False)
    for parameter in method.parameters:
        where = "per model" if parameter.per_model else "whole merge"
        rows.add_row(parameter.name, where, _default(parameter), Text(_meaning(parameter)))
    out.print(rows)
    out.print("\nNumbers may be gradients over the layers ([0, 0.5, 1]) or have filters.")
    _notes(method)


def _notes(method: Method) -> None:
    for title, lines in (("Papers", method.papers), ("Unlike mergekit 0.1.5", method.differs)):
        if lines:
            out.print(f"\n{title}:")
            for line in lines:
                out.print(Text(f"- {line}"))


def _default(parameter: Parameter) -> str:
    if parameter.required:
        return "required"
    if isinstance(parameter.default, bool | str):
        return str(parameter.default).lower()
    return f"{parameter.default:g}"


def _meaning(parameter: Parameter) -> str:
    if parameter.choices:
        return f"{parameter.help} ({' | '.join(parameter.choices)})"
    return f"{parameter.help} ({bounds(parameter)})" if bounds(parameter) else parameter.help
