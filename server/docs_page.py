"""/docs: the routes in a browser, with Swagger UI's files from an installed package.

Nothing is loaded from elsewhere, and the page's Content-Security-Policy lets nothing be.
"""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from importlib import resources

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import Response

_FILES = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}
_INLINE_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def docs_routes() -> APIRouter:
    """Return the page and the files that it loads."""
    router = APIRouter(include_in_schema=False)
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="Octavo",
        swagger_js_url="/docs/swagger-ui-bundle.js",
        swagger_css_url="/docs/swagger-ui.css",
        swagger_favicon_url="/docs/favicon-32x32.png",
    )
    page.headers["Content-Security-Policy"] = _policy(bytes(page.body).decode())

    @router.get("/docs")
    async def docs() -> Response:
        return page

    for name, media_type in _FILES.items():
        _add_file(router, name, media_type)
    return router


def _add_file(router: APIRouter, name: str, media_type: str) -> None:
    # The folder's name alone: the package itself would patch an application.
    path = resources.files("fastapi_swagger") / "resources" / name
    headers = {"Cache-Control": "max-age=86400", "X-Content-Type-Options": "nosniff"}

    @router.get(f"/docs/{name}")
    async def file() -> Response:
        return Response(path.read_bytes(), media_type=media_type, headers=headers)


def _policy(page: str) -> str:
    """Return the policy: files of this server, and the one script that stands in the page."""
    digests = [hashlib.sha256(text.encode()).digest() for text in _INLINE_SCRIPT.findall(page)]
    scripts = " ".join(f"'sha256-{b64encode(digest).decode()}'" for digest in digests)
    # Swagger UI sets styles of elements and shows pictures that are written as data.
    return (
        f"default-src 'none'; script-src 'self' {scripts}; style-src 'self' 'unsafe-inline';"
        " img-src 'self' data:; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'"
    )
