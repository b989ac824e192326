"""Where chunks come from: the agent's conversation over SSH or the direct channel, and page ranges of blobs.

Where chunks go is not known here."""
