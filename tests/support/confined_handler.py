"""What a confined child of tests does: it obeys."""

import json
import os
import resource
import sys
import time

kept: list[bytearray] = []


def prepare() -> None:
    """Nothing is slow here."""


def answer(request: bytes) -> bytes:
    command, _, argument = request.decode().partition(" ")
    match command:
        case "echo":
            return argument.encode()
        case "spin":
            while True:
                pass
        case "spin-in-native-code":
            return b"%d" % (int("9" * 4000) ** int(argument))
        case "sleep":
            time.sleep(float(argument))
        case "take":
            return b"%d" % len(bytearray(int(argument)))
        case "keep":
            kept.append(bytearray(int(argument)))
        case "answer":
            return b"x" * int(argument)
        case "crash":
            os.abort()
        case "limits":
            return json.dumps({name: resource.getrlimit(getattr(resource, name)) for name in argument.split()}).encode()
        case "write":
            os.write(int(argument), b"noise")
        case "inherited":
            return json.dumps(
                {
                    "variables": dict(os.environ),
                    "descriptors": {number: os.readlink(f"/proc/self/fd/{number}") for number in _descriptors()},
                    "flags": [sys.flags.isolated, sys.flags.ignore_environment, sys.flags.no_user_site],
                    "folder": os.getcwd(),
                    "niceness": os.nice(0),
                }
            ).encode()
    return b""


def _descriptors() -> list[str]:
    return [number for number in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{number}")]
