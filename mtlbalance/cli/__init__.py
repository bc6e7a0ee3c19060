"""The command line: results on stdout, progress and errors on stderr, one exit code for each kind of end."""
