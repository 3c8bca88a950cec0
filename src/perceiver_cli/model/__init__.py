"""The paper's model, its weights on disk and its cost."""
