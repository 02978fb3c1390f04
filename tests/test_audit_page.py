"""The audit's page: read in ten seconds, safe with hostile data, for every screen and reader."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import sample_audit
from browser import Browser, browser

from mergelab import family_tree, figures, palette
from mergelab.audit import layers, pictures, summary
from mergelab.audit.page import beside, outward, render_audit, sized

SCHEMA = json.loads(resources.files("mergelab.audit").joinpath("audit.schema.json").read_text())
WIDTHS = (360, 800, 1400)
EVIL = (
    "<script>window.pwned=1</script><img src=x onerror=window.pwned=1>\"'&\u202etxt.exe 😀‍💥 مرحبا"
)
LONG = "org/" + "very" * 60
ODD = "\ud800" + "Ж" * 200


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    with browser() as page:
        yield page


@pytest.fixture(scope="module")
def html() -> str:
    return render_audit(sample_audit.sample())


@pytest.fixture(scope="module")
def path(html: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("audit") / "audit.html"
    file.write_text(html, encoding="utf-8")
    return file


class Outline(HTMLParser):
    """Tags with their attributes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def of(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in names]


def validate(data: Any) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(data)


def changed(data: Any, change: Callable[[str], str], keep: tuple[str, ...] = ()) -> Any:
    """Every text of a JSON value changed, but for the values of some keys."""
    if isinstance(data, dict):
        return {k: v if k in keep else changed(v, change, keep) for k, v in data.items()}
    if isinstance(data, list):
        return [changed(value, change, keep) for value in data]
    return change(data) if isinstance(data, str) else data


FIXED = ("verdict", "level", "about", "anchor", "group", "basis", "printed", "sha256", "date")
FIXED = (*FIXED, "kind", "mergelab")


def hostile(evil: str) -> dict[str, Any]:
    """The sample with a hostile text in every place that may hold any text."""
    data = changed(sample_audit.sample(), lambda text: evil + text[:2], FIXED)
    for entry in data["weights"]:
        names = [f"{evil}{i}" for i in range(3)]
        for row in entry["infer"]["layers"]:
            row["coefficients"] = dict(zip(names, row["coefficients"].values(), strict=True))
        entry["infer"]["parents"] = names[:2]
    return data


def test_the_schema_is_valid_and_holds_the_sample() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    validate(json.loads(json.dumps(sample_audit.sample())))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("claims", 0, "verdict"), "fine"),
        (("verdicts", 0, "level"), "green"),
        (("weights", 0, "remerge", "verdict"), "almost"),
        (("lineage", "taints", 0, "strength"), 1.5),
        (("provenance", "files", 0, "sha256"), "abc"),
        (("target", "kind"), "thing"),
    ],
)
def test_the_schema_refuses_what_the_page_cannot_show(where: tuple[Any, ...], value: Any) -> None:
    data = inner = sample_audit.sample()
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(data)


def test_the_first_things_said_are_the_sentence_and_the_failures(html: str) -> None:
    text = re.sub(r"<style.*?</style>|<[^>]+>", " ", html, flags=re.S)
    text = re.sub(r"\s+", " ", text)
    assert summary.sentence(sample_audit.sample()) in text[:900]
    table = text.index("Verdict Why")
    failed, doubtful, held = (
        text.index(word, table) for word in ("63.54 % not", "70.89 % not", "69.80 % reproduced")
    )
    assert failed < doubtful < held
    assert "3 fail" in text[:table]


def test_every_verdict_has_a_symbol_and_words_and_leads_to_its_evidence(html: str) -> None:
    ids = {a["id"] for _, a in Outline(html).tags if "id" in a}
    table = html[html.index('aria-label="Verdicts"') : html.index("</table>")]
    rows = table.split("<tr ")[2:]
    assert len(rows) == len(sample_audit.sample()["verdicts"])
    for row in rows:
        assert re.search(r'<span class="symbol" aria-hidden="true">[✕▲?✓]</span>', row)
        target = re.search(r'<a href="#([^"]+)">[^<]+</a>', row)
        assert target is not None
        assert target.group(1) in ids


def test_of_many_verdicts_those_that_hold_are_folded() -> None:
    data = sample_audit.sample()
    data["verdicts"] *= 2
    page = render_audit(data)
    told = page[page.index('aria-label="Verdicts"') : page.index("The others: 16 hold")]
    assert told.count("<tr ") == 1 + 2 * 6
    assert 'aria-label="More verdicts"' in page


def test_other_scores_of_chats_say_so() -> None:
    data = sample_audit.sample()
    other = data["claims"][0]["alternatives"][1]
    other["chat_template"] = True
    assert "<td>0 shots, chat template</td>" in render_audit(data)
    other["fewshot_as_multiturn"] = False
    data["claims"][0]["explained_by"] = {"fewshot_as_multiturn": False}
    validate(json.loads(json.dumps(data)))
    page = render_audit(data)
    assert "<td>0 shots, chat template, all examples in one turn</td>" in page
    assert "a turn for each example: no" in page


def test_what_explains_a_score_is_asked_only_where_one_does_not_hold() -> None:
    data = sample_audit.sample()
    held, other = data["claims"][0], data["claims"][1]
    held |= {"verdict": "reproduced", "explained_by": None}
    other |= {"verdict": "not reproduced", "explained_by": None, "ours": held["ours"]}
    data["claims"] = [held]
    assert "Explained by" not in render_audit(data)
    data["claims"] = [other]
    assert "nothing that was tried" in render_audit(data)


def test_links_lead_to_the_page_to_records_beside_it_or_to_sources(html: str) -> None:
    outline = Outline(html)
    ids = [a["id"] for _, a in outline.tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = [a["href"] or "" for a in outline.of("a", "use")]
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    outside = {link for link in links if ":" in link}
    assert outside == {sample_audit.CARD, sample_audit.DISCUSSION}
    beside_it = {link for link in links if not link.startswith(("#", "http"))}
    assert beside_it == {"audit.json", *(f"scores/{row[0]}.json" for row in sample_audit.SCORES)}


def test_the_only_script_is_ours_and_the_policy_names_it(html: str) -> None:
    outline = Outline(html)
    assert not outline.of("link", "img", "iframe", "object", "embed", "base", "form")
    scripts = re.findall(r"<script>(.*?)</script>", html, flags=re.S)
    assert len(scripts) == len(outline.of("script")) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policy = next(a["content"] for a in outline.of("meta") if a.get("http-equiv"))
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert not [name for _, attributes in outline.tags for name in attributes if name[:2] == "on"]


def test_the_page_is_made_for_readers_of_every_kind(html: str) -> None:
    outline = Outline(html)
    assert outline.of("html") == [{"lang": "en"}]
    assert outline.of("a")[0]["href"] == "#main"
    assert all(a.get("scope") for a in outline.of("th"))
    assert all(a.get("role") == "img" and a.get("aria-label") for a in outline.of("svg"))
    regions = [a for a in outline.of("div") if "scroll" in (a.get("class") or "").split()]
    assert all(a.get("tabindex") == "0" and a.get("role") == "region" for a in regions)
    assert all(a.get("aria-label") or a.get("aria-labelledby") for a in regions)
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below - above <= 1 for above, below in pairwise(levels))


def test_the_same_data_give_the_same_bytes(html: str) -> None:
    assert render_audit(json.loads(json.dumps(sample_audit.sample()))) == html


def test_an_audit_of_nothing_is_a_page(chrome: Browser, tmp_path: Path) -> None:
    data = sample_audit.sample()
    for key in ("verdicts", "claims", "comparisons", "weights", "policy", "warnings"):
        data[key] = []
    data["lineage"] = {"nodes": [], "edges": [], "taints": [], "notes": []}
    data["contamination"] = {"findings": [], "calibration": [], "blind_spots": []}
    data["provenance"]["files"] = []
    validate(data)
    file = tmp_path / "audit.html"
    file.write_text(render_audit(data))
    chrome.open(file, width=360)
    assert chrome.complaints() == []
    assert "Nothing to judge" in chrome.run("document.body.innerText")


# --- in the browser


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_every_screen_without_error_or_request(
    chrome: Browser, path: Path, width: int, dark: bool
) -> None:
    chrome.open(path, width=width, dark=dark)
    assert chrome.run("document.documentElement.scrollWidth") == width
    assert chrome.complaints() == []
    assert chrome.requests() == [path.as_uri()]


CONTRAST = """(() => {
  const parse = (c) => c.match(/[0-9.]+/g).map(Number);
  const light = (c) => {
    const part = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = c.slice(0, 3).map((v) => part(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    if (element.closest("svg, .hidden, .skip, script")) continue;
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own) continue;
    let back = [255, 255, 255, 0];
    for (let e = element; e && !back[3]; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      back = c.length === 3 ? [...c, 1] : c;
    }
    const [a, b] = [parse(getComputedStyle(element).color), back].map(light);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (!back[3] || ratio < 4.5) found.push([element.outerHTML.slice(0, 80), ratio]);
  }
  return [document.querySelectorAll("body *").length, found];
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_in_both_modes(chrome: Browser, path: Path, dark: bool) -> None:
    chrome.open(path, dark=dark)
    count, weak = chrome.run(CONTRAST)
    assert count > 500
    assert weak == []
    paper = palette.DARK["paper"] if dark else palette.LIGHT["paper"]
    found = chrome.run("getComputedStyle(document.body).backgroundColor")
    assert found == f"rgb({int(paper[1:3], 16)}, {int(paper[3:5], 16)}, {int(paper[5:], 16)})"


def light(colour: str) -> float:
    """Relative luminance (WCAG 2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", [palette.LIGHT, palette.DARK], ids=["light", "dark"])
def test_text_in_figures_can_be_read(mode: dict[str, str]) -> None:
    assert len(set(mode.values())) == len(mode)
    for role in ("ink", "soft", "base", "expert", "merge", "outside", "seen"):
        assert contrast(mode[role], mode["paper"]) >= 4.5, role
    for role in ("ink", "soft"):
        assert contrast(mode[role], mode["taint"]) >= 4.5, role
    for shade in range(palette.HEATS):
        text = "ink" if shade < palette.DARK_TEXT_BELOW else "paper"
        assert contrast(mode[text], mode[f"heat-{shade}"]) >= 4.5, shade
    for role in ("rule", "unseen", "good", "warn", "bad", "unknown"):
        assert contrast(mode[role], mode["paper"]) >= 3, role


def column(chrome: Browser, table: str, place: int) -> list[str]:
    rows = f"[...document.querySelectorAll({json.dumps(table + ' tbody tr')})]"
    found: list[str] = chrome.run(f"{rows}.map((r) => r.cells[{place}].innerText.trim())")
    return found


CLAIMS = 'table[aria-describedby="about-claims"]'


def test_a_table_is_sorted_by_mouse_and_by_keyboard(chrome: Browser, path: Path) -> None:
    chrome.open(path)
    head = f"{CLAIMS} th:nth-child(3)"
    state = f"document.querySelector({json.dumps(head)}).getAttribute('aria-sort')"
    before = column(chrome, CLAIMS, 2)
    assert chrome.run(state) is None
    chrome.click(f"{head} button")
    assert chrome.run(state) == "ascending"
    up = column(chrome, CLAIMS, 2)
    assert up == sorted(before, key=lambda text: float(text.split()[0]))
    chrome.run(f"document.querySelector({json.dumps(head + ' button')}).focus()")
    chrome.press("Enter", "\r")
    assert chrome.run(state) == "descending"
    assert column(chrome, CLAIMS, 2) == up[::-1]
    chrome.press(" ", " ")
    assert chrome.run(state) == "ascending"
    chrome.click(f"{CLAIMS} th:nth-child(1) button")
    assert chrome.run(state) is None
    assert column(chrome, CLAIMS, 0) == sorted(column(chrome, CLAIMS, 0))


def test_what_has_no_number_is_sorted_last_both_ways(chrome: Browser, tmp_path: Path) -> None:
    data = sample_audit.sample()
    data["claims"][2] |= {"ours": None, "difference": None, "verdict": "unverifiable"}
    file = tmp_path / "audit.html"
    file.write_text(render_audit(data))
    chrome.open(file)
    for _ in range(2):
        chrome.click(f"{CLAIMS} th:nth-child(4) button")
        assert column(chrome, CLAIMS, 3)[-1] == ""
        assert column(chrome, CLAIMS, 0)[-1] == data["claims"][2]["benchmark"]


def test_a_verdict_opens_its_evidence(chrome: Browser, path: Path) -> None:
    chrome.open(path)
    opened = "document.getElementById('claim-0').open"
    assert chrome.run(opened) is False
    chrome.click('table[aria-label="Verdicts"] a[href="#claim-0"]')
    chrome.wait("location.hash === '#claim-0'")
    chrome.wait(opened)


def test_the_keyboard_skips_to_the_content(chrome: Browser, path: Path) -> None:
    chrome.open(path)
    chrome.press("Tab")
    assert chrome.run("document.activeElement.className") == "skip"
    chrome.press("Enter", "\r")
    chrome.wait("document.activeElement.id === 'main'")


def test_it_can_be_read_without_the_script(chrome: Browser, path: Path) -> None:
    chrome.open(path, width=360, script=False)
    assert chrome.complaints() == []
    root = chrome.do("DOM.getDocument", depth=-1)["root"]["nodeId"]
    count = {
        name: len(chrome.do("DOM.querySelectorAll", nodeId=root, selector=name)["nodeIds"])
        for name in ("thead button", "details[open] .evidence", "tbody tr")
    }
    assert count["thead button"] == 0
    assert count["details[open] .evidence"] == 2
    assert count["tbody tr"] > 40


def test_it_prints_light_whole_and_on_pages(chrome: Browser, path: Path) -> None:
    chrome.open(path, dark=True)
    wish = {"name": "prefers-color-scheme", "value": "dark"}
    chrome.do("Emulation.setEmulatedMedia", media="print", features=[wish])
    assert chrome.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    shown = (
        "[...document.querySelectorAll('.evidence')].map((e) => e.getBoundingClientRect().height)"
    )
    assert min(chrome.run(shown)) > 50
    chrome.do("Emulation.setEmulatedMedia", media="", features=[])
    pdf = chrome.pdf()
    assert pdf.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b(?!s)", pdf)) <= 20


def test_nothing_moves_for_those_who_asked_for_that(chrome: Browser, path: Path) -> None:
    moves = "getComputedStyle(document.documentElement).scrollBehavior"
    chrome.open(path)
    for wish, behaviour in (("reduce", "auto"), ("no-preference", "smooth")):
        feature = {"name": "prefers-reduced-motion", "value": wish}
        chrome.do("Emulation.setEmulatedMedia", features=[feature])
        assert chrome.run(moves) == behaviour


@pytest.mark.parametrize("evil", [EVIL, LONG, ODD], ids=["markup", "long", "odd"])
def test_hostile_texts_are_shown_and_do_nothing(chrome: Browser, tmp_path: Path, evil: str) -> None:
    file = tmp_path / "audit.html"
    file.write_text(render_audit(hostile(evil)), encoding="utf-8")
    assert "\u202e" not in file.read_text(encoding="utf-8")
    for width in WIDTHS:
        chrome.open(file, width=width)
        assert chrome.run("document.documentElement.scrollWidth") == width
        assert chrome.complaints() == []
        assert chrome.requests() == [file.as_uri()]
        assert chrome.run("window.pwned") is None
        assert chrome.run("document.querySelectorAll('img, main script').length") == 0
    assert (
        chrome.run("document.querySelectorAll('a[href^=javascript], a[href*=\"..\"]').length") == 0
    )


def test_addresses_and_records_are_links_only_where_they_are_harmless() -> None:
    assert outward('https://hub.co/a b"><i>') == "https://hub.co/a%20b%22%3E%3Ci%3E"
    for bad in ("javascript:alert(1)", "data:text/html,x", "//hub.co", "http:", "[", None, "a:1"):
        assert outward(bad) == ""
    assert beside("scores/a b.json") == "scores/a%20b.json"
    assert beside("javascript:x") == "javascript%3Ax"
    assert beside("../scores/x.json") == "../scores/x.json"
    for bad in ("..", "/etc/x", "a//b", "a/./b", "a/../b", "a\\..\\b", "", None):
        assert beside(bad) == ""
    assert [sized(n) for n in (0, 999, 14_483_000_000)] == ["0 bytes", "999 bytes", "14.5 GB"]


# --- the pictures


def test_a_forest_holds_the_differences_of_one_unit() -> None:
    claims = sample_audit.sample()["claims"]
    raw = copy.deepcopy(claims[0]) | {"percent": False, "benchmark": "perplexity"}
    percent, own = pictures.forests([*claims, raw])
    assert "claimed minus ours, percentage points" in percent
    assert "+3.23" in percent
    assert "perplexity" in own
    assert "perplexity" not in percent


@pytest.mark.parametrize("count", [1, 200])
def test_the_name_of_a_line_stays_inside_the_picture(count: int) -> None:
    dots = [figures.Dot(f"row {i}", "merge", i / 10) for i in range(count)]
    picture = figures.panel(dots, title="t", axis="x", marks={"no difference": 0.0})
    found = re.search(r'y="([-0-9.]+)"[^>]*>no difference<', picture)
    assert found is not None
    assert figures.FONT <= float(found.group(1)) <= 18


def test_coefficients_are_means_by_layer_and_a_copy_counts_one() -> None:
    row = {"tensor": "x", "layer": 3, "group": "mlp", "r2": 1.0, "copy_of": None}
    rows = [
        row | {"coefficients": {"a": 0.25, "b": 0.75}},
        row | {"coefficients": {"a": 0.75, "b": 0.25}},
        row | {"layer": 4, "coefficients": {}, "copy_of": "b:model.layers.2.x"},
    ]
    assert layers.coefficients(rows) == {
        "a": {(3, "mlp"): 0.5},
        "b": {(3, "mlp"): 0.5, (4, "mlp"): 1.0},
    }


def test_the_heat_map_names_parents_layers_and_what_differs() -> None:
    made = sample_audit.remade("different", layers=4, error=2e-3)
    entry = {"model": "m", "remerge": made, "infer": sample_audit.inferred(4)}
    picture, parents = layers.heat_map(entry)
    assert parents == [sample_audit.TUNED, sample_audit.MERGED]  # Starry explains nothing
    for text in ("layer 0", "layer 3", "embedding", "last norm", "head", "attn", "differs", "2e-3"):
        assert f">{text}</text>" in picture
    same, _ = layers.heat_map(entry | {"remerge": sample_audit.remade(layers=4)})
    assert "differs" not in same
    only, parents = layers.heat_map(entry | {"infer": None})
    assert "differs" in only
    assert parents == []
    assert layers.heat_map({"model": "m", "remerge": None, "infer": None}) == ("", [])


def test_many_parents_get_one_column_each() -> None:
    found = sample_audit.inferred(2)
    for row in found["layers"]:
        row["coefficients"] = {f"parent-{i}": 1 / 14 for i in range(14)}
    found["parents"] = []
    picture, parents = layers.heat_map({"model": "m", "remerge": None, "infer": found})
    assert len(parents) == 14
    assert "attn" not in picture
    assert picture.count(">0.07</text>") == 14 * 5


def test_ways_of_taint_are_thick_and_a_repeated_base_is_not_drawn() -> None:
    picture = pictures.tree(sample_audit.sample()["lineage"])
    assert picture.count("stroke-width: 2.6") == 6 - 1  # fourteen to the model is on both ways
    assert "flagged: truthfulqa" in picture
    assert "truthfulqa: taint at most 0.04" in picture
    assert "missing: deleted from the hub" in picture
    assert "1.1,1.8" not in picture  # a dotted arrow


def test_arrows_run_behind_no_box() -> None:
    lineage = sample_audit.sample()["lineage"]
    boxes = [family_tree.Box(n["name"], "expert", ["x"], False) for n in lineage["nodes"]]
    arrows = [family_tree.Arrow(e["parent"], e["child"], "merge", "") for e in lineage["edges"]]
    columns = family_tree._columns(boxes, arrows)
    ways = [family_tree._way(arrow, columns) for arrow in arrows]
    places = family_tree._places(family_tree._ordered(columns, ways), columns, 60.0)
    lanes = [item for way in ways for item in way[1:-1]]
    assert lanes
    for name, column in lanes:
        for box, own in columns.items():
            if own == column:
                assert abs(places[name, column][1] - places[box, own][1]) >= 30 + 6 + 14


def test_cycles_and_strangers_among_the_edges_do_no_harm() -> None:
    boxes = [family_tree.Box(name, "merge", [], False) for name in "abc"]
    pairs = ("ab", "bc", "ca", "aa", "ax")
    arrows = [family_tree.Arrow(pair[0], pair[1], "merge", "1") for pair in pairs]
    picture = family_tree.family_tree(boxes, arrows, title="t")
    assert all(f">{name}</text>" in picture for name in "abc")


def test_of_a_large_lineage_the_tainted_and_the_near_are_drawn() -> None:
    lineage = sample_audit.sample()["lineage"]
    extra = [lineage["nodes"][1] | {"name": f"far-{i}", "depth": 9} for i in range(300)]
    lineage["nodes"] = [*extra, *lineage["nodes"]]
    shown = pictures.drawn(lineage)
    assert len(shown) == pictures.MOST_BOXES
    assert {name for taint in lineage["taints"] for name in taint["path"]} <= shown
    assert sample_audit.TUNED in shown
    data = sample_audit.sample() | {"lineage": lineage}
    assert "Drawn are 40 of 309 models" in render_audit(data)


def test_a_model_of_eighty_layers_takes_a_twentieth_of_five_megabytes() -> None:
    entry = sample_audit.sample()["weights"][0] | {"infer": sample_audit.inferred(80)}
    picture, _ = layers.heat_map(entry | {"remerge": sample_audit.remade("different", 80, 1e-3)})
    assert len(picture.encode()) < 5_000_000 / 20
