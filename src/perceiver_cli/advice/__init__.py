"""What to do next: each rule turns what a command found into a whole command to run.

A rule is kept only if it helps: each has a test in which following it improves a result (tests/slow/test_advice.py). No
torch.
"""
