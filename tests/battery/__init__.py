"""What must not break the program, in numbers that a test run has no time for: `python -m tests.battery`."""
