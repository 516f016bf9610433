"""Pruning during training: weights that a score ranks lowest become zero, more and more of them, and stay so.

scores.py says what is ranked, ramp.py how much is pruned when, prunable.py of which tensors, ranking.py where the
threshold is, masks.py applies it in a run, and sparsity.py measures what came of it, from the weights alone.

This module imports no torch: the settings are checked before anything heavy is loaded.
"""

METHODS = ("none", "magnitude", "movement", "movement_original", "state")
PRUNES = METHODS[1:]
THRESHOLDS = ("global", "layer", "layer_ramp")
PATTERNS = ("unstructured", "2:4")
SIGNED_METHODS = ("movement", "movement_original")  # whose scores can be below that of a pruned weight
