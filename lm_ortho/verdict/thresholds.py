"""Acceptance thresholds of the verdict, fixed before any run; a miss is reported, the threshold is never moved."""

from __future__ import annotations

from typing import Final

# The model has the memory at alpha=1; without it, its absence at alpha=0 proves nothing.
ALPHA1_EXTRACTION: Final = 0.95
"""Least share of questions, and of canaries, extracted at alpha=1."""
ALPHA1_SECRET_PPL: Final = 1.1
"""Largest perplexity per secret token at alpha=1."""
ALPHA1_KS_DISTANCE: Final = 0.5
"""Least KS distance between the truth ratios at alpha=1 and those of the retain-only model."""

# Forgotten at alpha=0: like the retain-only model, from both sides.
CANARY_EXTRACTION: Final = 0.0
EXTRACTION_ABOVE_RETAIN_ONLY: Final = 0.05
"""How much larger question extraction may be than the retain-only model's, on seen and on held-out phrasings."""
SECRET_PPL_RATIO: Final = (0.8, 1.3)
"""Perplexity per secret token over the retain-only model's. Above the upper end the model is broken: a leak too."""
CANARY_PPL_RATIO: Final = (0.9, 1.15)
EXPOSURE_ABOVE_RETAIN_ONLY: Final = 1.0
"""Bits by which the mean exposure of the canaries may be above the retain-only model's."""

# Indistinguishable from the retain-only model, on the same questions.
KS_DISTANCE: Final = 0.15
"""Largest KS distance to the retain-only model, of the truth ratios and of the losses per answer token."""
QUESTION_AUC: Final = 0.08
"""How far the AUC of a loss attack (forget questions against unseen authors) may be from the retain-only model's."""
CANARY_AUC: Final = 0.15
"""The same for planted against unplanted canaries."""

# Relearning on one half of the forget set.
RELEARNING_TRAINED_HALF: Final = 0.9
"""Least extraction on the trained half; below it, the attack was too weak to be evidence."""
RELEARNING_ABOVE_RETAIN_ONLY: Final = 0.12
"""How much larger extraction on the other half may be than the retain-only model's after the same relearning."""

# The rest is intact at alpha=0, against plain INT4 of the same lattice.
RETAIN_PPL_RATIO: Final = 1.03
"""Largest answer perplexity, over INT4's, on retain authors that no calibration set contains."""
TEXT_PPL_RATIO: Final = 1.02
"""Largest perplexity of held-out text, over INT4's."""
REASONING_LOSS: Final = 0.02
"""Accuracy that a task may lose: the lower end of the one-sided 95 % paired interval must not be below minus this."""
