"""report.html of a data folder: what it says, whole or not, and that it needs nothing but itself."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from llmtrain.cli.report import ReportRoot, report
from llmtrain.data import facts as data_facts
from llmtrain.data.config import StopAfter
from llmtrain.data.document import SKIP_REASONS
from llmtrain.data.facts import KEPT, FactsBuilder, Measure, Scale, Threshold, put_totals, write_facts
from llmtrain.data.manifest import (
    FORMAT_VERSION,
    Manifest,
    PackEntry,
    ShardEntry,
    TokenizerEntry,
    read_manifest,
    write_manifest,
)
from llmtrain.data.pipeline import DOCUMENTS_NAME
from llmtrain.errors import ConfigError, DataError
from llmtrain.tracking import data_report
from llmtrain.tracking.data_report import is_data_folder, read_data_run, render_data, write_data_report
from llmtrain.tracking.data_tables import (
    NUM_LANGUAGES_SHOWN,
    funnel_rows,
    percent,
    share_rows,
    source_rows,
    stage_rows,
)
from llmtrain.tracking.histograms import histogram_svg

REASONS = ["too_short", "exact_duplicate"]
FUNNEL = [
    {
        "pass": "scan",
        "in": {"documents": 101, "bytes": 101_000},
        "kept": {"documents": 100, "bytes": 100_000},
        "dropped": {"broken_json": {"documents": 1, "bytes": 1000}},
    },
    {
        "pass": "decide",
        "in": {"documents": 100, "bytes": 100_000},
        "kept": {"documents": 60, "bytes": 60_000},
        "dropped": {
            "too_short": {"documents": 30, "bytes": 30_000},
            "exact_duplicate": {"documents": 10, "bytes": 10_000},
        },
    },
    {
        "pass": "tokenize",
        "in": {"documents": 60, "bytes": 60_000},
        "kept": {"documents": 60, "bytes": 60_000, "tokens": 15_000},
        "dropped": {},
        "checked_documents": 25,
        "differing_documents": 0,
    },
    {
        "pass": "pack train seq_len=64",
        "in": {"tokens": 14_000},
        "kept": {"tokens": 13_950},
        "dropped": {"first_of_document": {"tokens": 50}},
    },
]
WORDS = Measure(
    name="num_words",
    title="words",
    unit="words",
    scale=Scale.count,
    thresholds=(
        Threshold(reason="too_short", setting="rules.min_words", value=50, drops="below"),
        Threshold(reason="too_long", setting="rules.max_words", value=1000, drops="above"),
    ),
)
SHARES = Measure(name="shares", title="digits / characters", unit="share of characters", scale=Scale.fraction)


class Page(HTMLParser):
    """The visible words of a page, every address in it, and its tags as they open and close."""

    def __init__(self, text):
        super().__init__()
        self.words, self.addresses, self.open_tags, self.hidden = [], [], [], 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.hidden += tag == "style"
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "data")]
        if tag not in ("meta", "input", "br"):
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        self.hidden -= tag == "style"
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        if not self.hidden:
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def shard(split, num_documents, num_tokens, text_bytes):
    return ShardEntry(
        path=f"shards/x/{split}-00000",
        split=split,
        num_documents=num_documents,
        num_tokens=num_tokens,
        num_bytes=2 * num_tokens,
        max_id=99,
        num_eos=num_documents,
        sha256="0" * 64,
        idx_sha256="0" * 64,
        xxh3_128="0" * 32,
        sums_xxh3_128="0" * 32,
        text_bytes=text_bytes,
    )


@pytest.fixture
def folder(tmp_path):
    """A data folder with the figures of FUNNEL and facts of the same hundred documents."""
    pack = PackEntry(
        path="packs/x/seq64",
        split="train",
        seq_len=64,
        strategy="concat",
        num_rows=219,
        num_target_tokens=13_950,
        num_padding=0,
        num_cut_documents=3,
        num_long_documents=1,
        rows_sha256="0",
        spans_sha256="0",
    )
    tokenizer = TokenizerEntry(
        path="tokenizer/x", kind="bpe", vocab_size=512, fingerprint="0", eos_id=1, bos_id=None
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        corpus="tiny <web>",
        dtype="uint16",
        tokenizer=tokenizer,
        shards=[shard("held_out", 5, 1000, 4000), shard("train", 55, 14_000, 56_000)],
        packs=[pack],
        funnel=FUNNEL,
        config={"rules": {"min_words": 50}, "corpus": {"name": "tiny"}},
        config_hash="",
        versions={"numpy": "2.4.6"},
        held_out_text="held_out.jsonl.zst",
        tool_version="0",
    )
    write_manifest(tmp_path, manifest)
    write_facts(tmp_path, facts_of())
    return tmp_path


def facts_of():
    builder = FactsBuilder(REASONS, [WORDS, SHARES], ["exact_duplicate"])
    reason = np.array([KEPT] * 60 + [0] * 30 + [1] * 10)
    num_words = np.where(reason == 0, np.arange(100) % 50, 60 + np.arange(100))
    builder.add_unit(
        first=0,
        ids=np.random.default_rng(0).integers(0, 256, (100, 16), dtype=np.uint8),
        num_bytes=np.full(100, 1000),
        reason=reason,
        source=["books"] * 70 + ["code & more"] * 30,
        values={"num_words": num_words.astype(float), "shares": np.linspace(0, 0.4, 100)},
        language=["en"] * 90 + ["de"] * 10,
    )
    duplicate = np.dtype([("document", "<i8"), ("survivor", "<i8"), ("cluster_size", "<i4")])
    rows = [(90 + number, 1, 8) for number in range(7)] + [
        (97 + number, 2 + number, 2) for number in range(3)
    ]
    builder.add_duplicates("exact", np.array(rows, dtype=duplicate))
    builder.add_counts("pii", {"email": 3, "api_key": 1})
    builder.add_counts("edits", {"javascript": {"lines": 4, "bytes": 2048}})
    builder.add_counts("quarantine", {"broken_json": {"documents": 1, "bytes": 1000}})

    def look_up(documents):
        return [
            {
                "id": f"{n:032x}",
                "source": "books",
                "path": "a.jsonl",
                "record": n + 1,
                "text": f"<b>{n}</b> &",
            }
            for n in documents.tolist()
        ]

    facts = builder.result(
        look_up,
        corpus="tiny",
        stages=[
            {"name": "scan", "seconds": 3.0, "bytes": 101_000, "documents": 101},
            {"name": "decide", "seconds": 1.0},
        ],
        decontamination=[{"name": "hellaswag", "items": 1000, "items_found": 3, "items_half_found": 1}],
    )
    put_totals(facts["sources"], "tokens", {"books": 15_000})
    return facts


def page_of(folder):
    return Page(write_data_report(folder).read_text(encoding="utf-8"))


def test_the_page_is_one_file_that_asks_for_no_other(folder):
    path = write_data_report(folder)
    text = path.read_text(encoding="utf-8")
    assert path == folder / "report.html"
    assert Page(text).addresses == []
    assert not re.search(r"https?://|@import|url\(|<script|<link|<img|<iframe", text)


def test_the_page_closes_what_it_opens(folder):
    assert page_of(folder).open_tags == []


def test_the_head_says_what_came_out(folder):
    text = page_of(folder).text
    assert (
        "Of 101 documents with 98.6 KiB of text, 60 with 58.6 KiB (59.4%) stayed: 14k tokens to train on and "
        "1k tokens held out." in text
    )
    for words in (
        "Documents kept 60 of 101 read, 59.4%",
        "Tokens 15k 4.00 bytes a token",
        "Duplicates removed 10 10.0% of the documents scanned",
        "Time 4.0 s 75% of it scan",
    ):
        assert words in text


def test_findings_are_what_the_facts_say(folder):
    text = page_of(folder).text
    for words in (
        "Most text went to: too short (29.7%), exact duplicate (9.9%), broken json (1.0%) of what was read.",
        "100.0% of the text of source code & more did not stay.",
        "1 record could not be used",
        "Of 25 documents encoded again by SentencePiece itself, none differs.",
        "3 of 1,000 items of hellaswag share n-grams with the corpus, 1 of them half of theirs or more.",
    ):
        assert words in text


def test_the_funnel_tells_text_documents_and_tokens_of_every_reason(folder):
    text = page_of(folder).text
    for row in (
        "read 100.0% 100.0% 98.6 KiB 101 documents ≈25.2k tokens",
        "broken json 1.0% 1.0% 1000 B 1 documents ≈250 tokens",
        "left after scan 99.0% 99.0% 97.7 KiB 100 documents ≈25k tokens",
        "too short 29.7% 29.7% 29.3 KiB 30 documents ≈7.5k tokens",
        "exact duplicate 9.9% 9.9% 9.77 KiB 10 documents ≈2.5k tokens",
        "kept 59.4% 59.4% 58.6 KiB 60 documents 15k tokens",
        "train 64 concat 219 0.00% 3 14,000 13,950",
    ):
        assert row in text
    assert "left after decide" not in text  # nothing was dropped later: that is what was kept


def test_each_dropped_bar_begins_where_the_one_before_ended():
    rows = [row for row in funnel_rows(FUNNEL[:3], 4.0) if row.style == "dropped"]
    for measure in ("by_bytes", "by_documents"):
        pieces = [getattr(row, measure) for row in rows]
        assert pieces[0].end == 1.0
        for before, after in itertools.pairwise(pieces):
            assert before.begin == pytest.approx(after.end)
        assert pieces[-1].begin == pytest.approx(60 / 101)


def test_small_reasons_share_a_row_that_names_them():
    dropped = {f"rule_{number}": {"documents": 1, "bytes": 10} for number in range(5)}
    dropped["large"] = {"documents": 1000, "bytes": 900_000}
    kept = {"documents": 8995, "bytes": 99_950}
    entry = {
        "pass": "decide",
        "in": {"documents": 10_000, "bytes": 1_000_000},
        "kept": kept,
        "dropped": dropped,
    }
    rows = funnel_rows([entry], None)
    assert [row.label for row in rows] == ["read", "large", "5 smaller reasons", "kept"]
    assert rows[2].parts[0] == "rule 0: 1 document, 10 B"
    assert (rows[2].documents, rows[2].text, rows[2].tokens) == ("5", "50 B", "–")


def test_sources_show_their_own_shares(folder):
    text = page_of(folder).text
    assert "books 85.7% kept 68.4 KiB 70 documents 0 duplicates 15k tokens too short 14.3%" in text
    assert "code & more 0.0% kept 29.3 KiB 30 documents 10 duplicates 0 tokens" in text


def test_many_sources_end_in_one_row():
    counts = {"documents": 3, "bytes": 30, "kept": {"documents": 3, "bytes": 30}, "dropped": {}}
    [row] = source_rows([{"source": None, "num_names": 1234, **counts}])
    assert (row.name, row.reasons, row.tokens, row.duplicates) == (
        "1,234 smaller sources",
        "nothing dropped",
        "–",
        "–",
    )


def test_histograms_have_their_thresholds_and_what_they_dropped(folder):
    html = write_data_report(folder).read_text(encoding="utf-8")
    text = Page(html).text
    assert "rules.min_words = 50: 30 dropped" in text
    assert "rules.max_words = 1000: 0 dropped" in text
    assert "at least 50" in text
    assert "Words" in text
    assert "at most 1k" in text
    assert html.count('class="bound"') == 2
    assert "1 more signals, without a threshold" in text


def bars_of(svg, style):
    found = re.findall(
        rf'class="bar-{style}" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', svg
    )
    return [tuple(map(float, bar)) for bar in found]


def histogram(**changes):
    shown = {
        "title": "t",
        "unit": "u",
        "scale": "amount",
        "thresholds": [],
        "edges": [1.0, 10.0, 100.0],
        "kept": [999, 9],
        "dropped": [9, 0],
    }
    return {**shown, **changes}


def test_heights_are_logarithms_on_one_scale_for_both_sides():
    svg = histogram_svg(histogram())
    (_, _, _, high), (_, _, _, low) = bars_of(svg, "kept")
    [(_, top, _, dropped)] = bars_of(svg, "dropped")
    assert high == pytest.approx(3 * low, rel=0.01)
    assert dropped == pytest.approx(low, rel=0.01)
    bottom = bars_of(svg, "kept")[0][1] + high
    assert top == pytest.approx(bottom, abs=0.15)


def test_kept_bars_lie_beside_the_line_of_their_threshold():
    bound = {"reason": "r", "setting": "rules.r", "value": 10.0, "drops": "above", "source": ""}
    svg = histogram_svg(histogram(thresholds=[bound], kept=[5, 0], dropped=[0, 5]))
    line = float(re.search(r'class="bound" x1="([\d.]+)"', svg)[1])
    [(kept_x, _, kept_width, _)] = bars_of(svg, "kept")
    [(dropped_x, *_)] = bars_of(svg, "dropped")
    assert kept_x + kept_width <= line <= dropped_x + 0.1


def test_whole_numbers_stand_on_their_own_side():
    """Values 1, 2 and 3, at least 2: the line runs between 1 and 2."""
    bound = {"reason": "r", "setting": "rules.r", "value": 2, "drops": "below", "source": ""}
    svg = histogram_svg(
        histogram(
            scale="count", edges=[0.5, 1.5, 2.5, 3.5], kept=[0, 4, 4], dropped=[4, 0, 0], thresholds=[bound]
        )
    )
    line = float(re.search(r'class="bound" x1="([\d.]+)"', svg)[1])
    assert min(x for x, *_ in bars_of(svg, "kept")) == pytest.approx(line, abs=0.1)


def test_what_is_zero_or_beyond_the_axis_has_a_bar_of_its_own():
    shown = histogram(
        scale="fraction",
        edges=[0.9, 1.0],
        kept=[3],
        dropped=[0],
        zero={"kept": 7, "dropped": 1},
        above={"kept": 0, "dropped": 2},
    )
    svg = histogram_svg(shown)
    assert len(bars_of(svg, "kept")) == 2
    assert len(bars_of(svg, "dropped")) == 2
    assert "&gt;1<" in svg
    bound = {"reason": "r", "setting": "rules.r", "value": 0.2, "drops": "above", "source": ""}
    assert "&gt;1<" in histogram_svg({**shown, "thresholds": [bound], "edges": [0.1, 0.97]})
    assert len(re.findall(">0<", svg)) == 2  # of the counts, and of the bar: the axis does not say it again


def test_a_histogram_of_nothing_is_not_drawn():
    assert histogram_svg(histogram(edges=[], kept=[], dropped=[])) == ""


@pytest.mark.parametrize("scale", ["fraction", "count", "amount"])
@pytest.mark.parametrize("kept", [[1], [0], [10**9]])
def test_a_single_bar_is_drawn_inside_the_picture(scale, kept):
    svg = histogram_svg(histogram(scale=scale, edges=[0.5, 1.5], kept=kept, dropped=[1]))
    for style in ("kept", "dropped"):
        for x, y, width, height in bars_of(svg, style):
            assert x >= 40
            assert x + width <= 380
            assert y >= 20
            assert y + height <= 236


def test_duplicates_are_shown_by_size_with_examples(folder):
    text = page_of(folder).text
    assert "exact clusters removed 2 3 3 8 1 7" in text
    assert "A cluster of 8 Stays: a.jsonl, record 2" in text
    assert "Removed, 3 of 7:" in text


def test_languages_have_shares_and_small_ones_end_in_one_row(folder):
    assert "en 90.0% 90 66.7% 87.9 KiB de 10.0% 10 0.0% 9.77 KiB" in page_of(folder).text
    rows = [
        {
            "language": f"l{number}",
            "documents": 100 - number,
            "bytes": 1,
            "kept": {"documents": 1},
            "dropped": {},
        }
        for number in range(40)
    ]
    shown = share_rows(rows, "language")
    assert len(shown) == NUM_LANGUAGES_SHOWN + 1
    assert shown[-1].label == f"{40 - NUM_LANGUAGES_SHOWN} others"


def test_stages_have_time_and_speed(folder):
    text = page_of(folder).text
    assert "scan 3.0 s 75.0% 0.0337 MB/s 34/s" in text
    assert "decide 1.0 s 25.0% – –" in text
    assert stage_rows([{"name": "x", "seconds": 0.0, "bytes": 10}])[0].share == "–"


def test_counts_of_masks_cuts_and_bad_records_are_tables(folder):
    text = page_of(folder).text
    for words in ("email 3 api key 1", "javascript 4 2 KiB", "broken json 1 1000 B", "hellaswag 1,000 3 1"):
        assert words in text


def test_samples_are_shown_as_text_and_never_as_markup(folder):
    html = write_data_report(folder).read_text(encoding="utf-8")
    assert "<b>1</b>" not in html
    text = Page(html).text
    assert re.search(r"<b>\d+</b> &", text)
    assert "Dropped, too short: 30 documents" in text
    assert "tiny <web>" in text
    assert f"llmtrain data explain folder={folder} id=…" in text


def test_the_settings_and_versions_are_there(folder):
    text = page_of(folder).text
    assert "min_words: 50" in text
    assert "numpy 2.4.6" in text


def test_without_facts_the_funnel_is_still_there_and_that_is_said(folder):
    (folder / "facts.json").unlink()
    text = page_of(folder).text
    assert "facts.json is missing: only the manifest's figures are shown." in text
    assert "too short 29.7%" in text
    assert "Languages" not in text


def test_a_manifest_without_a_funnel_has_a_page(folder):
    manifest = read_manifest(folder)
    write_manifest(folder, Manifest(**{**vars(manifest), "funnel": [], "shards": [], "packs": []}))
    write_facts(folder, {"facts_version": 1})
    assert "There is no funnel." in page_of(folder).text


def test_damaged_facts_are_an_error(folder):
    (folder / "facts.json").write_text("{")
    with pytest.raises(
        DataError, match=r"facts\.json is damaged .*; delete it, and run `llmtrain data` again"
    ):
        read_data_run(folder)


def test_files_and_reasons_have_one_name():
    assert data_report.FACTS_NAME == data_facts.FACTS_NAME
    assert data_report.DOCUMENTS_NAME == DOCUMENTS_NAME
    assert set(data_report.SKIPPED) == set(SKIP_REASONS)
    assert set(data_report.STATES) == {state.name for state in StopAfter}


@pytest.mark.parametrize(
    ("part", "whole", "shown"), [(1, 3, "33.3%"), (1, 10**6, "<0.1%"), (0, 3, "0.0%"), (1, 0, "–")]
)
def test_a_part_that_is_not_nothing_never_shows_as_nothing(part, whole, shown):
    assert percent(part, whole) == shown


def test_the_verb_tells_a_data_folder_from_a_run(folder, capsys):
    report(ReportRoot(folder=str(folder)))
    assert f"report: {folder}/report.html" in capsys.readouterr().out
    assert "tiny &lt;web&gt;" in (folder / "report.html").read_text()
    with pytest.raises(ConfigError, match="give one of folder=FOLDER and run=FOLDER, not neither"):
        report(ReportRoot())
    with pytest.raises(ConfigError, match="give one of folder=FOLDER and run=FOLDER, not both"):
        report(ReportRoot(folder="a", run="b"))


def test_the_same_facts_give_the_same_page(folder):
    pages = [re.sub("written [^.]*", "", render_data(read_data_run(folder))) for _ in range(2)]
    assert pages[0] == pages[1]
    assert json.loads((folder / "facts.json").read_text())["facts_version"] == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium, to look at the page")
def test_nothing_is_wider_than_a_phone(folder, tmp_path):
    """The page in a frame of 390 pixels does not scroll sideways, and a browser draws all of it."""
    page = write_data_report(folder)
    html = page.read_text(encoding="utf-8")
    measure = "const page = document.documentElement; document.title = page.scrollWidth - page.clientWidth"
    probe = f"<script>{measure}</script></body>"
    inner = tmp_path / "inner.html"
    inner.write_text(html.replace("</body>", probe), encoding="utf-8")
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<iframe id="f" src="{inner.name}" width="390" height="900"></iframe><script>f.onload = () => '
        "document.body.append('too wide by ' + f.contentDocument.title)</script>"
    )
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=5000", "--dump-dom", outer.as_uri()],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert "too wide by 0<" in done.stdout


def test_a_run_that_ended_before_shards_has_a_page_of_its_facts(folder):
    splits = {"held_out": {"documents": 5, "bytes": 0}, "train": {"documents": 55, "bytes": 0}}
    decided = {**FUNNEL[1], "splits": splits}
    (folder / "documents.json").write_text(json.dumps({"files": [{"num_bytes": 1024}, {"num_bytes": 2048}]}))
    write_facts(
        folder,
        {
            "facts_version": 1, "stop_after": "documents", "corpus": "early", "funnel": [FUNNEL[0], decided],
            "config": {"rules": {"min_words": 7}}, "versions": {"python": "3.11"},
        },
    )  # fmt: skip
    for with_manifest in (True, False):  # one of an earlier run may lie there
        if not with_manifest:
            (folder / "manifest.json").unlink()
        assert is_data_folder(folder)
        text = page_of(folder).text
        assert "early" in text
        assert "min_words: 7" in text
        assert "of text, 60 with 58.6 KiB (59.4%) stayed: 55 to train on and 5 held out." in text
        assert "documents written" in text
        assert "tokens" not in text
        assert "Shards" not in text
        assert "Parquet files 2 3 KiB in all" in text


def test_a_run_that_ended_with_verdicts_says_so(folder):
    write_facts(folder, {"facts_version": 1, "stop_after": "decide", "corpus": "c", "funnel": FUNNEL[:2]})
    (folder / "documents.json").write_text(json.dumps({"files": [{"num_bytes": 1024}]}))  # of an earlier run
    text = page_of(folder).text
    assert "decided, no text written" in text
    assert "Parquet files" not in text


def test_facts_of_another_run_than_the_manifests_are_told(folder):
    facts = json.loads((folder / "facts.json").read_text())
    for funnel, is_told in ((FUNNEL, False), (FUNNEL[:2], True)):
        write_facts(folder, {**facts, "stop_after": "pack", "funnel": funnel})
        assert ("facts.json and manifest.json are of different runs" in page_of(folder).text) == is_told


def test_text_cut_out_of_documents_is_told_apart_from_dropped_documents():
    dropped = {"few_words": {"documents": 0, "bytes": 400_000}, "empty": {"documents": 7, "bytes": 0}}
    dropped |= {f"edit_{number}": {"documents": 0, "bytes": 10} for number in range(5)}
    entry = {
        "pass": "scan",
        "in": {"documents": 10, "bytes": 1_000_000},
        "kept": {"documents": 3, "bytes": 599_950},
        "dropped": dropped,
    }
    _, few_words, empty, small, _ = funnel_rows([entry], None)
    assert (few_words.style, few_words.documents, few_words.document_share) == ("cut", "–", "–")
    assert few_words.by_bytes.begin == pytest.approx(0.6)
    assert (empty.style, empty.documents, empty.document_share) == ("dropped", "7", "70.0%")
    assert (small.label, small.style, small.parts[0]) == ("5 smaller reasons", "cut", "edit 0: 10 B")


def test_a_source_shows_what_was_cut_out_of_its_documents():
    kept = {"documents": 3, "bytes": 500}
    dropped = {"too_short": {"documents": 1, "bytes": 200}}
    counts = {"documents": 4, "bytes": 700, "kept": kept, "dropped": dropped}
    [row] = source_rows([{"source": "s", **counts, "read_bytes": 1000, "left_bytes": 400}])
    assert [(piece.style, piece.begin, piece.end) for piece in row.pieces] == [
        ("kept", 0.0, 0.4), ("dropped", 0.4, pytest.approx(0.6)), ("cut", pytest.approx(0.6), 1.0),
    ]  # fmt: skip
    assert (row.kept_share, row.text) == ("40.0%", "1000 B")
    assert row.reasons == "cut out of documents 40.0%, too short 20.0%"


NEAR = {
    "counts": {"num_documents": 70, "num_candidates": 12, "num_accepted": 9, "num_by_text": 4},
    "accepted": [
        {"document_id": "cc", "other_id": "dd", "agreement": 0.875, "similarity": None},
        {"document_id": "aa", "other_id": "bb", "agreement": 0.75, "similarity": 0.7123},
    ],
    "rejected": [
        {
            "document_id": "ee", "other_id": "ff", "agreement": 0.5, "similarity": None,
            "documents": [
                {"id": "ee", "source": "s", "path": "p.jsonl", "record": 1234, "text": "<i>one"},
                {"id": "ff", "source": "an earlier run", "path": "", "record": 0, "text": None},
            ],
        }
    ],
}  # fmt: skip


def with_near(folder, **counts):
    facts = json.loads((folder / "facts.json").read_text())
    write_facts(folder, {**facts, "near": {**NEAR, "counts": NEAR["counts"] | counts}})
    return page_of(folder)


def test_pairs_of_similar_texts_are_shown_with_what_decided(folder):
    page = with_near(folder)
    for words in (
        "70 documents compared by signatures: 12 pairs looked alike, 9 were accepted as near-duplicates "
        "(4 were decided by the texts themselves).",
        "near: 2 pairs accepted Of a sample of 2, those nearest to the threshold. similarity of the texts "
        "0.712, signatures agree in 75.0% document · aa document · bb signatures agree in 87.5%",
        "near: 1 pair rejected Of a sample of 1, those nearest to the threshold. signatures agree in 50.0% "
        "p.jsonl, record 1,234 · s · ee <i>one an earlier run · ff",
    ):
        assert words in page.text
    assert page.open_tags == []
    assert "band" not in page.text


def test_bands_and_clusters_that_were_too_large_are_told(folder):
    text = with_near(folder, num_boilerplate_keys=2, num_oversize_clusters=1, num_released=30).text
    assert "2 bands had more than dedup.near.max_key_documents documents" in text
    assert "In 1 cluster with more than dedup.near.max_cluster documents, 30 documents unlike" in text


def test_that_no_two_texts_looked_alike_is_said(folder):
    facts = json.loads((folder / "facts.json").read_text())
    del facts["duplicates"]
    counts = {"num_documents": 5, "num_candidates": 0, "num_accepted": 0}
    write_facts(folder, {**facts, "near": {"counts": counts, "accepted": [], "rejected": []}})
    text = page_of(folder).text
    assert "Duplicates 5 documents compared by signatures: no two looked alike." in text
    assert "pairs" not in text


def test_records_of_a_crawl_that_are_no_pages_are_no_warning(folder):
    facts = json.loads((folder / "facts.json").read_text())
    facts["quarantine"] = {"not_a_page": {"documents": 500, "bytes": 1000}}
    write_facts(folder, facts)
    text = page_of(folder).text
    assert "could not be used" not in text
    assert "Records that are no documents reason records size not a page 500" in text
