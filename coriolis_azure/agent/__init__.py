"""The program that reads a disk on the worker, and the wire format and digests that the host shares with it.

Only Python's standard library may be imported here, and only syntax of Python 3.5 be used: it runs with whatever
Python the worker has. The modules are sent as one piece of source (`program`); nothing is installed on the worker.
"""

from pathlib import Path

from .digest import HASHES, Digester, Mac, each, is_zero, root, usable
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
    "each",
    "is_zero",
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
    """The whole agent as the source of one Python program; its argument is the address to listen on, if any."""
    folder = Path(__file__).parent
    modules = [(name, (folder / f"{name}.py").read_text()) for name in MODULES]
    return _LOADER.format(modules=modules).encode()
