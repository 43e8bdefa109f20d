"""A run as a page to look at: what lies in its directory, drawn. Reads files only, and needs no torch."""
