"""tako: durable workflows, checkpointed step by step, next to your app. The public names; `workflow.py` is where to
begin."""

from tako_runtime.errors import (
    ConfigError,
    DuplicateWorkflow,
    GroupUnhealthy,
    InvalidValue,
    NotCarried,
    NotFound,
    PayloadRefused,
    Refused,
    RunTimeout,
    SecretMissing,
    StepFailed,
    StepMisuse,
    StepTimeout,
    StoreBusy,
    StoreError,
    StoreLocked,
    StoreTooNew,
    StoreUnreachable,
    TakoError,
    TakoUnavailable,
    TooLarge,
    Unreadable,
)
from tako_runtime.secrets import secrets
from tako_runtime.state import Backoff
from tako_runtime.step import Step, Suspension, SyncStep
from tako_runtime.workflow import Workflow, signal, signal_sync, workflow

__version__ = "0.1.0"

__all__ = [
    "workflow",
    "Workflow",
    "Step",
    "SyncStep",
    "Backoff",
    "signal",
    "signal_sync",
    "secrets",
    "Suspension",
    "TakoError",
    "TakoUnavailable",
    "ConfigError",
    "NotFound",
    "SecretMissing",
    "Refused",
    "InvalidValue",
    "NotCarried",
    "TooLarge",
    "Unreadable",
    "PayloadRefused",
    "DuplicateWorkflow",
    "GroupUnhealthy",
    "StepMisuse",
    "StepFailed",
    "StepTimeout",
    "RunTimeout",
    "StoreError",
    "StoreBusy",
    "StoreLocked",
    "StoreTooNew",
    "StoreUnreachable",
]
