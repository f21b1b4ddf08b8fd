"""The chat page at `/`: one HTML file of the package, allowed to run nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

PAGE = Path(__file__).with_name("page.html")


def headers(html: str) -> dict[str, str]:
    """What keeps whatever else might get into the page from running or reaching other hosts."""

    def allowed(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        sums = [base64.b64encode(hashlib.sha256(p.encode()).digest()).decode() for p in parts]
        return " ".join(f"'sha256-{s}'" for s in sums)

    policy = {
        "default-src": "'none'",
        "script-src": allowed("script"),
        "style-src": allowed("style"),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "content-security-policy": "; ".join(f"{k} {v}" for k, v in policy.items()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


async def page(http: Request) -> Response:
    html = PAGE.read_text(encoding="utf-8")
    return HTMLResponse(html, headers=headers(html))
