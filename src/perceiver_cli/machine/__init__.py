"""What this machine can do: versions, self-tests and speed."""
