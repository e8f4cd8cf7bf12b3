"""The exceptions of lazydp: what a caller may catch, and what the command line turns into one line.

    LazyDPError
    ├── InputError             something the user gave is wrong: a file, a value, a configuration
    │   └── FormatError        a file of ours that cannot be read: torn, foreign, or of a newer format
    ├── IntegrityError         bytes differ from the digest or the chain that vouches for them
    ├── PrivacyError           going on would break or misstate a privacy guarantee
    │   ├── BudgetExceededError    the dataset's budget does not admit the run
    │   ├── PendingNoiseError      a row still has pending noise, so nothing may be released
    │   ├── UnfinishedStepError    a step was interrupted while it changed weights
    │   ├── NonFiniteError         noise or parameters are not finite
    │   └── NotPrivateError        made without privacy, or under a test key
    ├── QualityError           a model did not reach the least quality that its run asks for, and is not released
    └── UnavailableError       something outside does not answer: a database, a port, a store

A message says what was expected, what was found, where, and what to do.
"""

from __future__ import annotations


class LazyDPError(Exception):
    """Base of every error that lazydp raises on purpose."""


class InputError(LazyDPError):
    """Something the user gave is wrong."""


class FormatError(InputError):
    """A file of ours cannot be read: torn, foreign, or of a newer format."""


class IntegrityError(LazyDPError):
    """Bytes differ from the digest or the chain that vouches for them."""


class PrivacyError(LazyDPError):
    """Going on would break or misstate a privacy guarantee."""


class BudgetExceededError(PrivacyError):
    """The dataset's budget does not admit the run."""


class PendingNoiseError(PrivacyError):
    """A row still has pending noise, so nothing may be released."""


class UnfinishedStepError(PrivacyError):
    """A step was interrupted while it changed weights: another one would use its noise again."""


class NonFiniteError(PrivacyError):
    """Noise or parameters are not finite, so the mechanism did not do what it states."""


class NotPrivateError(PrivacyError):
    """The model was made without privacy, or under a test key."""


class QualityError(LazyDPError):
    """A model did not reach the least quality that its run asks for: it is not released, and its charge stays."""


class UnavailableError(LazyDPError):
    """Something outside does not answer: a database, a port, a store."""
