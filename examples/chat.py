"""Prints an answer as it comes, and where its time went. Needs a cluster: `kvrelay serve all`."""

import argparse

from kvrelay.client import Client

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("question", nargs="?", default="Why is the sky blue?")
parser.add_argument("--gateway", default="127.0.0.1:50050", help="host:port of the gateway")
arguments = parser.parse_args()

with Client(arguments.gateway) as client:
    stream = client.generate(messages=[{"role": "user", "content": arguments.question}], max_tokens=80)
    for delta in stream:
        print(delta.text, end="", flush=True)
    print()

    finished = stream.finished
    assert finished is not None, "the loop above read the stream to its end"
    where = "decode" if finished.phases.prefilled_on_decode_worker else "prefill"
    print(f"first token after {finished.phases.time_to_first_token_ms:.1f} ms; the {where} worker computed the prompt,")
    print(
        f"{finished.phases.transfer_bytes:,} bytes of KV travelled, {finished.usage.num_output_tokens} tokens came out"
    )
