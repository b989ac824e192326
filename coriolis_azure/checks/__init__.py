"""Checks of everything that can be known before a run. Nothing is created or changed here."""
