"""Every error tiered-mem raises on purpose. All derive from `TieredMemError`.

A message says what is wrong, where, and what to do about it.
"""


class TieredMemError(Exception):
    """Base of every error raised by tiered-mem."""


class ConfigError(TieredMemError, ValueError):
    """An option, size, policy name or combination of options that can't be used."""


class BudgetError(ConfigError):
    """A byte budget that is zero, negative, larger than the machine, or below one event."""


class EventTooLargeError(BudgetError):
    """An event needs more slots at once than its tier has, or than other events leave free."""


class UnsupportedModelError(TieredMemError):
    """A model that tiered-mem can't wrap. Names the model type and what to use instead."""


class NoExpertsError(UnsupportedModelError):
    """A dense model where a Mixture of Experts was needed."""


class CheckpointError(TieredMemError):
    """A checkpoint that is missing, truncated, incomplete or not of the expected shapes."""


class StoreError(TieredMemError):
    """A store that can't be opened, read or written."""


class StoreMissingError(StoreError):
    """No store there, or one whose making was cut short before its first commit."""


class StoreMismatchError(StoreError):
    """A store packed from another checkpoint, with another dtype, or by another version."""


class StoreReadOnlyError(StoreError):
    """A write to a store that is open for reading or lies on read-only storage."""


class StoreFullError(StoreError):
    """The store's capacity or the disk under it is used up. Nothing half-written stays."""


class StoreBusyError(StoreError):
    """Another process is writing this store."""


class ChecksumError(StoreError):
    """Stored bytes don't match their checksum."""


class DeviceError(TieredMemError):
    """A GPU, its driver or a kernel image that can't be used."""


class TransferError(TieredMemError):
    """A transfer failed: the device or file reported an I/O error."""


class RuntimeClosedError(TieredMemError):
    """The runtime was closed; its memory is gone."""


class AlreadyWrappedError(TieredMemError):
    """The model is wrapped already."""


class TraceError(TieredMemError, ValueError):
    """A trace that can't be read, or can't be used for this. Names the file and the line."""


class PolicyError(TieredMemError):
    """A policy or predictor that was plugged in raised, or answered what can't be. Names it."""
