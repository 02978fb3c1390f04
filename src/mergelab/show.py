"""Plans and methods, printed for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mergelab.methods.base import Method, Parameter
from mergelab.progress import size

out = Console(highlight=False)


def plan(description: dict[str, Any]) -> None:
    """Print a plan: inputs, outputs, and parameters per group of tensors."""
    out.print(f"[bold]{description['method']}[/]")
    inputs = Table("model", "folder", "tensors", "layers", box=None, pad_edge=False)
    for name, facts in description["inputs"].items():
        row = (name, facts["folder"], str(facts["tensors"]), str(facts["layers"]))
        inputs.add_row(*map(Text, row))
    out.print(inputs)
    memory = description["bytes_memory"]
    out.print(
        f"\nreads  {size(description['bytes_in'])}\n"
        f"writes {size(description['bytes_out'])}: {description['tensors']} tensors, "
        f"{', '.join(description['dtypes'])}, {len(description['files'])} file(s)\n"
        f"memory about {size(memory)} per worker"
    )
    for warning in description["warnings"]:
        out.print(Text(f"note: {warning}"))
    groups = Table(
        "tensors (first … last by name, how many)", "parameters", box=None, pad_edge=False
    )
    for group in description["groups"]:
        names = group["tensors"]
        label = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})"
        groups.add_row(Text(label), Text(_values(group)))
    out.print()
    out.print(groups)


def _values(group: dict[str, Any]) -> str:
    lines = [_pairs(group["shared"])] if group["shared"] else []
    lines += [f"{model}: {_pairs(values)}" for model, values in group["models"].items() if values]
    return "\n".join(lines)


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()
    )


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
        "ordinary": f"{count}; base_model, if given, lends its config and tokenizer",
        "none": f"{count} per slice",
    }
    out.print(f"Models: {models[method.base]}.\n")
    rows = Table("parameter", "where", "default", "meaning", box=None, pad_edge=False)
    for parameter in method.parameters:
        where = "per model" if parameter.per_model else "whole merge"
        rows.add_row(parameter.name, where, _default(parameter), Text(_meaning(parameter)))
    out.print(rows)
    out.print("\nNumbers may be gradients over the layers ([0, 0.5, 1]) or have filters.")
    for title, lines in (("Papers", method.papers), ("Unlike mergekit 0.1.5", method.differs)):
        if lines:
            out.print(f"\n{title}:")
            for line in lines:
                out.print(Text(f"- {line}"))


def _default(parameter: Parameter) -> str:
    if parameter.required:
        return "required"
    return str(parameter.default).lower() if parameter.kind == "flag" else f"{parameter.default:g}"


def _meaning(parameter: Parameter) -> str:
    if parameter.low is None or parameter.high is None:
        return parameter.help
    return f"{parameter.help} ({parameter.low:g} to {parameter.high:g})"
