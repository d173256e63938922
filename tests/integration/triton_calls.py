"""What a program with Triton's client asks of a gateway; knows nothing of kvrelay. Prints what it
got as one JSON document.

python triton_calls.py ADDRESS MODEL PROMPTS SAMPLING_PARAMETERS      the last two in JSON
"""

import json
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton  # type: ignore[import-not-found,import-untyped,unused-ignore]

TIMEOUT_S = 60


def inputs_of(prompt: str, sampling: dict[str, Any], stream: bool | None = None) -> list[Any]:
    parameters = json.dumps(sampling).encode()
    inputs = [_tensor("text_input", "BYTES", prompt.encode()), _tensor("sampling_parameters", "BYTES", parameters)]
    return inputs if stream is None else [*inputs, _tensor("stream", "BOOL", stream)]


def _tensor(name: str, datatype: str, value: object) -> Any:
    tensor = triton.InferInput(name, [1], datatype)
    tensor.set_data_from_numpy(np.array([value], dtype=bool if datatype == "BOOL" else object))
    return tensor


def plain(result: Any) -> dict[str, Any]:
    """A result in plain values."""
    response = result.get_response()
    return {
        "id": response.id,
        "request_id": response.parameters["request_id"].string_param,
        "final": response.parameters["triton_final_response"].bool_param,
        **{name: [text.decode() for text in result.as_numpy(name)] for name in ("text_output", "finish_reason")},
    }


def about(client: Any, model: str, prompts: list[str], sampling: dict[str, Any]) -> dict[str, Any]:
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(model),
        "other_model_ready": client.is_model_ready("other"),
        "server": client.get_server_metadata(as_json=True)["name"],
        "inputs": [tensor["name"] for tensor in client.get_model_metadata(model, as_json=True)["inputs"]],
        "decoupled": client.get_model_config(model, as_json=True)["config"]["model_transaction_policy"]["decoupled"],
        "index": [entry["name"] for entry in client.get_model_repository_index(as_json=True)["models"]],
    }


def unary(client: Any, model: str, prompts: list[str], sampling: dict[str, Any]) -> dict[str, Any]:
    result = client.infer(
        model, inputs_of(prompts[0], sampling), request_id="one", parameters={"tenant": "triton unary"}
    )
    outputs = [triton.InferRequestedOutput("num_output_tokens"), triton.InferRequestedOutput("num_input_tokens")]
    counted = client.infer(model, inputs_of(prompts[0], sampling), outputs=outputs, client_timeout=TIMEOUT_S)
    counts = {name: counted.as_numpy(name).tolist() for name in ("num_output_tokens", "num_input_tokens")}
    return plain(result) | counts


def streamed(client: Any, model: str, prompts: list[str], sampling: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """All prompts at once on one stream, and one that is wrong between them."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    parameters = {"tenant": "triton stream"}
    for number, prompt in enumerate(prompts):
        client.async_stream_infer(
            model, inputs_of(prompt, sampling, True), request_id=str(number), parameters=parameters
        )
        client.async_stream_infer(model, inputs_of(prompt, {"best_of": number}, True), request_id="wrong")
    got: dict[str, list[dict[str, Any]]] = {"errors": []}
    num_left = 2 * len(prompts)
    while num_left:
        result, error = answers.get(timeout=TIMEOUT_S)
        if error is not None:
            got["errors"].append({"message": error.message()})
            num_left -= 1
        else:
            answer = plain(result)
            got.setdefault(answer["id"], []).append(answer)
            num_left -= answer["final"]
    client.stop_stream()
    return got


def refused(client: Any, model: str, prompts: list[str], sampling: dict[str, Any]) -> dict[str, str]:
    try:
        client.infer(model, inputs_of(prompts[0], {"temperature": -1}))
    except triton.InferenceServerException as failure:
        return {"status": failure.status(), "message": failure.message()}
    raise AssertionError("was taken")


if __name__ == "__main__":
    address, name = sys.argv[1:3]
    what = [json.loads(argument) for argument in sys.argv[3:]]
    with triton.InferenceServerClient(address) as made:
        steps = {"about": about, "unary": unary, "streamed": streamed, "refused": refused}
        print(json.dumps({step: function(made, name, *what) for step, function in steps.items()}))
