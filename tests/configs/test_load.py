"""Precedence, and the messages about mistakes."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from configs.fields import config_fields
from configs.load import ConfigError, config_file, describe, load_config, presets
from configs.schema import OctavoConfig


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "x.toml"


def problems(
    flags: dict[str, object] | None = None,
    environ: dict[str, str] | None = None,
    file: Path | None = None,
) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(flags or {}, environ or {}, file)
    assert str(caught.value).splitlines() == list(caught.value.problems)
    return caught.value.problems


def test_nothing_given_means_the_defaults() -> None:
    assert load_config({}, {"PATH": "x", "NOT_OCTAVO_PORT": "1"}, None) == OctavoConfig()


def test_flag_beats_environment_beats_file_beats_default(file: Path) -> None:
    file.write_text("port = 1\nhost = 'file'\nmax_queue = 1\n")
    environ = {"OCTAVO_PORT": "2", "OCTAVO_HOST": "environment"}
    config = load_config({"port": "3"}, environ, file)
    assert config.server.port == 3
    assert config.server.host == "environment"
    assert config.scheduler.max_queue == 1
    assert config.scheduler.max_num_seqs == OctavoConfig().scheduler.max_num_seqs


def test_flag_not_given_leaves_the_weaker_source() -> None:
    assert load_config({"port": None}, {"OCTAVO_PORT": "2"}, None).server.port == 2


@pytest.mark.parametrize("key", ["max-num-seqs", "max_num_seqs"])
def test_file_keys_in_kebab_and_snake_case(file: Path, key: str) -> None:
    file.write_text(f"{key} = 7")
    assert load_config({}, {}, file).scheduler.max_num_seqs == 7


def test_values_of_every_type(file: Path) -> None:
    file.write_text('api_key = ["a", "b"]\ndebug = true\ndrain_timeout_s = 1\n')
    environ = {
        "OCTAVO_KV_CACHE_MEMORY": "2GiB",
        "OCTAVO_API_KEY_FILE": "keys.txt",
        "OCTAVO_PROTECT_METRICS": "true",
        "OCTAVO_DTYPE": "bfloat16",
    }
    config = load_config({"max_request_bytes": "1k"}, environ, file)
    assert config.server.api_key == ("a", "b")
    assert config.scheduler.debug is True
    assert config.server.drain_timeout_s == 1.0
    assert config.cache.kv_cache_memory == 2 * 2**30
    assert config.server.api_key_file == Path("keys.txt")
    assert config.server.protect_metrics is True
    assert config.model.dtype == "bfloat16"
    assert config.server.max_request_bytes == 1024


@pytest.mark.parametrize("text", ["a,b", "a b", " a,\n b,"])
def test_lists_in_the_environment(text: str) -> None:
    assert load_config({}, {"OCTAVO_API_KEY": text}, None).server.api_key == ("a", "b")


def test_a_bad_value_names_key_source_and_what_is_allowed(file: Path) -> None:
    file.write_text("page_size = 0\n")
    environ = {"OCTAVO_PORT": "http"}
    assert problems({"device": "gpu", "model": ""}, environ, file) == (
        "model (argument MODEL): '' is not allowed; expected a text",
        "device (flag --device): 'gpu' is not allowed; expected one of auto, cpu, cuda",
        (
            f"page_size (file {file}): 0 is not allowed; "
            "expected a whole number of at least 1 and at most 1024"
        ),
        (
            "port (environment OCTAVO_PORT): 'http' is not allowed; "
            "expected a whole number of at least 0 and at most 65535"
        ),
    )


def test_each_bad_key_is_told_once_by_its_winning_source() -> None:
    (line,) = problems({"port": "70000"}, {"OCTAVO_PORT": "http"})
    assert line.startswith("port (flag --port): '70000'")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("kv_cache_memory", "2 apples", "a size such as 512MiB or 2GiB of at least 1 B"),
        ("max_request_bytes", "1", "a size such as 512MiB or 2GiB of at least 1 KiB"),
        ("debug", "maybe", "true or false"),
        ("drain_timeout_s", "nan", "a number of at least 0 and at most 3600"),
        ("drain_timeout_s", "inf", "a number of at least 0 and at most 3600"),
        ("max_num_seqs", "1.5", "a whole number of at least 1 and at most 4096"),
        ("max_decode_slowdown", "1", "a number above 1"),
        ("log_format", "xml", "one of text, json"),
    ],
)
def test_what_is_allowed(name: str, value: str, allowed: str) -> None:
    (line,) = problems({name: value})
    assert line.endswith(f"; expected {allowed}")


@pytest.mark.parametrize(
    "line", ["port = true", "max_queue = [1]", "model = false", "host = 1", "api_key = 'a'"]
)
def test_toml_values_of_another_type_are_not_bent(file: Path, line: str) -> None:
    file.write_text(line)
    (problem,) = problems(file=file)
    assert problem.startswith(f"{line.partition(' ')[0]} (file {file}): ")


@pytest.mark.parametrize("text", ["", " ", ","])
def test_an_empty_key_variable_does_not_open_the_server(text: str) -> None:
    (line,) = problems(environ={"OCTAVO_API_KEY": text})
    assert "(environment OCTAVO_API_KEY)" in line


def test_secrets_are_not_told(file: Path) -> None:
    file.write_text('api_key = ["hush", 5]')
    (line,) = problems(file=file)
    assert line == (
        f"api_key (file {file}): this value is not allowed; expected a list of non-empty texts"
    )


def test_unknown_keys_of_every_source(file: Path) -> None:
    file.write_text("prot = 1\nzzzzzz = 1\n[server]\nport = 1\n")
    lines = problems({"max_seqs": 1}, {"OCTAVO_PROT": "1"}, file)
    assert lines[0] == f"prot (file {file}): is not a known key; did you mean port?"
    assert lines[1].startswith(f"zzzzzz (file {file}): is not a known key; allowed: model, ")
    assert lines[2].startswith(f"server (file {file}): is not a known key; ")
    assert lines[3] == (
        "OCTAVO_PROT (environment OCTAVO_PROT): is not a known key; did you mean OCTAVO_PORT?"
    )
    assert lines[4].startswith("max_seqs (flags): is not a known key; did you mean max_")


def test_a_key_twice_in_one_file(file: Path) -> None:
    file.write_text("max-queue = 1\nmax_queue = 2\n")
    assert problems(file=file) == (f"max_queue (file {file}): is given twice, with - and with _",)


def test_reserved_variables_are_no_fields() -> None:
    environ = {"OCTAVO_HOME": "/x", "OCTAVO_CPU_OPS": "/x", "OCTAVO_CPU_ISA": "avx2"}
    assert load_config({}, environ, None) == OctavoConfig()


def test_kubernetes_service_links_are_explained() -> None:
    (line,) = problems(environ={"OCTAVO_SERVICE_HOST": "10.0.0.1"})
    assert "enableServiceLinks: false" in line


def test_config_variable_names_the_file_unless_a_flag_does(file: Path, tmp_path: Path) -> None:
    file.write_text("port = 1")
    other = tmp_path / "other.toml"
    other.write_text("port = 2")
    assert load_config({}, {"OCTAVO_CONFIG": str(file)}, None).server.port == 1
    assert load_config({}, {"OCTAVO_CONFIG": str(file)}, other).server.port == 2
    assert load_config({}, {"OCTAVO_CONFIG": "cpu"}, None).model.device == "cpu"


def test_file_that_is_missing_or_broken(file: Path) -> None:
    (line,) = problems(file=file)
    assert line == (
        f"config (file {file}): cannot be read: No such file or directory; "
        "expected a TOML file or a preset: cpu, default, h100"
    )
    file.write_text("port 8000")
    (line,) = problems(file=file)
    assert line.startswith(f"config (file {file}): is not TOML in UTF-8: ")
    file.write_bytes(b"\xff\xfe")
    (line,) = problems(file=file)
    assert line.startswith(f"config (file {file}): is not TOML in UTF-8: ")


def test_all_faults_are_told_at_once(file: Path) -> None:
    lines = problems({"port": "x", "device": "y"}, {"OCTAVO_DTYPE": "z"}, file)
    assert [line.split()[0] for line in lines] == ["config", "device", "dtype", "port"]


def test_describe_is_json_without_secrets() -> None:
    flags: dict[str, object] = {"api_key": ["hush", "hush2"], "api_key_file": "keys.txt"}
    shown = describe(load_config(flags, {}, None))
    assert "hush" not in json.dumps(shown)
    assert shown["api_key"] == ["***", "***"]
    assert shown["api_key_file"] == "keys.txt"
    assert list(shown) == list(config_fields())


def test_presets_load() -> None:
    assert list(presets()) == ["cpu", "default", "h100"]
    assert load_config({}, {}, config_file("default")) == OctavoConfig()
    cpu = load_config({}, {}, config_file("cpu"))
    assert (cpu.model.device, cpu.cache.kv_cache_memory) == ("cpu", 2 * 2**30)
    h100 = load_config({}, {}, config_file("h100"))
    assert (h100.model.device, h100.model.dtype) == ("cuda", "bfloat16")


def test_a_path_is_no_preset() -> None:
    assert config_file("./cpu") == Path("cpu")
    assert config_file("mine.toml") == Path("mine.toml")


def test_default_toml_shows_every_field() -> None:
    text = config_file("default").read_text()
    uncommented = tomllib.loads(
        "\n".join(
            line.removeprefix("# ")
            for line in text.splitlines()
            if not line.startswith("#")
            or line.removeprefix("# ").partition(" = ")[0].isidentifier()
        )
    )
    assert list(uncommented) == list(config_fields())


def test_field_names_are_unique_across_sections() -> None:
    count = sum(len(type(section).model_fields) for _, section in OctavoConfig())
    assert len(config_fields()) == count
