"""Words: annotation files, queries, their verbs."""
