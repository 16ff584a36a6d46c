"""`api.py PATH`: what the daemon's API answers to a GET, in a tenth of what a verb takes."""

from __future__ import annotations

import socket
import sys
from http.client import HTTPConnection

_LIMIT_S = 30
_SOCKET = "/run/vmdedup/vmdedup.sock"


def main() -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_LIMIT_S)
        connection.connect(_SOCKET)
        http = HTTPConnection("localhost")
        http.sock = connection
        http.request("GET", sys.argv[1])
        response = http.getresponse()
        text = response.read().decode()
    print(text)
    sys.exit(response.status != 200)


main()
