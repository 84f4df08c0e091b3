"""Training over several hospitals, each of which trusts its own guard and nobody else. Flower carries the messages; it decides nothing."""
