"""A SavedModel for TF Serving, with sessions whose state stays on the server."""
