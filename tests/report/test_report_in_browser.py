"""The page in a real browser: no errors, no network, nothing wider than the screen, and its controls work."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from run_writer import ATTACK, RunWriter

from trimtab.report import write_report

EIGHT = [
    "books & film",
    "care",
    "delivery of large parcels abroad",
    "electronics",
    "food",
    "garden",
    "health",
    "x",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no chromium on this machine: the page was not opened in a browser")
    quiet = [
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-gpu", "--disable-quic", *quiet]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def open_report(browser: Any, new_run: Callable[..., RunWriter]) -> Iterator[Callable[..., Any]]:
    """Opens a report; at the end, no page may have logged, failed or asked for anything but its file."""
    pages: list[Any] = []
    messages: list[str] = []
    requests: list[str] = []

    def open_page(writer: RunWriter, width: int = 1280, scheme: str = "light") -> Any:
        run = writer.finish()
        write_report(run)
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(run.report_html.resolve().as_uri())
        pages.append(page)
        folder = os.environ.get("TRIMTAB_SCREENSHOTS")
        if folder:
            page.screenshot(path=f"{folder}/{len(writer.labels)}-{width}-{scheme}.png", full_page=True)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert messages == []
    assert [url for url in requests if not url.startswith("file:")] == []


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("labels", [["negative", "positive"], EIGHT], ids=["2 classes", "8 classes"])
@pytest.mark.parametrize("outcome", ["better", "failed"])
def test_page_fits_the_screen(
    open_report: Callable[..., Any],
    new_run: Callable[..., RunWriter],
    width: int,
    labels: list[str],
    outcome: str,
) -> None:
    writer = new_run(labels)
    if outcome == "failed":
        writer.fail("the loss is no longer finite at step 41")
    else:
        writer.add_tuned(outcome)
    page = open_report(writer, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for section in ("#scores", "#cost"):
        assert page.locator(f"{section} table").is_visible()
    assert page.locator("#scores svg").is_visible()
    assert page.locator("#training svg").count() == 2


def test_search_filters_both_lists(open_report: Callable[..., Any], new_run: Callable[..., RunWriter]) -> None:
    writer = new_run()
    writer.add_tuned("better")
    probe, tuned = writer.correct["linear-probe"], writer.correct["lora-s0"]
    fixed = next(i for i, (before, after) in enumerate(zip(probe, tuned, strict=True)) if after and not before)
    broken = next(i for i, (before, after) in enumerate(zip(probe, tuned, strict=True)) if before and not after)
    for index in (fixed, broken):
        writer.rows[index] = dataclasses.replace(writer.rows[index], text="a zebra " + "in a film " * 60 + "walks")
    page = open_report(writer)
    lists = {kind: page.locator(f".change-{kind} li:visible") for kind in ("fixed", "broken")}
    assert (lists["fixed"].count(), lists["broken"].count()) == (26, 4)
    page.fill("#search", "ZEBRA walks")
    assert (lists["fixed"].count(), lists["broken"].count()) == (1, 1)
    assert "1 of 26 hold “zebra” and “walks”" in page.locator(".change-fixed .list-note").inner_text()
    whole = lists["fixed"].locator("details p")
    assert not whole.is_visible()
    lists["fixed"].locator("summary").click()
    assert whole.is_visible()
    page.fill("#search", "nothing has this word")
    assert (lists["fixed"].count(), lists["broken"].count()) == (0, 0)


def test_rows_follow_the_chosen_system(open_report: Callable[..., Any], new_run: Callable[..., RunWriter]) -> None:
    writer = new_run()
    writer.add_tuned("worse")
    pairs = list(zip(writer.correct["untrained-head"], writer.correct["lora-s0"], strict=True))
    page = open_report(writer, scheme="dark")
    page.select_option("#against", "untrained-head")
    for kind, was, now in (("fixed", False, True), ("broken", True, False)):
        expected = pairs.count((was, now))
        assert page.locator(f".change-{kind} li:visible").count() == expected
        assert page.locator(f".change-{kind} .shown-count").inner_text() == str(expected)
        assert page.locator(f".change-{kind} [data-system]:visible").count() == expected


def test_confusion_matrix_follows_its_select(
    open_report: Callable[..., Any], new_run: Callable[..., RunWriter]
) -> None:
    writer = new_run()
    writer.add_tuned("better")
    page = open_report(writer)
    left = page.locator(".confusion-side").first
    assert left.locator("caption:visible").inner_text() == "untrained head"
    left.locator("select").select_option("majority-class")
    assert left.locator("caption:visible").inner_text() == "majority class"
    zeros = [row.label for row in writer.rows].count(0)
    assert left.locator("td:visible").all_inner_texts() == [
        str(zeros),
        "0",
        str(len(writer.rows) - zeros),
        "0",
    ]


def test_markup_in_a_row_stays_text(open_report: Callable[..., Any], new_run: Callable[..., RunWriter]) -> None:
    writer = new_run([ATTACK, "fine"])
    writer.rows = [dataclasses.replace(row, text=f"{ATTACK} {row.text}") for row in writer.rows]
    writer.add_tuned("better")
    page = open_report(writer)
    assert page.evaluate("window.attacked") is None
    assert page.locator("img").count() == 0
    assert "<script>window.attacked" in page.locator(".change-fixed li:visible").first.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
