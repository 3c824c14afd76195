"""What a study's settings say together."""

from pathlib import Path

import pytest

from trimtab.study_config import build_study


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "smollm2-135m-rotten-tomatoes-lora"),
        ({"model": "Qwen/Qwen2.5-0.5B", "train_data": "a/reviews.v2.csv.gz"}, "Qwen2.5-0.5B-reviews.v2-lora"),
        ({"model": "./my-bert/", "train_data": "owner/set:config.en"}, "my-bert-set-config.en-lora"),
    ],
)
def test_a_run_folder_is_named_by_model_data_and_method(settings, name):
    assert build_study(settings).run_folder == Path("runs") / name
