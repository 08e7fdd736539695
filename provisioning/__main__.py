"""The command of this part; also `python -m birthmark.provisioning`."""

import sys

from birthmark.device.console import main_of


def main() -> None:
    """Run the command and exit with its code."""
    sys.exit(main_of("birthmark.provisioning.entry", "station", by_command=True))


if __name__ == "__main__":
    main()
