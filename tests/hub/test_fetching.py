"""Hub ids, through the real `huggingface_hub` client, from a small Hub on this machine."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from samples import SHORT_TRAINING

LOCATE = """
import sys
from trimtab.data.reading import read_source
from trimtab.progress import Silent
from trimtab.sources import locate_model
print(len(read_source(sys.argv[1], Silent()).splits["train"].rows), locate_model(sys.argv[2], Silent()).is_local)
"""


def test_a_study_of_hub_ids_runs_and_goes_on_offline(hub, trimtab, tmp_path):
    """And a download that breaks off in its middle is had nevertheless."""
    flags = ["--model=small/llama", "--train-data=small/reviews", *SHORT_TRAINING]
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
