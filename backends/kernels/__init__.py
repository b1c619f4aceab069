"""Our operators, one kernel a file; `effopt.kernel` loads them by name."""

if __name__ != "effopt.backends.kernels":
    raise ImportError("import effopt.backends.kernels: two names make two modules")

TABLE = {
    name: f"effopt.backends.kernels.{name}:KERNEL"
    for name in (
        "match_tokens",
        "merge_tokens",
        "match_merge",
        "group_tokens",
        "gather_tokens",
        "scatter_tokens",
        "attention_row",
        "select_tokens",
        "prune_tokens",
        "fuse_tokens",
        "quantized_linear",
        "pool_tokens",
        "compact_rows",
        "exit_score",
        "exit_index",
        "choose_exit",
    )
}
