"""The chat prompt that a question is put into, and grpo_prompt.json, which keeps it."""

import re
from dataclasses import dataclass, field, fields

from torch import Tensor, nn

from engine.cli import json_object
from engine.files import UserError
from engine.models import PROMPT_FILE, model_folder, read_model_json

# Asked to see how far training moves a chat model on questions it is not trained on.
CHAT = """What is the capital of France?
Write one sentence about the sea.
How do I boil an egg?
Translate to French: good morning.
Name three colours.
Why is the sky blue?
Who wrote Romeo and Juliet?
Give me a word that rhymes with light."""
TASK_SETTINGS = ("problems", "min_operand", "max_operand", "rewards")
OFF_TASK = {"system": "", "questions": dict.fromkeys(CHAT.splitlines())}


@dataclass(frozen=True)
class Prompt:
    """How a model is asked."""

    system: str  # the system line; empty: none
    examples: list  # worked examples, [question, completion] each
    max_new_tokens: int
    chat_template_kwargs: dict = field(default_factory=dict)
    task: dict = field(default_factory=dict)  # TASK_SETTINGS, and the checksum of the rewards
    # {"system": str, "questions": {question: answer, or None where there is no single one}}
    off_task: dict = field(default_factory=lambda: OFF_TASK)

    def __post_init__(self):
        for each in fields(self):
            if not isinstance(getattr(self, each.name), each.type):
                raise TypeError(f"{each.name} must be of type {each.type.__name__}")
        if self.max_new_tokens < 1:
            raise ValueError("max_new_tokens must be at least 1")

    def chat(self, question: str) -> list[dict[str, str]]:
        """The messages that put a question to the model."""
        pairs = [("system", self.system)] if self.system else []
        for asked, answered in self.examples:
            pairs += [("user", asked), ("assistant", answered)]
        pairs.append(("user", question))
        return [{"role": role, "content": content} for role, content in pairs]


def make_prompt(config, examples: list[list[str]], rewards_sha256: str) -> Prompt:
    """The prompt of a run, from its Config. Raises UserError."""
    saved = read_prompt(config.model_name)
    return Prompt(
        system=config.system_prompt,
        examples=examples,
        max_new_tokens=config.max_new_tokens,
        chat_template_kwargs=json_object("--chat_template_kwargs", config.chat_template_kwargs),
        task={n: getattr(config, n) for n in TASK_SETTINGS} | {"rewards_sha256": rewards_sha256},
        off_task=saved.off_task if saved else OFF_TASK,
    )


def read_prompt(model_name: str) -> Prompt | None:
    """The grpo_prompt.json of a model; None if it has none. Raises UserError if it is damaged."""
    content = read_model_json(model_name, PROMPT_FILE)
    try:
        return None if content is None else Prompt(**content)
    except (TypeError, ValueError) as error:
        file = model_folder(model_name) / PROMPT_FILE
        raise UserError(f"{file} is not a prompt as training writes it: {error}") from error


def encode_prompts(
    tokenizer, questions: list[str], prompt: Prompt, device
) -> tuple[Tensor, Tensor]:
    """Put each question into the chat and tokenise, padded on the left.

    Returns (prompt_ids, prompt_mask), both (B, P) int64; the mask is 1 on real tokens. Raises
    UserError if the chat template fails.
    """
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    texts = render(tokenizer, [prompt.chat(question) for question in questions], prompt)
    try:
        batch = tokenizer(texts, add_special_tokens=False, **options)
    except Exception as error:  # third-party code on foreign files
        raise UserError(f"the model's tokenizer fails: {error}") from error
    return batch["input_ids"].to(device), batch["attention_mask"].to(device)


def render(tokenizer, chats: list[list[dict]], prompt: Prompt, answered: bool = False) -> list[str]:
    """The texts that the chat template makes of chats. Raises UserError if it fails."""
    options = {"tokenize": False, "add_generation_prompt": not answered}
    try:
        return tokenizer.apply_chat_template(chats, **options, **prompt.chat_template_kwargs)
    except Exception as error:  # the template is foreign code, run in a sandbox
        remedy = '; if it takes no system line: --system_prompt "", and the rule in the question'
        text = f"the model's chat template fails: {error}{remedy if prompt.system else ''}"
        raise UserError(text) from error


def check_prompt(tokenizer, questions: list[str], prompt: Prompt, eos_ids: list[int]) -> None:
    """Compare what the chat template makes of a prompt with what it was given.

    Raises UserError if it loses the question; prints a warning for each other surprise.
    """
    shown = [text for example in prompt.examples for text in example]
    texts = render(tokenizer, [prompt.chat(question) for question in questions], prompt)
    for question, text in zip(questions, texts, strict=True):
        if question.strip() not in text:
            raise UserError(
                f"the model's chat template leaves out the question {question!r}: it makes {text!r}"
                " of it; use a template that takes the content of a message as text"
            )
    for part, given in (("system line", [prompt.system]), ("worked examples", shown)):
        if any(each.strip() not in texts[0] for each in given):
            print(f"warning: the model's chat template leaves out the {part}")
    if re.search("strftime_now|date_string", str(tokenizer.chat_template)):
        print(
            "warning: the model's chat template writes the date, so that runs of different days"
            """ differ; fix it with --chat_template_kwargs '{"date_string": "26 Jul 2024"}'"""
        )
    answer = {"role": "assistant", "content": "an answer"}
    [chat] = render(tokenizer, [[*prompt.chat(questions[0]), answer]], prompt, answered=True)
    after = chat.rpartition("an answer")[2].strip()
    first = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
    if first and first[0] not in eos_ids:
        ends = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(eos_ids)))
        print(
            f"warning: the chat template ends an answer with {tokenizer.decode(first)!r}, but only"
            f" {ends} ends a completion; name it in the model's generation_config.json"
        )


def check_question(question: str, tokenizer, where: str = "the question") -> None:
    """Raise UserError for a question that holds a token which steers the chat."""
    for token in tokenizer.all_special_tokens:
        if token in question:
            raise UserError(f"{where} holds {token}, which this model reserves; reword it")


def longest_last(tokenizer, questions: list[str], prompt: Prompt) -> list[str]:
    """The question with the shortest prompt and the one with the longest, in tokens."""
    lengths = []
    for start in range(0, len(questions), 1000):  # 100,000 at once would take gigabytes
        chunk = tokenizer(questions[start : start + 1000], add_special_tokens=False)
        lengths += map(len, chunk["input_ids"])
    order = sorted(range(len(questions)), key=lengths.__getitem__)
    # The template may join tokens at the edges of a question.
    candidates = [questions[i] for i in order[-16:]]
    _, mask = encode_prompts(tokenizer, candidates, prompt, "cpu")
    return [questions[order[0]], candidates[int(mask.sum(dim=1).argmax())]]


def decode(tokenizer, rows: list[list[int]]) -> list[str]:
    """The texts of completions, special tokens included.

    A model can have more logits than its tokenizer has tokens. Such ids decode to nothing, so a
    reward would not see them: they become the whole text.
    """
    texts = tokenizer.batch_decode(
        rows, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    unknown = [[i for i in row if i >= len(tokenizer)] for row in rows]
    return [f"<unknown tokens {ids}>" if ids else t for t, ids in zip(texts, unknown, strict=True)]


def check_length(
    model: nn.Module, prompt_ids: Tensor, new_tokens: int, where: str = "the question"
) -> None:
    """Raise UserError if prompts (B, P) and new tokens exceed the model's context."""
    length = prompt_ids.shape[1] + new_tokens
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length
    if length > limit:
        raise UserError(
            f"{where}: prompt and answer need {length} tokens; this model's context is {limit}"
        )
