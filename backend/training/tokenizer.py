"""The town model's tokenizer: byte-level BPE in which a town's words are whole tokens and any other text is bytes.

A word opening a line or following a special token gets the space that it has inside a sentence, so that "Bruno" is
one token wherever it stands. Decoding drops that space at the start of a text.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvarena.synthetic_qa.facts import chunk_text
from kvarena.synthetic_qa.questions import NOT_SAID, NOTE, OTHER_SYSTEM_PROMPTS, SYSTEM_PROMPT, Quiz
from kvarena.synthetic_qa.town import LINKS, TownShape, write_town

PAD, BOS, EOS, USER, ASSISTANT = "<pad>", "<s>", "</s>", "<user>", "<assistant>"
SPECIAL_TOKENS = [PAD, BOS, EOS, NOTE, USER, ASSISTANT]
PAD_ID, BOS_ID, EOS_ID, NOTE_ID, USER_ID, ASSISTANT_ID = range(6)
CHAT_TEMPLATE = """{{- '<s>' -}}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '<assistant>' + message.content + '</s>' -}}
{%- elif message.role == 'user' -%}
{{- '<user>' + message.content -}}
{%- else -%}
{{- message.content -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}
"""
_MAX_VOCABULARY = 4096
_NUM_TOWNS = 300


def train_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\n+"), "merged_with_previous"), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=_MAX_VOCABULARY,
        min_frequency=10,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample_texts(random.Random(seed)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=[NOTE, USER, ASSISTANT],
    )


def _sample_texts(rng: random.Random) -> Iterator[str]:
    for _ in range(_NUM_TOWNS):
        town = write_town(rng, TownShape(num_chunks=12, chunk_tokens=90, num_relations=8, links=LINKS))
        quiz = Quiz(town, rng)
        questions = quiz.all_facts() + quiz.followups(20) + quiz.unanswerable(10)
        texts = [chunk_text(chunk) for chunk in town] + [turn.question for asked in questions for turn in asked.turns]
        yield from texts
        yield ".".join(texts).replace(". ", ".")  # words that follow a full stop without a space
        yield from (NOT_SAID, SYSTEM_PROMPT, *OTHER_SYSTEM_PROMPTS, " # # ")
