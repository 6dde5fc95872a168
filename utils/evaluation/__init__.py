"""Trained nets at work: evaluation, submission and prediction, which are one loop (:func:`utils.evaluation.predict.predictions`)."""
