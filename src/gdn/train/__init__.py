"""Pretraining: recipe, optimizer, checkpoints, metrics and the loop."""
