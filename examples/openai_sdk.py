"""OpenAI's own client: an answer, a stream, and JSON by a schema. Needs `kvrelay serve all
--openai-port 8000`.
"""

import argparse
import json
import os

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="where OpenAI's API is served")
arguments = parser.parse_args()

# One of the keys of --openai-api-key; any text without that setting.
client = OpenAI(base_url=arguments.url, api_key=os.environ.get("KVRELAY_OPENAI_API_KEY", "none"))
model = client.models.list().data[0].id

answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "What is the capital of France?"}],
    temperature=0,
    max_tokens=24,
)
print("answer:", answer.choices[0].message.content)

stream = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": "Count to five."}], temperature=0, max_tokens=24, stream=True
)
print("stream: ", end="")
for event in stream:
    print(event.choices[0].delta.content or "", end="", flush=True)
print()

schema = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "inhabitants": {"type": "integer", "minimum": 1, "maximum": 9999999},
    },
    "required": ["city", "inhabitants"],
    "additionalProperties": False,
}
city = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Name a city and how many people live there, as JSON."}],
    max_tokens=60,
    temperature=0,
    response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
)
print("JSON:", json.loads(city.choices[0].message.content or ""))
