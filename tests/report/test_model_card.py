"""The model card: what the Hub reads of it, and what a reader needs."""

from __future__ import annotations

from huggingface_hub import ModelCard
from test_report import NewRun, finished

from trimtab.report import write_report
from trimtab.runs import RunFolder


def card_of(run: RunFolder) -> ModelCard:
    write_report(run)
    return ModelCard.load(run.trials()[0].model_card)


def test_the_hub_reads_scores_with_their_intervals(new_run: NewRun) -> None:
    run = finished(new_run())
    card = card_of(run)
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-classification"
    results = {result.metric_type: result for result in card.data.eval_results}
    accuracy = results["accuracy"]
    assert 0 < accuracy.metric_args["low"] < accuracy.metric_value < accuracy.metric_args["high"] < 1
    assert accuracy.dataset_split == "test"


def test_it_says_what_it_was_held_against_and_how_to_use_it(new_run: NewRun) -> None:
    text = str(card_of(finished(new_run())))
    for wanted in ("Linear probe", "AutoPeftModelForSequenceClassification.from_pretrained", "num_labels=2",
                   "trimtab predict FOLDER", "## Limits", "The best system that needs no tuning"):  # fmt: skip
        assert wanted.lower() in text.lower(), wanted


def test_folders_of_this_machine_stay_out(new_run: NewRun) -> None:
    run = finished(new_run())
    study = run.study.read_text()
    run.study.write_text(study + "\nmodel: /home/someone/secret/my-bert\ntrain_data: ./private/rows.csv\n")
    text = str(card_of(run))
    assert "someone" not in text
    assert "private" not in text
    assert "my-bert" in text
    assert "rows.csv" in text


def test_the_users_text_is_no_markup(new_run: NewRun) -> None:
    run = finished(new_run(labels=["<b>neg</b>", "pos|itive"]))
    text = str(card_of(run))
    assert "<b>" not in text
