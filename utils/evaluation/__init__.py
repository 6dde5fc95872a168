"""Trained nets at work: evaluation, submission and prediction, which are one loop (:mod:`utils.evaluation.score`)."""
