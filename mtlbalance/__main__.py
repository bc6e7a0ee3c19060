"""``python -m mtlbalance``: the same as the ``mtlbalance`` command."""

from mtlbalance.cli.main import run_cli

if __name__ == "__main__":
    run_cli()
