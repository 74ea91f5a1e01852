"""`python -m orchestrate`: the command line without the console script."""

from orchestrate.cli import app

if __name__ == "__main__":
    app()
