"""Needles in long texts: `python bench/needle.py [MODEL] --kv int8,int4 [--lengths 1024 4096]`.

A five-digit key stands at some depth of a text of this project's pages, and the text ends with a
question for it. The key is ranked by its log-probability among nine others that are not in the
text: a small model can be judged by ranks, not by its free answers. Prints, for each format and
length, how often the key came first at each depth, and the mean distance to the likeliest other key
in nats.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from kv_variants import FULL_FORMAT, Pages, Variant, add_arguments, append, exact_decoder, variants
from policy_text import PolicyText

from model import build
from model.architectures.transformer import ServedDecoder
from model.kv_proof import PagedText
from server.text.load import load_text
from server.text.tokenizer import Tokenizer

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
#: Per cent of the text that stands before the needle, last first: the text before it is kept.
DEPTHS = (100, 75, 50, 25, 0)
NUM_KEYS = 10
#: Texts are cut at the borders of pages: a page that is encoded as a whole has no other place.
_PAGE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Needle:
    """A key, the sentence with it, a question for it, and the keys that could answer it."""

    sentence: list[int]
    question: list[int]
    #: The first is the right one.
    keys: list[list[int]]


def make_needle(tokenizer: Tokenizer, rng: random.Random) -> Needle:
    """Draw the keys."""

    def encoded(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    keys = rng.sample(range(10_000, 100_000), NUM_KEYS)
    begin = "The key of the lighthouse is"
    return Needle(
        encoded(f"\n\n{begin} {keys[0]}. Remember it.\n\n"),
        encoded(f"\n\nWhat is the key of the lighthouse? {begin}"),
        [encoded(f" {key}") for key in keys],
    )


def scores(decoder: ServedDecoder, text: PagedText | PolicyText, needle: Needle) -> list[float]:
    """Return the log-probability of each key after the question, behind the text so far."""
    num_tokens, found = text.num_tokens, list[float]()
    for key in needle.keys:
        text.rewind(num_tokens)
        hidden = text.append([*needle.question, *key])[-len(key) - 1 : -1]
        logprobs = decoder.logits(hidden).log_softmax(-1)
        found.append(float(logprobs.gather(1, torch.tensor(key)[:, None]).sum()))
    return found


def by_depth(
    decoder: ServedDecoder, pages: Pages, filler: Sequence[int], needle: Needle
) -> Iterator[tuple[int, int, float]]:
    """Yield each depth with the rank of the key and its distance to the best other one, in nats."""
    asked_tokens = len(needle.question) + max(map(len, needle.keys))
    text = pages.text(len(filler) + len(needle.sentence) + asked_tokens)
    for depth in DEPTHS:
        at = len(filler) * depth // 100
        at -= at % _PAGE_TOKENS
        if text.num_tokens:
            text.rewind(at)
        else:
            append(text, filler[:at])
        append(text, [*needle.sentence, *filler[at:]])
        right, *others = scores(decoder, text, needle)
        yield depth, 1 + sum(other >= right for other in others), right - max(others)


@torch.inference_mode()
def main() -> None:
    """Print a line for each variant and length."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 7168])
    parser.add_argument("--needles", type=int, default=3, help="for each length")
    arguments = parser.parse_args()
    if arguments.view is not None and arguments.view.is_by_score:
        parser.error("--view: texts are rewound here, which brings no dropped key back")
    tokenizer = load_text(build.resolve_source(arguments.model).path).tokenizer
    decoder = exact_decoder(arguments.model, arguments.quantization)
    text = "\n".join(page.read_text() for page in PAGES)
    words = tokenizer.encode(text, add_special_tokens=False)
    for length in arguments.lengths:
        for variant in [Variant(FULL_FORMAT), *variants(arguments)]:
            pages = Pages(decoder, variant, arguments.attention_backend)
            rng = random.Random(length)
            began_s, firsts, margins = time.perf_counter(), dict.fromkeys(reversed(DEPTHS), 0), []
            for _ in range(arguments.needles):
                first = rng.randrange(len(words) - length)
                needle = make_needle(tokenizer, rng)
                # The question, behind the text and the needle, begins a page, too.
                num_filler = length - _PAGE_TOKENS - length % _PAGE_TOKENS - len(needle.sentence)
                filler = words[first : first + num_filler]
                for depth, rank, margin in by_depth(decoder, pages, filler, needle):
                    firsts[depth] += rank == 1
                    margins.append(margin)
            rate = "  ".join(f"{depth}%: {count}" for depth, count in firsts.items())
            sys.stdout.write(
                f"{length:5} tokens  {variant!s:20} first of {NUM_KEYS}, of {arguments.needles}"
                f" needles, at  {rate}  nats ahead {sum(margins) / len(margins):6.3f}"
                f"  ({pages.backend}, {time.perf_counter() - began_s:.0f} s)\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
