"""Pictures of a run: one HTML page (python -m report). Nothing of the method imports this."""
