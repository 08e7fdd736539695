"""The command of this part; also `python -m birthmark.firmware_sim`."""

from birthmark.device.console import exit_with, main_of


def main() -> None:
    """Run the command and exit with its code."""
    exit_with(main_of("birthmark.firmware_sim.cli", "sim"))


if __name__ == "__main__":
    main()
