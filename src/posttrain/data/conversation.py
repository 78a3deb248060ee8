"""Prompts, completions and conversations: checked, joined, and tokenised as TRL's trainers do."""

from typing import TYPE_CHECKING, Any

from ..errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
_ROLES = ("system", "user", "assistant", "tool")


def require_text(value: Any, name: str) -> str:
    """Return `value` if it is text and not blank. Raises DataError that names the field."""
    if not isinstance(value, str):
        raise DataError(f"{name}: expected text, got {type(value).__name__} {value!r:.60}")
    if not value.strip():
        raise DataError(f"{name}: is empty")
    return value


def _turn(value: Any, name: str, *, ends: str) -> Any:
    return _conversation(value, name, ends=ends) if isinstance(value, list) else require_text(value, name)


def _same_kind(row: Row, name: str, prompt: Any) -> Any:
    value = row[name]
    if isinstance(value, list) != isinstance(prompt, list):
        raise DataError(f"{name}: prompt and {name} must both be text or both be messages")
    if isinstance(value, list):
        return _conversation(value, name, ends="assistant", opened=True)
    return require_text(value, name)


def _conversation(messages: Any, name: str, *, ends: str, opened: bool = False) -> list[dict[str, str]]:
    """Check the roles: an optional system turn, then user and assistant alternately, the last turn by `ends`.

    With `opened` a prompt came before, so the first turn is the assistant's. Tool turns may occur anywhere.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{name}: expected a list of messages, got {messages!r:.60}")
    checked: list[dict[str, str]] = []
    expected = "assistant" if opened else "user"
    for i, message in enumerate(messages):
        where = f"{name}[{i}]"
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise DataError(f"{where}: expected {{role, content}}, got {message!r:.80}")
        role, content = message["role"], message["content"]
        if role not in _ROLES:
            raise DataError(f"{where}.role: unknown role {role!r}; known: {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise DataError(f"{where}.content: expected text, got {type(content).__name__}")
        if role == "system":
            if i != 0 or opened:
                raise DataError(f"{where}.role: a system turn is allowed only at the beginning")
        elif role != "tool":
            if role != expected:
                raise DataError(f"{where}.role: expected {expected!r}, got {role!r}: roles are out of order")
            expected = "user" if role == "assistant" else "assistant"
            if role == "assistant" and not content.strip():
                raise DataError(f"{where}.content: is empty")
        checked.append({"role": role, "content": content})
    if checked[-1]["role"] not in (ends, "tool"):
        raise DataError(f"{name}: must end with a turn of {ends!r}, ends with {checked[-1]['role']!r}")
    return checked


def text_of(turns: Any) -> str:
    """The text of a completion, plain or as messages."""
    return turns if isinstance(turns, str) else "\n".join(m["content"] for m in turns)


def as_turn(prompt: Any, text: str) -> Any:
    """A completion's text in the form of its prompt: plain text, or one assistant message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def join(prompt: Any, completion: Any) -> Any:
    """Prompt and completion as one text or one conversation."""
    return prompt + completion


def render(
    turns: Any, tokenizer: "PreTrainedTokenizerBase", *, add_generation_prompt: bool = False, eos: bool = False
) -> list[int]:
    """Token ids of a text or a conversation, exactly as TRL's trainers make them."""
    if isinstance(turns, str):
        ids: list[int] = tokenizer(turns)["input_ids"]
        return [*ids, tokenizer.eos_token_id] if eos else ids
    rendered = tokenizer.apply_chat_template(
        turns, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
    )
    return list(rendered["input_ids"])


def is_exact(completion: str, expected: Any) -> bool:
    """Equal after surrounding white space is removed."""
    return completion.strip() == text_of(expected).strip()
