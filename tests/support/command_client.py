"""A program that lets a command server run a command: `python command_client.py SOCKET ARGUMENTS...`.

A command from a shell then takes a tenth of the time. This file imports nothing but a few modules of the standard
library, because it runs in a new interpreter.
"""

import json
import os
import signal
import socket
import sys


def main() -> None:
    """Ask the server, and end as the command ends."""
    request = {"arguments": sys.argv[2:], "cwd": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(sys.argv[1])
        socket.send_fds(connection, [b"x"], [0, 1, 2])
        with connection.makefile("rw") as stream:
            stream.write(json.dumps(request) + "\n")
            stream.flush()
            command = int(stream.readline())
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda received, _: os.kill(command, received))
            code = os.waitstatus_to_exitcode(int(stream.readline()))
    if code < 0:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


main()
