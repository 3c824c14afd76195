"""The end of a text is learnt, also where the tokenizer pads with that very token (SmolLM2, most of Llama's kin)."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.data import Row
from trimtab.engine.batches import Collator
from trimtab.engine.forward import PaddedForward, choose_forward
from trimtab.generation import Sampling, continue_prompts
from trimtab.tasks import get_task
from trimtab.tasks.causal_lm import encode_prompt, prompt_of

TASK = get_task("causal_lm")
MARKED = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
UNMARKED = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
CHAT = [{"role": "user", "content": "the best"}, {"role": "assistant", "content": "film of the year"}]
ROWS = {
    "text": Row("1", "a joy to watch"),
    "completion": Row("1", "the best film", completion="of the year"),
    "chat": Row("1", "", messages=CHAT),
    "chat without marks": Row("1", "", messages=CHAT),
}


@pytest.fixture
def tokenizer(model_folder):
    found = AutoTokenizer.from_pretrained(model_folder("llama", "AutoModelForCausalLM"))
    found.pad_token = found.eos_token
    assert found.pad_token_id == found.eos_token_id == 2
    return found


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ROWS)
def test_a_model_learns_to_stop(model_folder, tokenizer, kind, packed):
    """Two rows of unlike length, so that one is padded; after few steps the model writes what it read, and ends."""
    tokenizer.chat_template = UNMARKED if kind == "chat without marks" else MARKED
    other = Row("2", "painfully slow and loud number one", completion="weak acting" if kind == "completion" else None)
    encoded = TASK.encode([ROWS[kind], other], tokenizer, None, 32)
    first = encoded.examples[0]
    assert first.labels[-1] == tokenizer.eos_token_id

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama", "AutoModelForCausalLM")).eval()
    forward = choose_forward(model, tokenizer.pad_token_id, 32, False).forward if packed else PaddedForward(model)
    batch = Collator(encoded.examples, packed, 0, tokenizer.pad_token_id).collate([0, 1])
    assert (batch.labels == tokenizer.eos_token_id).sum() == sum(e.labels.count(2) for e in encoded.examples) >= 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        TASK.loss(forward, batch).backward()
        optimizer.step()

    prompt = encode_prompt(tokenizer, "the best", True) if "chat" in kind else prompt_of(first, 2)
    (written,) = continue_prompts(model, tokenizer, [prompt], Sampling(max_new_tokens=20))
    assert first.input_ids[: len(prompt)] == prompt
    expected = tokenizer.decode(first.input_ids[len(prompt) :], skip_special_tokens=True)
    assert written.split() == expected.split() != []
