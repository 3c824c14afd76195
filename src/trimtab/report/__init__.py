"""The report of a run: one HTML page and one Markdown file, made only from the run folder."""

from __future__ import annotations

from trimtab.runs import RunFolder, write_text

__all__ = ["write_report"]


def write_report(run: RunFolder) -> None:
    """Write `report.html` and `report.md` from the files in the run folder.

    Raises:
        DataError: comparison.json or test.jsonl is missing, or predictions are not about the test rows.
    """
    from trimtab.report.content import read_content
    from trimtab.report.html import render_html
    from trimtab.report.markdown import render_markdown

    content = read_content(run)
    write_text(run.report_html, render_html(content))
    write_text(run.report_markdown, render_markdown(content))
