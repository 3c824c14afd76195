"""What a study's settings say together."""

from pathlib import Path

import pytest

from trimtab.cli.flags import resolve
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


def test_method_options_are_read_as_yaml_and_as_numbers_with_exponents():
    options = ["a=1e-3", "b=1.5E2", "c=[q, v]", "d=true", "e=e5", "f=7"]
    found = resolve(None, {"method_options": options}).method_options
    assert found == {"a": 1e-3, "b": 150.0, "c": ["q", "v"], "d": True, "e": "e5", "f": 7}
