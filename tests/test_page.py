"""The page's content and its making; what it does in a browser stands in test_page_browser.py."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import make_tokenizer
from page_run import made_origin, make_run, plain_texts
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from transformers import PreTrainedTokenizerFast

from tuneshift.criteria import Criterion, decide_all
from tuneshift.report.embedding import embed, flat_map
from tuneshift.report.figures import ROUNDS, THEMES, drawing_library, drawings
from tuneshift.report.markdown import accuracy_section, fenced
from tuneshift.report.page import examples as page_examples
from tuneshift.report.page import render as render_module
from tuneshift.report.page.document import page_document, repetition, verdict_part
from tuneshift.report.page.examples import token_pieces
from tuneshift.report.page.family import family
from tuneshift.report.page.learning import tokens_of
from tuneshift.report.page.origins import unusual_settings
from tuneshift.report.page.render import REPORT, RESULTS, as_data, render, source_hash, visible, write_page
from tuneshift.report.page.sources import Sources
from tuneshift.report.page.variety import spans
from tuneshift.run.directory import RunDirectory
from tuneshift.run.ledger import Ledger
from tuneshift.run.manifest import origin
from tuneshift.run.records import Candidate, GeneratorCall, Response
from tuneshift.sections.synthesis import SynthesisSection


def document_of(run: RunDirectory) -> dict[str, Any]:
    with Ledger(run.ledger) as ledger:
        return {**page_document(Sources(run, ledger, made_origin(run))), "figures": []}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return make_run(tmp_path_factory.mktemp("page"), plain_texts(80))


@pytest.fixture(scope="module")
def document(run: RunDirectory) -> dict[str, Any]:
    return document_of(run)


class Parts(HTMLParser):
    """Collects the text of script and style elements, the policy, and every address in the page."""

    def __init__(self) -> None:
        super().__init__()
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self.policy, self.addresses, self.handlers = "", [], []  # type: ignore[var-annotated]
        self._open: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag in self.inline and named.get("type") != "application/json":
            self._open = tag
            self.inline[tag].append("")
        if named.get("http-equiv") == "Content-Security-Policy":
            self.policy = named["content"] or ""
        self.addresses += [value for key, value in attrs if key in ("src", "href", "action") and value]
        self.handlers += [key for key, _ in attrs if key.startswith("on") or key == "style"]

    def handle_endtag(self, tag: str) -> None:
        self._open = None

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.inline[self._open][-1] += data


def test_the_policy_admits_the_pages_own_script_and_style_and_no_network(document: dict[str, Any]) -> None:
    parts = Parts()
    parts.feed(render(document))
    (script,), (style,) = parts.inline["script"], parts.inline["style"]
    assert f"script-src '{source_hash(script)}';" in parts.policy
    assert f"style-src '{source_hash(style)}';" in parts.policy
    assert parts.policy.startswith("default-src 'none'")
    assert "unsafe" not in parts.policy
    assert all(address.startswith("#") for address in parts.addresses)
    assert parts.handlers == []


def test_the_page_holds_what_its_scripts_read_as_data_and_no_more(document: dict[str, Any]) -> None:
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', render(document), re.DOTALL)
    assert json.loads(data) == json.loads(json.dumps(visible({key: document[key] for key in REPORT.scripted})))
    assert "origins" not in data
    assets = Path(render_module.__file__ or "").parent / "assets"
    read = {key for path in assets.glob("*.js") for key in re.findall(r"\bDATA\.(\w+)", path.read_text())}
    assert read <= {*REPORT.scripted, *RESULTS.scripted}


def test_rows_say_of_each_candidate_what_the_ledger_says(run: RunDirectory, document: dict[str, Any]) -> None:
    with Ledger(run.ledger) as ledger:
        candidates = ledger.candidates()
    rows = document["examples"]["rows"]
    assert [(row["id"], row["kept"], row["reason"]) for row in rows] == [(c.id, c.kept, c.reason) for c in candidates]
    for row, candidate in zip(rows, candidates, strict=True):
        for key, response in (("f", candidate.y_f), ("b", candidate.y_b)):
            assert (row[key] is None) == (response is None)
            if response is not None:
                assert "".join(row[key]["pieces"]) == response.text
                assert row[key]["ppl"] == response.finite_perplexity(count_eos=False)
                assert (row[key]["surprise"]["B"] is None) == (response.base_logprobs is None)
    assert document["examples"]["shaded"] == document["examples"]["answers"] > 0
    from_b = [c.y_b for c in candidates if c.y_b is not None]
    assert document["examples"]["answers_of_b"] == len(from_b)
    known = sum(not y_b.reencoded for y_b in from_b)
    assert 0 < document["examples"]["shaded_under_b"] == known < len(from_b)


def test_what_no_threshold_can_keep_is_stuck_with_its_reason(run: RunDirectory, document: dict[str, Any]) -> None:
    with Ledger(run.ledger) as ledger:
        candidates = ledger.candidates()
    stuck = {row["id"]: row["stuck"] for row in document["examples"]["rows"]}
    assert {"duplicate", "y_f hit max_new_tokens", "non-finite score", None} == set(stuck.values())
    for tau in (1.01, 1.5, 1e9):
        for candidate in decide_all(candidates, Criterion(tau=tau)):
            assert stuck[candidate.id] is None or (candidate.reason == stuck[candidate.id] and not candidate.kept)


def test_every_section_is_there_and_measured(document: dict[str, Any]) -> None:
    assert document["diversity"]["all"]["n"] == 80
    assert [row["label"] for row in document["diversity"]["rounds"]] == ["1", "2", "3", "4"]
    assert {point["kind"] for point in document["diversity"]["map"]["points"]} == {
        "seed",
        "held_out",
        "kept",
        "dropped",
    }
    assert sum(seed["share"] for seed in document["family"]["seeds"]) == pytest.approx(1)
    assert document["training"]["rows"]["lengths"]["response and end"]["least"] >= 2
    assert document["origins"]["overlap"]["seeds"]["words"] >= 1
    assert set(document["origins"]["personal"]) >= {"e-mail address", "telephone number", "IBAN"}
    assert document["verdict"]["arms"]["after"]["correct"] == 9
    names = [arm["name"] for arm in document["verdict"]["arms"].values()]
    assert names == [row[0] for row in document["verdict"]["rows"] if row[0] != "Chance"]  # chart and table agree


def test_the_page_says_of_the_accuracy_what_report_md_says(run: RunDirectory, document: dict[str, Any]) -> None:
    page = unescape(render(document))
    told = accuracy_section(json.loads(run.verdict.read_text())).split("\n")
    facts = [line.removeprefix("- ") for line in told if line.startswith("- ")]
    assert any(fact.startswith("Not carried over: of 11 items that the source has right") for fact in facts)
    assert all(f"<li>{fact}</li>" in page for fact in facts)


def test_hosted_generators_and_regression_questions_are_told_in_sentences(run: RunDirectory) -> None:
    verdict = json.loads(run.verdict.read_text())
    usage = {"prompt_tokens": 1200, "completion_tokens": 34, "requests": 5, "unreported": 1, "cost": 0.25}
    regression = {
        key: verdict[key]
        for key in ("before", "after", "source", "base", "difference", "difference_interval", "chance")
    } | {"non_inferior": None, "margin": 0.02, "lower_bound": -0.1}
    part = verdict_part({**verdict, "generator_usage": usage, "regression": regression})
    page = render({**document_of(run), "verdict": part})
    assert "counted 1,200 prompt tokens and 34 written ones in 5 requests, at a cost of 0.25" in page
    assert "<li>Change on the regression questions +66.7 points" in page


def test_a_run_without_questions_has_all_other_sections(tmp_path: Path) -> None:
    found = document_of(make_run(tmp_path, plain_texts(30), evaluated=False))
    assert found["verdict"]["arms"] is None
    assert found["origins"]["overlap"]["evaluation questions"]["references"] == 0
    page = render(found)
    assert page.split("<script")[0].count("No evaluation is configured") == 1
    assert "Family tree" in page


def test_what_is_gone_is_missing_with_the_reason(tmp_path: Path) -> None:
    made = make_run(tmp_path, plain_texts(30))
    (tmp_path / "seeds.jsonl").write_text('{"prompt": "Request: other\\nIntent:"}\n')
    (tmp_path / "test.jsonl").unlink()
    for name in ("model", "run/adapter"):
        (tmp_path / name / "tokenizer.json").unlink()
        (tmp_path / name / "tokenizer_config.json").unlink()
    found = document_of(made)
    assert "something else" in found["diversity"]["missing"]
    assert "something else" in found["family"]["missing"]
    assert "tokenizer" in found["examples"]["shading_missing"]
    assert "tokenizer" in found["training"]["rows"]["missing"]
    assert "test.jsonl" in found["origins"]["overlap"]["evaluation questions"]["missing"]
    assert render(found).count("Not shown.") >= 4


def test_the_same_run_gives_the_same_page(run: RunDirectory, document: dict[str, Any]) -> None:
    assert render(document_of(run)) == render(document)


def test_the_page_is_written_with_its_figures_light_and_dark_the_same_each_time(run: RunDirectory) -> None:
    written = []
    for _ in range(2):
        with Ledger(run.ledger) as ledger:
            write_page(run, ledger, made_origin(run))
        written.append({path.name: path.read_bytes() for path in [run.page, *run.figures.iterdir()]})
    assert written[0] == written[1]
    drawn = [
        "accuracy",
        "perplexity_f",
        "perplexity_b",
        "plane",
        "map",
        "map_rounds",
        "family_seeds",
        "family_parents",
        "loss",
    ]
    files = {f"{name}_{shade}.{suffix}" for name in drawn for shade in ("light", "dark") for suffix in ("png", "svg")}
    assert set(written[0]) == {"report.html", *files}
    assert "in the folder figures/" in written[0]["report.html"].decode()


def drawn(document: dict[str, Any], name: str) -> Any:
    axes = drawing_library().figure.Figure().add_subplot()
    drawings(document)[name](axes, THEMES["light"])
    return axes


def dashed(axes: Any) -> list[tuple[list[float], list[float]]]:
    return [tuple(map(list, line.get_data())) for line in axes.lines if line.get_linestyle() == "--"]


@pytest.mark.parametrize(
    ("rule", "told", "lines"),
    [
        ("ppl_diff", "tau = 1.5", {"f": 1.5, "b": 1.5}),
        ("asymmetric", "tau_f = 1.2", {"f": 1.2, "b": 1.6}),
        ("few_shot_base", "tau = 1.5", {"f": 1.5}),
        ("kl", "", {}),
        ("none", "", {}),
    ],
)
def test_figures_show_the_thresholds_that_the_runs_rule_reads(
    document: dict[str, Any], rule: str, told: str, lines: dict[str, float]
) -> None:
    changed = {**document, "rule": {**document["rule"], "name": rule}}
    for side in ("f", "b"):
        axes = drawn(changed, f"perplexity_{side}")
        assert [x for x, _ in dashed(axes)] == [[lines[side]] * 2 for _ in range(side in lines)]
    assert drawn(changed, "perplexity_f").get_xlabel() == "$PPL_F(y_f)$" + (f"; dashed: {told}" if told else "")
    assert len(dashed(drawn(changed, "plane"))) == len(lines)


def test_the_plane_of_the_ratio_rule_has_its_line(document: dict[str, Any]) -> None:
    (((low, high), ys),) = dashed(drawn({**document, "rule": {**document["rule"], "name": "ratio"}}, "plane"))
    assert ys == [1.5 * low, 1.5 * high]


def test_the_map_stands_as_on_the_page(document: dict[str, Any]) -> None:
    seeds = [point["y"] for point in document["diversity"]["map"]["points"] if point["kind"] == "seed"]
    (line,) = [line for line in drawn(document, "map").lines if line.get_label() == "seed"]
    assert list(line.get_ydata()) == seeds


def test_the_map_by_round_has_every_candidate_in_its_round(document: dict[str, Any]) -> None:
    points = document["diversity"]["map"]["points"]
    lines = {line.get_label(): list(line.get_xdata()) for line in drawn(document, "map_rounds").lines}
    assert list(lines) == ["rounds from 1", "rounds from 2", "rounds from 3", "rounds from 4", "held-out", "seed"]
    for number in range(4):
        own = [point["x"] for point in points if point.get("round") == number]
        assert lines[f"rounds from {number + 1}"] == own != []


def test_figures_have_the_pages_colours() -> None:
    style = (Path(render_module.__file__ or "").parent / "assets/style.css").read_text()
    names = {"ground": "ground", "ink": "ink", "soft": "soft", "kept": "f", "base": "b", "seed": "t",
             "dropped": "dropped", "real": "held_out"}  # fmt: skip
    for name, own in names.items():
        (shades,) = re.findall(rf"--{name}: light-dark\((\S+), (\S+)\);", style)
        assert shades == tuple(getattr(THEMES[shade], own) for shade in ("light", "dark"))
    bands = re.findall(r"\.b\d { --band: light-dark\((\S+), (\S+)\);", style)
    assert bands == list(zip(THEMES["light"].bands, THEMES["dark"].bands, strict=True))
    for selector in (r"\.points\.r\d { stroke", r"\.band\.r\d { --band"):
        assert tuple(re.findall(selector + r": (#\w+);", style)) == ROUNDS


def test_thresholds_from_variables_are_numbers_and_the_default_where_the_variable_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RATIO", "1.25")
    made = make_run(tmp_path, plain_texts(20), rule={"name": "ratio", "ratio": "${RATIO}", "tau_f": 1.3})
    rule = document_of(made)["rule"]
    assert (rule["name"], rule["thresholds"]["ratio"], rule["unknown"]) == ("ratio", 1.25, [])
    monkeypatch.delenv("RATIO")
    found = document_of(made)
    assert found["rule"]["thresholds"] == {"tau": 1.5, "tau_f": 1.3, "tau_b": 1.6, "ratio": 1.5}
    assert found["rule"]["unknown"] == ["criterion.ratio"]
    assert "not set any more: criterion.ratio. The default stands in." in render(found)


def test_the_mask_view_keeps_characters_of_several_tokens() -> None:
    alphabet = sorted(ByteLevel.alphabet())
    made = Tokenizer(BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    ids = tokenizer("a \U0001f600é!")["input_ids"]
    found = tokens_of(ids, [-100, *ids[1:]], tokenizer)
    assert found["tokens"] == ["a", " ", "", "", "", "\U0001f600", "", "é", "!"]


@pytest.mark.parametrize(
    ("near", "distinct", "told"),
    [
        ((0.0, 0.5), (0.8, 0.8), ["50% of the last prompts nearly repeat an earlier one: "]),
        ((0.9, 0.49), (0.8, 0.56), []),
        ((0.0, None), (0.8, 0.55), ["Pairs of words vary less and less: distinct-2 went from 0.80 in the first"]),
        ((0.0, 0.0), (None, 0.1), []),
        ((0.6,), (0.1,), ["60% of the last prompts nearly repeat"]),
        ((), (), []),
    ],
)
def test_prompts_that_repeat_themselves_are_warned_of(near: tuple[Any], distinct: tuple[Any], told: list[str]) -> None:
    rounds = [{"near_duplicates": one, "distinct_2": other} for one, other in zip(near, distinct, strict=True)]
    found = repetition({"rounds": rounds})
    assert [sentence[: len(start)] for sentence, start in zip(found, told, strict=True)] == told
    assert repetition({"missing": "the seeds are gone"}) == []


def test_shares_are_said_and_warnings_begin_as_sentences(document: dict[str, Any]) -> None:
    page = render({**document, "warnings": ["two of 9 kinds"]})
    assert "Two of 9 kinds" in page
    assert re.search(
        r'<th scope="row">kept</th><td class="num">\d+</td><td><svg.*?</svg><span class="unseen">\d+%<', page
    )


def test_without_libraries_for_figures_the_page_says_what_is_not_drawn(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with Ledger(run.ledger) as ledger:
        write_page(run, ledger, made_origin(run))
    page = run.page.read_text(encoding="utf-8")
    assert "Figures were not drawn: matplotlib is not installed." in page
    assert "no embedding: scikit-learn is not installed." in page
    assert "distinct-2" in page


def test_texts_that_are_too_long_are_clipped_and_counted(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_examples, "TEXT_BUDGET", 0)
    monkeypatch.setattr(page_examples, "LEAST_TEXT", 12)
    found = document_of(run)["examples"]
    assert found["clipped"] == 80
    assert all(re.fullmatch(r".{12} \[and \d+ more characters\]", row["text"]) for row in found["rows"])


def test_tokens_beyond_the_budget_are_left_out_kept_ones_last(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_examples, "TOKEN_BUDGET", 60)
    found = document_of(run)["examples"]
    shaded = [row for row in found["rows"] if row["f"] and "pieces" in row["f"]]
    assert 0 < found["shaded"] < found["answers"]
    assert sum(len(reply["pieces"]) for row in shaded for reply in (row["f"], row["b"]) if reply) <= 60
    assert all(row["kept"] for row in shaded)


def test_a_thousand_candidates_with_answers_of_the_default_length_stay_below_6_mb() -> None:
    words = [*(f"{number:03d}" for number in range(500)), "[UNK]"]  # English has 4 letters a token, the space included
    made = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)

    def answer(start: int) -> Response:
        ids = tuple((start + place) % 500 for place in range(SynthesisSection().max_new_tokens))
        logprobs = tuple(-0.002 * token for token in ids)  # up to 1 nat
        return Response(" ".join(words[token] for token in ids), ids, logprobs, -0.1, "eos", False)

    def own(y_b: Response) -> Response:
        return replace(y_b, base_logprobs=y_b.token_logprobs, base_eos_logprob=y_b.eos_logprob)

    candidates = [
        Candidate(f"p{n}", 0, "c", "a prompt " * 20, "", n % 4 == 0, "kept", answer(n), own(answer(n + 7)))
        for n in range(1000)
    ]  # of which 250 are kept
    sources = SimpleNamespace(candidates=candidates, source_tokenizer=tokenizer, count_eos=False)
    found = page_examples.examples(sources)  # type: ignore[arg-type]
    assert found["shaded"] == found["answers"] == 2000
    assert found["shaded_under_b"] == found["answers_of_b"] == 1000
    assert len(as_data(found)) < 5.7e6  # what else the page holds takes 0.2 MB


def test_control_direction_and_hidden_characters_are_shown() -> None:
    assert visible(
        {"a": ["\x1b[31m\u202egnp.exe\u2066", "tab\tline\n", "\U000e0041", "\u200d", "a\u00ad\u180e\U000e0100"]}
    ) == {
        "a": ["\u241b[31m[U+202E]gnp.exe[U+2066]", "tab\tline\n", "[U+E0041]", "\u200d", "a[U+00AD][U+180E][U+E0100]"]
    }


def test_data_cannot_end_its_script_element() -> None:
    text = "</script><!--<script>\u2028\u2029"
    data = as_data({"text": text})
    assert "<" not in data
    assert not {"\u2028", "\u2029"} & set(data)
    assert json.loads(data) == {"text": text}


def response(text: str, ids: tuple[int, ...]) -> Response:
    return Response(text, ids, (-0.1,) * len(ids), None, "stop", False)


def test_tokens_are_cut_from_the_text_or_spelt_or_left_whole() -> None:
    tokenizer = make_tokenizer(44, bos=False)
    usual = tuple(tokenizer("play a song", add_special_tokens=False)["input_ids"])
    known = tokenizer.get_vocab()
    merged = max((token for token in known if len(token) > 1 and set(token) <= set(known)), key=lambda t: (len(t), t))
    letters = tuple(known[letter] for letter in merged)
    given = [response("play a song", usual), response(merged, letters), response("else", letters)]
    found = token_pieces(given, tokenizer)
    assert found[0] is not None
    assert (len(found[0]), "".join(found[0])) == (len(usual), "play a song")
    assert found[1:] == [list(merged), None]
    assert token_pieces([], tokenizer) == []


def kept(name: str, call: str, round: int = 0) -> Candidate:
    return Candidate(name, round, call, f"text of {name}", f"text of {name}", True, "kept")


def call(name: str, *demos: str) -> GeneratorCall:
    return GeneratorCall(name, 0, demos, "", (), (), 0, 0.0, {})


def test_descent_is_divided_among_parents() -> None:
    calls = {"c0": call("c0", "s0", "s1"), "c1": call("c1", "s0", "a"), "c2": call("c2", "s0", "b")}
    found = family(
        [kept("a", "c0"), kept("b", "c1", 1), kept("c", "c2", 2)], calls, {"s0": "one", "s1": "two", "s2": "three"}
    )
    # a: 1/2, 1/2. b: half of s0, half of a: 3/4, 1/4. c: 7/8, 1/8.
    assert [seed["share"] for seed in found["seeds"]] == pytest.approx([(4 + 6 + 7) / 24, (4 + 2 + 1) / 24, 0])
    assert [seed["children"] for seed in found["seeds"]] == [3, 1, 0]
    assert found["depths"] == {1: 1, 2: 1, 3: 1}
    assert [(one["id"], one["descendants"]) for one in found["fruitful"]] == [("a", 2), ("b", 1)]
    assert 1 < found["effective_seeds"] < 2
    assert found["generations"] == {"a": 1, "b": 2, "c": 3}
    assert found["columns"] == [{"label": str(number), "kept": 1} for number in (1, 2, 3)]
    assert {band["label"]: band["values"] for band in found["by_seed"]} == {
        "s0": [0.5, 0.75, 0.875],
        "s1": [0.5, 0.25, 0.125],
    }
    assert {band["label"]: band["values"] for band in found["by_parents"]} == {
        "seeds": [1, 0.5, 0.5], "round 1": [0, 0.5, 0], "round 2": [0, 0, 0.5]
    }  # fmt: skip


def test_many_seeds_and_rounds_share_bands_and_no_pair_is_lost() -> None:
    seeds = [f"s{number:02d}" for number in range(20)]
    calls = {f"c{n:02d}": call(f"c{n:02d}", seeds[n % 20], *([f"p{n - 1:02d}"] if n % 3 else [])) for n in range(40)}
    pairs = [kept(f"p{n:02d}", f"c{n:02d}", n) for n in range(40)]
    found = family(pairs, calls, dict.fromkeys(seeds, ""))
    assert [column["kept"] for column in found["columns"]] == [4] * 10
    assert [band["seeds"] for band in found["by_seed"]] == [1] * 7 + [13]
    assert found["by_seed"][-1]["label"] == "13 other seeds"
    assert [band["label"] for band in found["by_parents"]][:2] == ["seeds", "rounds 1 to 7"]
    for by in ("by_seed", "by_parents"):
        assert [sum(values) for values in zip(*(band["values"] for band in found[by]), strict=True)] == pytest.approx(
            [4] * 10, abs=0.01
        )


def test_a_map_is_the_same_each_time_and_of_few_texts_too() -> None:
    texts = [f"play song number {n}" for n in range(12)]
    first, second = (flat_map(embed(texts).vectors) for _ in range(2))
    assert first.shape == (12, 2)
    assert (first == second).all()
    assert flat_map(embed(["one", ""]).vectors).shape == (2, 2)


def test_rounds_are_grouped_evenly() -> None:
    assert spans(2, 12) == [("1", 0, 0), ("2", 1, 1)]
    assert spans(0, 12) == []
    groups = spans(25, 12)
    assert groups[0] == ("1 to 3", 0, 2)
    assert groups[-1] == ("25", 24, 24)


def test_models_are_told_with_licence_and_hash_or_why_not(document: dict[str, Any]) -> None:
    base, target = document["origins"]["models"]
    assert (base["role"], target["role"]) == ("B, the source's base", "T, the target")
    assert base["licence"] == "not known (there is no README.md in the model's folder)"
    assert (base["sha256"], base["reason"]) == (None, "no local folder of weights")


def test_a_model_of_the_hub_is_told_with_the_revision_that_was_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    revision = "0123456789abcdef" * 2
    snapshot = tmp_path / "cache/models--me--base/snapshots" / revision
    for path, text in (
        (snapshot / "config.json", "{}"),
        (snapshot / "model.safetensors", "weights"),
        (snapshot.parents[1] / "refs/main", revision),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    described = {
        "B": {"path": "me/base"},
        "F": {"path": str(snapshot)},
        "T": {"path": "me/another"},
        "G": {"path": "http://host/v1"},
    }
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.set_meta(models=json.dumps(described))
        models = origin(ledger)["models"]
    digest = hashlib.sha256(b"weights").hexdigest()
    for model in ("B", "F"):  # an adapter's id has been resolved before
        assert models[model] == described[model] | {"revision": revision, "sha256": {"model.safetensors": digest}}
    for other in ("T", "G"):
        unknown = {"revision": None, "sha256": None, "reason": "no local folder of weights"}
        assert models[other] == described[other] | unknown


def test_only_settings_that_differ_are_told(document: dict[str, Any]) -> None:
    told = {setting["key"]: (setting["value"], setting["default"]) for setting in document["origins"]["settings"]}
    assert told["synthesis.max_new_tokens"] == ("12", "256")
    assert told["seeds"] == ('"seeds.jsonl"', None)
    assert "synthesis.target_size" not in told
    assert "criterion.tau" not in told  # set, but to what it is anyway


def test_a_setting_that_the_run_did_not_know_is_not_told() -> None:
    known = {"per_call": 10, "stop": [], "max_new_tokens": 256}
    told = unusual_settings(SynthesisSection, known)
    assert told == [{"key": "per_call", "value": "10", "default": str(SynthesisSection().per_call)}]


def test_a_fence_is_longer_than_any_in_its_text() -> None:
    assert fenced("a: 1", "yaml") == "```yaml\na: 1\n```"
    assert fenced("a: '````'", "yaml") == "`````yaml\na: '````'\n`````"
