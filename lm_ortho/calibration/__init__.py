"""Second moments of the inputs of linear layers, which sieves and projections use."""
