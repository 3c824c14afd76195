"""The whole job as a user runs it, on tiny models; and stock peft loads what it saved."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from samples import Notes, run_here, run_trimtab, write_reviews
from trimtab.adapters import evaluate_trial, prove_reload
from trimtab.adapters.files import write_facts
from trimtab.engine.fused import native
from trimtab.errors import ReloadError, SourceError, TrainingError
from trimtab.progress import Silent
from trimtab.runs import RunFolder
from trimtab.study import run_study
from trimtab.study_config import build_study

METRICS = {"accuracy", "f1", "precision", "recall", "loss", "brier"}
COSTS = {"trainable_parameters", "total_parameters", "trainable_percent", "adapter_bytes", "train_seconds",
         "train_tokens", "tokens_per_second", "evaluate_seconds", "peak_memory_bytes"}  # fmt: skip


def settings(model, data, out, **changes):
    return {"model": str(model), "train_data": str(data), "out": str(out), "num_train_epochs": 3,
            "tokens_per_batch": 128, "max_length_tokens": 32, "learning_rate": 0.01} | changes  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "mpnet"])  # fused, and padded
def finished(request, tmp_path_factory, model_folder):
    """A finished run of each family, through the command line."""
    folder = tmp_path_factory.mktemp(f"run-{request.param}")
    data = write_reviews(folder / "reviews.csv", 240)
    flags = settings(model_folder(request.param), data, folder / "run")
    done = run_trimtab("run", "--json", *[f"--{n.replace('_', '-')}={v}" for n, v in flags.items()])
    assert done.returncode == 0, done.stderr
    return request.param, RunFolder(folder / "run"), json.loads(done.stdout), done.stderr


def test_comparison_holds_the_whole_contract(finished):
    _, run, printed, _ = finished
    comparison = json.loads(run.comparison.read_text())
    assert comparison == printed
    assert comparison["version"] == 1
    assert comparison.keys() >= {
        "study",
        "task",
        "primary_metric",
        "data",
        "systems",
        "contrasts",
        "reload",
        "failures",
    }
    assert comparison["data"].keys() == {"train_rows", "validation_rows", "test_rows", "duplicate_rows",
                                         "leaked_test_rows", "sha256"}  # fmt: skip
    systems = {system["name"]: system for system in comparison["systems"]}
    assert systems.keys() == {
        "majority-class",
        "tfidf-logistic-regression",
        "linear-probe",
        "untrained-head",
        "lora-s0",
    }
    assert systems["untrained-head"]["kind"] == "base"
    for system in systems.values():
        assert system["metrics"].keys() == system["metrics_clean"].keys() == METRICS
        assert system["cost"].keys() >= COSTS
        assert all(m["low"] <= m["value"] <= m["high"] for m in system["metrics"].values())
    assert all(systems["lora-s0"]["cost"][name] for name in COSTS)
    assert {(c["system"], c["against"]) for c in comparison["contrasts"]} == {
        ("lora-s0", n) for n in systems if n != "lora-s0"
    }
    assert all(c["test"] == "mcnemar_exact" and c["p_adjusted"] >= c["p_value"] for c in comparison["contrasts"])
    assert comparison["reload"]["passed"]
    assert comparison["reload"]["max_abs_logit_difference"] <= 1e-4
    assert comparison["failures"] == []


def test_tuning_learns_what_the_words_say(finished):
    _, _, comparison, _ = finished
    accuracy = {system["name"]: system["metrics"]["accuracy"]["value"] for system in comparison["systems"]}
    assert accuracy["majority-class"] == pytest.approx(0.5, abs=0.05)
    # 24 test rows, each worth four points; the start (the probe) is kept where validation sees nothing better.
    assert accuracy["lora-s0"] > 0.8 > accuracy["majority-class"]


def test_notes_say_what_was_guessed_and_chosen(finished):
    family, run, _, stderr = finished
    assert "text column: 'text' (by its name" in stderr
    assert ("texts are padded" if family == "mpnet" else "texts are packed without padding") in stderr
    training = json.loads(run.trial("lora", 0).training.read_text())
    packed = "fused" if native.is_available() and family in ("bert", "llama", "roberta") else "packed"
    assert training["forward"] == ("padded" if family == "mpnet" else packed)
    assert (training["forward_reason"] != "") == (family == "mpnet")


def test_stock_peft_gives_the_same_predictions(finished):
    """No Trimtab code from here on: peft, transformers, padding."""
    _, run, _, _ = finished
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoTokenizer

    trial = run.trial("lora", 0)
    model = AutoPeftModelForSequenceClassification.from_pretrained(str(trial.adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(trial.adapter))
    rows = [json.loads(line) for line in run.test_rows.read_text().splitlines()]
    expected = [json.loads(line) for line in trial.predictions.read_text().splitlines()]
    names = json.loads(run.data_summary.read_text())["label_names"]
    model.config.pad_token_id = tokenizer.pad_token_id
    batch = tokenizer([row["text"] for row in rows], padding=True, truncation=True, max_length=32, return_tensors="pt")
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        stock = model(**batch).logits.double().softmax(-1)
        exact = model.double()(**batch).logits.softmax(-1)
    assert [names[i] for i in stock.argmax(-1)] == [row["prediction"] for row in expected]
    ours = torch.tensor([[row["probabilities"][name] for name in names] for row in expected], dtype=torch.float64)
    # A tiny model that is trained hard magnifies float32's rounding: ours may be as far from exact as stock's.
    rounding = float((stock - exact).abs().max())
    assert rounding < 5e-4
    torch.testing.assert_close(ours, exact, atol=max(1e-5, 2 * rounding), rtol=0)


def test_running_the_resolved_file_repeats_the_run_to_the_bit(finished, tmp_path):
    family, run, comparison, _ = finished
    if family != "llama":
        pytest.skip("one family is enough")
    done = run_trimtab("run", run.study, "--json", "--out", tmp_path / "again", alone=True)
    assert done.returncode == 0, done.stderr
    again = RunFolder(tmp_path / "again")
    first, second = (load_file(r.trial("lora", 0).adapter / "adapter_model.safetensors") for r in (run, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert again.trial("lora", 0).predictions.read_bytes() == run.trial("lora", 0).predictions.read_bytes()
    kept = json.loads(done.stdout)["contrasts"]
    assert kept == comparison["contrasts"]


def test_compare_and_evaluate_and_report_commands(finished):
    family, run, comparison, _ = finished
    if family != "llama":
        pytest.skip("one family is enough")
    probe = run.baseline("linear-probe")
    done = run_trimtab("compare", probe.predictions, run.path, "--json")
    found = json.loads(done.stdout)["contrasts"][0]
    expected = next(c for c in comparison["contrasts"] if c["against"] == "linear-probe")
    for name in ("difference", "p_value", "test"):
        assert found[name] == expected[name]
    done = run_trimtab("compare", probe.path, run.trial("lora", 0).path, "--metric", "f1")
    assert done.returncode == 0
    assert "lora-s0 against linear-probe" in done.stdout
    assert run_trimtab("compare", run.path, run.path, "--metric", "acuracy").returncode == 2
    before = run.trial("lora", 0).predictions.read_bytes()
    assert run_trimtab("evaluate", run.path).returncode == 0
    assert run.trial("lora", 0).predictions.read_bytes() == before
    run.report_html.unlink()
    assert run_trimtab("report", run.path).returncode == 0
    assert run.report_html.is_file()


def test_a_finished_run_is_not_run_again(finished):
    _, run, comparison, _ = finished
    stamp = (run.trial("lora", 0).adapter / "adapter_model.safetensors").stat().st_mtime_ns
    again = run_study(build_study(yaml.safe_load(run.study.read_text())))
    assert again["contrasts"] == comparison["contrasts"]
    assert (run.trial("lora", 0).adapter / "adapter_model.safetensors").stat().st_mtime_ns == stamp


def test_numbers_as_labels_and_text_pairs(tmp_path, model_folder):
    rows = [
        {"a": "a joy to watch" if i % 3 else "a dull mess", "b": "truly", "stars": [1, 5, 5][i % 3]} for i in range(120)
    ]
    data = tmp_path / "stars.jsonl"
    data.write_text("".join(json.dumps(row | {"b": f"number {i}"}) + "\n" for i, row in enumerate(rows)))
    study = build_study(settings(model_folder("bert"), data, tmp_path / "run", text_column="a", text_pair_column="b",
                                 label_column="stars"))  # fmt: skip
    run_here(study)
    config = json.loads((tmp_path / "run" / "data.json").read_text())
    assert config["label_names"] == ["1", "5"]
    first = json.loads((tmp_path / "run" / "trials" / "lora-s0" / "predictions.jsonl").read_text().splitlines()[0])
    assert first["label"] in ("1", "5")
    assert set(first["probabilities"]) == {"1", "5"}


def test_a_learning_rate_that_explodes_keeps_the_last_good_state(tmp_path, model_folder, reviews):
    study = build_study(
        settings(model_folder("llama"), reviews, tmp_path / "run", learning_rate=1e38, max_grad_norm=1e38)
    )
    with pytest.raises(
        TrainingError, match=r"no longer finite at step \d+ of \d+.*lower --learning-rate \(it was 1e\+38\)"
    ):
        run_here(study)
    run = RunFolder(tmp_path / "run")
    weights = load_file(run.trial("lora", 0).adapter / "adapter_model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    comparison = json.loads(run.comparison.read_text())
    assert comparison["failures"][0]["trial"] == "lora-s0"
    assert {system["kind"] for system in comparison["systems"]} == {"baseline", "base"}
    assert run.report_html.is_file()


def test_a_damaged_adapter_fails_loudly(tmp_path, model_folder, reviews):
    run = RunFolder(tmp_path / "run")
    run_study(build_study(settings(model_folder("bert"), reviews, run.path)))
    trial = run.trial("lora", 0)
    file = trial.adapter / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "lora_B" in name)
    save_file({**weights, name: weights[name] + 0.05}, file, metadata={"format": "pt"})
    with pytest.raises(ReloadError, match=r"could not be scored in a fresh process: .* is not what was saved"):
        prove_reload(run, trial, Silent())
    write_facts(trial.adapter, json.loads(trial.facts_in(trial.adapter).read_text()))
    with pytest.raises(ReloadError, match=r"does not give what was trained: logits differ by up to"):
        prove_reload(run, trial, Silent())
    assert json.loads(trial.reload.read_text())["passed"] is False


def test_another_base_is_refused(tmp_path, model_folder, reviews):
    import shutil

    base = tmp_path / "base"
    shutil.copytree(model_folder("bert"), base)
    run = RunFolder(tmp_path / "run")
    run_here(build_study(settings(base, reviews, run.path)))
    weights = load_file(base / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 0.01}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"is not the base of .*the adapter was trained on [0-9a-f]{12}"):
        evaluate_trial(run, run.trial("lora", 0), Silent())


def test_what_is_finished_is_kept(tmp_path, model_folder, reviews):
    """A run that lost its trial goes on from the baselines that are there."""
    import shutil

    run = RunFolder(tmp_path / "run")
    study = build_study(settings(model_folder("bert"), reviews, run.path))
    first = run_here(study)
    stamps = {p: p.stat().st_mtime_ns for p in Path(run.path / "baselines").rglob("*.json*")}
    adapter = load_file(run.trial("lora", 0).adapter / "adapter_model.safetensors")
    shutil.rmtree(run.trial("lora", 0).path)
    second = run_here(study)
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    again = load_file(run.trial("lora", 0).adapter / "adapter_model.safetensors")
    assert all(torch.equal(adapter[name], again[name]) for name in adapter)
    assert second["contrasts"] == first["contrasts"]


@pytest.mark.skipif(not native.is_available(), reason="no C++ compiler here: training is in float32")
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # fused layers, and linears by themselves
def test_training_in_int8_is_scored_in_float32(tmp_path, model_folder, family):
    model = model_folder(family)
    data = write_reviews(tmp_path / "reviews.csv")
    heard, run = Notes(), RunFolder(tmp_path / "run")
    run_here(
        build_study({"model": str(model), "train_data": str(data), "precision": "int8", "out": str(run.path)}), heard
    )
    assert any(note.startswith("training in int8: ") for note in heard.notes)
    training = json.loads(run.trial("lora", 0).training.read_text())
    assert training["precision"] == "int8"
    assert 0.99 < training["least_output_cosine"] < 1
    fused_attention = native.has_bfloat16() and family != "gpt2"
    assert len(training["errors"]) == 8 + 2 * fused_attention
    comparison = json.loads(run.comparison.read_text())
    assert comparison["reload"]["passed"]
    both = json.loads(run.trial("lora", 0).metrics.read_text())
    in_int8 = both["in_training_precision"]
    assert in_int8["precision"] == "int8"
    assert 0 < in_int8["max_abs_logit_difference"] < 0.5
    assert abs(in_int8["metrics"]["loss"] - both["metrics"]["loss"]) < 0.05
    said = next(line for line in run.report_markdown.read_text().splitlines() if "Test scores in int8" in line)
    accuracy, whole = (100 * metrics["accuracy"] for metrics in (in_int8["metrics"], both["metrics"]))
    assert f"accuracy {accuracy:.1f} % (in float32 {whole:.1f} %)" in said.replace("\N{NARROW NO-BREAK SPACE}", " ")


@pytest.mark.skipif(not native.is_available(), reason="no C++ compiler here: nothing is kept")
def test_states_below_the_adapted_layers_are_kept_between_runs(tmp_path, model_folder, monkeypatch):
    kernels = native.cache_folder() / "kernels"  # built before: only the states shall be new
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "kernels").symlink_to(kernels)
    data = write_reviews(tmp_path / "reviews.csv")
    flags = settings(model_folder("llama"), data, "", layers_to_transform="upper-half")
    adapters, notes = [], []
    for name, changes in {"none": {"cache_budget_gib": 0}, "first": {}, "second": {}}.items():
        heard = Notes()
        run_here(build_study(flags | {"out": str(tmp_path / name)} | changes), heard)
        adapters.append(load_file(RunFolder(tmp_path / name).trial("lora", 0).adapter / "adapter_model.safetensors"))
        notes += [note for note in heard.notes if "states below layer" in note]
    assert all("layers.1." in name or "score" in name for name in adapters[0])
    for other in adapters[1:]:
        assert all(torch.equal(adapters[0][name], other[name]) for name in adapters[0])
    assert len(notes) == 2, heard.notes
    assert "computed for 160" in notes[0]
    assert "computed for 0" in notes[1]
