"""Codex and opencode, the programs themselves, through whole turns: a call, its result, an answer.

The model is scripted, so its answers are certain; the HTTP side is the real one. Each program
has a home of its own in a temporary folder and nothing but loopback.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from scheduler.client import FinishReason, GenerateRequest, Started, TokenOutput
from server.text.load import ModelText
from server.text.template import ChatTemplate

pytestmark = pytest.mark.e2e

_MODULES = Path(__file__).parents[1] / "clients" / "node" / "node_modules"
_CPU = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
_LIMIT_S = 120.0
_ANSWER = "The shell said forty-two."
#: Puts everything where the script finds it again.
TEMPLATE = """\
{%- if tools %}{{ tools | tojson }} <tool_call>{% endif %}
{%- for m in messages %}[{{ m.role }}]{{ m.content }}
{%- for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}{% endfor %}"""


def _call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class _Script:
    """A model that makes each call once its turn comes, and then answers."""

    def __init__(self, *calls: str) -> None:
        self._calls = calls
        #: The prompts of the model, request by request.
        self.prompts: list[str] = []

    async def __call__(
        self, _: object, request: GenerateRequest
    ) -> AsyncGenerator[TokenOutput, None]:
        prompt = bytes(token for token in request.prompt_token_ids if token < 256).decode()
        self.prompts.append(prompt)
        num_results = prompt.count("[tool]")
        has_tools = "<tool_call>" in prompt
        is_calling = has_tools and num_results < len(self._calls)
        said = self._calls[num_results] if is_calling else _ANSWER
        yield TokenOutput(tuple(said.encode()), (), Started(0, 0.0, 0))
        yield TokenOutput(started=None, finish_reason=FinishReason.STOP)


@pytest.fixture
def serving(scripted: Callable[..., Any], text: ModelText) -> Callable[[_Script], Any]:
    """Start a server with room for the prompts of such programs."""

    def start(script: _Script) -> Any:
        words = ChatTemplate(
            {"default": TEMPLATE}, special_tokens={}, now=lambda: datetime.now(tz=UTC)
        )
        live = scripted(script, words=replace(text, template=words))
        live.client.info = replace(live.client.info, max_model_len=2**20)
        return live

    return start


def _program(*parts: str) -> str:
    """Return a program; of its path a part may be a pattern."""
    found = list(_MODULES.glob("/".join(parts)))
    if not found:
        path = _MODULES.joinpath(*parts)
        pytest.fail(f"{path} is missing; `make clients` puts it there", pytrace=False)
    return str(found[0])


def _run(command: list[str], home: Path, **environ: str) -> str:
    workspace = home / "workspace"
    workspace.mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TERM") if name in os.environ}
    done = subprocess.run(
        command,
        cwd=workspace,
        env={**kept, "HOME": str(home), "NO_PROXY": "127.0.0.1", **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def _check_log(live: Any, route: str) -> None:
    lines = [json.loads(line) for line in live.log.getvalue().splitlines()]
    requests = [line for line in lines if line["event"] == "request"]
    assert {line["status"] for line in requests} == {200}, requests
    assert route in {line["route"] for line in requests}


def test_codex(serving: Callable[[_Script], Any], tmp_path: Path) -> None:
    script = _Script(
        _call("exec_command", cmd="echo $((6 * 7))"),
        _call("multi_agent_v1__close_agent", target="nobody"),
    )
    live = serving(script)
    folder = tmp_path / ".codex"
    folder.mkdir()
    (folder / "config.toml").write_text(
        f"""\
model = "fake"
model_provider = "octavo"
[model_providers.octavo]
name = "octavo"
base_url = "{live.url}/v1"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0
"""
    )
    # The program itself, which a script in front of it looks for.
    codex = _program("@openai", f"codex-linux-{_CPU}", "vendor", "*", "bin", "codex")
    flags = ["exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
    out = _run([codex, *flags, "What is 6 * 7?"], tmp_path, CODEX_HOME=str(folder))
    assert _ANSWER in out
    assert "42" in script.prompts[-1]
    assert "unsupported call" not in script.prompts[-1]
    _check_log(live, "/v1/responses")


@pytest.mark.skipif(_CPU != "x64", reason="no other build of opencode is pinned")
def test_opencode(serving: Callable[[_Script], Any], tmp_path: Path) -> None:
    script = _Script(_call("bash", command="echo $((6 * 7))", description="Multiplies."))
    live = serving(script)
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "octavo",
        "options": {"baseURL": f"{live.url}/v1", "apiKey": "none"},
        "models": {"fake": {"name": "fake", "limit": {"context": 2**20, "output": 2048}}},
    }
    config = {"provider": {"octavo": provider}, "model": "octavo/fake", "permission": "allow"}
    out = _run(
        [_program("opencode-linux-x64", "bin", "opencode"), "run", "What is 6 * 7?"],
        tmp_path,
        OPENCODE_CONFIG_CONTENT=json.dumps(config),
        # Each would ask the internet.
        OPENCODE_DISABLE_AUTOUPDATE="1",
        OPENCODE_DISABLE_MODELS_FETCH="1",
        OPENCODE_DISABLE_LSP_DOWNLOAD="1",
        OPENCODE_DISABLE_DEFAULT_PLUGINS="1",
    )
    assert _ANSWER in out
    assert "42" in script.prompts[-1]
    _check_log(live, "/v1/chat/completions")
