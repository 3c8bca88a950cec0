"""Predictions, evaluations and explanations of a trained model."""
