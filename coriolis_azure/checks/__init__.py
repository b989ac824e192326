"""What can be known before anything is made. Nothing is created or changed here."""
