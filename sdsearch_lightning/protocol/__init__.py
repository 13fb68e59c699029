"""What is said in a rollout: the state machine of one conversation, the texts it speaks, text to tokens and back."""

from sdsearch_lightning.protocol.block_templates import BlockTemplates
from sdsearch_lightning.protocol.conversation import Continue, Conversation, Search, Stop
from sdsearch_lightning.protocol.templates import PROTOCOLS, AutoRefineProtocol, Protocol, SearchR1Protocol
from sdsearch_lightning.protocol.tokenization import TokenCodec

__all__ = [
    "PROTOCOLS",
    "AutoRefineProtocol",
    "BlockTemplates",
    "Continue",
    "Conversation",
    "Protocol",
    "Search",
    "SearchR1Protocol",
    "Stop",
    "TokenCodec",
]
