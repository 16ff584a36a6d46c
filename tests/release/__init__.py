"""The release check: `tox -e release`, or `python -m tests.release` with its parts."""
