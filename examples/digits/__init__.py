"""A small vision transformer that finds and reads one handwritten digit on a cluttered canvas."""
