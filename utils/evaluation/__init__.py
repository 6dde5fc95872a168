"""Trained nets at work: evaluation, submission and prediction, over one loop (:mod:`utils.evaluation.predict`)."""
