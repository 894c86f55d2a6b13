"""``python -m drrlhf``."""

from drrlhf.cli import main

main()
