"""Both outputs of `write_report`: the headline, every number's place, escaping, and other shapes of run."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import re
from collections.abc import Callable

import pytest
from run_writer import ATTACK, BASELINES, RunWriter

from trimtab.errors import DataError
from trimtab.report import write_report
from trimtab.report.content import read_content
from trimtab.report.row_changes import find_changes
from trimtab.report.wording import headline
from trimtab.runs import RunFolder, read_json, write_json

NewRun = Callable[..., RunWriter]
EIGHT = ["books & film", "care", "delivery", "electronics", "food", "garden", "health", "insurance"]


def finished(writer: RunWriter, verdict: str = "better") -> RunFolder:
    writer.add_tuned(verdict)
    run = writer.finish()
    write_report(run)
    return run


def page_text(run: RunFolder) -> str:
    """The page without tags, entities decoded, no-break spaces as spaces."""
    page = run.report_html.read_text(encoding="utf-8")
    page = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", "", page)).replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (
            "better",
            r"Tuning with LoRA raised accuracy from [\d.]+ % \(linear probe, no tuning\) to [\d.]+ %: "
            r"\+11\.0 points \[6\.6, 15\.4\], better \(p = 0\.001 after correction, 200 rows\)\.",
        ),
        (
            "inconclusive",
            r"Tuning with LoRA took accuracy from [\d.]+ % \(linear probe, no tuning\) to [\d.]+ %: "
            r"\+3\.0 points \[−1\.4, 7\.4\], inconclusive: this test set of 200 rows could have shown "
            r"a difference of 6\.2 points\.",
        ),
        (
            "worse",
            r"Tuning with LoRA lowered accuracy from [\d.]+ % \(linear probe, no tuning\) to [\d.]+ %: "
            r"−10\.5 points \[−14\.9, −6\.1\], worse \(p = 0\.001 after correction, 200 rows\)",
        ),
    ],
)
def test_headline_says_the_verdict_in_both_outputs(new_run: NewRun, verdict: str, expected: str) -> None:
    run = finished(new_run(), verdict)
    assert re.search(expected, page_text(run))
    assert re.search(expected, run.report_markdown.read_text(encoding="utf-8").replace("\\", ""))


def test_failed_tuning_is_the_headline(new_run: NewRun) -> None:
    writer = new_run()
    writer.fail("the loss is no longer finite at step 41; lower the learning_rate (0.5)")
    run = writer.finish()
    write_report(run)
    expected = (
        "Tuning with LoRA failed, so there is no tuned system: the loss is no longer finite at step 41; "
        "lower the learning_rate (0.5). Best without tuning: linear probe, accuracy "
    )
    markdown = run.report_markdown.read_text(encoding="utf-8").replace("\\", "")
    assert expected in page_text(run)
    assert expected in markdown
    assert "the loss was no longer finite" in page_text(run)
    assert "No adapter was saved, reloaded and compared" in page_text(run)
    assert "do not use it" not in page_text(run)
    assert "raised" not in page_text(run)
    assert "Rows fixed and broken" not in page_text(run)


def test_headline_compares_with_the_best_baseline_and_not_with_the_untrained_head(new_run: NewRun) -> None:
    writer = new_run()
    writer.add_tuned("better")
    content = read_content(writer.finish())
    assert content.reference is not None
    assert content.reference.name == "linear-probe"
    without_probe = [system for system in content.systems if system.name != "linear-probe"]
    assert "TF-IDF + logistic regression, no tuning" in headline(dataclasses.replace(content, systems=without_probe))


def test_headline_is_about_the_seed_that_validation_chose(new_run: NewRun) -> None:
    writer = new_run()
    writer.add_tuned("inconclusive")
    better_on_test = [True] * len(writer.rows)
    writer.add_system("lora-s1", "LoRA, tuned", "tuned", better_on_test, {})
    folder = writer.run.trial("lora", 1)
    folder.adapter.mkdir()
    folder.history.write_text('{"step": 90, "validation_loss": 1.0, "validation_accuracy": 0.5}\n')
    run = writer.finish()
    content = read_content(run)
    assert content.tuned is not None
    assert content.tuned.name == "lora-s0"
    write_report(run)
    assert "LoRA, tuned (lora-s0) was chosen among 2 tuned systems by its validation rows" in page_text(run)


def test_every_system_contrast_and_cost_is_in_both_outputs(new_run: NewRun) -> None:
    run = finished(new_run(EIGHT))
    for text in (page_text(run), run.report_markdown.read_text(encoding="utf-8").replace("\\", "")):
        for _, title, _, _ in BASELINES:
            assert f"LoRA, tuned against {title}" in text
        for expected in (
            "462,336",
            "0.3425 %",
            "81.4",
            "1.5 GiB",
            "31.1",
            "< 0.001",
            "6.2 points",
            "1.2e-07",
        ):
            assert expected in html.unescape(text), expected
        assert "trimtab run reviews.yaml --method lora --seed 0" in text
        assert "test:31" in text or "3 test rows (1.5 %)" in text
        for label in EIGHT:
            assert label in html.unescape(text)


def test_user_text_cannot_become_markup(new_run: NewRun) -> None:
    writer = new_run([ATTACK, "fine"])
    writer.rows = [dataclasses.replace(row, text=f"{ATTACK} | [1, 2](javascript:x) {row.text}") for row in writer.rows]
    run = finished(writer)
    page = run.report_html.read_text(encoding="utf-8")
    assert page.count("<script>") == page.count("</script>") == 1
    assert "<img" not in page
    assert "&lt;/script&gt;&lt;script&gt;window.attacked" in page
    markdown = run.report_markdown.read_text(encoding="utf-8")
    assert "<script" not in markdown
    assert "<img" not in markdown
    assert r"\[1, 2\](javascript:x)" in markdown
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if "| test:" in line}
    assert widths == {6}


def test_page_loads_nothing_from_a_network(new_run: NewRun) -> None:
    page = finished(new_run()).report_html.read_text(encoding="utf-8")
    assert "://" not in page
    assert re.findall(r'(?:src|href|action|data)="([^#"][^"]*)"', page) == []
    assert "@import" not in page
    assert "url(" not in page.replace("url(#", "")
    assert "default-src 'none'" in page


def test_ids_are_unique_in_the_page(new_run: NewRun) -> None:
    page = finished(new_run()).report_html.read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)


def test_same_run_gives_the_same_bytes(new_run: NewRun) -> None:
    run = finished(new_run())
    first = hashlib.sha256(run.report_html.read_bytes() + run.report_markdown.read_bytes()).digest()
    write_report(run)
    assert hashlib.sha256(run.report_html.read_bytes() + run.report_markdown.read_bytes()).digest() == first


def test_fixed_and_broken_rows_are_counted_in_full_and_cut_in_the_page(new_run: NewRun) -> None:
    writer = new_run()
    writer.add_tuned("better")
    changes = find_changes(read_content(writer.finish()), shown_rows=5)
    assert changes is not None
    assert changes.others[0].name == "linear-probe"
    assert (changes.fixed_counts["linear-probe"], changes.broken_counts["linear-probe"]) == (26, 4)
    shown = [changed for changed in changes.fixed if "linear-probe" in changed.others]
    assert len(shown) == 5
    assert all(changed.tuned.is_correct and not changed.others["linear-probe"].is_correct for changed in shown)


def test_markdown_shows_twenty_of_the_fixed_rows(new_run: NewRun) -> None:
    markdown = finished(new_run()).report_markdown.read_text(encoding="utf-8")
    assert "### Fixed: 26, the first 20 shown" in markdown
    assert "### Broken: 4\n" in markdown
    assert sum(line.startswith("| test:") for line in markdown.splitlines()) == 24


def test_only_the_comparison_and_the_test_rows_must_be_there(new_run: NewRun) -> None:
    writer = new_run()
    writer.add_tuned("better")
    run = writer.finish()
    for path in (run.study, run.manifest, run.data_summary, run.trial("lora", 0).history):
        path.unlink()
    comparison = read_json(run.comparison)
    for system in comparison["systems"]:
        system["cost"] = {"train_seconds": None}
        del system["metrics_clean"]
    comparison["systems"][0]["metrics"]["loss"] = {"value": float("inf"), "low": None, "high": None}
    write_json(run.comparison, comparison)
    write_report(run)
    assert "raised accuracy" in page_text(run)
    assert "inf" not in re.findall(r"\| majority class.*", run.report_markdown.read_text(encoding="utf-8"))[0]


def test_predictions_about_other_rows_are_refused(new_run: NewRun) -> None:
    writer = new_run()
    writer.add_tuned("better")
    writer.rows = writer.rows[1:]
    with pytest.raises(DataError, match=r"200 predictions are not about the 199 rows of test\.jsonl"):
        write_report(writer.finish())


def test_loss_as_the_primary_metric_has_no_points_and_prefers_the_lowest(new_run: NewRun) -> None:
    writer = new_run()
    writer.add_tuned("better")
    run = writer.finish()
    comparison = read_json(run.comparison)
    comparison["primary_metric"] = "loss"
    for contrast in comparison["contrasts"]:
        contrast |= {"metric": "loss", "difference": -0.11, "low": -0.154, "high": -0.066}
    write_json(run.comparison, comparison)
    write_report(run)
    assert re.search(
        r"lowered loss from 0\.\d+ \(linear probe, no tuning\) to 0\.\d+: "
        r"−0\.110 \[−0\.154, −0\.066\], better",
        page_text(run),
    )
