"""What the memorised model predicts for its forget rows."""

from __future__ import annotations

from lm_ortho.objective.distribution import predict_distributions


def predict_forget(memorised_models):
    """The forget examples and the merged model's own distributions."""
    examples, _ = memorised_models.examples()
    return examples, predict_distributions(memorised_models.merged, examples)
