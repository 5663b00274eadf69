"""Requests whose answers repeat texts: edits, summaries, retries and forms. Pure and seeded.

Decoding may take several tokens of such an answer at a time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from loadtest.documents import document
from loadtest.workloads import Conversation, Preset, Shape, Turn, Verbatim, Workload, of_one_lane

#: A form with more fixed text than answers.
ORDER_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "customer_name": {"type": "string", "maxLength": 20},
        "delivery_address": {
            "type": "object",
            "properties": {
                "street_and_number": {"type": "string", "maxLength": 24},
                "city": {"type": "string", "maxLength": 16},
                "postal_code": {"type": "string", "pattern": "^[0-9]{5}$"},
            },
            "required": ["street_and_number", "city", "postal_code"],
            "additionalProperties": False,
        },
        "number_of_packages": {"type": "integer", "minimum": 1, "maximum": 99},
        "is_express_delivery": {"type": "boolean"},
        "preferred_time_of_delivery": {"enum": ["in the morning", "in the afternoon", "any time"]},
        "payment_method": {"enum": ["credit card", "bank transfer", "cash on delivery"]},
    },
    "required": [
        "customer_name",
        "delivery_address",
        "number_of_packages",
        "is_express_delivery",
        "preferred_time_of_delivery",
        "payment_method",
    ],
    "additionalProperties": False,
}
ORDER_FORMAT: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {"name": "order", "strict": True, "schema": ORDER_SCHEMA},
}
_NUM_TRIES = 4


def _about(name: str, shape: Shape, task: str, prompt_tokens: int, max_tokens: int) -> Workload:
    """Return a workload of one task about documents."""
    prompt_tokens = shape.prompt_tokens or prompt_tokens
    max_tokens = shape.max_tokens or max_tokens

    def make(number: int) -> Conversation:
        text = document(prompt_tokens, shape.seed, name, number)
        return (Turn(Verbatim(f"{task}\n\n{text}"), max_tokens),)

    shaped = {"document_tokens": prompt_tokens, "max_tokens": max_tokens}
    plain = of_one_lane(name, shape, 1, make, shaped=shaped, endpoint="chat", per_worker=8)
    return replace(plain, ends_itself=True)


def _edit(shape: Shape) -> Workload:
    task = "Correct any mistakes in the following text and return the whole text."
    return _about("edit", shape, task, 112, 160)


def _summary(shape: Shape) -> Workload:
    task = "Summarize the following text. Keep its own words."
    return _about("summary", shape, task, 240, 128)


def _retry(shape: Shape) -> Workload:
    """Create prompts that are sent several times, each time with the same seed."""
    prompt_tokens, max_tokens = shape.prompt_tokens or 480, shape.max_tokens or 128

    def make(number: int) -> Conversation:
        text = document(prompt_tokens, shape.seed, "retry", number)
        content = f"Write a story that goes on from this text.\n\n{text}"
        messages = Verbatim([{"role": "user", "content": content}])
        return (Turn(messages, max_tokens, {"seed": number}),) * _NUM_TRIES

    shaped = {"document_tokens": prompt_tokens, "max_tokens": max_tokens, "tries": _NUM_TRIES}
    return of_one_lane("retry", shape, 1, make, shaped=shaped, endpoint="chat")


def _schema(shape: Shape) -> Workload:
    prompt_tokens, max_tokens = shape.prompt_tokens or 96, shape.max_tokens or 160
    task = (
        "Invent an order that fits the following text, and answer with a JSON object that has the "
        "keys customer_name, delivery_address (street_and_number, city, postal_code), "
        "number_of_packages, is_express_delivery, preferred_time_of_delivery and payment_method."
    )

    def make(number: int) -> Conversation:
        text = document(prompt_tokens, shape.seed, "schema", number)
        return (Turn(Verbatim(f"{task}\n\n{text}"), max_tokens),)

    shaped = {"max_tokens": max_tokens, "has_schema": shape.has_schema}
    plain = of_one_lane("schema", shape, 1, make, shaped=shaped, endpoint="chat", per_worker=8)
    return replace(
        plain,
        ends_itself=True,
        asks_for_json=True,
        response_format=ORDER_FORMAT if shape.has_schema else None,
    )


#: Name to description and constructor.
REPEATING: dict[str, Preset] = {
    "edit": ("texts to correct: the answer repeats the text", _edit),
    "summary": ("texts to summarize in their own words", _summary),
    "retry": ("prompts that are sent four times, with one seed", _retry),
    "schema": ("a JSON schema of a long form; --response-format none is its twin", _schema),
}
