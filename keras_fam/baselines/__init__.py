"""Other systems that the paper compares: they import the core, never the reverse."""
