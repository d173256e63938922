"""Holds a conversation over one stream. Its KV cache stays on one decode worker, so each turn
computes only what is new.
"""

import argparse

from kvrelay.client import Client

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--gateway", default="127.0.0.1:50050", help="host:port of the gateway")
arguments = parser.parse_args()

TURNS = ("Name a city in Italy.", "And one in France?", "Which of the two is further north?")

with Client(arguments.gateway) as client, client.converse(max_tokens=40, temperature=0) as conversation:
    for turn in TURNS:
        answer = conversation.send(turn).completion()
        usage = answer.finished.usage
        print(f"> {turn}\n{answer.text.strip()}")
        print(f"  ({usage.num_cached_tokens} of {usage.num_prompt_tokens} prompt tokens were there already)")
