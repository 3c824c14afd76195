"""Adapters that go to a small Hub on this machine, and come back."""

import json
import shutil

import pytest

from samples import SHORT_TRAINING, run_here, run_trimtab, write_reviews
from trimtab import load_adapter
from trimtab.study_config import build_study


def test_an_adapter_goes_to_the_hub_and_comes_back(hub, here, trimtab, tmp_path, monkeypatch):
    from trimtab.errors import AdapterError

    data = write_reviews(tmp_path / "reviews.csv", 120)
    done = trimtab(
        "run",
        "--model=small/llama",
        f"--train-data={data}",
        *SHORT_TRAINING,
        f"--out={tmp_path / 'run'}",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    adapter = tmp_path / "run" / "trials" / "lora-s0" / "adapter"
    (adapter / ".env").write_text("SECRET=1")  # nothing of the adapter's
    asked = len(hub.requests)
    dry = run_trimtab("push", adapter, "small/reviews-lora", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "adapter_model.safetensors" in dry.stdout
    assert "all is in order for small/reviews-lora; nothing was sent" in dry.stdout
    assert len(hub.requests) == asked
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    sent = run_trimtab("push", adapter, "small/reviews-lora", "--json")
    assert sent.returncode == 0, sent.stderr
    assert json.loads(sent.stdout)["url"].endswith("/commit/1")
    there = hub.root / "small" / "reviews-lora"
    assert {path.name for path in there.iterdir()} == {path.name for path in adapter.iterdir()} - {".env"}
    assert json.loads((there / "adapter_config.json").read_text())["base_model_name_or_path"] == "small/llama"
    assert len(json.loads((there / "adapter_config.json").read_text())["revision"]) == 40
    assert str(tmp_path) not in "".join(path.read_text() for path in there.glob("*.json"))
    # In this process, on another machine: it has to fetch the base as well.
    texts = ["a joy", "a bore"]
    assert load_adapter("small/reviews-lora").predict(texts) == load_adapter(adapter).predict(texts)
    (there / "adapter_model.safetensors").write_bytes(b"other")  # what came down the wire is checked as what lay here
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors is not what was saved"):
        load_adapter("small/reviews-lora@main")


def test_what_is_sent_of_an_adapter_of_a_folder_does_not_tell_where_it_lay(
    hub, here, tmp_path, model_folder, monkeypatch
):
    from trimtab.errors import SourceError
    from trimtab.publishing import push_adapter

    base = shutil.copytree(model_folder("bert"), tmp_path / "at home" / "gpt2")  # which the Hub has one of, too
    data = write_reviews(tmp_path / "reviews.csv", 60)
    run_here(build_study({"model": str(base), "train_data": str(data), "num_train_epochs": 1, "tokens_per_batch": 128,
                          "max_length_tokens": 32, "out": str(tmp_path / "run")}))  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    push_adapter(tmp_path / "run" / "trials" / "lora-s0" / "adapter", "small/of-a-folder")
    there = hub.root / "small" / "of-a-folder"
    assert "at home" not in "".join(path.read_text() for path in there.glob("*") if path.suffix in (".json", ".md"))
    assert json.loads((there / "adapter_config.json").read_text())["base_model_name_or_path"] == "./gpt2"
    with pytest.raises(SourceError, match=r"no model folder at './gpt2'.*give it with --base"):
        load_adapter("small/of-a-folder")
    assert load_adapter("small/of-a-folder", base=str(base)).predict(["a joy"])


STOCK = """
import sys
from peft import AutoPeftModelForSequenceClassification
print(AutoPeftModelForSequenceClassification.from_pretrained(sys.argv[1], num_labels=2).config.model_type)
"""


def test_the_base_is_found_again_where_its_repository_went_on(hub, here, trimtab, tmp_path, model_folder):
    """And stock peft finds it by what the config says: the id and the commit."""
    there = hub.root / "small" / "moving"
    shutil.copytree(model_folder("llama"), there)
    data = write_reviews(tmp_path / "reviews.csv", 60)
    flags = ["--model=small/moving", f"--train-data={data}", *SHORT_TRAINING, f"--out={tmp_path / 'run'}"]
    done = trimtab("run", *flags)
    assert done.returncode == 0, done.stderr
    adapter = tmp_path / "run" / "trials" / "lora-s0" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], len(config["revision"])) == ("small/moving", 40)
    assert str(tmp_path / "hf") not in "".join(path.read_text() for path in adapter.glob("*.json"))

    there.rename(hub.root / "small" / "moving@earlier")
    shutil.copytree(model_folder("bert"), there)
    assert load_adapter(adapter).predict(["a joy"])  # in this process, which has another cache
    stock = trimtab(adapter, program=["-c", STOCK], HF_HOME=str(tmp_path / "a third one"))
    assert stock.stdout.split()[-1:] == ["llama"], stock.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["others/mine"], "others/mine cannot be written on the Hub: 403, .*You don't have the rights"),
        (["small/locked"], "small/locked cannot be written on the Hub: 401, .*log in with `hf auth login`"),
        (["noowner"], "'noowner' names no owner; give owner/name"),
        (["a b/c"], "'a b/c' is no name on the Hub"),
    ],
)
def test_what_the_hub_does_not_take_is_one_clear_error(here, finished_adapter, arguments, message):
    from trimtab.errors import SourceError
    from trimtab.publishing import push_adapter

    with pytest.raises(SourceError, match=message):
        push_adapter(finished_adapter, *arguments)


def test_a_card_that_the_hub_cannot_read_is_not_sent(finished_adapter):
    from trimtab.errors import AdapterError
    from trimtab.publishing import push_adapter

    (finished_adapter / "README.md").write_text("---\n- not: [a mapping\n---\n")
    with pytest.raises(AdapterError, match=r"README.md: its metadata cannot be read"):
        push_adapter(finished_adapter, "small/x", dry_run=True)
    (finished_adapter / "README.md").unlink()
    with pytest.raises(
        AdapterError, match=r"has no model card \(README.md\); trimtab report RUN writes those of a run"
    ):
        push_adapter(finished_adapter, "small/x", dry_run=True)
