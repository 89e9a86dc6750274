"""Extends a released lm-eval and transformers with our model, tasks and checkpoint format.

The start-up hook (``startup``) waits for their modules and calls the bridges (``bridges``).
"""
