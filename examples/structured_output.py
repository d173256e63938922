"""Asks for an answer that is a Pydantic model. Only tokens that fit its JSON schema can be chosen,
so it always parses.
"""

import argparse
from typing import Literal

from pydantic import BaseModel, Field

from kvrelay.client import Client, ResponseFormat


class Recipe(BaseModel):
    """The answer. Bounds matter with small models, which otherwise go on and on."""

    dish: str = Field(max_length=30)
    course: Literal["starter", "main", "dessert"]
    minutes: int = Field(ge=1, le=240)
    ingredients: list[str] = Field(min_length=1, max_length=4)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--gateway", default="127.0.0.1:50050", help="host:port of the gateway")
arguments = parser.parse_args()

schema = Recipe.model_json_schema()
schema["properties"]["ingredients"]["items"]["maxLength"] = 20
with Client(arguments.gateway) as client:
    answer = client.complete(
        messages=[{"role": "user", "content": "Give me a recipe for apple pie, as JSON."}],
        response_format=ResponseFormat.json_schema(schema),
        max_tokens=200,
        temperature=0,
    )
recipe = Recipe.model_validate_json(answer.text)
print(f"{recipe.dish} ({recipe.course}), {recipe.minutes} minutes: {', '.join(recipe.ingredients)}")
