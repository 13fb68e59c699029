"""The errors users meet. Each message says what was expected, what was found (value and id), and what to do.

    SDSearchError
    +-- ConfigError(ValueError)      an option, a pair of options or a user class that cannot work
    +-- DataError(ValueError)        a file or a row that cannot be used
    +-- RetrievalError(RuntimeError) a search that failed; one rollout ends with it, the run goes on
    |   +-- RetrieverUnavailableError    no search can succeed now, whatever is asked: the server is gone or overloaded
    +-- HubError(RuntimeError)       a folder that is whole on disk and could not be pushed to the hub
    +-- StorageError(RuntimeError)   a file that could not be written: a full disk; the run stops on every rank
    |   +-- CheckpointError              a checkpoint that could not be
    +-- RolloutError(RuntimeError)   a batch of rollouts that must not be trained on; the run stops on every rank

A bad rollout is data (a stop reason and a count). A bad run is an exception. All are picklable: no custom `__init__`.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class SDSearchError(Exception):
    """Root of all errors raised on purpose by this library."""


class ConfigError(SDSearchError, ValueError):
    """An option, a pair of options or a user class that cannot work."""


class DataError(SDSearchError, ValueError):
    """A file or a row that cannot be used; the message names file and line."""


class RetrievalError(SDSearchError, RuntimeError):
    """A search that failed; the rollout that asked for it ends with StopReason.RETRIEVAL_ERROR."""


class RetrieverUnavailableError(RetrievalError):
    """No search can succeed now, whatever is asked. Smaller batches would fail as well, and each wait as long."""


class HubError(SDSearchError, RuntimeError):
    """A folder that is whole on disk and could not be pushed to the hub."""


class StorageError(SDSearchError, RuntimeError):
    """A file that could not be written, as on a full disk; raised on every rank together."""


class CheckpointError(StorageError):
    """A checkpoint that could not be written; raised on every rank together, with those before it intact."""


class RolloutError(SDSearchError, RuntimeError):
    """A batch of rollouts that must not be trained on; raised on every rank together."""


def first_line(error: BaseException) -> str:
    """What an exception says, on one line and without its full stop; the name of its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")


@contextmanager
def reading_foreign(expected: str, kind: type[SDSearchError] = ConfigError, advice: str = "") -> Iterator[None]:
    """Around code of other libraries that reads a file from elsewhere: whatever it raises becomes one line.

    They raise anything, down to a bare `Exception` for a tokenizer that is no tokenizer.

    Args:
        expected: what should be there and where; the reason follows it.
        kind: of the error.
        advice: what to do.
    """
    try:
        yield
    except SDSearchError:
        raise
    except Exception as error:
        raise kind(f"{expected}: {first_line(error)}. {advice}".rstrip()) from error
