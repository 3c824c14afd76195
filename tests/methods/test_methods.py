"""Parameter counts that everybody knows, and targets found in every family."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config

from samples import tiny_config
from trimtab.engine.batches import Collator
from trimtab.engine.forward import choose_forward, use_stock_attention
from trimtab.engine.prepare import prepare_adapted
from trimtab.errors import MethodError, StudyError
from trimtab.methods import (
    attach_adapter,
    check_method,
    find_layers,
    find_target_modules,
    get_method,
    learning_rate_of,
    start_prefix,
)
from trimtab.study_config import build_study
from trimtab.support import build_tiny_model, head_names, small_study
from trimtab.tasks import get_task
from trimtab.tasks.examples import Example
from trimtab.tasks.heads import backbone_of


def test_gpt2_lora_counts(capsys):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config())
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=find_target_modules(model, "auto"), fan_in_fan_out=True)
    get_peft_model(model, config).print_trainable_parameters()
    assert (
        capsys.readouterr().out.strip() == "trainable params: 294,912 || all params: 124,734,720 || trainable%: 0.2364"
    )


def test_mt0_large_lora_count():
    from transformers import AutoModelForSeq2SeqLM, MT5Config

    config = MT5Config(d_model=1024, d_kv=64, d_ff=2816, num_layers=24, num_decoder_layers=24, num_heads=16,
                       vocab_size=250112)  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(config)
        peft_model = get_peft_model(
            model, LoraConfig(task_type="SEQ_2_SEQ_LM", r=8, target_modules=find_target_modules(model, "auto"))
        )
    assert peft_model.get_nb_trainable_parameters()[0] == 2_359_296


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("bert", ["query", "value"]),
        ("roberta", ["query", "value"]),
        ("xlm-roberta", ["query", "value"]),
        ("electra", ["query", "value"]),
        ("albert", ["query", "value"]),
        ("distilbert", ["q_lin", "v_lin"]),
        ("modernbert", ["Wqkv"]),
        ("gpt2", ["c_attn"]),
        ("llama", ["q_proj", "v_proj"]),
        ("qwen2", ["q_proj", "v_proj"]),
        ("qwen3", ["q_proj", "v_proj"]),
        ("mistral", ["q_proj", "v_proj"]),
        ("gemma2", ["q_proj", "v_proj"]),
        ("gemma3", ["q_proj", "v_proj"]),
        ("phi3", ["qkv_proj"]),
        ("opt", ["q_proj", "v_proj"]),
        ("gpt_neox", ["query_key_value"]),
        ("olmo2", ["q_proj", "v_proj"]),
        ("smollm3", ["q_proj", "v_proj"]),
    ],
)
def test_auto_targets(tiny_model, family, expected):
    model = tiny_model(family)
    assert find_target_modules(model, "auto") == expected
    adapted = attach_adapter(model, build_study({}), [])
    assert any("lora_A" in name for name, parameter in adapted.named_parameters() if parameter.requires_grad)


def test_auto_targets_of_granite_and_t5():
    from transformers import AutoModel, T5Config

    granite = AutoModel.from_config(tiny_config("granite"))
    assert find_target_modules(granite, "auto") == ["q_proj", "v_proj"]
    t5 = AutoModel.from_config(T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, vocab_size=50))
    assert find_target_modules(t5, "auto") == ["q", "v"]


def test_named_targets_and_rates(tiny_model):
    assert find_target_modules(tiny_model("llama"), "k_proj, o_proj") == ["k_proj", "o_proj"]
    assert find_target_modules(tiny_model("llama"), "all-linear") == "all-linear"
    rate = get_method("lora").learning_rate
    assert learning_rate_of(build_study({}), tiny_model("llama")) == rate
    assert learning_rate_of(build_study({"learning_rate": 1e-3}), tiny_model("llama")) == 1e-3
    wide = tiny_model("llama", hidden_size=768, num_hidden_layers=6)
    assert learning_rate_of(build_study({}), wide) == pytest.approx(rate / 2)
    deep = tiny_model("gpt2", n_embd=384, n_layer=24)
    assert learning_rate_of(build_study({}), deep) == pytest.approx(rate / 4)
    both = SimpleNamespace(config=GPT2Config(n_embd=3072, n_layer=48))
    assert learning_rate_of(build_study({}), both) == pytest.approx(rate / 20)
    with pytest.raises(StudyError, match=r"unknown method 'dorra'; did you mean 'dora'\?"):
        get_method("dorra")


@pytest.mark.parametrize(
    ("wanted", "layers"),
    [("all", None), ("upper-half", [3, 4, 5]), ("upper-quarter", [5]), ("2-4", [2, 3, 4]), ("0", [0])],
)
def test_layers_by_word_or_range(tiny_model, wanted, layers):
    model = tiny_model("llama", num_hidden_layers=6)
    assert find_layers(model, wanted) == layers
    adapted = attach_adapter(model, build_study({"layers_to_transform": wanted}), [])
    found = {int(name.split("layers.")[1].split(".")[0]) for name, _ in adapted.named_modules() if "lora_A." in name}
    assert sorted(found) == (layers or list(range(6)))


@pytest.mark.parametrize("wanted", ["upper", "6", "4-2", "3-9", "-1", ""])
def test_layers_that_are_not_there(tiny_model, wanted):
    with pytest.raises(StudyError, match=f"'{wanted}' is no choice of the layers 0 to 5"):
        find_layers(tiny_model("bert", num_hidden_layers=6), wanted)


def test_all_linears_of_some_layers(tiny_model):
    settings = {"layers_to_transform": "1", "target_modules": "all-linear"}
    adapted = attach_adapter(tiny_model("llama"), build_study(settings), [])
    names = {name.split("layers.")[1] for name, _ in adapted.named_modules() if name.endswith("lora_A")}
    assert len(names) == 7
    assert all(name.startswith("1.") for name in names)


def test_layers_without_numbers(tiny_model):
    with pytest.raises(StudyError, match="the layers of AlbertForSequenceClassification are not numbered"):
        attach_adapter(tiny_model("albert"), build_study({"layers_to_transform": "1"}), [])


def test_a_method_without_layers_says_so(tiny_model):
    with pytest.raises(StudyError, match="goes to all layers"):
        attach_adapter(tiny_model("llama"), build_study({"method": "ia3", "layers_to_transform": "upper-half"}), [])


@pytest.mark.parametrize(
    ("family", "head"),
    [("BERT", ["classifier.weight", "classifier.bias"]), ("Llama", ["score.weight"]),
     ("RoBERTa", ["classifier.out_proj.weight", "classifier.out_proj.bias"])],
)  # fmt: skip
def test_a_linear_probe_trains_the_last_linear_alone(family, head):
    model = build_tiny_model(get_task("classification"), family)
    probe = attach_adapter(model, build_study({"method": "linear_probe"}), head_names(model))
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == head
    trainable, total = probe.get_nb_trainable_parameters()
    assert trainable == sum(model.get_parameter(name).numel() for name in head) < total


def test_a_linear_probe_needs_a_new_head():
    study = build_study({"method": "linear_probe", "task": "causal_lm"})
    with pytest.raises(MethodError, match=r"linear_probe cannot do causal_lm: it trains a new head, .*what can: lora"):
        check_method(lambda: build_tiny_model(get_task("causal_lm"), "Llama"), study)


@pytest.mark.parametrize("family", ["GPT-2", "Llama", "Qwen2", "Mistral"])
def test_a_prefix_starts_as_a_real_text_does(family):
    task = get_task("causal_lm")
    model = build_tiny_model(task, family)
    beginning, rest = [5, 9, 17, 33], [7, 8, 44, 51, 12]
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([beginning + rest])).logits[0, len(beginning) :]
    choice = choose_forward(model, 0, 16, False)
    peft_model = attach_adapter(model, small_study("prefix_tuning", "causal_lm"), [])
    forward = prepare_adapted(peft_model, choice).forward
    start_prefix(peft_model, backbone_of(model), beginning)
    example = Example(rest, None, list(range(len(rest))), rest)
    with torch.no_grad():
        ours = forward.logits(Collator([example], False, 0, 0).collate([0]))
    assert torch.allclose(ours, whole, atol=1e-5)


def test_an_encoder_keeps_a_random_prefix():
    model = build_tiny_model(get_task("classification"), "BERT")
    peft_model = attach_adapter(model, small_study("prefix_tuning", "classification"), head_names(model))
    prompt = peft_model.prompt_encoder.default.embedding.weight.clone()
    use_stock_attention(model)
    start_prefix(peft_model, backbone_of(model), [5, 9, 17, 33])
    assert torch.equal(peft_model.prompt_encoder.default.embedding.weight, prompt)
