"""Coverage-guided fuzzing of the parsers of this program, by atheris: `make fuzz`.

targets.py has a function for each parser. corpus/ has a few small inputs of each, which reach most of its branches:
test_corpus.py runs them in the normal suite.
"""
