"""The same picture gives the same embedding, in whatever form it comes."""

import numpy as np
import pytest
from test_images import FLAT_FORMS, FORMS, H, W, folder, server, stack  # noqa: F401

from sktransfer import PretrainedFeatureExtractor


@pytest.fixture(scope="module")
def expected(stack):  # noqa: F811
    return PretrainedFeatureExtractor(memory=False).fit_transform(stack)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_embedding(form, expected, stack, folder):  # noqa: F811
    X = FORMS[form](stack, folder)
    rows = PretrainedFeatureExtractor(memory=False).fit_transform(X)
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FLAT_FORMS)
def test_flat_rows_give_the_same_embedding(form, expected, stack):  # noqa: F811
    extractor = PretrainedFeatureExtractor(memory=False, image_shape=(H, W, 3))
    rows = extractor.fit_transform(FLAT_FORMS[form](stack))
    assert extractor.n_features_in_ == H * W * 3
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-6)


def test_urls_give_the_same_embedding(expected, server):  # noqa: F811
    urls = [f"{server.url}/{i}.png" for i in range(len(expected))]
    rows = PretrainedFeatureExtractor(memory=False).fit_transform(urls)
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-6)
    assert server.hits.count("GET") == len(urls)
