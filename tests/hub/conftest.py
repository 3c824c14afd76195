"""A small Hub on this machine, and the command and this process with it as their Hub."""

import os
import shutil
import subprocess
import sys

import pytest
from hub_server import HubServer

from samples import write_reviews


@pytest.fixture(scope="module")
def hub(tmp_path_factory, model_folder):
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(model_folder("llama"), root / "small" / "llama")
    (root / "small" / "llama" / "onnx").mkdir()
    for name in (".gitattributes", "pytorch_model.bin", "onnx/model.onnx", "demo.png"):  # as real repositories hold
        (root / "small" / "llama" / name).write_bytes(b"not asked for")
    gated = root / "small" / "gated"
    gated.mkdir()
    (gated / ".gated").touch()
    (root / "small" / "empty").mkdir()
    data = root / "datasets" / "small" / "reviews"
    data.mkdir(parents=True)
    write_reviews(data / "train.csv", 120)
    write_reviews(data / "test.csv", 60, seed=1)
    other = root / "datasets" / "small" / "reviews@v2"
    other.mkdir()
    write_reviews(other / "train.csv", 50, labels=("fresh", "rotten"))
    gated_data = root / "datasets" / "small" / "gated"
    gated_data.mkdir()
    (gated_data / ".gated").touch()
    shutil.copytree(model_folder("bert"), root / "small" / "llama@v2")
    with HubServer(root) as server:
        yield server


@pytest.fixture
def trimtab(hub, tmp_path):
    """The command with this Hub as its Hub, and a cache of its own."""

    def run(*arguments, program=("-m", "trimtab"), **variables):
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", **variables}
        command = [sys.executable, *program, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    return run


@pytest.fixture
def here(hub, tmp_path, monkeypatch):
    """This process with that Hub as its Hub, and a cache of its own."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    for name in ("HUGGINGFACE_CO_URL_TEMPLATE",):
        monkeypatch.setattr(constants, name, hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    return hub


@pytest.fixture
def impatient(monkeypatch):
    """The client waits longer before each of its tries."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.fixture
def finished_adapter(tmp_path, model_folder):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(model_folder("llama"))
    get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])).save_pretrained(tmp_path / "a")
    return tmp_path / "a"
