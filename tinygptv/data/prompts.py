"""All strings of prompts: templates, task tags, instruction pools, caption cleaning.

This is the only file that holds template strings. A *template* wraps an instruction into a turn; an *instruction pool*
lists the wordings among which one is drawn, each time a sample is put into a batch, for each task.
Source: upstream release (sections D.1 to D.6 of its data and conversation code).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

IMAGE_PLACEHOLDER = "<ImageHere>"
"""Placeholder of an image in text; ``num_query_tokens`` positions replace it."""


@dataclass(frozen=True)
class Template:
    """Rules that turn a conversation into text. ``prompt_layout`` is the one reader of these fields.

    Attributes:
        name: key in ``TEMPLATES``.
        turn: the question's wrapping, with ``{}`` for the images and the instruction.
        end_symbol: follows each answer; learned, and the text at which generation stops.
        image: how one image stands before the instruction of its turn.
        after_instruction: follows every instruction of a conversation about an image (the release ends them with a
            space).
        bos: each turn begins with the BOS token.
        opening: text before the first turn.
    """

    name: str
    turn: str
    end_symbol: str
    image: str = f"<Img>{IMAGE_PLACEHOLDER}</Img> "
    after_instruction: str = " "
    bos: bool = True
    opening: str = ""

    def wrap(self, instruction: str) -> str:
        """Put an instruction into the turn; braces inside the instruction are kept as they are."""
        return self.turn.replace("{}", instruction, 1)

    def cut_answer(self, text: str) -> str:
        """Generated text up to the end symbol."""
        return text.split(self.end_symbol, maxsplit=1)[0].strip()

    @property
    def end_symbol_apart(self) -> str:
        """Replacement of an end symbol inside an answer: ``###`` of a heading ``# # #``, a line break a space."""
        return " ".join(self.end_symbol) if len(self.end_symbol) > 1 else " "

    def escape_end_symbol(self, answer: str) -> str:
        """Keep an answer's own words from ending it."""
        # Twice: "#####" leaves another symbol behind the first replacement.
        once = answer.replace(self.end_symbol, self.end_symbol_apart)
        return once.replace(self.end_symbol, self.end_symbol_apart)


TEMPLATES: dict[str, Template] = {
    t.name: t
    for t in (
        # Stages 1 and 2: the image alone, then its caption.
        Template("caption", "{}", "\n", image=IMAGE_PLACEHOLDER, after_instruction=""),
        Template("human", "###Human: {} ###Assistant: ", "###"),  # stage 3, and the paper recipe's stage 4
        Template("inst", "[INST] {} [/INST]", "###"),  # the release's stage-4 training
        # The release's evaluation scripts: "###" separates the messages, without BOS.
        Template("released_eval", "Human: {}###Assistant: ", "###", after_instruction="", bos=False, opening="###"),
        Template("released_chat", "<s>[INST] {} [/INST]", "###"),  # the release's stage-4 demo
    )
}

VQA_SHORT_ANSWER = "[vqa] Based on the image, respond to this question with a short answer: {}"

INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "pair": (),  # no instruction at all: image, then caption
    "align": (
        "Describe this image in detail.",
        "Take a look at this image and describe what you notice.",
        "Please provide a detailed description of the picture.",
        "Could you describe the contents of this image for me?",
    ),
    "vqa": ("[vqa] {}", VQA_SHORT_ANSWER),
    "caption": tuple(
        "[caption] " + wording
        for wording in (
            "Briefly describe this image.",
            "Provide a concise depiction of this image.",
            "Present a short description of this image.",
            "Summarize this image in a few words.",
            "A short image caption:",
            "A short image description:",
            "A photo of ",
            "An image that shows ",
            "Write a short description for the image. ",
            "Write a description for the photo.",
            "Provide a description of what is presented in the photo.",
            "Briefly describe the content of the image.",
            "Can you briefly explain what you see in the image?",
            "Could you use a few words to describe what you perceive in the photo?",
            "Please provide a short depiction of the picture.",
            "Using language, provide a short account of the image.",
            "Use a few words to illustrate what is happening in the picture.",
        )
    ),
    "refer": (
        "[refer] {}",
        "[refer] give me the location of {}",
        "[refer] where is {} ?",
        "[refer] from this image, tell me the location of {}",
        "[refer] the location of {} is",
        "[refer] could you tell me the location for {} ?",
        "[refer] where can I locate the {} ?",
    ),
    "identify": (
        "[identify] {}",
        "[identify] what object is in this location {}",
        "[identify] identify the object present at this location {}",
        "[identify] what is it in {}",
        "[identify] describe this object in {}",
        "[identify] this {} is",
        "[identify] the object in {} is",
    ),
    "grounding": (
        "[grounding] please describe this image in details",
        "[grounding] describe this image as detailed as possible",
        "[grounding] summarize this image in details",
        "[grounding] give a thorough description of what you see in this image",
    ),
    "detection": ("[detection] {}",),
    "conversation": ("{}",),
    "instruct": ("{}",),
    "text": ("{}",),
}
"""Wordings per task; ``{}`` takes the question. Drawn uniformly."""

EVALUATION_INSTRUCTIONS: dict[str, str] = {
    "vqa": VQA_SHORT_ANSWER,
    "refer": "[refer] give me the location of {}",
    "identify": "[identify] what object is in this location {}",
    "caption": "[caption] Briefly describe this image.",
    "grounding": "[grounding] please describe this image in details",
    "detection": "[detection] {}",
    "true_false": "[vqa] Based on the image, is this statement true or false? {}",
    "vizwiz": "[vqa] The question is '{}' Based on the image, answer the question with a single word or phrase. "
    "and reply 'unanswerable' when the provided information is insufficient",
    "hateful": "This is an image writting '{}'. Is this image hateful? Answer yes or no. Answer: ",
}
"""The one wording per task that benchmarks use; 'writting' is the release's spelling, kept for equal scores."""


LONGEST_CAPTION = 50
"""Words that ``clean_caption`` keeps."""


def clean_caption(text: str, max_words: int = LONGEST_CAPTION) -> str:
    """Clean a caption or question as the release's ``blip_caption`` processor does.

    Lower-cases, turns ``. ! " ( ) * # : ; ~`` into spaces, collapses runs of white space, and keeps the first words.

    Args:
        text: any text.
        max_words: words kept.
    """
    text = re.sub(r"([.!\"()*#:;~])", " ", text.lower())
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


def escape_markers(text: str, special_tokens: Sequence[str] = ("<|endoftext|>",)) -> str:
    """Make untrusted text harmless: image placeholders and special tokens in it become ordinary words."""
    for marker in (IMAGE_PLACEHOLDER, *special_tokens):
        text = text.replace(marker, marker[0] + " " + marker[1:])
    return text
