"""The commands of the command line, one idea a file.

Each file has a one-line `SUMMARY`, `EXAMPLES`, `configure(parser)` for its arguments and
`run(arguments, progress)` for its work. They import what is heavy inside: `effopt --help` loads
them all.
"""
