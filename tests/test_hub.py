"""Hub ids, through the real `huggingface_hub` client, from a small Hub on this machine."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hub_server import HubServer
from samples import run_here, run_trimtab, write_reviews
from trimtab import load_adapter
from trimtab.study_config import build_study

SETTINGS = ["--num-train-epochs=1", "--tokens-per-batch=128", "--max-length-tokens=32", "--learning-rate=0.01"]


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


LOCATE = """
import sys
from trimtab.data.reading import read_source
from trimtab.progress import Silent
from trimtab.sources import locate_model
print(len(read_source(sys.argv[1], Silent()).splits["train"].rows), locate_model(sys.argv[2], Silent()).is_local)
"""


def test_a_study_of_hub_ids_runs_and_goes_on_offline(hub, trimtab, tmp_path):
    """And a download that breaks off in its middle is had nevertheless."""
    flags = ["--model=small/llama", "--train-data=small/reviews", *SETTINGS]
    hub.cut_once.add("model.safetensors")
    done = trimtab("run", *flags, f"--out={tmp_path / 'run'}", "--json")
    assert done.returncode == 0, done.stderr
    comparison = json.loads(done.stdout)
    assert comparison["data"]["test_rows"] == 60
    assert comparison["reload"]["passed"]
    got = [path for method, path in hub.requests if method == "GET"]
    assert any(path.startswith("/small/llama/resolve/") and path.endswith("/model.safetensors") for path in got)
    assert any(path.startswith("/datasets/small/reviews/resolve/") for path in got)
    assert not hub.cut_once

    asked = len(hub.requests)
    again = trimtab("small/reviews", "small/llama", program=["-c", LOCATE])
    assert again.stdout.split() == ["120", "True"], again.stderr
    assert [path for _, path in hub.requests[asked:] if "small" in path] == []  # what is here is not asked for again
    asked = len(hub.requests)
    offline = trimtab("small/reviews", "small/llama", program=["-c", LOCATE], HF_HUB_OFFLINE="1")
    assert offline.stdout == again.stdout, offline.stderr
    assert len(hub.requests) == asked
    assert not any(path.endswith((".bin", ".onnx", ".png", ".gitattributes")) for _, path in hub.requests)


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


def test_a_revision_is_pinned(here):
    from trimtab.fingerprints import fingerprint_model
    from trimtab.models import load_config
    from trimtab.progress import Silent
    from trimtab.sources import locate_model

    main, pinned = (locate_model(name, Silent()) for name in ("small/llama@main", "small/llama@v2"))
    kinds = [load_config(source).model_type for source in (main, pinned)]
    assert kinds == ["llama", "bert"]
    assert fingerprint_model(main) != fingerprint_model(pinned)


READ = """
import sys
from trimtab.data.reading import read_source
from trimtab.progress import Silent
print([sorted({row["label"] for row in read_source(name, Silent()).splits["train"].rows}) for name in sys.argv[1:]])
"""


def test_data_of_a_revision_are_those_of_that_revision(trimtab, hub):
    """Without a network, too, where `datasets` by itself gives what it fetched last."""
    done = trimtab("small/reviews", "small/reviews@v2", program=["-c", READ])
    assert "[['bad', 'good'], ['fresh', 'rotten']]" in done.stdout, done.stderr
    asked = len(hub.requests)
    again = trimtab("small/reviews", "small/reviews@v2", program=["-c", READ], HF_HUB_OFFLINE="1")
    assert again.stdout == done.stdout, again.stderr
    assert len(hub.requests) == asked
    for other in (f"small/reviews@{'0' * 40}", "small/reviews@v9"):
        refused = trimtab(other, program=["-c", READ], HF_HUB_OFFLINE="1")
        assert "nor to be had from the Hub: HF_HUB_OFFLINE is set" in refused.stderr
    down = trimtab("small/reviews@v9", program=["-c", READ], HF_ENDPOINT="http://127.0.0.1:9")
    assert "nor to be had from the Hub" in down.stderr, down.stdout


def test_what_datasets_kept_is_read_offline_where_its_card_tells_the_revision(trimtab, hub):
    for name in ("carded", "carded@v2"):
        shutil.copytree(hub.root / "datasets" / "small" / name.replace("carded", "reviews"),
                        hub.root / "datasets" / "small" / name)  # fmt: skip
        (hub.root / "datasets" / "small" / name / "README.md").write_text("Reviews.")
    fetch = "import datasets, sys; datasets.load_dataset('small/carded', revision=sys.argv[1])"
    for revision in ("main", "v2"):
        done = trimtab(revision, program=["-c", fetch])
        assert done.returncode == 0, done.stderr
    found = trimtab("small/carded@v2", program=["-c", READ], HF_HUB_OFFLINE="1")
    assert "[['fresh', 'rotten']]" in found.stdout, found.stderr
    other = trimtab("small/carded", program=["-c", READ], HF_HUB_OFFLINE="1")
    assert "fresh" not in other.stdout, other.stdout


@pytest.fixture
def impatient(monkeypatch):
    """The client waits longer before each of its tries."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def test_a_hub_that_breaks_off_for_good_is_one_clear_error(here, impatient):
    from trimtab.errors import SourceError
    from trimtab.progress import Silent
    from trimtab.sources import locate_model

    here.cut_always.add("model.safetensors")
    try:
        with pytest.raises(SourceError, match=r"model 'small/llama@main' cannot be had from the Hub: .*; try again"):
            locate_model("small/llama@main", Silent())
    finally:
        here.cut_always.clear()
    assert locate_model("small/llama@main", Silent()).is_local


def test_a_hub_that_is_not_there_is_one_clear_error(here, impatient, monkeypatch):
    from trimtab.errors import SourceError
    from trimtab.progress import Silent
    from trimtab.sources import locate_model

    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nowhere)
    url = nowhere + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url)
    with pytest.raises(SourceError, match="neither a folder here nor in the Hub cache, and the Hub cannot be reached"):
        locate_model("small/llama", Silent())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "cannot be had from the Hub: 404, no such repository, or a private one; check the name"),
        ("gated", "cannot be had from the Hub: 401, its owner gives access on request; ask for it on its page, then log in "
                  "with `hf auth login`, or set HF_TOKEN"),
        ("llama@v9", "cannot be had from the Hub: 404, it has no revision 'v9'"),
        ("empty", "cannot be had from the Hub: 404, it holds no config.json, so it is no model"),
    ],
)  # fmt: skip
def test_a_model_or_adapter_that_the_hub_does_not_give_is_one_clear_error(here, name, message):
    from trimtab.errors import SourceError
    from trimtab.progress import Silent
    from trimtab.sources import locate_adapter, locate_model

    with pytest.raises(SourceError, match=re.escape(f"model 'small/{name}' {message}")):
        locate_model(f"small/{name}", Silent())
    if name != "empty":
        with pytest.raises(SourceError, match=re.escape(f"adapter 'small/{name}' {message}")):
            locate_adapter(f"small/{name}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "404, no such repository, or a private one"),
        ("gated", "401, its owner gives access on request"),
        ("reviews@v9", "404, it has no revision 'v9'"),
    ],
)
def test_data_that_the_hub_does_not_give_are_one_clear_error(here, name, message):
    from trimtab.data.hub import load_hub_data
    from trimtab.errors import SourceError

    with pytest.raises(SourceError, match=f"data 'small/{name}' is neither .* to be had from the Hub: {message}"):
        load_hub_data(f"small/{name}")


def test_such_an_error_ends_the_command(trimtab, tmp_path):
    done = trimtab("run", "--model=small/gated", "--train-data=small/reviews", f"--out={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "model 'small/gated' cannot be had from the Hub: 401" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_an_adapter_that_lies_here_whole_is_not_asked_for_again(here, finished_adapter):
    from trimtab.sources import locate_adapter

    there = here.root / "small" / "kept"
    shutil.copytree(finished_adapter, there)
    shutil.copytree(finished_adapter, here.root / "small" / "kept@v2")
    (here.root / "small" / "kept@v2" / "README.md").write_text("the second one")
    folder, other = locate_adapter("small/kept"), locate_adapter("small/kept@v2")
    assert (other / "README.md").read_text() == "the second one"
    asked = len(here.requests)
    assert locate_adapter("small/kept") == folder
    assert locate_adapter(f"small/kept@{other.name}") == other  # a commit never moves
    assert len(here.requests) == asked
    (folder / "adapter_model.safetensors").unlink()
    assert (locate_adapter("small/kept") / "adapter_model.safetensors").is_file()
    assert len(here.requests) > asked


def test_a_fingerprint_is_kept_until_the_weights_change(tmp_path, model_folder, monkeypatch):
    from trimtab import fingerprints, sources
    from trimtab.progress import Silent

    folder = shutil.copytree(model_folder("llama"), tmp_path / "base")
    weights = folder / "model.safetensors"
    before = (1_600_000_000_000_000_000,) * 2
    os.utime(weights, ns=before)
    source = sources.locate_model(str(folder), Silent())
    monkeypatch.setattr(fingerprints, "_SETTLED_SECONDS", -1.0)  # or the copy is too fresh to be trusted
    found = fingerprints.fingerprint_model(source)
    with monkeypatch.context() as context:
        context.delattr(fingerprints, "_fingerprint_weights")
        assert fingerprints.fingerprint_model(source) == found
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=before)  # the same size and time: the time of the inode's change tells
    assert fingerprints.fingerprint_model(source) != found


def test_a_base_in_other_shards_is_the_same_base(tmp_path, model_folder):
    from transformers import AutoModelForSequenceClassification

    from trimtab.fingerprints import fingerprint_model
    from trimtab.progress import Silent
    from trimtab.sources import locate_model

    whole = locate_model(str(model_folder("llama")), Silent())
    model = AutoModelForSequenceClassification.from_pretrained(whole.location)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    places = [locate_model(str(tmp_path / name), Silent()) for name in ("whole", "shards")]
    assert fingerprint_model(places[0]) == fingerprint_model(places[1])
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-6
    model.save_pretrained(tmp_path / "other", max_shard_size="20KB")
    assert fingerprint_model(locate_model(str(tmp_path / "other"), Silent())) != fingerprint_model(places[0])


def test_a_broken_download_goes_on_where_it_broke_off(here):
    """The client keeps whole chunks of ten megabytes, and asks for what comes after them."""
    from trimtab.progress import Silent
    from trimtab.sources import locate_model

    folder = here.root / "small" / "large"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    content = os.urandom(24 << 20)
    (folder / "model.safetensors").write_bytes(content)
    here.cut_once.add("model.safetensors")
    source = locate_model("small/large@main", Silent())
    assert here.resumed[-1] == ("model.safetensors", 10 << 20)
    assert Path(source.location, "model.safetensors").read_bytes() == content


def test_shards_of_an_interrupted_fetch_are_completed_and_then_never_asked_for_again(here):
    from trimtab.progress import Silent
    from trimtab.sources import locate_model, weight_files

    folder = here.root / "small" / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    shards = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    for shard in shards:
        (folder / shard).write_bytes(os.urandom(100))
    (folder / "tokenizer.json").write_text("{}")
    from huggingface_hub import hf_hub_download

    hf_hub_download("small/sharded", shards[0])  # and there the fetch was interrupted
    source = locate_model("small/sharded", Silent())
    assert not source.is_local
    assert [path.name for path in weight_files(source)] == shards
    asked = len(here.requests)
    again = locate_model("small/sharded", Silent())
    assert again.is_local
    assert (again.hub_id, again.commit) == ("small/sharded", Path(again.location).name)
    assert [path.name for path in weight_files(again)] == shards
    assert len(here.requests) == asked
    next(Path(again.location).glob("tokenizer.json")).unlink()  # another that did not come
    assert not locate_model("small/sharded", Silent()).is_local


def test_an_adapter_goes_to_the_hub_and_comes_back(hub, here, trimtab, tmp_path, monkeypatch):
    from trimtab.errors import AdapterError

    data = write_reviews(tmp_path / "reviews.csv", 120)
    done = trimtab(
        "run",
        "--model=small/llama",
        f"--train-data={data}",
        *SETTINGS,
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
    flags = ["--model=small/moving", f"--train-data={data}", *SETTINGS, f"--out={tmp_path / 'run'}"]
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


@pytest.fixture
def finished_adapter(tmp_path, model_folder):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(model_folder("llama"))
    get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])).save_pretrained(tmp_path / "a")
    return tmp_path / "a"


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
