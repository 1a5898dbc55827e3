"""LeMix's client: submit requests and training examples to a cluster, from any program, without torch."""

from lemix.answers import Answer, Chunk, Generation, Score, Trained
from lemix.async_client import AsyncClient
from lemix.client import Client
from lemix.futures import Future
from lemix.items import GenerateItem, Item, ScoreItem, TrainItem
from lemix.token_stream import TokenStream
from lemix_common.logprobs import TokenLogprob
from lemix_common.sampling import Sampling, Stopping

__all__ = [
    "Answer",
    "AsyncClient",
    "Chunk",
    "Client",
    "Future",
    "GenerateItem",
    "Generation",
    "Item",
    "Sampling",
    "Score",
    "ScoreItem",
    "Stopping",
    "TokenLogprob",
    "TokenStream",
    "TrainItem",
    "Trained",
]
