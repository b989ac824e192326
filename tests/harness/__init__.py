"""The other ends of the tests: processes, devices, targets, clocks, and what several test modules share.

No test is in here, and no module of tests is imported by another."""
