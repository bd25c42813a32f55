"""The signals that end a process, and that somebody sends it.

SIGSEGV and its kind are left out: after them nothing can be relied on. Python ignores SIGPIPE and SIGXFSZ.
Not every system has all of them.
"""

ENDING = (
    "SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGBREAK", "SIGXCPU", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGIO",
    "SIGPWR", "SIGSTKFLT",
)  # fmt: skip
