"""Every exception that a user of tako may catch.

    TakoError                       has a message, a `hint` (what to do next) and a `code` (for programs)
    ├── TakoUnavailable             no store could be found for this process
    ├── ConfigError                 tako.toml is wrong
    ├── NotFound                    no such run, workflow or step
    ├── SecretMissing (KeyError)    this process was given no such secret
    ├── Refused                     an operation that the run's state does not allow
    ├── GroupUnhealthy              under `tako dev`: the workers that would take the run cannot work
    ├── InvalidValue (ValueError)   an argument that cannot be meant: a NaN duration, a naive datetime, a bad name
    ├── NotCarried (TypeError)      a value that cannot go through the store and come back the same
    │   └── TooLarge                a value over the size limit
    ├── Unreadable (ValueError)     a stored value that is damaged, or does not fit its type any more
    ├── PayloadRefused (ValueError) a payload that does not fit the handler's annotation
    ├── DuplicateWorkflow           two workflows with one name
    ├── StepMisuse (RuntimeError)   a step inside a step's body, a name with "#"
    ├── StepFailed                  a recorded failure whose own class is not there any more
    ├── StepTimeout (TimeoutError)  a step's body ran past its `timeout`
    ├── RunTimeout (TimeoutError)   an attempt ran past its workflow's `timeout`
    └── StoreError                  the store could not do it
        ├── StoreBusy               not now: disk full, no answer; the same call may work later
        │   ├── StoreLocked         another process holds the store for long
        │   └── StoreUnreachable    the store's database cannot be reached from here
        └── StoreTooNew             the store was written by a newer tako

What suspends or ends a run (`Suspension` in `step.py`) is a `BaseException` on purpose and not in this tree:
`except Exception` in a handler must not swallow it.
"""


class TakoError(Exception):
    """Something went wrong in tako."""

    code = "error"
    hint = ""

    def __init__(self, message: str = "", *, hint: str = "") -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())
        if hint:
            self.hint = hint


class TakoUnavailable(TakoError):
    """This process does not know which app it belongs to."""

    code = "unavailable"
    hint = "Run it inside a project (a folder with tako.toml), or set TAKO_APP_NAME and TAKO_DATA_DIR."


class ConfigError(TakoError):
    """tako.toml is wrong."""

    code = "config"


class NotFound(TakoError):
    """There is no such thing here."""

    code = "not_found"


class SecretMissing(TakoError, KeyError):
    """There is no such secret here."""

    code = "secret_missing"
    __str__ = Exception.__str__  # a KeyError's own shows the repr of its message


class Refused(TakoError):
    """The run's state does not allow that."""

    code = "refused"


class GroupUnhealthy(TakoError):
    """Under `tako dev`: the workers that would take the run cannot work."""

    code = "unhealthy"
    hint = "Nothing was stored. Mend it and save: tako dev tries again at once."


class InvalidValue(TakoError, ValueError):
    """That value cannot be meant."""

    code = "invalid"


class NotCarried(TakoError, TypeError):
    """A value cannot be stored and read back the same."""

    code = "not_carried"
    hint = (
        "Return plain data: dataclasses, dicts, lists, text, numbers, datetimes; keep handles and clients in the step."
    )


class TooLarge(NotCarried):
    """A value is over the size limit."""

    code = "too_large"
    hint = "Put the data where it belongs (a file, an object store, a table) and return its key."


class Unreadable(TakoError, ValueError):
    """A stored value cannot be read."""

    code = "unreadable"


class PayloadRefused(TakoError, ValueError):
    """The payload does not fit the handler."""

    code = "payload"
    hint = "Send what the handler's annotation asks for."


class DuplicateWorkflow(TakoError):
    """Two workflows have one name."""

    code = "duplicate_workflow"
    hint = "Rename one of them; a workflow's name is how its runs find it."


class StepMisuse(TakoError, RuntimeError):
    """A step is called where it cannot be."""

    code = "step_misuse"


class StepFailed(TakoError):
    """A step failed on an earlier pass."""

    code = "step_failed"


class StepTimeout(TakoError, TimeoutError):
    """A step's body ran past its timeout."""

    code = "step_timeout"


class RunTimeout(TakoError, TimeoutError):
    """An attempt ran past its workflow's timeout."""

    code = "run_timeout"


class StoreError(TakoError):
    """The store could not do it."""

    code = "store"


class StoreBusy(StoreError):
    """The store cannot take it right now."""

    code = "store_busy"
    hint = "Nothing was stored. Try again; if it lasts, look at the disk and at which process holds the file."


class StoreLocked(StoreBusy):
    """Another process holds the store for long."""

    code = "store_locked"
    holder: int | None = None  # its process id, where it is known


class StoreUnreachable(StoreBusy):
    """The store's database cannot be reached from here; others may be able to."""

    code = "store_unreachable"
    hint = "Nothing was stored. Try again; if it lasts, look at the database's server and the network to it."


class StoreTooNew(StoreError):
    """The store was written by a newer tako."""

    code = "store_too_new"
    hint = "Upgrade tako here; an older one must not touch this store."
