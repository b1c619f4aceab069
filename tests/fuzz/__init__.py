"""A fuzzer: random transformers in many spellings, each reduced in several ways and judged."""
