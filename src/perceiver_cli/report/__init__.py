"""Pages and plots of results: evaluations, explanations, comparisons, model cards."""
