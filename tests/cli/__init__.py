"""The command line: exit codes, what is printed where, its commands, and it as a process."""
