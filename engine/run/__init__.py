"""A run: how it begins, its log, its checkpoints; the predictions of an evaluation."""
