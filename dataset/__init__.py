"""From an image id to a batch: the VOC data set and its classes, the transforms and the sampler."""
