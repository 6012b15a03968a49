"""From which pages the panel's routes may be asked, and under which names of the server."""

import socket

import pytest
from paralleldit.nodes.panel import origin
from paralleldit.parallel_backend.errors import UserError

SAME, CROSS, NONE = ({"Sec-Fetch-Site": site} for site in ("same-origin", "cross-site", "none"))
REFUSED, NO_NAME = "may not do this", "no name of this server"
LOCAL = "127.0.0.1:8188"
PROXIED = {"Host": LOCAL, "X-Forwarded-Host": "comfy.example"}


def page(of: str, **more: str) -> dict[str, str]:
    return {"Origin": of, **more}


@pytest.mark.parametrize(
    ("headers", "complaint"),
    [
        # Not from a page: the command line, or an address that was typed in.
        ({"Host": LOCAL}, None),
        ({"Host": LOCAL, **NONE}, None),
        ({"Host": "localhost:8188"}, None),
        ({"Host": "LOCALHOST.:8188"}, None),
        ({"Host": "comfy.localhost:8188"}, None),
        ({"Host": "[::1]:8188"}, None),
        ({"Host": "192.168.1.5:8188"}, None),
        ({"Host": socket.gethostname()}, None),
        ({"Host": f"{socket.gethostname()}.local:8188"}, None),
        ({"Host": "comfyui:8188"}, None),
        ({"Host": "listens.example:8188"}, None),
        ({"Host": "allowed.example:8188"}, None),
        ({"Host": "Allowed.Example."}, None),
        # A page of the server.
        ({"Host": LOCAL, **page(f"http://{LOCAL}")}, None),
        ({"Host": LOCAL, **page(f"HTTP://{LOCAL}"), **SAME}, None),
        ({"Host": "allowed.example", **page("https://allowed.example")}, None),
        ({"Host": "allowed.example:443", **page("https://allowed.example")}, None),
        # A page of another site, or of another port of this machine.
        ({"Host": LOCAL, **page("http://evil.example")}, REFUSED),
        ({"Host": LOCAL, **page("http://evil.example"), **CROSS}, REFUSED),
        ({"Host": LOCAL, **page("https://evil.example"), **CROSS}, REFUSED),
        ({"Host": LOCAL, **page("http://127.0.0.1:9999")}, REFUSED),
        ({"Host": LOCAL, **page("http://127.0.0.1:9999"), "Sec-Fetch-Site": "same-site"}, REFUSED),
        ({"Host": LOCAL, **page(f"http://{LOCAL}@evil.example")}, REFUSED),
        ({"Host": LOCAL, **page("null")}, REFUSED),
        ({"Host": LOCAL, **page("http://127.0.0.1:99999999")}, REFUSED),
        ({"Host": LOCAL, **page("http://[evil")}, REFUSED),
        ({"Host": LOCAL, **CROSS}, REFUSED),
        # A name that its owner has pointed here.
        ({"Host": "evil.example:8188"}, NO_NAME),
        ({"Host": "evil.example:8188", **page("http://evil.example:8188")}, NO_NAME),
        ({"Host": "evil.example:8188", **page("http://evil.example:8188"), **SAME}, NO_NAME),
        ({"Host": "evil.example:8188", **NONE}, NO_NAME),
        ({"Host": "127.0.0.1.evil.example"}, NO_NAME),
        ({"Host": "localhost.evil.example"}, NO_NAME),
        ({"Host": "evil.example", "Referer": "http://evil.example/"}, NO_NAME),
        ({"Host": "evil.example", "X-Forwarded-Host": LOCAL, **page("http://evil.example")}, NO_NAME),
        ({"Host": ""}, NO_NAME),
        ({}, NO_NAME),
        # A proxy that passes the name on: over https, where a certificate says whose it is.
        ({"Host": "comfy.example", **page("https://comfy.example"), **SAME}, None),
        ({"Host": "comfy.example", "Referer": "https://comfy.example/", **SAME}, None),
        ({"Host": "comfy.example", **page("https://other.example")}, NO_NAME),
        ({"Host": "comfy.example", "Referer": "https://other.example/"}, NO_NAME),
        # A proxy that puts its own name in the place of it.
        ({**PROXIED, **page("https://comfy.example"), **SAME}, None),
        ({**PROXIED, **page("https://comfy.example")}, None),
        ({**PROXIED, **page("http://comfy.example")}, REFUSED),
        ({**PROXIED, **page("http://evil.example")}, REFUSED),
        ({"Host": LOCAL, "X-Forwarded-Host": "allowed.example, inner", **page("http://allowed.example")}, None),
        ({"Host": "comfyui:8188", "X-Forwarded-Host": "192.168.1.5", **page("http://192.168.1.5")}, None),
        ({"Host": LOCAL, "X-Forwarded-Host": "evil.example", **page("http://evil.example")}, REFUSED),
    ],
)
def test_pages_of_this_server_may_ask_and_no_others(monkeypatch, headers, complaint):
    monkeypatch.setenv(origin.ALLOWED_VARIABLE, "allowed.example, second.example")
    names = origin.own_names("0.0.0.0,::,listens.example")
    if complaint is None:
        origin.check(headers, names)
        return
    with pytest.raises(UserError, match=complaint):
        origin.check(headers, names)


def test_a_refused_name_is_told_how_it_is_allowed():
    with pytest.raises(UserError) as refused:
        origin.check({"Host": "comfy.example:8188"}, origin.own_names("127.0.0.1"))
    assert refused.value.hint.endswith("PARALLELDIT_ALLOWED_HOSTS=comfy.example.")
