"""Decoding: the engine that runs many sequences, experiments, model arguments, batch sizes."""
