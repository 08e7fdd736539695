"""The device's end of the enrollment link: its state machine, its storage, its tty."""
