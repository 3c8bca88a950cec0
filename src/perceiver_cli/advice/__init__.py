"""What to do next: rules from what a command saw to a whole command. A rule that does not help is no rule.

Each rule has a test on a made case in which following it helps (tests/slow/test_advice.py). No torch.
"""
