"""The chat prompt that a question is put into, and grpo_prompt.json, which keeps it."""

import dataclasses
import json
from dataclasses import dataclass, field

from torch import Tensor, nn

from engine.files import UserError, read_json
from engine.models import PROMPT_FILE, model_folder

# Asked to see how far training moves a chat model on questions it is not trained on.
CHAT = """What is the capital of France?
Write one sentence about the sea.
How do I boil an egg?
Translate to French: good morning.
Name three colours.
Why is the sky blue?
Who wrote Romeo and Juliet?
Give me a word that rhymes with light."""
OFF_TASK = {"system": "", "questions": dict.fromkeys(CHAT.splitlines())}


@dataclass(frozen=True)
class Prompt:
    """How a model is asked."""

    system: str  # the system line; empty: none
    examples: list  # worked examples, [question, completion] each
    max_new_tokens: int
    chat_template_kwargs: dict = field(default_factory=dict)
    task: dict = field(default_factory=dict)  # the settings that name problems and rewards
    # {"system": str, "questions": {question: answer, or None where there is no single one}}
    off_task: dict = field(default_factory=lambda: OFF_TASK)

    def chat(self, question: str) -> list[dict[str, str]]:
        """The messages that put a question to the model."""
        messages = [("system", self.system)] if self.system else []
        for asked, answered in self.examples:
            messages += [("user", asked), ("assistant", answered)]
        pairs = [*messages, ("user", question)]
        return [{"role": role, "content": content} for role, content in pairs]


def template_kwargs(text: str) -> dict:
    """Read --chat_template_kwargs. Raises UserError."""
    try:
        kwargs = json.loads(text)
    except ValueError as error:
        raise UserError(f"--chat_template_kwargs {text:.80}: not valid JSON: {error}") from error
    if not isinstance(kwargs, dict):
        raise UserError(f'--chat_template_kwargs {text:.80}: not an object like {{"a": false}}')
    return kwargs


def make_prompt(config, examples: list[list[str]], rewards_sha256: str) -> Prompt:
    """The prompt of a run, from its Config. Raises UserError."""
    names = "problems", "min_operand", "max_operand", "rewards"
    saved = read_prompt(config.model_name)
    return Prompt(
        system=config.system_prompt,
        examples=examples,
        max_new_tokens=config.max_new_tokens,
        chat_template_kwargs=template_kwargs(config.chat_template_kwargs),
        task={n: getattr(config, n) for n in names} | {"rewards_sha256": rewards_sha256},
        off_task=saved.off_task if saved else OFF_TASK,
    )


def read_prompt(model_name: str) -> Prompt | None:
    """The grpo_prompt.json of a model; None if it has none. Raises UserError if it is damaged."""
    folder = model_folder(model_name)
    if folder is None or not (folder / PROMPT_FILE).exists():
        return None
    try:
        prompt = Prompt(**read_json(folder / PROMPT_FILE))
        if all(isinstance(getattr(prompt, f.name), f.type) for f in dataclasses.fields(Prompt)):
            return prompt
    except TypeError:  # names are missing or unknown
        pass
    raise UserError(f"{folder / PROMPT_FILE} is not a prompt as training writes it")


def encode_prompts(
    tokenizer, questions: list[str], prompt: Prompt, device
) -> tuple[Tensor, Tensor]:
    """Put each question into the chat and tokenise, padded on the left.

    Returns (prompt_ids, prompt_mask), both (B, P) int64; the mask is 1 on real tokens. Raises
    UserError if the chat template fails.
    """
    chats = [prompt.chat(question) for question in questions]
    try:
        texts = tokenizer.apply_chat_template(
            chats, tokenize=False, add_generation_prompt=True, **prompt.chat_template_kwargs
        )
    except Exception as error:  # the template is foreign code, run in a sandbox
        raise UserError(f"the model's chat template fails: {error}") from error
    batch = tokenizer(
        texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    )
    return batch["input_ids"].to(device), batch["attention_mask"].to(device)


def check_length(model: nn.Module, prompt_ids: Tensor, new_tokens: int) -> None:
    """Raise UserError if prompts (B, P) and new tokens exceed the model's context."""
    length = prompt_ids.shape[1] + new_tokens
    limit = getattr(model.config, "max_position_embeddings", None) or length
    if length > limit:
        raise UserError(f"prompt and answer need {length} tokens; this model's context is {limit}")
