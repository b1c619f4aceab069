"""Example models that effopt is demonstrated, measured and tested on."""
