"""What can befall an adapter folder: each is refused with the file and the reason, or changes nothing."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import trimtab
from samples import run_here, write_reviews
from trimtab.adapters import files
from trimtab.adapters.files import check_config, check_folder, write_facts
from trimtab.data import read_rows
from trimtab.errors import AdapterError, SourceError
from trimtab.runs import RunFolder
from trimtab.study_config import build_study

WEIGHTS, CONFIG, FACTS = "adapter_model.safetensors", "adapter_config.json", "trimtab.json"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("faults")
    run_here(build_study(
        {"model": str(model_folder("llama")), "train_data": str(write_reviews(folder / "reviews.csv")), "num_train_epochs": 1,
         "tokens_per_batch": 256, "max_length_tokens": 32, "out": str(folder / "run")}
    ))  # fmt: skip
    return RunFolder(folder / "run")


@pytest.fixture
def adapter(finished, tmp_path):
    return shutil.copytree(finished.trial("lora", 0).adapter, tmp_path / "adapter")


def files_of(adapter):
    """All that is read; the model card is for people."""
    return sorted(path for path in adapter.iterdir() if path.name != "README.md")


def refuse(adapter, message):
    with pytest.raises(AdapterError, match=message):
        check_folder(adapter)


def test_a_hundred_cuts_are_all_refused(adapter):
    generator = random.Random(0)
    for _ in range(100):
        path = generator.choice(files_of(adapter))
        content = path.read_bytes()
        path.write_bytes(content[: generator.randrange(len(content))])
        refuse(adapter, path.name)
        path.write_bytes(content)
    check_folder(adapter)


def test_a_hundred_flipped_bytes_are_all_refused(adapter):
    generator = random.Random(1)
    for _ in range(100):
        path = generator.choice(files_of(adapter))
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        refuse(adapter, path.name)
        path.write_bytes(content)
    check_folder(adapter)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, FACTS, "tokenizer.json"])
def test_every_byte_counts_at_both_ends(adapter, name):
    content = (adapter / name).read_bytes()
    for place in (0, 1, len(content) // 2, len(content) - 2):
        flipped = bytearray(content)
        flipped[place] ^= 4
        (adapter / name).write_bytes(flipped)
        refuse(adapter, name)


def change_weights(adapter, change):
    """Other tensors under hashes that fit, as another program would leave them."""
    weights = load_file(adapter / WEIGHTS)
    change(weights)
    save_file(weights, adapter / WEIGHTS, metadata={"format": "pt"})
    write_facts(adapter, json.loads((adapter / FACTS).read_text()))


def drop(weights, part):
    del weights[next(name for name in weights if part in name)]


def rename(weights):
    name = next(name for name in weights if "lora_B" in name)
    weights[name.replace("lora_B", "lora_C")] = weights.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: drop(weights, "lora_A"), r"1 tensors are missing \(.*lora_A"),
        (lambda weights: weights.update({"base_model.model.extra.weight": torch.ones(2)}), r"1 tensors have no place here \(.*extra"),
        (rename, r"1 tensors are missing \(.*lora_B"),
        (lambda weights: drop(weights, "score"), r"lacks what .* tells of, .*score\.weight"),
    ],
    ids=["dropped", "added", "renamed", "no head"],
)  # fmt: skip
def test_other_keys_are_refused(adapter, change, message):
    change_weights(adapter, change)
    with pytest.raises(AdapterError, match=message):
        trimtab.load_adapter(adapter)


def test_another_base_of_the_same_shapes_is_refused(adapter, model_folder, tmp_path):
    other = shutil.copytree(model_folder("llama"), tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file(
        {name: value + 1e-3 for name, value in weights.items()}, other / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(SourceError, match=r"is not the base of .*: its weights have SHA-256"):
        trimtab.load_adapter(adapter, base=str(other))


def change_config(adapter, **changes):
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | changes))
    write_facts(adapter, json.loads((adapter / FACTS).read_text()))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "MULTITASK_PROMPT_TUNING", "prompt_tuning_init_state_dict_path": "/etc/weights.bin"},
         "prompt_tuning_init_state_dict_path names files outside of the adapter"),
        ({"peft_type": "XLORA", "adapters": {"0": "../other"}}, "adapters names files outside of the adapter"),
        ({"peft_type": "P_TUNING", "encoder_hidden_size": 1 << 30}, "encoder_hidden_size is 1073741824; a whole number"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4096, "token_dim": 65536, "num_layers": 65536},
         "num_virtual_tokens times num_transformer_submodules times token_dim times num_layers is 17,592,186,044,416"),
    ],
)  # fmt: skip
def test_configs_name_no_other_files_and_no_huge_sizes(tmp_path, config, message):
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=message):
        check_config(tmp_path / CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_mapping": {"base_model_class": "X", "parent_library": "evil.code"}}, "auto_mapping names code in 'evil.code'"),
        ({"trust_remote_code": True}, "LORA has no field 'trust_remote_code'"),
        ({"r": 1_000_000}, "r is 1000000; a whole number between 1 and 4096 is expected"),
        ({"r": 0}, "r is 0; a whole number between 1 and 4096 is expected"),  # as OFT has it, where r means something else
        ({"r": "8"}, "r is '8'; a whole number between 1 and 4096 is expected"),
        ({"r": 1e6}, "r is 1000000.0; a whole number"),
        ({"rank_pattern": {"q_proj": 1_000_000}}, "rank_pattern of q_proj is 1000000; a whole number between 1 and 4096"),
        ({"layer_replication": [[0, 1]] * 5000}, "layer_replication asks for more than 4096 layers"),
        ({"layer_replication": [[0, 999_999]]}, "layer_replication asks for more than 4096 layers"),
        ({"layer_replication": 5}, "layer_replication is 5; pairs of layers are expected"),
        ({"auto_mapping": "evil.code"}, "auto_mapping names code in 'evil.code'"),
        ({"auto_mapping": ["evil.code"]}, r"auto_mapping names code in \['evil.code'\]"),
        ({"peft_type": ["LORA"]}, r"the installed peft has no method \['LORA'\]"),
        ({"lora_alpha": "x"}, "lacks what adapter_config.json tells of, or has it in another shape"),
        ({"layer_replication": [[0, 999]]}, "lacks what adapter_config.json tells of, or has it in another shape"),
        ({"eva_config": {"tokenizer": {"trust_remote_code": True}}}, "asks to run code that comes with a model"),
        ({"eva_config": [{"tokenizer": {"trust_remote_code": "yes"}}]}, "asks to run code that comes with a model"),
        ({"loftq_config": {"trust_remote_code": 1}}, "asks to run code that comes with a model"),
        ({"peft_type": "OS_SYSTEM"}, "the installed peft has no method 'OS_SYSTEM'"),
    ],
)  # fmt: skip
def test_configs_that_ask_for_more_than_an_adapter_needs(adapter, changes, message):
    change_config(adapter, **changes)
    with pytest.raises(AdapterError, match=message):
        trimtab.load_adapter(adapter)


def test_a_config_that_only_mentions_code_is_read(adapter):
    """Where it is off, or no more than a text."""
    change_config(adapter, eva_config={"trust_remote_code": False}, revision='with "trust_remote_code": true')
    check_config(adapter / CONFIG)


def test_a_pickle_in_place_of_safetensors(adapter):
    weights = load_file(adapter / WEIGHTS)
    (adapter / WEIGHTS).unlink()
    torch.save(weights, adapter / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model.bin: pickled weights may run code"):
        trimtab.load_adapter(adapter)
    torch.save(weights, adapter / WEIGHTS)  # and under the right name
    (adapter / "adapter_model.bin").unlink()
    write_facts(adapter, json.loads((adapter / FACTS).read_text()))
    with pytest.raises(AdapterError, match=rf"{WEIGHTS}: damaged or cut off"):
        trimtab.load_adapter(adapter)


def test_paths_that_climb_out(adapter, tmp_path):
    facts = json.loads((adapter / FACTS).read_text())
    (tmp_path / "outside.json").write_text("{}")
    known = facts | {"files": facts["files"] | {"../outside.json": files.hash_file(tmp_path / "outside.json")}}
    del known["sha256"]
    (adapter / FACTS).write_text(json.dumps(known | {"sha256": files._hash_facts(known)}))
    refuse(adapter, r"names '../outside.json', outside of the adapter")


@pytest.mark.parametrize("task", ["token_classification", "causal_lm", "cooking"])
def test_another_task_than_the_adapter_is_for(adapter, task):
    write_facts(adapter, json.loads((adapter / FACTS).read_text()) | {"task": task})
    with pytest.raises(
        AdapterError, match=rf"was saved for {task}, and its {CONFIG} is for SEQ_CLS; copy the folder again"
    ):
        trimtab.load_adapter(adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda known: known["files"].pop(WEIGHTS), f"holds no SHA-256 of {WEIGHTS}; do not use it"),
        (lambda known: known["files"].pop(CONFIG), f"holds no SHA-256 of {CONFIG}; do not use it"),
        (lambda known: known.pop("files"), "does not tell 'files'; copy the folder again"),
        (lambda known: known.pop("task"), "does not tell 'task'; copy the folder again"),
        (lambda known: known.update(label_names="good"), "does not tell 'label_names'; copy the folder again"),
        (lambda known: known.update(more="x" * (1 << 20)), "bytes, more than any needs; do not use it"),
    ],
)  # fmt: skip
def test_facts_that_leave_out_what_is_checked(adapter, change, message):
    """Signed anew, as somebody who wants a change not to be noticed would."""
    known = json.loads((adapter / FACTS).read_text())
    del known["sha256"]
    change(known)
    (adapter / FACTS).write_text(json.dumps(known | {"sha256": files._hash_facts(known)}))
    refuse(adapter, message)


@pytest.mark.parametrize("file", [CONFIG, FACTS])
def test_json_that_nests_without_end(adapter, file):
    (adapter / file).write_text("[" * 500_000)
    if file == CONFIG:
        write_facts(adapter, json.loads((adapter / FACTS).read_text()))
    refuse(adapter, f"{file} is not valid JSON")


def test_links_of_the_hubs_cache_lead_to_its_blobs_alone(adapter, tmp_path):
    repository = tmp_path / "models--a--b"
    there = shutil.copytree(adapter, repository / "snapshots" / "0123")
    (repository / "blobs").mkdir()
    (there / WEIGHTS).rename(repository / "blobs" / "weights")
    (there / WEIGHTS).symlink_to(repository / "blobs" / "weights")
    assert trimtab.load_adapter(there)
    (there / WEIGHTS).unlink()
    (repository / "blobs" / "weights").rename(repository / "weights")
    (there / WEIGHTS).symlink_to(repository / "weights")
    refuse(there, "outside of the adapter; copy the file itself")


def test_no_pad_token_gives_the_same_alone_as_in_a_batch(finished, model_folder, tmp_path):
    """A tokenizer without a padding token: its end token stands in, and nothing is read from there."""
    base = shutil.copytree(model_folder("llama"), tmp_path / "base")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (base / name).is_file():
            settings = json.loads((base / name).read_text())
            settings.pop("pad_token", None)
            (base / name).write_text(json.dumps(settings))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    run_here(build_study({"model": str(base), "train_data": str(write_reviews(tmp_path / "reviews.csv")), "num_train_epochs": 1,
                          "tokens_per_batch": 256, "max_length_tokens": 32, "out": str(tmp_path / "run")}))  # fmt: skip
    loaded = trimtab.load_adapter(RunFolder(tmp_path / "run").trial("lora", 0).adapter)
    assert loaded.scorer.base.tokenizer.pad_token == "[SEP]"
    texts = [row.text for row in read_rows(finished.test_rows)][:16]
    assert len(texts) == 16
    together = loaded.predict(texts)
    for text, said in zip(texts, together, strict=True):
        assert loaded.predict([text])[0]["probabilities"] == pytest.approx(said["probabilities"], abs=1e-5)
