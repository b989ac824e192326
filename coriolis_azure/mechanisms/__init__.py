"""How bytes get out of Azure: `copying` chooses, `worker`, `snapshots` and `vhds` do it, for a `target`.

Readers are made here and told what need not be read. What a reader does, and what becomes of a chunk, is theirs.
"""
