"""`trimtab combine`: one adapter of two, scored beside them, and an adapter like any other after that."""

import json
import shutil

import pytest

import trimtab
from samples import run_here, run_trimtab, write_reviews
from trimtab.combining import combine_adapters
from trimtab.errors import InputError, SourceError
from trimtab.runs import RunFolder
from trimtab.study_config import build_study


@pytest.fixture(scope="module")
def two(tmp_path_factory, model_folder):
    """Adapters of two seeds on the same reviews."""
    folder = tmp_path_factory.mktemp("combine")
    data = write_reviews(folder / "reviews.csv", 240)
    for seed in (0, 1):
        run_here(build_study({"model": str(model_folder("llama")), "train_data": str(data), "seed": seed, "num_train_epochs": 2,
                              "tokens_per_batch": 256, "max_length_tokens": 32, "learning_rate": 5e-3,
                              "out": str(folder / f"run-{seed}")}))  # fmt: skip
    return [RunFolder(folder / f"run-{seed}").trial("lora", seed).adapter for seed in (0, 1)]


@pytest.fixture(scope="module")
def unseen(tmp_path_factory):
    """Rows that no seed was trained on."""
    return str(write_reviews(tmp_path_factory.mktemp("unseen") / "unseen.csv", 60, seed=7))


def test_the_command_scores_it_beside_its_parts(two, unseen, tmp_path):
    parts = [f"{two[0]}=0.5", f"{two[1]}=0.5"]
    done = run_trimtab("combine", *parts, "--out", tmp_path / "both", "--data", unseen, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    names = [system["name"] for system in found["systems"]]
    assert names == ["run-0-lora-s0", "run-1-lora-s1", "combined"]
    assert {(one["system"], one["against"]) for one in found["contrasts"]} == {("combined", name) for name in names[:2]}
    facts = json.loads((tmp_path / "both" / "trimtab.json").read_text())
    assert facts["combined"]["weights"] == {"run-0-lora-s0": 0.5, "run-1-lora-s1": 0.5}
    assert facts["score"]["value"] == found["systems"][-1]["metrics"]["accuracy"]["value"]
    assert not (tmp_path / "both" / "README.md").exists()  # peft's would name a path of this machine
    loaded = trimtab.load_adapter(tmp_path / "both")
    assert loaded.predict(["a joy to watch"])[0]["probabilities"].keys() == {"good", "bad"}


def test_rows_that_a_part_was_trained_on_are_no_judges(two, tmp_path):
    with pytest.raises(InputError, match=r"of 24 test rows \d are test rows of every run, .* none has seen: --data"):
        combine_adapters({two[0]: 0.5, two[1]: 0.5}, tmp_path / "x")


def test_one_part_alone_is_that_part(two, unseen, tmp_path):
    found = combine_adapters({two[0]: 1.0, two[1]: 0.0}, tmp_path / "same", "svd", data=unseen)
    systems = {system["name"]: system["metrics"] for system in found["systems"]}
    assert systems["combined"]["accuracy"]["value"] == systems["run-0-lora-s0"]["accuracy"]["value"]
    assert systems["combined"]["loss"]["value"] == pytest.approx(systems["run-0-lora-s0"]["loss"]["value"], abs=1e-4)


def test_adapters_of_the_hub_and_a_base_that_was_moved(two, unseen, tmp_path, monkeypatch, model_folder):
    """As `predict` and `merge` take them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub" / "hub"))
    for number, name in enumerate(("first", "second")):
        repository = tmp_path / "hub" / "hub" / f"models--small--{name}"
        shutil.copytree(two[number], repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
    parts = ["small/first=0.5", f"small/second@{'0' * 40}=0.5"]
    moved = shutil.move(model_folder("llama"), tmp_path / "moved")
    try:
        with pytest.raises(SourceError, match="no model folder at "):
            combine_adapters({two[0]: 0.5, two[1]: 0.5}, tmp_path / "lost", data=unseen)
        done = run_trimtab("combine", *parts, "--data", unseen, "--out", tmp_path / "both", "--base", moved, "--json")
        assert done.returncode == 0, done.stderr
    finally:
        shutil.move(moved, model_folder("llama"))
    assert [one["name"] for one in json.loads(done.stdout)["systems"]] == ["first", "second", "combined"]
    again = combine_adapters({two[0]: 0.5, two[1]: 0.5}, tmp_path / "again", data=unseen)
    found = {one["name"]: one["metrics"]["loss"]["value"] for one in json.loads(done.stdout)["systems"]}
    assert found["combined"] == pytest.approx(again["systems"][-1]["metrics"]["loss"]["value"])


def test_bad_weights_and_places_are_told(two, tmp_path):
    done = run_trimtab("combine", str(two[0]), "--out", tmp_path / "x")
    assert done.returncode == 2
    assert "is no adapter with a weight; write FOLDER=0.5" in " ".join(done.stderr.split())
    done = run_trimtab("combine", f"{two[0]}=0.5", f"{two[0]}=0.5", "--out", tmp_path / "x")
    assert "is given twice; add its weights up" in " ".join(done.stderr.split())
    with pytest.raises(InputError, match="give two adapters or more"):
        combine_adapters({two[0]: 1.0}, tmp_path / "x")
    with pytest.raises(InputError, match="an adapter is given twice; add its weights up"):
        combine_adapters({two[0]: 1.0, str(two[0]): 1.0}, tmp_path / "x")
    with pytest.raises(InputError, match="is there already; give another --out"):
        combine_adapters({two[0]: 0.5, two[1]: 0.5}, two[0])
