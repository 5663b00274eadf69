"""/docs works without any other server, and its policy allows only the sources that it needs."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from typing import Any


def test_the_page_loads_its_files_from_here_alone(shared: Any) -> None:
    answer = shared.http.get("/docs")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    loaded = re.findall(r'(?:src|href)="([^"]+)"', answer.text)
    assert len(loaded) == 3
    for url in loaded:
        assert url.startswith("/docs/")
        file = shared.http.get(url)
        assert file.status_code == 200
        assert len(file.content) > 500
        assert file.headers["content-type"].partition(";")[0] in {
            *("text/javascript", "text/css", "image/png")
        }
    assert "url: '/openapi.json'" in answer.text
    assert shared.http.get("/openapi.json").status_code == 200


def test_the_policy_names_the_pages_own_script_and_no_other_server(shared: Any) -> None:
    answer = shared.http.get("/docs")
    policy = answer.headers["content-security-policy"]
    [script] = re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL)
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'self' 'sha256-{digest}';" in policy
    assert "default-src 'none'" in policy
    assert "http" not in policy
