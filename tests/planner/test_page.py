"""The page shows the plan's own numbers, no part of a bar is lost, and pictures stay inside their frames."""

import itertools
import math
import re
from dataclasses import replace
from html import escape, unescape
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from llmtrain.model.size import FLOPS_CONVENTIONS, num_params
from llmtrain.planner.config import (
    BudgetConfig,
    ChoiceConfig,
    DataWishConfig,
    InferenceConfig,
    ModelWishConfig,
)
from llmtrain.planner.cost.cluster import find_cluster
from llmtrain.planner.cost.layouts import describe
from llmtrain.planner.interval import Interval
from llmtrain.planner.loss.laws import LAWS, band, optimal_params
from llmtrain.planner.make import Planned, make_plan
from llmtrain.planner.page import iso_flops, layout_trade, memory_parts, plan_page, step_parts, verdict
from llmtrain.planner.page_tables import duration, power_of_ten, rounded, step_text, usd_text
from llmtrain.planner.pictures import (
    BOLDER,
    CHARACTER,
    NARROW,
    Axis,
    Part,
    Point,
    Trade,
    Whole,
    grouped,
    number,
    trade,
    valleys,
    whole,
)
from llmtrain.planner.plan import FLOPS_CONVENTION
from llmtrain.planner.report import notes
from llmtrain.units import format_bytes, format_count

COMMANDS = ("llmtrain train --config-dir plans +experiment=big data.folder='my data' && echo <done>",)
WIDTHS = (NARROW, 556, 1150)
H100 = replace(
    find_cluster("h100_sxm_8x", num_nodes=4),
    price_usd_per_gpu_hour=2.5,
    price_date="2026-01",
    price_source="a quote",
)


def planned(name: str = "big", *, budget: dict[str, str], cluster=H100, **more) -> Planned:
    is_cpu = cluster is not H100
    settings = {"program": "llmtrain" if is_cpu else "megatron", "schedule": more.pop("schedule", "cosine")}
    return make_plan(
        name=name,
        budget=BudgetConfig(**budget),
        model=ModelWishConfig(vocab_size=more.pop("vocab_size", 50257), params=more.pop("params", None)),
        data=DataWishConfig(seq_len=256 if is_cpu else 2048, unique_tokens=more.pop("unique_tokens", None)),
        inference=InferenceConfig(tokens=more.pop("served", None)),
        choice=ChoiceConfig(law=more.pop("law", "besiroglu2024"), **settings),
        cluster=cluster,
    )


@pytest.fixture(scope="module")
def plans() -> dict[str, Planned]:
    cpu = find_cluster("this_machine")
    return {
        "plain": planned(budget={"flops": "1e21"}),
        "limited": planned(budget={"flops": "1e21"}, unique_tokens="5B"),
        "served": planned(budget={"flops": "1e21"}, served="1T"),
        "lossless law": planned(budget={"gpu_hours": "5k"}, law="deepseek2024", schedule="wsd"),
        "far from the optimum": planned(budget={"flops": "1e21"}, params="30B"),
        "cpu": planned(budget={"flops": "1e14"}, cluster=cpu, vocab_size=4096),
    }


@pytest.fixture(scope="module")
def pages(plans: dict[str, Planned]) -> dict[str, str]:
    return {name: plan_page(plan, commands=COMMANDS) for name, plan in plans.items()}


def words_of(page: str) -> str:
    """What a person reads: without tags, style sheet and the titles that a pointer shows."""
    return unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<(style|title)>.*?</\1>", "", page, flags=re.S)))


def tiles_of(page: str) -> dict[str, tuple[str, str, str]]:
    found = re.findall(
        r'tile"><div class="name">(.*?)</div><div class="value">(.*?) <small>(.*?)</small></div>'
        r'<div class="note">(.*?)</div>',
        page,
    )
    return {name: (value, unit, note) for name, value, unit, note in found}


def pictures_of(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(each) for each in re.findall(r"<svg.*?</svg>", page, flags=re.S)]


def box_of(text: ElementTree.Element) -> tuple[float, float, float, float]:
    """Where a text lies, by the width that the pictures reckon with."""
    words, style = text.text or "", text.get("class", "")
    is_bold = any(name in style for name in ("strong", "chosen", "choice-label", "this"))
    width = len(words) * CHARACTER * (BOLDER if is_bold else 1.0)
    x, y = float(text.get("x", "")), float(text.get("y", ""))
    left = x - {"start": 0.0, "middle": width / 2, "end": width}[text.get("text-anchor", "start")]
    return left, y - 10, left + width, y + 2


# -- numbers


def test_the_tiles_are_the_forecast_and_its_intervals(plans, pages):
    for name, plan in ((name, each.plan) for name, each in plans.items()):
        forecast, tiles, choice = plan.forecast, tiles_of(pages[name]), plan.choice
        size = num_params(choice.model)
        laws = band(plans[name].target.flops)

        def ends(interval: Interval, show) -> str:
            return f"{show(interval.low)} to {show(interval.high)}"

        hours = "device-hours" if name == "cpu" else "GPU-hours"
        mfu = forecast.mfu[FLOPS_CONVENTION]
        percent = "{:.1%}".format
        assert tiles == {
            "parameters": (format_count(size), "", f"laws: {ends(laws.num_params, format_count)}"),
            "tokens": (
                format_count(choice.total_tokens),
                f"{choice.total_tokens / size:.3g} a parameter",
                f"laws: {ends(laws.num_tokens, format_count)}",
            ),
            "time": (duration(forecast.total_s.mid), "", ends(forecast.total_s, duration)),
            hours: (rounded(forecast.gpu_hours.mid), "", ends(forecast.gpu_hours, rounded)),
            "cost": (
                ("no price", "", "give cluster.price_usd_per_gpu_hour")
                if forecast.usd is None
                else (usd_text(forecast.usd.mid), "", ends(forecast.usd, usd_text))
            ),
            "MFU": (percent(mfu.mid), "palm count", ends(mfu, percent)),
            "peak memory": (
                format_bytes(forecast.peak_bytes.mid),
                f"of {format_bytes(plan.cluster.gpu.mem_bytes)}",
                ends(forecast.peak_bytes, format_bytes),
            ),
            "loss at the end": (
                f"{forecast.loss.mid:.2f}",
                "nats a token",
                ends(forecast.loss, "{:.2f}".format),
            ),
        }


def test_the_first_sentence_says_size_tokens_time_devices_cost_and_loss(plans):
    plan = plans["plain"].plan
    forecast = plan.forecast
    size, tokens = format_count(num_params(plan.choice.model)), format_count(plan.choice.total_tokens)
    low, mid, high = (duration(getattr(forecast.total_s, end)) for end in ("low", "mid", "high"))
    assert verdict(plan) == (
        f"{size} parameters on {tokens} tokens: {mid} on 32 x h100_sxm ({low} to {high}), "
        f"{usd_text(forecast.usd.mid)}, ends near {forecast.loss.mid:.2f} nats a token."
    )
    assert " on this machine (" in verdict(plans["cpu"].plan)


def test_tables_hold_every_runner_up_change_law_and_note(plans, pages):
    for name, each in plans.items():
        plan, words = each.plan, words_of(pages[name])
        for rival in plan.runners_up:
            for said in (describe(rival.layout), rival.why, step_text(rival.step_s.mid)):
                assert said in words
            assert format_bytes(rival.peak_bytes.mid) in words
        for change in plan.sensitivity:
            ratio = change.total_ratio
            assert change.change in words
            assert change.layout in words
            assert ratio is None or abs(ratio - 1) < 5e-4 or f"{ratio - 1:+.1%}" in words
        for row in band(each.target.flops).rows:
            assert f" {row.optimum.law} " in words
            assert format_count(row.num_params.low) in words
        for trap in itertools.chain.from_iterable(law.traps for law in LAWS.values()):
            assert trap in words
        for note in notes(each):
            assert note in words
        for convention in FLOPS_CONVENTIONS:
            assert f"{plan.forecast.mfu[convention].mid:.1%}" in words
        for proposed in (each.recipe.step_law, each.recipe.deepseek):
            assert power_of_ten(proposed.peak_lr) in words
            assert format_count(proposed.batch_tokens) in words
        assert each.target.reason in words
        assert plan.cluster.gpu.source in words
        assert COMMANDS[0] in words


def test_what_was_asked_for_is_explained(plans, pages):
    served = plans["served"].target.served
    assert f"saves {served.saved:.0%} of training and serving" in words_of(pages["served"])
    assert "on 5B unique tokens" in words_of(pages["limited"])
    assert "Curves: besiroglu2024, because deepseek2024 has no loss." in words_of(pages["lossless law"])
    assert "wsd, chosen" in words_of(pages["lossless law"])
    assert "nats, more than a model that knows nothing has (8.32); the forecast of" in words_of(
        pages["cpu"]
    ).replace("  ", " ")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.412, "412 ms"),
        (9.4, "9.4 s"),
        (59.6, "1 min"),
        (200, "3 min 20 s"),
        (3599.8, "1 h"),
        (7 * 3600 + 12 * 60, "7 h 12 min"),
        (86399, "1 d"),
        (5 * 86400 + 3 * 3600 + 60, "5 d 3 h"),
        (400 * 86400, "400 d"),
        (math.inf, "?"),
    ],
)
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text


def test_numbers_keep_three_digits():
    assert [rounded(value) for value in (15713, 3.2749, 26_612_000, 0.6081)] == [
        "15,700",
        "3.27",
        "26.6M",
        "0.608",
    ]
    assert [usd_text(value) for value in (39120, 2.5, 53.1e6)] == ["$39,100", "$2.50", "$53.1M"]
    assert [power_of_ten(value) for value in (1e21, 1e21 / 3, 7.06e-4)] == ["1e21", "3.33e20", "7.06e-4"]
    steps = {0.1794: "179 ms", 0.9998: "1.00 s", 6.5249: "6.52 s", 0.00104: "1.04 ms", 601: "10 min 1 s"}
    assert {value: step_text(value) for value in steps} == steps
    assert [number(value) for value in (0, 0.25, 1000, 2e9, 5e12)] == ["0", "0.25", "1k", "2B", "5T"]


# -- bars


def test_the_parts_of_a_bar_add_up_to_the_forecast(plans):
    for each in plans.values():
        plan = each.plan
        assert sum(part.value for part in step_parts(plan)) == pytest.approx(
            plan.forecast.step_s.mid, rel=1e-9
        )
        assert sum(part.value for part in memory_parts(plan)) == pytest.approx(
            plan.forecast.peak_bytes.mid, rel=1e-9
        )
        named = {part.name for part in step_parts(plan)}
        assert len(named) == len(plan.forecast.time_parts)


@pytest.mark.parametrize("width", WIDTHS[:2])
def test_bars_are_as_wide_as_their_values(width):
    values = {"a": 50.0, "b": 30.0, "c": 15.0, "d": 1.5, "e": 1.0, "f": 0.0, "g": 2.5}
    chart = Whole(
        title="t",
        unit="s",
        parts=[Part(name=name, value=value, style="useful") for name, value in values.items()],
        interval=Interval(low=80, mid=100, high=130),
        show=lambda value: f"{value:g} s",
        limit=150.0,
        limit_label="the limit",
        others=[Part(name="other", value=75.0, style="instant")],
    )
    root = ElementTree.fromstring(whole(chart, width))
    bars = [each for each in root.iter("rect") if "useful" in each.get("class", "")]
    stacked = [each for each in root.iter("rect") if each.get("class", "") in ("part useful", "part rest")]
    rows = [each for each in root.iter("rect") if "row" in each.get("class", "").split()]
    limit = next(each for each in root.iter("line") if each.get("class") == "limit")
    zero = float(stacked[0].get("x"))
    scale = (float(limit.get("x1")) - zero) / 150.0
    assert sum(float(each.get("width")) for each in stacked) == pytest.approx(100 * scale, abs=0.1)
    assert [float(each.get("width")) for each in stacked] == pytest.approx(
        [scale * value for value in (50, 30, 15, 2.5, 2.5)], abs=0.1
    )
    for left, right in itertools.pairwise(stacked):
        assert float(left.get("x")) + float(left.get("width")) == pytest.approx(
            float(right.get("x")), abs=0.1
        )
    assert [float(each.get("x")) for each in rows[:5]] == pytest.approx(
        [float(each.get("x")) for each in stacked]
    )
    assert float(rows[5].get("width")) == pytest.approx(75 * scale, abs=0.1)
    assert len(bars) == 8  # a, b, c and g in the bar and in rows; d and e are "smaller"
    whisker = next(each for each in root.iter("line") if each.get("class") == "whisker ink")
    assert float(whisker.get("x1")) == pytest.approx(zero + 80 * scale, abs=0.1)
    assert float(whisker.get("x2")) == pytest.approx(zero + 130 * scale, abs=0.1)


def test_one_small_part_keeps_its_name():
    parts = [
        Part(name="a", value=99, style=""),
        Part(name="b", value=1, style=""),
        Part(name="c", value=0, style=""),
    ]
    large, small = grouped(parts)
    assert ([part.name for part in large], [part.name for part in small]) == (["a", "b"], ["c"])
    large, small = grouped([*parts, Part(name="d", value=0.5, style="")])
    assert ([part.name for part in large], [part.name for part in small]) == (["a"], ["b", "c", "d"])


# -- curves


def test_the_choice_lies_at_its_size_and_its_budget_is_lowest_at_the_laws_optimum(plans):
    for each in plans.values():
        chart = iso_flops(each, band(each.target.flops))
        assert chart.choice[0] == num_params(each.plan.choice.model)
        main = next(curve for curve in chart.curves if curve.style == "this")
        lowest = main.xs[main.ys.index(min(main.ys))]
        form = LAWS["besiroglu2024"].form
        assert lowest == pytest.approx(float(optimal_params(form, each.target.flops)), rel=0.1)
        assert min(main.xs) <= chart.choice[0] <= max(main.xs)
        heights = [max(curve.ys) - min(curve.ys) for curve in chart.curves if curve.style != "limited"]
        assert max(heights) == pytest.approx(min(heights), rel=0.02)


def test_the_data_limited_curve_is_above_the_unlimited_and_lowest_near_the_choice(plans):
    each = plans["limited"]
    chart = iso_flops(each, band(each.target.flops))
    limited = next(curve for curve in chart.curves if curve.style == "limited")
    main = next(curve for curve in chart.curves if curve.style == "this")
    assert min(limited.ys) > min(main.ys) + 0.01
    lowest = limited.xs[limited.ys.index(min(limited.ys))]
    assert lowest == pytest.approx(each.target.num_params, rel=0.2)
    assert chart.choice[1] == pytest.approx(min(limited.ys), rel=0.01)
    assert not [curve for curve in iso_flops(plans["plain"], band(1e21)).curves if curve.style == "limited"]


# -- layouts


def test_the_front_is_what_nothing_beats(plans):
    for each in plans.values():
        chart, num_hidden = layout_trade(each)
        assert chart is not None
        assert num_hidden >= 0
        for (x, y), (next_x, next_y) in itertools.pairwise(chart.front):
            assert x <= next_x
            assert y > next_y
        for point in chart.points:
            assert any(x <= point.x and y <= point.y for x, y in chart.front)
        assert chart.points[-1].label == "chosen"
        assert chart.front[0][0] == pytest.approx(chart.points[-1].x)


def test_runners_up_have_the_numbers_of_the_table(plans):
    each = plans["plain"]
    chart, _ = layout_trade(each)
    numbered = {point.label: point.title for point in chart.points if point.style == "rival"}
    assert numbered
    for rank, title in numbered.items():
        assert title.startswith(describe(each.plan.runners_up[int(rank) - 1].layout))


def test_a_single_layout_needs_no_picture(plans):
    each = plans["cpu"]
    none = {"runners_up": (), "variants": (), "pareto": ()}
    alone = replace(each, ranked=replace(each.ranked, ranking=(each.ranked.best,), **none))
    alone = replace(alone, plan=replace(each.plan, runners_up=()))
    assert layout_trade(alone) == (None, 0)
    page = plan_page(alone)
    assert len(pictures_of(page)) == 6
    assert f"{each.ranked.num_legal:,} layouts are legal" in words_of(page)


@pytest.mark.parametrize("width", WIDTHS[:2])
def test_names_of_crowded_points_do_not_touch(width):
    points = [Point(x=100 + 0.3 * at, y=50 - 0.2 * at, style="rival", label=str(at)) for at in range(1, 6)]
    points += [Point(x=150, y=20, style="kept"), Point(x=100, y=50, style="chosen", label="chosen")]
    chart = Trade(
        title="t",
        x_unit="s",
        y_unit="GiB",
        points=points,
        front=[(100, 50)],
        limit=80.0,
        limit_label="the limit",
    )
    root = ElementTree.fromstring(trade(chart, width))
    boxes = [box_of(each) for each in root.iter("text") if "point-label" in each.get("class", "")]
    assert len(boxes) == 6
    for one, other in itertools.combinations(boxes, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


# -- pictures and page as a whole


def test_pictures_are_well_formed_and_inside_their_frames(pages):
    for name, page in pages.items():
        pictures = pictures_of(page)
        assert len(pictures) == 8, name  # four, each wide and narrow
        for picture in pictures:
            _, _, width, height = map(float, picture.get("viewBox").split())
            for each in picture.iter():
                for key in ("x", "x1", "x2", "cx"):
                    if each.get(key) is not None:
                        assert -0.5 <= float(each.get(key)) <= width + 0.5, (name, each.attrib)
                for key in ("y", "y1", "y2", "cy"):
                    if each.get(key) is not None:
                        assert -0.5 <= float(each.get(key)) <= height + 0.5, (name, each.attrib)
                if each.tag == "rect":
                    assert float(each.get("x")) + float(each.get("width")) <= width + 0.5
                if each.tag == "polyline":
                    for pair in each.get("points").split():
                        x, y = map(float, pair.split(","))
                        assert -0.5 <= x <= width + 0.5
                        assert -0.5 <= y <= height + 0.5
                if each.tag == "text":
                    left, top, right, bottom = box_of(each)
                    assert left >= -2, (name, each.text)
                    assert right <= width + 6, (name, each.text)
                    assert 0 <= top < bottom <= height + 1, (name, each.text)


def test_texts_of_a_picture_do_not_cover_one_another(pages):
    for name, page in pages.items():
        for picture in pictures_of(page):
            boxes = [(each.text, box_of(each)) for each in picture.iter("text")]
            for (one, a), (other, b) in itertools.combinations(boxes, 2):
                across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
                assert across <= 4 or down <= 4, (name, picture.get("aria-label"), one, other)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_law_has_its_interval_in_the_picture(plans, width):
    each = plans["plain"]
    root = ElementTree.fromstring(valleys(iso_flops(each, band(each.target.flops)), width))
    names = {
        text.text.removesuffix(", no vote") for text in root.iter("text") if "spread" in text.get("class", "")
    }
    assert names == set(LAWS)


class _Balance(HTMLParser):
    VOID = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_nothing_of_a_network(pages):
    for page in pages.values():
        parser = _Balance()
        parser.feed(page)
        assert not parser.open
        assert not parser.seen & {"script", "link", "img", "iframe"}
        assert not re.search(r"(src|href)=|url\(|@import", page)
        assert "nan" not in re.findall(r"[\w.]+", re.sub(r"<style>.*?</style>", "", page).lower())


def test_names_are_escaped(plans):
    name = "<script>alert('x')</script> & \"co\""
    each = plans["plain"]
    page = plan_page(replace(each, plan=replace(each.plan, name=name)), commands=("a < b && c",))
    assert "<script" not in page
    assert f"<h1>{escape(name)}</h1>" in page
    assert "a &lt; b &amp;&amp; c" in page


@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.0, 79.9), (1.86, 1.95), (2e8, 3e11), (150.0, 151.0), (3.0, 3000.0)]
)
@pytest.mark.parametrize("most", [3, 5, 9])
def test_ticks_are_round_few_and_inside(low, high, most, is_log):
    low = low or (1e-3 if is_log else 0.0)
    ticks = Axis(low=low, high=high, begin=0.0, end=100.0, is_log=is_log).ticks(most)
    assert 1 <= len(ticks) <= most
    assert ticks == sorted(set(ticks))
    for tick in ticks:
        assert low * (1 - 1e-6) <= tick <= high * (1 + 1e-6)
        digits, scale = re.fullmatch(r"([\d.e-]+)([kMBT]?)", number(tick)).groups()
        assert tick == pytest.approx(float(digits) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[scale])
        assert len(digits) <= 6


def test_axes_run_through_their_ends_both_ways():
    axis = Axis(low=1.0, high=100.0, begin=10.0, end=210.0, is_log=True)
    assert [axis.at(value) for value in (1.0, 10.0, 100.0)] == pytest.approx([10.0, 110.0, 210.0])
    down = Axis(low=0.0, high=4.0, begin=200.0, end=0.0)
    assert [down.at(value) for value in (0.0, 1.0, 4.0)] == pytest.approx([200.0, 150.0, 0.0])
