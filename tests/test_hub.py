"""Hub ids, through the real `huggingface_hub` client, from a small Hub on this machine."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from hub_server import HubServer
from samples import write_reviews

SETTINGS = ["--num-train-epochs=1", "--tokens-per-batch=128", "--max-length-tokens=32", "--learning-rate=0.01"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory, model_folder):
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(model_folder("llama"), root / "small" / "llama")
    gated = root / "small" / "gated"
    gated.mkdir()
    (gated / ".gated").touch()
    data = root / "datasets" / "small" / "reviews"
    data.mkdir(parents=True)
    write_reviews(data / "train.csv", 120)
    write_reviews(data / "test.csv", 60, seed=1)
    with HubServer(root) as server:
        yield server


@pytest.fixture
def trimtab(hub, tmp_path):
    """The command with this Hub as its Hub, and a cache of its own."""

    def run(*arguments, **variables):
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), **variables}
        command = [sys.executable, "-m", "trimtab", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    return run


def test_a_study_of_hub_ids_runs_and_goes_on_offline(hub, trimtab, tmp_path):
    flags = ["--model=small/llama", "--train-data=small/reviews", *SETTINGS]
    done = trimtab("run", *flags, f"--out={tmp_path / 'run'}", "--json")
    assert done.returncode == 0, done.stderr
    comparison = json.loads(done.stdout)
    assert comparison["data"]["test_rows"] == 60
    assert comparison["reload"]["passed"]
    got = [path for method, path in hub.requests if method == "GET"]
    assert any(path.startswith("/small/llama/resolve/") and path.endswith("/model.safetensors") for path in got)
    assert any(path.startswith("/datasets/small/reviews/resolve/") for path in got)

    asked = len(hub.requests)
    again = trimtab("run", *flags, f"--out={tmp_path / 'again'}", "--json", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert len(hub.requests) == asked
    assert json.loads(again.stdout)["data"]["sha256"] == comparison["data"]["sha256"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=small/nothing", "--train-data=small/reviews"], "model 'small/nothing' cannot be had from the Hub"),
        (["--model=small/gated", "--train-data=small/reviews"], "model 'small/gated' cannot be had from the Hub: 401"),
        (["--model=small/llama", "--train-data=small/nothing"], "data 'small/nothing' is neither a file or folder here"),
    ],
    ids=["no such model", "gated model", "no such data"],
)  # fmt: skip
def test_what_the_hub_does_not_give_is_one_clear_error(trimtab, tmp_path, flags, message):
    done = trimtab("run", *flags, *SETTINGS, f"--out={tmp_path / 'run'}")
    assert done.returncode == 2, done.stderr
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
