"""The documentation of the interface, and what all pages load."""

import re

import httpx


def test_pages_have_no_outside_assets_and_no_scripts(client: httpx.Client) -> None:
    for path in ("/", "/try", "/traffic", "/docs", "/report", "/assets/page.css"):
        response = client.get(path)
        assert response.status_code == 200
        assert re.findall(r"(?:src|href|url\()=?[\"'(]?(https?:|//)", response.text) == []
        assert "<script" not in response.text
        assert not re.search(r"\son\w+=|\sstyle=", response.text)
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'; style-src 'self'; img-src 'self' data:; form-action 'self'" in policy
    assert "script" not in policy
    assert "unsafe" not in policy


def test_docs_show_code_as_code(client: httpx.Client) -> None:
    text = client.get("/docs").text
    assert "`" not in re.sub(r"(?s)<pre.*?</pre>", "", text)
    assert "<code>next_offset</code>" in text


def test_docs_name_every_path(client: httpx.Client) -> None:
    from lazydp.service.app import document

    text = client.get("/docs").text
    assert [path for path in document()["paths"] if f"<code>{path}</code>" not in text] == []
