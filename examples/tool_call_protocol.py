"""Searches as function calls: `<tool_call>{"name": "search", "arguments": {"query": "..."}}</tool_call>`.

What models trained on tools (Qwen's) and verl's search example write. The query is the text between the quotes; it
alone is searched, told to siblings and taught, the JSON around it is not.

    model:
      protocol: examples.tool_call_protocol.ToolCallProtocol

Documents come back between <tool_response> tags, inside the same turn of the assistant. For a turn of the user around
them, as chat templates of Qwen write tool results, set `chat_turns: true`.
"""

import re

from sdsearch_lightning.protocol import Protocol

PROMPT = (
    "Answer the question. Think inside <think> and </think> first. To search, write <tool_call>\n"
    '{"name": "search", "arguments": {"query": "your query"}}\n</tool_call>, and results will be shown. You can '
    "search several times. At the end write the answer alone inside <answer> and </answer>.\n"
    "Question: {question}\n"
)
INVALID = (
    "\nMy action is invalid: a call needs a name and a query in JSON, and an answer stands between <answer> and "
    "</answer>. Let me try again.\n"
)
CALL = re.compile(r'\{.*"quer(?:y|y_list|ies)"\s*:\s*\[?\s*"((?:[^"\\]|\\.)*)"', re.DOTALL)
TURNS = "<|im_end|>\n<|im_start|>user\n<tool_response>\n{passages}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"


class ToolCallProtocol(Protocol):
    """Other tags for actions and documents, and the query inside of a call."""

    def __init__(self, prompt: str = PROMPT, chat_turns: bool = False) -> None:
        """Chooses the tags; of a list of queries the first counts."""
        super().__init__(
            prompt,
            documents_tag="tool_response",
            search_tag="tool_call",
            invalid_message=INVALID,
            observation_template=TURNS if chat_turns else None,
        )

    def query_in(self, content: str) -> tuple[int, int] | None:
        """Where the first query stands in the call; None where it is no call, which is an invalid action."""
        found = CALL.search(content)
        return found.span(1) if found else None
