"""Adapters in one process, at the edges: saved whole, merged from any state, combined to scale, left as they were."""

import pytest
import torch
import transformers
from peft import AdaptionPromptConfig, LNTuningConfig, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import trimtab
from samples import Notes, run_here, tiny_config, write_reviews
from trimtab.adapters import switching
from trimtab.adapters.files import write_facts
from trimtab.engine.batches import Collator
from trimtab.errors import AdapterError
from trimtab.evaluation.unlabelled import row_without_label
from trimtab.fingerprints import fingerprint_model
from trimtab.runs import RunFolder
from trimtab.sources import ModelSource
from trimtab.study_config import build_study
from trimtab.tasks import get_task
from trimtab.tasks.examples import Example

TEXTS = ["a joy to watch", "a dull mess truly truly", "the worst film of the year"]


def tune(folder, model, **settings):
    run_here(build_study(
        {"model": str(model), "train_data": str(write_reviews(folder / "reviews.csv", 80)), "num_train_epochs": 1,
         "tokens_per_batch": 256, "max_length_tokens": 32, "learning_rate": 5e-3, "out": str(folder / "run")} | settings
    ))  # fmt: skip
    return RunFolder(folder / "run").trials()[0].adapter


def save_lora(base_folder, folder, seed, targets=("q_proj", "v_proj"), auto=AutoModelForSequenceClassification, **more):
    torch.manual_seed(seed)
    kind = "SEQ_CLS" if auto is AutoModelForSequenceClassification else "CAUSAL_LM"
    config = LoraConfig(task_type=kind, target_modules=list(targets), init_lora_weights=False, **{"r": 4} | more)
    get_peft_model(auto.from_pretrained(base_folder), config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(folder)
    return folder


def probabilities(loaded, **named):
    return [list(said["probabilities"].values()) for said in loaded.predict(TEXTS, **named)]


def close(ours, theirs, bound=1e-5):
    return torch.allclose(torch.tensor(ours), torch.tensor(theirs), atol=bound)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["input_layernorm"]),
        LNTuningConfig(task_type="CAUSAL_LM", target_modules=["post_attention_layernorm"]),
        AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_layers=2, adapter_len=4),
    ],
    ids=["copied norms", "tuned norms", "attention as a whole"],
)
def test_fused_layers_leave_out_no_adapter(model_folder, tmp_path, config):
    """Those that stand around other parts of a layer than its linears, with nothing in them that is to be trained."""
    base = model_folder("llama", "AutoModelForCausalLM")
    model, ids = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval(), torch.arange(5, 17)[None]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.5
        wanted = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = trimtab.load_adapter(tmp_path / "adapter", progress=Notes())
    loaded.switch("default")
    forward = loaded.scorer.choice.forward
    batch = Collator([Example(ids[0].tolist(), None, list(range(12)), [0] * 12)], True, 0, 0).collate([0])
    with torch.no_grad():
        assert torch.allclose(forward.logits(batch), wanted[0], atol=1e-4)
    with loaded.disable(), torch.no_grad():
        assert not torch.allclose(forward.logits(batch), wanted[0], atol=1e-2)


@pytest.mark.parametrize("method", ["trainable_tokens", "full"])
def test_what_is_saved_again_holds_the_head(model_folder, tmp_path, method):
    loaded = trimtab.load_adapter(tune(tmp_path, model_folder("llama"), method=method))
    loaded.save(tmp_path / "again")
    assert probabilities(trimtab.load_adapter(tmp_path / "again")) == probabilities(loaded)


def test_a_folder_of_other_things_is_not_replaced(model_folder, tmp_path):
    loaded = trimtab.load_adapter(save_lora(model_folder("llama"), tmp_path / "one", 1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(AdapterError, match=r"holds something else \(thesis\.txt\); give a folder of its own"):
        loaded.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    loaded.save(tmp_path / "one")  # an adapter takes the place of an adapter
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "one"]


@pytest.mark.parametrize(("family", "precision"), [("gpt2", "int8"), ("gpt2", "bfloat16"), ("llama", "int8")])
def test_a_merge_follows_a_lower_precision(model_folder, tmp_path, family, precision):
    targets = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}[family]
    loaded = trimtab.load_adapter(save_lora(model_folder(family), tmp_path / "one", 1, targets))
    wanted = probabilities(loaded)
    loaded.compute_in(
        precision, [row_without_label("classification", {"text": text}, "x", None, None) for text in TEXTS]
    )
    loaded.merge()
    assert close(probabilities(loaded), wanted)
    with pytest.raises(AdapterError, match="is merged into the base; unmerge it first"):
        loaded.compute_in("float32", [])
    loaded.unmerge()
    assert close(probabilities(loaded), wanted)


def test_a_base_in_fewer_bits_is_not_merged_into(model_folder, tmp_path):
    """Though the adapter was trained in full precision."""
    loaded = trimtab.load_adapter(save_lora(model_folder("llama"), tmp_path / "one", 1), quantize="8bit")
    wanted = probabilities(loaded)
    with pytest.raises(AdapterError, match="its base is held in fewer bits"):
        loaded.merge()
    assert probabilities(loaded) == wanted


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_tied_embeddings_are_merged_at_one_end(model_folder, tmp_path, target):
    base = AutoModelForCausalLM.from_config(tiny_config("llama", tie_word_embeddings=True))
    base.save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(model_folder("llama")).save_pretrained(tmp_path / "tied")
    loaded = trimtab.load_adapter(save_lora(tmp_path / "tied", tmp_path / "one", 1, [target], AutoModelForCausalLM))
    ids = torch.arange(5, 12)[None]
    loaded.peft_model.get_base_model().set_attn_implementation("eager")
    with torch.no_grad():
        wanted = loaded.peft_model(input_ids=ids).logits
        loaded.merge()
        merged = loaded.peft_model(input_ids=ids).logits
        loaded.unmerge()
        again = loaded.peft_model(input_ids=ids).logits
    assert torch.allclose(merged, wanted, atol=1e-4)
    assert torch.equal(again, wanted)


def test_a_combination_of_rank_stabilised_adapters_keeps_their_scale(model_folder, tmp_path):
    folders = [save_lora(model_folder("llama"), tmp_path / str(seed), seed, use_rslora=True) for seed in (1, 2)]
    loaded = trimtab.load_adapter(folders[0], name="first")
    loaded.load(folders[1], "second")
    loaded.combine({"first": 1.0, "second": 0.0}, "same")
    wanted = probabilities(loaded)
    loaded.switch("same")
    assert close(probabilities(loaded), wanted)
    loaded.save(tmp_path / "same")  # of adapters that Trimtab did not save
    assert close(probabilities(trimtab.load_adapter(tmp_path / "same")), wanted)


def test_what_is_not_combined_leaves_nothing(model_folder, tmp_path):
    base = model_folder("llama")
    loaded = trimtab.load_adapter(save_lora(base, tmp_path / "plain", 1), name="plain")
    loaded.load(save_lora(base, tmp_path / "pattern", 2, rank_pattern={"q_proj": 2}), "pattern")
    loaded.load(save_lora(base, tmp_path / "dora", 3, use_dora=True), "dora")
    for _ in range(2):
        with pytest.raises(AdapterError, match="these adapters cannot be combined by linear: "):
            loaded.combine({"plain": 0.5, "pattern": 0.5}, "both")
        assert "both" not in loaded.peft_model.peft_config
    with pytest.raises(AdapterError, match="DoRA's magnitudes are not combined by peft"):
        loaded.combine({"plain": 0.5, "dora": 0.5}, "both")
    with pytest.raises(AdapterError, match=r"the weights are nan, 1\.0; give finite numbers"):
        loaded.combine({"plain": float("nan"), "pattern": 1.0}, "both")
    with pytest.raises(AdapterError, match="the weights add up to 0, so the heads have no mean"):
        loaded.combine({"plain": 0.3, "pattern": 0.1 - 0.4}, "both")


def test_language_models_take_the_difference_of_adapters(model_folder, tmp_path):
    base = model_folder("llama", "AutoModelForCausalLM")
    loaded = trimtab.load_adapter(save_lora(base, tmp_path / "a", 1, auto=AutoModelForCausalLM), name="a")
    loaded.combine({"a": 1.0}, "same")
    loaded.combine({"a": 1.0, "same": -1.0}, "nothing", "cat")
    loaded.switch("nothing")
    ids = torch.arange(5, 12)[None]
    loaded.peft_model.get_base_model().set_attn_implementation("eager")
    with torch.no_grad():
        found = loaded.peft_model(input_ids=ids).logits
        with loaded.disable():
            assert torch.allclose(found, loaded.peft_model(input_ids=ids).logits, atol=1e-5)
    with pytest.raises(AdapterError, match="is a causal_lm adapter, which writes and says no label"):
        loaded.predict(TEXTS, ["a"] * 3)
    assert loaded.active == "nothing"


def test_no_adapter_is_asked_where_all_are_off(model_folder, tmp_path):
    loaded = trimtab.load_adapter(save_lora(model_folder("llama"), tmp_path / "one", 1))
    with loaded.disable(), pytest.raises(AdapterError, match="the adapters are switched off here"):
        loaded.predict(TEXTS, ["default"] * 3)
    assert close(probabilities(loaded, adapters=["default"] * 3), probabilities(loaded))
    assert loaded.predict([]) == []


def save_task(base, folder, seed, task, names):
    """An adapter of a task with random weights and head, with what Trimtab would note of it."""
    labels, kind = len(names) or 1, get_task(task).auto_class
    torch.manual_seed(seed)
    model = getattr(transformers, kind).from_pretrained(base, num_labels=labels)
    config = LoraConfig(
        task_type=get_task(task).peft_type, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    get_peft_model(model, config).save_pretrained(folder)
    sha256 = fingerprint_model(ModelSource(str(base), str(base), True))
    write_facts(folder, {"base": str(base), "base_sha256": sha256, "task": task, "label_names": names,
                         "max_length_tokens": 32, "method": "lora", "seed": 0})  # fmt: skip
    return folder


@pytest.mark.parametrize(
    "tasks",
    [
        {"regression": [], "multilabel": ["a", "b", "c", "d"], "classification": ["x", "y"]},
        {"token_classification": ["B-X", "I-X", "O"], "token_classification 2": ["O", "B-Y"]},
    ],
    ids=["sequences", "tokens"],
)
def test_tasks_are_mixed_in_a_batch_as_each_alone(model_folder, tmp_path, monkeypatch, tasks):
    texts = [*TEXTS, "warm, funny and wise", "weak acting"]
    folders = {name: save_task(model_folder("llama"), tmp_path / name, seed, name.split()[0], labels)
               for seed, (name, labels) in enumerate(tasks.items())}  # fmt: skip
    alone = {name: trimtab.load_adapter(folder).predict(texts) for name, folder in folders.items()}
    (first, *others), scored = folders, []
    loaded = trimtab.load_adapter(folders[first], name=first)
    for name in others:
        loaded.load(folders[name], name)
    score = switching.score_mixed
    monkeypatch.setattr(trimtab.adapters.loaded, "score_mixed",
                        lambda *given: scored.append(score(*given)) or scored[-1])  # fmt: skip
    asked = [list(folders)[number % len(folders)] for number in (1, 0, 2, 1, 0)]
    for place, said in enumerate(loaded.predict(texts, asked)):
        wanted = alone[asked[place]][place]
        assert said.keys() == wanted.keys()
        if "regression" in asked[place]:
            assert said["prediction"] == pytest.approx(wanted["prediction"], abs=1e-5)
        elif "token" in asked[place]:
            assert said["prediction"] == wanted["prediction"]
            for ours, theirs in zip(said["probabilities"], wanted["probabilities"], strict=True):
                assert ours == pytest.approx(theirs, abs=1e-5)
        else:
            assert said["prediction"] == wanted["prediction"]
            assert said["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-5)
    assert scored[0] is not None  # in one pass, not one after the other
