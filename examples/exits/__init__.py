"""Early exits with a guarantee, measured: on plain digits, and on cluttered canvases."""
