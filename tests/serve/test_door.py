"""What is answered before a model is asked: paths with a slash at the end, and refusals that are counted."""

from __future__ import annotations

import re

import pytest
from starlette.routing import Route

from vtp.serve.http.models import Models
from vtp.serve.settings import Settings

from .client import CHAT, Answer, Site, serving


def refusals(answer: Answer) -> dict[str, float]:
    """Status -> requests that were refused before their model was known."""
    found = re.findall(r'vtp_requests_total\{model="other",status="(\w+)"\} (\S+)', answer.content.decode())
    return {status: float(count) for status, count in found}


@pytest.mark.parametrize(
    "path", ["/v1/models", "/models", "/health", "/health/ready", "/v1/health", "/metrics", "/api/tags"]
)
def test_a_slash_at_the_end_changes_nothing(site: Site, path: str) -> None:
    """A redirect would lead to http:, and out of a proxy's TLS."""
    plain, with_slash = site.send(path), site.send(path + "/")
    assert (plain.status, with_slash.status) == (200, 200)
    assert plain.headers["content-type"] == with_slash.headers["content-type"]


def test_a_question_with_a_slash_at_the_end_is_answered(site: Site) -> None:
    asked = {"messages": [{"role": "user", "content": "how many ?"}], "max_tokens": 3}
    right = site.send(CHAT, asked)
    assert site.send(CHAT + "/", asked).text == right.text
    assert site.send("/api/generate/", {"prompt": "how many ?", "stream": False}).status == 200
    assert site.send("/v1/models/tiny/").json == site.send("/v1/models/tiny").json


def test_refusals_at_the_door_are_counted() -> None:
    """Each by its status; probes of the server's health are no requests."""
    sender = {"Authorization": "Bearer secret"}
    with serving(Models({}), Settings(key="secret", body_bytes=1000)) as site:
        site.send(CHAT, {})
        site.send("/v1/models", headers={"Host": "evil.example.org"})
        site.send(CHAT, {"x": "y" * 2000}, headers=sender)
        site.send(CHAT, b"{", headers=sender)
        site.send("/nowhere", headers=sender)
        site.send("/nowhere", headers=sender)
        site.send("/v1/chat/completions", headers=sender)
        site.send("/health/nothing")
        assert refusals(site.send("/metrics")) == {
            "401": 1, "403": 1, "413": 1, "400": 1, "404": 2, "405": 1,
        }  # fmt: skip


def test_a_refusal_of_a_model_is_counted_once(site: Site) -> None:
    before = refusals(site.send("/metrics"))
    assert site.chat([{"type": "image_url", "image_url": "data:,x"}]).status == 400
    assert refusals(site.send("/metrics")) == before
    assert 'vtp_requests_total{model="tiny",status="400"}' in site.send("/metrics").content.decode()


def test_head_and_options_everywhere(site: Site) -> None:
    """HEAD is GET without its body where there is GET; what is not taken is told, with what is."""
    app = site.server.config.app
    routes = [route for route in app.routes if isinstance(route, Route)]  # type: ignore[union-attr]
    taken: dict[str, set[str]] = {}
    for route in routes:
        taken.setdefault(route.path.replace("{name:path}", "tiny"), set()).update(route.methods or ())
    assert len(taken) > 15
    for path, methods in taken.items():
        head, options = site.send(path, method="HEAD"), site.send(path, method="OPTIONS")
        assert head.status == (200 if "HEAD" in methods else 405) and not head.content, path
        assert options.status == 405 and "OPTIONS is not allowed" in str(options.json), path
        allowed = {name.strip() for name in options.headers["allow"].split(",")}
        assert allowed <= methods, path
