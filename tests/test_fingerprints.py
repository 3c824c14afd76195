"""What tells one base from another."""

import os
import shutil

import torch


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
