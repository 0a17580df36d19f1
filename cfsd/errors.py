"""What goes wrong in ways that the user can mend."""


class CfsdError(Exception):
    """Anything reported as one message without a traceback."""


class BadInput(CfsdError):
    """The user's input cannot work: what happened, the value, what is allowed, what to do."""


class StoreError(CfsdError):
    """An artifact is missing or damaged, and how to get it back."""


class NotFinite(CfsdError):
    """A loss, a gradient or a logit became NaN or infinite; never retried."""


class OutOfMemory(CfsdError):
    """The device's memory did not suffice; says which settings need less."""


class Stopped(CfsdError):
    """Asked to stop; the work done so far is kept and the next run continues it."""


class Crashed(CfsdError):
    """A stage's process died without saying why; its log's end is in the message. Retried once."""


class NotHere(BadInput):
    """This machine lacks what another may have: a network, a GPU, a package, room on a disk. A plan only says it."""


class BadEnvironment(BadInput):
    """The machine, or a service that the environment names, does not do what is needed: which, why, what to do."""
