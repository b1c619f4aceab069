"""A small trained sentence encoder, and the measures of what quantization does to it."""
