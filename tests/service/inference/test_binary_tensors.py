"""What is wrong with bytes behind the JSON is one problem of status 4xx, whatever it is."""

import json
import struct
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PATH = "/v2/models/untrained/infer"
LENGTH = "Inference-Header-Content-Length"


def text(*values: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def tensor(name: str = "user_id", shape: Any = (1,), datatype: str = "BYTES", **about: Any) -> dict[str, Any]:
    return {"name": name, "shape": list(shape), "datatype": datatype, **about}


def sized(size: int, **about: Any) -> dict[str, Any]:
    return tensor(**about, parameters={"binary_data_size": size})


def send(client: httpx.Client, head: Any, raw: bytes = b"", length: Any = None) -> httpx.Response:
    encoded = json.dumps(head).encode() if isinstance(head, dict) else head
    given = {} if length is False else {LENGTH: str(len(encoded) if length is None else length)}
    return client.post(PATH, content=encoded + raw, headers=given)


USER = text(b"7")
CASES: dict[str, tuple[list[dict[str, Any]], bytes, Any, int]] = {
    "right": ([sized(len(USER))], USER, None, 200),
    "the header names no number": ([sized(len(USER))], USER, "x", 400),
    "the header is negative": ([sized(len(USER))], USER, -1, 400),
    "the header is beyond the body": ([sized(len(USER))], USER, 10_000, 400),
    "the header is huge": ([sized(len(USER))], USER, "9" * 400, 400),
    "the header cuts the JSON": ([sized(len(USER))], USER, 10, 400),
    "no header, but bytes": ([sized(len(USER))], USER, False, 400),
    "fewer bytes than the size": ([sized(len(USER) + 1)], USER, None, 400),
    "more bytes than the size": ([sized(len(USER))], USER + b"x", None, 400),
    "a size that takes the next tensor's bytes": (
        [sized(2 * len(USER)), sized(len(USER), name="history", shape=(1, 1))],
        USER + USER,
        None,
        422,
    ),
    "a huge size": ([sized(2**60)], USER, None, 400),
    "a negative size": ([sized(-1)], USER, None, 422),
    "a size that is text": ([tensor(parameters={"binary_data_size": "5"})], USER, None, 422),
    "an unknown parameter": ([tensor(parameters={"binary_data_size": 5, "x": 1})], USER, None, 422),
    "data and bytes": ([sized(len(USER), data=["7"])], USER, None, 422),
    "neither data nor bytes": ([tensor()], b"", None, 422),
    "a text longer than the bytes": ([sized(len(USER))], struct.pack("<I", 2**32 - 1) + b"7", None, 422),
    "a text that ends early": ([sized(len(USER))], struct.pack("<I", 0) + b"7", None, 422),
    "no room for the lengths": ([sized(3)], b"abc", None, 422),
    "a huge shape": ([sized(len(USER), name="history", shape=(10_000, 10_000))], USER, None, 422),
    "an impossible shape": ([sized(len(USER), shape=(2**70,))], USER, None, 422),
    "a negative shape": ([sized(len(USER), shape=(-1,))], USER, None, 422),
    "no shape": ([sized(len(USER), shape=())], USER, None, 422),
    "three extents": ([sized(len(USER), shape=(1, 1, 1))], USER, None, 422),
    "no rows": ([sized(0, shape=(0,))], b"", None, 422),
    "text that is not UTF-8": ([sized(5)], text(b"\xff"), None, 422),
    "integers": ([sized(8, datatype="INT64")], struct.pack("<q", 7), None, 200),
    "small integers": ([sized(1, datatype="UINT8")], b"\7", None, 200),
    "integers of the wrong size": ([sized(4, datatype="INT64")], struct.pack("<i", 7), None, 422),
    "floats as ids": ([sized(4, datatype="FP32")], struct.pack("<f", 7), None, 422),
    "an unknown datatype": ([sized(2, datatype="BF16")], b"\0\0", None, 422),
    "a number that is none": ([sized(8, name="age", datatype="FP64")], struct.pack("<d", float("nan")), None, 422),
    "an input twice": ([sized(len(USER)), sized(len(USER))], USER + USER, None, 422),
    "rows that differ": ([sized(len(USER)), sized(0, name="history", shape=(2, 0))], USER, None, 422),
    "an unknown input": ([sized(len(USER), name="colour")], USER, None, 422),
    "an id that is too long": ([sized(304)], text(b"7" * 300), None, 422),
    "an empty history": ([sized(len(USER)), sized(0, name="history", shape=(1, 0))], USER, None, 200),
}


@pytest.mark.parametrize("case", CASES)
def test_cases(client: httpx.Client, case: str) -> None:
    inputs, raw, length, status = CASES[case]
    response = send(client, {"inputs": inputs}, raw, length)
    assert response.status_code == status, response.text
    assert status == 200 or response.json()["error"]


def test_ids_that_differ_late_are_not_the_same(client: httpx.Client) -> None:
    # They used to be cut at 256 characters, so that two users got one answer.
    response = client.post(PATH, json={"inputs": [tensor(data=["7" * 257])]})
    assert response.status_code == 422


@pytest.mark.parametrize(
    ("data", "shape", "status"),
    [
        (["1", "2", "3", "4"], [2, 2], 200),
        ([["1", "2"], ["3", "4"]], [2, 2], 200),
        ([["1"], ["2", "3", "4"]], [2, 2], 422),
        ([["1", "2", "3"], ["4"]], [2, 2], 422),
        ([[["1", "2"], ["3", "4"]]], [2, 2], 422),
        (["1", ["2"], "3", "4"], [2, 2], 422),
        ([{"a": 1}, "2", "3", "4"], [2, 2], 422),
        ([True, "2", "3", "4"], [2, 2], 422),
        ([None, "2", "3", "4"], [2, 2], 422),
        ([1.5, "2", "3", "4"], [2, 2], 422),
    ],
)
def test_json_data_fits_its_shape(client: httpx.Client, data: Any, shape: list[int], status: int) -> None:
    inputs = [tensor("history", shape, data=data)]
    assert client.post(PATH, json={"inputs": inputs}).status_code == status


MUTATIONS = st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=4)), max_size=4)


@given(
    cut=st.integers(0, 400), changes=MUTATIONS, length=st.none() | st.integers(-5, 400), extra=st.binary(max_size=30)
)
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_change_of_a_request_makes_the_service_fail(
    client: httpx.Client, cut: int, changes: list[tuple[int, bytes]], length: int | None, extra: bytes
) -> None:
    history = text(b"1", b"2")
    head = {
        "inputs": [sized(len(USER)), sized(len(history), name="history", shape=(1, 2))],
        "outputs": [{"name": "score", "parameters": {"binary_data": True}}],
        "parameters": {"k": 3, "filters": '{"genre": ["a"]}'},
    }
    encoded = json.dumps(head).encode()
    body = bytearray(encoded + USER + history)
    for at, change in changes:
        body[at : at + len(change)] = change
    content = bytes(body[: len(body) - cut] if cut < len(body) else body) + extra
    given = len(encoded) if length is None else length
    response = client.post(PATH, content=content, headers={LENGTH: str(given)})
    assert response.status_code < 500
    if response.status_code != 200:
        assert response.json()["error"]
