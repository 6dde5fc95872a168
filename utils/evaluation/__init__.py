"""Evaluation, submission and prediction with trained nets, over one loop (:mod:`utils.evaluation.predict`)."""
