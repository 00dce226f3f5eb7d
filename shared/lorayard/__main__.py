"""`python -m lorayard`: the same as the command `lorayard`."""

from lorayard.cli import main

main()
