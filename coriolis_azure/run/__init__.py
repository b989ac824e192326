"""The life of a run: what it creates, journals, interrupts, deletes, and what it leaves on record.

Nothing else creates or deletes a temporary resource. What is copied is not known here."""
