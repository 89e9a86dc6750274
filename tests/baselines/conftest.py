"""The rows of the small models as methods see them."""

from __future__ import annotations

import pytest

from lm_ortho.baselines import Material
from lm_ortho.baselines.training import encode_material


@pytest.fixture
def sets(memorised_models):
    return encode_material(
        Material(memorised_models.tokenizer, memorised_models.merged, memorised_models.forget, memorised_models.retain)
    )
