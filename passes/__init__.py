"""Techniques, one a file; `effopt.pipeline` loads them by name."""

if __name__ != "effopt.passes":
    raise ImportError("import effopt.passes, not passes: two names make two modules")

TABLE = {
    "canonicalize": "effopt.passes.canonicalize:Canonicalize",
    "fold-constants": "effopt.passes.fold_constants:FoldConstants",
    "simplify-masks": "effopt.passes.simplify_masks:SimplifyMasks",
    "merge-tokens": "effopt.passes.merge_tokens:MergeTokens",
    "prune-tokens": "effopt.passes.prune_tokens:PruneTokens",
}


def names() -> tuple[str, ...]:
    """Return the names of all passes."""
    return tuple(TABLE)
