"""From a trained model to predictions, figures and explanations."""
