"""The command line: one file a subcommand. Knows arguments, terminals and files; computes nothing itself."""
