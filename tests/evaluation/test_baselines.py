"""The linear probe on raw features is scikit-learn's on standardised ones, with and without a bias."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from trimtab.data import Row
from trimtab.evaluation.baselines import constant_outputs, fit_linear_probe, tfidf_outputs, word_tag_outputs
from trimtab.evaluation.linear_models import LINEAR_MODELS, best_fit


def make_features(classes, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=400)
    centres = generator.normal(size=(classes, 12))
    features = (centres[labels] + generator.normal(size=(400, 12))) * generator.uniform(0.1, 9, 12) + 5
    return torch.from_numpy(features).float(), labels


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("has_bias", [True, False])
def test_folded_probe_is_the_standardised_regression(classes, has_bias):
    features, labels = make_features(classes)
    probe = fit_linear_probe(
        "classification", features[:300], labels[:300], classes, features[300:], labels[300:], has_bias
    )
    assert (probe.bias is not None) == has_bias
    assert probe.weight.is_contiguous()
    scaler = StandardScaler(with_mean=has_bias).fit(features[:300].double().numpy())
    model = LogisticRegression(C=probe.strength, fit_intercept=has_bias, max_iter=5000, tol=1e-8)
    model.fit(scaler.transform(features[:300].double().numpy()), labels[:300])
    expected = model.predict_proba(scaler.transform(features[300:].double().numpy()))
    found = probe.outputs(features[300:]).softmax(-1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert (found.argmax(1) == labels[300:]).mean() > 0.6


def test_probes_of_labels_and_values_are_scikit_learns():
    features, labels = make_features(3)
    scaled = StandardScaler().fit_transform(features[:300].double().numpy())
    scaler = StandardScaler().fit(features[:300].double().numpy())
    held_out = scaler.transform(features[300:].double().numpy())
    marks = np.eye(4)[labels]  # the fourth label never applies
    probe = fit_linear_probe("multilabel", features[:300], marks[:300], 4, features[300:], marks[300:], True)
    said = probe.outputs(features[300:]).sigmoid().numpy()
    for column in range(3):
        model = LogisticRegression(C=probe.strength, max_iter=5000, tol=1e-8).fit(scaled, marks[:300, column])
        np.testing.assert_allclose(said[:, column], model.predict_proba(held_out)[:, 1], atol=1e-4)
    assert said[:, 3].max() < 0.01
    values = labels * 2.5 + 10.0
    probe = fit_linear_probe("regression", features[:300], values[:300], 1, features[300:], values[300:], True)
    model = Ridge(alpha=1 / probe.strength).fit(scaled, values[:300])
    np.testing.assert_allclose(probe.outputs(features[300:])[:, 0].numpy(), model.predict(held_out), atol=1e-3)


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_the_least_loss_is_kept_and_what_is_freer_is_not_tried(task):
    features, labels = make_features(3)
    features = np.concatenate([features.double().numpy(), np.random.default_rng(1).normal(size=(400, 60))], axis=1)
    labels = {"classification": labels, "multilabel": np.eye(3)[labels], "regression": labels * 1.0}[task]
    columns = 1 if task == "regression" else 3
    model, tried = LINEAR_MODELS[task], []

    def fit(*arguments):
        tried.append(model.fit(*arguments))
        return tried[-1]

    strengths = [10.0**power for power in range(-6, 5)]
    held_out = (features[80:], labels[80:])
    best = best_fit(model._replace(fit=fit), features[:80], labels[:80], columns, *held_out, strengths)
    losses = [model.loss(one.outputs(held_out[0]), held_out[1]) for one in tried]
    assert best is tried[-2]
    assert losses[-1] > losses[-2] == min(losses)
    assert [one.strength for one in tried] == strengths[: len(tried)]
    assert 2 < len(tried) < len(strengths)


def test_a_class_that_train_lacks_is_never_given():
    features, labels = make_features(3)
    labels = np.where(labels == 1, 3, labels)
    probe = fit_linear_probe(
        "token_classification", features[:300], labels[:300], 5, features[300:], labels[300:], True
    )
    assert probe.weight.shape == (5, 12)
    assert set(probe.outputs(features).argmax(-1).tolist()) == {0, 2, 3}


def test_constants_and_tfidf():
    train = [Row(str(i), ["fine film", "bad film"][i % 2], None, i % 2, None) for i in range(30)]
    train.append(Row("x", "bad", None, 1, None))
    labels = np.array([row.label for row in train])
    shares = constant_outputs("classification", labels, 3, 2).softmax(-1).numpy()
    np.testing.assert_allclose(shares, [[15 / 31, 16 / 31]] * 3)
    marks = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(constant_outputs("multilabel", marks, 1, 2).sigmoid().numpy(), [[0.75, 0.25]])
    np.testing.assert_allclose(constant_outputs("regression", np.array([1.0, 2.0, 6.0]), 1, 1).numpy(), [[3.0]])
    test = [Row("y", "a fine day", None, 0, None)]
    predicted = tfidf_outputs("classification", (train, train[:6], test), labels, labels[:6], 2)
    assert predicted.argmax() == 0


def test_words_have_the_tag_that_they_mostly_have():
    train = [Row("a", "", words=["Rome", "is", "Rome"], labels=[1, 0, 1]), Row("b", "", words=["Rome"], labels=[0])]
    found = word_tag_outputs(train, ["Rome", "is", "unseen"], 3).exp().numpy()
    assert found.argmax(1).tolist() == [1, 0, 0]
    np.testing.assert_allclose(found.sum(1), 1.0)
    assert (found > 0).all()
