"""The protocol over HTTP with the clients that people use, unmodified."""

import asyncio
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import kserve

MODEL = "untrained"
USERS = np.array([["7"], ["8"]], dtype=np.object_)


def host(client: httpx.Client) -> str:
    return f"{client.base_url.host}:{client.base_url.port}"


@pytest.fixture
def tritons(client: httpx.Client) -> Iterator[Any]:
    with triton.InferenceServerClient(host(client)) as found:
        yield found


def users(*, binary: bool) -> Any:
    tensor = triton.InferInput("user_id", [2, 1], "BYTES")
    tensor.set_data_from_numpy(USERS, binary_data=binary)
    return tensor


def best(client: httpx.Client, **query: Any) -> list[str]:
    answer = client.post("/v1/recommendations", json={"k": 3, **query}).json()
    return [item["id"] for item in answer["items"]]


def as_text(tensor: Any) -> list[list[str]]:
    return [[value.decode() if isinstance(value, bytes) else value for value in row] for row in tensor]


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("outputs", [None, "binary", "json"])
@pytest.mark.parametrize("binary", [True, False])
def test_triton_infers(client: httpx.Client, tritons: Any, binary: bool, outputs: str | None, compression: str) -> None:
    names = ("item_id", "score", "source", "title", "next_offset")
    wanted = outputs and [triton.InferRequestedOutput(name, binary_data=outputs == "binary") for name in names]
    result = tritons.infer(
        MODEL,
        [users(binary=binary)],
        outputs=wanted,
        parameters={"k": 3},
        request_compression_algorithm=compression,
        request_id="a",
    )
    assert as_text(result.as_numpy("item_id")) == [best(client, user_id="7"), best(client, user_id="8")]
    scores = result.as_numpy("score")
    assert scores.dtype == np.float32
    assert scores.shape == (2, 3)
    assert [str(value) for value in result.as_numpy("source")] in (["user"] * 2, ["b'user'"] * 2)
    assert result.get_response()["id"] == "a"
    assert (result.as_numpy("title") is None) == (outputs is None)
    if outputs:
        assert result.as_numpy("next_offset").tolist() == [3, 3]


def test_triton_reads_what_there_is(client: httpx.Client, tritons: Any) -> None:
    assert tritons.is_server_live()
    assert tritons.is_server_ready()
    assert "binary_tensor_data" in tritons.get_server_metadata()["extensions"]
    version = tritons.get_model_metadata(MODEL)["versions"][0]
    assert version == client.get("/v1/models").json()["models"][0]["version"]
    assert tritons.is_model_ready(MODEL)
    assert tritons.is_model_ready(MODEL, version)
    assert not tritons.is_model_ready(MODEL, "0")
    assert tritons.get_model_metadata(MODEL, version)["name"] == MODEL
    config = tritons.get_model_config(MODEL)
    assert config == tritons.get_model_config(MODEL, version)
    assert {"name": "history", "data_type": "TYPE_STRING", "dims": [-1], "optional": True} in config["input"]
    before = tritons.get_inference_statistics(MODEL)["model_stats"][0]
    tritons.infer(MODEL, [users(binary=True)], model_version=version)
    with pytest.raises(InferenceServerException):
        tritons.infer(MODEL, [users(binary=True)], outputs=[triton.InferRequestedOutput("nonsense")])
    after = tritons.get_inference_statistics(MODEL, version)["model_stats"][0]
    counted = [after[name] - before[name] for name in ("inference_count", "execution_count")]
    counted += [
        after["inference_stats"][n]["count"] - before["inference_stats"][n]["count"] for n in ("success", "fail")
    ]
    assert counted == [2, 1, 1, 1]
    assert after in tritons.get_inference_statistics()["model_stats"]
    assert [model["name"] for model in tritons.get_model_repository_index()][:1] == [MODEL]
    tritons.load_model(MODEL)


@pytest.mark.parametrize(
    ("call", "status", "words"),
    [
        (lambda to: to.infer("other", [users(binary=True)]), "404", "no such model"),
        (lambda to: to.infer(MODEL, [users(binary=True)], model_version="0"), "404", "this version is not served"),
        (lambda to: to.get_model_metadata("other"), "404", "no such model"),
        (lambda to: to.get_model_config(MODEL, "0"), "404", "this version is not served"),
        (lambda to: to.load_model("other"), "404", "neither the repository"),
        (lambda to: to.load_model(MODEL, config="{}"), "422", "/parameters/config"),
        (lambda to: to.load_model(MODEL, config="{}", files={"file:1/model": b"x"}), "422", "/parameters/"),
        (lambda to: to.unload_model(MODEL, unload_dependents=True), "422", "/parameters/unload_dependents"),
        (lambda to: to.get_trace_settings(), "404", "nothing at this path"),
        (lambda to: to.infer(MODEL, [users(binary=True)], parameters={"colour": 1}), "422", "colour"),
        (lambda to: to.infer(MODEL, [users(binary=True)], sequence_id=3, sequence_start=True), "422", "sequence"),
        (
            lambda to: to.infer(MODEL, [users(binary=True)], outputs=[triton.InferRequestedOutput("x")]),
            "422",
            "item_id",
        ),
        (lambda to: to.infer(MODEL, [triton.InferInput("x", [1], "BYTES")]), "422", "either data or"),
    ],
)
def test_triton_is_refused_in_its_own_words(tritons: Any, call: Any, status: str, words: str) -> None:
    with pytest.raises(InferenceServerException) as refused:
        call(tritons)
    assert refused.value.status() == status
    assert "decoding" not in refused.value.message()
    assert words in refused.value.message()


def test_the_index_of_what_is_ready(start: Any, bundles: dict[str, Path]) -> None:
    with start(bundles["towers"], repository=bundles["towers"].parent) as client:
        every = client.post("/v2/repository/index").json()
        assert {model["state"] for model in every} == {"READY", "UNAVAILABLE"}
        assert client.post("/v2/repository/index", json={"ready": False}).json() == every
        ready = client.post("/v2/repository/index", json={"ready": True}).json()
        assert ready == [model for model in every if model["state"] == "READY"]
        wrongs: list[Any] = [{"ready": 1}, {"colour": True}, []]
        for wrong in wrongs:
            refused = client.post("/v2/repository/index", json=wrong)
            assert (refused.status_code, "error" in refused.json()) == (422, True)
        assert client.post("/v2/repository/index", content=b"{").status_code == 400


def test_a_service_has_the_names_it_is_given(start: Any, bundles: dict[str, Path]) -> None:
    with (
        start(bundles["towers"], bundles["dlrm"], name="recs", aliases={"pairs": "dlrm"}) as client,
        triton.InferenceServerClient(host(client)) as to,
    ):
        for name, own in (("recs", "untrained"), ("untrained", "untrained"), ("pairs", "dlrm")):
            assert to.is_model_ready(name)
            assert to.get_model_metadata(name)["name"] == name
            asked = to.infer(name, [users(binary=True)], parameters={"k": 3}).as_numpy("item_id")
            native = client.post("/v1/recommendations", params={"model": own}, json={"user_id": "7", "k": 3}).json()
            assert as_text(asked)[0] == [item["id"] for item in native["items"]]
            assert client.get("/v1/users/7/recommendations", params={"model": name}).status_code == 200
        assert not to.is_model_ready("other")
        to.load_model("pairs")
        to.unload_model("pairs")
        assert not to.is_model_ready("pairs")


def test_kserve_infers_and_is_refused_in_its_own_words(client: httpx.Client) -> None:
    url = str(client.base_url)

    def request(*, binary: bool, **parameters: Any) -> Any:
        tensor = kserve.InferInput("user_id", [2, 1], "BYTES")
        tensor.set_data_from_numpy(USERS, binary_data=binary)
        return kserve.InferRequest(MODEL, [tensor], parameters=parameters)

    async def ask() -> None:
        async with kserve.InferenceRESTClient(kserve.inference_client.RESTConfig(protocol="v2", retries=0)) as to:
            assert await to.is_server_live(url)
            assert await to.is_server_ready(url)
            assert await to.is_model_ready(url, MODEL)
            assert not await to.is_model_ready(url, "other")
            for binary_in in (True, False):
                for binary_out in (True, False):
                    asked = request(binary=binary_in, k=3, binary_data_output=binary_out)
                    answer = await to.infer(url, asked, model_name=MODEL)
                    flat = best(client, user_id="7") + best(client, user_id="8")
                    items = answer.get_output_by_name("item_id")
                    assert [
                        text.decode() if isinstance(text, bytes) else text for text in items.as_numpy().ravel()
                    ] == flat
                    assert answer.get_output_by_name("score").shape == [2, 3]
            version = client.get("/v1/models").json()["models"][0]["version"]
            # KServe's client has no argument for a version: a path below the model names it.
            assert await to.is_model_ready(url, f"{MODEL}/versions/{version}")
            assert not await to.is_model_ready(url, f"{MODEL}/versions/0")
            answer = await to.infer(url, request(binary=True, k=3), model_name=f"{MODEL}/versions/{version}")
            assert answer.get_output_by_name("score").shape == [2, 3]
            with pytest.raises(httpx.HTTPStatusError, match="this version is not served"):
                await to.infer(url, request(binary=True), model_name=f"{MODEL}/versions/0")
            with pytest.raises(httpx.HTTPStatusError, match="no such model"):
                await to.infer(url, request(binary=True), model_name="other")
            with pytest.raises(httpx.HTTPStatusError, match="colour"):
                await to.infer(url, request(binary=True, colour=1), model_name=MODEL)

    asyncio.run(ask())
