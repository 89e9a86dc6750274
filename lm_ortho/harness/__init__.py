"""Our side of lm-eval: the model, the data set loaders, the task classes and the aggregations."""
