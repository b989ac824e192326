"""The command line. The only place that prints: data on stdout, progress and messages on stderr.

`commands`, `planning` and `sandbox` have one function per command, whose docstring is its help. `options` has what
commands share, `output` prints documents and tables, `progress` shows a running command, `entry` turns errors into
messages and exit codes.
"""

from __future__ import annotations


def main() -> int:
    """Run the command line and return its exit code."""
    try:
        from .entry import run  # takes a moment, during which Ctrl-C may be pressed
    except KeyboardInterrupt:
        return 130
    return run()
