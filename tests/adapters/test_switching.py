"""Several adapters around one base: each answers as it does alone, in one batch too, and goes without a trace."""

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import trimtab
from samples import run_here, write_reviews
from trimtab.adapters import switching
from trimtab.engine import lora
from trimtab.engine.mixed import mix_of
from trimtab.errors import AdapterError
from trimtab.runs import RunFolder
from trimtab.sampling import Sampling
from trimtab.study_config import build_study

TEXTS = [
    "a joy to watch",
    "a dull mess truly truly",
    "the worst film of the year",
    "warm, funny and wise",
    "weak acting",
]
TARGETS = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"], "mpnet": ["q", "v"], "gpt2": ["c_attn"]}


def save_stock(base_folder, folder, seed, labels, targets, **settings):
    """An adapter with random weights and head, as stock peft writes it."""
    torch.manual_seed(seed)
    base = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=labels)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=targets, init_lora_weights=False, **settings)
    model = get_peft_model(base, config)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def three(model_folder, tmp_path):
    """The folders of adapters with 3, 5 and 2 labels; the last one reaches more layers, with another rank."""

    def make(family):
        base, targets = model_folder(family), TARGETS[family]
        wider = {"llama": [*targets, "o_proj", "down_proj"], "gpt2": [*targets, "c_proj"]}.get(family, targets)
        return {
            "three": save_stock(base, tmp_path / "three", 1, 3, targets, r=4),
            "five": save_stock(base, tmp_path / "five", 2, 5, targets, r=4),
            "two": save_stock(base, tmp_path / "two", 3, 2, wider, r=8),
        }

    return make


def load_all(folders):
    names = list(folders)
    loaded = trimtab.load_adapter(folders[names[0]], name=names[0])
    for name in names[1:]:
        loaded.load(folders[name], name)
    return loaded


def close(ours, theirs):
    assert ours["prediction"] == theirs["prediction"]
    assert ours["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "mpnet"])  # fused, fused, packed and padded
def test_each_answers_in_one_batch_as_it_does_alone(three, family):
    folders = three(family)
    alone = {name: trimtab.load_adapter(folder).predict(TEXTS) for name, folder in folders.items()}
    loaded = load_all(folders)
    assert loaded.names == ["three", "five", "two"]
    assert loaded.active == "three"
    asked = ["five", "two", "three", "five", "two"]
    for place, said in enumerate(loaded.predict(TEXTS, asked)):
        close(said, alone[asked[place]][place])
    for name in folders:  # and one after the other
        loaded.switch(name)
        assert len(loaded.label_names) == {"three": 3, "five": 5, "two": 2}[name]
        for said, wanted in zip(loaded.predict(TEXTS), alone[name], strict=True):
            close(said, wanted)


def test_a_mixed_batch_takes_one_pass(three, monkeypatch):
    loaded = load_all(three("llama"))
    passes = []
    states = type(loaded.scorer.choice.forward).states
    monkeypatch.setattr(type(loaded.scorer.choice.forward), "states",
                        lambda forward, batch: passes.append(batch) or states(forward, batch))  # fmt: skip
    loaded.predict(TEXTS, ["five", "two", "three", "five", "two"])
    assert [len(batch.rows) for batch in passes] == [5]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mpnet"])  # fused, packed and padded
def test_many_units_of_an_adapter_and_many_batches_are_mixed_as_each_alone(three, family, monkeypatch):
    """More tokens of an adapter than one chunk holds (rows, where texts are padded), in more than one pass."""
    loaded = load_all(three(family))
    texts = [" ".join([TEXTS[number % 5]] * (1 + number % 9)) + f" number {number}" for number in range(120)]
    asked = [loaded.names[number * number % 3] for number in range(120)]  # two, in shares that differ
    asked[:3] = loaded.names
    passes = []
    monkeypatch.setattr(switching, "mix_of", lambda *given: passes.append(mix_of(*given)) or passes[-1])
    monkeypatch.setattr(switching, "SCORING_TOKENS_PER_BATCH", 2048)
    mixed = loaded.predict(texts, asked)
    assert len(passes) > 1
    assert any(len(mix.names) > 1 and mix.chunks.adapters.bincount().max() > 1 for mix in passes)
    monkeypatch.undo()
    for name in loaded.names:
        loaded.switch(name)
        mine = [place for place, other in enumerate(asked) if other == name]
        for place, said in zip(mine, loaded.predict([texts[place] for place in mine]), strict=True):
            close(mixed[place], said)


def test_no_step_reads_the_base_again(three, monkeypatch):
    """Its weights stay where they are, whatever joins them, answers and goes."""
    folders = three("llama")
    loaded = trimtab.load_adapter(folders["three"], name="three")

    def places():
        return {name.replace(".base_layer", ""): parameter.data_ptr()
                for name, parameter in loaded.peft_model.get_base_model().named_parameters()
                if not any(part in name for part in ("lora_", "modules_to_save"))}  # fmt: skip

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", None)
    before = places()
    assert len(before) > 15
    loaded.load(folders["five"], "five")
    loaded.load(folders["two"], "two")
    for name in ("five", "two", "three"):
        loaded.switch(name)
        loaded.predict(TEXTS)
        assert places() == before
    loaded.predict(TEXTS, ["five", "two", "three", "five", "two"])
    for name in ("five", "two"):
        loaded.unload(name)
    assert places() == before


def test_the_base_has_no_answer_to_other_labels_than_its_heads(three):
    loaded = load_all(three("llama"))
    loaded.switch("five")
    with (
        pytest.raises(
            AdapterError, match="the base's head was made for 3 labels, and 'five' says 5; switch to an adapter of as"
        ),
        loaded.disable(),
    ):
        pytest.fail("the base cannot say these labels")
    assert len(loaded.predict(TEXTS[:1])[0]["probabilities"]) == 5
    loaded.switch("three")
    with loaded.disable():
        assert len(loaded.predict(TEXTS[:1])[0]["probabilities"]) == 3


def test_layers_that_cannot_mix_answer_one_adapter_after_the_other(model_folder, tmp_path):
    folders = {}
    for number, name in enumerate(("first", "second")):
        torch.manual_seed(number)
        base = AutoModelForSequenceClassification.from_pretrained(model_folder("llama"), num_labels=2 + number)
        config = IA3Config(task_type="SEQ_CLS", target_modules=["k_proj"], feedforward_modules=[])
        model = get_peft_model(base, config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "ia3_l" in key:
                    parameter.uniform_(0.5, 2.0)
        model.save_pretrained(tmp_path / name)
        folders[name] = tmp_path / name
    alone = {name: trimtab.load_adapter(folder).predict(TEXTS) for name, folder in folders.items()}
    loaded = load_all(folders)
    asked = ["first", "second", "first", "second", "second"]
    for place, said in enumerate(loaded.predict(TEXTS, asked)):
        close(said, alone[asked[place]][place])
    assert loaded.active == "first"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_mix_as_each_adapter_alone(three, model_folder, family):
    """The mixed product against stock peft's, over layers of other ranks and targets, packed and padded."""
    loaded = load_all(three(family))
    assert lora.can_mix(loaded.peft_model, loaded.names)
    examples = [example for name in loaded.names for example in loaded._scorer_of(name).encode(
        [trimtab.adapters.loaded.Row(str(n), text) for n, text in enumerate(TEXTS)]).examples]  # fmt: skip
    asked = [name for name in loaded.names for _ in TEXTS]
    pad = loaded.scorer.base.tokenizer.pad_token_id
    mixed = switching.score_mixed(loaded.peft_model, loaded.scorer.choice, examples, asked, pad)
    tokenizer = AutoTokenizer.from_pretrained(model_folder(family))
    for name, place in (("five", 5), ("two", 10)):
        base = AutoModelForSequenceClassification.from_pretrained(
            model_folder(family), num_labels=len(loaded.known[name].facts["label_names"])
        )
        stock = PeftModel.from_pretrained(base, loaded.known[name].path).eval()
        with torch.no_grad():
            wanted = stock(**tokenizer(TEXTS[0], return_tensors="pt")).logits
        assert torch.allclose(mixed[place], wanted, atol=1e-5)


def test_unloading_leaves_no_trace(three):
    folders = three("llama")
    loaded = load_all(folders)
    alone = trimtab.load_adapter(folders["three"])
    wanted = alone.predict(TEXTS)
    loaded.switch("two")
    loaded.unload("two")
    assert loaded.active == "three"
    loaded.unload("five")
    assert loaded.names == ["three"]
    assert not [key for key in loaded.peft_model.state_dict() if ".five." in key or ".two." in key]
    for said, once in zip(loaded.predict(TEXTS), wanted, strict=True):
        close(said, once)
    with pytest.raises(AdapterError, match="'three' is the only adapter here"):
        loaded.unload("three")
    loaded.load(folders["five"], "five")  # and back again
    assert len(loaded.predict(TEXTS[:1], ["five"])[0]["probabilities"]) == 5


def test_the_base_alone_is_the_base_to_the_bit(three, model_folder):
    loaded = load_all(three("llama"))
    state = AutoModelForSequenceClassification.from_pretrained(model_folder("llama")).state_dict()
    with loaded.disable():
        for name, parameter in loaded.peft_model.get_base_model().named_parameters():
            plain = name.replace(".base_layer", "")
            if plain in state and "score" not in plain:
                assert torch.equal(parameter, state[plain])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda loaded, folders: loaded.switch("fvie"), "no adapter 'fvie' is loaded; did you mean 'five'"),
        (lambda loaded, folders: loaded.load(folders["five"], "five"), "named 'five' is loaded already"),
        (lambda loaded, folders: loaded.load(folders["five"], "a.b"), "'a.b' cannot name an adapter: no dots"),
        (lambda loaded, folders: loaded.load(folders["five"].parent, "gone"), r"holds no adapter_model.safetensors"),
        (lambda loaded, folders: loaded.predict(TEXTS, ["five"]), "1 adapters for 5 texts; give one for each"),
        (lambda loaded, folders: loaded.predict(TEXTS[:1], ["none"]), "no adapter 'none' is loaded"),
        (lambda loaded, folders: loaded.combine({"three": 0.5, "five": 0.5}, "both"), "say other labels"),
        (lambda loaded, folders: loaded.combine({"three": 1.0}, "c", "ties"), "say how much: density"),
        (lambda loaded, folders: loaded.combine({"three": 1.0}, "c", "ties", 2.0), "density is 2.0; above 0"),
        (lambda loaded, folders: loaded.combine({"three": 0.0}, "c"), "the weights add up to 0"),
        (
            lambda loaded, folders: loaded.combine({"three": 1.0}, "c", "magic"),
            "no combination type 'magic'; one of: linear, svd",
        ),
    ],
)
def test_what_cannot_be_is_told_and_changes_nothing(three, call, message):
    folders = three("llama")
    loaded = load_all(folders)
    before = loaded.predict(TEXTS)
    with pytest.raises(AdapterError, match=message):
        call(loaded, folders)
    assert loaded.names == ["three", "five", "two"]
    assert loaded.predict(TEXTS) == before


def test_other_methods_and_kinds_of_heads_are_refused(three, model_folder, tmp_path):
    loaded = load_all(three("llama"))
    base = AutoModelForSequenceClassification.from_pretrained(model_folder("llama"), num_labels=2)
    get_peft_model(base, IA3Config(task_type="SEQ_CLS", target_modules=["k_proj"], feedforward_modules=[])
                   ).save_pretrained(tmp_path / "ia3")  # fmt: skip
    with pytest.raises(AdapterError, match="is IA3, and LORA is loaded; one base holds adapters of one method"):
        loaded.load(tmp_path / "ia3", "ia3")
    language = AutoModelForCausalLM.from_pretrained(model_folder("llama", "AutoModelForCausalLM"))
    get_peft_model(language, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
                   ).save_pretrained(tmp_path / "language")  # fmt: skip
    with pytest.raises(AdapterError, match="is a causal_lm adapter, which needs another kind of head"):
        loaded.load(tmp_path / "language", "language")


@pytest.mark.parametrize(
    ("kind", "density"),
    [("linear", None), ("svd", None), ("cat", None), ("ties", 0.5), ("ties_svd", 0.5), ("dare_linear", 0.5),
     ("dare_ties", 0.5), ("magnitude_prune", 0.5), ("dare_linear_svd", 0.5), ("dare_ties_svd", 0.5),
     ("magnitude_prune_svd", 0.5)],
)  # fmt: skip
def test_combinations_are_pefts_with_the_mean_head(model_folder, tmp_path, kind, density):
    targets = TARGETS["llama"]
    folders = {name: save_stock(model_folder("llama"), tmp_path / name, seed, 3, targets, r=4)
               for seed, name in enumerate(("first", "second"))}  # fmt: skip
    loaded = load_all(folders)
    weights = {"first": 0.75, "second": 0.25}
    loaded.combine(weights, "both", kind, density)
    assert loaded.active == "first"
    # The plain twin: peft alone, without heads to refuse.
    base = AutoModelForSequenceClassification.from_pretrained(model_folder("llama"), num_labels=3)
    stock = get_peft_model(base, LoraConfig(target_modules=targets, r=4), adapter_name="unused")
    for name in weights:
        config = LoraConfig.from_pretrained(folders[name])
        config.task_type = config.modules_to_save = None
        config.save_pretrained(folders[name])
        stock.load_adapter(folders[name], name)
    torch.manual_seed(0)
    stock.add_weighted_adapter(list(weights), list(weights.values()), "both", combination_type=kind, density=density)
    ours, theirs = loaded.peft_model.state_dict(), stock.state_dict()
    keys = [key for key in theirs if ".both." in key]
    assert len(keys) == 8
    for key in keys:
        assert torch.allclose(ours[key], theirs[key], atol=1e-6)
    heads = {
        name: ours[f"base_model.model.score.modules_to_save.{name}.weight"] for name in ("first", "second", "both")
    }
    assert torch.allclose(heads["both"], 0.75 * heads["first"] + 0.25 * heads["second"])
    assert loaded.facts.get("combined") is None
    loaded.switch("both")
    assert loaded.facts["combined"]["combination_type"] == kind
    with torch.no_grad():
        stock.set_adapter("both")
        stock.get_base_model().score.weight.copy_(heads["both"])
        tokenizer = AutoTokenizer.from_pretrained(model_folder("llama"))
        wanted = stock.eval()(**tokenizer(TEXTS[:1], return_tensors="pt")).logits.softmax(-1)[0]
    assert list(loaded.predict(TEXTS[:1])[0]["probabilities"].values()) == pytest.approx(wanted.tolist(), abs=1e-5)


def test_prompts_for_different_adapters_are_continued_in_one_batch(model_folder, tmp_path):
    folder, folders = model_folder("llama", "AutoModelForCausalLM"), {}
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS["llama"], init_lora_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4)
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / name)
        folders[name] = tmp_path / name
    prompts = ["the best film", "superb acting and a fine story truly", "a joy"]
    alone = {name: trimtab.load_adapter(place).generate(prompts, Sampling(8)) for name, place in folders.items()}
    loaded = load_all(folders)
    asked = ["second", "first", "second"]
    assert loaded.generate(prompts, Sampling(8), adapters=asked) == [alone[name][n] for n, name in enumerate(asked)]
    assert alone["first"] != alone["second"]


def test_adapters_of_other_bases_are_refused(model_folder, tmp_path):
    adapters = []
    for family in ("llama", "qwen2"):
        reviews = write_reviews(tmp_path / f"{family}.csv")
        run_here(build_study({"model": str(model_folder(family)), "train_data": str(reviews), "num_train_epochs": 1,
                              "tokens_per_batch": 256, "max_length_tokens": 32, "out": str(tmp_path / family)}))  # fmt: skip
        adapters.append(RunFolder(tmp_path / family).trial("lora", 0).adapter)
    loaded = trimtab.load_adapter(adapters[0])
    with pytest.raises(
        AdapterError, match=r"was trained on .*qwen2.* with SHA-256 .*, and the base that is loaded has"
    ):
        loaded.load(adapters[1], "other")
    assert loaded.names == ["default"]
