"""The life of a run: creating, journaling and deleting its resources, interrupts, and the records it leaves.

Only this package creates or deletes temporary resources. It knows nothing about the data that is copied."""
