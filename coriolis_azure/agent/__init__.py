"""The program that reads a disk on the worker, and the wire format and digests that it shares with the host.

It runs with whatever Python the worker has, so it uses only the standard library and the syntax of Python 3.5. Its
modules are sent as one source text (`program`); nothing is installed on the worker.
"""

from pathlib import Path

from .digest import HASHES, Digester, Mac, is_zero, piecewise, root, usable
from .wire import DIGEST, GRAIN, MAX_CHUNK, UNKNOWN, ZERO

__all__ = [
    "DIGEST",
    "GRAIN",
    "HASHES",
    "MAX_CHUNK",
    "UNKNOWN",
    "ZERO",
    "Digester",
    "Mac",
    "is_zero",
    "piecewise",
    "program",
    "root",
    "usable",
]

MODULES = ("wire", "digest", "pack", "tls", "scan", "main")  # each imports only those before it

_LOADER = """import sys, types
package = sys.modules["agent"] = types.ModuleType("agent")
package.__path__ = []
for name, source in {modules!r}:
    module = sys.modules["agent." + name] = types.ModuleType("agent." + name)
    module.__package__ = "agent"
    exec(compile(source, "agent/" + name + ".py", "exec"), module.__dict__)
module.main()
"""


def program() -> bytes:
    """The whole agent as the source of one Python program. Its optional argument is the address to listen on."""
    folder = Path(__file__).parent
    modules = [(name, (folder / f"{name}.py").read_text()) for name in MODULES]
    return _LOADER.format(modules=modules).encode()
