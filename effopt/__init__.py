"""effopt: a compiler-style graph-rewrite optimizer for transformer inference."""
