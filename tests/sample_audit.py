"""A made-up audit (audit.json) of a 7B slerp, as large and as mixed as a real one."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import numpy as np

MODEL = "example/Marco14-7B-slerp"
TUNED = "example-business/Marco-tuned-7B-v3"
MERGED = "other-example/Base-7B-Merge-of-14-v0.1"
STARRY = "example-nest/Starry-7B-alpha"
GONE = "another/LionDog-7B-Chat-DPO"
THREE = "third-example/three-v1"
DATA = "datasets/example-nest/Flowers"
BASE = "example-ai/Base-7B-v0.1"
METAL = "fourth/MetaMetal-Starry"
CARD = "https://example.org/Marco14-7B-slerp/README.md"
DISCUSSION = "https://example.org/discussions/474"

RECIPE = f"""slices:
  - sources:
      - {{model: {TUNED}, layer_range: [0, 32]}}
      - {{model: {MERGED}, layer_range: [0, 32]}}
merge_method: slerp
base_model: {TUNED}
parameters:
  t:
    - {{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}}
    - {{filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}}
    - {{value: 0.5}}
dtype: bfloat16
"""

# benchmark, as published, printed, ours (%), half of the interval, items, metric, shots, verdict
SCORES = [
    ("arc_challenge", "ARC (25-shot)", "69.80", 69.80, 0.26, 1172, "acc_norm", 25, "reproduced"),
    ("hellaswag", "HellaSwag (10-shot)", "87.13", 87.11, 0.06, 10042, "acc_norm", 10, "consistent"),
    ("mmlu", "MMLU (5-shot)", "65.11", 65.09, 0.05, 14042, "acc", 5, "consistent"),
    ("truthfulqa_mc2", "TruthfulQA (0-shot)", "63.54", 60.31, 0.4, 817, "mc2", 0, "not reproduced"),
    ("winogrande", "Winogrande (5-shot)", "81.61", 81.53, 0.24, 1267, "acc", 5, "consistent"),
    ("gsm8k", "GSM8K (5-shot)", "70.89", 64.14, 0.5, 1319, "exact_match", 5, "not reproduced"),
]


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def claim(row: tuple[Any, ...]) -> dict[str, Any]:
    name, published, printed, ours, half, n, metric, shots, verdict = row
    value, got = float(printed) / 100, ours / 100
    explained = {"filter": "flexible-extract"} if name == "gsm8k" else None
    hits = round(value * n)
    return {
        "model": MODEL,
        "benchmark": name,
        "value": value,
        "printed": printed,
        "percent": True,
        "metric": metric,
        "filter": "strict-match" if name == "gsm8k" else None,
        "shots": shots,
        "task_version": None,
        "chat_template": None,
        "dtype": None,
        "split": None,
        "rescaled": False,
        "date": "2024-01-06",
        "commit": sha(MODEL)[:40],
        "source": CARD,
        "published": published,
        "verdict": verdict,
        "why": f"Our run gives {ours:.2f} % ({metric}, {shots} shots, {n:,} items); an honest run "
        f"may give {ours - half:.2f} % to {ours + half:.2f} % (numerical noise)"
        + (
            f", and {printed} is {abs(float(printed) - ours):.2f} points above ours."
            if "not" in verdict
            else "."
        )
        + (
            " It fits flexible-extract (70.89 %): the number is real, but its label is wrong."
            if explained
            else ""
        ),
        "grim": None if metric == "mc2" else {"n": n, "fits": [hits], "possible": True},
        "ours": {
            "value": got,
            "ci95": [got - half / 100, got + half / 100],
            "n": n,
            "metric": metric,
            "filter": "none",
            "shots": shots,
            "task": name,
            "task_version": "1.0",
            "dtype": "bfloat16",
            "lm_eval": "0.4.13",
            "chat_template": False,
        },
        "difference": value - got,
        "explained_by": explained,
        "alternatives": [
            {"metric": metric, "filter": "flexible-extract", "shots": shots, "value": 0.7089},
            {"metric": "acc", "filter": "none", "shots": 0, "value": got - 0.021},
        ],
        "protocol": [
            {"field": "task_version", "claimed": None, "ours": "1.0"},
            {"field": "dtype", "claimed": None, "ours": "bfloat16"},
            {"field": "chat_template", "claimed": None, "ours": False},
        ],
        "record": f"scores/{name}.json",
    }


def lineage() -> dict[str, Any]:
    def node(name: str, kind: str, depth: int, **more: Any) -> dict[str, Any]:
        known = {
            "commit": sha(name)[:40],
            "date": f"2023-1{depth % 3}-0{depth + 1}T10:00:00Z",
            "licence": "apache-2.0",
        }
        return (
            {"name": name, "kind": kind, "missing": None, "depth": depth, "merge_method": None}
            | known
            | more
        )

    def edge(
        parent: str, child: str, kind: str, weight: float | None = 1.0, exact: bool = True
    ) -> dict[str, Any]:
        return {"parent": parent, "child": child, "kind": kind, "weight": weight, "exact": exact}

    gone = {"commit": None, "date": None, "licence": None, "missing": "deleted from the hub"}
    first, second = [DATA, STARRY, MERGED, MODEL], [GONE, THREE, MERGED, MODEL]
    return {
        "nodes": [
            node(MODEL, "merge", 0, merge_method="slerp", licence="cc-by-nc-4.0"),
            node(TUNED, "expert", 1),
            node(MERGED, "merge", 1, merge_method="dare_ties"),
            node(THREE, "merge", 2, merge_method="ties"),
            node(STARRY, "expert", 2, licence="cc-by-nc-4.0"),
            node(METAL, "expert", 2),
            node(GONE, "expert", 3, **gone),
            node(DATA, "dataset", 3),
            node(BASE, "base", 4),
        ],
        "edges": [
            edge(TUNED, MODEL, "merge", 0.5, False),
            edge(MERGED, MODEL, "merge", 0.5, False),
            edge(THREE, MERGED, "merge", 0.08),
            edge(STARRY, MERGED, "merge", 0.08),
            edge(METAL, MERGED, "merge", 0.08),
            edge(GONE, THREE, "merge", 0.5),
            edge(DATA, STARRY, "train"),
            edge(BASE, TUNED, "train"),
            edge(BASE, STARRY, "train"),
            edge(BASE, METAL, "train"),
            edge(BASE, GONE, "train"),
            edge(BASE, MERGED, "base"),
        ],
        "taints": [
            taint(first[:1], 1.0, "holds prompts of TruthfulQA"),
            taint(first[:2], 1.0, "holds prompts of TruthfulQA"),
            taint(first[:3], 0.08, "holds prompts of TruthfulQA"),
            taint(first, 0.04, "holds prompts of TruthfulQA", exact=False),
            taint(second[:1], 1.0, "flagged; tuned on Flowers"),
            taint(second[:2], 0.5, "flagged; tuned on Flowers"),
            taint(second[:3], 0.04, "flagged; tuned on Flowers"),
            taint(second, 0.02, "flagged; tuned on Flowers", exact=False),
        ],
        "notes": [f"{GONE} was asked for as of 2023-12-17 and is no longer on the hub."],
    }


def taint(path: list[str], strength: float, evidence: str, exact: bool = True) -> dict[str, Any]:
    return {
        "model": path[-1],
        "benchmark": "truthfulqa",
        "strength": strength,
        "exact": exact,
        "path": path,
        "evidence": evidence,
        "source": DISCUSSION,
    }


def inferred(layers: int = 32) -> dict[str, Any]:
    curve = {"attention": [0, 0.5, 0.3, 0.7, 1], "mlp": [1, 0.5, 0.7, 0.3, 0], "norm": [0.5] * 5}
    rows = [layer_row("model.embed_tokens.weight", None, "embedding", 0.5)]
    for i in range(layers):
        for group, values in curve.items():
            t = float(np.interp(i / max(layers - 1, 1), np.linspace(0, 1, 5), values))
            rows.append(layer_row(f"model.layers.{i}.{group}.weight", i, group, t))
    rows += [
        layer_row("model.norm.weight", None, "norm", 0.5),
        layer_row("lm_head.weight", None, "head", 0.5),
    ]
    parents = [
        {"name": TUNED, "weight": 0.5, "density": None},
        {"name": MERGED, "weight": 0.5, "density": None},
    ]
    guess = {
        "method": "slerp",
        "parents": parents,
        "parameters": {"t": curve},
        "r2": 0.99998,
        "residual": 2.1e-3,
    }
    return {
        "model": MODEL,
        "base": BASE,
        "candidates": [TUNED, MERGED, STARRY],
        "verdict": f"slerp of {TUNED} and {MERGED}, t differs by layer and group",
        "hypotheses": [
            guess | {"rounding": True, "score": 0.99},
            guess
            | {
                "method": "linear",
                "r2": 0.9991,
                "residual": 2.9e-2,
                "rounding": False,
                "score": 0.4,
            },
        ],
        "parents": [TUNED, MERGED],
        "undeclared": {"found": False, "unexplained": 2.1e-3, "why": "what is left is rounding"},
        "finetuned": {"found": False, "why": "no tensor stands out"},
        "layers": rows,
        "gradient": {},
        "notes": ["Norms are the same in both parents: their coefficients say nothing."],
    }


def layer_row(tensor: str, layer: int | None, group: str, t: float) -> dict[str, Any]:
    found = {TUNED: 1 - t, MERGED: t, STARRY: 0.001}
    return {
        "tensor": tensor,
        "layer": layer,
        "group": group,
        "coefficients": found,
        "r2": 0.9999,
        "copy_of": None,
    }


def remade(verdict: str = "exact", layers: int = 32, error: float = 0.0) -> dict[str, Any]:
    tensors = [
        {
            "tensor": f"model.layers.{i}.mlp.weight",
            "layer": i,
            "equal": error == 0,
            "max_ulp": 0 if error == 0 else 40,
            "share_differing": 0.0 if error == 0 else 0.3,
            "cosine": 1.0,
            "relative_error": error * (1 + i / 8),
        }
        for i in range(layers)
    ]
    return {
        "verdict": verdict,
        "numerics": "mergekit 0.1.5, bfloat16",
        "why": f"{len(tensors)} of {len(tensors)} tensors are equal, bit for bit."
        if error == 0
        else "No tensor is equal.",
        "tensors": tensors,
        "worst": [] if error == 0 else tensors[-3:],
        "method": "slerp",
        "dtype": "bfloat16",
        "notes": [],
    }


def sample() -> dict[str, Any]:
    """The whole audit, with verdicts as the orchestrator makes them."""
    from mergelab.audit import summary

    findings = [
        {
            "variant": MODEL,
            "benchmark": "truthfulqa",
            "detector": name,
            "effect_name": "AUC",
            "effect": effect,
            "ci95": [effect - 0.03, effect + 0.03],
            "p": p,
            "q": q,
            "flagged": q is not None and q < 0.01,
            "verdict": "flagged" if q is not None and q < 0.01 else "no evidence",
        }
        for name, effect, p, q in (("base_loss", 0.71, 2e-9, 6e-9), ("wbc", 0.53, 0.08, 0.12))
    ]
    calibration = [
        {
            "detector": d,
            "leak": "exact",
            "copies": c,
            "model": "smollm2-135m",
            "auc": a,
            "tpr_at_5_fpr": t,
            "tpr_at_1_fpr": t / 2,
        }
        for d, c, a, t in (
            ("base_loss", 1, 0.83, 0.41),
            ("base_loss", 2, 0.97, 0.88),
            ("wbc", 2, 0.95, 0.8),
        )
    ]
    pairs = [
        ("arc_challenge", 0.021, [0.006, 0.036], 0.006),
        ("hellaswag", 0.001, [-0.003, 0.005], 0.62),
    ]
    data: dict[str, Any] = {
        "mergelab": "0.1.0",
        "audit": 1,
        "target": {
            "name": MODEL,
            "kind": "model",
            "at": f"{MODEL}@main",
            "models": [
                {"name": MODEL, "at": f"{MODEL}@main", "node": MODEL, "commit": sha(MODEL)[:40]}
            ],
        },
        "verdicts": [],
        "claims": [claim(row) for row in SCORES],
        "comparisons": [
            {
                "model": MODEL,
                "than": TUNED,
                "benchmark": benchmark,
                "claimed": True,
                "difference": difference,
                "ci95": ci95,
                "p": p,
                "significant": p < 0.05,
                "basis": "paired items",
                "why": "The same items were answered by both.",
            }
            for benchmark, difference, ci95, p in pairs
        ],
        "lineage": lineage(),
        "weights": [{"model": MODEL, "recipe": RECIPE, "remerge": remade(), "infer": inferred()}],
        "contamination": {
            "findings": findings,
            "calibration": calibration,
            "blind_spots": ["base_loss is blind where the base itself saw the items."],
        },
        "policy": [
            {
                "rule": "max_merge_depth: 2",
                "verdict": "broken",
                "why": f"{THREE} is three merges deep.",
            },
            {
                "rule": "allow_merged_parents: true",
                "verdict": "kept",
                "why": "merged parents are allowed",
            },
        ],
        "provenance": {
            "files": [
                {
                    "model": model,
                    "name": f"model-0000{i}-of-00002.safetensors",
                    "bytes": 4_943_162_336 + i,
                    "sha256": sha(model + str(i)),
                }
                for model in (MODEL, TUNED, MERGED)
                for i in (1, 2)
            ],
            "versions": {"torch": "2.13.0", "lm_eval": "0.4.13", "transformers": "5.23.0"},
            "seconds": 4210.3,
        },
        "commands": [f"mergelab audit {MODEL}"],
        "warnings": [f"{GONE}: its card could not be read; what it was made from is unknown."],
    }
    data["verdicts"] = summary.rows(data)
    return copy.deepcopy(data)
