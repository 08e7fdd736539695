"""Count something, and lose no count: each number is sent until the broker has acknowledged it.

python examples/counter.py /var/lib/birthmark 10
"""

from __future__ import annotations

import sys

from birthmark.device import BirthmarkError, Client


def main(state_dir: str, up_to: int) -> int:
    try:
        with Client.from_folder(state_dir) as client:
            waiting = [client.publish(client.telemetry("count"), {"count": n}) for n in range(1, up_to + 1)]
            for acknowledgement in waiting:
                acknowledgement.wait(30)
    except BirthmarkError as error:  # what failed, and what to do next
        print(f"{error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(f"the broker has all {up_to}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
