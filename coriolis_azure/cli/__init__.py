"""The command line. The only place that prints: data on stdout, progress and messages on stderr.

`commands` and `sandbox` hold one function a command, whose docstring is its help; `options` what commands share;
`output` documents and tables; `progress` what a watcher sees meanwhile; `entry` turns errors into words and exit codes.
"""

from __future__ import annotations


def main() -> int:
    """Run the command line; the exit code."""
    try:
        from .entry import run  # takes a moment, in which somebody may press Ctrl-C
    except KeyboardInterrupt:
        return 130
    return run()
