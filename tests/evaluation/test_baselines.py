"""The linear probe on raw features is scikit-learn's on standardised ones, with and without a bias."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from trimtab.data import Row
from trimtab.evaluation.baselines import fit_linear_probe, majority_probabilities, tfidf_probabilities


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
    probe = fit_linear_probe(features[:300], labels[:300], features[300:], labels[300:], has_bias)
    assert (probe.bias is not None) == has_bias
    assert probe.weight.is_contiguous()
    scaler = StandardScaler(with_mean=has_bias).fit(features[:300].double().numpy())
    model = LogisticRegression(C=probe.strength, fit_intercept=has_bias, max_iter=500)
    model.fit(scaler.transform(features[:300].double().numpy()), labels[:300])
    expected = model.predict_proba(scaler.transform(features[300:].double().numpy()))
    found = probe.logits(features[300:]).softmax(-1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert (found.argmax(1) == labels[300:]).mean() > 0.6


def test_majority_and_tfidf():
    train = [Row(str(i), ["fine film", "bad film"][i % 2], None, i % 2, None) for i in range(30)]
    train.append(Row("x", "bad", None, 1, None))
    shares = majority_probabilities(train, train[:3], 2)
    np.testing.assert_allclose(shares, [[15 / 31, 16 / 31]] * 3)
    predicted = tfidf_probabilities(train, train[:6], [Row("y", "a fine day", None, 0, None)])
    assert predicted.argmax() == 0
