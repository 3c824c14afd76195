"""The report of a run: one HTML page, one Markdown file, and a card for each adapter, made only from the run folder."""

from __future__ import annotations

from trimtab.runs import RunFolder, write_text

__all__ = ["write_report"]


def write_report(run: RunFolder) -> None:
    """Write `report.html`, `report.md` and each adapter's model card from the files in the run folder.

    Raises:
        DataError: comparison.json or test.jsonl is missing, or predictions are not about the test rows.
    """
    from trimtab.report.content import read_content
    from trimtab.report.html import render_html
    from trimtab.report.markdown import render_markdown
    from trimtab.report.model_card import render_model_card

    content = read_content(run)
    write_text(run.report_html, render_html(content))
    write_text(run.report_markdown, render_markdown(content))
    folders = {folder.name: folder for folder in run.trials()}
    for trial in content.trials:
        card = render_model_card(content, trial)
        if card is not None and trial.name in folders:
            write_text(folders[trial.name].model_card, card)
