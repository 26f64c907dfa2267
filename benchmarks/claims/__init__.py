"""Every claim that the README or a "how good" makes, computed from committed files; a file per group."""
