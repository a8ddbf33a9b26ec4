"""Scales, ticks and thinning: a chart that is drawn wrongly says something untrue."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report.charts import Mark, Series, bar_chart, line_chart, scatter_chart
from pipeline.report.scales import Scale, format_number, grouped, sampled

finite = st.floats(-1e6, 1e6, allow_nan=False)


@given(low=finite, span=st.floats(1e-6, 1e6), count=st.integers(2, 9))
def test_linear_ticks_are_inside_even_and_few(low: float, span: float, count: int) -> None:
    ticks = Scale(low, low + span, 0, 100).ticks(count)
    assert len(ticks) <= count + 1
    assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in ticks)


@given(low=st.floats(1e-6, 1e5), ratio=st.floats(1.5, 1e7))
def test_log_ticks_are_inside(low: float, ratio: float) -> None:
    scale = Scale(low, low * ratio, 0, 100, log=True)
    for tick in scale.ticks():
        assert low * (1 - 1e-6) <= tick <= low * ratio * (1 + 1e-6)
    assert scale(low) == pytest.approx(0, abs=1e-6)
    assert scale(low * ratio) == pytest.approx(100, abs=1e-6)
    assert scale(low * math.sqrt(ratio)) == pytest.approx(50, abs=1e-3)


many_points = st.lists(st.tuples(finite, finite), max_size=700).map(sorted)


@given(many_points)
def test_sampled_points_are_points_with_both_ends_and_extremes(
    points: list[tuple[float, float]],
) -> None:
    kept = sampled(points, 50)
    assert len(kept) <= 50 and kept == sorted(kept) and set(kept) <= set(points)
    if len(points) <= 50:
        assert kept == points
    else:
        assert len(kept) >= 40 and (kept[0], kept[-1]) == (points[0], points[-1])
        heights = [y for _, y in points]
        assert {min(heights), max(heights)} <= {y for _, y in kept}


@given(many_points)
def test_groups_are_all_points_in_order(points: list[tuple[float, float]]) -> None:
    groups = grouped(points, 50)
    assert [point for group in groups for point in group] == points and len(groups) <= 50
    sizes = {len(group) for group in groups}
    assert sizes <= {1} if len(points) <= 50 else min(sizes) >= 2


def test_a_line_is_averaged_only_where_asked_and_says_so() -> None:
    values = [(float(step), 0.9 if step == 450 else 0.1) for step in range(3, 903, 3)]
    words = [
        re.findall(r'data-x="([^"]*)" data-at="([^"]*)"', line_chart([line], "t", **options))[0]
        for line in [Series("a", "c1", values)]
        for options in ({"dots": True}, {"averaged": True})
    ]
    logged = {f"{step:.0f}|{value}" for step, value in values}
    drawn = words[0][1].split(";")
    assert words[0][0] == "step" and set(drawn) <= logged
    assert "450|0.9" in drawn and drawn[0] == "3|0.1" and drawn[-1] == "900|0.1"
    assert words[1][0] == "mean of steps" and words[1][1].startswith("3 to 6|0.1;")
    ends = [re.split(r" to |\|", entry) for entry in words[1][1].split(";")]
    mean = next(float(value) for first, last, value in ends if int(first) <= 450 <= int(last))
    assert mean in (pytest.approx(0.5, abs=1e-3), pytest.approx(1.1 / 3, abs=1e-3))


def test_numbers_are_short() -> None:
    values = (0, 1e-4, 2.5e-5, 0.25, 12.5, 1234, 2.5e6)
    shown = ["0", "1e-4", "2.5e-5", "0.25", "12.5", "1,234", "2.5M"]
    assert [format_number(value) for value in values] == shown


def test_a_line_is_where_its_values_are() -> None:
    chart = line_chart([Series("a", "c1", [(0, 0.0), (50, 5.0), (100, 10.0)])], "t")
    path = re.search(r'points="([^"]*)"', chart)
    assert path is not None
    places = [tuple(map(float, pair.split(","))) for pair in path[1].split()]
    assert places[1][0] == pytest.approx((places[0][0] + places[2][0]) / 2, abs=0.1)
    assert places[1][1] == pytest.approx((places[0][1] + places[2][1]) / 2, abs=0.1)
    assert places[0][1] > places[2][1]  # larger values are higher up


def test_every_point_of_a_line_tells_its_step_and_value() -> None:
    """The page's script pairs the places of a line with its words, one for one."""
    values = [(float(step), step / 7) for step in range(0, 4000, 40)]
    chart = line_chart([Series("a<b", "c1", values)], "t")
    path = re.search(r'points="([^"]*)" data-x="step" data-at="([^"]*)"', chart)
    assert path is not None
    words = path[2].split(";")
    assert len(path[1].split()) == len(words) == len(values)
    assert words[0] == "0|0" and words[-1] == "3,960|565.7"
    assert "<title>a&lt;b</title>" in chart and "a<b" not in chart


def test_the_axis_reaches_over_all_steps_though_a_line_is_thinned() -> None:
    chart = line_chart([Series("a", "c1", [(float(x), 1.0) for x in range(1, 1001)])], "t")
    assert ">1,000</text>" in chart
    steps = line_chart([Series("a", "c1", [(1, 0.1), (3, 0.2)])], "t")
    assert ">1.5</text>" not in steps, "there is no half step"


def test_a_scatter_of_differences_has_a_zero_line() -> None:
    marks = [Mark(1, -0.5, "rare", "lost"), Mark(9, 0.5, "common", "gained")]
    chart = scatter_chart(marks, [], "t", ("x", "y"), y_range=(-0.5, 0.5))
    heights = [float(y) for y in re.findall(r'<line class="axis"[^>]* y1="([\d.]+)" y2', chart)]
    places = [float(y) for y in re.findall(r'd="M[\d.]+ ([\d.]+)[la]', chart)]
    assert (min(heights), max(places)) == (186.0, pytest.approx(358 - 5.5))
    assert min(places) == pytest.approx(14.0)


def test_charts_of_nothing_and_of_one_point() -> None:
    assert line_chart([Series("a", "c1", [])], "t") == ""
    assert scatter_chart([], [], "t", ("x", "y")) == ""
    assert "circle" in line_chart([Series("a", "c1", [(3, 0.0)])], "t")
    assert "mark rare" in scatter_chart([Mark(1, 0.5, "rare", "one")], [], "t", ("x", "y"))


def test_an_undefined_bar_is_said_to_be_so() -> None:
    chart = bar_chart([("APr", "rare", None), ("APf", "frequent", 0.5)], "t")
    assert "undefined" in chart and 'width="0.0"' in chart
