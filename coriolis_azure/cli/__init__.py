"""The command line. The only place that prints: data on stdout, progress and messages on stderr.

`commands` and `sandbox` hold one function a command, whose docstring is its help; `options` what commands share;
`output` documents and tables; `progress` what a watcher sees meanwhile; `entry` turns errors into words and exit codes.
"""

from .entry import main

__all__ = ["main"]
