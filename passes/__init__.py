"""Techniques, one a file; `effopt.pipeline` loads them by name."""

if __name__ != "effopt.passes":
    raise ImportError("import effopt.passes, not passes: two names make two modules")

TABLE = {
    "canonicalize": "effopt.passes.canonicalize:Canonicalize",
    "fold-constants": "effopt.passes.fold_constants:FoldConstants",
    "unify-layers": "effopt.passes.unify_layers:UnifyLayers",
    "unify-attention": "effopt.passes.unify_attention:UnifyAttention",
    "simplify-masks": "effopt.passes.simplify_masks:SimplifyMasks",
    "split-constants": "effopt.passes.split_constants:SplitConstants",
    "merge-tokens": "effopt.passes.merge_tokens:MergeTokens",
    "prune-tokens": "effopt.passes.prune_tokens:PruneTokens",
    "drop-layers": "effopt.passes.drop_layers:DropLayers",
    "skip-positions": "effopt.passes.skip_positions:SkipPositions",
    "exit-early": "effopt.passes.exit_early:ExitEarly",
    "quantize": "effopt.passes.quantize:Quantize",
}

PROBES = {
    "merge-tokens": "merge-tokens{r=1}",
    "prune-tokens": "prune-tokens{keep=0.5}",
}
"""Passes that take a token axis, each with a mild spec: `explain` tries it on every axis."""


def names() -> tuple[str, ...]:
    """Return the names of all passes."""
    return tuple(TABLE)
