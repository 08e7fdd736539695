"""The command of this part; also `python -m birthmark.device`."""

from birthmark.device.console import exit_with, main_of


def main() -> None:
    """Run the command and exit with its code."""
    exit_with(main_of("birthmark.device.cli", "device"))


if __name__ == "__main__":
    main()
