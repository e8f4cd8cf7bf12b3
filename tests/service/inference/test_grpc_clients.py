"""The protocol over gRPC with the clients that people use, unmodified.

Their messages share names, and two of a name cannot live in one process: tritonclient runs in one of its own.
"""

import asyncio
import json
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.service import running

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import kserve

KEY = {"name": "web", "sha256": "", "scopes": ["recommend"]}
TRITON = """
import json, sys
import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

url = sys.argv[1]
found = {}
with triton.InferenceServerClient(url) as to:
    found["live"] = [to.is_server_live(), to.is_server_ready(), to.is_model_ready("untrained"), to.is_model_ready("x")]
    found["extensions"] = list(to.get_server_metadata().extensions)
    version = to.get_model_metadata("untrained").versions[0]
    config = to.get_model_config("untrained", version).config
    found["config"] = [config.name, config.max_batch_size, config.input[1].name, config.input[1].data_type]
    users = triton.InferInput("user_id", [2, 1], "BYTES")
    users.set_data_from_numpy(np.array([["7"], ["8"]], dtype=np.object_))
    outputs = [triton.InferRequestedOutput(name) for name in ("item_id", "score", "source")]
    parameters = {"k": 3, "exclude": "[5]", "exclude_seen": True}
    for asked in ({}, {"outputs": outputs}, {"model_version": version}):
        result = to.infer("untrained", [users], parameters=parameters, request_id="a", **asked)
        found["items"] = [[item.decode() for item in row] for row in result.as_numpy("item_id")]
        found["source"] = [source.decode() for source in result.as_numpy("source")]
        assert result.as_numpy("score").dtype == np.float32
    statistics = to.get_inference_statistics("untrained").model_stats[0]
    found["counted"] = [statistics.inference_count, statistics.inference_stats.success.count]
    found["index"] = [model.name for model in to.get_model_repository_index().models]
    to.load_model("untrained")
    found["errors"] = []
    bad = triton.InferInput("user_id", [1], "FP32")
    bad.set_data_from_numpy(np.zeros(1, dtype=np.float32))
    for call in (
        lambda: to.infer("other", [users]),
        lambda: to.infer("untrained", [users], model_version="0"),
        lambda: to.infer("untrained", [users], outputs=[triton.InferRequestedOutput("nonsense")]),
        lambda: to.infer("untrained", [users], parameters={"colour": "red"}),
        lambda: to.infer("untrained", [bad]),
        lambda: to.load_model("../untrained"),
        lambda: to.unload_model("untrained"),
        lambda: to.infer("untrained", [users], outputs=[triton.InferRequestedOutput("score", class_count=2)]),
        lambda: to.load_model("untrained", config="{}"),
        lambda: to.load_model("untrained", config="{}", files={"file:1/model": b"x"}),
        lambda: to.unload_model("untrained", unload_dependents=True),
    ):
        try:
            call()
        except InferenceServerException as error:
            found["errors"].append([error.status(), error.message()])
print(json.dumps(found))
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def both(bundles: dict[str, Path]) -> Iterator[tuple[httpx.Client, str]]:
    port = free_port()
    with running(bundles["towers"], grpc_port=port) as client:
        yield client, f"127.0.0.1:{port}"


def best(client: httpx.Client, **query: Any) -> list[str]:
    return [item["id"] for item in client.post("/v1/recommendations", json={"k": 3, **query}).json()["items"]]


def test_triton(both: tuple[httpx.Client, str]) -> None:
    client, url = both
    done = subprocess.run([sys.executable, "-c", TRITON, url], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["live"] == [True, True, True, False]
    assert "binary_tensor_data" in found["extensions"]
    assert found["config"] == ["untrained", 256, "history", 13]
    assert found["items"] == [best(client, user_id="7", exclude=["5"]), best(client, user_id="8", exclude=["5"])]
    assert found["source"] == ["user", "user"]
    assert found["counted"] == [6, 3]
    assert found["index"] == ["untrained"]
    assert [status for status, _ in found["errors"]] == [
        "StatusCode.NOT_FOUND",
        "StatusCode.NOT_FOUND",
        *["StatusCode.INVALID_ARGUMENT"] * 3,
        "StatusCode.NOT_FOUND",
        "StatusCode.FAILED_PRECONDITION",
        *["StatusCode.INVALID_ARGUMENT"] * 4,
    ]
    assert all(message for _, message in found["errors"])


def test_kserve(both: tuple[httpx.Client, str]) -> None:
    client, url = both

    async def ask() -> None:
        async with kserve.InferenceGRPCClient(url, retries=0) as to:
            assert await to.is_server_live()
            assert await to.is_server_ready()
            assert await to.is_model_ready("untrained")
            assert not await to.is_model_ready("other")
            for binary in (True, False):
                tensor = kserve.InferInput("user_id", [1, 1], "BYTES")
                tensor.set_data_from_numpy(np.array([["7"]], dtype=np.object_), binary_data=binary)
                request = kserve.InferRequest("untrained", [tensor], parameters={"k": 3}, request_id="a")
                answer = await to.infer(request)
                items = answer.get_output_by_name("item_id").as_numpy().ravel()
                assert [item.decode() for item in items] == best(client, user_id="7")
            version = client.get("/v1/models").json()["models"][0]["version"]
            request.model_version = version
            assert (await to.infer(request)).model_version == version
            for name, wrong, code, words in (
                ("untrained", "0", "NOT_FOUND", "this version is not served"),
                ("other", None, "NOT_FOUND", "no such model"),
                ("untrained", None, "INVALID_ARGUMENT", "colour"),
            ):
                request.model_name, request.model_version = name, wrong
                request.parameters = {"colour": "red"}
                with pytest.raises(grpc.RpcError) as refused:
                    await to.infer(request)
                assert refused.value.code().name == code
                assert words in refused.value.details()

    asyncio.run(ask())


def test_keys_hold_over_grpc(bundles: dict[str, Path]) -> None:
    from lazydp.service.http.auth import make_key

    key, digest = make_key()
    port = free_port()

    async def ask() -> None:
        async with kserve.InferenceGRPCClient(f"127.0.0.1:{port}", retries=0) as to:
            assert await to.is_server_live()
            for headers, code in ((None, "UNAUTHENTICATED"), ((("authorization", "Bearer x"),), "UNAUTHENTICATED")):
                with pytest.raises(grpc.RpcError) as refused:
                    await to.is_model_ready("untrained", headers=headers)
                assert refused.value.code().name == code
            assert await to.is_model_ready("untrained", headers=(("authorization", f"Bearer {key}"),))

    with running(bundles["towers"], grpc_port=port, api_keys=[{**KEY, "sha256": digest}]) as client:
        asyncio.run(ask())
        metrics = client.get("/healthz")
        assert metrics.status_code == 200


RAW: dict[str, tuple[dict[str, Any], str]] = {
    "bytes that do not fit": ({"raw_input_contents": [b"abc"]}, "INVALID_ARGUMENT"),
    "too many bytes": ({"raw_input_contents": [b"\1\0\0\0" + b"7", b""]}, "INVALID_ARGUMENT"),
    "a length that lies": ({"raw_input_contents": [b"\xff\xff\xff\xff7"]}, "INVALID_ARGUMENT"),
    "nothing": ({}, "INVALID_ARGUMENT"),
    "right": ({"raw_input_contents": [b"\1\0\0\0" + b"7"]}, "OK"),
    "an unknown datatype": ({"datatype": "BF16", "raw_input_contents": [b"\0\0"]}, "INVALID_ARGUMENT"),
    "a huge shape": ({"shape": [2**62, 2**62], "raw_input_contents": [b""]}, "INVALID_ARGUMENT"),
    "a negative shape": ({"shape": [-1], "raw_input_contents": [b""]}, "INVALID_ARGUMENT"),
    "no shape": ({"shape": [], "raw_input_contents": [b"\1\0\0\0" + b"7"]}, "INVALID_ARGUMENT"),
    "three extents": ({"shape": [1, 1, 1], "raw_input_contents": [b"\1\0\0\0" + b"7"]}, "INVALID_ARGUMENT"),
    "text that is not UTF-8": ({"contents": {"bytes_contents": [b"\xff"]}}, "INVALID_ARGUMENT"),
    "contents of another kind": ({"contents": {"int64_contents": [7]}}, "INVALID_ARGUMENT"),
}


@pytest.mark.parametrize("case", RAW)
def test_tensors_that_lie(both: tuple[httpx.Client, str], case: str) -> None:
    from lazydp.service.inference.grpc_messages import message

    given, code = RAW[case]
    tensor = {"name": "user_id", "datatype": "BYTES", "shape": [1]} | {
        name: given[name] for name in ("datatype", "shape", "contents") if name in given
    }
    request = message("ModelInferRequest")(
        model_name="untrained", inputs=[tensor], raw_input_contents=given.get("raw_input_contents", [])
    )
    with grpc.insecure_channel(both[1]) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=message("ModelInferRequest").SerializeToString,
            response_deserializer=message("ModelInferResponse").FromString,
        )
        _, answered = call.with_call(request, timeout=20) if code == "OK" else (None, refused(call, request))
        assert answered.code().name == code


TENSORS = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.sampled_from(["user_id", "history", "exclude", "candidates", "age", "device", "colour", ""]),
            "datatype": st.sampled_from(["BYTES", "INT64", "UINT8", "FP32", "FP64", "BOOL", "BF16", ""]),
            "shape": st.lists(st.sampled_from([0, 1, 2, 3, -1, 10_000, 2**62]), max_size=3),
        }
    ),
    max_size=3,
)
LENGTHS = st.sampled_from([0, 1, 2, 7, 2**31, 2**32 - 1]).map(lambda length: length.to_bytes(4, "little"))
BYTES = st.lists(LENGTHS | st.binary(max_size=12), max_size=5).map(b"".join)
PARAMETERS = st.dictionaries(
    st.sampled_from(["k", "offset", "filters", "exclude", "explain", "colour"]),
    st.one_of(
        st.integers(-(2**63), 2**63 - 1).map(lambda value: {"int64_param": value}),
        st.text(max_size=8).map(lambda value: {"string_param": value}),
        st.floats().map(lambda value: {"double_param": value}),
        st.booleans().map(lambda value: {"bool_param": value}),
    ),
    max_size=2,
)


@given(tensors=TENSORS, raw=st.lists(BYTES, max_size=3), parameters=PARAMETERS)
@settings(max_examples=300, deadline=None)
def test_no_message_makes_the_service_fail(both: Any, tensors: Any, raw: list[bytes], parameters: Any) -> None:
    from lazydp.service.inference.grpc_messages import message

    request = message("ModelInferRequest")(
        model_name="untrained", inputs=tensors, raw_input_contents=raw, parameters=parameters
    )
    with grpc.insecure_channel(both[1]) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=message("ModelInferRequest").SerializeToString,
            response_deserializer=message("ModelInferResponse").FromString,
        )
        assert outcome(call, request) in ("OK", "INVALID_ARGUMENT")


def outcome(call: Any, request: Any) -> str:
    try:
        call(request, timeout=20)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def refused(call: Any, request: Any) -> Any:
    with pytest.raises(grpc.RpcError) as error:
        call(request, timeout=20)
    return error.value
