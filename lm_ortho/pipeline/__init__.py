"""From a model specification to a decomposed model: specification, cached building, decomposition, checkpoint."""
