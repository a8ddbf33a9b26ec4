"""The pages in a real browser: no error, no request, words that follow the pointer."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from drawn_runs import (
    consumed,
    log_evaluation,
    write_environment,
    write_evaluation,
    write_metrics,
    write_recipe,
)

from pipeline.report.compare import write_comparison
from pipeline.report.page import write_report

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    path = next((name for name in found if name), None)
    if path is None:
        pytest.skip("no Chromium here; install Debian's package `chromium` to run this test")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    for name, skill in (("richsem", 0.9), ("a_baseline_with_quite_a_long_name_indeed", 0.5)):
        run_dir = root / name
        write_recipe(run_dir, 60)
        write_environment(run_dir)
        write_metrics(run_dir, 60, 60, extra=True)
        for step in (15, 45):
            log_evaluation(run_dir, step, 0.2, subset="5 of 30 images", consumed=consumed(step))
        for step, share in ((30, 0.5), (60, 1.0)):
            write_evaluation(run_dir, step, skill * share, num_categories=120)
    runs = [root / "richsem", root / "a_baseline_with_quite_a_long_name_indeed"]
    comparison = write_comparison(runs, root / "comparison.html")
    named = root / "named"
    write_evaluation(named, 60, 0.9, num_categories=120)
    give_long_names(named / "evaluations" / "step_00000060")
    return {
        "report": write_report(runs[0]),
        "comparison": comparison,
        "named": write_report(named),
    }


def give_long_names(folder: Path) -> None:
    """In the tables, and on pictures at boxes that lie in a corner, at an edge, and in a heap."""
    long = "Christmas_tree_ornament_(decorative)"
    table = folder / "per_category.csv"
    word = "Donaudampfschifffahrtsgesellschaftskapitaen"
    table.write_text(table.read_text().replace("striped <thing>", word))
    path = folder / "examples.json"
    examples = json.loads(path.read_text())
    for example in examples:
        width, height = example["width"], example["height"]
        places = [(width - 12, 2), (width - 30, height - 14), (0, height - 9), (0, 0)]
        places += [(100 + n, 80 + n) for n in range(40)]
        example["detections"] = [
            {"name": long, "frequency": "rc"[n % 2], "score": 0.9, "bbox": [x, y, 12, 9]}
            for n, (x, y) in enumerate(places)
        ]
    examples[0]["detections"][0]["name"] = long * 8
    path.write_text(json.dumps(examples))


@pytest.fixture
def open_page(browser: Any, pages: dict[str, Path]) -> Iterator[Any]:
    """Opens a page; at the end nothing was logged, and nothing but the file was asked for."""
    contexts, messages, requests = [], [], []

    def open_it(name: str, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}} | options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(pages[name].as_uri())
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert messages == []
    assert len(contexts) == sum(url.startswith("file:") for url in requests)
    assert all(url.startswith(("file:", "data:")) for url in requests)


@pytest.mark.parametrize("name", ["report", "comparison", "named"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_it_renders_and_fits(open_page: Any, name: str, scheme: str, width: int) -> None:
    page = open_page(name, color_scheme=scheme, viewport={"width": width, "height": 900})
    page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    assert len(page.screenshot(full_page=True)) > 50_000  # a blank page is far smaller
    paper, ink = (
        page.evaluate(f"getComputedStyle(document.body).{key}")
        for key in ("backgroundColor", "color")
    )
    brightness = [sum(map(int, colour[4:-1].split(","))) for colour in (paper, ink)]
    assert (brightness[0] > brightness[1]) == (scheme == "light")


@pytest.mark.parametrize("name", ["report", "comparison"])
@pytest.mark.parametrize("width", [400, 1200])
def test_no_axis_label_is_cut_off_or_overlaps_another(
    open_page: Any, name: str, width: int
) -> None:
    page = open_page(name, viewport={"width": width, "height": 900})
    page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    problems = page.evaluate(
        """() => [...document.querySelectorAll('svg.chart')].flatMap((chart) => {
          const edge = chart.getBoundingClientRect();
          const words = [...chart.querySelectorAll('text')].map((text) =>
            ({ words: text.textContent, box: text.getBoundingClientRect() }));
          const cut = words.filter(({ box }) => box.left < edge.left - 1
            || box.right > edge.right + 1 || box.top < edge.top - 1
            || box.bottom > edge.bottom + 1).map(({ words }) => words);
          const over = words.flatMap((a, i) => words.slice(i + 1).filter((b) =>
            a.box.left < b.box.right - 1 && b.box.left < a.box.right - 1 &&
            a.box.top < b.box.bottom - 4 && b.box.top < a.box.bottom - 4)
            .map((b) => `${a.words} over ${b.words}`));
          return [...cut, ...over].map((what) => `${chart.getAttribute('aria-label')}: ${what}`);
        })"""
    )
    assert problems == []


@pytest.mark.parametrize("name", ["report", "named"])
@pytest.mark.parametrize("width", [400, 1200])
def test_names_on_pictures_are_whole_and_apart(open_page: Any, name: str, width: int) -> None:
    """No name beyond its picture or its plate, and none over another; most are there."""
    page = open_page(name, viewport={"width": width, "height": 900})
    found = page.evaluate(
        """() => [...document.querySelectorAll('.pictures svg')].map((picture) => {
          const edge = picture.getBoundingClientRect();
          const names = [...picture.querySelectorAll('.name')].map((group) => ({
            words: group.textContent,
            box: group.querySelector('text').getBoundingClientRect(),
            plate: group.querySelector('rect').getBoundingClientRect() }));
          const within = (a, b) => a.left > b.left - 1 && a.right < b.right + 1
            && a.top > b.top - 1 && a.bottom < b.bottom + 1;
          const cut = names.filter(({ box, plate }) => !within(plate, edge)
            || box.left < plate.left - 1 || box.right > plate.right + 1).map((one) => one.words);
          const over = names.flatMap((a, i) => names.slice(i + 1).filter((b) =>
            a.plate.left < b.plate.right - 1 && b.plate.left < a.plate.right - 1 &&
            a.plate.top < b.plate.bottom - 1 && b.plate.top < a.plate.bottom - 1)
            .map((b) => `${a.words} over ${b.words}`));
          return { problems: [...cut, ...over], words: names.map((one) => one.words) };
        })"""
    )
    assert [one["problems"] for one in found] == [[]] * 6
    counts = [len(one["words"]) for one in found]
    assert min(counts) >= 3 and max(counts) >= 4, counts
    assert all("_" not in words for one in found for words in one["words"])


def test_no_figure_is_out_of_sight_on_a_narrow_screen(open_page: Any) -> None:
    page = open_page("named", viewport={"width": 400, "height": 900})
    for table in ("Best rare categories", "Worst rare categories", "The same detections by"):
        figure = page.locator(f'figure:has(figcaption:text("{table}"))')
        hidden = figure.locator(".scroll").evaluate("one => one.scrollWidth - one.clientWidth")
        assert hidden <= 0, table
    sentence = page.locator("table.by-protocol .detail").first
    assert sentence.bounding_box()["width"] > 300


def hover(page: Any, chart: str, selector: str, place: int) -> str:
    """Words beside the pointer when it is over the n-th mark of a chart."""
    mark = page.locator(f'svg[aria-label="{chart}"] {selector}').nth(place)
    mark.scroll_into_view_if_needed()
    box = mark.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip = page.locator(".tip")
    return str(tip.text_content()) if tip.is_visible() else ""


def test_words_follow_the_pointer_over_a_line_chart(open_page: Any) -> None:
    page = open_page("report")
    chart = "AP by frequency group over steps"
    last = hover(page, chart, "circle.dot.frequent:not(.hollow)", 1)
    first = hover(page, chart, "circle.dot.frequent:not(.hollow)", 0)
    assert last.startswith("APf\nstep 60: 0.") and first.startswith("APf\nstep 30: 0.")
    hollow = hover(page, chart, "circle.dot.rare.hollow", 0)
    assert hollow.startswith("APr, 5 of 30 images\nstep 15: 0.14")
    assert page.locator(".ring").count() == 1 and page.locator(".line.lit").count() == 1
    page.mouse.move(2, 2)
    assert not page.locator(".tip").is_visible() and page.locator(".ring").count() == 0


def test_words_follow_the_pointer_between_the_points_of_a_line(open_page: Any) -> None:
    page = open_page("report")
    chart = page.locator('svg[aria-label="Total loss over steps"]')
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    seen = set()
    for share in (0.2, 0.4, 0.6, 0.8):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + 0.5 * box["height"])
        seen.add(page.locator(".tip").text_content())
    assert len(seen) == 4 and all("\nstep " in words for words in seen)


def test_words_follow_the_pointer_over_a_scatter_chart(open_page: Any) -> None:
    page = open_page("report")
    chart = "AP of each category against its training images"
    # The last marks are the rarest categories, and nothing is drawn over them.
    titles = page.locator(f'svg[aria-label="{chart}"] path.mark > title').all_text_contents()
    words = {hover(page, chart, "path.mark", place) for place in (-1, -2, 0)}
    assert all(text.replace("\n", ": ", 1) in titles for text in words) and len(words) >= 2
    assert "training images" in words.pop()
    assert page.locator("path.mark.lit").count() == 1


def test_the_keyboard_walks_over_marks(open_page: Any) -> None:
    page = open_page("report")
    page.locator('svg[aria-label="AP by frequency group over steps"]').focus()
    page.keyboard.press("ArrowRight")
    first = page.locator(".tip").text_content()
    page.keyboard.press("ArrowRight")
    assert page.locator(".tip").text_content() != first
    page.keyboard.press("Escape")
    assert not page.locator(".tip").is_visible()


def test_the_comparison_has_words_beside_the_pointer_too(open_page: Any) -> None:
    page = open_page("comparison")
    chart = "APr, rare categories over steps"
    one = hover(page, chart, "circle.dot.c1:not(.hollow)", 1)
    other = hover(page, chart, "circle.dot.c2:not(.hollow)", 1)
    assert one.startswith("richsem\nstep 60: 0.")
    assert other.startswith("a_baseline_with_quite_a_long_name_indeed\nstep 60: 0.")
    scatter = "Difference of AP of each category against its training images"
    assert ", AP 0." in hover(page, scatter, "path.mark", -1)


def test_without_script_every_mark_has_its_title(open_page: Any) -> None:
    page = open_page("report", java_script_enabled=False)
    marks = page.locator("svg.chart path.mark").count()
    assert marks > 20 and page.locator("svg.chart path.mark > title").count() == marks
    assert page.locator(".tip").count() == 0


def test_it_prints(open_page: Any) -> None:
    page = open_page("report", color_scheme="dark")
    page.emulate_media(media="print")
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert ink == "rgb(29, 33, 38)", "dark on white"
    assert page.pdf().startswith(b"%PDF")
