from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Core

from server.text.load import load_text
from server.text.token_bytes import TextError

USER = [{"role": "user", "content": "Hi"}]
TEMPLATE = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"


@pytest.fixture
def folder(tmp_path: Path, byte_level_core: Core) -> Path:
    """Hold a tokenizer.json with `<s>` 258 besides the bytes, `he` and `<|end|>` 257."""
    byte_level_core.add_special_tokens([AddedToken("<s>", normalized=False)])
    byte_level_core.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(path: Path, content: object) -> None:
    path.parent.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")


# ---- folders -------------------------------------------------------------------------------------


def test_a_tokenizer_alone_completes_but_does_not_chat(folder: Path) -> None:
    text = load_text(folder)
    assert text.template is None
    assert text.tokenizer.encode("he", add_special_tokens=True) == [256]
    assert (text.tokenizer.bos_token_id, text.tokenizer.eos_token_ids) == (None, ())
    assert text.tokenizer.vocab_size == 259


def test_special_tokens_are_strings_or_objects(folder: Path) -> None:
    config = {"bos_token": {"content": "<s>"}, "eos_token": "<|end|>", "pad_token": None}
    write(folder / "tokenizer_config.json", config | {"chat_template": TEMPLATE})
    text = load_text(folder)
    assert (text.tokenizer.bos_token_id, text.tokenizer.eos_token_ids) == (258, (257,))
    assert text.template is not None
    assert text.template.render(USER) == "<s>Hi<|end|>"


def test_special_tokens_may_stand_in_their_own_file(folder: Path) -> None:
    write(folder / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "<|end|>"})
    assert load_text(folder).tokenizer.bos_token_id == 258


@pytest.mark.parametrize("adds", [True, False])
def test_bos_and_eos_are_added_as_tokenizer_json_says(folder: Path, adds: bool) -> None:
    config: dict[str, object] = {"bos_token": "<s>", "eos_token": "<|end|>"}
    config |= {"add_bos_token": adds, "add_eos_token": adds}
    write(folder / "tokenizer_config.json", config)
    assert load_text(folder).tokenizer.encode("he", add_special_tokens=True) == [256]


def test_the_ends_of_a_text_come_from_all_files(folder: Path) -> None:
    write(folder / "tokenizer_config.json", {"eos_token": "<|end|>"})
    write(folder / "generation_config.json", {"eos_token_id": [257, 5]})
    write(folder / "config.json", {"eos_token_id": 6})
    assert load_text(folder).tokenizer.eos_token_ids == (257, 5, 6)


def rendered(folder: Path, *, has_tools: bool = False) -> str:
    template = load_text(folder).template
    assert template is not None
    return template.render(USER, tools=[{"type": "function"}] if has_tools else None)


def test_templates_may_be_named(folder: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    write(folder / "tokenizer_config.json", {"chat_template": named})
    assert rendered(folder) == "plain"
    assert rendered(folder, has_tools=True) == "tools"


@pytest.mark.parametrize(
    "named", [[{"name": "tool_use", "template": "tools"}], {"tool_use": "tools"}]
)
def test_a_template_for_tools_alone_is_one_for_all_chats(folder: Path, named: object) -> None:
    write(folder / "tokenizer_config.json", {"chat_template": named})
    assert rendered(folder) == rendered(folder, has_tools=True) == "tools"
    [note] = load_text(folder).notes
    assert "tool_use" in note


def test_named_templates_may_be_an_object(folder: Path) -> None:
    named = {"default": "plain", "tool_use": "tools"}
    write(folder / "tokenizer_config.json", {"chat_template": named})
    assert rendered(folder) == "plain"
    assert rendered(folder, has_tools=True) == "tools"
    assert load_text(folder).notes == ()


def test_template_files_go_before_the_config(folder: Path) -> None:
    write(folder / "tokenizer_config.json", {"chat_template": "old"})
    write(folder / "chat_template.jinja", "new")
    assert rendered(folder) == "new"
    write(folder / "additional_chat_templates" / "tool_use.jinja", "tools")
    assert rendered(folder, has_tools=True) == "tools"


def test_the_processors_template_is_read_where_there_is_no_other(folder: Path) -> None:
    write(folder / "chat_template.json", {"chat_template": "legacy"})
    assert rendered(folder) == "legacy"


def test_a_template_knows_the_time_it_is_given(folder: Path) -> None:
    write(folder / "chat_template.jinja", "{{ strftime_now('%d %b %Y') }}")
    template = load_text(folder, now=lambda: datetime(2031, 2, 3, tzinfo=UTC)).template
    assert template is not None
    assert template.render(USER) == "03 Feb 2031"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
        ("config.json", [], "config.json must hold a JSON object"),
        ("tokenizer.json", {}, "tokenizer.json is not a readable tokenizer"),
        ("chat_template.jinja", "\n{% if %}", "chat template: template default, line 2"),
        ("tokenizer_config.json", {"chat_template": [1]}, "must have name and template"),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "rag", "template": "x"}]},
            "no chat_template named default among: rag",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    folder: Path, name: str, content: object, problem: str
) -> None:
    write(folder / name, content)
    with pytest.raises(TextError, match=problem):
        load_text(folder)


def test_without_a_tokenizer_the_files_looked_for_are_told(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"looked for .*tokenizer\.json and found no such file$"):
        load_text(tmp_path)
    write(tmp_path / "tokenizer.model", "")
    with pytest.raises(TextError, match=r"found no such file \(there is tokenizer\.model; convert"):
        load_text(tmp_path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"neither a model folder, nor a \.gguf file, nor"):
        load_text(tmp_path / "model.bin")


# ---- dummy models --------------------------------------------------------------------------------


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    def write_to(**config: object) -> Path:
        write(tmp_path / "CONFIG.json", config)
        return tmp_path / "CONFIG.json"

    return write_to


def test_a_dummys_first_tokens_are_bytes(write_config: Callable[..., Path]) -> None:
    tokenizer = load_text(write_config(vocab_size=1000, eos_token_id=2)).tokenizer
    assert tokenizer.vocab_size == 1000
    assert tokenizer.encode("Hé 300", add_special_tokens=True) == list("Hé 300".encode())
    assert tokenizer.decode([0x48, 0xC3, 0xA9, 300, 999], skip_special_tokens=True) == "Hé 300 999"
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.decode([2, 65], skip_special_tokens=True) == "A"


def test_a_dummys_end_may_lie_above_the_bytes(write_config: Callable[..., Path]) -> None:
    path = write_config(vocab_size=300, eos_token_id=[299, 0, 400])
    tokenizer = load_text(path).tokenizer
    assert tokenizer.eos_token_ids == (299, 0, 400)
    assert tokenizer.decode([65, 299], skip_special_tokens=True) == "A"
    assert tokenizer.encode("<|end299|>", add_special_tokens=False) == [299]


def test_a_dummy_can_chat(write_config: Callable[..., Path]) -> None:
    template = load_text(write_config(vocab_size=256)).template
    assert template is not None
    assert template.render(USER) == ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("vocab_size", [255, None, "many"])
def test_a_dummy_too_small_for_bytes_is_refused(
    write_config: Callable[..., Path], vocab_size: object
) -> None:
    with pytest.raises(TextError, match=r"CONFIG\.json: vocab_size must be at least 256"):
        load_text(write_config(vocab_size=vocab_size))


def test_a_tokenizer_beside_the_config_is_used(
    folder: Path, write_config: Callable[..., Path]
) -> None:
    path = write_config(vocab_size=1000, eos_token_id=77)
    assert path.parent == folder
    tokenizer = load_text(path).tokenizer
    assert tokenizer.encode("he", add_special_tokens=False) == [256]
    assert tokenizer.eos_token_ids == (77,)


def test_the_sampling_the_makers_ask_for(folder: Path) -> None:
    asked = {"temperature": 0.6, "top_k": 20, "do_sample": True, "top_p": None, "min_p": "0.1"}
    write(folder / "generation_config.json", asked)
    assert load_text(folder).sampling_defaults == asked


# ---- files that differ ---------------------------------------------------------------------------

TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>\n{% endfor %}"


def test_what_a_template_writes_behind_an_answer_ends_it(folder: Path) -> None:
    write(folder / "tokenizer_config.json", {"eos_token": "<s>", "chat_template": TURNS})
    text = load_text(folder)
    assert text.tokenizer.eos_token_ids == (258, 257)
    assert text.notes == ("<|end|> ends answers: the chat template writes it behind them",)
    write(folder / "generation_config.json", {"eos_token_id": [257, 258]})
    text = load_text(folder)
    assert (text.tokenizer.eos_token_ids, text.notes) == ((258, 257), ())


def test_a_choice_between_two_files_is_noted(folder: Path) -> None:
    write(folder / "tokenizer_config.json", {"bos_token": "<s>", "chat_template": "old"})
    write(folder / "special_tokens_map.json", {"bos_token": {"content": "<|end|>"}})
    write(folder / "chat_template.jinja", "new")
    text = load_text(folder)
    assert text.tokenizer.bos_token_id == 257
    assert any("those of special_tokens_map.json are taken" in note for note in text.notes)
    assert any("templates of .jinja files are taken" in note for note in text.notes)
    listed = {"257": {"content": "<|end|>", "special": True, "normalized": False}}
    config = {"bos_token": "<s>", "added_tokens_decoder": listed, "add_bos_token": True}
    write(folder / "tokenizer_config.json", config)
    text = load_text(folder)
    assert text.tokenizer.bos_token_id == 258
    assert any("those of tokenizer_config.json are taken" in note for note in text.notes)
    assert "add_bos_token says otherwise, but tokenizer.json does not add it" in text.notes


def test_a_token_that_has_another_id_elsewhere_is_noted(folder: Path) -> None:
    write(folder / "tokenizer_config.json", {"added_tokens_decoder": {"9000": {"content": "<x>"}}})
    text = load_text(folder)
    assert text.tokenizer.encode("<x>", add_special_tokens=False) == [259]
    assert text.notes == ("tokenizer.json's ids are taken, not others for: ['<x>']",)


@pytest.mark.parametrize("stated", [-1, 259, 2**63, 10**30, [257, -5], [10**9, 257]])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_ends_that_the_vocabulary_lacks_are_left_out(
    folder: Path, name: str, stated: object
) -> None:
    (folder / name).write_text(json.dumps({"eos_token_id": stated}), encoding="utf-8")
    text = load_text(folder)
    assert set(text.tokenizer.eos_token_ids) <= {257}
    assert any(note.startswith("eos_token_id: the vocabulary has no [") for note in text.notes)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"bos_token": 5}),
        ("tokenizer_config.json", {"eos_token": ["</s>"]}),
        ("tokenizer_config.json", {"pad_token": {"lstrip": True}}),
        ("tokenizer_config.json", {"pad_token": {"content": "<p>", "lstrip": "yes"}}),
        ("tokenizer_config.json", {"extra_special_tokens": "<x>"}),
        ("tokenizer_config.json", {"extra_special_tokens": [1]}),
        ("tokenizer_config.json", {"extra_special_tokens": {"x": 1}}),
        ("tokenizer_config.json", {"added_tokens_decoder": []}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<x>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"-1": {"content": "<x>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": 1}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"content": 1}}}),
        ("tokenizer_config.json", {"chat_template": 5}),
        ("special_tokens_map.json", {"bos_token": 5}),
        ("special_tokens_map.json", []),
        ("special_tokens_map.json", {"additional_special_tokens": {"a": 1}}),
        ("added_tokens.json", {"<x>": "first"}),
        ("added_tokens.json", {"<x>": None}),
        ("added_tokens.json", {"<x>": [1]}),
        ("config.json", {"eos_token_id": "2"}),
        ("config.json", {"eos_token_id": [[2]]}),
        ("generation_config.json", {"eos_token_id": True}),
        ("generation_config.json", {"eos_token_id": {"id": 2}}),
        ("chat_template.json", {"chat_template": {"default": 1}}),
        ("tokenizer.json", {"model": None}),
        ("tokenizer.json", []),
    ],
)
def test_a_value_of_a_wrong_type_is_one_line(folder: Path, name: str, content: object) -> None:
    write(folder / name, content)
    with pytest.raises(TextError) as caught:
        load_text(folder)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)
    assert name in str(caught.value) or str(folder) in str(caught.value)


def test_a_panic_of_the_library_is_one_line(folder: Path) -> None:
    found = json.loads((folder / "tokenizer.json").read_bytes())
    found["model"] |= {"continuing_subword_prefix": "more than a token", "merges": [["h", "e"]]}
    write(folder / "tokenizer.json", found)
    with pytest.raises(TextError, match=r"tokenizer\.json is not a readable tokenizer: ."):
        load_text(folder)


def test_a_template_that_is_no_utf_8_is_one_line(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"{{ messages }}\xff")
    with pytest.raises(TextError, match=r"chat_template\.jinja is not UTF-8"):
        load_text(folder)


def test_too_many_added_tokens_are_refused(folder: Path) -> None:
    listed = {str(259 + i): {"content": f"<|{i}|>", "special": True} for i in range(65_537)}
    write(folder / "tokenizer_config.json", {"added_tokens_decoder": listed})
    with pytest.raises(TextError, match="65537 added tokens, at most 65536 are read"):
        load_text(folder)
    del listed["259"]
    write(folder / "tokenizer_config.json", {"added_tokens_decoder": listed})
    assert load_text(folder).tokenizer.vocab_size == 259 + 65_536
