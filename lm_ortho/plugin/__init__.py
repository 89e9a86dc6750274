"""Extends a released lm-eval, transformers and peft with our model, tasks, checkpoint format and layers.

The start-up hook (``startup``) waits for their modules and calls the bridges (``bridges``).
"""
