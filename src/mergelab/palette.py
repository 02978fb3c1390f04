"""The colours of the reports, by role, for light and dark screens; print uses the light ones.

Figures are drawn in the light colours and name them by role when written (`var(--role)`), so one
drawing serves both modes. Within a mode every role has a colour of its own. The hues of base,
expert, merge and seen follow Okabe and Ito, darkened or lightened until they can be read as text
(WCAG AA: 4.5 to 1; tests/test_audit_page.py computes it)."""

from __future__ import annotations

LIGHT = {
    "paper": "#ffffff",
    "raised": "#f5f6f7",
    "ink": "#22262a",
    "soft": "#5b636b",
    "line": "#d5dade",
    "rule": "#8b939b",
    "link": "#0a58a3",
    "base": "#5d5f61",
    "expert": "#006ba8",
    "merge": "#00745a",
    "outside": "#6e5494",
    "seen": "#b34a00",
    "unseen": "#85888b",
    "taint": "#fdebdc",
    "good": "#0b7043",
    "good-back": "#e3f4ea",
    "warn": "#855600",
    "warn-back": "#fff2d6",
    "bad": "#b01f1a",
    "bad-back": "#fdeaea",
    "unknown": "#565e67",
    "unknown-back": "#eceff2",
    "heat-0": "#f2f6fa",
    "heat-1": "#d9e8f4",
    "heat-2": "#b9d6ec",
    "heat-3": "#93c0e0",
    "heat-4": "#67a6d2",
    "heat-5": "#2973b1",
    "heat-6": "#1b609e",
    "heat-7": "#114c85",
    "heat-8": "#0a3969",
}

DARK = {
    "paper": "#15181b",
    "raised": "#1f2327",
    "ink": "#e7eaec",
    "soft": "#a6aeb6",
    "line": "#383f46",
    "rule": "#717a83",
    "link": "#7cbcff",
    "base": "#b3b7bb",
    "expert": "#62b4f0",
    "merge": "#42c9a0",
    "outside": "#c0a5ea",
    "seen": "#ff9d5c",
    "unseen": "#858b91",
    "taint": "#42281a",
    "good": "#56cf90",
    "good-back": "#12301f",
    "warn": "#efbb55",
    "warn-back": "#382a0c",
    "bad": "#ff8d85",
    "bad-back": "#431c1b",
    "unknown": "#aab2ba",
    "unknown-back": "#2a2f35",
    "heat-0": "#1c242c",
    "heat-1": "#1d3144",
    "heat-2": "#1e3f5d",
    "heat-3": "#1d4e78",
    "heat-4": "#1b5f96",
    "heat-5": "#5fa8e0",
    "heat-6": "#84bfea",
    "heat-7": "#abd5f3",
    "heat-8": "#d3eafa",
}

HEATS = 9  # steps of the heat map; on the upper four the text is paper, below it ink
DARK_TEXT_BELOW = 5
