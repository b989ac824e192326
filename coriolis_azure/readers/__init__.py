"""Where chunks come from: the conversation with an agent (over SSH or the direct channel), and page ranges of blobs.

Nothing here knows where chunks go.
"""
