"""A client that knows nothing of kvrelay but an address: it asks the server what it serves, by gRPC
reflection. Its command line is a part of grpcurl's.

python reflection_client.py -plaintext ADDRESS list [SERVICE]
python reflection_client.py -plaintext ADDRESS describe NAME
python reflection_client.py -plaintext [-d JSON] ADDRESS SERVICE/METHOD
"""

import argparse
import json
from typing import Any

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

TIMEOUT_S = 60.0


def method_of(pool: DescriptorPool, name: str) -> MethodDescriptor:
    service, _, method = name.rpartition("/")
    found: MethodDescriptor = pool.FindServiceByName(service).methods_by_name[method]
    return found


def call(channel: grpc.Channel, method: MethodDescriptor, request: dict[str, Any]) -> list[dict[str, Any]]:
    """Responses to one request, whatever the kind of the method."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    message = json_format.ParseDict(request, GetMessageClass(method.input_type)())
    response_class = GetMessageClass(method.output_type)
    stub: Any = channel.stream_stream(
        path, request_serializer=type(message).SerializeToString, response_deserializer=response_class.FromString
    )
    return [json_format.MessageToDict(response) for response in stub(iter([message]), timeout=TIMEOUT_S)]


def run(arguments: argparse.Namespace) -> None:
    with grpc.insecure_channel(arguments.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = DescriptorPool(database)
        match arguments.what:
            case ["list"]:
                print("\n".join(sorted(database.get_services())))
            case ["list", service]:
                print("\n".join(f"{service}.{method.name}" for method in pool.FindServiceByName(service).methods))
            case ["describe", name]:
                for field in pool.FindMessageTypeByName(name).fields:
                    print(field.name, field.number)
            case [method]:
                for response in call(channel, method_of(pool, method), json.loads(arguments.data)):
                    print(json.dumps(response))
            case _:
                raise SystemExit(2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-plaintext", action="store_true", required=True)
    parser.add_argument("-d", dest="data", default="{}")
    parser.add_argument("address")
    parser.add_argument("what", nargs="+")
    run(parser.parse_args())
