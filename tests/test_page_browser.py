"""The page in a real browser, opened from disk: no error, no request, the same decisions as `tuneshift reselect`."""

from __future__ import annotations

import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import DESKTOP, HOSTILE, PHONE, Open
from page_run import OWN, Written, made_origin, make_run, plain_texts
from playwright.sync_api import Page

from tuneshift.again import reselect
from tuneshift.report.page.render import write_page
from tuneshift.run.directory import RunDirectory
from tuneshift.run.ledger import Ledger
from tuneshift.study.page import study_page

ROOT = Path(__file__).parents[1]


def with_page(run: RunDirectory) -> RunDirectory:
    with Ledger(run.ledger) as ledger:
        write_page(run, ledger, made_origin(run))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return with_page(make_run(tmp_path_factory.mktemp("page"), plain_texts(120)))


def shown_number(page: Page, id_: str) -> int:
    return int(page.inner_text(f"#{id_}").replace("\u2212", "-"))


SETTINGS: list[tuple[str, dict[str, float]]] = [
    ("ppl_diff", {"tau": 1.5}), ("ppl_diff", {"tau": 2}), ("ppl_diff", {"tau": 1.2}),
    ("asymmetric", {"tau_f": 1.2, "tau_b": 1.6}), ("asymmetric", {"tau_f": 2.25, "tau_b": 2.25}),
    ("ratio", {"ratio": 1.5}), ("ratio", {"ratio": 1.25}),
]  # fmt: skip


def decided_as_reselect_does(page: Page, run: RunDirectory, settings: list[tuple[str, dict[str, float]]]) -> set[int]:
    """Check each setting of the control against `tuneshift reselect` as the page prints it; return the kept counts."""
    with Ledger(run.ledger, read_only=True) as ledger:
        candidates = ledger.counts().candidates
    counts = set()
    for rule, thresholds in settings:
        page.check(f"input[name=rule][value={rule}]")
        for name, value in thresholds.items():
            page.fill(f"#at-{name} + input", str(value))
        page.wait_for_timeout(100)
        program, *command = page.inner_text("#command").split(" ")
        overrides = [word for word in command if "=" in word]
        assert (program, command[:2]) == ("tuneshift", ["reselect", str(run.path)])
        expected = reselect(run, overrides)
        found = {name: shown_number(page, f"{name}-count") for name in ("kept", "added", "removed")}
        assert found == {"kept": expected["kept"], "added": expected["added"], "removed": -expected["removed"]}
        assert page.inner_text("#keep-rate") == f"{100 * expected['kept'] / candidates:.1f}%"
        quadrants = page.locator("#scatter [data-quadrant]").all_text_contents()
        assert quadrants[:1] == ([] if rule == "ratio" else [f"low-high: {expected['kept']}"])
        if rule == "ppl_diff":
            reasons = {**expected["reasons"], "low-high": expected["kept"]}
            names = ("low-high", "high-high", "low-low", "high-low")
            assert quadrants == [f"{name}: {reasons.get(name, 0)}" for name in names]
        decided = page.evaluate("document.querySelectorAll('#changes h3').length")
        assert (decided == 1) == (expected["added"] + expected["removed"] > 0)
        counts.add(expected["kept"])
    return counts


@pytest.mark.parametrize("count_eos", [False, True])
def test_the_control_decides_as_reselect_does_and_prints_its_command(
    open_page: Open, tmp_path: Path, count_eos: bool
) -> None:
    made = with_page(make_run(tmp_path, plain_texts(120), count_eos=count_eos))
    page = open_page(made)
    assert len(decided_as_reselect_does(page, made, SETTINGS)) > 3  # the settings differ in what they keep


def first_cells(page: Page, column: int) -> list[str]:
    return page.locator(f"#table tr.row td:nth-child({column})").all_inner_texts()


def test_search_filters_and_sorting(open_page: Open, run: RunDirectory) -> None:
    page = open_page(run)
    page.fill("#filters input[type=search]", "BOSTON")
    with Ledger(run.ledger) as ledger:
        candidates = ledger.candidates()
    matching = [c for c in candidates if "boston" in c.text]
    assert page.inner_text("#found") == f"{len(matching)} of 120 candidates"
    assert len(matching) > 5
    page.fill("#filters input[type=search]", "")
    page.select_option("#filter-decision", "kept")
    assert page.inner_text("#found") == f"{sum(c.kept for c in candidates)} of 120 candidates"
    page.select_option("#filter-decision", "all")
    page.select_option("#filter-reason", "duplicate")
    assert set(first_cells(page, 5)) == {"duplicate"}
    page.select_option("#filter-reason", "")
    page.click("th[data-column=margin] button")
    rising = [float(text) for text in first_cells(page, 4)]
    assert rising == sorted(rising)
    assert page.get_attribute("th[data-column=margin]", "aria-sort") == "ascending"
    page.click("th[data-column=margin] button")
    falling = [float(text) for text in first_cells(page, 4)]
    assert falling == sorted(falling, reverse=True)
    assert falling[0] > rising[0]


def test_a_candidate_opens_with_the_keyboard_and_shows_both_responses(open_page: Open, run: RunDirectory) -> None:
    page = open_page(run)
    page.locator("#table tr.row .open").first.focus()
    page.keyboard.press("Enter")
    with Ledger(run.ledger) as ledger:
        first, second = ledger.candidates()[:2]
    assert first.y_f is not None
    assert page.locator("#detail .reply").nth(0).inner_text() == first.text
    assert page.locator("#detail .reply").nth(1).inner_text() == f"{first.y_f.text} end"
    assert page.locator("#detail .reply").nth(1).locator(".token").count() == first.y_f.n_tokens + 1  # and the end
    page.check("#detail input[value=difference]")
    assert page.locator("#detail mark").count() > 0
    page.click("#detail button:text-is('Next')")
    assert page.locator("#detail .reply").nth(0).inner_text() == second.text
    page.keyboard.press("Escape")
    assert not page.locator("#detail").is_visible()


def test_outcomes_are_sorted_by_what_the_list_shows(open_page: Open, run: RunDirectory) -> None:
    page = open_page(run)
    page.fill("#at-tau + input", "3")
    page.wait_for_timeout(100)
    page.click("th[data-column=reason] button")
    shown = page.locator("#table tr.row .tag").all_inner_texts()
    with Ledger(run.ledger) as ledger:
        assert shown == sorted(candidate.reason for candidate in ledger.candidates())[: len(shown)]


def test_the_keyboard_keeps_its_place(open_page: Open, run: RunDirectory) -> None:
    page = open_page(run)
    focused = "document.activeElement.dataset.key ?? document.activeElement.className"
    page.locator("#table tr.row .open").first.focus()
    page.keyboard.press("Enter")
    for key in ("Next", "Previous"):
        page.locator(f"#detail [data-key={key}]").focus()
        page.keyboard.press("Enter")
        assert page.evaluate(focused) == ("Next" if key == "Next" else "Close")  # the first has none before it
    page.locator("#detail input[value=F]").focus()
    for value in ("B", "difference", "F"):
        page.keyboard.press("ArrowRight")
        assert page.evaluate(focused) == value
        assert page.is_checked(f"#detail input[value={value}]")
    page.keyboard.press("Escape")
    page.locator("#table tr.row .open").first.focus()
    page.evaluate("document.querySelector('.viewport').scrollTop = 5000")
    page.wait_for_timeout(200)
    assert page.evaluate(focused) == "viewport"


def test_surprise_stands_in_a_table_too(open_page: Open, run: RunDirectory) -> None:
    page = open_page(run)
    page.locator("#table tr.row .open").first.click()
    with Ledger(run.ledger) as ledger:
        first = ledger.candidates()[0].y_f
    assert first is not None
    page.locator("#detail summary").first.click()
    cells = page.locator("#detail details").first.locator("tbody td:nth-child(2)").all_inner_texts()
    assert first.eos_logprob is not None
    assert cells == [f"{-value:.2f}" for value in (*first.token_logprobs, first.eos_logprob)]
    assert page.locator("#detail .level").all_inner_texts() == ["below 0.1", "0.1", "0.5", "2", "5 and above"]


def titles(page: Page, reply: int) -> list[str]:
    """Return what the tokens of a response in the details say, the end included."""
    found: list[str] = (
        page.locator("#detail .reply").nth(reply).locator(".token").evaluate_all("all => all.map((one) => one.title)")
    )
    return found


def test_b_s_response_is_shaded_by_either_model_and_f_s_by_f_alone(open_page: Open, run: RunDirectory) -> None:
    page = open_page(run, PHONE)
    with Ledger(run.ledger) as ledger:
        longest = max(ledger.candidates()[:5], key=lambda c: c.y_b.n_tokens if c.y_b else 0)
    y_f, y_b = longest.y_f, longest.y_b
    assert y_f is not None
    assert y_b is not None
    assert y_b.base_logprobs is not None
    assert None not in (y_f.eos_logprob, y_b.eos_logprob, y_b.base_eos_logprob)
    assert y_b.n_tokens >= len(OWN)
    by = {
        ("F", 1): [*y_f.token_logprobs, y_f.eos_logprob],
        ("F", 2): [*y_b.token_logprobs, y_b.eos_logprob],
        ("B", 1): [],
        ("B", 2): [*y_b.base_logprobs, y_b.base_eos_logprob],
    }
    page.fill("#filters input[type=search]", longest.text)
    page.locator("#table tr.row .open").first.click()
    for shade in ("F", "B"):
        page.check(f"#detail input[value={shade}]")
        assert page.locator("#detail .note", has_text=f"Surprise under {shade} in nats").count() == 1
        for reply in (1, 2):
            assert titles(page, reply) == [f"{-value:.2f} nats under {shade}" for value in by[shade, reply]]
    assert page.inner_text("#detail .reply >> nth=1") == y_f.text
    assert page.locator("#detail", has_text="B's surprise at F's response was not measured.").count() == 1
    page.locator("#detail summary").nth(1).click()
    rows = page.locator("#detail details").nth(1).locator("tbody tr")
    shown = [rows.nth(number).locator("td").all_inner_texts()[1:] for number in range(rows.count())]
    pairs = zip(by["F", 2], by["B", 2], strict=True)
    assert shown == [[f"{-under_f:.2f}", f"{-under_b:.2f}"] for under_f, under_b in pairs]
    assert page.locator("#detail details").first.locator("th").all_text_contents() == ["token", "nats under F"]
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    page.check("#detail input[value=difference]")
    assert page.locator("#detail .token").count() == 0
    assert not page.locator("#detail", has_text="was not measured").count()


def test_a_response_whose_tokens_b_did_not_sample_says_why_it_is_not_shaded(open_page: Open, run: RunDirectory) -> None:
    page = open_page(run)
    with Ledger(run.ledger) as ledger:
        place, y_b = next((n, c.y_b) for n, c in enumerate(ledger.candidates()) if c.y_b and c.y_b.reencoded)
    page.locator("#table tr.row .open").nth(place).click()
    assert len(titles(page, 2)) == y_b.n_tokens + (y_b.eos_logprob is not None)
    page.check("#detail input[value=B]")
    assert titles(page, 2) == []
    assert page.inner_text("#detail .reply >> nth=2") == y_b.text
    assert page.locator("#detail .note", has_text="These are not the tokens that were sampled").count() == 1


def test_a_token_without_a_finite_score_is_not_shaded_as_a_sure_one(open_page: Open, run: RunDirectory) -> None:
    page = open_page(run)
    with Ledger(run.ledger) as ledger:
        place, candidate = next((n, c) for n, c in enumerate(ledger.candidates()) if c.reason == "non-finite score")
    page.locator("#table tr.row .open").nth(place).click()
    assert candidate.y_b is not None
    unknown = page.locator("#detail .token.unknown")
    assert unknown.count() == candidate.y_b.n_tokens
    assert set(unknown.evaluate_all("all => all.map((one) => one.title)")) == {"not finite"}


def test_the_family_tree_shows_as_many_pairs_as_each_round_kept(open_page: Open, run: RunDirectory) -> None:
    page = open_page(run)
    with Ledger(run.ledger) as ledger:
        kept = Counter(candidate.round for candidate in ledger.candidates() if candidate.kept)
    assert page.locator("#family-chart .strong").all_text_contents() == [str(kept[number]) for number in range(6)]
    assert page.locator("#family-chart g.band").count() == page.locator("#family-legend li").count() == 4  # its seeds
    bar = page.locator("#family-chart g.band").last.locator("rect").last
    bar.hover()
    assert page.inner_text("#tip").startswith("round 6: ")
    page.check("input[name=bands][value=parents]")
    assert page.locator("#family-legend li").first.inner_text() == "written from seeds"
    assert page.locator("#family-chart .strong").all_text_contents() == [str(kept[number]) for number in range(6)]


def test_a_candidates_line_leads_to_a_seed_and_back(open_page: Open, run: RunDirectory) -> None:
    page = open_page(run)
    with Ledger(run.ledger) as ledger:
        calls = {call.id: call.demos for call in ledger.calls()}
        candidates = ledger.candidates()
    last = candidates[-1]
    page.fill("#filters input[type=search]", last.text)
    page.locator("#table tr.row .open").first.click()
    assert page.locator("#detail .parents li").count() == len(calls[last.call_id])
    assert page.locator("#detail .lineage > li.seed").count() == 1
    line = page.locator("#detail .lineage > li").count()
    page.locator("#detail .lineage button").last.click()  # the parent on that line
    parent = page.inner_text("#detail-title")
    assert parent in calls[last.call_id]
    assert page.locator("#detail .lineage > li").count() in (
        0,
        line - 1,
    )  # a seed and its child are no line of their own

    def descendants(ancestor: str) -> int:
        found = {ancestor}
        for candidate in candidates:
            if found & set(calls[candidate.call_id]):
                found.add(candidate.id)
        return len(found) - 1

    page.click("#detail button:has-text('descendant')")
    assert not page.locator("#detail").is_visible()
    page.fill("#filters input[type=search]", "")
    assert page.inner_text("#found") == f"{descendants(parent)} of 120 candidates"
    page.select_option("#filter-ancestor", "s000")
    assert page.inner_text("#found") == f"{descendants('s000')} of 120 candidates"


@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_serious_stands_in_the_way_of_anybody(
    open_page: Open, run: RunDirectory, viewport: Any, scheme: Any
) -> None:
    page = open_page(run, viewport, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    page.fill("#at-tau + input", "1.3")
    found = [serious(Axe().run(page).response)]
    page.locator("#table tr.row .open").first.click()
    for shade in ("F", "B"):
        page.check(f"#detail input[value={shade}]")
        found.append(serious(Axe().run(page).response))
    assert found == [[], [], []]


def serious(response: dict[str, Any]) -> list[str]:
    return [
        f"{violation['id']}: {[node['html'][:200] for node in violation['nodes'][:3]]}"
        for violation in response["violations"]
        if violation["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_the_page_never_scrolls_sideways(open_page: Open, run: RunDirectory, width: int) -> None:
    page = open_page(run, {"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_the_name_of_the_section_in_sight_is_in_sight_too(open_page: Open, run: RunDirectory) -> None:
    page = open_page(run, PHONE, reduced_motion="reduce")
    for section in ("provenance", "verdict"):
        page.evaluate(f"document.getElementById('{section}').scrollIntoView()")
        page.wait_for_selector(f"nav a[href='#{section}'][aria-current]")
        box = page.locator("nav a[aria-current]").bounding_box()
        assert box is not None
        assert 0 <= box["x"] <= box["x"] + box["width"] <= PHONE["width"]


def test_the_theme_follows_the_system_and_can_be_turned(open_page: Open, run: RunDirectory) -> None:
    page = open_page(run, color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.click("#theme")
    assert page.evaluate(ground) == "rgb(255, 255, 255)" != dark
    page.click("#theme")
    assert page.evaluate(ground) == dark


def test_thirty_hostile_strings_do_nothing(open_page: Open, tmp_path: Path) -> None:
    assert len(HOSTILE) == 30
    texts = [Written(f"{text} {place}", text, text[::-1]) for place, text in enumerate(HOSTILE)] * 2
    name = "".join(HOSTILE[:29])
    folder = "<img src=x onerror=window.hit=1>{{ 7 * 7 }}'\u202e"
    made = with_page(make_run(tmp_path, texts, name=name, model_name=folder))
    text = made.page.read_text(encoding="utf-8")
    assert {"\x1b", "\x9b", "\u202e", "\u2066", "\u2028", "\u200b", "\U000e0041"} & set(text) == set()
    for viewport in (PHONE, DESKTOP):
        page = open_page(made, viewport)
        for opened in (0, 4):
            page.locator("#table tr.row .open").nth(opened).click()
            for shade in ("difference", "B", "F"):
                page.check(f"#detail input[value={shade}]")
            page.keyboard.press("Escape")
        page.mouse.move(100, 100)
        assert page.evaluate("window.hit") is None
        assert page.evaluate("document.querySelectorAll('main img, main iframe, main base, main script').length") == 0
        assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
        assert "49" not in page.inner_text("h1")


def test_ten_thousand_candidates_stay_usable(open_page: Open, tmp_path: Path) -> None:
    texts = [Written(f"{text.prompt} and some more words", "", "") for text in plain_texts(10_000)]
    made = with_page(make_run(tmp_path, texts, prose=True))
    assert made.page.stat().st_size < 40e6
    page = open_page(made)
    rows = "document.querySelectorAll('#table tr.row').length"
    assert page.evaluate(rows) < 60
    page.evaluate("document.querySelector('.viewport').scrollTop = 400000")
    page.wait_for_timeout(200)
    assert page.evaluate(rows) < 60
    middle = int(page.locator("#table tr.row").first.get_attribute("aria-rowindex") or 0)
    assert 4000 < middle < 6000
    page.fill("#at-tau + input", "2")
    page.wait_for_timeout(500)
    assert shown_number(page, "kept-count") == reselect(made, ["criterion.tau=2"])["kept"]


def test_without_an_evaluation_the_page_works(open_page: Open, tmp_path: Path) -> None:
    page = open_page(with_page(make_run(tmp_path, plain_texts(30), evaluated=False)))
    assert "No evaluation is configured" in page.inner_text(".lead")
    assert page.locator("#arms-chart").count() == 0
    assert page.locator("#table tr.row").count() > 0


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a committed study's results."""
    results = runpy.run_path(str(ROOT / "studies/render.py"))["read_results"](
        ROOT / "studies/results", "snips_criteria"
    )
    path = tmp_path_factory.mktemp("study") / "results.html"
    path.write_text(study_page(results, None, ["tuneshift", "study", "snips_criteria.yaml"]), encoding="utf-8")
    return path


@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_studys_page_shows_every_measured_arm_to_anybody(
    open_page: Open, study: Path, viewport: Any, scheme: Any
) -> None:
    page = open_page(study, viewport, color_scheme=scheme)
    assert page.locator("#chart-0 path.interval.trained").count() == 8 - 1  # low_low kept nothing
    assert page.locator("#chart-0 rect.untrained").count() == 3
    assert "random 65.7%" in (page.get_attribute("#chart-0 svg", "aria-label") or "")
    page.evaluate("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    assert serious(Axe().run(page).response) == []
    assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != ground
