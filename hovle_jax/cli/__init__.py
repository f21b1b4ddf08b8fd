"""The console script `hovle`; a file per family of subcommands."""
