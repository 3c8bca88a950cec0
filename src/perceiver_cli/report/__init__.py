"""Pages and pictures of what was measured. Nothing is measured here."""
