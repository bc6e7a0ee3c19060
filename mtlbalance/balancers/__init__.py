"""The balancers: torch only, one method a file, importable in anyone's training loop."""
