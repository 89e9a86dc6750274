"""The lm-eval plug-in: the model class, the task classes, their documents and their aggregations."""
