"""Asks a server for its health, with messages that it encodes itself. Command line and exit codes
are those of grpc_health_probe.

python health_probe.py -addr=HOST:PORT [-service=NAME]

0 serving, 1 wrong use, 2 cannot connect, 3 the call failed, 4 not serving
"""

import argparse
import sys

import grpc

TIMEOUT_S = 10.0
SERVING = b"\x08\x01"  # field 1, an enum: 1


def check(address: str, service: str) -> int:
    name = service.encode()
    request = b"\x0a" + bytes([len(name)]) + name if name else b""
    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(TIMEOUT_S)
        except grpc.FutureTimeoutError:
            return 2
        ask: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            answer = ask(request, timeout=TIMEOUT_S)
        except grpc.RpcError as failure:
            print(failure, file=sys.stderr)
            return 3
    print("status: SERVING" if answer == SERVING else "status: NOT_SERVING")
    return 0 if answer == SERVING else 4


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-addr", required=True)
    parser.add_argument("-service", default="")
    arguments = parser.parse_args()
    sys.exit(check(arguments.addr, arguments.service))
